"""`transect.race_parts`: fresh models with one part or another, side by side on a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from ..arguments import Range, checked
from ..contest import KIND
from ..contest.parts import PartsPlan, PartsTrial, SpeedTrial, check_entrants, size_of_first
from ..contest.parts import race_parts as race_all
from ..errors import TransectError
from ..parameters import Seed, listed
from ..parts import part_named
from ..pool import Engine
from ..report.parts_contest import by_frame, parts_markdown, parts_plot, speeds_frame
from ..store import Folder, alone, write_text
from ..tasks import task_named
from ..training import optimizer_named
from .arguments import Count, Device, FolderName, Some
from .common import Settings, one_of

Rate = Annotated[float, Range(0, above=True)]
Positions = Annotated[int, Range(32, 2**24)]
SLOTS = ("mixer", "mlp", "activation", "matrix", "norm", "block")


@checked
def race_parts(
    base: str,
    task: str,
    out: FolderName,
    *,
    mixer: Sequence[str] = (),
    mlp: Sequence[str] = (),
    activation: Sequence[str] = (),
    matrix: Sequence[str] = (),
    norm: Sequence[str] = (),
    block: Sequence[str] = (),
    parameters: Count | None = None,
    flops: Annotated[int, Range(1, 2**62)] | None = None,
    hidden: Count = 64,
    blocks: Count = 2,
    heads: Count = 4,
    neurons: Count | None = None,
    data: str | None = None,
    eval_data: str | None = None,
    steps: Count = 500,
    batch_size: Count = 32,
    rates: Annotated[Sequence[Rate], Some] = (3e-4, 1e-3, 3e-3),
    seeds: Count = 3,
    held_out: Count = 512,
    lengths: Sequence[Positions] = (256, 1024, 4096, 16384),
    optimizer: str = "adamw",
    seed: Seed = 0,
    device: Device = "cpu",
    workers: Count = 1,
    engine: Engine = "local",
    overwrite: bool = False,
    settings: Settings | None = None,
    on_trial: Callable[[PartsTrial | SpeedTrial], None] = lambda trial: None,
) -> Any:
    """Train the same small model from scratch with every combination of these parts; a row each.

    base: a kind of model that transformers has, such as `llama`, or `vit` for images. task: see `transect.tasks`.
    out: the run folder. Trials are written as they finish; a contest that was interrupted goes on where it stopped, and
        parts, rates, seeds and lengths can be added to it. It ends with table.csv, by.csv, speeds.csv, table.md and
        contest.png in it.
    mixer, mlp, activation, matrix, norm, block: parts to be tried in that slot; `base` is the model's own. The first
        of each is what the others are compared with.
    parameters: widths are chosen so that every model has so many within 1 %; flops: operations for a sequence instead.
        Default: as many parameters as the first combination has in the given sizes.
    hidden, blocks, heads, neurons: sizes; neurons, and where they do not do hidden, give way to the count.
    steps, batch_size: of training; the examples of each step are new, and the same for all. rates: the grid; the first
        seed chooses by the loss on validation examples. held_out: examples that judge.
    data, eval_data: text of the task `text`: to train on, and held out (its settings of these names).
    lengths: of sequences, at which reading and writing are timed (one sequence, one model after another), and the
        memory that they take; none for images.
    settings: part, task or optimizer -> its settings.

    Returns the table: entrant, parameters, flops, rate (and whether it is at the `edge` of the grid), loss, accuracy,
    their standard errors over seeds, and against the first entrant the mean difference, p of a paired t-test and the
    `detectable` difference; seconds_a_step, forward_seconds; `crossover`, the length from which on it reads faster than
    with the model's own attention (infinite: at no length that was measured). What cannot be made equal, or diverges,
    has a note. Rows that are a `baseline` of the task come last. In `attrs` are curves, `by` and speeds.
    """
    slots = {
        slot: tuple(dict.fromkeys(listed(names)))
        for slot, names in zip(SLOTS, (mixer, mlp, activation, matrix, norm, block), strict=True)
        if names
    }
    if not slots:
        raise TransectError(f"name the parts of at least one slot: {', '.join(SLOTS)}")
    if parameters is not None and flops is not None:
        raise TransectError("models can be made equal in parameters or in flops, not in both")
    asked, steps_of = task_named(task), optimizer_named(optimizer)
    for slot, names in slots.items():
        for name in names:
            if name != "base":
                part_named(slot, name)
    names = [name for names in slots.values() for name in names if name != "base"]
    chosen = one_of(settings, {**{name: {} for name in names}, task: {}, optimizer: {}})
    texts = {name: text for name, text in (("data", data), ("eval_data", eval_data)) if text is not None}
    known = {parameter.name for parameter in asked.parameters}
    for name, text in texts.items():
        if name not in known:
            raise TransectError(f"{task} makes its own examples, and takes no {name}: leave out {text[:100]!r}")
        if name in chosen[task]:
            raise TransectError(f"{task}: {name} was given twice, in settings and beside them")
    options = asked.settings({**chosen.pop(task), **texts})
    optimizer_options = steps_of.settings(chosen.pop(optimizer))
    for slot, tried in slots.items():
        for name in tried:
            if name != "base":
                chosen[name] = part_named(slot, name).settings(chosen[name])
    sizes = {"hidden": hidden, "blocks": blocks, "heads": heads, "neurons": neurons or 4 * hidden}
    plan = PartsPlan(
        base=str(base), slots=slots, settings=chosen, sizes=sizes, equal="parameters" if flops is None else "flops",
        wanted=flops or parameters or 0, task=task, options=options,
        source="" if asked.source is None else asked.source(**options), steps=steps, batch=batch_size,
        rates=tuple(float(rate) for rate in rates), seeds=seeds, seed=seed, held_out=held_out, optimizer=optimizer,
        optimizer_options=optimizer_options, device=str(device),
        lengths=() if asked.draw(1, 0, options).images else tuple(sorted({int(length) for length in lengths})),
    )  # fmt: skip
    plan = plan if plan.wanted else replace(plan, wanted=size_of_first(plan))
    check_entrants(plan)
    folder = Folder(Path(out).expanduser(), KIND)
    folder.check_place()
    with alone(folder.path):
        folder.check("table.csv", "by.csv", "speeds.csv", "table.md", "contest.png")
        frame = race_all(plan, folder, workers=workers, engine=engine, overwrite=overwrite, on_trial=on_trial)
        write_text(folder.file("table.csv"), frame.to_csv(index=False))
        if frame.attrs["by"]:
            write_text(folder.file("by.csv"), by_frame(frame).to_csv())
        if frame.attrs["speeds"]:
            write_text(folder.file("speeds.csv"), speeds_frame(frame).to_csv(index=False))
        write_text(folder.file("table.md"), parts_markdown(frame))
        parts_plot(frame, folder.file("contest.png"), f"{base}, {task}")
        return frame
