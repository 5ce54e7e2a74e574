"""Claim of LLaVA-MoLE (Chen et al., 2024, arXiv:2401.16160)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...adaptation import adapter_named
from ...adaptation.targets import targets_of
from ...data import Specimen
from ...forward import at_rest
from ...training import Machine, Problem, Run, Schedule, State, train
from ..context import Context, Measured
from ..registry import NotApplicable, Result, Verdict, claim

EXPERTS, RANK = 3, 4
WORDS, LENGTH = 24, 6  # words of the tasks; of a sequence
STEPS, BATCH = 200, 16
RATES = (3e-3, 1e-2)
SEEDS = (0, 1)
JUDGED = 64  # sequences of each task; as many choose the rate
NEAR = 0.1  # of its loss: how far above the larger LoRA counts as near it
LARGEST = 10_000_000  # numbers of a model that a claim trains
TASKS = ("copied", "reversed")

# The last two are no part of the claim: the router learns from the loss, too.
MOLE, SAME, LARGER = f"mole, {EXPERTS} experts", f"lora of rank {RANK}", f"lora of rank {EXPERTS * RANK}"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    MOLE: ("mole", {"experts": EXPERTS}),
    SAME: ("lora", {}),
    LARGER: ("lora", {"rank": EXPERTS * RANK}),
    "mole, gate_scale": ("mole", {"experts": EXPERTS, "gate_scale": True}),
    "mole, soft": ("mole", {"experts": EXPERTS, "soft": True}),
}


@claim(
    "mole/conflicting-tasks",
    method="mole",
    paper="arXiv:2401.16160",
    statement="Of two tasks that answer the same question in opposite ways, learned together, experts that are chosen "
    "by token lower the loss on both further than plain LoRA of the same rank, and stay near LoRA of as many times the "
    "rank as there are experts.",
)
def conflicting_tasks(context: Context) -> Result:
    """Random words behind a tag are to be copied, or, behind another tag, reversed; only the answer is judged.

    Ours, in place of the paper's sets of instructions. All linear layers, alpha twice the rank, no dropout, and the
    same sequences in the same order for all; each at that rate of two that is best for it on other sequences (first
    seed). Mean over seeds; errors over held-out sequences, in pairs. It holds if the loss is lower than that of the
    same rank on both tasks, and on neither more than a tenth above that of the larger rank. With experts that the loss
    does not choose, the tag has to reach the router by chance; how far the tasks' shares of tokens by expert are apart
    (total variation, mean over MLPs) is told.
    """
    context.specimen.require_causal()
    numbers = sum(parameter.numel() for parameter in context.model.parameters())
    if numbers > LARGEST:
        raise NotApplicable(f"it trains fifteen adapters, and the model has {numbers:,} numbers: above {LARGEST:,}")
    specimen, words = context.fresh(), _words(context)
    with at_rest(specimen.model, frozen=True):
        frozen = [_loss(specimen.model, _sequences(words, task, JUDGED, 99)) for task in range(2)]
        found = {name: _judged(specimen, words, *variant) for name, variant in VARIANTS.items()}
    rows = [{"variant": "as it was"} | {f"loss, {task}": one.loss for task, one in zip(TASKS, frozen, strict=True)}]
    rows += [_row(name, found[name], found[MOLE]) for name in found]
    (ours, _), (same, _), (larger, _) = found[MOLE], found[SAME], found[LARGER]
    lower = all(one.loss < other.loss for one, other in zip(ours, same, strict=True))
    near = all(one.loss < other.loss * (1 + NEAR) for one, other in zip(ours, larger, strict=True))
    told = "; ".join(
        f"{task}: {one.loss:.4f}, against {other.loss:.4f} of the same rank (difference {one.minus(other)[0]:+.4f}, "
        f"standard error {one.minus(other)[1]:.4f}) and {most.loss:.4f} of rank {EXPERTS * RANK}"
        for task, one, other, most in zip(TASKS, ours, same, larger, strict=True)
    )
    return Result(Verdict.of(lower and near), f"Loss in nats a word, {told}.", rows)


def _row(name: str, found: tuple[list[Measured], dict[str, Any]], ours: tuple[list[Measured], Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name, **found[1]}
    for task, one, mole in zip(TASKS, found[0], ours[0], strict=True):
        difference, error = mole.minus(one)
        row |= {f"loss, {task}": one.loss, f"mole minus this, {task}": difference, f"its error, {task}": error}
    return row


def _words(context: Context) -> list[int]:
    """The commonest tokens of the held-out text: the two tags, what separates question and answer, and the words."""
    counts = Counter(token for text in context.evaluation.texts() for token in text.tolist())
    if len(counts) < WORDS + 3:
        raise NotApplicable(f"the held-out text has {len(counts)} different tokens, and the tasks need {WORDS + 3}")
    return [token for token, _ in counts.most_common(WORDS + 3)]


def _sequences(words: list[int], task: int, count: int, seed: int) -> Tensor:
    """Tag, words, separator, and the words again, copied (task 0) or reversed (1): (count, 2 LENGTH + 2)."""
    generator = torch.Generator().manual_seed(2 * seed + task)
    drawn = torch.tensor(words[3:])[torch.randint(WORDS, (count, LENGTH), generator=generator)]
    tag, between = (torch.full((count, 1), words[place]) for place in (task, 2))
    return torch.cat([tag, drawn, between, drawn.flip(1) if task else drawn], 1)


def _answers(model: Any, ids: Tensor) -> Tensor:
    """Nats of each word of the answers (sequences, LENGTH)."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, -LENGTH - 1 : -1]
    right = ids[:, -LENGTH:].to(logits.device)
    return functional.cross_entropy(logits.flatten(0, 1).float(), right.flatten(), reduction="none").view_as(right)


@torch.no_grad()
def _loss(model: Any, ids: Tensor) -> Measured:
    with at_rest(model):
        nats = _answers(model, ids).double().cpu()
    return Measured(nats.sum(1), torch.full((len(nats),), LENGTH, dtype=torch.float64), 1.0)


def _judged(
    specimen: Specimen, words: list[int], method: str, settings: Mapping[str, Any]
) -> tuple[list[Measured], dict[str, Any]]:
    """Both tasks' held-out loss, the sequences of all seeds together; and what else there is to tell."""
    runs = {(SEEDS[0], rate): _trained(specimen, words, method, settings, SEEDS[0], rate) for rate in RATES}
    best = min(RATES, key=lambda rate: runs[SEEDS[0], rate][1])
    runs |= {(seed, best): _trained(specimen, words, method, settings, seed, best) for seed in SEEDS[1:]}
    chosen = [runs[seed, best] for seed in SEEDS]
    tasks = [
        Measured(
            torch.cat([run[0][task].nats for run in chosen]), torch.cat([run[0][task].predictions for run in chosen]), 1
        )
        for task in range(2)
    ]
    more = {"numbers": chosen[0][2], "rate": best}
    apart = [run[3] for run in chosen if run[3] is not None]
    return tasks, more | ({"experts apart": sum(apart) / len(apart)} if apart else {})


def _trained(
    specimen: Specimen, words: list[int], method: str, settings: Mapping[str, Any], seed: int, rate: float
) -> tuple[list[Measured], float, int, float | None]:
    """Of one training: both tasks' loss, their mean where the rate is chosen, numbers trained, and experts apart."""
    adapter, model = adapter_named(method), specimen.model
    given = {"rank": RANK, "dropout": 0.0} | dict(settings)
    config = adapter.config(list(targets_of(specimen.anatomy, None)), given | {"alpha": 2.0 * given["rank"]})
    from ...adaptation.attached import Attached  # peft takes a second to import
    from ...adaptation.catalog.mole import MoleLayer

    halves = [_sequences(words, task, STEPS * BATCH // 2, 1000 + seed) for task in range(2)]
    batches = [torch.cat(parts) for parts in zip(*(half.split(BATCH // 2) for half in halves), strict=True)]
    attached = Attached(model, config, seed)

    def loss(ids: Tensor) -> tuple[Tensor, int]:
        nats = _answers(model, ids)
        return nats.sum(), nats.numel()

    problem = Problem(
        method, attached.parameters, batches, loss=loss, measure=None, set_mode=model.train,
        penalty=lambda batch: attached.penalty(),
    )  # fmt: skip
    try:
        course = train(problem, Run(Schedule(rate, seed=seed), Machine(str(model.device)), State(None)), {})
        chooses = sum(_loss(model, _sequences(words, task, JUDGED, 98)).loss for task in range(2))
        found, used = [], []
        for task in range(2):
            found.append(_loss(model, _sequences(words, task, JUDGED, 99)))
            used.append(MoleLayer.shares_of(model))
        distances = [float((used[0][path] - used[1][path]).abs().sum() / 2) for path in used[0]]
    finally:
        attached.detach()
    return found, chooses, course.numbers, sum(distances) / len(distances) if distances else None
