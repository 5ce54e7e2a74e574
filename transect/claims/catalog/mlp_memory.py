"""Claims of MLP Memory (Wei et al., ICLR 2026, arXiv:2508.01832)."""

from __future__ import annotations

import copy
from dataclasses import replace

from ...anatomy import Anatomy
from ...memory import Settings, memorize_anatomy
from ..context import Context
from ..on_text import in_pieces, measured_on_text
from ..parts_from_scratch import trained_from_scratch
from ..registry import NotApplicable, Result, Verdict, claim

STEPS = 200  # of the model that gets a memory
SETTINGS = Settings(blocks=2, neighbours=64, epochs=5, batch=256)


@claim(
    "mlp-memory/below-base",
    method="mlp-memory",
    paper="arXiv:2508.01832",
    statement="A memory mixed into a model's predictions lowers its held-out loss, and one that also imitates the "
    "nearest neighbours does so more than one that only predicts the next token.",
)
def below_base(context: Context) -> Result:
    """A Llama of width 64 and two blocks, trained for 200 steps; memories of two blocks on the calibration text."""
    base = trained_from_scratch(context, STEPS, 0)
    if context.calibration is None or context.calibration.tokens <= 2 * SETTINGS.neighbours:
        raise NotApplicable(f"the calibration text is too short for {SETTINGS.neighbours} neighbours")
    text = in_pieces(context, context.calibration)
    losses, numbers = {"base": measured_on_text(context, base)}, []
    for name, imitation in (("imitating", 0.5), ("next token", 0.0)):
        model = copy.deepcopy(base)
        outcome = memorize_anatomy(Anatomy(model), replace(SETTINGS, imitation=imitation), text)
        losses[name] = measured_on_text(context, model)
        numbers.append({"memory": name, "loss": losses[name].loss, "base": losses["base"].loss,
                        "share": outcome["share"], "positions": outcome["positions"]})  # fmt: skip
    gain, error = losses["imitating"].minus(losses["base"])
    better, its = losses["imitating"].minus(losses["next token"])
    return Result(
        Verdict.of(gain < 0 and better < 0),
        f"The memory changes the loss by {gain:+.4f} ± {error:.4f}, and imitation by {better:+.4f} ± {its:.4f}",
        numbers,
    )
