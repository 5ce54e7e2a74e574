"""Claims of the factual-recall pipeline (Lv et al., 2024, arXiv:2403.19521)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...forward import answer_log_probabilities, changed
from ...probes.catalog.factual_recall.application import ALPHAS, DIRECTIONS, applied, is_function, summary, told
from ...probes.catalog.factual_recall.last_layer import answer_probabilities, fixes, frequent_direction, last_mlp
from ...probes.catalog.factual_recall.last_token import tasks_of
from ...probes.catalog.factual_recall.mlp_split import TRUSTED
from ...probes.catalog.factual_recall.path_patching import answer_metric, path_patched, percent, senders_of
from ...probes.catalog.factual_recall.recall import Recall, answering_layer, recall
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim

_PAPER = "arXiv:2403.19521"
_TASKS, _FACTS = 4, 24


@claim(
    "factual-recall/task-head",
    method="factual-recall",
    paper=_PAPER,
    statement="Removing the head that path patching ranks first lowers p(answer) far more than removing another head "
    "of its layer.",
)
def task_head(context: Context) -> Result:
    """The head is chosen on every other fact, and removed on the rest: its output is set to zero.

    "Far more" is ours: at least twice the mean drop of the layer's other heads, and two standard errors above it.
    """
    specimen = context.specimen
    rows, differences, drops, controls = [], [], [], []
    for one in _recalled(context):
        layer, head, _ = _top_head(context, one)
        facts = list(one.task.facts)[1::2]
        pairs = [(specimen.encode(fact.text), specimen.continuation(fact.text, fact.answer)) for fact in facts]
        whole = answer_log_probabilities(specimen.model, pairs).exp()
        count, size = one.states.looking[layer].shape[1], specimen.anatomy.head_size
        if count == 1:
            raise NotApplicable(f"layer {layer} has one head, so there is no other to compare with")
        dropped = []
        for number in range(count):
            with changed(specimen.anatomy, {("heads", layer): _without(number, size)}):
                dropped.append(whole - answer_log_probabilities(specimen.model, pairs).exp())
            rows.append(
                {
                    "task": one.task.prompt, "head": f"{layer}.{number}", "chosen": number == head,
                    "p(answer)": float(whole.mean()), "drop": float(dropped[-1].mean()),
                }
            )  # fmt: skip
        others = torch.stack([drop for number, drop in enumerate(dropped) if number != head]).mean(0)
        drops.append(dropped[head])
        controls.append(others)
        differences.append(dropped[head] - others)
    top, control = float(torch.cat(drops).mean()), float(torch.cat(controls).mean())
    difference, error = _mean_and_error(torch.cat(differences))
    holds = difference > 2 * error and top >= 2 * control
    return Result(
        Verdict.of(holds),
        f"On {len(torch.cat(drops))} facts of {len(drops)} prompts, removing the top head lowers p(answer) by "
        f"{top:.3f}, another head of its layer by {control:.3f} on average: a difference of {difference:+.3f} "
        f"± {error:.3f} (standard error over facts).",
        rows,
    )


@claim(
    "factual-recall/reading-head",
    method="factual-recall",
    paper=_PAPER,
    statement="The more the top task head attends to the subject, the more it writes along the subject's unembedding.",
)
def reading_head(context: Context) -> Result:
    """Pearson's correlation over the facts of a prompt; it has to be positive for every prompt."""
    rows = []
    for one in _recalled(context):
        layer, head, change = _top_head(context, one)
        rows.append(
            {
                "task": one.task.prompt, "head": f"{layer}.{head}", "metric change %": change,
                "attention to the subject": float(one.numbers["looking"][layer, head]),
                "correlation": float(one.numbers["reading"][layer, head]),
            }
        )  # fmt: skip
    positive = [row for row in rows if row["correlation"] > 0]
    constant = sum(row["attention to the subject"] > 0.99 for row in rows)
    note = f" For {constant} it always attends to the subject, so that its share hardly varies." if constant else ""
    return Result(
        Verdict.of(len(positive) == len(rows)),
        f"The correlation is positive for {len(positive)} of {len(rows)} prompts: "
        + ", ".join(f"{row['head']} {row['correlation']:+.2f}" for row in rows) + f".{note}",
        rows,
    )  # fmt: skip


@claim(
    "factual-recall/mlp-answers",
    method="factual-recall",
    paper=_PAPER,
    statement="An MLP adds a part that comes from no head and points to the answer, and the heads' part of its output "
    "does not.",
)
def mlp_answers(context: Context) -> Result:
    """At the layer whose own part raises the answer's logit most; `most facts` is more than half. The split is ours."""
    rows = []
    for one in _recalled(context):
        if not one.splits:
            raise NotApplicable("no MLP of the model reads heads that a split could name")
        layer = answering_layer(one.numbers)
        row: dict[str, Any] = {"task": one.task.prompt, "layer": layer}
        rows.append(row | {name: float(one.numbers[name][layer]) for name in _SPLIT})
    holds = all(row["own raises"] > 0.5 and row["heads raise"] <= 0.5 for row in rows)
    said = "; ".join(
        f"layer {row['layer']}: own part {row['own logit']:+.2f} logits, up for {row['own raises']:.0%} of the facts, "
        f"heads' part {row['heads logit']:+.2f}, up for {row['heads raise']:.0%} (R² {row['explained']:.2f})"
        for row in rows
    )
    if all(row["explained"] < TRUSTED for row in rows):
        said += (
            ". The split fits badly, so that nearly all of the output counts as the MLP's own: little follows from it"
        )
    return Result(Verdict.of(holds), f"By prompt: {said}.", rows)


_SPLIT = ("explained", "own logit", "heads logit", "component logit", "own raises", "heads raise")


@claim(
    "factual-recall/function-application",
    method="factual-recall",
    paper=_PAPER,
    statement="A deep MLP turns the subject that the task heads bring into its answer, as a function would.",
)
def function_application(context: Context) -> Result:
    """The MLP that adds most to the answer reads the mean stream and, once, what the task heads say of one subject.

    How often the right answer is then ahead of the task's other answers, against the same with another subject in its
    place and the mean stream alone. Our design; it holds where both differences are above two standard errors over the
    facts of every prompt. The rows show other sizes, the subject's word (its unembedding), and its real stream.
    """
    specimen = context.specimen
    rows, said, acts = [], [], []
    for one in _recalled(context):
        path, layer = _path(context, one, slice(None)), answering_layer(one.numbers)
        found = applied(specimen, one, path)
        said.append(told(one.task, found, layer))
        acts.append(is_function(found, layer, "heads"))
        mean = {name: values[layer] for name, values in summary(found).items()}
        for number, direction in enumerate(DIRECTIONS):
            for column, alpha in enumerate(ALPHAS):
                row = {"task": one.task.prompt, "layer": layer, "direction": direction, "alpha": alpha}
                rows.append(row | {name: float(values[number, column]) for name, values in mean.items()})
    if not any(row["direction"] == "heads" and row["applied first"] >= 0 for row in rows):
        raise NotApplicable("no head that lowers the metric writes before the MLP that answers")
    return Result(Verdict.of(all(acts)), " ".join(said), rows)


@claim(
    "factual-recall/last-layer-suppression",
    method="factual-recall",
    paper=_PAPER,
    statement="The last layer's MLP lowers the logit of right answers, and turning it down raises p(answer).",
)
def last_layer_suppression(context: Context) -> Result:
    """The change is chosen on every other fact and reported on the rest."""
    specimen = context.specimen
    found = _recalled(context)
    last = last_mlp(specimen)
    facts = [fact for one in found for fact in one.task.facts]
    adds = torch.cat(
        [one.attribution.logits(one.states.mlp[last], one.task.answers) for one in found]
    )  # the answer's logit
    changes = fixes(frequent_direction(specimen, specimen.lens))
    chosen, reported = (answer_probabilities(specimen, some, changes) for some in (facts[::2], facts[1::2]))
    best = int(chosen.mean(1).argmax())
    gain, error = _mean_and_error(reported[best] - reported[0])
    pull, pull_error = _mean_and_error(adds)
    holds = pull < -2 * pull_error and best > 0 and gain > 0
    rows = [
        {"change": name, "p(answer), chosen on": float(a), "p(answer), reported on": float(b)}
        for name, a, b in zip(changes, chosen.mean(1), reported.mean(1), strict=True)
    ]
    return Result(
        Verdict.of(holds),
        f"The last MLP (layer {last}) adds {pull:+.2f} ± {pull_error:.2f} to the answer's logit, on {len(facts)} known "
        f"facts{'' if pull < 0 else ': no suppression was found'}. The best change on one half, {list(changes)[best]}, "
        f"changes p(answer) on the other by {gain:+.4f} ± {error:.4f}.",
        rows,
    )


def _recalled(context: Context) -> list[Recall]:
    """What every prompt's facts show, once for all claims."""
    if "factual-recall" not in context.shared:
        specimen = context.specimen
        specimen.require_causal()
        context.shared["factual-recall"] = [recall(specimen, task) for task in tasks_of(specimen, _TASKS, _FACTS)]
    return context.shared["factual-recall"]


def _top_head(context: Context, one: Recall) -> tuple[int, int, float]:
    """Layer and number of the head whose patch lowers the metric most on every other fact, and by how many percent."""
    scores = _path(context, one, slice(None, None, 2))
    if scores.isnan().all():
        raise NotApplicable("the model has no attention left")
    layer, head = divmod(int(scores.nan_to_num(torch.inf).argmin()), scores.shape[1])
    return layer, head, float(scores[layer, head])


def _path(context: Context, one: Recall, facts: slice) -> Tensor:
    """Change of the metric in percent when each head is patched, over some of the facts (L x most heads)."""
    key = f"factual-recall {one.task.prompt}"
    if key not in context.shared:
        metric = answer_metric(one.task, "difference")
        new = senders_of(one.states, one.task.other, "mean")
        patched, _ = path_patched(context.specimen, one.task, one.states, new, metric)
        context.shared[key] = patched, metric(one.states.logits, torch.arange(len(one.task.facts)))
    patched, original = context.shared[key]
    return percent(patched[..., facts], original[facts])


def _without(head: int, size: int) -> Any:
    def change(x: Tensor) -> Tensor:
        entries = torch.arange(x.shape[-1], device=x.device) // size
        return x.masked_fill(entries == head, 0)

    return change


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
