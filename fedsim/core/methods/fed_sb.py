"""Fed-SB (arXiv 2502.15436): clients train R of LoRA-SB on common bases B and A; the server averages R.

Exact, because sum_i p_i B R_i A = B (sum_i p_i R_i) A. The bases are ordered by singular value, so a client of smaller rank r_i holds the
leading r_i columns and rows and trains the leading r_i x r_i block; every entry is averaged over the clients that trained it.
"""

from fedsim.choices import Init
from fedsim.core.forms import LORA_SB
from fedsim.core.methods.method import Method

FED_SB = Method(
    name="fed_sb",
    form=LORA_SB,
    inits=(Init.gradient, Init.gradient_public, Init.gradient_dp, Init.weight_svd, Init.orthogonal),
    turns=(("R",),),
    ranks=True,
)
