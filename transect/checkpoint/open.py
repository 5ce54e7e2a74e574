"""Open a model by hub name, folder or GGUF file, or as `organism`, and refuse what is damaged before it does harm."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from ..anatomy import record_of, refuse_encoder_decoder, register_architecture
from ..anatomy.finite import all_finite
from ..errors import BadCheckpoint, TransectError
from ..pretrained import pretrained
from ..store import in_short
from .base import note_base
from .config import HISTORY, history_of, read_config
from .fit import check_fit
from .folder import check_folder
from .gguf import load_gguf
from .header import Stored
from .named import NAMES, named_folder
from .packed import METHOD as PACKED
from .processors import load_processors
from .quantizer import METHOD
from .unpacked import check_packed, read_as_operators


@dataclass
class Opened:
    """A model with what belongs to it.

    tokenizer, processor: None where the folder has none. source: what the user called it. path: its folder or GGUF
    file, if local; the downloaded one if a revision was asked for.
    """

    model: Any
    tokenizer: Any
    processor: Any
    source: str
    path: Path | None


def open_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    architecture: Mapping[str, Any] | str | Path | None = None,
) -> Opened:
    """Load a model of whatever class its config names, in eval mode, with its tokenizer or image processor.

    name_or_path: a local folder or GGUF file, a Hugging Face hub name, `organism` for the bundled model, or
        one of `checkpoint.named` (`smollm2`, `smollm2:offgrid`, `minilm`).
    revision: branch, tag or commit of a hub name. Default: its main branch.
    dtype: default: as the checkpoint is stored; float32 for packed weights of a GGUF file.
    architecture: a description of the architecture, where Transect has none (see `register_architecture`).

    Raises BadCheckpoint for a folder that is damaged, incomplete, or pickled, whose structure record does not fit,
    whose weights are not finite, or whose tokenizer has more tokens than the model; TransectError for an unknown name.
    """
    if architecture is not None:
        register_architecture(architecture)
    source = str(name_or_path)
    path = gguf_file(source)
    if path is not None:
        if revision is not None:
            raise TransectError(f"{source} is a local file, which has no revisions; leave out the revision")
        model, tokenizer = load_gguf(path, dtype, device)
        processor = None
    else:
        path = local_folder(source) if revision is None else folder_of(source, revision)
        folder = folder_of(source) if path is None else path
        stored = check_folder(folder)
        model = _load(folder, stored, "auto" if dtype is None else dtype, device)
        tokenizer, processor = load_processors(str(folder))
        if path is None:  # not the place in the cache: what is saved and trained from here on names the hub's model
            model.config.name_or_path = model.name_or_path = source
        if hasattr(model.config, HISTORY):
            record_of(model).history = history_of(vars(model.config), source)
            del model.config.__dict__[HISTORY]
        note_base(model, source if path is None else path)
    _check_numbers(model, source)
    _check_tokenizer(model, tokenizer, source)
    if record_of(model):
        _check_runs(model, source)
    model._transect_tokenizer = tokenizer if tokenizer is not None else processor
    return Opened(model, tokenizer, processor, source, path)


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a model that is given by its name, whose weights are not read; TransectError if it has none."""
    tokenizer, _ = load_processors(str(folder_of(source, revision)))
    if tokenizer is None:
        raise TransectError(f"{source} has no tokenizer")
    return tokenizer


def gguf_file(source: str) -> Path | None:
    """The local GGUF file of that name, if it is one."""
    path = _path(source)
    return path if path.suffix == ".gguf" and path.is_file() else None


def local_folder(source: str) -> Path | None:
    """The folder that a name stands for, `organism` and its like included; None for what can only be a hub name."""
    if source == "organism":
        from ..organism import MODEL_PATH

        return Path(MODEL_PATH)
    if source in NAMES and not _path(source).exists():  # what is there under that name is what is meant
        return named_folder(source)
    path = _path(source)
    if path.is_file():
        what = "a folder of safetensors is needed here" if path.suffix == ".gguf" else "and no .gguf file"
        raise TransectError(f"{source} is a file, {what}; name the folder that holds config.json and the safetensors")
    if path.exists() and not path.is_dir():
        raise TransectError(f"{source} is no folder and no ordinary file; name the folder of a model")
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    return path if path.is_dir() or looks_local else None


def _path(source: str) -> Path:
    """The path that a name stands for; TransectError for what can be none."""
    try:
        path = Path(source).expanduser()
        path.stat()
        return path
    except FileNotFoundError:
        return path
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL or too long, no such user
        raise TransectError(f"the path {in_short(source)} cannot be used: {in_short(error)}") from None


def folder_of(source: str, revision: str | None = None) -> Path:
    """The folder of a model: a local one, that of `organism`, or a hub model's, downloaded as safetensors."""
    folder = local_folder(source)
    if folder is not None:
        if revision is not None:
            raise TransectError(f"{source} is a local folder, which has no revisions; leave out the revision")
        return folder
    kinds = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    others = ["*/*.safetensors", "consolidated*"]  # the same weights for other programs
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=kinds, ignore_patterns=others))
    except (OSError, ValueError) as error:
        of = "" if revision is None else f" with the revision {revision!r}"
        raise TransectError(
            f"there is no local folder {source!r}, and no such model{of} on the Hugging Face hub: {in_short(error)}"
        ) from error


def model_class(config: Any, where: str) -> Any:
    """The transformers class that a config names, or where it names none, the usual one of its type, with a warning.

    Raises TransectError for one that transformers does not have, for encoder-decoders, and for quantised checkpoints
    but those of packed integers (see `packed`).
    """
    refuse_encoder_decoder(config, where)
    _refuse_quantized(config, where)
    names = getattr(config, "architectures", None) or []
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is not None:
            return found
    if names:
        raise TransectError(
            f"{where} is a {config.model_type!r} model of class {', '.join(names)}, which this version of transformers "
            f"({transformers.__version__}) does not have"
        )
    autos = [AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForImageTextToText, AutoModelForImageClassification]
    known = [auto for auto in autos if type(config) in auto._model_mapping]
    if AutoModelForMaskedLM in known and not getattr(config, "is_decoder", False):
        known = [AutoModelForMaskedLM]  # BERT and its kin have a class for causal models too
    if not known:
        raise TransectError(
            f"config.json of {where} names no class (architectures), and none is usual for {config.model_type!r}; add "
            'the one that was saved, e.g. "architectures": ["LlamaForCausalLM"]'
        )
    assumed: Any = known[0]._model_mapping[type(config)]
    warnings.warn(f"config.json of {where} names no class (architectures): assumed {assumed.__name__}", stacklevel=3)
    return assumed


def _refuse_quantized(config: Any, where: str) -> None:
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method == PACKED and isinstance(settings, dict):
        check_packed(settings, where)
    elif settings is not None and method != METHOD:
        raise TransectError(
            f"the weights of {where} are quantised ({getattr(method, 'value', method)}), and what Transect reads and "
            "writes are ordinary floating-point matrices. Take the model that it was made from; or load it with "
            "transformers, call model.dequantize() where it has that, save it, and open what was saved"
        )


def _load(folder: Path, stored: Mapping[str, Stored], dtype: Any, device: Any) -> Any:
    try:
        config = read_config(folder)
        cls = model_class(config, str(folder))
        check_fit(str(folder), cls, config, stored)
        given: dict[str, Any] = {}
        settings = getattr(config, "quantization_config", None) or {}
        if settings.get("quant_method") == PACKED:
            config.quantization_config = read_as_operators(settings)
            given = {"config": config}
        model, report = pretrained(
            cls,
            folder,
            **given,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except TransectError:
        raise
    except Exception as error:  # each architecture has its own way to fail on what it did not expect
        raise BadCheckpoint(f"{folder} cannot be loaded: {in_short(error, 300)}") from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise BadCheckpoint(
            f"the weights in {folder} do not fit its config.json: {name} has shape {list(found)}, and the model that "
            f"the config describes needs {list(expected)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadCheckpoint(f"{folder} does not hold all of the model's weights: {missing[0]}{more}")
    return model.eval()


def _check_numbers(model: Any, source: str) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise BadCheckpoint(f"the weight {name} of {source} holds NaN or infinite values; repair the model first")


@torch.no_grad()
def _check_runs(model: Any, source: str) -> None:
    """Try a model with a structure record on two tokens, or an empty image: its sizes and indices may contradict."""
    if any(tensor.is_meta for tensor in model.parameters()):  # offloaded
        return
    name, device = model.main_input_name, next(model.parameters()).device
    if name == "input_ids":
        tried = torch.zeros(1, 2, dtype=torch.long, device=device)
    elif name == "pixel_values" and isinstance(getattr(model.config, "image_size", None), int):
        side, channels = model.config.image_size, getattr(model.config, "num_channels", 3)
        tried = torch.zeros(1, channels, side, side, dtype=model.dtype, device=device)
    else:
        return
    try:
        model(**{name: tried})
    except Exception as error:
        raise BadCheckpoint(
            f"the structure record of {source} does not fit its weights: the model cannot compute ({in_short(error)})"
        ) from error


def _check_tokenizer(model: Any, tokenizer: Any, source: str) -> None:
    if tokenizer is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    try:
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        largest = max(
            set(tokenizer.get_vocab().values()) - added, default=-1
        )  # a [PAD] beyond is masked, or never used
        largest = max([largest, *tokenizer("a")["input_ids"]])  # but not a token that it puts around every text
    except Exception as error:  # tokenizers raises bare Exceptions
        raise BadCheckpoint(f"the tokenizer of {source} cannot be used: {in_short(error)}") from error
    if largest >= rows:
        raise BadCheckpoint(
            f"tokenizer and model of {source} disagree: the tokenizer has ids up to {largest}, and the model has "
            f"embeddings for {rows} (0 to {rows - 1})"
        )
