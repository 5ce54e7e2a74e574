"""A model on disk whose blocks are in memory only while they are used."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..anatomy import Anatomy
from ..checkpoint import check_folder, local_folder
from ..errors import BadCheckpoint, TransectError


def folder_of(name: str | Path) -> Path:
    """The folder of a model: a local one, that of `organism`, or a hub model's, downloaded as safetensors."""
    folder = local_folder(str(name))
    if folder is not None:
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:
        raise TransectError(f"there is no local folder {name}, and no such model on the hub: {error}") from error


class StreamedModel:
    """The skeleton of a model folder: everything outside the blocks is loaded, the blocks are empty (on `meta`).

    folder: safetensors, whole or sharded.
    dtype: of the weights in memory and in the result. Default: as stored.
    """

    def __init__(
        self,
        folder: Path,
        *,
        architecture: Any = None,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
    ) -> None:
        check_folder(folder)
        self.folder = folder
        self.device = torch.device(device or "cpu")
        self.dtype: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise TransectError(f"{folder} is compressed or quantized already; --stream takes an ordinary checkpoint")
        names = getattr(config, "architectures", None) or []
        cls: Any = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        if cls is None:
            raise TransectError(f"{folder}: config.json names no model class that transformers has, but {names}")
        with init_empty_weights(include_buffers=False):
            self.model: Any = cls(config).eval()
        self.model.requires_grad_(False)
        self.anatomy = Anatomy(self.model, architecture, weights=False)
        self._files = _tensor_files(folder)
        self._stored = _stored_names(self.model, self._files)
        blocks = tuple(block.path + "." for block in self.anatomy.blocks)
        self._load(name for name, _ in self.model.named_parameters() if not name.startswith(blocks))
        self.model.tie_weights()
        self.outside = [name for name, _ in self.model.named_parameters() if not name.startswith(blocks)]
        for name, buffer in self.model.named_buffers():
            if not name.startswith(blocks):
                _assign(self.model, name, buffer.to(self.device))
        # Names as they are in the dense checkpoint; a compressed block has others.
        self._block_names = [
            [f"{block.path}.{name}" for name, _ in block.module.named_parameters()] for block in self.anatomy.blocks
        ]
        self._check_names()

    @property
    def fingerprint(self) -> str:
        """Names, sizes and times of the weight files: enough to notice that a resumed run's model changed."""
        files = sorted(set(self._files.values()))
        return " ".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, which are gone after the `with`."""
        module = self.anatomy.blocks[index].module
        self._load(self._block_names[index])
        try:
            yield module
        finally:
            module.to("meta")
            _give_back_memory()

    def _load(self, names: Iterable[str]) -> None:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name in self._stored:
                by_file.setdefault(self._files[self._stored[name]], []).append(name)
        for path, wanted in by_file.items():
            with safe_open(path, "pt") as file:  # closed again, so that its mapped pages are given back
                for name in wanted:
                    tensor = file.get_tensor(self._stored[name]).to(self.device, self.dtype, copy=True)
                    if not torch.isfinite(tensor).all():
                        raise TransectError(f"the weight {name} holds NaN or infinite values; repair the model first")
                    _assign(self.model, name, nn.Parameter(tensor, requires_grad=False))

    def _check_names(self) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [
            name
            for names in [self.outside, *self._block_names]
            for name in names
            if name not in self._stored and name not in tied
        ]
        if missing:
            raise BadCheckpoint(
                f"the checkpoint has no tensor {missing[0]} ({len(missing)} missing); if transformers "
                "loads it by merging tensors, load it once and save it again, or do not stream"
            )


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


def _stored_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Parameter name -> its name on disk, by transformers' own renamings for checkpoints of older versions."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    state = model.state_dict()
    return {rename_source_key(name, renamings, [], model.base_model_prefix, state)[0]: name for name in stored}


def _give_back_memory() -> None:
    """Return freed memory to the system. glibc would keep it for later, and the peak would creep up by block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not have it
        if trim is not None:
            trim(0)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
