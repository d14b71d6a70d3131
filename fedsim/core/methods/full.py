"""Federated averaging of all adapted weights themselves (FedAvg, arXiv 1602.05629): no adapter, for small models.

Exact. A client sends out x in numbers per layer and round.
"""

from fedsim.choices import Init
from fedsim.core.forms import DENSE
from fedsim.core.methods.method import Method

FULL = Method(
    name="full",
    form=DENSE,
    inits=(Init.zero,),
    turns=(("D",),),
)
