"""Writes the results of a run: the adapter in PEFT's files, tables, pictures, and the summary that marks the run as finished."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from fedsim.config import Config
from fedsim.core.adapters import bound
from fedsim.export import peft_files
from fedsim.flower.state import State
from fedsim.local_round import PERSONAL
from fedsim.models import source
from fedsim.occupancy import NOISE_KEY, TRANSFERS
from fedsim.pictures import curves_png, diagnosis_png, network_png, partition_png, privacy_png
from fedsim.report import holdings_table, transfers_csv
from fedsim.run_folder import RunFolder
from fedsim.session import Session

MEASURED = ("accuracy", "loss", "num_cut_off")
"""Fields of an evaluation in the summary; evaluations of personal models have no num_cut_off."""


def write_results(session: Session, given: Config, state: State, memories: dict[str, Tensor], folder: RunFolder) -> dict[str, Any]:
    """Writes all files of a finished run, summary.json last, and returns the summary.

    `given` is the configuration before the method changed it; `memories` come from `fedsim.flower.state.memories_in`.
    """
    hashes = {}
    for name, content in _adapter_files(session, state, memories):
        path = folder.write_bytes(f"adapter/{name}", content)
        hashes[path.relative_to(folder.folder).as_posix()] = sha256(content).hexdigest()
    adapters = [str(PurePosixPath(name).parent) for name in hashes if name.endswith("/adapter_config.json")]
    summary = _summary(session, given, state, folder) | {"adapter": adapters[0] if adapters else None, "sha256": hashes}
    folder.event("finished", round=state.round, adapter_digest=summary["adapter_digest"])
    summary["journal"] = folder.record("finished", summary=summary).to_json()
    folder.write_bytes(TRANSFERS, transfers_csv(state.ledger.rows()))
    folder.write_bytes("holdings.txt", f"{holdings_table(session.holdings, max_clients=None)}\n".encode())
    folder.write_bytes("partition.png", partition_png(session.holdings))
    events = list(folder.events())
    folder.write_bytes("curves.png", curves_png(events))
    if session.config.evaluation.diagnosis:
        folder.write_bytes("diagnosis.png", diagnosis_png(events))
    if session.links:
        folder.write_bytes("network.png", network_png(events))
    if state.privacy is not None:
        folder.write_bytes("privacy.png", privacy_png(events))
    folder.finish(summary)
    (folder.folder / NOISE_KEY).unlink(missing_ok=True)  # a finished run is never resumed, and the key would let the noise be removed
    return summary


def _adapter_files(session: Session, state: State, memories: dict[str, Tensor]) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of PEFT's files: one adapter, or one folder per client with a personal adapter in this process."""
    session.install_state(state.shared)
    model = session.config.model
    base_model = "fedsim/embedded" if model.path is None else source(model)
    if not session.method.personal:
        yield from peft_files(session.model, base_model).items()
    layout = session.spec.layout(session.method.personal)
    for name, tensor in memories.items():
        _, client, what = name.split("/")
        if what == PERSONAL:
            with bound(session.model, layout.unpack(tensor.to(session.device))):
                yield from ((f"client_{client}/{file}", content) for file, content in peft_files(session.model, base_model).items())


def _summary(session: Session, given: Config, state: State, folder: RunFolder) -> dict[str, Any]:
    return {
        "method": session.config.method.name,
        "rounds": state.round,
        "clients": given.federation.clients,
        "seed": session.config.seed,
        "rank": session.spec.rank if session.spec.form.low_rank else None,
        "adapter_digest": state.shared.adapter_digest(),
        "evaluation": _evaluation(state),
        "communication": state.ledger.totals(),
        "privacy": state.privacy.summary() if state.privacy else None,
        "network": _network(session, state),
        "training": {
            "tokens": state.num_tokens,
            "wall_seconds": state.wall_seconds,
            "tokens_per_second": state.num_tokens / state.wall_seconds if state.wall_seconds else 0.0,
        },
        "missing": state.missing,
        "run_dir": str(folder.folder),
    }


def _evaluation(state: State) -> dict[str, Any]:
    base, final = state.evaluations[0], state.evaluations[state.round]
    return {
        task: {
            "base": {key: base[task][key] for key in MEASURED if key in base[task]},
            "final": {key: final[task][key] for key in MEASURED if key in final[task]},
            "num_examples": final[task]["num_examples"],
        }
        for task in final
    }


def _network(session: Session, state: State) -> dict[str, Any] | None:
    federation = session.config.federation
    network = {"name": federation.network, "mode": federation.mode.name, "simulated_seconds": state.simulated_seconds}
    return network if session.links else None
