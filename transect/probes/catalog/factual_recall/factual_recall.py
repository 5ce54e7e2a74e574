"""How facts get from the subject to the answer: heads that carry, MLPs that add, and a last layer that may pull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ....data import Specimen
from ....parameters import Range
from ...draw import Drawing, Table, bars, heatmap, lines
from ...registry import probing
from ...result import Quantity, Result
from .application import ALPHAS, DIRECTIONS, SUMMARY, Application, applied, summary, told
from .last_layer import answer_probabilities, fixes, frequent_direction, last_mlp
from .last_token import Task, tasks_of
from .mlp_split import TRUSTED
from .path_patching import Metric, Variant, answer_metric, path_patched, percent, senders_of
from .recall import MEASURED, Recall, answering_layer, recall

_TOP = 5  # tokens shown of what a component says


@dataclass(frozen=True)
class Followed:
    """One task. heads (L x most heads), mlps (L): change of the metric in percent when each is patched."""

    recall: Recall
    heads: Tensor
    mlps: Tensor
    application: Application


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    task = result.label("task", 1)[0]
    numbers = {name: result[name][0] for name in (*MEASURED, "path")}
    probability = result["probability"]
    at = 0, slice(None), DIRECTIONS.index("heads"), ALPHAS.index(1.0)
    numbers |= {name: result[name][at] for name in ("applied first", "control first")}
    columns = ("explained", "condition", "heads logit", "stream logit", "component logit", "own logit",
               "applied first", "control first")  # fmt: skip
    rows = [
        [layer, *(f"{numbers[name][layer]:.3g}" for name in columns)] for layer in range(len(numbers["explained"]))
    ]  # fmt: skip
    return [
        heatmap(
            f"What each head passes on: {task}", "Change of the metric in percent when a head says what it says for "
            "other subjects. Negative heads carry the fact.", numbers["path"], xlabel="head", ylabel="layer", unit="%",
            diverging=True,
        ),
        lines(
            f"The answer's logit, part by part: {task}", "What attention and the MLP of each layer add to it, above "
            "the mean token.", {"attention": numbers["attention direct"], "MLP": numbers["mlp direct"]},
            xlabel="layer", ylabel="logit",
        ),
        Table(
            f"MLP outputs split: {task}", "What an MLP adds to the answer's logit by passing on heads and stream, by "
            f"what it adds for every subject, and by all it adds itself. With R² below {TRUSTED} it fits badly. "
            "Applied to X: how often X's answer comes first, of the task's, when the MLP reads the mean stream and "
            "what the heads say of X, or of another.",
            ["layer", "R²", "condition", "from heads", "from the stream", "same for all", "its own", "applied to X",
             "to another"], rows,
        ),
        bars(
            "The last MLP turned down", "Mean probability of the answer. The choice is made on one half of the facts.",
            {half: probability[number] for number, half in enumerate(result.label("half", 2))},
            x=result.label("change", probability.shape[1]), xlabel="factor, or change", ylabel="probability",
        ),
    ]  # fmt: skip


@probing("factual-recall", title="How facts are recalled: heads and MLPs", paper="arXiv:2403.19521", draw=draw)
def factual_recall(
    specimen: Specimen,
    *,
    variant: Variant = "mean",
    metric: Metric = "difference",
    freeze_mlps: bool = False,
    tasks: Annotated[int, Range(1, 1000)] = 2,
    facts: Annotated[int, Range(8, 100000)] = 24,
    ridge: Annotated[float, Range(0, 1)] = 1e-3,
) -> Result:
    """Follow known facts at the last token: which heads bring the subject, which MLP adds the answer.

    A task is a prompt with several subjects whose answers the model knows; of an answer of several tokens, the first is
    looked at. Measured are direct logit attribution, path patching of each head and MLP to the logits, how a head's
    attention to the subject's last token goes with what it writes along that token's unembedding, each MLP's output
    split into what it passes on and its own, what MLPs make of a subject that is put into the mean stream (see
    `application`), and the pull of the last MLP towards frequent tokens. The split, the application and the repair of
    the last layer are our design: the paper's own formulas are not known to us. Costs about L (H + 1) forward passes
    a fact.

    variant: what a patched head says: mean, its mean over the subjects, as in the paper's code; or example, what it
        says for one other subject, with another answer.
    metric: of path patching: difference, the answer's logit less that of another subject's answer; or answer, its logit
        alone, which has no zero of its own.
    freeze_mlps: keep MLPs as they were, so that only the direct path to the logits counts.
    tasks: how many prompts, those with most facts.
    facts: how many facts of each at most, the first that the model knows.
    ridge: of the split, as a share of its mean diagonal.
    """
    specimen.require_causal()
    specimen.require_contributions()
    direction = frequent_direction(specimen, specimen.lens)
    found = [
        _followed(specimen, task, ridge, variant, metric, freeze_mlps)
        for task in specimen.shown(tasks_of(specimen, tasks, facts), "tasks")
    ]
    changes = fixes(direction)
    known = [fact for one in found for fact in one.recall.task.facts]
    answers = answer_probabilities(specimen, known, changes)
    halves = torch.stack([answers[:, half::2].mean(1) for half in (0, 1)])
    quantities = _by_task(found, variant)
    about = "of the answer, the last MLP changed"
    quantities["probability"] = Quantity(halves, ("half", "change"), "probability", about)
    last = last_mlp(specimen)
    if direction is not None:
        about = "of the last MLP's output with the direction of frequent tokens"
        cosines = [torch.cosine_similarity(one.recall.states.mlp[last], direction[None]).mean() for one in found]
        quantities["frequent cosine"] = Quantity(torch.stack(cosines), ("task",), "cosine", about)
    said = [line for one in found for line in _recalled(specimen, one)]
    said.append(_pulled([one.recall for one in found], halves, list(changes), last))
    labels = {
        "task": [one.recall.task.prompt for one in found], "change": list(changes),
        "half": ["chosen on", "reported on"], "direction": DIRECTIONS, "alpha": [f"{one:g}" for one in ALPHAS],
    }  # fmt: skip
    return Result(quantities, said, _caveats(specimen, direction, [one.recall for one in found]), labels)


def _followed(
    specimen: Specimen, task: Task, ridge: float, variant: Variant, metric: Metric, freeze_mlps: bool
) -> Followed:
    """Measure one task."""
    one, measured = recall(specimen, task, ridge), answer_metric(task, metric)
    new = senders_of(one.states, task.other, variant)
    patched = path_patched(specimen, task, one.states, new, measured, freeze_mlps=freeze_mlps)
    original = measured(one.states.logits, torch.arange(len(task.facts)))
    heads, mlps = (percent(part, original) for part in patched)
    return Followed(one, heads, mlps, applied(specimen, one, heads))


def _by_task(found: Sequence[Followed], variant: Variant) -> dict[str, Quantity]:
    """What was measured for every task."""
    axes = ("task", "layer")
    heads, mlps = (torch.stack([getattr(one, name) for one in found]) for name in ("heads", "mlps"))
    about = f"change of the metric, {variant} variant"
    quantities = {
        "path": Quantity(heads, (*axes, "head"), "%", f"{about}, when the head is patched"),
        "mlp path": Quantity(mlps, axes, "%", f"{about}, when the MLP is patched"),
    }
    for name, (each_head, unit, meaning) in MEASURED.items():
        values = torch.stack([one.recall.numbers[name] for one in found])
        quantities[name] = Quantity(values, (*axes, "head") if each_head else axes, unit, meaning)
    made = [summary(one.application) for one in found]
    for name, (unit, about) in SUMMARY.items():
        values = torch.stack([one[name] for one in made])
        quantities[name] = Quantity(values, (*axes, "direction", "alpha"), unit, about)
    return quantities


def _recalled(specimen: Specimen, found: Followed) -> list[str]:
    """What the numbers of one task say."""
    one = found.recall
    lines = [*_carried(one, found.heads), *_added(specimen, one)]
    return [*lines, told(one.task, found.application, answering_layer(one.numbers))]


def _carried(one: Recall, path: Tensor) -> list[str]:
    """Which head brings the subject, if the model has any."""
    task, numbers = one.task, one.numbers
    said = []
    if not path.isnan().all():
        place = int(path.nan_to_num(torch.inf).argmin())
        layer, head = divmod(place, path.shape[1])
        reading = float(numbers["reading"][layer, head])
        said.append(
            f'"{task.prompt}", {len(task.facts)} facts: patching head {layer}.{head} (layer.head) lowers the metric '
            f"most, by {-float(path[layer, head]):.1f} %. It puts {float(numbers['looking'][layer, head]):.0%} of its "
            "attention on the subject's last token, and that share "
            + (f"correlates with what it writes of it by {reading:+.2f}." if reading == reading else "is constant.")
            if path[layer, head] < 0
            else f'"{task.prompt}", {len(task.facts)} facts: none of its heads lowers the metric when patched.'
        )
    return said


def _added(specimen: Specimen, one: Recall) -> list[str]:
    """Which MLP adds the answer, and what it leaves of its heads' outputs, if there is a split to tell."""
    if not one.splits:
        return []
    task, numbers, layer = one.task, one.numbers, answering_layer(one.numbers)
    found = one.splits[layer]
    tokens = map(specimen.token, one.attribution.top(found.component, _TOP))
    named = [f"head {head} x {found.in_stream[head]:.2f} ({name})" for head, name in enumerate(found.names()) if name]
    if named:
        left = "leaves of its heads' outputs: " + ", ".join(named[:8])
    elif found.explained >= TRUSTED:
        left = "neither erases nor amplifies a head"
    else:
        left = (
            f"is not a sum of what it read: the split explains {found.explained:.0%} of it, too little to call a head "
            "erased or amplified"
        )
    return [
        f'"{task.prompt}": the MLP of layer {layer} adds most to the answer by itself: '
        f"{numbers['own logit'][layer]:+.2f} logits (what it passes on of the heads: "
        f"{numbers['heads logit'][layer]:+.2f}). What it adds for every subject alike reads as "
        f"{', '.join(map(repr, tokens))}.",
        f'"{task.prompt}": the MLP of layer {layer} {left}.',
    ]


def _pulled(found: Sequence[Recall], halves: Tensor, names: Sequence[str], last: int) -> str:
    """Whether the last MLP suppresses the answers, and what turning it down does on the other half of the facts."""
    counts = torch.tensor([len(one.task.facts) for one in found]).double()
    adds = torch.stack([one.numbers["mlp direct"][last] for one in found])
    pull = float((adds * counts).sum() / counts.sum())
    best = int(halves[0].argmax())
    swept = (
        f"The change of it that is best on one half of the facts is {names[best]}: on the other half, the mean "
        f"probability of the answer goes from {halves[1, 0]:.3f} to {halves[1, best]:.3f}."
        if best
        else "On one half of the facts no change of it was better than none."
    )
    if pull >= 0:
        return f"No suppression was found: the last MLP (layer {last}) adds {pull:+.2f} to the answer's logit. {swept}"
    return (
        f"The last MLP (layer {last}) takes {-pull:.2f} from the answer's logit: it suppresses right answers. {swept}"
    )


def _caveats(specimen: Specimen, direction: Tensor | None, found: Sequence[Recall]) -> list[str]:
    said = [
        "Patching acts at the last token alone: what heads do at the subject's own token is not seen.",
        "Only facts that the model completes correctly were looked at.",
        "Logits are counted from the mean over the vocabulary, at the final norm's scale for the full stream.",
        "A mean stream with one subject's direction in it is no state that the model ever reaches. That an MLP fails "
        "on it does not show that it is no function of the subject: it may read the subject in another direction.",
    ]
    if specimen.lens.softcap is not None:
        said.append("Direct contributions are to the logits before the model's softcap.")
    if direction is None:
        said.append("Without text there are no token frequencies, so the frequent direction was not looked at.")
    if any(specimen.continuation(fact.text, fact.answer).numel() > 1 for one in found for fact in one.task.facts):
        said.append("Some answers have several tokens; of these, contributions and patching look at the first.")
    return said
