"""Folders in the format of `compressed-tensors` (see `packed`), read as `GroupedInteger` operators, bit for bit.

What Transect wrote is read so by every `from_pretrained` where Transect is imported; what others wrote by `open_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from ..anatomy.record import StructureRecord
from ..errors import BadCheckpoint, TransectError
from ..operators.grouped_integer import GroupedInteger, pack
from ..store import in_short
from .header import FLOATS, Stored
from .packed import BITS, FORMAT, METHOD, OURS, unpack_rows, words
from .quantizer import METHOD as TRANSECT
from .replay import located


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a folder whose integers are read as operators. packed: the one in config.json."""

    def __init__(self, packed: Mapping[str, Any]) -> None:
        self.quant_method: Any = TRANSECT
        self.packed = packed


class _PackedOrTheirs:
    """What transformers asks for the config of a `compressed-tensors` folder."""

    @classmethod
    def from_dict(cls, settings: dict[str, Any], **kwargs: Any) -> Any:
        """Transect's for a folder that Transect wrote, and that package's for all others."""
        groups = settings.get("config_groups")
        if isinstance(groups, dict) and groups and all(str(name).startswith(OURS) for name in groups):
            return PackedConfig(settings)
        return CompressedTensorsConfig.from_dict(settings, **kwargs)


def register_packed() -> None:
    """Let transformers read the integers that Transect wrote as operators; others' folders stay with their package."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _PackedOrTheirs


def read_as_operators(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same `quantization_config` as Transect would have written it."""
    groups = settings["config_groups"]
    return {**settings, "config_groups": {f"{OURS}{i}": group for i, group in enumerate(groups.values())}}


@dataclass(frozen=True)
class _Kind:
    """What one of the `config_groups` says of its matrices. group: columns that share a scale; None for whole rows."""

    bits: int
    symmetric: bool
    group: int | None
    targets: tuple[str, ...]

    def fits(self, path: str, d_in: int, d_out: int, stored: Mapping[str, Stored]) -> bool:
        """Whether what is stored of the matrix at `path` is what this kind stores."""
        group = self.group or d_in
        expected = {
            "weight_packed": (("I32",), (d_out, words(d_in, self.bits))),
            "weight_scale": (FLOATS, (d_out, d_in // group)),
            "weight_shape": (("I64",), (2,)),
        }
        if not self.symmetric:
            expected["weight_zero_point"] = (("I32",), (words(d_out, self.bits), d_in // group))
        elif f"{path}.weight_zero_point" in stored:
            return False
        found = {name: stored.get(f"{path}.{name}") for name in expected}
        return d_in % group == 0 and all(
            tensor is not None and tensor.dtype in expected[name][0] and tensor.shape == expected[name][1]
            for name, tensor in found.items()
        )


def check_packed(settings: Mapping[str, Any], where: str) -> list[_Kind]:
    """What the `config_groups` of a `quantization_config` say; TransectError for what no operator here holds."""
    if settings.get("format") != FORMAT:
        raise _refused(where, f"the format {in_short(settings.get('format'))}")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if settings.get(key):
            raise _refused(where, f"a {key}")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refused(where, f"the config_groups {in_short(groups, 100)}")
    return [_kind_of(group, where) for group in groups.values()]


def _kind_of(group: Any, where: str) -> _Kind:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not isinstance(group.get("targets"), list):
        raise _refused(where, f"the group {in_short(group, 100)}")
    if group.get("input_activations") or group.get("output_activations"):
        raise _refused(where, "quantised activations")
    if group.get("format") not in (None, FORMAT):
        raise _refused(where, f"the format {in_short(group['format'], 100)}")
    bits, size, whole_rows = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy") == "channel"
    usable = {
        "num_bits": type(bits) is int and bits in BITS,
        "type": weights.get("type", "int") == "int",
        "symmetric": isinstance(weights.get("symmetric"), bool),
        "strategy": whole_rows or weights.get("strategy") == "group",
        "group_size": whole_rows or (type(size) is int and 0 < size < 2**31),
        "dynamic": not weights.get("dynamic"),
        "actorder": weights.get("actorder") not in ("group", "dynamic"),  # then a group's columns lie apart
    }
    for key, is_usable in usable.items():
        if not is_usable:
            raise _refused(where, f"{key} {in_short(weights.get(key), 100)}")
    targets = tuple(map(str, group["targets"]))
    return _Kind(weights["num_bits"], weights["symmetric"], None if whole_rows else weights["group_size"], targets)


def _refused(where: str, what: str) -> TransectError:
    return TransectError(
        f"the weights of {where} are quantised ({METHOD}, with {what}), and what Transect reads of it are "
        f"integers of {', '.join(map(str, BITS))} bits in groups or rows. Take the model that it was made from; or "
        "load it with transformers and quantization_config=CompressedTensorsConfig(dequantize=True), save it, and open "
        "what was saved"
    )


def expect_packed(model: Any, settings: Mapping[str, Any], stored: Mapping[str, Stored], where: str) -> StructureRecord:
    """Put an operator in place of each linear layer of which integers are stored; its numbers are still to come.

    model: what transformers builds from the config, without weights. Until `take_packed` the operators hold tensors of
    the format instead of their own. Returns the record of them. Raises BadCheckpoint where what is stored does not fit
    the model or the settings.
    """
    kinds, record = check_packed(settings, where), StructureRecord()
    for path in sorted(name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")):
        try:
            place = located(model, path)
        except BadCheckpoint:
            place = ""
        old = model.get_submodule(place)
        if type(old) is not nn.Linear:
            raise BadCheckpoint(f"{where} holds {path}.weight_packed, and the model has no linear layer there")
        d_out, d_in = old.weight.shape
        named = [kind for kind in kinds if path in kind.targets] or kinds
        kind = next((kind for kind in named if kind.fits(path, d_in, d_out, stored)), None)
        if kind is None:
            raise BadCheckpoint(
                f"what {where} holds as {path}.weight_packed, weight_scale ... is no {d_out} x {d_in} matrix by any of "
                "the config_groups in its config.json"
            )
        with torch.device(old.weight.device):
            operator = GroupedInteger(
                d_in, d_out, kind.bits, kind.group or d_in, kind.symmetric, old.bias is not None
            ).to(old.weight.dtype)  # fmt: skip
            record.set_module(place, operator.describe())
            _hold_packed(operator.train(old.training))
        model.set_submodule(place, operator)
    return record


def _hold_packed(operator: Any) -> None:
    """Exchange the tensors for those of the format. The module stays, since others may hang hooks on it."""
    scale, zeros, bits = operator.scale, operator.zeros, operator.bits
    d_out, d_in = operator.out_features, operator.in_features
    for name in ("weight", "codes", "scale", "zeros"):
        delattr(operator, name)
    operator.register_buffer("weight_packed", torch.empty(d_out, words(d_in, bits), dtype=torch.int32))
    operator.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))
    operator.register_parameter("weight_scale", scale)
    if zeros is not None:
        packed = torch.empty(words(d_out, bits), operator.groups, dtype=torch.int32)
        operator.register_buffer("weight_zero_point", packed)


def take_packed(model: Any, record: StructureRecord) -> None:
    """Make the operators' own tensors of what was loaded. Raises TransectError where that is not in memory."""
    for path in record.modules:
        operator: Any = model.get_submodule(path)
        packed, scale, shape = operator.weight_packed, operator.weight_scale, operator.weight_shape
        if packed.is_meta or scale.is_meta or shape.is_meta:
            raise TransectError(
                f"{path} was offloaded, and integers are unpacked in memory. Load the model without offloading "
                "(device_map), or in a process that has not imported Transect"
            )
        bits, d_out, d_in = operator.bits, operator.out_features, operator.in_features
        if shape.tolist() != [d_out, d_in]:
            raise BadCheckpoint(f"{path}.weight_shape is {shape.tolist()}, and the matrix there is {d_out} x {d_in}")
        zeros = None
        if hasattr(operator, "weight_zero_point"):
            zeros = pack(unpack_rows(operator.weight_zero_point.T, bits, d_out).T, bits)
            del operator.weight_zero_point
        del operator.weight_packed, operator.weight_scale, operator.weight_shape
        operator.register_buffer("weight", scale.new_empty(0))
        operator.register_buffer("codes", pack(unpack_rows(packed, bits, d_in), bits))
        operator.register_buffer("zeros", zeros)
        operator.register_parameter("scale", scale)
