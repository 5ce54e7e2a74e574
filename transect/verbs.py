"""The verbs that a user calls, each a few lines over the rooms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from . import evaluation as evaluation_room
from .anatomy import Anatomy
from .checkpoint import Opened, check_output, open_model, save, tokenizer_of
from .claims import Outcome, claims, run_claims
from .comparison import Engine, Plan, Row, compare_anatomy
from .compression import Recipe, compress_anatomy
from .compression.fingerprint import model_fingerprint
from .compression.registry import method as registered
from .data import Batches, load
from .errors import TransectError
from .recovery import Check, How, Machine, Settings, State, Train, check_same_tokens, recover_anatomy
from .report import markdown_table, pareto_plot
from .statistics import Fisher, Progress
from .streaming import StreamedModel, compress_streamed, folder_of

CALIBRATION_SEQUENCES = 256
_OF_ALLOCATION = "allocation_"


def compress(
    model: Any,
    method: str,
    keep: float,
    data: Any = None,
    *,
    tokenizer: Any = None,
    allocation: str = "uniform",
    sequential: bool = False,
    refit: bool = False,
    roles: Iterable[str] | None = None,
    sequence_length: int | None = None,
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
    allocation: how the bytes are shared among the matrices; see `transect.allocations()`.
    sequential: calibrate each block on the compressed blocks before it. refit: refit the left factors afterwards.
    roles: only these matrices (q, k, v, o, gate, up, down). Default: all.
    sequence_length, sequences, batch_size: of the calibration data; sequences are spread evenly over it.
    fisher: gradients against the data's labels ("empirical") or labels drawn from the model ("sampled").
    accumulate: precision of the statistics' sums. cache: a file to keep the statistics in.
    settings: the method's parameters; those of the allocation with the prefix `allocation_`.

    Raises TransectError before any change if something cannot be done.
    """
    opened = _open(model, tokenizer)
    anatomy = Anatomy(opened.model)
    matrices = anatomy.matrices(roles)
    recipe = _recipe(method, keep, allocation, sequential, refit, settings).resolved(anatomy, matrices)
    batches = None
    if recipe.needs_data and data is not None:
        batches = _calibration(data, opened, sequence_length, sequences, batch_size, seed)
    compress_anatomy(
        anatomy, recipe, batches, matrices=matrices, fisher=fisher, accumulate=accumulate, seed=seed,
        cache=None if cache is None else Path(cache), progress=progress,
    )  # fmt: skip
    return opened.model


def compress_stream(
    model: str | Path,
    out: str | Path,
    method: str,
    keep: float,
    data: Any = None,
    *,
    tokenizer: Any = None,
    allocation: str = "uniform",
    sequential: bool = False,
    sequence_length: int | None = None,
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

    model: a folder (or a hub name, which is downloaded) of safetensors. out: the folder to write; unfinished work lies
    beside it, and the same call goes on from there. The rest as for `compress`; allocation: any that does not run
    the model (`ilp` does).

    Returns what was kept: matrix_bytes, dense_matrix_bytes and their ratio.
    """
    source = StreamedModel(folder_of(model), architecture=architecture, dtype=dtype, device=device)
    anatomy = source.anatomy
    recipe = _recipe(method, keep, allocation, sequential, False, settings).resolved(anatomy, anatomy.matrices())
    if tokenizer is None:
        tokenizer = tokenizer_of(source.model)
    opened = Opened(source.model, tokenizer, tokenizer, str(model), source.folder)
    batches = None
    if recipe.needs_data and data is not None:
        batches = _calibration(data, opened, sequence_length, sequences, batch_size, seed)
    return compress_streamed(
        source, recipe, batches, Path(out), tokenizer,
        overwrite=overwrite, fisher=fisher, accumulate=accumulate, seed=seed, progress=progress,
    )  # fmt: skip


def compare(
    model: Any,
    methods: Sequence[str],
    keep: Sequence[float],
    data: Any,
    eval_data: Any,
    out: str | Path,
    *,
    tokenizer: Any = None,
    allocations: Sequence[str] = ("uniform",),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    sequential: bool = False,
    refit: bool = False,
    roles: Iterable[str] | None = None,
    sequence_length: int | None = None,
    sequences: int = CALIBRATION_SEQUENCES,
    eval_sequences: int | None = None,
    batch_size: int = 8,
    fisher: Fisher = "empirical",
    accumulate: torch.dtype = torch.float64,
    seed: int = 0,
    workers: int = 1,
    engine: Engine = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> pd.DataFrame:
    """Compress one model by every method and allocation to every budget, and evaluate each; a row each, dense first.

    model, data, tokenizer and the calibration settings: as for `compress`. eval_data: held-out data, same forms;
    eval_sequences of it, evenly spaced (default all).
    out: the run folder. Rows are written as they finish; a run that was interrupted goes on where it stopped, and
    methods and budgets can be added to it. It ends with table.csv, table.md and pareto.png in it.
    settings: method or allocation -> its parameters.
    workers: processes (their measured speeds disturb one another). engine: `local` or `ray`.

    Returns the table: method, allocation, keep, kept (share of the matrices' bytes), bytes (of the whole model),
    parameters, loss (nats), perplexity, accuracy, tokens, prefill and decode tokens per second, peak_memory (bytes),
    compress_seconds (statistics, factorization and replacement, as if the row were computed alone).
    """
    opened = _open(model, tokenizer)
    anatomy = Anatomy(opened.model)
    for name in methods:
        registered(name)
    calibration = _calibration(data, opened, sequence_length, sequences, batch_size, seed)
    held_out = _held_out(eval_data, opened, sequence_length, eval_sequences, batch_size, seed)
    plan = Plan(
        model="" if opened.source == "" else str(opened.path or opened.source),
        dtype=str(opened.model.dtype).removeprefix("torch."), device=str(opened.model.device),
        architecture=asdict(anatomy.architecture),
        weights=model_fingerprint(opened.model), methods=tuple(methods), allocations=tuple(allocations),
        keeps=tuple(float(share) for share in keep),
        settings={name: dict(values) for name, values in (settings or {}).items()},
        calibration=calibration.fingerprint, evaluation=held_out.fingerprint,
        roles=None if roles is None else tuple(roles), fisher=fisher, accumulate=str(accumulate).split(".")[1],
        seed=seed, sequential=sequential, refit=refit,
    )  # fmt: skip
    folder = Path(out)
    frame = compare_anatomy(
        anatomy, plan, folder, calibration, held_out,
        workers=workers, engine=engine, overwrite=overwrite, progress=progress, on_row=on_row,
    )  # fmt: skip
    frame.to_csv(folder / "table.csv", index=False)
    (folder / "table.md").write_text(markdown_table(frame))
    pareto_plot(frame, folder / "pareto.png", title=f"{opened.source or type(opened.model).__name__}")
    return frame


def evaluate(
    model: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    sequences: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Loss, perplexity and accuracy of a model on held-out data, its speed, and its size; see `evaluation.evaluate`.

    model: a Hugging Face model or the name of one. data: see `transect.data.load`.
    """
    opened = _open(model, tokenizer)
    held_out = _held_out(data, opened, sequence_length, sequences, batch_size, seed)
    return evaluation_room.evaluate(opened.model, held_out)


def check_claims(
    names: Sequence[str] = (),
    model: Any = "organism",
    data: Any = None,
    eval_data: Any = None,
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    sequences: int = CALIBRATION_SEQUENCES,
    eval_sequences: int = 128,
    batch_size: int = 8,
    architecture: Any = None,
    dtype: torch.dtype | str = "float32",
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Check what papers claim of their methods on a model, which is as before afterwards.

    names: of claims, or of methods for all of their claims. Default: every claim.
    model, data, tokenizer and the calibration settings: as for `compress`. eval_data: held-out data, same forms. The
    bundled model has its own data as defaults.
    dtype: in which a model that is given by its name is opened; differences of thousandths drown in bfloat16.

    Returns an outcome each: the claim, its verdict, the reason and the numbers.
    """
    claims(names)  # an unknown name is an error before anything is loaded
    if isinstance(model, str) and model == "organism":
        data, eval_data = data or "organism:calibration", eval_data or "organism:heldout"
    elif data is None or eval_data is None:
        raise TransectError("a model of your own needs calibration data and held-out data (--data and --eval)")
    if isinstance(model, (str, Path)):
        model = open_model(model, dtype=dtype, device=device, architecture=architecture)
    opened = _open(model, tokenizer)
    calibration = _calibration(data, opened, sequence_length, sequences, batch_size, seed)
    held_out = _held_out(eval_data, opened, sequence_length, eval_sequences, batch_size, seed)
    return run_claims(opened.model, calibration, held_out, names, progress)


def recover(
    model: Any,
    data: Any,
    how: How = "lora",
    *,
    teacher: Any = None,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
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
    sequence_length: int | None = None,
    sequences: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
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
    if target is not None and checkpoint is None:
        checkpoint = target.parent / f".{target.name}.recovery"
    opened = _open(model, tokenizer)
    dense = None if teacher is None else _open(teacher, None)
    if dense is not None:
        check_same_tokens(opened.tokenizer, dense.tokenizer)
    batches = _calibration(data, opened, sequence_length, sequences, batch_size, seed)
    machine = Machine(device)
    state = State(None if checkpoint is None else Path(checkpoint), writes=machine.is_main)
    recover_anatomy(
        Anatomy(opened.model), settings, batches, None if dense is None else dense.model,
        machine=machine, state=state, progress=progress, on_check=on_check,
    )  # fmt: skip
    if target is not None and machine.is_main:
        save(opened.model, target, opened.tokenizer or opened.processor, overwrite=overwrite)
    machine.wait()
    state.remove()
    return opened.model


def _open(model: Any, tokenizer: Any) -> Opened:
    """The model, opened if only its name is given, with the tokenizer that was passed or lies beside it."""
    if isinstance(model, (str, Path)):
        model = open_model(model)
    if not isinstance(model, Opened):
        found = tokenizer_of(model)
        model = Opened(model, found, found, "", None)
    return model if tokenizer is None else replace(model, tokenizer=tokenizer, processor=tokenizer)


def _recipe(
    method: str, keep: float, allocation: str, sequential: bool, refit: bool, settings: Mapping[str, Any]
) -> Recipe:
    of_allocation = {k.removeprefix(_OF_ALLOCATION): v for k, v in settings.items() if k.startswith(_OF_ALLOCATION)}
    of_method = {key: value for key, value in settings.items() if not key.startswith(_OF_ALLOCATION)}
    return Recipe(method, float(keep), allocation, of_method, of_allocation, sequential, refit)


def _calibration(
    data: Any, opened: Opened, length: int | None, sequences: int | None, batch_size: int, seed: int
) -> Batches:
    return load(
        data, opened.model, opened.tokenizer, opened.processor,
        sequence_length=length, sequences=sequences, batch_size=batch_size, full_only=True, seed=seed,
    )  # fmt: skip


def _held_out(
    data: Any, opened: Opened, length: int | None, sequences: int | None, batch_size: int, seed: int
) -> Batches:
    return load(
        data, opened.model, opened.tokenizer, opened.processor,
        sequence_length=length, sequences=sequences, batch_size=batch_size, seed=seed,
    )  # fmt: skip
