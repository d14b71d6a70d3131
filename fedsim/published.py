"""Communication counts published by the authors of Fed-SB (arXiv 2502.15436): parameters of one round, for one client, in one direction.

They exclude the bases, the initial gradients and the other direction.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

SOURCE = "arXiv 2502.15436"
MISTRAL_7B = Counter({(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32})
"""Number of adapted layers of each shape (out, in): q, k, v, o, gate, up and down of 32 blocks."""


@dataclass(frozen=True)
class Published:
    """One published count. `differs` says why this project's count differs, if it does."""

    method: str
    rank: int
    millions: str  # of parameters, as printed
    down: bool = False  # whether the client receives them; else it sends them
    differs: str = ""

    @property
    def parameters(self) -> float:
        """Number of parameters, to the printed precision."""
        return 1e6 * float(self.millions)


PUBLISHED = (
    Published("fed_sb", 120, "3.23"),
    Published("fed_sb", 160, "5.73"),
    Published("fed_sb", 200, "8.96"),
    Published("fedit", 32, "83.9"),
    Published("ffa_lora", 32, "41.9", differs="half of LoRA's A and B; what is sent is B alone, r x out of each layer, which is 44.0 M"),
    Published("fedex_lora", 32, "2097", down=True, differs="the stacked residual alone; the averaged A and B, 83.9 M, go down with it"),
    Published("flora", 32, "2097", down=True),
)
CLIENTS = 25
"""Clients of the published runs, all of them in the single round."""


def published(method: str, rank: int, clients: int, shapes: Iterable[tuple[int, int]]) -> Published | None:
    """Returns the published count for this method, rank, number of clients in a round and shapes (out, in) of all adapted layers."""
    if clients != CLIENTS or Counter(shapes) != MISTRAL_7B:
        return None
    return next((each for each in PUBLISHED if (each.method, each.rank) == (method, rank)), None)
