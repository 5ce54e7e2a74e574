"""`transect.search`: choose a model's sizes inside the model itself, and cut the smaller one out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..anatomy import Anatomy
from ..arguments import checked
from ..checkpoint import check_output, save
from ..data import SpecialTokens
from ..parameters import Seed
from ..sizing import Settings, search_anatomy
from ..statistics import Progress
from ..store import alone
from ..training import Check, Machine, State
from .arguments import Count, Device, FolderName, Length, Share, Some
from .common import Settings as Given
from .common import calibration_of, one_of, opened_of

KIND = "an unfinished search"  # what the folder of one is
Sizes = Annotated[Sequence[Count], Some]


@dataclass(frozen=True)
class Searched:
    """model: the smaller one. outcome: see `transect.sizing.search_anatomy`."""

    model: Any
    outcome: dict[str, Any]


@checked
def search(
    model: Any,
    data: Any,
    method: str = "tanglenas",
    *,
    keep: Share | None = None,
    penalty: float = 1.0,
    neurons: Sizes | None = None,
    heads: Sizes | None = None,
    depth: Sizes | None = None,
    hidden: Sizes | None = None,
    shared: bool = False,
    out: FolderName | None = None,
    checkpoint: FolderName | None = None,
    tokenizer: Any = None,
    lr: float = 1e-4,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 8,
    validation: float = 0.5,
    held_out: float = 0.1,
    every: int | None = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = None,
    seed: Seed = 0,
    device: Device | None = None,
    overwrite: bool = False,
    settings: Given | None = None,
    progress: Progress | None = None,
    on_check: Callable[[Check], None] = lambda check: None,
    **parameters: Any,
) -> Searched:
    """Choose the sizes of a smaller model, which is a slice of this one, and cut it out. This one stays as it is.

    model: a Hugging Face model, or the name of one. data: see `transect.data.load`; one part trains the shared
        weights, one chooses, and the last judges. Never the text that the result is evaluated on.
    method: see `transect.searchers()`. parameters: its settings; settings: the same by the method's name.
    keep ... held_out: see `transect.sizing.Settings`. Of each axis the sizes to choose from, as whole numbers: neurons
        of an MLP, key/value heads, depth (blocks, from the first), hidden (the stream's width).
    out: a folder for the smaller model, an ordinary checkpoint. Unfinished work lies beside it, and the same call goes
        on from there. checkpoint: a folder for unfinished work, where there is no `out`. It is removed at the end.
    sequences: use so many of the data's, evenly spaced; default all.
    device: where to work. Default: where accelerate puts it (a GPU if there is one).

    The result has inherited weights: `transect.recover` or `transect.adapt` trains it further.
    Raises TransectError before any work if something cannot be done.
    """
    given = {"neurons": neurons, "heads": heads, "depth": depth, "hidden": hidden}
    resolved = Settings(
        method=method, options=one_of(settings, {method: parameters})[method],
        sizes={what: list(sizes) for what, sizes in given.items() if sizes is not None}, shared=shared, keep=keep,
        penalty=penalty, lr=lr, epochs=epochs, steps=steps, batch_size=batch_size, validation=validation,
        held_out=held_out, every=every, seed=seed,
    ).resolved()  # fmt: skip
    target = None if out is None else check_output(out, overwrite)
    places = [Path(place) for place in (target, checkpoint) if place is not None]
    if target is not None and checkpoint is None:
        checkpoint = target.parent / f".{target.name}.search"
    machine = Machine(device)
    state = State(None if checkpoint is None else Path(checkpoint), writes=machine.is_main, kind=KIND)
    state.check_place()
    opened = opened_of(model, tokenizer)
    batches = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(alone(place))
        smaller, outcome = search_anatomy(
            Anatomy(opened.model), resolved, batches, machine=machine, state=state, progress=progress, on_check=on_check
        )
        outcome = {**outcome, "settings": resolved.to_dict()}
        Anatomy(smaller).record.history.append({"search": outcome})
        if target is not None and machine.is_main:
            save(smaller, target, opened.tokenizer or opened.processor, overwrite=overwrite)
        machine.wait()
        state.remove()
    return Searched(smaller, outcome)
