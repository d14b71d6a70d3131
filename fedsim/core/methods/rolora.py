"""RoLoRA (arXiv 2409.02346): B and A alternate; in each round the clients train and send one of them and share the other.

Exact, since one factor is common. A client sends r x out or r x in numbers per layer and round. The paper trains A in odd rounds; here
rounds count from 1 and B is first, because with B = 0 the gradient on A vanishes and the first round would change nothing.
"""

from fedsim.choices import Init
from fedsim.core.forms import LORA
from fedsim.core.methods.method import Method

ROLORA = Method(
    name="rolora",
    form=LORA,
    inits=(Init.lora,),
    turns=(("B",), ("A",)),
    lasting=False,
)
