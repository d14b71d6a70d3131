"""FedEx-LoRA (arXiv 2410.09432): A and B are averaged as in FedIT, and the residual is added to the base weights.

The residual sum_i p_i s B_i A_i - s B A makes it exact. It is sent dense, or as stacked factors: since it equals
sum_i p_i s (B_i A_i - B_i A), it is the product of U = [B_1 .. B_c] and V = [p_i s (A_i - A)].
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
