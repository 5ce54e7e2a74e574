"""`transect.race`: trainings side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from ..adaptation import Settings, way_named
from ..anatomy import Anatomy
from ..arguments import Range, checked
from ..checkpoint import open_model
from ..compression.fingerprint import computation_fingerprint, model_fingerprint
from ..contest import KIND, Plan, Trial, race_model
from ..data import SpecialTokens
from ..errors import TransectError
from ..parameters import Seed, listed
from ..pool import Engine
from ..report.contest import contest_markdown, contest_plot
from ..store import Folder, alone, write_text
from .arguments import Count, Device, FolderName, Length, Role, Share, Some, WeightType
from .common import Settings as Given
from .common import calibration_of, held_out_of, one_of, opened_of

Factor = Annotated[float, Range(0, above=True)]


@checked
def race(
    model: Any,
    adapters: Annotated[Sequence[str], Some],
    data: Any,
    eval_data: Any,
    out: FolderName,
    *,
    forgets: Any = None,
    shares: Annotated[Sequence[Share], Some] = (0.005,),
    rates: Annotated[Sequence[Factor], Some] = (0.3, 1.0, 3.0),
    seeds: Count = 3,
    tokenizer: Any = None,
    settings: Given | None = None,
    roles: Annotated[Sequence[Role], Some] | None = None,
    optimizer: str = "adamw",
    penalties: Sequence[str] = (),
    layer_rates: str | None = None,
    epochs: Count = 1,
    steps: Count | None = None,
    batch_size: Count = 8,
    accumulate: Count = 1,
    held_out: float = 0.1,
    every: Count | None = None,
    sequence_length: Length | None = None,
    special_tokens: SpecialTokens = "auto",
    sequences: Count | None = None,
    eval_sequences: Count | None = None,
    seed: Seed = 0,
    workers: Count = 1,
    engine: Engine = "local",
    revision: str | None = None,
    architecture: Any = None,
    dtype: WeightType | None = None,
    device: Device | None = None,
    overwrite: bool = False,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Any:
    """Fine-tune one model by every adapter, on the same data in the same order; a row each, the base model first.

    data: training text; the last `held_out` share of it is not trained on, but chooses each training's state, and each
        adapter's learning rate of `rates` times its own, with the first seed. The other seeds run at that rate.
    eval_data: held-out text of the same kind, by which the table judges. forgets: text of another kind that must not be
        forgotten. eval_sequences of each, evenly spaced (default all).
    shares: trained numbers, as shares of those in the adapted matrices; each adapter gets the largest size below.
    out: the run folder. Trials are written as they finish; a contest that was interrupted goes on where it stopped, and
        adapters, shares, rates and seeds can be added to it. It ends with table.csv, table.md and contest.png in it.
    settings: adapter, optimizer, penalty or rates by layer -> its parameters. roles ... every: see `transect.adapt`;
        the penalties are added to the loss of every training.
    workers: processes (their measured seconds disturb one another). engine: `local` or `ray`.
    revision, architecture, dtype, device: of a model that is given by its name.

    Returns the table: method, share, size, trained (numbers), rate, eval and forgets (mean loss over seeds, nats), and
    for both `_change` from the base model, `_error` (standard error of that over sequences) and `_seed_error` (standard
    error over seeds); optimizer_bytes, seconds_a_step, steps, tokens, seeds. A method that cannot train so few numbers,
    or whose rates all diverge, has a note instead; trials whose process was lost twice are in `attrs["lost"]`.
    """
    names, shares, rates = listed(adapters), listed(shares), listed(rates)
    added, by_layer = listed(penalties), [] if layer_rates is None else [layer_rates]
    chosen = one_of(settings, {name: {} for name in (*names, optimizer, *added, *by_layer)})
    for name in names:
        given = way_named(name).settings(chosen[name])
        if way_named(name).size in chosen[name]:
            size = way_named(name).size
            raise TransectError(f"{name}: {size}={given[size]} is set by shares in a contest; leave it out")
    shared = Settings(
        method=names[0], roles=None if roles is None else tuple(listed(roles)), optimizer=optimizer,
        optimizer_options=chosen[optimizer], penalties={name: chosen[name] for name in added}, layer_rates=layer_rates,
        layer_rates_options={} if layer_rates is None else chosen[layer_rates], epochs=epochs, steps=steps,
        batch_size=batch_size, accumulate=accumulate, held_out=held_out, every=every, seed=seed,
    ).resolved()  # fmt: skip
    folder = Folder(Path(out).expanduser(), KIND)
    folder.check_place()
    with alone(folder.path):
        loading = {"revision": revision, "architecture": architecture, "dtype": dtype, "device": device}
        opened = opened_of(
            open_model(str(model), **loading) if isinstance(model, (str, Path)) else model, tokenizer
        )  # fmt: skip
        training = calibration_of(data, opened, sequence_length, sequences, batch_size, seed, special_tokens)
        texts = {
            name: held_out_of(text, opened, sequence_length, eval_sequences, batch_size, seed, special_tokens)
            for name, text in {"eval": eval_data, "forgets": forgets}.items()
            if text is not None
        }
        if (workers > 1 or engine == "ray") and not opened.source:
            raise TransectError(
                "other processes cannot load a model that is only in memory: name its folder, or workers=1"
            )
        plan = Plan(
            model=str(opened.path or opened.source), dtype=str(opened.model.dtype).removeprefix("torch."),
            device=str(opened.model.device), architecture=asdict(Anatomy(opened.model).architecture),
            weights=model_fingerprint(opened.model), computation=computation_fingerprint(opened.model),
            adapters={name: dict(chosen[name]) for name in names}, shares=tuple(float(share) for share in shares),
            rates=tuple(float(rate) for rate in rates), seeds=seeds, shared=shared, training=training.fingerprint,
            texts={name: batches.fingerprint for name, batches in texts.items()},
        )  # fmt: skip
        folder.check("table.csv", "table.md", "contest.png")
        frame = race_model(
            opened.model, plan, folder, training, texts, workers=workers, engine=engine, overwrite=overwrite,
            on_trial=on_trial,
        )  # fmt: skip
        write_text(folder.file("table.csv"), frame.to_csv(index=False))
        write_text(folder.file("table.md"), contest_markdown(frame))
        contest_plot(frame, folder.file("contest.png"), opened.source or type(opened.model).__name__)
        return frame
