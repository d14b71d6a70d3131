"""DP-SGD as Opacus's users run it: one PrivacyEngine per client with Poisson sampling, client after client."""

import logging
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.benchmarks.peers import as_written
from experiments.benchmarks.peers.peft_trainer import trained
from fedsim.config import TrainingConfig
from fedsim.training.cohort import ClientData


@as_written()
def train(model: nn.Module, clients: Sequence[ClientData], training: TrainingConfig, noise: float) -> int:
    """Trains the clients one after another from the same start and returns the number of tokens that passed."""
    start = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    return sum(_train_client(model, start, client, training, noise) for client in clients)


def _train_client(model: nn.Module, start: dict[str, Tensor], client: ClientData, training: TrainingConfig, noise: float) -> int:
    from opacus import PrivacyEngine

    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(start[name])
    logging.getLogger("opacus").setLevel(logging.ERROR)  # it warns about every empty batch
    data = TensorDataset(torch.from_numpy(np.stack([example.input_ids for example in client.examples])).long())
    optimizer = torch.optim.AdamW(trained(model).values(), lr=training.learning_rate, weight_decay=0.0)
    num_tokens, steps = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, optimizer, loader = PrivacyEngine().make_private(
            module=model.train(),
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=training.batch_size),
            noise_multiplier=noise,
            max_grad_norm=1.0,
        )
        try:
            while steps < training.local_steps:
                for (ids,) in loader:
                    steps += 1
                    optimizer.zero_grad()
                    if len(ids):
                        private(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                        optimizer.step()
                    num_tokens += ids.numel()
                    if steps == training.local_steps:
                        break
        finally:
            private.remove_hooks()  # the next client's engine adds its own
    return num_tokens
