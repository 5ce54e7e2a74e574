"""Claims of m2mKD (Lo et al. 2024, arXiv:2402.16918)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...anatomy import Anatomy
from ...conversion import Calibration, Stage, conversion_named
from ...conversion.repair import repair
from ...data import Batches
from ...data.split import split
from ...forward import at_rest
from ...training import Machine, Run, Schedule, State
from ..context import Context, Measured
from ..on_text import measured_on_text, text_length
from ..parts_from_scratch import BATCH, LENGTH
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import batches_of, cut, fresh_rows

STEPS, SEEDS = 60, (0, 1)  # of each stage, so that a module is trained as long as the student end to end (paper)
RATE, HELD_OUT = 1e-3, 0.01
SETTINGS: dict[str, Any] = {"modules": 4, "width": 64}
OURS, NONE, WHOLE, RANDOM = "module by module", "without the teacher", "as a whole", "random"
CLASSES, KEPT = "divided by classes", "stitches kept"
WAYS: dict[str, dict[str, Any]] = {OURS: {}, CLASSES: {"divide": "classes"}, NONE: {"alpha": 0.0}}
SAID = ((OURS, NONE), (NONE, RANDOM), (OURS, WHOLE))  # the lower loss first


@claim(
    "m2mkd/better-start",
    method="m2mkd",
    paper="arXiv:2402.16918",
    statement="After as many steps end to end, a mixture of experts whose modules were distilled one by one has a "
    "lower loss than one whose modules learned without the teacher, which has a lower one than one from random "
    "numbers; and it has a lower one than one that was distilled as a whole.",
)
def better_start(context: Context) -> Result:
    """Scaled down: text in place of images, four modules of one block, 4 experts. What the modules' turns and the host
    cost is not made up for, as in the paper: only the steps end to end are equal, and the student that is distilled as
    a whole has as many steps before them. The divergence is summed over classes; divided by their number, as in the
    released code, it hardly weighs. That, and stitches that are kept between the modules, stand beside."""
    context.specimen.require_causal()
    blocks = len(context.anatomy.blocks)
    if blocks < 2:
        raise NotApplicable("the model has one block and cannot be cut into modules")
    modules = min(SETTINGS["modules"], blocks)
    rows, source = fresh_rows(context, (modules + 2) * STEPS * BATCH * LENGTH)
    data = batches_of(cut(rows, text_length(context), (modules + 2) * STEPS * BATCH), BATCH)
    numbers, held, told = [], {pair: 0 for pair in SAID}, []
    for seed in SEEDS:
        bench = _Bench(context, *split(data, HELD_OUT, BATCH, seed), modules, seed)
        found = {way: (assembled, ended) for way, assembled, ended in bench.ways()}
        for way, (assembled, ended) in found.items():
            difference, error = found[OURS][1].minus(ended)
            numbers.append({"seed": seed, "begun": way, "assembled": assembled.loss, "loss": ended.loss,
                            "difference": difference, "standard_error": error})  # fmt: skip
        for better, worse in SAID:
            difference, error = found[better][1].minus(found[worse][1])
            held[better, worse] += difference < -2 * error
        told.append(", ".join(f"{way} {ended.loss:.3f}" for way, (_, ended) in found.items()))
    complaints = [
        f"{better} is below {worse} from {count} of {len(SEEDS)}"
        for (better, worse), count in held.items() if count < len(SEEDS)
    ]  # fmt: skip
    return Result(
        Verdict.of(not complaints),
        f"Held-out loss after {STEPS} steps end to end, by seed: {'; '.join(told)}. The teacher's is "
        f"{measured_on_text(context, context.model).loss:.3f}. Trained on {source}."
        + (f" By more than two standard errors {', '.join(complaints)} seeds." if complaints else ""),
        numbers,
    )


@dataclass
class _Bench:
    """Students of one seed, which begin with the same numbers, and with the same trained host."""

    context: Context
    training: Batches
    held_out: Batches
    modules: int
    seed: int

    def __post_init__(self) -> None:
        self.conversion = conversion_named("m2mkd")
        self.teacher: Any = copy.deepcopy(self.context.model).float().requires_grad_(False)

    def ways(self) -> Iterator[tuple[str, Measured, Measured]]:
        """How each is begun, and its loss before and after the steps end to end."""
        student, stages = self._student({}), self._stages({})
        self._train(student, stages[0], STEPS)
        for way, settings in WAYS.items():
            made = copy.deepcopy(student)
            for turn in self._stages(settings)[1:-1]:
                self._train(made, turn, STEPS)
            kept = copy.deepcopy(made) if way == OURS else None
            yield way, *self._ended(made, stages[-1])
            if kept is not None:
                keep_stitches(kept)
                yield (
                    KEPT,
                    *self._ended(kept, replace(stages[-1], new=r"^(model|lm_head|host\.(pre|post))\.", begin=None)),
                )
        whole = {"modules": 1, "depth": self.modules}
        made, stages = self._student(whole), self._stages(whole)
        self._train(made, stages[1], self.modules * STEPS)
        yield WHOLE, *self._ended(made, stages[-1])
        yield RANDOM, *self._ended(self._student({}, hosted=False), replace(stages[-1], begin=None))

    def _values(self, settings: dict[str, Any]) -> dict[str, Any]:
        return self.conversion.settings({**SETTINGS, "modules": self.modules, "divide": "rows", **settings})

    def _stages(self, settings: dict[str, Any]) -> list[Stage]:
        return list(self.conversion.training(self._values(settings)))

    def _student(self, settings: dict[str, Any], hosted: bool = True) -> Any:
        calibration = Calibration(self.training if hosted else None, self.seed)
        return self.conversion.function(Anatomy(self.teacher), calibration, **self._values(settings))

    def _ended(self, model: Any, end: Stage) -> tuple[Measured, Measured]:
        before = measured_on_text(self.context, model)
        self._train(model, end, STEPS)
        return before, measured_on_text(self.context, model)

    def _train(self, model: Any, stage: Stage, steps: int) -> None:
        """Of every stage the best state is kept, and it has so many steps."""
        schedule = Schedule(lr=RATE, steps=steps, epochs=steps, every=max(1, steps // 4), seed=self.seed)
        run = Run(schedule, Machine(self.context.model.device), State(None), self.context.progress)
        with at_rest(model, self.teacher, frozen=True):
            repair(Anatomy(model), self.teacher, [replace(stage, share=1.0)], run, self.training, self.held_out)


def keep_stitches(model: Any) -> None:
    """Let the host's maps stand between the student's modules, back to the teacher's width and again to its own."""
    blocks, host = Anatomy(model).block_list, model.host
    depth = len(blocks) // len(host.meta)
    for module in range(1, len(host.meta)):
        stitches = host.post[module - 1], host.pre[module]
        blocks[module * depth].register_forward_pre_hook(
            lambda _, given, stitches=stitches: (stitches[1](stitches[0](given[0])), *given[1:])
        )
