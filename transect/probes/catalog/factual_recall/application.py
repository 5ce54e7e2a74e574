"""An MLP applied to a subject: does it turn what the stream says of X into the answer for X, as a function would?

Lv et al., arXiv:2403.19521, describe a deep MLP as such a function (get_capital). This way to ask is our design. At
the last token of a task's prompts the stream that an MLP reads is replaced by its mean over the subjects plus alpha
times a direction that names one subject, X, and the MLP's output is read by the unembedding. The MLP runs in the
user's own model, behind its own norm: in a pass over one token, each block is given its artificial stream, and its
attention adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ....data import Specimen
from ....forward import changed, watch
from .contributions import head_outputs
from .last_token import States, Task
from .path_patching import at_the_end
from .recall import Recall

ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0)  # 0 is the mean stream alone
DIRECTIONS = ("word", "heads", "stream")
HEADS = 3  # task heads whose outputs make one direction
# name -> (unit; what it is)
SUMMARY = {
    "applied rank": ("place", "of the right answer in the vocabulary, the MLP applied to its subject: median"),
    "applied first": ("share", "of the subjects whose answer is ahead of the task's others, the MLP applied to them"),
    "control rank": ("place", "of the right answer, the MLP applied to another subject: median"),
    "control first": ("share", "of the subjects whose answer is ahead, the MLP applied to others"),
}
_TOKENS = 2048  # in one forward pass

Streams = Mapping[int, Tensor]


@dataclass(frozen=True)
class Application:
    """What the MLP of each layer makes of each subject (L x directions x alphas x N); NaN where there is none.

    rank: place of the right answer in the vocabulary, 1 for the first. first: 1 where it is ahead of the task's
    other answers, else 0. other_rank, other_first: of the same answer, when the direction is that of a subject with
    another one.
    """

    rank: Tensor
    first: Tensor
    other_rank: Tensor
    other_first: Tensor


@torch.no_grad()
def applied(specimen: Specimen, one: Recall, path: Tensor) -> Application:
    """Apply every layer's MLP to every subject of a task.

    path: what patching each head does to the metric (L x heads), which names the task heads.
    Raises NotApplicable for post-norm models.
    """
    specimen.require_contributions()
    task, mean = one.task, read_by_mlps(specimen, one.states)
    count, tries = len(task.facts), len(DIRECTIONS) * len(ALPHAS)
    named = {"stream": {layer: x - x.mean(0) for layer, x in mean.items()}}
    named["word"] = words(one, named["stream"])
    named["heads"] = heads(specimen, one, path)
    made: dict[int, Tensor] = {}  # what the MLP of each layer adds (N x tries x d), NaN where it has nothing to read
    for place, (name, alpha) in enumerate(product(DIRECTIONS, ALPHAS)):
        streams = {layer: mean[layer].mean(0) + alpha * x for layer, x in named[name].items()}
        for layer, output in outputs(specimen, task, one.states, streams).items():
            if layer not in made:
                made[layer] = output.new_full((count, tries, output.shape[1]), torch.nan)
            made[layer][:, place] = output
    found = torch.full((4, specimen.layers, tries, count), torch.nan, dtype=torch.float64)
    answers, order = task.answers.unique(return_inverse=True)
    # Two questions of every try: where the subject's own answer is, and where that is with another subject's output.
    numbers = torch.arange(count)
    rows, asked = torch.cat([numbers, task.other])[:, None] * tries + torch.arange(tries), task.answers.repeat(2)
    for layer, output in made.items():
        ranks = one.attribution.ranks(output, asked.repeat_interleave(tries), rows.flatten()).double()
        best = (one.attribution.normed(output) @ one.attribution.rows(answers).T).argmax(-1)  # N x tries
        own, other = ranks.view(2, count, tries)
        values = (own, best == order[:, None], other, best[task.other] == order[:, None])
        given = ~output.isnan().any(-1).any(0)  # tries
        found[:, layer, given] = torch.stack([x.double().T for x in values])[:, given]
    rank, first, other_rank, other_first = found.unflatten(2, (len(DIRECTIONS), len(ALPHAS)))
    return Application(rank, first, other_rank, other_first)


def read_by_mlps(specimen: Specimen, states: States) -> dict[int, Tensor]:
    """The stream (N x d) that the MLP of each layer reads, before the norm."""
    streams = {}
    for layer, block in enumerate(specimen.anatomy.blocks):
        if layer in states.mlp:
            seen = not block.parallel and layer in states.attention
            streams[layer] = states.residual[layer] + states.attention[layer] if seen else states.residual[layer]
    return streams


def words(one: Recall, spread: Streams) -> dict[int, Tensor]:
    """The unembedding of each subject's last token, as long as streams are from their mean (root mean square)."""
    task = one.task
    tokens = torch.stack([ids[at] for ids, at in zip(task.prompts, task.subjects.tolist(), strict=True)])
    unit = torch.nn.functional.normalize(one.attribution.directions(tokens), dim=1)
    return {layer: unit * x.square().sum(1).mean().sqrt() for layer, x in spread.items()}


def heads(specimen: Specimen, one: Recall, path: Tensor) -> dict[int, Tensor]:
    """What the task heads say of each subject beyond their mean over subjects (N x d), for MLPs that read them.

    Task heads are the first three by path patching, of those that lower the metric.
    """
    blocks = specimen.anatomy.blocks
    order = path.flatten().nan_to_num(torch.inf).argsort()[:HEADS]
    chosen = [divmod(int(place), path.shape[1]) for place in order if path.flatten()[place] < 0]
    said = {}
    for layer, head in chosen:
        parts = head_outputs(blocks[layer], one.states.heads[layer], one.states.attention[layer])[:, head]
        said[layer] = said.get(layer, 0) + parts - parts.mean(0)
    found = {}
    for layer in one.states.mlp:
        last = layer - 1 if blocks[layer].parallel else layer
        before = [x for other, x in said.items() if other <= last]
        if before:
            found[layer] = torch.stack(before).sum(0)
    return found


def outputs(specimen: Specimen, task: Task, states: States, streams: Streams) -> dict[int, Tensor]:
    """What the MLP of each layer adds (N x d) when it reads these streams (N x d)."""
    model, found = specimen.model, {layer: [] for layer in streams}
    for start in range(0, len(task.prompts), _TOKENS):
        part = {layer: x[start : start + _TOKENS] for layer, x in streams.items()}
        changes = {("residual", layer): at_the_end(x) for layer, x in part.items()}
        changes |= {("attention", layer): torch.zeros_like for layer in part if layer in states.attention}
        rows = len(task.prompts[start : start + _TOKENS])
        ids = task.prompts[0][:1].expand(rows, 1).to(model.device)
        with changed(specimen.anatomy, changes), watch(specimen.anatomy, ["mlp"], list(part)) as seen:
            model.base_model(input_ids=ids, use_cache=False)
        for layer in part:
            found[layer].append(seen.mlp[layer][:, -1].double().cpu())
    return {layer: torch.cat(x) for layer, x in found.items()}


def summary(found: Application) -> dict[str, Tensor]:
    """As in SUMMARY, over the subjects (L x directions x alphas)."""
    ranks = (found.rank.median(-1).values, found.other_rank.median(-1).values)
    shares = (found.first.mean(-1), found.other_first.mean(-1))
    return dict(zip(SUMMARY, (ranks[0], shares[0], ranks[1], shares[1]), strict=True))


def is_function(found: Application, layer: int, direction: str) -> bool:
    """Whether the right answer comes first more often than with another subject and than from the mean alone.

    By more than two standard errors over the subjects, at the direction's own size. False where there is none.
    """
    number, once = DIRECTIONS.index(direction), ALPHAS.index(1.0)
    own = found.first[layer, number, once]
    controls = (found.other_first[layer, number, once], found.first[layer, number, 0])
    differences = [own - control for control in controls]
    return all(float(x.mean()) > 2 * float(x.std()) / len(x) ** 0.5 for x in differences)


def told(task: Task, found: Application, layer: int) -> str:
    """What a layer's MLP makes of the subjects of a task, in a sentence or two."""
    mean, once = {name: values[layer] for name, values in summary(found).items()}, ALPHAS.index(1.0)
    first, places = mean["applied first"], mean["applied rank"]
    if first.isnan().all():
        return f'"{task.prompt}": layer {layer} has no MLP to apply to a subject.'
    name = "heads" if first[DIRECTIONS.index("heads")].isfinite().all() else "word"
    number, word = DIRECTIONS.index(name), first[DIRECTIONS.index("word"), 1:]
    given = "what the task heads say of X" if name == "heads" else "the unembedding of X"
    acts = "acts" if is_function(found, layer, name) else "does not act"
    return (
        f'"{task.prompt}": read from the mean stream and {given}, the output of the MLP of layer {layer} puts the '
        f"right one of {len(task.answers.unique())} answers first for {float(first[number, once]):.0%} of the subjects "
        f"X (with another subject in X's place {float(mean['control first'][number, once]):.0%}, from the mean stream "
        f"alone {float(first[number, 0]):.0%}; median place in the vocabulary {float(places[number, once]):.0f}, alone "
        f"{float(places[number, 0]):.0f}): it {acts} as a function of the subject. From X's word it is at best "
        f"{float(word.max()):.0%}, at {ALPHAS[1 + int(word.argmax())]:g} times the length of what differs between "
        "subjects."
    )
