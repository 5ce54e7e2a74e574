"""Training a dictionary by the one loop (Kissane et al. 2024, arXiv:2406.17759; the authors' train.py).

For each vector ‖x̂ - x‖² + c Σ a, the mean over a batch. Adam with β = (0, 0.9999) and no limit on the gradient. The
decoder's gradient is taken without its part along each column, and behind each step the columns are brought back to
length 1 (the authors do that just before the step). The rate rises along half a cosine from a tenth, and stays; it
starts again wherever dead features were given a new direction. Their rise takes 1,000 of 25,000 steps; here it takes
the same share of the steps between two resamplings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..statistics import Progress
from ..training import Course, Machine, OnCheck, Problem, Run, Schedule, State, train
from .activations import Activations
from .dictionary import Dictionary
from .resample import Firing, resample
from .settings import Settings

LOWEST, RISE = 0.1, 0.04  # of the rate: where it starts, and how much of the way to the next resampling it rises
DRAWN = 100  # batches that a resampling looks at, of those that are in memory
MEDIAN = 50  # batches whose geometric median b_dec starts at


def train_dictionary(
    vectors: Activations, settings: Settings, *, state: State | None = None, note: Mapping[str, Any] | None = None,
    progress: Progress | None = None, on_check: OnCheck = lambda check: None,
) -> tuple[Dictionary, Course]:  # fmt: skip
    """A dictionary of the vectors, on their device and in their dtype, and how its training went.

    vectors: `settings.steps` batches. state: where an unfinished training is kept, under a note that names model and
    data; the same call goes on from there. Who made it removes it.
    Raises Diverged where the loss is not finite any more.
    """
    state = state or State(None)
    state.begin(json.dumps({"dictionary": asdict(settings), **(note or {})}, sort_keys=True))
    start = vectors[0]
    dictionary = Dictionary(start.shape[1], settings.expansion * start.shape[1], settings.seed, start.dtype)
    dictionary.to(start.device)
    length = float(vectors.held(vectors.buffer).norm(dim=1).mean())
    scale = math.sqrt(start.shape[1]) / length if settings.normalise and length > 0 else 1.0
    if settings.bias == "median":
        dictionary.decoder_bias.data = scale * geometric_median(vectors.held(MEDIAN * settings.batch))
    job = _Job(dictionary, vectors, settings, scale)
    handle = dictionary.decoder.register_hook(job.tangent)
    schedule = Schedule(
        lr=settings.lr, warm_up=0.0, shape="constant", clip=None, options={"beta1": 0.0, "beta2": 0.9999},
        shuffle=False, seed=settings.seed,
    )  # fmt: skip
    problem = Problem(
        "dictionary", dict(dictionary.named_parameters()), vectors, job.loss, None, dictionary.train,
        tokens=[settings.batch] * len(vectors), after_step=job.after_step, renew=job.rates, renew_every=1,
        held=job.held, put_back=job.put_back,
    )  # fmt: skip
    job.problem = problem
    try:
        course = train(problem, Run(schedule, Machine(start.device), state, progress, on_check), {})
    finally:
        handle.remove()
    dictionary.of_scaled(scale)
    return dictionary.eval().requires_grad_(False), course


class _Job:
    """What a step needs besides its batch."""

    problem: Problem

    def __init__(self, dictionary: Dictionary, vectors: Activations, settings: Settings, scale: float) -> None:
        self.dictionary, self.vectors, self.settings, self.scale = dictionary, vectors, settings, scale
        self.firing = Firing(dictionary)
        self.every = settings.steps // (settings.resamplings + 1)  # the last stretch has time to settle
        self.restarted = 0  # after how many steps the rate started to rise

    def loss(self, batch: Tensor) -> tuple[Tensor, float]:
        """Summed over the batch."""
        x, rising = self.scale * batch, math.ceil(self.settings.warm_up * self.settings.steps)
        a = self.dictionary.encode(x)
        self.firing.add(a)
        weight = self.settings.l1 * min(1.0, (self.problem.at + 1) / rising if rising else 1.0)
        error = (self.dictionary.decode(a) - x).square().sum()
        return error + weight * a.sum(), len(x)

    def tangent(self, gradient: Tensor) -> Tensor:
        """The decoder's gradient without its part along each column, which would only change the column's length."""
        decoder = self.dictionary.decoder.detach()
        return gradient - decoder * (gradient * decoder).sum(0, keepdim=True)

    def rates(self) -> dict[str, float]:
        """Factors of the rate at the step that comes."""
        rising = max(1, round(RISE * self.every))
        gone = min(1.0, (int(self.firing.steps) - self.restarted) / rising)
        factor = LOWEST + (1 - LOWEST) * 0.5 * (1 - math.cos(math.pi * gone))
        return dict.fromkeys(self.problem.parameters, factor)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Columns at length 1; and new directions for features that are dead, where it is time for that."""
        self.dictionary.normalise()
        self.firing.steps.fill_(step)
        due = self.every and step % self.every == 0 and step // self.every <= self.settings.resamplings
        if not due or step == self.settings.steps:
            return
        dead = self.firing.dead()
        if bool(dead.any()):
            drawn = self.scale * self.vectors.held(DRAWN * self.settings.batch)
            if resample(self.dictionary, dead, drawn, optimizer, self.settings.seed + step):
                self.restarted = step
        self.firing.clear()

    def held(self) -> dict[str, Tensor]:
        return {"fired": self.firing.fired, "seen": self.firing.seen, "steps": self.firing.steps,
                "restarted": torch.tensor(self.restarted)}  # fmt: skip

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            for name in ("fired", "seen", "steps"):
                getattr(self.firing, name).copy_(tensors[name])
            self.restarted = int(tensors["restarted"])


def geometric_median(vectors: Tensor, rounds: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point (D) with the smallest sum of distances to vectors (n x D), by Weiszfeld's iteration from their mean."""
    median = vectors.mean(0)
    floor = float((vectors - median).norm(dim=1).mean()) * tolerance or 1.0
    for _ in range(rounds):
        weight = 1 / (vectors - median).norm(dim=1).clamp_min(floor)
        following = (weight[:, None] * vectors).sum(0) / weight.sum()
        moved, median = float((following - median).norm()), following
        if moved < floor:
            break
    return median
