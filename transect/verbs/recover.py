"""`transect.recover`: a short repair after any compression."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..anatomy import Anatomy
from ..arguments import checked
from ..checkpoint import Opened, check_output, save
from ..data import SpecialTokens
from ..parameters import Seed
from ..recovery import KIND, Check, How, Machine, Settings, State, Train, check_same_tokens, recover_anatomy
from ..statistics import Progress
from ..store import alone
from .arguments import Count, Device, FolderName, Length
from .common import calibration_of, opened_of


@checked
def recover(
    model: Any,
    data: Any,
    how: How = "lora",
    *,
    teacher: Any = None,
    out: FolderName | None = None,
    checkpoint: FolderName | None = None,
    tokenizer: Any = None,
    train: Train | None = None,
    lr: float | None = None,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.05,
    temperature: float = 1.0,
    held_out: float = 0.1,
    every: int | None = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = None,
    seed: Seed = 0,
    device: Device | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_check: Callable[[Check], None] = lambda check: None,
) -> Any:
    """Repair a model after any compression, in place, by a short training of its blocks, and return it.

    model: a Hugging Face model, or the name of one. Its structure stays; what came of the repair is the last entry of
        `transect.Anatomy(model).record.history`.
    data: training data, see `transect.data.load`; the last `held_out` share of it is not trained on but judges the
        repair. Never give the text that the result is to be evaluated on.
    how: "lora" (low-rank updates, merged afterwards) or "full" lower the model's own loss; "distill" follows the
        logits, and "blocks" each block's output, of the dense model.
    teacher: that dense model, or its name.
    out: a folder to write the repaired model to; unfinished work lies beside it, and the same call goes on from there.
    checkpoint: a folder for unfinished work, where there is no `out`. It is removed at the end.
    tokenizer: tokenizer or image processor. Default: found beside the model.
    train ... seed: see `transect.recovery.Settings`. sequences: use so many of the data's, evenly spaced; default all.
    device: where to train. Default: where accelerate puts it (a GPU if there is one); the model returns to its place.
    on_check: called with every measurement of the held-out loss.

    Under `accelerate launch` every process makes the same call; they share out each batch, and one writes the files.
    Raises TransectError before any change if something cannot be done.
    """
    settings = Settings(
        how=how, train=train, lr=lr, epochs=epochs, steps=steps, batch_size=batch_size, accumulate=accumulate,
        rank=rank, alpha=alpha, dropout=dropout, temperature=temperature, held_out=held_out, every=every, seed=seed,
    ).resolved()  # fmt: skip
    target = None if out is None else check_output(out, overwrite)
    places = [Path(place) for place in (target, checkpoint) if place is not None]
    if target is not None and checkpoint is None:
        checkpoint = target.parent / f".{target.name}.recovery"
    machine = Machine(device)
    state = State(None if checkpoint is None else Path(checkpoint), writes=machine.is_main, kind=KIND)
    state.check_place()
    opened = opened_of(model, tokenizer)
    dense = None if teacher is None else opened_of(teacher, None)
    if dense is not None:
        check_same_tokens(opened.tokenizer, dense.tokenizer)
    batches = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(alone(place))
        recover_anatomy(
            Anatomy(opened.model), settings, batches, None if dense is None else dense.model,
            machine=machine, state=state, progress=progress, on_check=on_check,
        )  # fmt: skip
        if target is not None and machine.is_main:
            save(opened.model, target, opened.tokenizer or opened.processor, overwrite=overwrite)
        machine.wait()
        state.remove()
    return opened.model if isinstance(model, (str, Path, Opened)) else model
