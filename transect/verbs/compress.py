"""`transect.compress`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch

from ..anatomy import Anatomy
from ..arguments import checked
from ..checkpoint import Opened, folder_of, open_model, tokenizer_of
from ..compression import compress_anatomy
from ..data import SpecialTokens
from ..errors import TransectError
from ..forward import at_rest
from ..parameters import Seed
from ..statistics import Fisher, Progress
from ..streaming import StreamedModel, compress_streamed
from .arguments import Count, Device, FileName, FolderName, Length, Role, Share, Some, SumType, WeightType
from .common import CALIBRATION_SEQUENCES, Settings, calibration_of, opened_of, recipe_of


@checked
def compress(
    model: Any,
    method: str,
    keep: Share,
    data: Any = None,
    *,
    stream_to: FolderName | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    allocation: str | None = None,
    sequential: bool = False,
    refit: bool = False,
    roles: Annotated[Iterable[Role], Some] | None = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = CALIBRATION_SEQUENCES,
    batch_size: Count = 8,
    fisher: Fisher = "empirical",
    accumulate: SumType = torch.float64,
    seed: Seed = 0,
    cache: FileName | None = None,
    revision: str | None = None,
    architecture: Any = None,
    dtype: WeightType | None = None,
    device: Device | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Any:
    """Compress a model in place and return it; `model.save_pretrained(folder)` then writes it with its structure.

    model: a Hugging Face model, or the name of one (a folder, a hub name, or `organism`).
    method: see `transect.methods()`. keep: share of the block matrices' bytes to keep, in (0, 1].
    data: calibration data: texts, a path, a hub data set, token ids or batches; see `transect.data.load`.
    stream_to: a folder to write the result to, with one block in memory at a time, so that memory is bounded. The model
        is then a folder of safetensors (or a hub name, which is downloaded). Unfinished work lies beside `stream_to`,
        and the same call goes on from there. It goes without refit, roles and cache, and with any allocation that does
        not run the model (`ilp` does). Returned is what was kept: matrix_bytes, dense_matrix_bytes and their ratio.
    overwrite: replace what is in `stream_to`.
    tokenizer: tokenizer or image processor. Default: found beside the model.
    allocation: how the bytes are shared among the matrices; see `transect.allocations()`. Default: the method's own,
        `Method.allocation`: uniform shares for most.
    sequential: calibrate each block on the compressed blocks before it. refit: refit the left factors afterwards.
    roles: only these matrices (q, k, v, o, gate, up, down). Default: all.
    sequence_length, sequences, batch_size, special_tokens: of the calibration data, see `transect.data.load`; sequences
        are spread evenly over it.
    fisher: gradients against the data's labels ("empirical") or labels drawn from the model ("sampled").
    accumulate: precision of the statistics' sums. cache: a file to keep the statistics in.
    revision, architecture, dtype, device: of a model that is given by its name; see `transect.checkpoint.open_model`.
    parameters: the method's; those of the allocation with the prefix `allocation_`.
    settings: the same by the name of the method or allocation, for a parameter that is called as an argument of this
        function is: {"armor": {"seed": 1}}, where `seed` alone is that of sampled labels and masked tokens.

    Raises TransectError before any change if something cannot be done. If it fails later, the model is as before.
    """
    loading = {"architecture": architecture, "dtype": dtype, "device": device}
    if stream_to is None:
        if isinstance(model, (str, Path)):
            opened = opened_of(open_model(str(model), revision=revision, **loading), tokenizer)
        else:
            opened = opened_of(model, tokenizer)
        anatomy = Anatomy(opened.model)
    else:
        for name, given in (("refit", refit), ("roles", roles), ("cache", cache)):
            if given:
                raise TransectError(f"{name} cannot be combined with streaming: leave it out, or compress in memory")
        source = StreamedModel(folder_of(str(model), revision), **loading)
        beside = tokenizer_of(source.model) if tokenizer is None else tokenizer
        opened, anatomy = Opened(source.model, beside, beside, str(model), source.folder), source.anatomy
    matrices = anatomy.matrices(roles)
    recipe = recipe_of(method, keep, allocation, sequential, refit, settings, parameters).resolved(anatomy, matrices)
    batches = None
    if recipe.needs_data and data is not None:
        batches = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    if stream_to is not None:
        with at_rest(source.model):
            return compress_streamed(
                source, recipe, batches, Path(stream_to), opened.tokenizer,
                overwrite=overwrite, fisher=fisher, accumulate=accumulate, seed=seed, progress=progress,
            )  # fmt: skip
    compress_anatomy(
        anatomy, recipe, batches, matrices=matrices, fisher=fisher, accumulate=accumulate, seed=seed,
        cache=None if cache is None else Path(cache), progress=progress,
    )  # fmt: skip
    return opened.model if isinstance(model, (str, Path, Opened)) else model
