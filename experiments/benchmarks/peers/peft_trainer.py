"""peft and the Hugging Face Trainer, client after client, as in the scripts of the papers.

The adapter is LoRA-SB's as its authors build it: peft's LoRA with a square matrix between A and B, of which only that matrix trains.
"""

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.peers import as_written
from experiments.benchmarks.workloads import base_model
from fedsim.config import TrainingConfig
from fedsim.training.cohort import ClientData

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@as_written()
def peft_model(name: str, rank: int) -> nn.Module:
    """Returns the base model with peft's adapters, of which only the matrices R train."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(base_model(name), LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.requires_grad_(False)
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            R = nn.Linear(rank, rank, bias=False)
            nn.init.zeros_(R.weight)
            nn.init.orthogonal_(module.lora_B["default"].weight)
            module.lora_B["default"] = nn.Sequential(R, module.lora_B["default"])
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Returns the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_client(model: nn.Module, start: dict[str, Tensor], client: ClientData, training: TrainingConfig) -> int:
    """Trains one client from `start` and returns the number of tokens."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(start[name])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=training.batch_size,
            max_steps=training.local_steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            optim="adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        rows = [{"input_ids": example.input_ids.tolist(), "labels": example.input_ids.tolist()} for example in client.examples]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return training.local_steps * training.batch_size * client.examples[0].num_tokens


@as_written()
def train(model: nn.Module, clients: Sequence[ClientData], training: TrainingConfig) -> int:
    """Trains the clients one after another from the same start and returns the number of tokens."""
    start = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    return sum(train_client(model, start, client, training) for client in clients)
