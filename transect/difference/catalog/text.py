"""What both models do with a text: their streams, their predictions, and where the second is worse or better."""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import NotApplicable
from ...forward import Batch, inputs_of, task_of, to_device, watch
from ...forward.objective import IGNORED, targets_of
from ...probes import Drawing, Result, Table
from ...probes.draw import lines
from ...probes.result import Quantity
from ..pair import Pair
from ..registry import comparing

_SHOWN = 12  # predictions of each kind
_BEFORE = 12  # tokens that are shown before one


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    drawn: list[Drawing] = [
        lines(
            "Distance of the streams", "Length of the difference over the length of the first's stream, behind each of "
            "the second's blocks (0: the embedding).",
            {"distance": result["distance"], "1 - cosine": 1 - result["cosine"]},
            xlabel="layer", ylabel="share",
        )
    ]  # fmt: skip
    for kind, title in (("worse", "Where the second is worse"), ("better", "Where it is better")):
        if kind in result.quantities and len(result[kind]):
            texts = result.label(f"{kind} token", len(result[kind]))
            rows = [(text, *map(float, pair)) for text, pair in zip(texts, result[kind], strict=True)]
            drawn.append(
                Table(title, "Nats of single predictions.", ("text, then what came next", "first", "second"), rows)
            )
    return drawn


@comparing("text", title="What they do with a text", draw=draw)
def text(pair: Pair) -> Result:
    """How far the streams are apart layer by layer, and the predictions: divergence, agreement, and single tokens.

    Both models read the same text, on which nothing depends on labels but the losses. KL(first || second) is in nats a
    prediction, agreement the share of positions with the same most likely token.
    """
    pair.require_causal()
    if task_of(pair.model) != "causal":
        raise NotApplicable("it compares predictions of next tokens")
    layers = {number + 1: origin + 1 for number, origin in pair.blocks.items()} | {0: 0}
    sums = torch.zeros(len(layers), 3, dtype=torch.float64)  # |difference|², |first|², cosine
    totals = torch.zeros(4, dtype=torch.float64)  # KL, agreement, both losses
    count, positions = 0, 0
    worse: list[Any] = []  # how much, a number that no other has, the text, and both models' nats
    better: list[Any] = []
    for batch in pair.shown(list(pair.text), "text"):
        with torch.no_grad(), watch(pair.anatomy, ["residual"]) as first:
            ours = _logits(pair.model, batch)
        with torch.no_grad(), watch(pair.other.anatomy, ["residual"]) as second:
            theirs = _logits(pair.other.model, batch)
        batch = to_device(batch, pair.model.device)
        targets = targets_of(pair.model, batch)
        counted = targets != IGNORED
        positions += int(counted.sum())
        for row, (layer, origin) in enumerate(sorted(layers.items())):
            a, b = (seen.residual[at][counted].double() for seen, at in ((first, origin), (second, layer)))
            sums[row] += torch.stack([
                (a - b).square().sum(), a.square().sum(), functional.cosine_similarity(a, b, dim=-1).sum()
            ]).cpu()  # fmt: skip
        p, q = (logits[counted].double().log_softmax(-1) for logits in (ours, theirs))
        wanted = targets[counted]
        nats = [-one.gather(1, wanted[:, None])[:, 0] for one in (p, q)]
        totals += torch.stack([
            (p.exp() * (p - q)).sum(), (p.argmax(-1) == q.argmax(-1)).sum(), nats[0].sum(), nats[1].sum()
        ]).cpu()  # fmt: skip
        change = nats[1] - nats[0]
        places = counted.nonzero()
        for kept, sign in ((worse, 1), (better, -1)):
            for number in (sign * change).topk(min(_SHOWN, len(change))).indices.tolist():
                row, at = places[number].tolist()
                entry = (sign * float(change[number]), count, _excerpt(pair, batch["input_ids"][row], at), *(
                    float(one[number]) for one in nats
                ))  # fmt: skip
                count += 1
                if len(kept) < _SHOWN:
                    heapq.heappush(kept, entry)
                else:
                    heapq.heappushpop(kept, entry)
    if not positions:
        raise NotApplicable("no sequence of the text predicts anything: each needs at least two tokens")
    kl, agreement, before, after = (totals / positions).tolist()
    lists = {name: sorted(kept, reverse=True) for name, kept in (("worse", worse), ("better", better))}
    lists = {name: [entry for entry in kept if entry[0] > 0] for name, kept in lists.items()}
    quantities = {
        "distance": Quantity((sums[:, 0] / sums[:, 1].clamp_min(1e-30)).sqrt(), ("layer",), "", "of the streams"),
        "cosine": Quantity(sums[:, 2] / positions, ("layer",), "", "mean cosine of the streams"),
        "divergence": Quantity(torch.tensor(kl), (), "nats", "KL(first || second) a prediction"),
        "agreement": Quantity(torch.tensor(agreement), (), "share", "of positions with the same most likely token"),
        "losses": Quantity(torch.tensor([before, after]), ("model",), "nats", "loss of the first and of the second"),
        **{
            name: Quantity(torch.tensor([entry[3:] for entry in kept]).view(-1, 2), (f"{name} token", "model"), "nats",
                           "of single predictions")
            for name, kept in lists.items()
        },
    }  # fmt: skip
    findings = [
        f"The loss goes from {before:.4f} to {after:.4f} nats ({after - before:+.4f}); the predictions are {kl:.4f} "
        f"nats apart and name the same token at {agreement:.1%} of {positions:,} positions.",
        "Behind the last block the streams are apart by "
        f"{float(quantities['distance'].values[-1]):.3g} of their length.",
    ]
    labels = {f"{name} token": [entry[2] for entry in kept] for name, kept in lists.items()} | {
        "model": ["first", "second"]
    }
    return Result(quantities, findings, ["A text of another kind may say something else."], labels)


def _logits(model: Any, batch: Batch) -> Tensor:
    return model(**inputs_of(model, to_device(batch, model.device))).logits


def _excerpt(pair: Pair, ids: Tensor, at: int) -> str:
    """The tokens before a prediction and, behind a bar, the one that came next."""
    words = [pair.token(int(one)) for one in ids[max(0, at + 1 - _BEFORE) : at + 2]]
    return f"{''.join(words[:-1])} | {words[-1]}".replace("\n", "↵")
