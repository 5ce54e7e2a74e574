"""Optimizers on the bundled model's own training text, from scratch: loss at equal tokens, bytes of state, time.

Every optimizer starts from the same weights and sees the same batches in the same order, all in turn at every step. It
steps the matrices of the blocks; the embedding, which is also the head, and the norms are stepped by AdamW in every
row. Schedule, moments, decay and clipping are those of the bundled model's training, shortened. The low-rank rows have
a quarter of each matrix's short side. Of several rates the best on one part of the text that follows is shown, with its
loss on another part; the error is that of the difference from AdamW, paired over sequences.

Targets (from the paper, arXiv:2505.17967): DCT-AdamW is no better than AdamW and better than a fixed random subspace;
better with feedback than without; its loss at most 1.05 times that with a subspace from an SVD every 50 steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from common import parser, show, verdict
from torch import Tensor, nn
from torch.nn import functional

from transect.organism.architecture import untrained
from transect.organism.stream import stream
from transect.organism.tokenizer import build
from transect.organism.train import SHORT, Plan
from transect.organism.world import World
from transect.training.optimizers.dct_adamw import DCTAdamW, adam

DECAY, BETAS, CLIP = 0.05, (0.9, 0.98), 1.0  # as the bundled model's training has them
PLAIN, DCT, FEEDBACK, FIXED, SVD = (
    "AdamW",
    "DCT-AdamW",
    "DCT-AdamW, feedback",
    "random subspace, fixed",
    "SVD, every 50",
)
Rows = tuple[Tensor, Tensor]  # tokens and their weights in the loss, n x SHORT


class SVDAdamW(DCTAdamW):
    """The same, with the leading right singular vectors of the gradient in place of basis vectors."""

    def low_rank(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """As of the cosine basis, with the leading right singular vectors of the gradient in its place."""
        rank = round(group["rank"] * gradient.shape[1])
        if state["step"] == 1 or state["step"] % group["every"] == 0:
            rows = torch.linalg.svd(gradient, full_matrices=False).Vh[:rank]
            if "rows" in state:
                turned = state["rows"] @ rows.T
                state["exp_avg"] = state["exp_avg"] @ turned
                state["exp_avg_sq"] = (state["exp_avg_sq"] @ turned).abs()
            state["rows"] = rows.clone()
        mean, root, rate = adam(state, gradient @ state["rows"].T, group)
        return (mean / root) @ state["rows"] * rate


def candidates(steps: int) -> dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]]:
    """What steps the matrices, by the name of the row. steps: of the training."""

    def low_rank(kind: type[DCTAdamW] = DCTAdamW, **settings: Any) -> Callable[..., torch.optim.Optimizer]:
        return lambda matrices, rate: kind(matrices, rate, betas=BETAS, weight_decay=DECAY, rank=0.25, **settings)

    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        PLAIN: lambda matrices, rate: torch.optim.AdamW(matrices, rate, betas=BETAS, weight_decay=DECAY),
        DCT: low_rank(),
        "DCT-AdamW, no rotation": low_rank(rotate=False),
        FEEDBACK: low_rank(feedback="float32"),
        "DCT-AdamW, feedback, no rotation": low_rank(feedback="float32", rotate=False),
        "DCT-AdamW, feedback in 8 bits": low_rank(feedback="int8"),
        "random basis": low_rank(basis="random"),
        FIXED: low_rank(basis="random", every=steps + 1),
        SVD: low_rank(SVDAdamW, every=50),
    }
    if hasattr(torch.optim, "Muon"):  # torch 2.9 and later; with the factor that lets it take AdamW's rates
        made["Muon"] = lambda matrices, rate: torch.optim.Muon(
            matrices, rate, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
        )
    return made


@dataclass
class Training:
    """One model on its way. passes, steps: seconds of forward and backward, and of the optimizers, at every step."""

    model: nn.Module
    plan: Plan
    of_matrices: torch.optim.Optimizer
    of_others: torch.optim.Optimizer
    passes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def step(self, rows: Rows) -> None:
        """Train on a batch."""
        started = time.perf_counter()
        losses, weight = weighted(self.model, rows)
        losses.sum().div(weight.sum()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        passed = time.perf_counter()
        for optimizer in (self.of_matrices, self.of_others):
            for group in optimizer.param_groups:
                group["lr"] = self.plan.schedule.rate(len(self.steps), self.plan.steps)
            optimizer.step()
            optimizer.zero_grad()
        self.passes.append(passed - started)
        self.steps.append(time.perf_counter() - passed)

    @torch.no_grad()
    def losses(self, rows: Rows) -> Tensor:
        """Of every sequence."""
        parts = [weighted(self.model, part) for part in zip(*(one.split(64) for one in rows), strict=True)]
        losses, weight = (torch.cat(one) for one in zip(*parts, strict=True))
        return losses.sum(1) / weight.sum(1)

    @property
    def state_bytes(self) -> int:
        """Of the optimizer of the matrices."""
        held = [value for state in self.of_matrices.state.values() for value in state.values()]
        return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))


def weighted(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """Weighted losses of all predicted tokens, and the weights, each n x (SHORT - 1)."""
    tokens, weights = rows
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses * weights[:, 1:], weights[:, 1:]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, print the table, and return its rows."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, help="that each optimizer sees; default 115200")
    options.add_argument("--batch", type=int, help="tokens of a step; default 384")
    options.add_argument("--rates", default="2.5e-3", help="learning rates that each optimizer is tried at")
    options.add_argument("--only", help="names of rows, separated by semicolons; default all")
    options.add_argument("--seed", type=int, default=0, help="of weights and text")
    chosen = options.parse_args(argv)
    batch, held = chosen.batch or (96 if chosen.quick else 384), 4 if chosen.quick else 256
    steps = (chosen.tokens or (2 * batch if chosen.quick else 115_200)) // batch
    world = World()
    tokenizer = build(world)
    size = held * SHORT
    text = stream(world, tokenizer, steps * batch + 2 * size, chosen.seed)
    of_choice, of_report = (text.rows(steps * batch + part * size, held, SHORT)[:2] for part in range(2))

    made = candidates(steps)
    names = chosen.only.split(";") if chosen.only else list(made)
    trainings: dict[tuple[str, float], Training] = {}
    for name in names:
        for rate in (float(one) for one in chosen.rates.split(",")):
            model = untrained(len(tokenizer), chosen.seed)
            matrices = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
            others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
            trainings[name, rate] = Training(
                model,
                Plan(steps=steps, batch=batch, rate=rate, warmup=max(1, steps // 20)),
                made[name](matrices, rate),
                torch.optim.AdamW(others, rate, betas=BETAS, weight_decay=DECAY),
            )
    for step in range(steps):
        rows = text.rows(step * batch, batch // SHORT, SHORT)[:2]
        for training in trainings.values():
            training.step(rows)

    best: dict[str, tuple[float, Training]] = {}
    for name in names:
        tried = [(rate, training) for (of, rate), training in trainings.items() if of == name]
        best[name] = min(tried, key=lambda one: one[1].losses(of_choice).mean().item())
    losses = {name: training.losses(of_report) for name, (_, training) in best.items()}
    table = []
    for name, (rate, training) in best.items():
        apart = losses[name] - losses.get(PLAIN, losses[name])
        table.append(
            {
                "matrices by": name,
                "rate": rate,
                "loss": losses[name].mean().item(),
                "over AdamW": apart.mean().item(),
                "±": apart.std().item() / held**0.5,
                "state, kB": training.state_bytes / 1000,
                "passes, ms": 1000 * median(training.passes),
                "optimizer, ms": 1000 * median(training.steps),
            }
        )
    title = f"{steps} steps of {batch} tokens; loss on {held} sequences of {SHORT}"
    show(title, list(table[0]), [list(row.values()) for row in table], notes(table, best))
    return table


def notes(table: Sequence[dict[str, Any]], best: dict[str, tuple[float, Training]]) -> list[str]:
    """Whether the targets are met, as far as their rows are there, and what the bases take."""
    loss = {row["matrices by"]: row["loss"] for row in table}
    targets = {
        "AdamW <= DCT-AdamW < fixed random subspace": (
            (PLAIN, DCT, FIXED), lambda: loss[PLAIN] <= loss[DCT] < loss[FIXED]
        ),
        "feedback is better than none": ((DCT, FEEDBACK), lambda: loss[FEEDBACK] < loss[DCT]),
        "at most 1.05 times the loss with an SVD": ((DCT, SVD), lambda: loss[DCT] <= 1.05 * loss[SVD]),
    }  # fmt: skip
    said = [f"{name}: {verdict(met())}" for name, (rows, met) in targets.items() if all(row in loss for row in rows)]
    if DCT in best:
        optimizer = best[DCT][1].of_matrices
        assert isinstance(optimizer, DCTAdamW)
        said.append(f"The cosine bases, which all matrices share, take {optimizer.basis_bytes / 1000:.4g} kB more.")
    return said


if __name__ == "__main__":
    main()
