"""What the circuits that CD-T finds do alone, on prompts that took no part in the search (arXiv:2407.00886)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....data import Specimen
from .circuits import Alone, grow, prune
from .decomposition import Node

_CONTROLS = 10  # random circuits of the same size


def faithfulness(
    specimen: Specimen,
    nodes: Sequence[Node],
    scores: Tensor,
    shares: Tensor,
    ids: Tensor,
    answers: Sequence[int],
    means: dict[int, Tensor],
    most: int,
    threshold: float,
    pruned: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Share of the answer's logit that circuits of growing size recover, what random ones of as many nodes do, sizes.

    nodes, scores, shares: of the prompt that the search looks at (`scores_on_everything`). ids: prompts (N x T, two at
    least), answers: a token each; the first half prunes, the other half judges. most: nodes that a round of the search
    adds at most, doubled from 1 on.
    """
    half, wanted = len(ids) // 2, torch.tensor(answers)
    searching, judging = (Alone(specimen, some, means) for some in (ids[:half], ids[half:]))

    def of_answers(logits: Tensor, answers: Tensor) -> Tensor:
        """Mean logit of the answers. logits: ... x N x V."""
        logits = logits.float().cpu()
        return logits.gather(-1, answers[:, None].expand(*logits.shape[:-1], 1))[..., 0].mean(-1)

    def score(circuit: Sequence[Node]) -> float:
        return float(of_answers(searching.logits(circuit), wanted[:half]))

    def without(circuit: Sequence[Node], some: Sequence[Node]) -> Tensor:
        found = {
            node: value
            for batch, logits in searching.without(circuit, some)
            for node, value in zip(batch, of_answers(logits, wanted[:half]).tolist(), strict=True)
        }
        return torch.tensor([found[node] for node in some])

    def judged(circuit: Sequence[Node]) -> float:
        return float(of_answers(judging.logits(circuit), wanted[half:]))

    whole, nothing = judged(nodes), judged([])
    span = whole - nothing if abs(whole - nothing) > 1e-9 else float("nan")
    generator = torch.Generator().manual_seed(specimen.seed)
    found, control, sizes = [], [], []
    size = 1
    while True:
        rounds = grow(nodes, scores, shares, size, threshold)
        circuit = sorted({node for one in rounds for node in one})
        circuit = prune(circuit, rounds[0], score, without, pruned)
        found.append((judged(circuit) - nothing) / span)
        drawn = [
            [nodes[int(i)] for i in torch.randperm(len(nodes), generator=generator)[: len(circuit)]]
            for _ in range(_CONTROLS)
        ]
        control.append(sum((judged(one) - nothing) / span for one in drawn) / _CONTROLS)
        sizes.append(len(circuit))
        if size >= most:
            return torch.tensor(found), torch.tensor(control), torch.tensor(sizes, dtype=torch.float32)
        size = min(2 * size, most)
