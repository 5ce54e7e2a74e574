"""The bundled model, fine-tuned on questions of a new form about some subjects, and asked about the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Annotated, Any

import torch
from torch import Tensor

from ...adaptation import adapter_named
from ...adaptation.targets import targets_of
from ...anatomy import Anatomy
from ...errors import TransectError
from ...forward import at_rest, recitations
from ...forward.objective import IGNORED
from ...organism import Fact, World, load
from ...organism.world import HELD_BACK, LETTERS, N_ENTITIES
from ...parameters import Range
from ...probes import Drawing, Quantity, Result, Table
from ...probes.draw import lines
from ...training import Machine, Problem, Run, Schedule, State, own_loss, train
from ..numbers import numbers
from ..registry import Bench, studying

FULL, LOW = 1e-3, 1e-2  # rates of AdamW, those of `one-layer-knowledge`
BATCH = 32  # questions in a step
QUESTION = 3  # tokens of a question


class Asked:
    """The world's facts behind a question that the model has never seen: a subject, a letter for the relation, ":".

    letters: of the relations, by a draw of the seed. order: the subjects, of which the first are fine-tuned.
    """

    def __init__(self, seed: int) -> None:
        self.world, rng = World(), Random(f"organism questions {seed}")
        letters = rng.sample(LETTERS, len(LETTERS))
        self.letters = {one.name: letter for one, letter in zip(self.world.relations, letters, strict=True)}
        self.order = rng.sample(self.world.entities, N_ENTITIES)

    def facts(self, subjects: Sequence[str]) -> list[Fact]:
        """All facts of these subjects."""
        chosen = set(subjects)
        return [fact for fact in self.world.facts if fact.subject in chosen]

    def question(self, fact: Fact) -> str:
        """The words before the answer."""
        return f"{fact.subject} {self.letters[fact.relation.name]} :"


def draw(result: Result) -> list[Drawing]:
    """Reach against fine-tuned subjects, and every cell in numbers."""
    tuned, ranks = list(result.labels["tuned"]), list(result.labels["rank"])
    before, after = result["before"].mean(-1), result["after"].mean(-1)
    columns = ("reached", "stored, not reached", "own wordings kept", "fine-tuned questions")
    values = [result[name].mean(-1) for name in ("after", "unreachable", "kept", "learned")]
    return [
        lines(
            "Reached by a question, by fine-tuned subjects",
            "Facts that the bundled model tells in three wordings; the question's form is new. Each line: a way of "
            "fine-tuning.",
            {"before": before} | {name: after[i] for i, name in enumerate(ranks)},
            x=tuned, xlabel="fine-tuned subjects", ylabel="share of other subjects' facts",
        ),
        Table(
            "Every cell", f"Means over {result['before'].shape[-1]} seeds.", ["fine-tuned", "subjects", *columns],
            [
                [name, count, *(f"{float(one[r, t]):.3f}" for one in values)]
                for r, name in enumerate(ranks)
                for t, count in enumerate(tuned)
            ],
        ),
    ]  # fmt: skip


@studying("organism-questions", title="Facts that questions reach in the bundled model", paper="arXiv:2508.00901",
          draw=draw)  # fmt: skip
def organism_questions(
    bench: Bench,
    *,
    fine_tuned: str = "2,8,32",
    rank: str = "0,1",
    seeds: Annotated[int, Range(1, 32)] = 2,
    steps: Annotated[int, Range(1, 100_000)] = 60,
    asked: Annotated[int, Range(1, 4 * N_ENTITIES)] = 200,
) -> Result:
    """What `one-layer-knowledge` asks, of the bundled model: questions about some subjects, then about the others.

    After Xu and Chen 2025, arXiv:2508.00901, who fine-tune GPT-2 and Llama on PopQA; the design is ours. The model
    knows 800 facts of 200 subjects, each from three wordings (some from four). A question is a subject, a letter that
    stands for the relation, and ":", a form that occurs nowhere in its text; the answer alone is trained. A fact is
    stored where a trained wording is continued with it, and reached where the question is; unreachable is the share
    of stored ones (mean over the wordings) that the question misses.

    fine_tuned: subjects that questions are trained on, with all four facts each; several with commas.
    rank: of LoRA on every linear layer of the blocks, 0 for all parameters; several with commas.
    seeds: draws of subjects and letters to average over.
    steps: of 32 questions each.
    asked: at most so many of the other subjects' facts are asked for.
    """
    owner = "organism-questions"
    tuned, ranks = numbers(owner, "fine_tuned", fine_tuned, int, 1), numbers(owner, "rank", rank, int)
    if tuned[-1] >= N_ENTITIES:
        raise TransectError(f"{owner}: {tuned[-1]} fine-tuned subjects of {N_ENTITIES} leave none to ask about")
    targets = targets_of(Anatomy(load()[0]), None)
    for one in filter(None, ranks):
        adapter_named("lora").check(targets, {"rank": one})
    cells = {
        (one, count, seed): bench.once(
            f"rank-{one}-{count}-{seed}",
            lambda one=one, count=count, seed=seed: cell(bench, one, count, bench.seed + seed, steps, asked),
        )
        for one in ranks for count in tuned for seed in range(seeds)
    }  # fmt: skip

    def array(name: str) -> Tensor:
        """(rank, tuned, seed)"""
        found = [[[cells[one, count, seed][name] for seed in range(seeds)] for count in tuned] for one in ranks]
        return torch.tensor(found)

    axes = ("rank", "tuned", "seed")
    told = {
        "after": "held-out questions answered right", "kept": "right behind trained wordings, fine-tuned",
        "unreachable": "right so, wrong for the question", "learned": "fine-tuned questions answered right",
    }  # fmt: skip
    quantities = {name: Quantity(array(name), axes, "share", about) for name, about in told.items()}
    quantities["before"] = Quantity(array("before")[0], axes[1:], "share", "held-out questions right, as it was")
    quantities["stored"] = Quantity(array("stored")[0], axes[1:], "share", "right behind trained wordings, as it was")
    labels = {
        "rank": [f"rank {one}" if one else "all parameters" for one in ranks], "tuned": [str(one) for one in tuned],
        "seed": [str(bench.seed + seed) for seed in range(seeds)],
    }  # fmt: skip
    result = Result(quantities, [], CAVEATS, labels)
    result.findings = findings(result)
    return result


def cell(bench: Bench, rank: int, tuned: int, seed: int, steps: int, most: int) -> Mapping[str, Tensor]:
    """One fine-tuning, and what is measured before and after it; scalars."""
    model: Any
    asked, (model, tokenizer) = Asked(seed), load()
    model.to(bench.device)
    learned, others = asked.facts(asked.order[:tuned]), asked.facts(asked.order[tuned:])
    others = Random(f"asked {seed}").sample(others, min(most, len(others)))

    def pairs(prompts: list[str], facts: list[Fact]) -> list[tuple[Tensor, Tensor]]:
        return [
            (torch.tensor(tokenizer(prompt)["input_ids"]), torch.tensor(tokenizer(fact.answer())["input_ids"]))
            for prompt, fact in zip(prompts, facts, strict=True)
        ]

    def right(prompts: list[str], facts: list[Fact]) -> Tensor:
        given = pairs(prompts, facts)
        said = recitations(model, given)
        return torch.tensor([torch.equal(one, answer) for one, (_, answer) in zip(said, given, strict=True)]).float()

    def stored() -> Tensor:
        """(facts): the share of its trained wordings."""
        told = [right([fact.prompt(wording) for fact in others], others) for wording in range(HELD_BACK)]
        return torch.stack(told).mean(0)

    questions = [asked.question(fact) for fact in others]
    found = {"stored": stored().mean(), "before": right(questions, others).mean()}
    rows = [torch.cat(pair) for pair in pairs([asked.question(fact) for fact in learned], learned)]  # of one length
    fine_tune(bench, model, torch.stack(rows), rank, seed, steps)
    own, reached = stored(), right(questions, others)
    return found | {
        "after": reached.mean(), "kept": own.mean(), "unreachable": (own * (1 - reached)).mean(),
        "learned": right([asked.question(fact) for fact in learned], learned).mean(),
    }  # fmt: skip


def fine_tune(bench: Bench, model: Any, rows: Tensor, rank: int, seed: int, steps: int) -> None:
    """Train the model on the answers, the last tokens of the rows (n x T), in place."""
    from ...adaptation.attached import Attached  # peft takes a second to import

    labels = rows.clone()
    labels[:, :QUESTION] = IGNORED
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).split(BATCH)
    batches = [{"input_ids": rows[part].to(bench.device), "labels": labels[part].to(bench.device)} for part in order]
    settings = {"rank": rank, "alpha": float(rank), "dropout": 0.0}
    with at_rest(model, frozen=True):
        config = adapter_named("lora").config(list(targets_of(Anatomy(model), None)), settings) if rank else None
        attached = Attached(model, config, seed)
        problem = Problem(
            f"{len(rows)} questions, {f'rank {rank}' if rank else 'all parameters'}", attached.parameters, batches,
            lambda batch: own_loss(model, batch), None, model.train,
        )  # fmt: skip
        schedule = Schedule(
            lr=LOW if rank else FULL, epochs=math.ceil(steps / len(batches)), steps=steps, warm_up=0.0,
            shape="constant", seed=seed,
        )  # fmt: skip
        train(problem, Run(schedule, Machine(bench.device), State(None), bench.progress), {})
        attached.merge()


def findings(found: Result) -> list[str]:
    """A few sentences, from the arrays and labels alone."""
    tuned, before = found.labels["tuned"], found["before"].mean()
    said = [
        f"As it is, the model tells {float(found['stored'].mean()):.2f} of the other subjects' facts behind a trained "
        f"wording, and {float(before):.2f} behind the new question."
    ]
    for r, name in enumerate(found.labels["rank"]):
        by = ", ".join(
            f"{float(found['after'][r, t].mean()):.2f} after {count} (stored and not reached "
            f"{float(found['unreachable'][r, t].mean()):.2f})"
            for t, count in enumerate(tuned)
        )
        said.append(f"By fine-tuned subjects, with {name}, a question about another subject reaches {by}.")
    return said


CAVEATS = (
    "The number of wordings is the bundled model's own, so coverage is complete for any subject: what changes is how "
    "much is fine-tuned, and in which way. For fewer wordings see one-layer-knowledge.",
    "The budget of steps is fixed and nothing is stopped early: questions about few subjects are seen often.",
)
