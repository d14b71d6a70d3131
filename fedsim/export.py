"""Exports the adapter as an ordinary LoRA in PEFT's file format, so that it loads without fedsim.

B' is the product of all factors but the last, A' is the last: B R and A for LoRA-SB. If something was added to the base weights, or the
update has no factors, B' and A' come from the SVD of the whole update, truncated at rounding level. A third matrix next to A and B is
never written: PEFT would load the files without a warning and compute wrong results. A classification head goes into `modules_to_save`,
or, since an encoder has no place for it, into a file of its own if it reads texts apart. labels.json names its outputs.
"""

import json
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from fedsim.core.adapters import AdaptedLinear, adapted_layers, is_transposed
from fedsim.core.bi_encoder import BiEncoder
from fedsim.core.decomposition import exact_svd
from fedsim.core.heads import HeadLinear, head_layers


def peft_files(model: nn.Module, base_model: str) -> dict[str, bytes]:
    """Returns {file name: content} of PEFT's adapter_config.json and adapter_model.safetensors for the factors installed in `model`.

    For a `BiEncoder` they adapt its encoder (`AutoModel`), and head.safetensors holds `weight` [labels, 3 * width], or [labels, width] for
    a single text, and `bias`. For a classifier, labels.json lists the labels in the order of its outputs.
    """
    body = f"{model.base_model_prefix}." if isinstance(model, BiEncoder) else ""
    layers = {name.removeprefix(body): layer for name, layer in adapted_layers(model).items()}
    pairs = {name: _pair(layer) for name, layer in layers.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, (left, right) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = right.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = left.detach().cpu().contiguous()
    head = {name: _affine(layer) for name, layer in head_layers(model).items()}
    files = {"head.safetensors": save(next(iter(head.values())), {"format": "pt"})} if body else {}
    if head:
        settings: Any = model.config
        files["labels.json"] = (json.dumps([*settings.id2label.values()], ensure_ascii=False, indent=2) + "\n").encode()
    kept = {} if body else head
    tensors |= {f"base_model.model.{name}.{kind}": tensor for name, parts in kept.items() for kind, tensor in parts.items()}
    ranks = {name: left.shape[1] for name, (left, _) in pairs.items()}
    rank = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if body else "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in ranks.items() if own != rank},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": is_transposed(next(iter(layers.values())).base),
        "target_modules": sorted(layers),
        **({"modules_to_save": sorted({name.partition(".")[0] for name in kept})} if kept else {}),
        "inference_mode": True,
    }
    return files | {
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
    }


def _affine(layer: HeadLinear) -> dict[str, torch.Tensor]:
    weight, bias = layer.head[:, :-1], layer.head[:, -1]
    return {"weight": weight.detach().cpu().contiguous(), "bias": bias.detach().cpu().contiguous()}


def _pair(layer: AdaptedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns B' [out, k] and A' [k, in], whose product is the layer's whole change; B' includes the scaling."""
    left, *others = layer.form.chain(layer.factors)
    if others and layer.folded is None:
        for matrix in others[:-1]:
            left = left @ matrix
        return layer.scaling * left, others[-1]
    change = layer.update().double()
    if layer.folded is not None:
        change = change + layer.folded.to(change.device)
    u, s, vt = exact_svd(change, min(change.shape))
    kept = max(1, int((s > s[0] * torch.finfo(torch.float32).eps).sum()))
    return (u[:, :kept] * s[:kept]).float(), vt[:kept].float()
