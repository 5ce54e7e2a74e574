"""`transect.compare`: many methods and budgets side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch

from ..anatomy import Anatomy
from ..arguments import checked
from ..checkpoint import Opened, folder_of, open_model, tokenizer_of
from ..comparison import KIND, Plan, Row, beside_of, check_plan, compare_anatomy, compare_streamed, estimate
from ..compression.fingerprint import computation_fingerprint, model_fingerprint
from ..data import Batches, SpecialTokens, load_facts
from ..errors import TransectError
from ..parameters import Seed, listed
from ..pool import Engine
from ..report import markdown_table, pareto_plot
from ..statistics import Fisher, Progress
from ..store import Folder, alone, write_text
from ..streaming import StreamedModel
from .arguments import Count, Device, FolderName, Length, Role, Share, Some, SumType, WeightType
from .common import CALIBRATION_SEQUENCES, Settings, calibration_of, fingerprint_of, given_of, held_out_of, opened_of


@checked
def compare(
    model: Any,
    methods: Annotated[Sequence[str], Some],
    keep: Annotated[Sequence[Share], Some],
    data: Any,
    eval_data: Any,
    out: FolderName,
    *,
    also: Mapping[str, Any] | None = None,
    beside: Sequence[str | Path] = (),
    lengths: Sequence[Length] = (),
    facts: Any = None,
    tokenizer: Any = None,
    allocations: Annotated[Sequence[str], Some] | None = None,
    settings: Settings | None = None,
    sequential: bool = False,
    refit: bool = False,
    roles: Annotated[Iterable[Role], Some] | None = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = CALIBRATION_SEQUENCES,
    eval_sequences: Count | None = None,
    batch_size: Count = 8,
    fisher: Fisher = "empirical",
    accumulate: SumType = torch.float64,
    seed: Seed = 0,
    workers: Count = 1,
    engine: Engine = "local",
    stream: bool = False,
    revision: str | None = None,
    architecture: Any = None,
    dtype: WeightType | None = None,
    device: Device | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Any:
    """Compress one model by every method and allocation to every budget, and evaluate each; a row each, dense first.

    model, data, tokenizer and the calibration settings: as for `compress`. eval_data: held-out data, same forms;
    eval_sequences of it, evenly spaced (default all).
    also: further held-out texts, by name; every row is judged on them, too (columns `loss, NAME` and so on).
        Calibrating and judging on one kind of text hides what a method costs elsewhere.
    beside: finished models (converted, compressed, repaired), folders or names, each judged in a row of its own on the
        same texts; of the same task and vocabulary. Their `keep` is empty, and their `kept` counts all that they are
        larger or smaller by than the dense model, in its type, as of the matrices' bytes.
    lengths: of prompts at which every row is measured, too, one after the other: speed, operations, cache. Rows that an
        earlier run has without them are computed again.
    facts: asked of every row, see `transect.data.load_facts`; `common` are several hundred that everybody knows.
    out: the run folder. Rows are written as they finish; a run that was interrupted goes on where it stopped, and
    methods and budgets can be added to it. It ends with table.csv, table.md and pareto.png in it.
    allocations: each is combined with every method that it goes with. Default: each method's own, uniform for most.
    settings: method or allocation -> its parameters.
    workers: processes (their measured speeds disturb one another). engine: `local` or `ray`.
    stream: with one block in memory at a time, so that memory does not grow with the number of blocks; what is known of
        each block lies on disk. The model is then a folder of safetensors (or a hub name, which is downloaded). It goes
        with methods that take one block at a time, in one process, and without refit, roles, facts, beside, lengths and
        `ilp`; speeds are not measured.
    revision, architecture, dtype, device: of a model that is given by its name; see `transect.checkpoint.open_model`.
    dry_run: compute nothing; returned is a `transect.comparison.Estimate` of memory, disk and time, the latter from one
        block that is measured.

    Returns the table: method, allocation, keep, kept (share of the matrices' bytes), bytes (of the whole model),
    parameters, loss (nats), its standard_error over the held-out sequences, over_dense (the loss over the dense
    model's) and over_dense_error (its standard error, sequence by sequence), perplexity, accuracy, tokens, prefill and
    decode tokens per second, flops and cache_bytes (for a token read), active_parameters (that a token reads, see
    `transect.evaluation.Operations`), peak_memory (bytes), compress_seconds
    (statistics, factorization and replacement, as if the row were computed alone); with lengths,
    also `prefill at N`, `decode at N` and the rest of `transect.evaluation.Quality`; with facts, also facts: the share,
    of those that the dense model says by itself in greedy generation, that the row says too (see
    `transect.evaluation.says`). How many of how many these are is in the table's `attrs["facts"]`; none is an error. A
    row whose process was lost twice, such as for want of memory, has a note instead, and is named in the table's
    `attrs["lost"]`; the same call tries it again.
    """
    methods, allocations, keep = listed(methods), listed(allocations or ()), listed(keep)
    lengths = list(dict.fromkeys(listed(lengths)))
    settings = given_of(settings, methods, allocations)  # an unknown name is an error before anything is loaded
    folder = Folder(Path(out).expanduser(), KIND)
    folder.check_place()
    questions = [] if facts is None else load_facts(facts)
    if stream:
        given = {
            "refit": refit, "roles": roles, "facts": facts, "beside": beside, "lengths": lengths,
            "workers": workers > 1, "engine": engine != "local",
        }  # fmt: skip
        for name in given:
            if given[name]:
                raise TransectError(f"{name} cannot be combined with streaming: leave it out, or compare in memory")
        path = folder_of(str(model), revision)

        def open_source() -> StreamedModel:
            return StreamedModel(path, architecture=architecture, dtype=dtype, device=device)

        source = open_source()
        found = tokenizer_of(source.model) if tokenizer is None else tokenizer
        opened, anatomy = Opened(source.model, found, found, str(model), path), source.anatomy
        weights = computation = source.fingerprint
    else:
        loading = {"revision": revision, "architecture": architecture, "dtype": dtype, "device": device}
        named = open_model(str(model), **loading) if isinstance(model, (str, Path)) else model
        opened = opened_of(named, tokenizer)
        anatomy = Anatomy(opened.model)
        weights, computation = model_fingerprint(opened.model), computation_fingerprint(opened.model)
    finished = beside_of(anatomy, opened.tokenizer, [str(one) for one in listed(beside)], lengths)
    calibration = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
    held_out = held_out_of(eval_data, opened, sequence_length, eval_sequences, batch_size, seed, special_tokens)
    texts = {
        name: held_out_of(text, opened, sequence_length, eval_sequences, batch_size, seed, special_tokens)
        for name, text in (also or {}).items()
    }
    plan = Plan(
        model="" if opened.source == "" else str(opened.path or opened.source),
        dtype=str(opened.model.dtype).removeprefix("torch."), device=str(opened.model.device),
        architecture=asdict(anatomy.architecture),
        weights=weights, computation=computation,
        methods=tuple(methods), allocations=tuple(allocations),
        keeps=tuple(float(share) for share in keep),
        settings=settings,
        calibration=calibration.fingerprint, evaluation=held_out.fingerprint,
        roles=None if roles is None else tuple(listed(roles)), fisher=fisher, accumulate=str(accumulate).split(".")[1],
        seed=seed, sequential=sequential, refit=refit,
        facts=fingerprint_of(opened.tokenizer, questions) if questions else "",
        also={name: batches.fingerprint for name, batches in texts.items()}, beside=finished,
        lengths=tuple(lengths),
    )  # fmt: skip
    if dry_run:
        check_plan(anatomy, plan, streamed=stream)
        judging = Batches([batch for batches in (held_out, *texts.values()) for batch in batches])
        return estimate(anatomy, plan, calibration, judging, source=source if stream else None)
    with alone(folder.path):
        folder.check("table.csv", "table.md", "pareto.png")
        if stream:
            frame = compare_streamed(
                open_source, plan, folder, calibration, held_out, also=texts, overwrite=overwrite, progress=progress,
                on_row=on_row,
            )  # fmt: skip
        else:
            frame = compare_anatomy(
                anatomy, plan, folder, calibration, held_out, also=texts, facts=questions, tokenizer=opened.tokenizer,
                workers=workers, engine=engine, overwrite=overwrite, progress=progress, on_row=on_row,
            )  # fmt: skip
        write_text(folder.file("table.csv"), frame.to_csv(index=False))
        write_text(folder.file("table.md"), markdown_table(frame))
        pareto_plot(frame, folder.file("pareto.png"), title=f"{opened.source or type(opened.model).__name__}")
        return frame
