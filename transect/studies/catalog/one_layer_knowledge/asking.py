"""Fine-tuning models side by side on questions about some subjects, and asking them about the others."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ....statistics import Progress
from .facts import Facts, Rows, side_by_side
from .layer import OneLayer, attach, merge
from .learning import Steps, fit
from .measures import answered, first_step, inside, kinds_of

POINTS = 10  # times that the questions are asked while the fine-tuning goes on
PARTS = {"whole": {}, "without MLP": {"mlp": False}, "uniform attention": {"uniform": True}}  # see `OneLayer.forward`


class Asking:
    """Models of several multiplicities and seeds, multiplicity-major, and what is asked of them.

    facts: one a seed. multiplicities: in how many templates each model was told its facts. All measures are (K, S).
    """

    def __init__(self, facts: Sequence[Facts], multiplicities: Sequence[int]) -> None:
        self.facts, self.multiplicities = facts, multiplicities
        self.shape = (len(multiplicities), len(facts))

    @property
    def seeds(self) -> list[int]:
        """Of every model."""
        return [one.seed for _ in self.multiplicities for one in self.facts]

    def own_templates(self, model: OneLayer, subjects: Sequence[Tensor | None], **off: bool) -> Tensor:
        """The share of each fact's own templates behind which it is told right (K, S, facts). subjects: one a seed."""
        most, counts = max(self.multiplicities), torch.tensor(self.multiplicities)
        asked = [one.statements(most, chosen) for one, chosen in zip(self.facts, subjects, strict=True)]
        rows = side_by_side(asked, len(counts))
        right = (answered(model, rows, **off) == rows.answers).float().view(len(counts), len(self.facts), -1, most)
        told = torch.arange(most) < counts[:, None]
        return (right * told[:, None, None]).sum(-1) / counts[:, None, None]

    def before(self, model: OneLayer, tuned: int) -> dict[str, Tensor]:
        """At the pretrained weights: `kinds` of answers to held-out questions (4, K, S), and of the first step's
        gradient `share` and `input` (matrices, K, S): see `Directions`, and `inside` the questions' h_p."""
        learned, asked = self._questions(tuned)
        found = first_step(model, learned)
        one = self.facts[0]
        span = model.questions(one.first_question, one.attributes).detach().cpu()
        measured = {
            "kinds": kinds_of(one, answered(model, asked), asked.answers), "share": found.share,
            "input": inside(found.inputs, span),
        }  # fmt: skip
        return {name: self._grid(values) for name, values in measured.items()}

    def after(
        self, pretrained: OneLayer, tuned: int, rank: int, steps: Steps, progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """Fine-tune a copy on the questions about the first `tuned` subjects, and ask about the others.

        rank: 0 for all parameters. `kinds` (4, K, S) and `parts` (PARTS, K, S): of the answers to held-out questions,
        and the share of right ones without a part. `learned`: right among the fine-tuned questions. `kept`: the
        held-out facts' own templates behind which they are still told right, and `unreachable`: the same where the
        question gets a wrong answer. `course` (POINTS + 1, K, S): right held-out questions as the steps go. `change`
        (matrices, K, S), for all parameters: how much of the first gradient's input direction lies in the span of how
        the questions' h_p moved.
        """
        model = copy.deepcopy(pretrained)
        learned, asked = self._questions(tuned)
        first = first_step(model, learned).inputs if rank == 0 else None
        course = {0: self._reached(model, asked)}
        looks = [round(steps.count * point / POINTS) for point in range(POINTS + 1)]

        def look(step: int) -> None:
            if step in looks:
                course[step] = self._reached(model, asked)

        parameters = attach(model, rank, self.seeds) if rank else None
        name = f"{tuned} subjects, {f'rank {rank}' if rank else 'all parameters'}"
        fit(model, learned, steps, name, parameters, look, progress)
        if rank:
            merge(model)
        said = answered(model, asked)
        wrong = (said != asked.answers).unflatten(0, self.shape)
        own = self.own_templates(model, [one.split(tuned)[1] for one in self.facts])
        parts = [self._reached(model, asked, **off) for off in PARTS.values()]
        found = {
            "kinds": self._grid(kinds_of(self.facts[0], said, asked.answers)), "parts": torch.stack(parts),
            "learned": self._reached(model, learned), "kept": own.mean(-1),
            "unreachable": (own * wrong).mean(-1), "course": torch.stack([course[step] for step in looks]),
        }  # fmt: skip
        if first is not None:
            one = self.facts[0]
            h = [each.questions(one.first_question, one.attributes).detach().cpu() for each in (pretrained, model)]
            found["change"] = self._grid(inside(first, h[1] - h[0]))
        return found

    def _questions(self, tuned: int) -> tuple[Rows, Rows]:
        """Of the subjects that are fine-tuned, and of the others."""
        times = len(self.multiplicities)
        learned, asked = zip(*((one.questions(part) for part in one.split(tuned)) for one in self.facts), strict=True)
        return side_by_side(learned, times), side_by_side(asked, times)

    def _reached(self, model: OneLayer, rows: Rows, **off: bool) -> Tensor:
        return self._grid((answered(model, rows, **off) == rows.answers).float().mean(1))

    def _grid(self, values: Tensor) -> Tensor:
        """(..., G) as (..., K, S)."""
        return values.unflatten(-1, self.shape)
