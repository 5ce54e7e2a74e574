"""Claims of Liger (Lan et al., ICML 2025, arXiv:2503.01496)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...anatomy import Anatomy
from ...conversion import conversion_named
from ...parts.catalog.liger import Liger
from ...parts.precision import wide
from ..context import Context, Measured
from ..converted import Converted, converted
from ..registry import Result, Verdict, claim

PAPER = "arXiv:2503.01496"
STEPS = 40
_CLEAR = 2  # standard errors


def _without_gate(liger: Liger) -> None:
    """Nothing is forgotten."""
    liger.decay_of = lambda x, k: k.new_zeros(*k.shape[:-1], liger.gates)  # type: ignore[method-assign]


def _with_separate_gate(liger: Liger) -> None:
    """The gate is a matrix of its own, which begins with random numbers."""
    liger.g_proj = nn.Linear(liger.q_proj.in_features, liger.key_value_heads * liger.gates, bias=False).to(
        next(liger.parameters())
    )

    def decay_of(x: Tensor, k: Tensor) -> Tensor:
        gate = liger.g_proj(x).unflatten(-1, (-1, liger.gates)).transpose(1, 2)  # type: ignore[operator]
        return functional.logsigmoid(wide(gate)) / 16

    liger.decay_of = decay_of  # type: ignore[method-assign]


def _in_all(change: Callable[[Liger], None]) -> Callable[[Anatomy], None]:
    def changed(anatomy: Anatomy) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for block in anatomy.blocks:
                change(block.part("attention"))

    return changed


def _way(context: Context, name: str) -> Converted:
    """The model converted one way, tuned for STEPS; done once."""
    found = context.shared.setdefault("liger", {})
    if name not in found:
        longest = max(len(text) for text in context.calibration.texts())
        settings: dict[str, Any] = {"window": max(2, longest // 16)}
        (stage,) = conversion_named("liger").training(settings)
        if name == "no window":
            settings |= {"alpha": 1.0, "beta": 0.0}
        if name == "all of q, k, v":
            stage = replace(stage, train="new", new=r"\b[qkv]_proj\b")
        if name == "separate gate":
            stage = replace(stage, also=r"\bg_proj\b")
        changes = {"no gate": _in_all(_without_gate), "separate gate": _in_all(_with_separate_gate)}
        change = changes.get(name, lambda anatomy: None)
        found[name] = converted(context, "liger", settings, STEPS, change=change, stages=[stage])
    return found[name]


def _row(name: str, found: Converted, whole: Measured) -> dict[str, Any]:
    more, error = found.after.minus(whole)
    return {"way": name, "untuned": found.before.loss, "tuned": found.after.loss, "more than whole": more,
            "standard_error": error}  # fmt: skip


def _told(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['way']} {row['tuned']:.3f} (untuned {row['untuned']:.3f})" for row in rows)


@claim(
    "liger/window-and-gate",
    method="liger",
    paper=PAPER,
    statement="Tuned as long, the memory gated by the keys with a window beats the memory alone, and one whose gate "
    "is a new matrix.",
)
def window_and_gate(context: Context) -> Result:
    """A window of a sixteenth of the sequences, rank 8 for q, k and v, 40 steps; the new gate is trained as a whole.
    Nothing forgotten is reported too, and not judged: it should be close, and not better (Table 5)."""
    ways = ("whole", "no window", "separate gate", "no gate")
    whole = _way(context, "whole").after
    rows = [_row(name, _way(context, name), whole) for name in ways]
    held = [row["more than whole"] > _CLEAR * row["standard_error"] for row in rows[1:3]]
    return Result(Verdict.of(all(held)), f"{_told(rows)}, {STEPS} steps each", rows)


@claim(
    "liger/recovers",
    method="liger",
    paper=PAPER,
    statement="Converted and not yet tuned the model is worse than it was, and a short tuning of q, k and v closes "
    "most of the gap.",
)
def recovers(context: Context) -> Result:
    """Most is more than half of the difference between the losses of the model as it was and converted."""
    dense, found = context.dense, _way(context, "whole")
    lost, error = found.before.minus(dense)
    closed = (found.before.loss - found.after.loss) / lost if lost > 0 else 0.0
    row = {"dense": dense.loss, "converted": found.before.loss, "tuned": found.after.loss, "lost": lost,
           "standard_error": error, "closed": closed}  # fmt: skip
    told = f"From {dense.loss:.3f} to {found.before.loss:.3f} converted and {found.after.loss:.3f} tuned: {closed:.0%} "
    told += f"of the gap closed in {STEPS} steps"
    return Result(Verdict.of(lost > _CLEAR * error and closed > 0.5), told, [row])


@claim(
    "liger/window-most",
    method="liger",
    paper=PAPER,
    statement="Of the window, the gate, the gate out of the keys, and low-rank updates, the window is what is missed "
    "most.",
)
def window_most(context: Context) -> Result:
    """The ablations of the paper's Table 5 without its learned feature map; without low-rank updates q, k and v are
    trained as a whole, at the same rate."""
    whole = _way(context, "whole").after
    ways = ("no window", "separate gate", "no gate", "all of q, k, v")
    rows = sorted((_row(name, _way(context, name), whole) for name in ways), key=lambda row: -row["tuned"])
    first = rows[0]["way"] == "no window"
    clear = rows[0]["more than whole"] > _CLEAR * rows[0]["standard_error"]
    told = f"Worst first: {_told(rows)}; whole {whole.loss:.3f}"
    return Result(Verdict.of(first and clear), told, rows)
