"""A model on disk whose blocks are in memory only while they are used."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, build_glob_alternation, rename_source_key
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import GENERATION_CONFIG_NAME

from ..anatomy import Anatomy
from ..anatomy.finite import all_finite
from ..checkpoint import check_folder, model_class
from ..checkpoint.config import read_config
from ..checkpoint.fit import check_fit
from ..errors import BadCheckpoint, TransectError
from ..pretrained import pretrained
from .merged import merged_parameters


class StreamedModel:
    """The skeleton of a model folder: everything outside the blocks is loaded, the blocks are empty (on `meta`).

    folder: safetensors, whole or sharded.
    dtype: of the weights in memory and in the result. Default: that of transformers, the config's, or else that of the
        first tensor. So a folder of mixed dtypes comes out, and runs, as it would after `from_pretrained`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        architecture: Any = None,
        dtype: torch.dtype | str | None = None,
        device: str | None = None,
    ) -> None:
        stored = check_folder(folder)
        self.folder = folder
        self.device = torch.device(device or "cpu")
        config = read_config(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise TransectError(
                f"{folder} is compressed or quantized already, or has parts in its slots; --stream takes an ordinary "
                "checkpoint: go without it, in memory"
            )
        cls = model_class(config, str(folder))
        check_fit(str(folder), cls, config, stored)
        self._files = sorted({tensor.file for tensor in stored.values()})
        given: Any = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.dtype: torch.dtype = given or config.dtype or _first_dtype(self._files[0])
        config.dtype = self.dtype
        self.model: Any = _skeleton(cls, config, self.dtype)
        if self.model.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():  # it says more than the config
            self.model.generation_config = pretrained(GenerationConfig, folder)
        self.anatomy = Anatomy(self.model, architecture, weights=False)
        self._shapes = {name: tensor.shape for name, tensor in stored.items()}
        self._where = {name: tensor.file for name, tensor in stored.items()}
        self._stored = _stored_names(self.model, self._shapes)
        self._merged = merged_parameters(self.model, self._shapes)
        # Names as they are in the dense checkpoint; a compressed block has others.
        self._block_names = [
            [f"{block.path}.{name}" for name in _names_of(block.module)] for block in self.anatomy.blocks
        ]
        self._check_tensors()
        blocks = tuple(block.path + "." for block in self.anatomy.blocks)
        for name, buffer in self.model.named_buffers():
            _assign(self.model, name, buffer.to(self.device))
        self._load(name for name in _names_of(self.model) if not name.startswith(blocks))
        self.model.tie_weights()
        self.outside = [name for name in _names_of(self.model) if not name.startswith(blocks)]

    @property
    def fingerprint(self) -> str:
        """Of all that decides the numbers: the dtype, the config, and of the weight files, which are too large to be
        read for that, names, sizes, times and headers."""
        files = (f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in self._files)
        described = json.dumps([self.model.config.to_dict(), sorted(self._shapes.items())], default=str, sort_keys=True)
        return " ".join([str(self.dtype), *files, hashlib.blake2b(described.encode(), digest_size=16).hexdigest()])

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, which are gone after the `with`."""
        module = self.anatomy.blocks[index].module
        self._load(self._block_names[index])
        try:
            yield module
        finally:
            _empty(module)
            _give_back_memory()

    def _load(self, names: Iterable[str]) -> None:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name in self._merged:
                self._put(name, self._merged[name].read(self._where, self.model))
            elif name in self._stored:
                by_file.setdefault(self._where[self._stored[name]], []).append(name)
        for path, wanted in by_file.items():
            with safe_open(path, "pt") as file:  # closed again, so that its mapped pages are given back
                for name in wanted:
                    self._put(name, file.get_tensor(self._stored[name]))

    def _put(self, name: str, stored: torch.Tensor) -> None:
        """Fill a tensor of the model with a copy of the stored one, which must be finite and of its shape."""
        empty = _get(self.model, name)
        self._check_shape(name, tuple(stored.shape))
        tensor = stored.to(self.device, empty.dtype, copy=True)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise TransectError(f"the weight {name} holds NaN or infinite values; repair the model first")
        if isinstance(empty, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        _assign(self.model, name, tensor)

    def _check_tensors(self) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        names = _names_of(self.model)
        known = {*self._stored, *self._merged, *tied}
        missing = [name for name in names if name not in known]
        if missing:
            raise BadCheckpoint(
                f"the checkpoint has no tensor {missing[0]} ({len(missing)} missing); if transformers can load it, do "
                "not stream"
            )
        for name in names:
            if name in self._stored:
                self._check_shape(name, self._shapes[self._stored[name]])

    def _check_shape(self, name: str, stored: tuple[int, ...]) -> None:
        expected = tuple(_get(self.model, name).shape)
        if stored != expected:
            raise BadCheckpoint(
                f"the weights in {self.folder} do not fit its config.json: {name} has shape {list(stored)}, and the "
                f"model that the config describes needs {list(expected)}"
            )


def _first_dtype(file: Path) -> torch.dtype:
    """Of the first floating-point tensor in the file."""
    with safe_open(file, "pt") as tensors:
        dtypes = (tensors.get_tensor(name).dtype for name in tensors.keys())  # noqa: SIM118
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _skeleton(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model without weights, each tensor of the dtype in which `from_pretrained` would load it, on `meta`.

    That is `dtype`, but for those that the architecture keeps in float32. Buffers that no checkpoint holds are there:
    computed in float32 and then rounded, as `from_pretrained` does.
    """
    with init_empty_weights(include_buffers=False):
        model = cls(config).eval()
    with torch.device("meta"), init.no_init_weights(), local_torch_dtype(dtype):
        typed = cls(config)
    wide = build_glob_alternation(list(typed._get_dtype_plan(dtype)))[0]  # an empty pattern if there are none
    for name, like in [*typed.named_parameters(remove_duplicate=False), *typed.named_buffers(remove_duplicate=False)]:
        tensor = _get(model, name)
        tensor.data = tensor.data.to(torch.float32 if wide.pattern and wide.search(name) else like.dtype)
    return model.requires_grad_(False)


def _names_of(module: nn.Module) -> list[str]:
    """Of what a checkpoint holds of a module: its parameters, tied ones once, and its persistent buffers."""
    state = module.state_dict()
    return [name for name, _ in [*module.named_parameters(), *module.named_buffers()] if name in state]


def _empty(module: nn.Module) -> None:
    """Let go of all that a checkpoint holds of the module; buffers that it computed itself stay."""
    held = set(_names_of(module))
    own = {name: buffer for name, buffer in module.named_buffers() if name not in held}
    module.to("meta")
    for name, buffer in own.items():
        _assign(module, name, buffer)


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


def _get(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
