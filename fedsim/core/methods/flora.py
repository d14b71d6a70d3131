"""FLoRA (arXiv 2409.05976): the clients' factors are stacked, which is exact; clients add the product to W and start a fresh LoRA.

B = [B_1 .. B_c], A = [p_1 s A_1; ..; p_c s A_c]. Ranks may differ. The fresh A is drawn from seed and round, so it costs no bytes.
"""

from fedsim.choices import Init
from fedsim.core.collecting import Collected
from fedsim.core.forms import LORA, AdapterSpec
from fedsim.core.initialization import lora
from fedsim.core.methods.method import Method, Outcome
from fedsim.seeding import derive_seed
from fedsim.types import Adapter


def _fresh(spec: AdapterSpec, seed: int, round: int) -> Adapter:
    return lora(spec, {}, derive_seed(seed, "flora", round))


def _fold_all(collected: Collected) -> Outcome:
    return Outcome(_fresh(collected.spec, collected.seed, collected.round + 1), collected.fold())


FLORA = Method(
    name="flora",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B", "A"),),
    finish=_fold_all,
    folds=True,
    restart=_fresh,
    products=True,
    ranks=True,
    linear=False,
    lasting=False,
)
