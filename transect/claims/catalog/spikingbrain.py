"""Claims of SpikingBrain (Pan et al., 2025, arXiv:2509.05276), scaled down to a short training after the conversion."""

from __future__ import annotations

import itertools

import torch

from ...conversion import Calibration, conversion_named
from ...operators.spiking import Spiking
from ...parts.catalog.spikingbrain import Counted, counting
from ..context import Context, Measured
from ..converted import Converted, converted
from ..registry import NotApplicable, Result, Verdict, claim

PAPER = "arXiv:2509.05276"
STEPS, RATE = 30, 1e-3
THRESHOLDS = (2.0, 2.5, 3.0, 3.5, 4.0)
WAYS = {"windows": 1, "hybrid": 2, "linear": 0}
_CLEAR = 2  # standard errors


def _way(context: Context, name: str) -> Converted:
    """One of the ways, trained for STEPS; done once."""
    found = context.shared.setdefault("spikingbrain", {})
    if name not in found:
        longest = max(len(text) for text in context.calibration.texts())
        settings = {"windows": WAYS[name], "window": max(2, longest // 8)}
        found[name] = converted(context, "spikingbrain", settings, STEPS, lr=RATE)
    return found[name]


def _spiking(context: Context, k: float) -> tuple[Measured, Counted]:
    """The loss with spikes alone, and how many of them there are in the held-out text."""
    context.require_language_model()
    anatomy = context.fresh().anatomy
    spikes = conversion_named("spikingbrain-spikes")
    spikes.function(anatomy, Calibration(), **spikes.settings({"k": k}))
    found = [module for module in anatomy.model.modules() if isinstance(module, Spiking)]
    if not found:
        raise NotApplicable("the model has no matrix whose input could be coded")
    with torch.no_grad(), counting(found) as counted:
        anatomy.model(input_ids=next(iter(context.evaluation.texts()))[None].to(anatomy.model.device))
    return context.evaluate(anatomy.model, 1.0), counted


@claim(
    "spikingbrain/windows-keep-more",
    method="spikingbrain",
    paper=PAPER,
    statement="Trained as long after the conversion, windows alone and every second layer a window lose less than "
    "linear attention in every layer.",
)
def windows_keep_more(context: Context) -> Result:
    """Windows of an eighth of the sequences; 30 steps at 1e-3 (the report: 5 billion tokens at 3e-5)."""
    rows, linear = [], _way(context, "linear").after
    for name in WAYS:
        found = _way(context, name)
        less, error = linear.minus(found.after)
        rows.append({"way": name, "converted": found.before.loss, "trained": found.after.loss,
                     "less than linear": less, "standard_error": error})  # fmt: skip
    held = [row["less than linear"] > _CLEAR * row["standard_error"] for row in rows[:2]]
    told = ", ".join(f"{row['way']} {row['trained']:.3f} (untrained {row['converted']:.3f})" for row in rows)
    told += f"; as it was {context.dense.loss:.3f}"
    return Result(Verdict.of(all(held)), told, rows)


@claim(
    "spikingbrain/spikes-cost-less",
    method="spikingbrain",
    paper=PAPER,
    statement="Spikes and 8-bit weights alone cost far less than every second layer as linear attention.",
)
def spikes_cost_less(context: Context) -> Result:
    """Far less is less than half of the loss that the trained hybrid has added."""
    dense, hybrid = context.dense, _way(context, "hybrid").after
    spiking, _ = _spiking(context, 3.0)
    row = {"dense": dense.loss, "spikes": spiking.loss, "hybrid": hybrid.loss}
    added = {name: row[name] - dense.loss for name in ("spikes", "hybrid")}
    held = added["spikes"] < 0.5 * added["hybrid"]
    told = f"Spikes add {added['spikes']:.4f} to {dense.loss:.3f}, the hybrid after {STEPS} steps {added['hybrid']:.4f}"
    return Result(Verdict.of(held), told, [row])


@claim(
    "spikingbrain/finer-spikes",
    method="spikingbrain",
    paper=PAPER,
    statement="With lower thresholds spikes lose less and are less sparse, each time.",
)
def finer_spikes(context: Context) -> Result:
    """k from 2 to 4, as in the report's sweep; sparsity in three planes of the counts up to 7 (ours)."""
    rows = []
    for k in THRESHOLDS:
        measured, counted = _spiking(context, k)
        rows.append({"k": k, "loss": measured.loss, **counted.told()})
    pairs = list(itertools.pairwise(rows))
    sparse = "sparsity of three planes"
    held = all(fine["loss"] < coarse["loss"] and fine[sparse] < coarse[sparse] for coarse, fine in pairs)
    told = ", ".join(f"k {row['k']:g}: loss {row['loss']:.4f}, sparsity {row[sparse]:.3f}" for row in rows)
    return Result(Verdict.of(held), f"{told}; as it was {context.dense.loss:.4f}", rows)
