"""The definition of a method: the form of its adapters, what a client trains and sends, and how the server combines it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedsim.choices import Init
from fedsim.core.collecting import Collected
from fedsim.core.forms import HEAD, AdapterSpec, Form
from fedsim.types import Adapter


@dataclass(frozen=True)
class Outcome:
    """The server's state after a round: the factors from which the next one starts, and what is permanently added to the base weights.

    `fold` has {layer}.W [out, in], or its factors {layer}.U and {layer}.V; it is empty if the base weights do not change.
    """

    factors: Adapter
    fold: Adapter


def keep_mean(collected: Collected) -> Outcome:
    """Returns the mean of the uploads as the start of the next round."""
    return Outcome(collected.factors, {})


@dataclass(frozen=True)
class Method:
    """One federated method.

    In a round clients train some kinds of factors; the rounds cycle through `turns`. Of these, `personal` kinds never leave the clients;
    `before_upload` folds `local` kinds into others and resets them. The server averages the rest and calls `finish`.

    `before_upload` takes and returns {layer.kind: tensor} of one client's trained factors. `finish` returns the kinds that it changes; the
    others stay. Round 1 is the first. A method's value never changes in a run.

    Raises ValueError for turns that name no factors of the form.
    """

    name: str
    form: Form
    inits: tuple[Init, ...]  # valid ones, the default first
    turns: tuple[tuple[str, ...], ...]  # kinds trained in round 1, in round 2, ..., then from the first again
    finish: Callable[[Collected], Outcome] = keep_mean
    folds: bool = False  # `finish` adds something to the base weights in every round
    personal: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    before_upload: Callable[[Adapter], Adapter] | None = None
    exact: bool = True  # the global update equals the weighted mean of the clients' updates
    restart: Callable[[AdapterSpec, int, int], Adapter] | None = None  # all factors at the start of a round, of (spec, seed, round)
    products: bool = False  # `finish` needs the mean of the clients' dense updates, or their stacked factors
    recomputed: tuple[str, ...] = ()  # kinds that `finish` recomputes each round besides the averaged ones
    ranks: bool = False  # clients may have different ranks
    linear: bool = True  # the server needs only sums, so secure aggregation is possible
    lasting: bool = True  # a trained factor means the same in every round, so moments and residuals can be kept
    pooled: bool = False  # one party holds all data and nothing is sent

    def __post_init__(self) -> None:
        known = (*self.form.kinds, HEAD)
        if not self.turns or not all(turn and set(turn) <= set(known) for turn in self.turns):
            raise ValueError(
                f"Expected turns of kinds of factors that {self.form.name} has, {', '.join(self.form.kinds)}, got {self.turns}."
            )

    @property
    def ever_trained(self) -> frozenset[str]:
        """Kinds that are trained in any round."""
        return frozenset(kind for turn in self.turns for kind in turn)

    def trained(self, round: int) -> tuple[str, ...]:
        """Returns the kinds of factors that a client trains in a round; the first round is 1."""
        return self.turns[(round - 1) % len(self.turns)]

    def uploaded(self, round: int) -> tuple[str, ...]:
        """Returns the kinds of factors that a client sends."""
        return tuple(kind for kind in self.trained(round) if kind not in (*self.personal, *self.local))

    @property
    def folds_residual(self) -> bool:
        """Whether only the residual of the averaged factors is added to the base weights; otherwise all is, and factors restart."""
        return self.folds and self.restart is None

    def changed(self, round: int) -> tuple[str, ...]:
        """Returns the kinds of common factors that a round changes."""
        return (*self.uploaded(round), *self.recomputed)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of factors: the form's, and a classification head's if it is trained."""
        return (*self.form.kinds, *((HEAD,) if HEAD in self.ever_trained else ()))

    @property
    def moving(self) -> tuple[str, ...]:
        """Kinds that differ from round to round; the others are common bases."""
        kinds = self.ever_trained.union(self.recomputed).difference(self.personal)
        return tuple(kind for kind in self.kinds if kind in kinds)


def with_head(method: Method) -> Method:
    """Returns the method for a model that classifies: in every round its head is trained, sent and averaged with the other kinds."""
    return replace(method, turns=tuple((*turn, HEAD) for turn in method.turns))
