"""What heads and MLPs do at the last token of one task's prompts, layer by layer.

After Lv et al., arXiv:2403.19521; what is our own design is named so where it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Specimen
from .contributions import Attribution, head_outputs
from .last_token import States, Task, states_of
from .mlp_split import Split, split

# name -> (whether it is one number a head, or a layer; unit; what it is)
MEASURED = {
    "direct": (True, "logit", "what the head adds to the answer's logit, above the mean token"),
    "attention direct": (False, "logit", "what attention as a whole adds to it, with its bias"),
    "mlp direct": (False, "logit", "what the MLP adds to it"),
    "reading": (True, "correlation", "attention to the subject, with the output along the subject's unembedding"),
    "looking": (True, "share", "mean attention from the last token to the subject's last"),
    "in stream": (True, "", "1 + w: share of the head's output left behind the MLP (parallel: of the layer before)"),
    "explained": (False, "share", "R² of the split of the MLP's output"),
    "condition": (False, "", "condition number of the split's system"),
    "heads logit": (False, "logit", "what the heads' part of the MLP's output adds to the answer's logit"),
    "stream logit": (False, "logit", "what the incoming stream's part adds to it"),
    "component logit": (False, "logit", "what the part that is the same for all subjects adds to it: c"),
    "own logit": (False, "logit", "what all that comes from neither heads nor stream adds to it: c + e"),
    "own cosine": (False, "cosine", "of c + e, normed, with the answer's unembedding less the mean"),
    "own raises": (False, "share", "of the facts whose answer's logit c + e raises"),
    "heads raise": (False, "share", "of the facts whose answer's logit the heads' part raises"),
}


@dataclass(frozen=True)
class Recall:
    """numbers: the quantities of MEASURED, mean over the facts (L, or L x most heads), NaN where there is none.

    splits: the MLPs' outputs split, by layer.
    """

    task: Task
    states: States
    attribution: Attribution
    numbers: dict[str, Tensor]
    splits: dict[int, Split]


def recall(specimen: Specimen, task: Task, ridge: float = 1e-3) -> Recall:
    """Measure one task. ridge: of the split. Raises NotApplicable for encoders and post-norm models."""
    lens, states = specimen.lens, states_of(specimen, task)
    layers = specimen.layers
    most = max((x.shape[1] for x in states.looking.values()), default=0)
    numbers = {
        name: torch.full((layers, most) if by_head else (layers,), torch.nan, dtype=torch.float64)
        for name, (by_head, _, _) in MEASURED.items()
    }
    attribution = Attribution(lens, states.residual[layers])
    subjects = torch.stack([prompt[at] for prompt, at in zip(task.prompts, task.subjects.tolist(), strict=True)])
    written: dict[int, Tensor] = {}
    splits: dict[int, Split] = {}
    for layer, block in enumerate(specimen.anatomy.blocks):
        if layer in states.heads:
            parts = written[layer] = head_outputs(block, states.heads[layer], states.attention[layer])
            looking, heads = states.looking[layer], slice(0, parts.shape[1])
            numbers["direct"][layer, heads] = attribution.logits(parts, task.answers).mean(0)
            numbers["looking"][layer, heads] = looking.mean(0)
            numbers["reading"][layer, heads] = correlation(looking, attribution.logits(parts, subjects))
            numbers["attention direct"][layer] = attribution.logits(states.attention[layer], task.answers).mean()
        if layer not in states.mlp:
            continue
        numbers["mlp direct"][layer] = attribution.logits(states.mlp[layer], task.answers).mean()
        read = layer - 1 if block.parallel else layer  # a parallel MLP does not see the heads of its own block
        if read in written and (states.mlp[layer] != states.mlp[layer][0]).any():
            splits[layer] = split(states.mlp[layer], written[read], states.residual[read], ridge)
            for name, value in _split_numbers(
                splits[layer], written[read], states.residual[read], attribution, task.answers
            ).items():
                numbers[name][(layer, slice(0, len(value))) if value.dim() else layer] = value
    return Recall(task, states, attribution, numbers, splits)


def answering_layer(numbers: Mapping[str, Tensor]) -> int:
    """The layer whose MLP adds most to the answer by itself; where no output could be split, the most at all."""
    own = numbers["own logit"]
    added = numbers["mlp direct"] if own.isnan().all() else own
    return int(added.nan_to_num(-torch.inf).argmax())


def _split_numbers(
    found: Split, heads: Tensor, stream: Tensor, attribution: Attribution, answers: Tensor
) -> dict[str, Tensor]:
    own = found.component + found.left
    from_heads = attribution.logits(torch.einsum("h,nhd->nd", found.weights, heads), answers)
    from_own = attribution.logits(own, answers)
    cosine = torch.nn.functional.cosine_similarity(attribution.normed(own), attribution.rows(answers), dim=-1)
    return {
        "in stream": found.in_stream,
        "explained": torch.tensor(found.explained),
        "condition": torch.tensor(found.condition),
        "heads logit": from_heads.mean(),
        "stream logit": attribution.logits(found.stream * stream, answers).mean(),
        "component logit": attribution.logits(found.component.expand_as(own), answers).mean(),
        "own logit": from_own.mean(),
        "own cosine": cosine.mean(),
        "own raises": (from_own > 0).double().mean(),
        "heads raise": (from_heads > 0).double().mean(),
    }


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation over the first axis, NaN where one of the two is constant."""
    x, y = x - x.mean(0), y - y.mean(0)
    spread = (x.square().sum(0) * y.square().sum(0)).sqrt()
    return torch.where(spread > 1e-12, (x * y).sum(0) / spread, torch.nan)
