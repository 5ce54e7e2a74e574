"""`transect.compress` and `transect.compress_stream`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..anatomy import Anatomy
from ..checkpoint import Opened, folder_of, tokenizer_of
from ..compression import compress_anatomy
from ..data import SpecialTokens
from ..forward import at_rest
from ..statistics import Fisher, Progress
from ..streaming import StreamedModel, compress_streamed
from .common import CALIBRATION_SEQUENCES, calibration_of, opened_of, recipe_of


def compress(
    model: Any,
    method: str,
    keep: float,
    data: Any = None,
    *,
    tokenizer: Any = None,
    allocation: str | None = None,
    sequential: bool = False,
    refit: bool = False,
    roles: Iterable[str] | None = None,
    sequence_length: int | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: int = CALIBRATION_SEQUENCES,
    batch_size: int = 8,
    fisher: Fisher = "empirical",
    accumulate: torch.dtype = torch.float64,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Compress a model in place and return it; `model.save_pretrained(folder)` then writes it with its structure.

    model: a Hugging Face model, or the name of one (a folder, a hub name, or `organism`).
    method: see `transect.methods()`. keep: share of the block matrices' bytes to keep, in (0, 1].
    data: calibration data: texts, a path, a hub data set, token ids or batches; see `transect.data.load`.
    tokenizer: tokenizer or image processor. Default: found beside the model.
    allocation: how the bytes are shared among the matrices; see `transect.allocations()`. Default: the method's own,
        `Method.allocation`: uniform shares for most.
    sequential: calibrate each block on the compressed blocks before it. refit: refit the left factors afterwards.
    roles: only these matrices (q, k, v, o, gate, up, down). Default: all.
    sequence_length, sequences, batch_size, special_tokens: of the calibration data, see `transect.data.load`; sequences
        are spread evenly over it.
    fisher: gradients against the data's labels ("empirical") or labels drawn from the model ("sampled").
    accumulate: precision of the statistics' sums. cache: a file to keep the statistics in.
    settings: the method's parameters; those of the allocation with the prefix `allocation_`.

    Raises TransectError before any change if something cannot be done.
    """
    opened = opened_of(model, tokenizer)
    anatomy = Anatomy(opened.model)
    matrices = anatomy.matrices(roles)
    recipe = recipe_of(method, keep, allocation, sequential, refit, settings).resolved(anatomy, matrices)
    batches = None
    if recipe.needs_data and data is not None:
        batches = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    compress_anatomy(
        anatomy, recipe, batches, matrices=matrices, fisher=fisher, accumulate=accumulate, seed=seed,
        cache=None if cache is None else Path(cache), progress=progress,
    )  # fmt: skip
    return opened.model if isinstance(model, (str, Path, Opened)) else model


def compress_stream(
    model: str | Path,
    out: str | Path,
    method: str,
    keep: float,
    data: Any = None,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    allocation: str | None = None,
    sequential: bool = False,
    sequence_length: int | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: int = CALIBRATION_SEQUENCES,
    batch_size: int = 8,
    fisher: Fisher = "empirical",
    accumulate: torch.dtype = torch.float64,
    seed: int = 0,
    overwrite: bool = False,
    architecture: Any = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compress a model folder into another with one block in memory at a time, so that memory is bounded.

    model: a folder of safetensors, or a hub name, of which that revision is downloaded. out: the folder to write;
    unfinished work lies beside it, and the same call goes on from there. The rest as for `compress`; allocation: any
    that does not run the model (`ilp` does).

    Returns what was kept: matrix_bytes, dense_matrix_bytes and their ratio.
    """
    folder = folder_of(str(model), revision)
    source = StreamedModel(folder, architecture=architecture, dtype=dtype, device=device)
    anatomy = source.anatomy
    recipe = recipe_of(method, keep, allocation, sequential, False, settings).resolved(anatomy, anatomy.matrices())
    if tokenizer is None:
        tokenizer = tokenizer_of(source.model)
    opened = Opened(source.model, tokenizer, tokenizer, str(model), source.folder)
    batches = None
    if recipe.needs_data and data is not None:
        batches = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    with at_rest(source.model):
        return compress_streamed(
            source, recipe, batches, Path(out), tokenizer,
            overwrite=overwrite, fisher=fisher, accumulate=accumulate, seed=seed, progress=progress,
        )  # fmt: skip
