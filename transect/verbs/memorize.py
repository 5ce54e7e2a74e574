"""`transect.memorize`: a corpus into a memory beside a trained model, mixed into what it predicts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..anatomy import Anatomy
from ..arguments import checked
from ..checkpoint import Opened, check_output, save
from ..data import SpecialTokens
from ..memory import KIND, Settings, memorize_anatomy
from ..parameters import Seed
from ..statistics import Progress
from ..store import alone
from ..training import Check, State
from .arguments import Count, FolderName, Length
from .common import calibration_of, opened_of


@checked
def memorize(
    model: Any,
    data: Any,
    *,
    out: FolderName | None = None,
    tokenizer: Any = None,
    blocks: int = 4,
    neighbours: int = 64,
    temperature: float = 0.0,
    imitation: float = 0.5,
    epochs: int = 5,
    batch: int = 512,
    lr: float = 1e-3,
    held_out: float = 0.1,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = None,
    seed: Seed = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_check: Callable[[Check], None] = lambda check: None,
) -> Any:
    """Give a language model a memory of a corpus, in place, and return it: MLP Memory, arXiv:2508.01832.

    A network learns, from the model's own states, which tokens followed the nearest of them in the corpus; its
    prediction is mixed into the model's. Nothing of the model itself changes, and it saves, loads and generates as
    before. `transect.memory.memory_of(model)` gives the memory, and its `share` in the mixture.

    model: a Hugging Face model, or the name of one. data: the corpus, see `transect.data.load`; the last `held_out`
        share of it chooses the best state and the share. All distances between its positions are computed: some 10⁵ of
        them take minutes. Never give the text that the result is to be evaluated on.
    out: a folder to write the model to; unfinished work lies beside it, and the same call goes on from there.
    tokenizer: default: found beside the model.
    blocks ... held_out, seed: see `transect.memory.Settings`. sequences: use so many of the data's; default all.
    on_check: called with every measurement of the held-out loss.
    Raises TransectError before any change if something cannot be done.
    """
    settings = Settings(
        blocks=blocks, neighbours=neighbours, temperature=temperature, imitation=imitation, epochs=epochs, batch=batch,
        lr=lr, held_out=held_out, seed=seed,
    ).checked()  # fmt: skip
    target = None if out is None else check_output(out, overwrite)
    state = State(None if target is None else target.parent / f".{target.name}.memory", kind=KIND)
    state.check_place()
    opened = opened_of(model, tokenizer)
    batches = calibration_of(data, opened, sequence_length, sequences, 8, seed, special_tokens)
    with nullcontext() if target is None else alone(target):
        memorize_anatomy(Anatomy(opened.model), settings, batches, state=state, progress=progress, on_check=on_check)
        if target is not None:
            save(opened.model, target, opened.tokenizer or opened.processor, overwrite=overwrite)
        state.remove()
    return opened.model if isinstance(model, (str, Path, Opened)) else model
