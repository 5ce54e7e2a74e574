"""Sparse dictionaries of attention outputs: Transect's training against SAELens' own, on the same activations.

Both train a dictionary of the same size on the same batches of what the heads of one layer put out, for as many tokens,
with the same loss (squared error plus l1 times the sum of activations) and the same scaling of the activations.
SAELens trains its standard dictionary with `SAETrainer`: once with the trainer's defaults (Adam at 3e-4, β = 0.9 and
0.999, no resampling) and a warm-up of l1 over 5 % of the steps, and once the same at Transect's rate. Transect trains
with its defaults. All are judged alike, on held-out text: active features a token (L0), loss recovered, variance
explained, and features that were never active. The dictionaries are also exchanged as folders: each library reads what
the other has written, and must compute the same.

The same l1 does not give the same L0, so a second table holds SAELens' dictionaries against ours of as many active
features, between those at the nearest l1 on either side (linearly in the logarithm of L0).

Targets, at as many active features: no less than 0.01 below SAELens' loss recovered, no more than 0.01 above its dead
features; the largest difference of an output after an exchange at most 1e-4 of the largest output.

SAELens is no dependency. It goes into an environment of its own, beside Transect's:
`pip install -c constraints.txt torch && pip install -e . && pip install sae-lens==6.54.12`.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from common import parser, show, verdict
from torch import Tensor

from transect.anatomy import Anatomy
from transect.checkpoint import open_model
from transect.data import Batches, load
from transect.dictionaries import (
    Activations,
    Dictionary,
    Settings,
    hook_name,
    read_dictionary,
    recovered,
    spliced_losses,
    train_dictionary,
    write_dictionary,
)
from transect.probes.catalog.attention_sae.contexts import contexts_of

WARM_UP = 0.05  # of SAELens' l1
OURS = "transect"


def by_saelens(vectors: Activations, settings: Settings, layer: int, rate: float) -> Any:
    """A dictionary that SAELens has trained on the batches."""
    from sae_lens import (  # pyright: ignore[reportMissingImports]
        LoggingConfig,
        SAETrainer,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]

    width = vectors[0].shape[1]
    torch.manual_seed(settings.seed)
    made = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=width, d_sae=settings.expansion * width, l1_coefficient=settings.l1,
            l1_warm_up_steps=int(WARM_UP * settings.steps), normalize_activations="expected_average_only_in",
        )
    )  # fmt: skip
    made.cfg.metadata.hook_name = hook_name("heads", layer)
    provided = (vectors[number % len(vectors)] for number in itertools.count())
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=settings.steps * settings.batch, train_batch_size_samples=settings.batch, lr=rate,
            lr_end=rate / 10, n_batches_for_norm_estimate=10, logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=made, data_provider=provided,
    )  # fmt: skip
    with redirect_stderr(StringIO()):
        return trainer.fit()


def exchanged(made: Any, folder: Path) -> Dictionary:
    """What Transect reads of a dictionary that SAELens has written."""
    made.save_inference_model(folder)
    return read_dictionary(folder)[0]


def read_by_saelens(folder: Path) -> Any:
    """What SAELens reads of one that Transect has written."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    found = SAE.load_from_disk(folder, device="cpu")
    found.turn_off_forward_pass_hook_z_reshaping()
    return found


def difference(ours: Dictionary, theirs: Any, x: Tensor) -> float:
    """Largest of the outputs, over the largest output."""
    with torch.no_grad():
        return float((ours(x) - theirs.decode(theirs.encode(x))).abs().max() / ours(x).abs().max())


def judged(anatomy: Anatomy, layer: int, dictionary: Dictionary, text: Batches) -> list[float]:
    """L0, loss recovered, variance explained and dead share on held-out text."""
    contexts = contexts_of(anatomy, layer, dictionary, text, False)
    ways = {"clean": lambda x: x, "zero": torch.zeros_like, "made": dictionary}
    losses = spliced_losses(anatomy, text, "heads", layer, ways, False)
    share = recovered(losses["clean"], losses["made"], losses["zero"])
    dead = float((contexts.fired == 0).double().mean())
    return [contexts.active / contexts.tokens, share, contexts.explained, dead]


def at_equal_l0(figures: Sequence[list[float]], l0: float) -> list[float] | None:
    """Our figures (rows of L0, ...) where L0 is this one; None where we have no dictionary on one side of it."""
    for low, high in itertools.pairwise(sorted(figures)):
        if low[0] <= l0 <= high[0] and low[0] < high[0]:
            part = math.log(l0 / low[0]) / math.log(high[0] / low[0])
            return [a + part * (b - a) for a, b in zip(low, high, strict=True)]
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Train both ways, judge both on held-out text, and print the table."""
    made = parser(__doc__)
    made.add_argument("--model", default="organism")
    made.add_argument("--data", default="organism:calibration")
    made.add_argument("--eval", default="organism:heldout")
    made.add_argument("--layer", type=int, default=2)
    made.add_argument("--sequences", type=int, help="of the text to train on; default 512")
    made.add_argument("--eval-sequences", type=int, help="default 32")
    made.add_argument("--tokens", type=int, help="default 400,000")
    made.add_argument("--l1", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    chosen = made.parse_args(argv)
    quick = chosen.quick
    opened = open_model(chosen.model)
    anatomy = Anatomy(opened.model)
    training, text = (
        load(name, opened.model, opened.tokenizer, sequences=count, batch_size=8)
        for name, count in (
            (chosen.data, chosen.sequences or (16 if quick else 512)),
            (chosen.eval, chosen.eval_sequences or (4 if quick else 32)),
        )
    )
    settings = Settings(tokens=chosen.tokens or (4096 if quick else 400_000))
    vectors = Activations(
        anatomy, training, "heads", chosen.layer, count=settings.steps, batch=settings.batch, buffer=settings.buffer
    )
    x = vectors[0]
    rows, exchanges, own, others = [], [], [], []
    for weight in chosen.l1:
        one, found = replace(settings, l1=weight), {}
        with tempfile.TemporaryDirectory() as place:
            started = time.process_time()
            ours, _ = train_dictionary(vectors, one)
            found[OURS] = (ours, time.process_time() - started)
            write_dictionary(Path(place, "ours"), ours, "heads", chosen.layer, {})
            exchanges.append(difference(ours, read_by_saelens(Path(place, "ours")), x))
            for rate in (3e-4, one.lr):
                started = time.process_time()
                theirs = by_saelens(vectors, one, chosen.layer, rate)
                seconds = time.process_time() - started
                read = exchanged(theirs, Path(place, f"theirs-{rate:g}"))
                exchanges.append(difference(read, theirs, x))
                found[f"sae-lens, lr {rate:g}"] = (read, seconds)
        figures = {name: judged(anatomy, chosen.layer, dictionary, text) for name, (dictionary, _) in found.items()}
        own.append(figures[OURS])
        for name, (_, seconds) in found.items():
            rows.append([f"{weight:g}", name, *(f"{value:.4f}" for value in figures[name]), f"{seconds:.1f}"])
            if name != OURS:
                others.append((f"{weight:g}", name, figures[name]))
    show(
        f"Dictionaries of {ours.features} features of layer {chosen.layer} of {chosen.model} ({ours.width} numbers), "
        f"{settings.steps * settings.batch:,} tokens of {vectors.tokens:,}",
        ["l1", "by", "L0", "recovered", "explained", "dead", "CPU seconds"],
        rows,
        [
            f"Largest difference of an output after an exchange of folders: {max(exchanges):.1e} "
            f"(<= 1e-4: {verdict(max(exchanges) <= 1e-4)})."
        ],
    )
    pairs = []
    for l1, name, theirs in others:
        between = at_equal_l0(own, theirs[0])
        if between is not None:
            each = [f"{value:.4f}" for pair in zip(theirs[1:], between[1:], strict=True) for value in pair]
            met = between[1] >= theirs[1] - 0.01 and between[3] <= theirs[3] + 0.01
            pairs.append([l1, name, f"{theirs[0]:.4f}", *each, verdict(met)])
    heading = ["recovered", "ours", "explained", "ours", "dead", "ours", "target"]
    show("At as many active features a token", ["l1", "by", "L0", *heading], pairs)


if __name__ == "__main__":
    main()
