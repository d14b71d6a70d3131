"""Centralised training of the same adapter on the pooled data, the baseline for every federated method.

Its batch is the union of the batches that the clients of a round would take at the same time (batch_size examples of each), so it makes
as many optimizer steps on as many tokens, with the same rate and schedule, as the federation.
"""

from dataclasses import replace

from fedsim.core.methods.fed_sb import FED_SB

CENTRALIZED = replace(FED_SB, name="centralized", pooled=True, ranks=False)
