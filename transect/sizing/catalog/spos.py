"""Single-path one-shot search: the same super-network, sizes at random, and then the best of many (SPOS)."""

from __future__ import annotations

import random
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...forward import Batch
from ...parameters import Range
from ...training import Course, Problem, train
from ..registry import searching
from ..super_network import SuperNetwork
from ..task import Found, Task

Count = Annotated[int, Range(1, 2**31 - 1)]
_PARENTS = 10  # of which evolution breeds; at most a quarter of all candidates
_MUTATION = 0.1  # of each axis, at least one


class Judge:
    """Candidates and what they cost on the validation data, in nats; each is measured once."""

    def __init__(self, task: Task, network: SuperNetwork) -> None:
        self.task, self.network = task, network
        self.random = random.Random(task.settings.seed)
        self.costs: dict[tuple[int, ...], float] = {}

    def cost(self, picked: dict[str, int]) -> float:
        """Validation loss plus the price of the size."""
        key = tuple(picked.values())
        if key not in self.costs:
            space = self.task.space
            loss = self.network.loss_on(space.one_hot(picked), self.task.validation, self.task.machine)
            self.costs[key] = loss + float(self.task.price(torch.tensor(float(space.size(picked)))))
        return self.costs[key]

    def fitting(self, picked: dict[str, int]) -> dict[str, int]:
        """The same, or made smaller at random, a choice at a time, until it fits."""
        space, keep, now = self.task.space, self.task.settings.keep, dict(picked)
        while not space.within(space.size(now), keep):
            now[self.random.choice([name for name, index in now.items() if index > 0])] -= 1
        return now

    def anyone(self) -> dict[str, int]:
        """A random network that fits."""
        axes = self.task.space.axes
        return self.fitting({name: self.random.randrange(len(axis.choices)) for name, axis in axes.items()})

    def child(self, parents: list[dict[str, int]]) -> dict[str, int]:
        """A crossing of two, or one with a few axes drawn anew, which fits."""
        axes = self.task.space.axes
        first, second = self.random.choice(parents), self.random.choice(parents)
        if self.random.random() < 0.5:
            return self.fitting({name: self.random.choice((first[name], second[name])) for name in axes})
        changed = {name for name in axes if self.random.random() < _MUTATION} or {self.random.choice(list(axes))}
        return self.fitting({
            name: self.random.randrange(len(axes[name].choices)) if name in changed else first[name] for name in axes
        })  # fmt: skip


@searching("spos", paper="arXiv:1904.00420")
def spos(task: Task, *, select: Literal["evolution", "random"] = "evolution", candidates: Count = 100) -> Found:
    """One random network a step trains the shared weights; afterwards candidates are measured and the best is taken.

    The baseline of tanglenas: with `lr` 0 the weights stay, and it is a search among slices of the model as it is.

    select: of the candidates the first half at random, the others bred from the best ones; or all at random.
    candidates: networks that are looked at, each measured on all validation data.
    """
    space, settings = task.space, task.settings
    model, network, course = space.anatomy.model, SuperNetwork(space), Course()
    if settings.lr > 0:

        def loss(batch: Batch) -> tuple[Tensor, int]:
            picked = {name: int(torch.randint(len(axis.choices), ())) for name, axis in space.axes.items()}
            return network.loss(space.one_hot(picked), batch)

        model.requires_grad_(True)
        schedule = settings.schedule(settings.lr)
        problem = Problem("spos", dict(model.named_parameters()), task.training, loss, None, model.train, task.tokens)
        course = train(problem, task.run(schedule), {})
    judge = Judge(task, network)
    count = candidates if select == "random" else max(1, candidates // 2)
    population = [judge.anyone() for _ in range(count)]
    while len(population) < candidates:
        best = sorted(population, key=judge.cost)[: max(2, min(_PARENTS, candidates // 4))]
        population.append(judge.child(best))
    picked = min(population, key=judge.cost)
    return Found(picked, course, notes={"measured": len(judge.costs), "cost": judge.cost(picked)})
