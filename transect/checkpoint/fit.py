"""Do the stored tensors fit the model that config.json describes? Found out before a number of it is allocated."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as registration
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..anatomy.record import StructureRecord
from ..errors import BadCheckpoint, TransectError
from ..store import in_short
from .header import BITS, FLOATS, Stored
from .quantizer import METHOD, STOP
from .replay import replay
from .unpacked import expect_packed

# Masks and tables that older versions of transformers stored in the blocks, and the present ones compute.
_LEFT_OVER = re.compile(r"(.*\.)?(inv_freq|masked_bias|position_ids|(attn|attention)\.bias)")
_COMPUTED = 2**28  # bytes of tables that a model may compute beside its weights, whatever their size
_ONE_BY_ONE = 2**23  # numbers of tables that transformers computes in a loop in Python: a microsecond, 40 bytes each


def check_fit(where: str, kind: Any, config: Any, stored: Mapping[str, Stored]) -> None:
    """Raise BadCheckpoint unless the stored tensors are those of the model `kind(config)`, but for leftovers.

    kind: the transformers class. stored: what the headers say. The model is built without numbers (on `meta`), with its
    structure record; how much is built is bounded by how many tensors there are, whatever the config says.
    """
    try:
        with bounded(16 * len(stored) + 10_000):
            model = _skeleton(kind, config, stored, where)
    except TransectError:
        raise
    except ImportError as error:
        raise TransectError(f"{where} needs a package that is missing: {in_short(error)}") from error
    except Exception as error:  # each architecture has its own way to fail on a config that makes no sense
        raise BadCheckpoint(f"config.json of {where} describes no {kind.__name__}: {in_short(error)}") from error
    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found, unexpected, merged = set(), [], 0
    for name, tensor in stored.items():
        known, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None:  # one of several that transformers makes a parameter of
            merged += tensor.numbers
        elif known not in state:
            unexpected.append(known)
            continue
        else:
            found.add(known)
            if tuple(state[known].shape) != tensor.shape:
                raise BadCheckpoint(
                    f"the weights in {where} do not fit its config.json: {known} has shape {list(tensor.shape)}, and "
                    f"the model that the config describes needs {list(state[known].shape)}"
                )
        like = state.get(known)
        if (like is None or like.is_floating_point()) != (tensor.dtype in FLOATS):
            raise BadCheckpoint(
                f"{known} in {where} is stored as {tensor.dtype}, and the model needs "
                f"{'floating-point numbers' if like is None or like.is_floating_point() else str(like.dtype)}"
            )
    _check_missing(where, model, {name: state[name] for name in state if name not in found}, merged)
    _check_unexpected(where, model, unexpected)
    _check_computed(where, model, state, stored)


@contextmanager
def bounded(most: int) -> Iterator[None]:
    """Inside, a model of more than so many modules, parameters and buffers is a BadCheckpoint while it is built."""
    left = [most]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise BadCheckpoint(f"config.json describes a model of more than {most} parts, and no file holds so many")

    handles = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _skeleton(kind: Any, config: Any, stored: Mapping[str, Stored], where: str) -> Any:
    """As `from_pretrained` builds it before the weights come: see `RecordingQuantizer`."""
    config = copy.deepcopy(config)
    settings = config.__dict__.pop("quantization_config", None)
    recorded = isinstance(settings, dict) and settings.get("quant_method") == METHOD
    if recorded:
        if config._attn_implementation == STOP:
            config._attn_implementation = None
        if getattr(config, "is_heterogeneous", False):
            config.per_layer_config = None
    with init.no_init_weights(), torch.device("meta"):
        model = kind(config)
        if recorded:
            replay(model, StructureRecord.from_dict(settings.get("record")))
        elif settings is not None:
            expect_packed(model, settings, stored, where)
    return model


def _check_missing(where: str, model: Any, missing: Mapping[str, Any], merged: int) -> None:
    """merged: numbers of the stored tensors of which others are made."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    allowed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    lacking = {
        name: tensor
        for name, tensor in missing.items()
        if name not in tied and not any(pattern.search(name) for pattern in allowed)
    }
    if sum(tensor.numel() for tensor in lacking.values()) > merged:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise BadCheckpoint(f"{where} does not hold all of the model's weights: {min(lacking)}{more}")


def _check_unexpected(where: str, model: Any, names: list[str]) -> None:
    """Refuse what lies in the model's blocks, or would if it had more of them. Another model's head does no harm."""
    allowed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    lists = [path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    numbered = re.compile(rf"({'|'.join(map(re.escape, lists))})\.\d+(\..*)?") if lists else None
    odd = [
        name
        for name in sorted(names)
        if numbered is not None
        and (numbered.fullmatch(name) or numbered.fullmatch(f"{model.base_model_prefix}.{name}"))
        and not _LEFT_OVER.fullmatch(name)
        and not any(pattern.search(name) for pattern in allowed)
    ]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise BadCheckpoint(
            f"{where} holds tensors that the model which its config.json describes does not have: {odd[0]}{more}"
        )


def _check_computed(where: str, model: Any, state: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Bound what the model would compute for itself, as a table of all positions."""
    size = sum(tensor.numbers * BITS[tensor.dtype] // 8 for tensor in stored.values())
    tables = {name: buffer.nbytes for name, buffer in model.named_buffers() if name not in state}
    if sum(tables.values()) > _COMPUTED + 4 * size:
        largest = max(tables, key=lambda name: tables[name])
        raise BadCheckpoint(
            f"config.json of {where} describes a model that computes tables of {sum(tables.values())} bytes, the "
            f"largest of them {largest}, and its weights have {size}"
        )
    if getattr(model.config, "sinusoidal_pos_embds", False) or getattr(model.config, "sinusoidal_embeddings", False):
        _check_sines(where, model)


def _check_sines(where: str, model: Any) -> None:
    """Bound the table of sines that DistilBERT and XLM compute although it is stored."""
    tables = [getattr(module, "position_embeddings", None) for module in model.modules()]
    sines = sum(table.weight.numel() for table in tables if isinstance(table, torch.nn.Embedding))
    if sines > _ONE_BY_ONE:
        raise BadCheckpoint(
            f"config.json of {where} describes a model that computes {sines} sines for its positions, one by one, and "
            f"at most {_ONE_BY_ONE} are computed"
        )
