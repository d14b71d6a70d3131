"""FFA-LoRA (arXiv 2403.12313): A is common, drawn from the seed, and frozen; clients train B, from zero, and the server averages it.

Exact, because sum_i p_i B_i A = (sum_i p_i B_i) A. Published counts halve LoRA's; only B is sent, r x out per layer.
"""

from fedsim.choices import Init
from fedsim.core.forms import LORA
from fedsim.core.methods.method import Method

FFA_LORA = Method(
    name="ffa_lora",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B",),),
)
