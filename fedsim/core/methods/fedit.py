"""FedIT (arXiv 2305.05644): clients train LoRA's A and B; the server averages each separately.

Not exact: the product of the means is not the mean of the products.
"""

from fedsim.choices import Init
from fedsim.core.forms import LORA
from fedsim.core.methods.method import Method

FEDIT = Method(
    name="fedit",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B", "A"),),
    exact=False,
)
