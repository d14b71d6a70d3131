"""The federated methods, as values: a new one is one file and one line here."""

from fedsim.core.methods.centralized import CENTRALIZED
from fedsim.core.methods.fed_sb import FED_SB
from fedsim.core.methods.fedex_lora import FEDEX_LORA
from fedsim.core.methods.fedit import FEDIT
from fedsim.core.methods.fedsa_lora import FEDSA_LORA
from fedsim.core.methods.fedsvd import FEDSVD
from fedsim.core.methods.ffa_lora import FFA_LORA
from fedsim.core.methods.flexlora import FLEXLORA
from fedsim.core.methods.flora import FLORA
from fedsim.core.methods.full import FULL
from fedsim.core.methods.lora_xs import LORA_XS
from fedsim.core.methods.method import Method, with_head
from fedsim.core.methods.ravan import RAVAN
from fedsim.core.methods.rolora import ROLORA

_ALL = (FED_SB, FEDIT, FFA_LORA, FEDEX_LORA, FLORA, FLEXLORA, ROLORA, FEDSVD, FEDSA_LORA, RAVAN, LORA_XS, FULL, CENTRALIZED)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}

__all__ = ["METHODS", "Method", "with_head"]
