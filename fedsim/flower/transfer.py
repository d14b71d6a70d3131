"""Transfers the global state in messages: packs parts of it at the server and installs them at a worker.

Factors that change between rounds, common bases, increments of the base weights, and SCAFFOLD's control variate travel in separate
records, because the ledger distinguishes them. Every message names the digest of every part it needs, sent or not; a worker whose
state has another digest says so instead of training.
"""

import json
from collections.abc import Callable, Collection
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedsim.core.adapters import factors
from fedsim.core.exchange import CONTROL, WEIGHTS
from fedsim.core.forms import HEAD, AdapterSpec
from fedsim.core.global_state import GlobalState, added, dense_updates, folded_layout, next_tag
from fedsim.core.payload import Layout, digest
from fedsim.flower.records import from_record, to_record
from fedsim.flower.requests import Request, shapes, text, texts, words
from fedsim.flower.secure_worker import secure_key
from fedsim.session import Session

ADAPTER, BASES, FOLD, CONTROL_RECORD = "adapter", "bases", "fold", "control"
WHOLE, INCREMENT = "whole", "increment"


class Packer:
    """Packs parts of one global state; records shared by several messages of a round are made once."""

    def __init__(self, state: GlobalState, moving: tuple[str, ...]) -> None:
        self._state, self._moving = state, moving
        self._records: dict[object, ArrayRecord] = {}

    def pack(
        self, parts: Collection[str], needed: Collection[str], *, increment: bool
    ) -> tuple[dict[str, ArrayRecord], dict[str, str | list[str]]]:
        """Returns the records that carry the parts, and the request's fields about these and all needed parts.

        With `increment`, only the last increment of W is sent.
        """
        state = self._state
        records: dict[str, ArrayRecord] = {}
        fields: dict[str, str | list[str]] = {"digests": json.dumps({part: state.digest(part) for part in needed})}
        for name, kinds in self._by_record(parts).items():
            fields[name] = kinds
            records[name] = self._once((name, *kinds), partial(state.flat, kinds))
        if WEIGHTS in parts and state.folded:
            fields[FOLD] = INCREMENT if increment else WHOLE
            records[FOLD] = self._once((FOLD, increment), self._increment if increment else state.whole)
            if increment:
                layout = Layout.of(state.increment)
                fields["fold_shapes"] = json.dumps(dict(zip(layout.names, layout.shapes, strict=True)))
                fields["fold_on"] = json.dumps(state.increment_on)
        if CONTROL in parts and state.control is not None:
            records[CONTROL_RECORD] = self._once(CONTROL, state.control.clone)
        return records, fields

    def _by_record(self, parts: Collection[str]) -> dict[str, list[str]]:
        kinds = [kind for kind in self._state.spec.kinds if kind in parts]
        split = {ADAPTER: [k for k in kinds if k in self._moving], BASES: [k for k in kinds if k not in self._moving]}
        return {name: chosen for name, chosen in split.items() if chosen}

    def _increment(self) -> Tensor:
        return Layout.of(self._state.increment).pack(self._state.increment)

    def _once(self, key: object, flat: Callable[[], Tensor]) -> ArrayRecord:
        if key not in self._records:
            self._records[key] = to_record(flat())
        return self._records[key]


def install_received(session: Session, content: RecordDict, request: Request) -> bool:
    """Brings the session to the global state of the message. Returns False if it lacks a part that was not sent and cannot be derived.

    Parts that this process already holds, as one shared with the server does, are not read. Raises ValueError if an installed part
    does not have its digest, or has wrong names or sizes, or values that are not finite.
    """
    digests = request.digests
    known = {ADAPTER, BASES, FOLD, CONTROL_RECORD, *map(secure_key, request.clients)}
    arrays = content.array_records  # rebuilt by Flower on each access
    if set(arrays) - known or not {WEIGHTS} <= set(digests) <= _parts(session):
        raise ValueError(f"Expected parts of the global state and their digests, got {sorted(content)[:5]} and {sorted(digests)[:5]}.")
    if not digests[WEIGHTS]:
        session.install_folded({}, "")  # an earlier run in this process may have left increments
    if FOLD in arrays and not _take_fold(session, arrays[FOLD], request.record, digests[WEIGHTS]):
        return False
    for name in (BASES, ADAPTER):
        if name in arrays:
            _take_factors(session, arrays[name], words(request.record, name), digests)
    if session.digests.get(WEIGHTS, "") != digests[WEIGHTS]:
        return False
    missing = [kind for kind in session.spec.kinds if kind in digests and session.digests.get(kind) != digests[kind]]
    return not missing or _derive(session, missing, request.round, digests)


def control_of(session: Session, content: RecordDict) -> Tensor | None:
    """Returns SCAFFOLD's control variate of the server, None if the message has none."""
    if CONTROL_RECORD not in content.array_records:
        return None
    size = session.spec.layout(session.method.uploaded(1)).num_parameters
    return from_record(content.array_records[CONTROL_RECORD], size)


def _take_factors(session: Session, record: ArrayRecord, kinds: list[str], digests: dict[str, str]) -> None:
    if len(set(kinds)) != len(kinds) or not set(kinds) <= {*session.spec.kinds} & {*digests}:
        raise ValueError(f"Expected kinds of factors among {session.spec.kinds}, each once and with a digest, got {kinds[:5]}.")
    if all(session.digests.get(kind) == digests[kind] for kind in kinds):
        return  # a worker in the server's process has them already
    layout = session.spec.layout(kinds)
    adapter = layout.unpack(from_record(record, layout.num_parameters))
    for kind in kinds:
        found = digest(session.spec.pick(adapter, (kind,)))
        if found != digests[kind]:
            raise ValueError(
                f"Expected {kind} with digest {digests[kind][:16]}..., got {found[:16]}...: the server and this worker disagree."
            )
    session.install(adapter, {kind: digests[kind] for kind in kinds})


def _take_fold(session: Session, record: ArrayRecord, request: ConfigRecord, tag: str) -> bool:
    if session.digests.get(WEIGHTS, "") == tag:
        return True  # a worker in the server's process has it already
    if text(request, FOLD) == WHOLE:
        layout = folded_layout(session.spec)
        session.install_folded(layout.unpack(from_record(record, layout.num_parameters)), tag)
        return True
    told = shapes(request, "fold_shapes")
    _check_increment(session.spec, told)
    layout = Layout(tuple(told), tuple(told.values()))
    fold = layout.unpack(from_record(record, layout.num_parameters))
    builds_on = texts(request, "fold_on")
    if next_tag(session.digests.get(WEIGHTS, ""), fold) != tag or any(
        session.digests.get(kind) != value for kind, value in builds_on.items()
    ):
        return False
    session.install_folded(added(session.folded, _updates(session.spec, session, fold)), tag)
    return True


def _parts(session: Session) -> set[str]:
    return {*session.spec.kinds, WEIGHTS, CONTROL}


def _check_increment(spec: AdapterSpec, told: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless every layer has either U and V whose product has the layer's shape, or trained factors of the form."""
    for layer, (rows, columns) in spec.layers.items():
        left, right = told.get(f"{layer}.U", ()), told.get(f"{layer}.V", ())
        as_factors = {name: shape for name, shape in told.items() if name.rpartition(".")[0] == layer}
        own = {f"{layer}.{kind}": spec.shapes(layer)[kind] for kind in spec.form.kinds}
        stacked = len(left) == len(right) == 2 and (left[0], right[1], left[1]) == (rows, columns, right[0]) and len(as_factors) == 2
        if not stacked and not (as_factors and as_factors.items() <= own.items()):
            raise ValueError(f"Expected an increment that fits {layer!r}, got {as_factors!s:.100}.")
    if not {name.rpartition(".")[0] for name in told} <= set(spec.layers):
        raise ValueError(f"Expected an increment of the layers, got {sorted(told)[:3]}.")


def _updates(spec: AdapterSpec, session: Session, fold: dict[str, Tensor]) -> dict[str, Tensor]:
    return dense_updates(spec, fold, {name: tensor.cpu() for name, tensor in factors(session.model, spec.kinds).items()})


def _derive(session: Session, missing: list[str], round: int, digests: dict[str, str]) -> bool:
    """Installs the missing factors derived from seed and base model. Returns False if not all can be derived."""
    derived = session.derived_factors(round)
    if derived is None or HEAD in missing:
        return False
    for kind in missing:
        found = session.spec.pick(derived, (kind,))
        if digest(found) != digests[kind]:
            return False
        session.install(found, {kind: digests[kind]})
    return True
