"""`transect.adapt`: fine-tune a model by any published way of choosing what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from ..adaptation import Settings
from ..anatomy import Anatomy
from ..arguments import checked
from ..checkpoint import Opened, check_output, placed, save
from ..data import SpecialTokens
from ..goals import Reading
from ..parameters import Seed, listed
from ..statistics import Progress
from ..store import alone, write_text
from ..training import Check, Machine, State
from .arguments import Count, Device, FolderName, Length, Role, Some
from .common import Settings as Given
from .common import one_of, opened_of

KIND = "an unfinished adaptation"  # what the folder of one is
CARD = "adaptation.json"


@dataclass(frozen=True)
class Adapted:
    """model: with its adapter (a `peft.PeftModel`), or the model itself after merging or full training.

    outcome: see `transect.adaptation.adapt_anatomy`.
    """

    model: Any
    outcome: dict[str, Any]


@checked
def adapt(
    model: Any,
    method: str,
    data: Any,
    *,
    eval_data: Any = None,
    forgets: Any = None,
    out: FolderName | None = None,
    merge: bool = False,
    checkpoint: FolderName | None = None,
    tokenizer: Any = None,
    roles: Annotated[Sequence[Role], Some] | None = None,
    objective: str = "own",
    optimizer: str = "adamw",
    penalties: Sequence[str] = (),
    layer_rates: str | None = None,
    lr: float | None = None,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    held_out: float = 0.1,
    every: int | None = None,
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
) -> Adapted:
    """Fine-tune a model in place. What was learned and what was forgotten is in `result.outcome`.

    model: a Hugging Face model, or the name of one. method: see `transect.adapters()`; `full` trains everything.
    data: training data, see `transect.data.load`; the last `held_out` share of it is not trained on but chooses the
        state that is kept.
    eval_data: text of the same kind, `eval_sequences` of it, on which the model is measured before and after.
    forgets: text of another kind that must not be forgotten, measured likewise.
    out: a folder for the result: the adapter alone, as PEFT saves it, or with `merge` (and for `full`) an ordinary
        checkpoint. Unfinished work lies beside it, and the same call goes on from there.
    merge: write the adapter into the weights.
    checkpoint: a folder for unfinished work, where there is no `out`. It is removed at the end.
    roles: only these matrices. objective: what is lowered, see `transect.objectives()`; it decides what the data must
        be, and what the loss of `eval_data` and `forgets` is. optimizer: see `transect.optimizers()`. penalties: added
        to the loss, see `transect.penalties()`. layer_rates: by what each layer's learning rate is multiplied, see
        `transect.layer_rates()`. lr ... seed: see `transect.adaptation.Settings`.
    sequences: use so many of the data's, evenly spaced; default all.
    device: where to train. Default: where accelerate puts it (a GPU if there is one); the model returns to its place.
    parameters: the adapter's. settings: the same by the name of the adapter, the objective, the optimizer, a penalty or
        the rates by layer.

    Raises TransectError before any change if something cannot be done; after any error the model has no adapter.
    """
    from ..adaptation.adapt import adapt_anatomy  # peft takes a second to import

    added, rates = listed(penalties), [] if layer_rates is None else [layer_rates]
    others = (objective, optimizer, *added, *rates)
    chosen = one_of(settings, {method: parameters, **{name: {} for name in others}})
    resolved = Settings(
        method=method, options=chosen[method], roles=None if roles is None else tuple(listed(roles)),
        optimizer=optimizer, optimizer_options=chosen[optimizer],
        penalties={name: chosen[name] for name in added}, layer_rates=layer_rates,
        layer_rates_options={} if layer_rates is None else chosen[layer_rates], lr=lr, epochs=epochs, steps=steps,
        batch_size=batch_size, accumulate=accumulate, held_out=held_out, every=every, seed=seed,
        objective=objective, objective_options=chosen[objective],
    ).resolved()  # fmt: skip
    if merge:
        resolved.check_merges()
    target = None if out is None else check_output(out, overwrite)
    places = [Path(place) for place in (target, checkpoint) if place is not None]
    if target is not None and checkpoint is None:
        checkpoint = target.parent / f".{target.name}.adaptation"
    machine = Machine(device)
    state = State(None if checkpoint is None else Path(checkpoint), writes=machine.is_main, kind=KIND)
    state.check_place()
    opened = opened_of(model, tokenizer)
    goal = resolved.goal(opened)
    reading = Reading(sequence_length, batch_size, sequences, True, seed, special_tokens)
    batches = goal.read(data, reading)
    texts = {
        name: goal.read(text, replace(reading, sequences=eval_sequences, full_only=False))
        for name, text in {"eval": eval_data, "forgets": forgets}.items()
        if text is not None
    }
    anatomy = Anatomy(opened.model)
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(alone(place))
        attached, outcome = adapt_anatomy(
            anatomy, resolved, batches, texts, goal=goal, machine=machine, state=state, progress=progress,
            on_check=on_check,
        )  # fmt: skip
        outcome = {**outcome, "settings": resolved.to_dict()}
        if merge or attached.peft is None:
            merged = attached.merge()
            anatomy.record.history.append({"adapt": outcome})
            if target is not None and machine.is_main:
                save(merged, target, opened.tokenizer or opened.processor, overwrite=overwrite)
        elif target is not None and machine.is_main:
            _save_adapter(attached.peft, target, opened, outcome)
        machine.wait()
        state.remove()
    return Adapted(attached.result, outcome)


def _save_adapter(adapted: Any, target: Path, opened: Opened, outcome: Mapping[str, Any]) -> None:
    """Write the adapter's folder, whole or not at all. It names its base as the user did."""
    base = adapted.get_base_model()
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = str(opened.path or opened.source or getattr(base, "name_or_path", ""))
    with placed(target, "adapter_config.json") as partial:
        adapted.save_pretrained(partial)
        write_text(partial / CARD, json.dumps(outcome, indent=2, default=str) + "\n")
