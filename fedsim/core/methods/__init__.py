"""The federated methods, as values: a new one is one file and one line here."""

from fedsim.core.methods.centralized import CENTRALIZED
from fedsim.core.methods.fed_sb import FED_SB
from fedsim.core.methods.method import Method

METHODS: dict[str, Method] = {method.name: method for method in (FED_SB, CENTRALIZED)}

__all__ = ["METHODS", "Method"]
