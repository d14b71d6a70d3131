"""The same experiment through Apple's pfl-research: its SimulatedBackend with FederatedAveraging over a peft model.

pfl requires older versions of packages than fedsim, so it is installed without its dependencies into a folder that only the process that
runs this module sees.
"""

import importlib.metadata
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.benchmarks.peers import peft_trainer
from experiments.benchmarks.processes import answer, asked
from experiments.benchmarks.suite import SkippedError
from experiments.benchmarks.workloads import Workload

FOLDER = Path(sys.prefix) / "peers" / "pfl"
PACKAGES = ("pfl==0.6.0", "multiprocess==0.70.19", "prv-accountant==0.2.0")


def install() -> None:
    """Installs pfl into its folder unless it is there. Raises SkippedError if that fails."""
    if (FOLDER / "pfl").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SkippedError(f"pfl could not be installed: {(done.stderr.strip().splitlines() or ['pip said nothing'])[-1][:200]}")


class _Trainable(nn.Module):
    """What pfl requires of a model: a loss and metrics of a user's data."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: Tensor) -> Tensor:
        ids = ids.long()
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def metrics(self, ids: Tensor) -> dict[str, Any]:
        return {}


def simulate(workload: Workload, rounds: int) -> list[float]:
    """Returns the seconds of every round (central iteration)."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data import FederatedDataset, get_user_sampler
    from pfl.data.dataset import Dataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    module = _Trainable(peft_trainer.peft_model(workload.model, workload.rank))
    module.train()
    clients = workload.all_clients(int(module.model.config.vocab_size))  # type: ignore[union-attr, arg-type]
    users = [Dataset((np.stack([example.input_ids for example in client.examples]).astype(np.int64),)) for client in clients]
    data = FederatedDataset(lambda user: users[user], get_user_sampler("minimize_reuse", list(range(len(users)))))
    marks = [time.perf_counter()]

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Any]:
            marks.append(time.perf_counter())
            return False, Metrics()

    FederatedAveraging().run(
        NNAlgorithmParams(rounds, evaluation_frequency=rounds + 1, train_cohort_size=len(users), val_cohort_size=0),
        SimulatedBackend(training_data=data, val_data=None),
        PyTorchModel(module, torch.optim.AdamW, torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)),
        NNTrainHyperParams(workload.batch, local_num_epochs=1, local_learning_rate=1e-3),
        NNEvalHyperParams(None),
        callbacks=[Clock()],
    )
    return [after - before for before, after in pairwise(marks)]


if __name__ == "__main__":
    given = asked()
    torch.set_num_threads(given["threads"])
    answer({"seconds": simulate(Workload(**given["workload"]), given["rounds"]), "version": importlib.metadata.version("pfl")})
