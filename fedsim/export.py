"""The adapter as an ordinary LoRA in PEFT's files: B' = B R and A' = A, so that any PEFT user loads it without fedsim.

A third matrix beside A and B would be opened by PEFT without a warning and give wrong results; it is never written.
"""

import json
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from fedsim.core.adapters import adapted_layers, is_transposed


def peft_files(model: nn.Module, base_model: str) -> dict[str, bytes]:
    """Returns {file name: content} of PEFT's adapter_config.json and adapter_model.safetensors for the factors installed in `model`."""
    tensors: dict[str, torch.Tensor] = {}
    layers = adapted_layers(model)
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (layer.B @ layer.R).detach().cpu().contiguous()
    first = next(iter(layers.values()))
    rank = first.R.shape[-1]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": first.scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_transposed(first.base),
        "target_modules": sorted(layers),
        "inference_mode": True,
    }
    return {
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
    }
