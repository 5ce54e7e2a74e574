"""Models whose matrices are integers, in the format of `compressed-tensors`, which transformers and vLLM read.

It is that package's `pack-quantized` (compressors/pack_quantized in github.com/vllm-project/compressed-tensors). Of a
linear layer it stores, in place of the weight:

- `weight_packed` (d_out x words, int32): the integers of each row, the first in the lowest bits of the first word;
- `weight_scale` (d_out x groups);
- `weight_zero_point` (words x groups, int32), unless symmetric: the zero points, packed along d_out;
- `weight_shape` (2, int64): d_out and d_in.

Its integers are signed, and 2^(bits - 1) is added before they are packed: what is packed are the q and z of
`GroupedInteger`. What is read of it is in `unpacked`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy.record import StructureRecord
from ..operators.grouped_integer import GroupedInteger, pack, unpack
from .plain import fits, module_at

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
BITS = (2, 4, 8)  # other widths lie otherwise in newer versions of the package than in older ones
_STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what vLLM makes one matrix of
OURS = "transect_"  # how the names of `config_groups` begin where Transect is to read the folder, and not that package


def packed_settings(plain: Any, record: StructureRecord, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The `quantization_config` of a model in the format; None for one that it cannot hold, or transformers not read.

    plain: what transformers builds from the config alone, without weights. state: name -> tensor of every weight, of
    which only the shapes matter. All that the record changes must be linear layers that became integers.
    """
    integers, dense = _integers(record), dict(state)
    for path, entry in integers.items():
        if f"{path}.codes" not in state or not _holds(entry) or not isinstance(module_at(plain, path), nn.Linear):
            return None
        for name in ("codes", "scale", "zeros"):
            dense.pop(f"{path}.{name}", None)
        dense[f"{path}.weight"] = torch.empty(entry["out"], entry["in"], device="meta")
    others = {path: entry for path, entry in record.modules.items() if path not in integers}
    if not integers or not fits(plain, replace(record, modules=others), dense):
        return None
    return _settings(integers, plain)


def packed_tensors(record: StructureRecord, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors, or some of its modules', in the format."""
    found = dict(tensors)
    for path, entry in _integers(record).items():
        if f"{path}.codes" not in found:
            continue
        bits, d_in, d_out = entry["bits"], entry["in"], entry["out"]
        codes, scale = (found.pop(f"{path}.{name}") for name in ("codes", "scale"))
        found[f"{path}.weight_packed"] = pack_rows(unpack(codes, bits, d_out * d_in).view(d_out, d_in), bits)
        found[f"{path}.weight_scale"] = scale
        found[f"{path}.weight_shape"] = torch.tensor([d_out, d_in])
        if not entry["symmetric"]:
            zeros = unpack(found.pop(f"{path}.zeros"), bits, scale.numel()).view(scale.shape)
            found[f"{path}.weight_zero_point"] = pack_rows(zeros.T, bits).T.contiguous()
        del found[f"{path}.weight"]
    return found


def refused_by_vllm(model: Any, record: StructureRecord) -> str | None:
    """Why vLLM would not load the model in the format, as far as is known; None if nothing speaks against it."""
    kinds = {
        path: (entry["bits"], entry["group_size"], entry["symmetric"]) for path, entry in _integers(record).items()
    }
    for path, module in model.named_modules():
        for names in _STACKED:
            if len({kinds.get(f"{path}.{name}") for name in names if hasattr(module, name)}) > 1:
                return f"the matrices of {path} that it stacks are stored in several ways, or some left dense"
    if any(entry["bits"] < 4 for entry in _integers(record).values()):
        return "it has zero points of 4 and 8 bits only, and integers of fewer only of late"
    return None


def _integers(record: StructureRecord) -> dict[str, dict[str, Any]]:
    return {path: entry for path, entry in record.modules.items() if entry["kind"] == GroupedInteger.kind}


def _holds(entry: Mapping[str, Any]) -> bool:
    """Whether the format has these bits, and the groups are whole."""
    return entry["bits"] in BITS and (entry["group_size"] >= entry["in"] or entry["in"] % entry["group_size"] == 0)


def _settings(integers: Mapping[str, Any], plain: Any) -> dict[str, Any] | None:
    """The `quantization_config`; None for what transformers would not read.

    It expects zero points that are not packed, and stops, unless it makes dense matrices of all integers while it loads
    them (`dequantize`), which it then does by the first group for all. Without zero points it keeps the integers until
    the first forward. vLLM asks nothing of the kind.
    """
    kinds: dict[tuple[int, bool, int | None], list[str]] = {}
    for path, entry in integers.items():
        group = None if entry["group_size"] >= entry["in"] else entry["group_size"]
        kinds.setdefault((entry["bits"], entry["symmetric"], group), []).append(path)
    asymmetric = not all(symmetric for _, symmetric, _ in kinds)
    if asymmetric and len(kinds) > 1:
        return None
    groups = {}
    for i, ((bits, symmetric, group), paths) in enumerate(sorted(kinds.items(), key=str)):
        weights = {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "group_size": group,
            "strategy": "channel" if group is None else "group",
        }  # fmt: skip
        groups[f"{OURS}{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else sorted(paths),
            "weights": weights, "input_activations": None, "output_activations": None,
        }  # fmt: skip
    linear = (path for path, module in plain.named_modules() if isinstance(module, nn.Linear))
    return {
        "quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "config_groups": groups,
        "ignore": [path for path in linear if path not in integers], "kv_cache_scheme": None,
        **({"dequantize": True} if asymmetric else {}),
    }  # fmt: skip


def words(count: int, bits: int) -> int:
    """How many words of 32 bits `count` integers take."""
    return -(-count * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Integers (rows x columns) as words (rows x words, int32); the end of a row's last word is 0."""
    filled = nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    return pack(filled, bits).view(torch.int32).view(len(codes), -1)


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The integers (rows x columns, uint8) of words (rows x words, int32)."""
    content = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8).flatten()
    return unpack(content, bits, packed.numel() * (32 // bits)).view(len(packed), -1)[:, :columns]
