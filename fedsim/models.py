"""Loading a base model and its tokenizer: the one inside the package, a local folder, or a Hugging Face model id."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.config import Dtype, ModelConfig
from fedsim.errors import UserError

EMBEDDED = Path(__file__).parent / "embedded" / "base_model"
DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


def load_model(config: ModelConfig, *, activation_checkpointing: bool = False) -> tuple[nn.Module, Any]:
    """Returns the frozen causal language model, on its device, and its tokenizer with a padding token.

    All dropout is off: a mask drawn for a batch would couple clients. Raises UserError where the path or architecture does not serve.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has a display of its own
    path = source(config)
    settings = _guarded(path, lambda: AutoConfig.from_pretrained(path))
    _check_architecture(path, settings)
    model, info = _guarded(
        path, lambda: AutoModelForCausalLM.from_pretrained(path, config=settings, dtype=DTYPES[config.dtype], output_loading_info=True)
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"model.path={path}: {len(missing)} weights of the {settings.model_type!r} architecture are missing, first {missing[0]!r}."
        )
    tokenizer = _guarded(path, lambda: AutoTokenizer.from_pretrained(path))
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path={path}: expected a tokenizer with an end-of-sequence token, got none; add eos_token to its configuration."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    context = getattr(settings, "max_position_embeddings", None)
    if context:
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)  # many tokenizers do not know the limit of their model
    return prepare(model, device(config), activation_checkpointing=activation_checkpointing), tokenizer


def prepare(model: nn.Module, on: torch.device, *, activation_checkpointing: bool = False) -> nn.Module:
    """Freezes the model, moves it to the device and turns dropout off; checkpointing needs training mode, in which it is left then."""
    model.requires_grad_(False).to(on)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # a plain number, which nn.Module has no type for
    if activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return model.train(activation_checkpointing)


def source(config: ModelConfig) -> str:
    """Returns the folder or hub id that is loaded."""
    return str(EMBEDDED) if config.path is None else config.path


def device(config: ModelConfig) -> torch.device:
    """Returns the device that `model.device` names; auto is the first GPU, or the CPU where there is none."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(config.device)
    except RuntimeError as error:
        raise UserError(f"model.device: expected auto, cpu, cuda or cuda:0, got {config.device!r}.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device: got {config.device!r}, but this machine has no usable CUDA device; use model.device=cpu.")
    return chosen


def _guarded(path: str, load: Any) -> Any:
    """Turns what a loader raises for a wrong path or a broken file into one line."""
    if (looks_local(path) or Path(path).exists()) and not (Path(path) / "config.json").is_file():
        raise UserError(
            f"model.path={path}: expected a folder with config.json, or the id of a model on the Hugging Face hub; found neither."
        )
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.path={path}: the model or its tokenizer cannot be loaded: {reason}") from error


def looks_local(path: str) -> bool:
    """Whether the path can only be a local one (a hub id is name or owner/name)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _check_architecture(path: str, settings: Any) -> None:
    if getattr(settings, "is_encoder_decoder", False):
        raise UserError(f"model.path={path}: expected a decoder-only language model, got the encoder-decoder {settings.model_type!r}.")
    encoder_only = settings.model_type in {"bert", "roberta", "electra", "albert", "distilbert"}
    if encoder_only and not getattr(settings, "is_decoder", False):
        raise UserError(
            f"model.path={path}: {settings.model_type!r} reads both ways and cannot generate answers; "
            "set is_decoder to true in its config.json to use it as a causal language model."
        )
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(f"model.path={path}: expected unquantised weights, got a quantised checkpoint; use the original one.")
