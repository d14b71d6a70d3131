"""FedSA-LoRA (arXiv 2410.01463): clients train A and B; A is averaged, B stays with its client and makes the model personal.

A client sends r x in numbers per layer and round. There is no global model: each client answers its share of the questions with its own B.
"""

from fedsim.choices import Init
from fedsim.core.forms import LORA
from fedsim.core.methods.method import Method

FEDSA_LORA = Method(
    name="fedsa_lora",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B", "A"),),
    personal=("B",),
)
