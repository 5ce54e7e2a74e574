"""`transect.convert`: a trained model into another architecture that keeps its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..anatomy import Anatomy
from ..arguments import checked
from ..checkpoint import check_output, save
from ..conversion import KIND, Plan, conversion_named, convert_anatomy
from ..data import SpecialTokens
from ..parameters import Seed, listed
from ..statistics import Progress
from ..store import alone
from ..training import Check, Machine, State
from .arguments import Count, Device, FolderName, Length
from .common import Settings as Given
from .common import calibration_of, held_out_of, one_of, opened_of


@dataclass(frozen=True)
class Converted:
    """model: the converted model, the given one itself unless the conversion makes another.

    outcome: see `transect.conversion.convert_anatomy`.
    """

    model: Any
    outcome: dict[str, Any]


@checked
def convert(
    model: Any,
    method: str,
    data: Any = None,
    *,
    eval_data: Any = None,
    out: FolderName | None = None,
    checkpoint: FolderName | None = None,
    tokenizer: Any = None,
    steps: int | None = None,
    epochs: int = 1,
    lr: float | None = None,
    train: Literal["full", "lora", "new"] | None = None,
    lowers: Literal["own", "distill"] | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    held_out: float = 0.1,
    every: int | None = None,
    lengths: Sequence[Length] = (),
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = None,
    eval_sequences: Count | None = None,
    seed: Seed = 0,
    device: Device | None = None,
    overwrite: bool = False,
    settings: Given | None = None,
    progress: Progress | None = None,
    on_check: Callable[[Check], None] = lambda check: None,
    **parameters: Any,
) -> Converted:
    """Turn a trained model into another architecture, in place, and repair it by a short training.

    It keeps its weights, exactly where algebra allows it; `result.outcome` says what is left and what it costs.

    model: a Hugging Face model, or the name of one. method: see `transect.conversions()`.
    data: what is trained on, and what the conversion looks at where it looks at text; see `transect.data.load`. The
        last `held_out` share of it is not trained on but chooses the state that is kept. Without data it is converted
        only.
    eval_data: text on which the model is measured as it was, converted, and trained; `eval_sequences` of it.
    out: a folder for the result, an ordinary checkpoint. Unfinished work lies beside it, and the same call goes on.
    checkpoint: a folder for unfinished work, where there is no `out`. It is removed at the end.
    steps: of the training, shared out among the stages that the paper prescribes; 0 converts only, default one pass.
    lr, train, lowers: in place of what the paper prescribes: the largest learning rate; "full", "lora" (low-rank
        updates, merged afterwards) or "new" (what the conversion added); the model's "own" loss, or "distill", the
        distance from the predictions of the model as it was.
    epochs ... held_out, every, seed: see `transect.conversion.Plan`. sequences: use so many of the data's; default all.
    lengths: of prompts at which speed, operations and cache are measured, before and after.
    device: where to train. Default: where accelerate puts it (a GPU if there is one); the model returns to its place.
    parameters: the conversion's. settings: the same by its name.

    Raises TransectError before any change if something cannot be done.
    """
    conversion_named(method)
    chosen = one_of(settings, {method: parameters})
    plan = Plan(
        method=method, settings=chosen[method], steps=steps, epochs=epochs, lr=lr, train=train, lowers=lowers,
        batch_size=batch_size, accumulate=accumulate, held_out=held_out, every=every, seed=seed,
    ).resolved()  # fmt: skip
    target = None if out is None else check_output(out, overwrite)
    places = [Path(place) for place in (target, checkpoint) if place is not None]
    if target is not None and checkpoint is None:
        checkpoint = target.parent / f".{target.name}.conversion"
    machine = Machine(device)
    state = State(None if checkpoint is None else Path(checkpoint), writes=machine.is_main, kind=KIND)
    state.check_place()
    opened = opened_of(model, tokenizer)
    batches = None
    if data is not None:
        batches = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    texts = {}
    if eval_data is not None:
        texts["eval"] = held_out_of(
            eval_data, opened, sequence_length, eval_sequences, batch_size, seed, special_tokens
        )
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(alone(place))
        made, outcome = convert_anatomy(
            Anatomy(opened.model), plan, batches, texts, lengths=listed(lengths), machine=machine, state=state,
            progress=progress, on_check=on_check,
        )  # fmt: skip
        if target is not None and machine.is_main:
            save(made, target, opened.tokenizer or opened.processor, overwrite=overwrite)
        machine.wait()
        state.remove()
    return Converted(made, outcome)
