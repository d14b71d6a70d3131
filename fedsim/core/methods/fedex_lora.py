"""FedEx-LoRA (arXiv 2410.09432): A and B are averaged as in FedIT, and what that misses is added to the base weights.

The residual sum_i p_i s B_i A_i - s B A makes it exact. It is sent dense, or as stacked factors: as sum_i p_i (B_i A_i - B_i A) is the same
sum, U = [B_1 .. B_c] and V = [p_i s (A_i - A)] have the product.
"""

from fedsim.choices import Init
from fedsim.core.collecting import Collected
from fedsim.core.forms import LORA
from fedsim.core.methods.method import Method, Outcome


def _with_residual(collected: Collected) -> Outcome:
    mean = collected.factors
    return Outcome(mean, collected.fold(less=mean))


FEDEX_LORA = Method(
    name="fedex_lora",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B", "A"),),
    finish=_with_residual,
    folds=True,
    products=True,
    linear=False,
    lasting=False,
)
