"""Open a model by hub name, local folder, or as `organism`, and refuse what is damaged before it does harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig

from ..anatomy import record_of, register_architecture
from ..errors import BadCheckpoint, TransectError
from .folder import check_folder
from .processors import load_processors
from .save import HISTORY


@dataclass
class Opened:
    """A model with what belongs to it.

    tokenizer, processor: None where the folder has none. source: what the user called it. path: its folder, if local.
    """

    model: Any
    tokenizer: Any
    processor: Any
    source: str
    path: Path | None


def open_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    architecture: Mapping[str, Any] | str | Path | None = None,
) -> Opened:
    """Load a model of whatever class its config names, in eval mode, with its tokenizer or image processor.

    name_or_path: a local folder, a Hugging Face hub name, or `organism` for the bundled model.
    dtype: default: as the checkpoint is stored.
    architecture: a description of the architecture, where Transect has none (see `register_architecture`).

    Raises BadCheckpoint for a folder that is damaged, incomplete, or pickled, whose structure record does not fit,
    whose weights are not finite, or whose tokenizer has more tokens than the model; TransectError for an unknown name.
    """
    if architecture is not None:
        register_architecture(architecture)
    source = str(name_or_path)
    path = local_folder(source)
    if path is not None:
        check_folder(path)
    where = source if path is None else str(path)
    model = _load(where, path is not None, "auto" if dtype is None else dtype, device)
    tokenizer, processor = load_processors(where)
    _check_finite(model, source)
    _check_tokenizer(model, tokenizer, source)
    model._transect_tokenizer = tokenizer if tokenizer is not None else processor
    if hasattr(model.config, HISTORY):
        record_of(model).history = model.config.__dict__.pop(HISTORY)["history"]
    return Opened(model, tokenizer, processor, source, path)


def local_folder(source: str) -> Path | None:
    """The folder that a name stands for, `organism` included; None for what can only be a hub name."""
    if source == "organism":
        from ..organism import MODEL_PATH

        return Path(MODEL_PATH)
    path = Path(source).expanduser()
    if path.is_file():
        raise TransectError(f"{source} is a file; name the folder that holds config.json and the safetensors files")
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    return path if path.is_dir() or looks_local else None


def _load(where: str, local: bool, dtype: Any, device: Any) -> Any:
    try:
        config = AutoConfig.from_pretrained(where)
        names = getattr(config, "architectures", None) or []
        cls = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        if cls is None:
            raise TransectError(
                f"{where} is a {config.model_type!r} model of class {', '.join(names) or '(not named)'}, which this "
                f"version of transformers ({transformers.__version__}) does not have"
            )
        model, report = cls.from_pretrained(
            where,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except TransectError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if local:
            raise BadCheckpoint(f"{where} cannot be loaded: {error}") from error
        raise TransectError(
            f"there is no local folder {where!r}, and it could not be loaded from the Hugging Face hub as safetensors "
            f"either (pickle checkpoints are refused): {error}"
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
