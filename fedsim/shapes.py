"""Computes the shapes of a model's adapted layers without its weights and without the hub.

transformers builds the model on torch's meta device, where tensors have shapes but no storage: a model of nine billion parameters takes a
tenth of a second and no memory. Counts therefore come from the model that a run would load, not from a formula.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.config import Config, ModelConfig
from fedsim.core.adapters import adapter_spec, matrix_shape, target_layers
from fedsim.core.forms import AdapterSpec
from fedsim.core.memory import ModelShape, shape_of
from fedsim.core.methods import Method
from fedsim.errors import UserError, nearest
from fedsim.models import DTYPES, EMBEDDED, ENCODERS, attention, config_file, device, head_paths, prepare, reading, source
from fedsim.plain import from_dict, to_dict

LayerShape = tuple[int, int]
"""(out_features, in_features) of a linear layer."""

META = torch.device("meta")

_UNDECLARED = {"head_dim"}
"""Entries that some models read although their config class does not declare them (Qwen 2)."""


def layer_shapes(model: ModelConfig, target_modules: list[str], labels: Sequence[str] = (), texts: int = 2) -> dict[str, LayerShape]:
    """Returns (out_features, in_features) of each layer that `adapt` would adapt, by path, in the model's order.

    Paths are those of the classifier with labels, else of the causal language model, or of the bare encoder for BERT and similar models.
    Raises UserError as `skeleton` does, and for a name in `target_modules` that matches no layer.
    """
    bare = skeleton(model, labels, texts)
    head = head_paths(bare) if labels else []
    return {path: matrix_shape(bare.get_submodule(path)) for path in target_layers(bare, target_modules, head)}


def adapter_of(config: Config, method: Method, labels: Sequence[str], texts: int = 2) -> AdapterSpec:
    """Returns the adapter that `adapt` would add for an effective configuration. Raises UserError as `layer_shapes` and `fitting_rank`."""
    adapter = config.adapter
    layers = layer_shapes(config.model, adapter.target_modules, labels, texts)
    head = head_shapes(config.model, labels, texts)
    return adapter_spec(layers, method.form, adapter.rank, config.method.heads, adapter.scaling, head)


def head_shapes(model: ModelConfig, labels: Sequence[str], texts: int) -> dict[str, LayerShape]:
    """Returns (out_features, in_features) of each layer of the classification head, by path; empty without labels."""
    if not labels:
        return {}
    bare = skeleton(model, labels, texts)
    return {path: matrix_shape(bare.get_submodule(path)) for path in head_paths(bare)}


def num_parameters(model: ModelConfig) -> int:
    """Returns the number of parameters of the base model, tied ones counted once. Raises UserError as `skeleton` does."""
    return sum(parameter.numel() for parameter in skeleton(model).parameters())


def model_shape(model: ModelConfig, labels: Sequence[str] = (), texts: int = 2) -> ModelShape:
    """Returns the base model's properties that determine its cost on its device. Raises UserError as `skeleton` and `device` do."""
    return shape_of(skeleton(model, labels, texts), DTYPES[model.dtype].itemsize, attention(labels, device(model)))


def random_model(
    model: ModelConfig, on: torch.device, labels: Sequence[str] = (), texts: int = 2, *, activation_checkpointing: bool = False
) -> nn.Module:
    """Returns the model with random weights on a device, frozen, in the configured dtype, and otherwise as loaded.

    The weights depend on torch's random state, which is left unchanged. Raises UserError as `skeleton` does.
    """
    entries, origin = _entries(model)
    with _silenced(), torch.random.fork_rng():
        bare = _build(entries, origin, labels, on, DTYPES[model.dtype])
    return reading(prepare(bare, on, activation_checkpointing=activation_checkpointing), model, labels, texts)


def skeleton(model: ModelConfig, labels: Sequence[str] = (), texts: int = 2) -> nn.Module:
    """Returns the model on the meta device: every module and shape, no weights.

    With labels it has a classification head, for rows of `texts` texts.

    It is built from config.json of `path` if that is on this machine (`fedsim.models.config_file`), else from `architecture`, else, if
    `path` is None, from the embedded model's folder. The latest results are cached and shared, so they must not be modified.
    Guarantees: nothing is downloaded or printed, no remote code runs, and no random state changes.
    Raises UserError if none of these exists, or if it does not describe a language model.
    """
    entries, origin = _entries(model)
    return _skeleton(json.dumps([entries, origin, to_dict(model), list(labels), texts]))


@lru_cache(maxsize=16)
def _skeleton(arguments: str) -> nn.Module:
    entries, origin, values, labels, texts = json.loads(arguments)
    with _silenced():
        try:
            return reading(_build(entries, origin, labels), from_dict(ModelConfig, values), labels, texts)
        except UserError:
            raise
        except Exception as error:  # a wrong value may raise any type, from ZeroDivisionError to transformers' own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{origin}: Expected entries that make a model, got {type(error).__name__}: {reason}. Correct them.") from error


def _entries(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """Returns the entries of config.json and their origin."""
    if model.path is not None and (file := _file(model)) is not None:
        return _read(file)
    if model.architecture:
        return model.architecture, "model.architecture"
    if model.path is None:
        return _read(EMBEDDED / "config.json")
    raise UserError(
        f"Expected a local folder with config.json in model.path, or model.architecture, got model.path={model.path} alone; nothing is "
        "downloaded to learn shapes. Give the folder, or its entries: model.architecture={model_type:llama,hidden_size:2048,...}."
    )


def _file(model: ModelConfig) -> Path | None:
    """Returns config.json of the model, None if it is not on this machine. Raises UserError for a missing package without architecture."""
    try:
        return config_file(source(model))
    except UserError:
        if model.architecture:
            return None
        raise


def _read(path: Path) -> tuple[dict[str, Any], str]:
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"Expected JSON in {path}, but it cannot be read: {error}. Put the model's own config.json there.") from error
    if not isinstance(entries, dict):
        raise UserError(f"Expected entries by name in {path}, got a {type(entries).__name__}. Put the model's own config.json there.")
    return entries, str(path)


def _build(
    entries: dict[str, Any],
    origin: str,
    labels: Sequence[str],
    on: torch.device = META,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    name = entries.get("model_type")
    known = list(CONFIG_MAPPING)
    if name not in known:
        raise UserError(f"{origin}: Expected a model_type that transformers knows, such as llama, got {name!r}.{nearest(str(name), known)}")
    kind = CONFIG_MAPPING[name]
    if origin == "model.architecture":
        _refuse_unknown(entries, kind())
    settings = kind.from_dict(deepcopy(entries))  # from_dict modifies nested entries
    both_ways = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(settings, "is_decoder", False)
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(settings, "is_encoder_decoder", False) or not (both_ways or generates):
        raise UserError(f"{origin}: Expected a decoder-only language model or a text encoder, got {name!r}. Choose another model.")
    bare = both_ways and (name in ENCODERS or not generates)  # for all others a run loads the causal language model
    auto: Any = transformers.AutoModel if bare else transformers.AutoModelForCausalLM
    if labels:
        settings.id2label, auto = dict(enumerate(labels)), transformers.AutoModelForSequenceClassification
    with on:
        model: nn.Module = auto.from_config(settings, dtype=dtype, attn_implementation=attention(labels, on), trust_remote_code=False)
    return model


def _refuse_unknown(entries: dict[str, Any], default: Any) -> None:
    """Raises UserError for a typo such as hiden_size, which transformers would accept while hidden_size keeps its default."""
    for entry in entries:
        if not hasattr(default, entry) and entry not in _UNDECLARED:
            hint = nearest(entry, list(default.to_dict()))
            raise UserError(
                f"model.architecture: {entry!r} is no entry of a {default.model_type} model.{hint} "
                "Correct it, or leave it out if it does not fix shapes."
            )


@contextmanager
def _silenced() -> Iterator[None]:
    """Silences transformers' and Python's warnings within the block, since no weights are loaded that they could concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(level)
