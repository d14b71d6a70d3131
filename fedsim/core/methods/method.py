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

    In a round clients train some kinds of factors: the rounds take the `turns` one after the other, and begin again. Of these, `personal`
    never leave the clients; `before_upload` may fold some into others, which are then in `local` and start anew. The server averages the
    rest and calls `finish`.

    `before_upload` takes and returns {layer.kind: tensor} of one client's trained factors. `finish` returns the kinds that it changes; the
    others stay. Round 1 is the first. A method's value never changes in a run.

    Raises ValueError for turns that name no factors of the form.
    """

    name: str
    form: Form
    inits: tuple[Init, ...]  # that make sense, the default first
    turns: tuple[tuple[str, ...], ...]  # kinds that are trained in round 1, in round 2, ..., then from the first again
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

    def __post_init__(self) -> None:
        known = (*self.form.kinds, HEAD)
        if not self.turns or not all(turn and set(turn) <= set(known) for turn in self.turns):
            raise ValueError(
                f"Expected turns of kinds of factors that {self.form.name} has, {', '.join(self.form.kinds)}, got {self.turns}."
            )

    @property
    def ever_trained(self) -> frozenset[str]:
        """Kinds that are trained in one round or another."""
        return frozenset(kind for turn in self.turns for kind in turn)

    def trained(self, round: int) -> tuple[str, ...]:
        """Returns the kinds of factors that a client trains in a round, of which the first is round 1."""
        return self.turns[(round - 1) % len(self.turns)]

    def uploaded(self, round: int) -> tuple[str, ...]:
        """Returns the kinds of factors that a client sends."""
        return tuple(kind for kind in self.trained(round) if kind not in (*self.personal, *self.local))

    @property
    def folds_residual(self) -> bool:
        """Whether only what the averaged factors miss is added to the base weights; otherwise all is, and factors start anew."""
        return self.folds and self.restart is None

    def changed(self, round: int) -> tuple[str, ...]:
        """Returns the kinds of common factors that a round leaves changed."""
        return (*self.uploaded(round), *self.remade)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of factors: the form's, and a classification head's where it is trained."""
        return (*self.form.kinds, *((HEAD,) if HEAD in self.ever_trained else ()))

    @property
    def moving(self) -> tuple[str, ...]:
        """Kinds that differ from round to round; the others are common bases."""
        kinds = self.ever_trained.union(self.remade).difference(self.personal)
        return tuple(kind for kind in self.kinds if kind in kinds)


def with_head(method: Method) -> Method:
    """Returns the method for a model that classifies: in every round its head is trained, sent and averaged beside the own kinds."""
    return replace(method, turns=tuple((*turn, HEAD) for turn in method.turns))
