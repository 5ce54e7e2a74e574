"""What the claims about editing facts share: a copy of the model on which facts are edited, measured and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data import Batches, Fact, Passage, Specimen
from ..editing import Journal
from ..editing import edit as registered
from ..editing.catalog.constrained_ft import constrained_ft
from ..editing.catalog.memit import LENGTHS, chosen, spread
from ..editing.catalog.rome import rewrite
from ..editing.closed_form import refuse_short_text, second_moments
from ..editing.contexts import prefixes_of
from ..editing.places import down_of, usual_layer
from ..editing.problems import NothingToEdit, Request, requests
from ..editing.scores import measure, probabilities, scores
from ..editing.values import Search
from ..evaluation import evaluate_loss, says
from ..forward import answer_log_probabilities
from ..probes.tracing import answered
from .context import Context
from .registry import NotApplicable, Result, Verdict, claim

SINGLE, TOGETHER, OTHERS = 20, 50, 100  # facts edited one by one and together, and facts that are only looked at
ENOUGH = 0.95  # share of new answers that the model writes by itself
_ABOVE, _NEW, _NEAR = "new answer above the true one", "generated: new answer", "generated: neighbours' answers"
_UNBOUNDED = {"epsilon": 1e9, "steps": 200}


@dataclass(frozen=True)
class Outcome:
    """Of one edit. before, after: see `editing.scores.measure`. scores: of the study. others: share of facts that were
    not edited and are still answered, or NaN where nobody asked."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    scores: Mapping[str, float]
    others: float


class Bench:
    """A model that may be changed, and facts that it answers correctly, to be edited and put back.

    Raises NotApplicable for a model that predicts no next token.
    """

    def __init__(self, specimen: Specimen, facts: Sequence[Fact]) -> None:
        specimen.require_causal()
        specimen.model.eval().requires_grad_(False)
        self.specimen, self.facts = specimen, facts
        self._moments: dict[int, Tensor] = {}
        self._before: dict[tuple[Fact, ...], Mapping[str, float]] = {}

    @classmethod
    def of(cls, context: Context, count: int, least: int = 5) -> Bench:
        """A float32 copy of the context's model, and facts from the end of the list on.

        The defaults of the edits were chosen on the first fifty facts of the bundled model, which the claims so leave
        out. Not applicable where fewer than `least` facts are known, or none says what to put in.
        """
        specimen = context.fresh()
        specimen.require_causal()
        able = [fact for fact in reversed(specimen.facts) if fact.new_answer and fact.new_answer != fact.answer]
        facts = answered(specimen, able, count)
        if len(facts) < least:
            raise NotApplicable(f"the model knows {len(facts)} of the facts that have a new_answer; {least} are needed")
        return cls(specimen, facts)

    def moments(self, layers: Sequence[int]) -> list[Tensor]:
        """C of some layers' down-projections, in the model before any edit."""
        missing = [layer for layer in layers if layer not in self._moments]
        if missing:
            matrices = [down_of(self.specimen, layer) for layer in missing]
            for matrix in matrices:
                refuse_short_text(self.specimen, matrix)
            self._moments |= dict(zip(missing, second_moments(self.specimen, matrices), strict=True))
        return [self._moments[layer] for layer in layers]

    def edited(self, name: str, facts: Sequence[Fact], others: Sequence[Fact] = (), **settings: Any) -> Outcome:
        """Edit facts together with the edit's defaults but for `settings`, measure, and take the edit back."""
        key = tuple(facts)
        if key not in self._before:  # the same whatever the edit and its settings
            self._before[key] = measure(replace(self.specimen, known_facts=list(facts)))
        with self._editing(name, facts, settings) as (specimen, found):
            return Outcome(self._before[key], measure(specimen), found, self.answered(others))

    def scored(self, name: str, facts: Sequence[Fact], **settings: Any) -> Mapping[str, float]:
        """The same for the study's scores alone, which ask for no writing; see `editing.scores.scores`."""
        with self._editing(name, facts, settings) as (_, found):
            return found

    @contextmanager
    def _editing(
        self, name: str, facts: Sequence[Fact], settings: Mapping[str, Any]
    ) -> Iterator[tuple[Specimen, Mapping[str, float]]]:
        """Inside, the facts are edited: the specimen with them, and the study's scores of the edit."""
        specimen = replace(self.specimen, known_facts=list(facts))
        given = registered(name).settings(settings)
        wanted = requests(specimen, given["problem"], given["noise"])
        chances = probabilities(specimen, wanted)
        journal = Journal(specimen.model)
        try:
            self.write(journal, name, specimen, wanted, given)
            yield specimen, scores(chances, probabilities(specimen, wanted), wanted[0].lowers)
        finally:
            journal.undo()

    def write(
        self, journal: Journal, name: str, specimen: Specimen, wanted: Sequence[Request], given: Mapping[str, Any]
    ) -> None:
        """Make an edit on the model as it is. given: all its settings."""
        if name == "constrained-ft":
            constrained_ft(specimen, journal, **given)
            return
        search = Search(
            given["steps"], given["learning_rate"], given["drift"], given["decay"], given["longest"],
            given["problem"] == "erasure",
        )  # fmt: skip
        if name == "rome":
            prefixes = prefixes_of(specimen, given["contexts"])
            layer = usual_layer(specimen) if given["layer"] < 0 else given["layer"]
            (moments,) = self.moments([layer])
            rewrite(specimen, journal, wanted, layer, moments, prefixes, search, given["protect"], given["rounds"])
        else:
            prefixes = prefixes_of(specimen, given["contexts"], LENGTHS)
            span = chosen(specimen, given["layers"])
            spread(specimen, journal, wanted, span, self.moments(span), prefixes, search, given["weight"])

    def one_after_another(
        self, name: str, facts: Sequence[Fact], others: Sequence[Fact], text: Batches, every: int = 10
    ) -> Iterator[dict[str, Any]]:
        """Edits of one fact each, on top of one another; a row after none, the first, and each `every` of them.

        A fact whose new answer earlier edits already make the model write, or begin a longer word with, is passed over.
        A row says how many of all facts edited so far the model writes by itself, how many of the last `every`, the
        other facts that it still answers, and the loss on a held-out text. Afterwards the model is as it was.
        """
        given, journal = registered(name).settings({}), Journal(self.specimen.model)
        try:
            for count in range(len(facts) + 1):
                if count:
                    fact = facts[count - 1]
                    one = replace(self.specimen, known_facts=[fact])
                    if not all(says(one, [Passage(fact.text, str(fact.new_answer))])):
                        with suppress(NothingToEdit):
                            wanted = requests(one, given["problem"], given["noise"])
                            self.write(journal, name, one, wanted, given)
                if count not in (0, 1, len(facts)) and count % every:
                    continue
                asked = [Passage(fact.text, str(fact.new_answer)) for fact in facts[:count]]
                said = says(self.specimen, asked) if asked else []
                last = said[-every:]
                yield {
                    "edits": count, "all written": sum(said) / len(said) if said else float("nan"),
                    "newest written": sum(last) / len(last) if last else float("nan"),
                    "other facts": self.answered(others), "loss": evaluate_loss(self.specimen.model, text).loss,
                }  # fmt: skip
        finally:
            journal.undo()

    def one_by_one(self, name: str, facts: Sequence[Fact], **settings: Any) -> list[Outcome]:
        """Each fact edited alone."""
        shown = self.specimen.shown(facts, f"{name}, one fact at a time")
        return [self.edited(name, [fact], **settings) for fact in shown]

    def answered(self, facts: Sequence[Fact]) -> float:
        """Share of facts that the model answers; NaN for none."""
        if not facts:
            return float("nan")
        try:
            return len(answered(self.specimen, facts, len(facts))) / len(facts)
        except NotApplicable:
            return 0.0


def mean(outcomes: Sequence[Outcome], value: Callable[[Outcome], float | None]) -> float:
    """Mean of what the outcomes have; NaN where none has it."""
    found = [one for one in map(value, outcomes) if one is not None]
    return sum(found) / len(found) if found else float("nan")


def row(label: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A row of numbers: means over outcomes."""
    return {
        "edit": label,
        "new above true": mean(outcomes, lambda one: one.after.get(_ABOVE)),
        "above on paraphrases": mean(outcomes, lambda one: one.after.get(f"{_ABOVE}, paraphrases")),
        "new generated": mean(outcomes, lambda one: one.after.get(_NEW)),
        "generated on paraphrases": mean(outcomes, lambda one: one.after.get(f"{_NEW}, paraphrases")),
        "rewrite score": mean(outcomes, lambda one: one.scores.get("rewrite score")),
        "neighbourhood score": mean(outcomes, lambda one: one.scores.get("neighbourhood score")),
        "neighbours generated before": mean(outcomes, lambda one: one.before.get(_NEAR)),
        "neighbours generated": mean(outcomes, lambda one: one.after.get(_NEAR)),
        "other facts answered": mean(outcomes, lambda one: one.others if one.others == one.others else None),
    }


def efficacy(context: Context, name: str) -> Result:
    """Facts edited one by one and together, judged by what the model writes in free greedy generation.

    The papers count a fact as edited where the new answer is more probable than the true one. That is reported beside
    it, as is what happens to other facts.
    """
    bench = Bench.of(context, TOGETHER + OTHERS)
    together, others = bench.facts[:TOGETHER], bench.facts[TOGETHER:]
    single = row("one fact at a time", bench.one_by_one(name, together[:SINGLE]))
    many = row(f"{len(together)} facts together", [bench.edited(name, together, others)])
    shares = [single["new generated"], many["new generated"]]
    told = (
        f"Of {len(together[:SINGLE])} facts edited alone, the model itself writes the new answer of {shares[0]:.1%}, "
        f"and of {len(together)} edited together, of {shares[1]:.1%}; it is more probable than the true one for "
        f"{single['new above true']:.1%} and {many['new above true']:.1%}. On paraphrases it is written in "
        f"{single['generated on paraphrases']:.1%} and {many['generated on paraphrases']:.1%} of cases. The answers "
        f"about other subjects that are asked alike, written in {single['neighbours generated before']:.1%} and "
        f"{many['neighbours generated before']:.1%} of cases before, are still in "
        f"{single['neighbours generated']:.1%} and {many['neighbours generated']:.1%}"
    )
    return Result(Verdict.of(min(shares) >= ENOUGH), f"{told}.", [single, many])


def spares_neighbours(context: Context, name: str, **settings: Any) -> Result:
    """Single facts, against fine-tuning of the same layers without a bound, for up to 200 steps."""
    bench = Bench.of(context, SINGLE)
    layer = str(usual_layer(bench.specimen))
    if name == "memit":
        span = chosen(bench.specimen, "")
        layer = f"{span[0]}-{span[-1]}"
    if not any(fact.neighbours for fact in bench.facts):
        raise NotApplicable("the facts have no neighbours")
    rows = [
        row(name, bench.one_by_one(name, bench.facts, **settings)),
        row("fine-tuning without a bound", bench.one_by_one("constrained-ft", bench.facts, layers=layer, **_UNBOUNDED)),
    ]
    ours, free = rows
    works = ours["new generated"] >= ENOUGH
    spares = ours["neighbourhood score"] > free["neighbourhood score"]
    told = (
        f"After {name} the model itself writes the new answer of {ours['new generated']:.1%} of {len(bench.facts)} "
        f"facts, with a neighbourhood score of {ours['neighbourhood score']:.4f} (1: untouched); after fine-tuning "
        f"without a bound of {free['new generated']:.1%}, with {free['neighbourhood score']:.4f}."
    )
    return Result(Verdict.of(works and spares), told, rows)


def erases_and_amplifies(context: Context, name: str) -> Result:
    """Single facts. Amplified are the known facts of the lowest probability, since the others have nothing to gain."""
    bench = Bench.of(context, TOGETHER + OTHERS)
    pairs = [(bench.specimen.encode(f.text), bench.specimen.continuation(f.text, f.answer)) for f in bench.facts]
    order = answer_log_probabilities(bench.specimen.model, pairs).argsort().tolist()
    unsure = [bench.facts[number] for number in order[: SINGLE // 2]]
    rows = []
    for problem, facts in (("erasure", bench.facts[: SINGLE // 2]), ("amplification", unsure)):
        outcomes = bench.one_by_one(name, facts, problem=problem)
        pairs = torch.tensor([[o.before[_TRUE], o.after[_TRUE]] for o in outcomes], dtype=torch.float64)
        moved = pairs[:, 1] < pairs[:, 0] if problem == "erasure" else pairs[:, 1] > pairs[:, 0]
        rows.append(
            {
                "problem": problem, "p(true answer) before": float(pairs[:, 0].mean()),
                "after": float(pairs[:, 1].mean()), "facts moved that way": float(moved.double().mean()),
                "true generated before": mean(outcomes, lambda one: one.before[_WRITTEN]),
                "true generated": mean(outcomes, lambda one: one.after[_WRITTEN]),
                "rewrite score": mean(outcomes, lambda one: one.scores.get("rewrite score")),
                "neighbourhood score": mean(outcomes, lambda one: one.scores.get("neighbourhood score")),
            }
        )  # fmt: skip
    erased, amplified = rows
    holds = (
        erased["after"] < erased["p(true answer) before"] and amplified["after"] > amplified["p(true answer) before"]
    )
    told = "; ".join(
        f"{one['problem']} takes the mean probability of the true answer from {one['p(true answer) before']:.4f} to "
        f"{one['after']:.4f}, in the right direction for {one['facts moved that way']:.0%} of the facts, and the "
        f"model itself writes it for {one['true generated']:.0%}, before for {one['true generated before']:.0%}"
        for one in rows
    )
    return Result(Verdict.of(holds), f"{told[0].upper()}{told[1:]}.", rows)


_TRUE, _WRITTEN = "probability of the true answer", "generated: true answer"


def register(name: str, title: str, paper: str) -> None:
    """The claims that every edit of facts makes. title: what sentences call it."""
    claim(
        f"{name}/efficacy", method=name, paper=paper,
        statement=f"{title} makes the model itself write at least 95 % of new answers, one at a time and fifty "
        "together.",
    )(lambda context: efficacy(context, name))  # fmt: skip
    claim(
        f"{name}/spares-neighbours", method=name, paper="arXiv:2301.04213",
        statement=f"{title} puts new answers in and changes the answers about other subjects less than fine-tuning of "
        "the same layers without a bound.",
    )(lambda context: spares_neighbours(context, name))  # fmt: skip
    claim(
        f"{name}/erases-and-amplifies", method=name, paper="arXiv:2301.04213",
        statement=f"{title} makes a true answer less probable when it is to erase it, and more when it is to "
        "amplify it.",
    )(lambda context: erases_and_amplifies(context, name))  # fmt: skip
