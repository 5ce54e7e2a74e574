"""Facts with one prompt, as a task, and what a model computes at the last token of their prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....data import Fact, Specimen
from ....errors import BadData, NotApplicable
from ....forward import last_logits, watch
from ...tracing import answered, subject_span

LEAST = 8  # facts of a task; our choice: fewer say little about what the subjects share


@dataclass(frozen=True)
class Task:
    """Facts that the model knows, with one prompt and different subjects.

    prompts: token ids of each, with its subject. answers: first token of each answer (N). subjects: place of the last
    token of each subject (N). other: for each fact, the number of one with another answer (N): its counterfactual.
    """

    prompt: str
    facts: Sequence[Fact]
    prompts: Sequence[Tensor]
    answers: Tensor
    subjects: Tensor
    other: Tensor


@dataclass
class States:
    """Activations at the last token of N prompts, on the CPU, float64.

    residual, attention, mlp: N x d, heads: N x (H d_h), by layer, see `activations.points`. looking: N x H, attention
    from the last token to the subject's last, by layer. logits: N x V.
    """

    residual: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    looking: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def tasks_of(specimen: Specimen, count: int, facts: int) -> list[Task]:
    """The `count` prompts with most facts, each with the first `facts` of them that the model completes correctly.

    Raises NotApplicable where no prompt has enough facts that the model knows, or all of them have one answer.
    """
    by_prompt: dict[str, list[Fact]] = defaultdict(list)
    for fact in specimen.facts:
        by_prompt[fact.prompt].append(fact)
    tasks = []
    for prompt, group in sorted(by_prompt.items(), key=lambda item: -len(item[1])):
        if len(group) < LEAST or len(tasks) == count:
            break
        try:
            task = _task(specimen, prompt, answered(specimen, group, facts))
        except NotApplicable:  # the model knows none of them
            continue
        if task is not None:
            tasks.append(task)
    if not tasks:
        most = max(map(len, by_prompt.values()))
        raise NotApplicable(
            f"it compares facts with the same prompt and different subjects, and needs {LEAST} of one prompt that the "
            f"model completes correctly and whose answers are not all the same; there are at most {most} of one "
            "prompt, known or not"
        )
    return tasks


def _task(specimen: Specimen, prompt: str, facts: Sequence[Fact]) -> Task | None:
    answers = torch.stack([specimen.continuation(fact.text, fact.answer)[0] for fact in facts])
    if len(facts) < LEAST or len(answers.unique()) < 2:
        return None
    differs = answers[:, None] != answers
    numbers = torch.arange(len(facts))
    after = (numbers - numbers[:, None] - 1) % len(facts)  # how far each fact stands behind this one, going round
    other = after.masked_fill(~differs, len(facts)).argmin(1)
    subjects = torch.tensor([subject_span(specimen, fact)[1] - 1 for fact in facts])
    return Task(prompt, facts, [specimen.encode(fact.text) for fact in facts], answers, subjects, other)


def by_length(prompts: Sequence[Tensor], at_most: int = 64) -> list[list[int]]:
    """Numbers of the prompts of one length, at most so many together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        groups[len(prompt)].append(number)
    return [group[start : start + at_most] for group in groups.values() for start in range(0, len(group), at_most)]


@torch.no_grad()
def states_of(specimen: Specimen, task: Task) -> States:
    """Run a task's prompts and keep the last token's activations. Raises BadData where all prompts are the same."""
    if all(torch.equal(prompt, task.prompts[0]) for prompt in task.prompts):
        raise BadData(f"all facts of {task.prompt!r} have the same subject: there is nothing to compare")
    specimen.require_contributions()
    rows: list[int] = []
    parts: list[States] = []
    for numbers in by_length(task.prompts):
        ids = torch.stack([task.prompts[number] for number in numbers]).to(specimen.model.device)
        with watch(specimen.anatomy, ["residual", "attention", "mlp", "heads", "patterns"]) as seen:
            logits = last_logits(specimen.model, ids)[:, 0]
        last = {
            point: {layer: x[:, -1].double().cpu() for layer, x in getattr(seen, point).items()}
            for point in ("residual", "attention", "mlp", "heads")
        }
        at, subjects = torch.arange(len(numbers)), task.subjects[numbers]
        looking = {layer: x[:, :, -1].double().cpu()[at, :, subjects] for layer, x in seen.patterns.items()}
        parts.append(States(**last, looking=looking, logits=logits.double().cpu()))
        rows += numbers
    order = torch.tensor(rows).argsort()
    merged = {
        point: {
            layer: torch.cat([getattr(p, point)[layer] for p in parts])[order] for layer in getattr(parts[0], point)
        }
        for point in ("residual", "attention", "mlp", "heads", "looking")
    }
    return States(**merged, logits=torch.cat([part.logits for part in parts])[order])
