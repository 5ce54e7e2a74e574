"""How facts get from the subject to the answer: heads that carry, MLPs that add, and a last layer that may pull."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...activations import Specimen
from ...parameters import Range
from ..draw import Drawing, Table, bars, heatmap, lines
from ..last_layer import answer_probabilities, fixes, frequent_direction, last_mlp
from ..last_token import tasks_of
from ..mlp_split import TRUSTED
from ..path_patching import answer_metric, path_patched, percent, senders_of
from ..recall import MEASURED, Recall, recall
from ..registry import probing
from ..result import Quantity, Result

_TOP = 5  # tokens shown of what a component says


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    task = result.label("task", 1)[0]
    numbers = {name: result[name][0] for name in (*MEASURED, "path")}
    probability = result["probability"]
    columns = ("explained", "condition", "heads logit", "stream logit", "component logit", "own logit")
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
            f"what it adds for every subject, and by all it adds itself. With R² below {TRUSTED} it fits badly.",
            ["layer", "R²", "condition", "from heads", "from the stream", "same for all", "its own"], rows,
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
    variant: Literal["mean", "example"] = "mean",
    metric: Literal["difference", "answer"] = "difference",
    freeze_mlps: bool = False,
    tasks: Annotated[int, Range(1, 1000)] = 2,
    facts: Annotated[int, Range(8, 100000)] = 24,
    ridge: Annotated[float, Range(0, 1)] = 1e-3,
) -> Result:
    """Follow known facts at the last token: which heads bring the subject, which MLP adds the answer.

    A task is a prompt with several subjects whose answers the model knows; of an answer of several tokens, the first is
    looked at. Measured are direct logit attribution, path patching of each head and MLP to the logits, how a head's
    attention to the subject's last token goes with what it writes along that token's unembedding, each MLP's output
    split into what it passes on and its own, and the pull of the last MLP towards frequent tokens. The split and the
    repair of the last layer are our design: the paper's own formulas are not known to us. Costs about L (H + 1) forward
    passes a fact.

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
    found, heads, mlps = [], [], []
    for task in specimen.shown(tasks_of(specimen, tasks, facts), "tasks"):
        found.append(recall(specimen, task, ridge))
        states, measured = found[-1].states, answer_metric(task, metric)
        new = senders_of(states, task.other, variant)
        patched = path_patched(specimen, task, states, new, measured, freeze_mlps=freeze_mlps)
        original = measured(states.logits, torch.arange(len(task.facts)))
        heads.append(percent(patched[0], original))
        mlps.append(percent(patched[1], original))
    axes = ("task", "layer")
    about = f"change of the metric, {variant} variant"
    quantities = {
        "path": Quantity(torch.stack(heads), (*axes, "head"), "%", f"{about}, when the head is patched"),
        "mlp path": Quantity(torch.stack(mlps), axes, "%", f"{about}, when the MLP is patched"),
    }
    for name, (each_head, unit, meaning) in MEASURED.items():
        values = torch.stack([one.numbers[name] for one in found])
        quantities[name] = Quantity(values, (*axes, "head") if each_head else axes, unit, meaning)
    changes = fixes(direction)
    known = [fact for one in found for fact in one.task.facts]
    answers = answer_probabilities(specimen, known, changes)
    halves = torch.stack([answers[:, half::2].mean(1) for half in (0, 1)])
    quantities["probability"] = Quantity(
        halves, ("half", "change"), "probability", "of the answer, the last MLP changed"
    )
    last = last_mlp(specimen)
    if direction is not None:
        cosines = [torch.cosine_similarity(one.states.mlp[last], direction[None]).mean() for one in found]
        quantities["frequent cosine"] = Quantity(
            torch.stack(cosines), ("task",), "cosine", "of the last MLP's output with the direction of frequent tokens"
        )
    said = [line for number, one in enumerate(found) for line in _recalled(specimen, one, heads[number])]
    said.append(_pulled(found, halves, list(changes), last))
    labels = {"task": [one.task.prompt for one in found], "change": list(changes), "half": ["chosen on", "reported on"]}
    return Result(quantities, said, _caveats(specimen, direction, found), labels)


def _recalled(specimen: Specimen, one: Recall, path: Tensor) -> list[str]:
    """What the numbers of one task say."""
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
    if one.splits:
        layer = int(numbers["own logit"].nan_to_num(-torch.inf).argmax())
        found = one.splits[layer]
        tokens = map(specimen.token, one.attribution.top(found.component, _TOP))
        said.append(
            f'"{task.prompt}": the MLP of layer {layer} adds most to the answer by itself: '
            f"{numbers['own logit'][layer]:+.2f} logits (what it passes on of the heads: "
            f"{numbers['heads logit'][layer]:+.2f}). What it adds for every subject alike "
            f"reads as {', '.join(map(repr, tokens))}."
        )
        named = [(number, name) for number, name in enumerate(found.names()) if name]
        said.append(
            f'"{task.prompt}": the MLP of layer {layer} '
            + (
                "leaves of its heads' outputs: "
                + ", ".join(f"head {head} x {found.in_stream[head]:.2f} ({name})" for head, name in named[:8])
                if named
                else "neither erases nor amplifies a head"
                if found.explained >= TRUSTED
                else f"is not a sum of what it read: the split explains {found.explained:.0%} of it, too little to "
                "call a head erased or amplified"
            )
            + "."
        )
    return said


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
    ]
    if specimen.lens.softcap is not None:
        said.append("Direct contributions are to the logits before the model's softcap.")
    if direction is None:
        said.append("Without text there are no token frequencies, so the frequent direction was not looked at.")
    if any(specimen.continuation(fact.text, fact.answer).numel() > 1 for one in found for fact in one.task.facts):
        said.append("Some answers have several tokens; of these, contributions and patching look at the first.")
    return said
