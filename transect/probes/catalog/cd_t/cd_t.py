"""Which words and heads an output comes from, by contextual decomposition (Hsu et al. 2024, arXiv:2407.00886)."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable
from ....forward import next_logits
from ....parameters import Range
from ...draw import Drawing, Table, heatmap, lines
from ...registry import probing
from ...result import Quantity, Result
from .circuits import direction_to, mean_heads, require_heads, scores_on_everything, scores_on_logits
from .decomposition import Decomposition, Pattern
from .faithfulness import faithfulness


def draw(result: Result) -> list[Drawing]:
    """Words, heads, and what the circuit does alone."""
    words, tokens = result["words"], result.labels["token"]
    length = words.shape[1]
    rows = [
        [tokens[prompt * length + t] for t in range(length)] + [result.labels["answer"][prompt]]
        for prompt in range(len(words))
    ]
    told = [
        [" ".join(f"{token} ({value:+.2f})" for token, value in zip(row, values, strict=False)), row[-1]]
        for row, values in zip(rows, words.tolist(), strict=True)
    ]
    return [
        Table("What each word adds", "In brackets the part of the answer's logit that comes of the word.",
              ["prompt", "answer"], told),
        heatmap("What each head adds to the answer's logit", "Mean of the absolute part over prompts and positions.",
                result["heads"], xlabel="head", ylabel="block", unit="logits"),
        lines("The circuit alone", "Share of the whole model's answer logit (from all heads at their mean, 0, to none, "
              "1) that is left where only some heads speak, against random sets of as many.",
              {"circuit": result["faithfulness"], "random": result["random"]}, x=result["sizes"].tolist(),
              xlabel="heads kept, by position", ylabel="share recovered"),
    ]  # fmt: skip


@probing("cd-t", title="Contextual decomposition", paper="arXiv:2407.00886", draw=draw)
def cd_t(
    specimen: Specimen,
    *,
    prompts: Annotated[int, Range(1, 1000)] = 8,
    length: Annotated[int, Range(2, 512)] = 12,
    most: Annotated[int, Range(1, 1000)] = 8,
    threshold: Annotated[float, Range(0, 1)] = 0.1,
    pruned: Annotated[int, Range(0, 100000)] = 8,
    pattern: Pattern = "recomputed",
) -> Result:
    """Which words and heads the model's answer comes from, and whether the heads that are found do the task alone.

    A head's source is what it says beyond its mean over the prompts at that position. The answer is that of the facts,
    where there are any, and else the model's own next token. The circuit is grown on the first prompt. Heads that it
    does better without, on the first half of the prompts, are dropped again, but none that the search found on the
    answer itself. It is judged on the other half; random sets of as many nodes are the control.

    Unless another is named, defaults are ours.

    prompts: how many, of one length.
    length: of the prompts that are cut from the text, where there are no facts.
    most: heads that one round of the search adds at most, doubled from 1 on. The authors' demonstration adds 2.
    threshold: share of the round's best score that a head needs. The authors have none.
    pruned: heads that are dropped again at most; every one of them costs a pass for each head that is left. The authors
        go on as long as it helps.
    pattern: attention weights of a part: of its own queries and keys, the authors' way with GPT, or those of the whole,
        their way with BERT.
    """
    require_heads(specimen)
    ids, answers = prompts_of(specimen, prompts, length)
    means = mean_heads(specimen, ids) if len(ids) > 1 else None
    made = [Decomposition(specimen, row, pattern) for row in ids]
    words, heads, recovered, random, sizes = [], [], torch.zeros(0), torch.zeros(0), torch.zeros(0)
    for one, answer in zip(specimen.shown(made, "cd-t"), answers, strict=True):
        words.append(one.words(torch.eye(len(one.ids), dtype=torch.bool)).logits[:, answer].float().cpu())
        direction = direction_to(answer, len(one.logits))
        if one is made[0] and means is not None:
            scores, shares = scores_on_everything(one, direction, means)
            recovered, random, sizes = faithfulness(
                specimen, one.nodes, scores, shares, ids, answers, means, most, threshold, pruned
            )
        else:
            scores = scores_on_logits(one, one.nodes, direction, means)
        heads.append(_by_head(one, scores))
    quantities = {
        "words": Quantity(torch.stack(words), ("prompt", "position"), "logits", "part of the answer from each word"),
        "heads": Quantity(torch.stack(heads).mean(0), ("layer", "head"), "logits", "mean absolute part from each head"),
        "faithfulness": Quantity(recovered, ("size",), "share", "answer logit recovered by the circuit alone"),
        "random": Quantity(random, ("size",), "share", "the same for random circuits, mean"),
        "sizes": Quantity(sizes, ("size",), "nodes", "size of the circuit"),
    }
    labels = {
        "token": [specimen.token(int(token)) for row in ids for token in row],
        "answer": [specimen.token(answer) for answer in answers],
    }
    return Result(quantities, _findings(quantities), _caveats(made[0], pattern), labels)


def _findings(quantities: dict[str, Quantity]) -> list[str]:
    """Which head moves the answer most, whether one word gives it, and what the circuit does alone."""
    words, heads = quantities["words"].values, quantities["heads"].values
    recovered, random, sizes = (quantities[name].values for name in ("faithfulness", "random", "sizes"))
    block, head = divmod(int(heads.flatten().argmax()), heads.shape[1])
    findings = [
        f"Over {len(words)} prompts of {words.shape[1]} tokens, head {head} of block {block} moves the answer most, "
        f"by {float(heads.max()):.2f} a prompt and position; the median head by {float(heads.median()):.2f}.",
        f"The strongest word of a prompt gives {_share_of_best(words):.0%} of what all its words give.",
    ]
    if len(recovered):
        findings.append(
            f"The search left {int(sizes[-1])} heads by position; with all others at their mean they recover "
            f"{float(recovered[-1]):.0%} of the answer's logit on other prompts, and random sets of as many "
            f"{float(random[-1]):.0%}."
        )
    return findings


def _caveats(made: Decomposition, pattern: Pattern) -> list[str]:
    fixed = " This model has norms on queries and keys, so they are fixed." if made.pattern != pattern else ""
    return [
        "Parts follow from the rules of this decomposition; other rules give other parts, and in a nonlinear model "
        "they do not add up over sources.",
        f"Attention weights of a part: {made.pattern}.{fixed}",
        "Means are taken over prompts of one length, position by position; with few prompts they are rough.",
    ]


def prompts_of(specimen: Specimen, count: int, length: int) -> tuple[Tensor, list[int]]:
    """Prompts of one length (N x T) and the token to account for in each."""
    if specimen.known_facts and specimen.tokenizer is not None:
        pairs = [
            (specimen.encode(fact.text), int(specimen.continuation(fact.text, fact.answer)[0]))
            for fact in specimen.facts[: 8 * count]
        ]
        usual, _ = Counter(len(ids) for ids, _ in pairs).most_common(1)[0]
        chosen = [(ids, answer) for ids, answer in pairs if len(ids) == usual][:count]
        return torch.stack([ids for ids, _ in chosen]), [answer for _, answer in chosen]
    ids = specimen.sequences(count, length)
    if len(ids) == 0:
        raise NotApplicable("it needs facts, or text")
    return ids, next_logits(specimen.model, list(ids)).argmax(-1).tolist()


def _by_head(made: Decomposition, scores: Tensor) -> Tensor:
    """Mean absolute score of each head over positions (layers x heads)."""
    layers = 1 + max(layer for layer, _, _ in made.nodes)
    heads = 1 + max(head for _, _, head in made.nodes)
    table, length = torch.zeros(layers, heads), len(made.ids)
    for (layer, _, head), score in zip(made.nodes, scores.abs().tolist(), strict=True):
        table[layer, head] += score / length
    return table


def _share_of_best(words: Tensor) -> float:
    return float((words.abs().max(1).values / words.abs().sum(1).clamp_min(1e-30)).mean())
