"""FlexLoRA (arXiv 2402.11505): the server averages the dense updates and hands out their truncated SVD, to each client its own rank.

The best approximation of rank r of the exact mean; exact only where the mean has no higher rank.
"""

from fedsim.choices import Init
from fedsim.core.collecting import Collected
from fedsim.core.forms import LORA
from fedsim.core.initialization import truncated_svd
from fedsim.core.methods.method import Method, Outcome, always
from fedsim.types import Adapter


def _best_of_rank(collected: Collected) -> Outcome:
    spec = collected.spec
    factors: Adapter = {}
    for layer in spec.layers:
        left, values, right = truncated_svd(collected.product(layer), spec.rank, collected.seed, layer)
        factors |= {f"{layer}.B": left * values / spec.scaling, f"{layer}.A": right}
    return Outcome(factors, {})


FLEXLORA = Method(
    name="flexlora",
    form=LORA,
    inits=(Init.lora,),
    trained=always("B", "A"),
    finish=_best_of_rank,
    exact=False,
    products=True,
    ranks=True,
    linear=False,
    lasting=False,
)
