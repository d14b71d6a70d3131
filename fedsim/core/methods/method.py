"""What makes a method: the form of its adapters, what a client trains and sends, and what the server makes of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedsim.choices import Init
from fedsim.core.collecting import Collected
from fedsim.core.forms import HEAD, AdapterSpec, Form
from fedsim.types import Adapter


@dataclass(frozen=True)
class Outcome:
    """The server's state after a round: the factors from which the next one starts, and what is added to the base weights for good.

    `fold` has {layer}.W [out, in], or {layer}.U and {layer}.V whose product it is; empty where the base weights stay.
    """

    factors: Adapter
    fold: Adapter


def keep_mean(collected: Collected) -> Outcome:
    """The mean of what the clients sent is the start of the next round."""
    return Outcome(collected.factors, {})


@dataclass(frozen=True)
class Method:
    """One federated method.

    Clients train the kinds `trained(round)`, of which `personal` never leave them; `before_upload` may fold some into others, which are
    then in `local` and start anew. The server averages the rest and calls `finish`.
    """

    name: str
    form: Form
    inits: tuple[Init, ...]  # that make sense, the default first
    trained: Callable[[int], tuple[str, ...]]
    finish: Callable[[Collected], Outcome] = keep_mean
    folds: bool = False  # `finish` adds something to the base weights in every round
    personal: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    before_upload: Callable[[Adapter], Adapter] | None = None
    exact: bool = True  # the global update equals the weighted mean of the clients' updates
    restart: Callable[[AdapterSpec, int, int], Adapter] | None = None  # all factors at the start of a round, of (spec, seed, round)
    products: bool = False  # `finish` needs the mean of the clients' dense updates, or their stacked factors
    remade: tuple[str, ...] = ()  # kinds that `finish` makes anew each round besides the averaged ones
    ranks: bool = False  # clients may have different ranks
    linear: bool = True  # the server needs sums only, so that secure aggregation is possible
    lasting: bool = True  # a trained factor means the same in every round, so that moments and residues may be kept
    pooled: bool = False  # one party holds all data and nothing travels

    def uploaded(self, round: int) -> tuple[str, ...]:
        """Returns the kinds of factors that a client sends."""
        return tuple(kind for kind in self.trained(round) if kind not in (*self.personal, *self.local))

    def changed(self, round: int) -> tuple[str, ...]:
        """Returns the kinds of common factors that a round leaves changed."""
        return (*self.uploaded(round), *self.remade)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of factors: the form's, and a classification head's where it is trained."""
        return (*self.form.shapes(1, 1, 1, 1), *((HEAD,) if HEAD in self.trained(1) else ()))

    @property
    def moving(self) -> tuple[str, ...]:
        """Kinds that differ from round to round; the others are common bases."""
        kinds = {*self.trained(1), *self.trained(2), *self.remade} - set(self.personal)
        return tuple(kind for kind in self.kinds if kind in kinds)


def with_head(method: Method) -> Method:
    """Returns the method for a model that classifies: in every round its head is trained, sent and averaged beside the own kinds."""
    return replace(method, trained=lambda round: (*method.trained(round), HEAD))


def always(*kinds: str) -> Callable[[int], tuple[str, ...]]:
    """Returns the rule that the same kinds train in every round."""
    return lambda round: kinds
