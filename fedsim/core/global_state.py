"""The global state: the factors, what has been added to the base weights, and which client holds which version."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fedsim.core.exchange import CONTROL, WEIGHTS, Exchange
from fedsim.core.fedbuff import Buffer
from fedsim.core.forms import AdapterSpec
from fedsim.core.payload import Layout, digest
from fedsim.types import Adapter


@dataclass
class GlobalState:
    """`folded` is {layer: [out, in]}, the sum of all additions to the base weights; `increment` is the last addition as it is sent:
    {layer}.U and {layer}.V, or the trained factors if every client that holds the bases can compute the update itself."""

    spec: AdapterSpec
    factors: Adapter  # of all kinds, on the CPU
    exchange: Exchange
    folded: Adapter = field(default_factory=dict)
    increment: Adapter = field(default_factory=dict)
    increment_on: dict[str, str] = field(default_factory=dict)  # digests of the factors that the increment builds on
    control: Tensor | None = None  # SCAFFOLD's c, flat
    moments: dict[str, Tensor] = field(default_factory=dict)  # of the server optimizer
    clip_norm: float | None = None  # of client-level privacy, if adaptive
    tag: str = ""  # digest of everything folded so far, in order
    accepted: dict[int, int] = field(default_factory=dict)  # by client: the last round whose result includes its upload
    buffer: Buffer = field(default_factory=Buffer)  # of federation.mode=fedbuff
    _digests: dict[tuple[str, int], str] = field(default_factory=dict)
    _flat: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def digest(self, part: str) -> str:
        """Returns the digest of the current version of a part, in hex."""
        if part == WEIGHTS:
            return self.tag
        key = (part, self.exchange.versions[part])
        if key not in self._digests:
            self._digests = {known: value for known, value in self._digests.items() if known[0] != part}
            tensors = {CONTROL: self.control} if part == CONTROL and self.control is not None else self.spec.pick(self.factors, (part,))
            self._digests[key] = digest(tensors)
        return self._digests[key]

    def flat(self, kinds: Iterable[str]) -> Tensor:
        """Returns the factors of the given kinds as one flat float32 array, cached until `replace`; it must not be changed."""
        key = tuple(kinds)
        if key not in self._flat:
            self._flat[key] = self.spec.pack(self.factors, key)
        return self._flat[key]

    def digests(self) -> dict[str, str]:
        """Returns the digests of all parts."""
        return {part: self.digest(part) for part in self.exchange.versions}

    def adapter_digest(self) -> str:
        """Returns one digest of the trained result: all factors and everything folded."""
        text = "\n".join(f"{part} {self.digest(part)}" for part in sorted(self.exchange.versions) if part != CONTROL)
        return hashlib.sha256(text.encode()).hexdigest()

    def replace(self, factors: Adapter, kinds: Iterable[str], round: int) -> None:
        """Replaces the factors; `kinds` are those that have changed."""
        changed = tuple(kinds)
        self.factors, self._flat = factors, {}
        self._digests = {key: value for key, value in self._digests.items() if key[0] not in changed}
        self.exchange.changed(changed, round)

    def fold(self, fold: Adapter, round: int, builds_on: Iterable[str] | None = None) -> None:
        """Adds to the base weights {layer}.W, the product of {layer}.U and {layer}.V, or the update of the given trained factors.

        A dense fold is sent as the whole sum, which costs no more; others are sent as they are to clients that hold what they build on.
        """
        dense = any(name.endswith(".W") for name in fold)
        self.increment_on = {part: self.digest(part) for part in builds_on or ()}
        self.folded = added(self.folded, dense_updates(self.spec, fold, self.factors))
        self.tag = next_tag(self.tag, fold)
        self.increment = {} if dense else fold
        self.exchange.added(round, None if dense else builds_on or ())

    def whole(self) -> Tensor:
        """Returns the flat sum of everything folded."""
        return folded_layout(self.spec).pack(self.folded)


def added(folded: Adapter, updates: Adapter) -> Adapter:
    """Returns the sums by layer of `updates`; a layer without a fold counts as zero."""
    return {layer: folded[layer] + update if layer in folded else update for layer, update in updates.items()}


def dense_updates(spec: AdapterSpec, fold: Adapter, factors: Adapter) -> Adapter:
    """Returns {layer: [out, in]} of a fold; if it holds trained factors, `factors` has the frozen ones."""
    if f"{next(iter(spec.layers))}.W" in fold:
        return {layer: fold[f"{layer}.W"] for layer in spec.layers}
    if f"{next(iter(spec.layers))}.U" in fold:
        return {layer: fold[f"{layer}.U"] @ fold[f"{layer}.V"] for layer in spec.layers}
    return {layer: spec.update(factors | fold, layer) for layer in spec.layers}


def next_tag(tag: str, fold: Adapter) -> str:
    """Returns the tag of W after `fold` was added to the W of `tag`."""
    return hashlib.sha256(f"{tag} {digest(fold)}".encode()).hexdigest()


def folded_layout(spec: AdapterSpec) -> Layout:
    """Returns the layout of `GlobalState.folded`."""
    return Layout(tuple(spec.layers), tuple(spec.layers.values()))
