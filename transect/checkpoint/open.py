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
from ..errors import BadCheckpoint, TransectError
from ..pretrained import pretrained
from ..store import in_short
from .base import note_base
from .config import HISTORY, history_of, read_config
from .fit import check_fit
from .folder import check_folder, stored_in
from .gguf import load_gguf
from .processors import load_processors
from .quantizer import METHOD


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

    name_or_path: a local folder or GGUF file, a Hugging Face hub name, or `organism` for the bundled model.
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
        if path is not None:
            check_folder(path)
        where = source if path is None else str(path)
        model = _load(where, path is not None, "auto" if dtype is None else dtype, device)
        tokenizer, processor = load_processors(where)
        if hasattr(model.config, HISTORY):
            record_of(model).history = history_of(vars(model.config), where)
            del model.config.__dict__[HISTORY]
        note_base(model, where)
    _check_finite(model, source)
    _check_tokenizer(model, tokenizer, source)
    model._transect_tokenizer = tokenizer if tokenizer is not None else processor
    return Opened(model, tokenizer, processor, source, path)


def gguf_file(source: str) -> Path | None:
    """The local GGUF file of that name, if it is one."""
    path = Path(source).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def local_folder(source: str) -> Path | None:
    """The folder that a name stands for, `organism` included; None for what can only be a hub name."""
    if source == "organism":
        from ..organism import MODEL_PATH

        return Path(MODEL_PATH)
    path = Path(source).expanduser()
    if path.is_file():
        what = "a folder of safetensors is needed here" if path.suffix == ".gguf" else "and no .gguf file"
        raise TransectError(f"{source} is a file, {what}; name the folder that holds config.json and the safetensors")
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    return path if path.is_dir() or looks_local else None


def folder_of(source: str, revision: str | None = None) -> Path:
    """The folder of a model: a local one, that of `organism`, or a hub model's, downloaded as safetensors."""
    folder = local_folder(source)
    if folder is not None:
        if revision is not None:
            raise TransectError(f"{source} is a local folder, which has no revisions; leave out the revision")
        return folder
    kinds = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=kinds))
    except (OSError, ValueError) as error:
        of = "" if revision is None else f" with the revision {revision!r}"
        raise TransectError(f"there is no local folder {source}, and no such model{of} on the hub: {error}") from error


def model_class(config: Any, where: str) -> Any:
    """The transformers class that a config names, or where it names none, the usual one of its type, with a warning.

    Raises TransectError for one that transformers does not have, for encoder-decoders, and for quantised checkpoints.
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
    if settings is not None and method != METHOD:
        raise TransectError(
            f"the weights of {where} are quantised ({getattr(method, 'value', method)}), and what Transect reads and "
            "writes are ordinary floating-point matrices. Take the model that it was made from; or load it with "
            "transformers, call model.dequantize() where it has that, save it, and open what was saved"
        )


def _load(where: str, local: bool, dtype: Any, device: Any) -> Any:
    try:
        config = read_config(where)
        cls = model_class(config, where)
        if local:
            check_fit(where, cls, config, stored_in(Path(where)))
        model, report = pretrained(
            cls,
            where,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except TransectError:
        raise
    except Exception as error:  # each architecture has its own way to fail on what it did not expect
        if local:
            raise BadCheckpoint(f"{where} cannot be loaded: {in_short(error, 300)}") from error
        raise TransectError(
            f"there is no local folder {where!r}, and it could not be loaded from the Hugging Face hub as safetensors "
            f"either (pickle checkpoints are refused): {in_short(error)}"
        ) from error
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise BadCheckpoint(
            f"the weights in {where} do not fit its config.json: {name} has shape {list(stored)}, and the model that "
            f"the config describes needs {list(expected)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadCheckpoint(f"{where} does not hold all of the model's weights: {missing[0]}{more}")
    return model.eval()


def _check_finite(model: Any, source: str) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadCheckpoint(f"the weight {name} of {source} holds NaN or infinite values; repair the model first")


def _check_tokenizer(model: Any, tokenizer: Any, source: str) -> None:
    if tokenizer is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    largest = max(set(tokenizer.get_vocab().values()) - added, default=-1)  # a [PAD] beyond is masked, or never used
    if largest >= rows:
        raise BadCheckpoint(
            f"tokenizer and model of {source} disagree: the tokenizer has ids up to {largest}, and the model has "
            f"embeddings for {rows} (0 to {rows - 1})"
        )
