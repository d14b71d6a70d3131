"""RoLoRA (arXiv 2409.02346): B and A take turns; in each round the clients train and send one of them and hold the other in common."""

from fedsim.choices import Init
from fedsim.core.forms import LORA
from fedsim.core.methods.method import Method

ROLORA = Method(
    name="rolora",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B",), ("A",)),  # B first: with B = 0 the gradient on A vanishes
    lasting=False,
)
