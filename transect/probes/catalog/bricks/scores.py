"""How well each neuron's activation ranks the texts of one kind before all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....anatomy import Block
from ....data import Specimen
from ....errors import BadData
from ....forward import inputs_of, to_device, watch
from ...neurons import wide
from .functions import Instance

ROWS = 16  # texts in one pass
ENTRIES = 2**22  # numbers that are sorted at once


@dataclass(frozen=True)
class Texts:
    """Tokenised texts. ids: of each (T). counted: which of its tokens are no special ones (T). labels: their kinds (P),
    as places in `names`."""

    ids: Sequence[Tensor]
    counted: Sequence[Tensor]
    labels: Tensor
    names: Sequence[str]

    def of(self, chosen: Tensor) -> Texts:
        """Some of them, by their numbers."""
        places = chosen.tolist()
        ids, counted = ([part[place] for place in places] for part in (self.ids, self.counted))
        return Texts(ids, counted, self.labels[chosen], self.names)

    def positives(self) -> Tensor:
        """y (P x C): 1 where a text is of a kind."""
        return torch.nn.functional.one_hot(self.labels, len(self.names))

    def batches(self) -> list[tuple[dict[str, Tensor], Tensor, list[int]]]:
        """Batches of texts that are about equally long, padded behind; which tokens count (B x T); and the texts."""
        order = sorted(range(len(self.ids)), key=lambda number: len(self.ids[number]))
        found = []
        for start in range(0, len(order), ROWS):
            part = order[start : start + ROWS]
            ids = torch.nn.utils.rnn.pad_sequence([self.ids[n] for n in part], batch_first=True)
            real, counted = (
                torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
                for masks in ([torch.ones_like(self.ids[n]) for n in part], [self.counted[n] for n in part])
            )
            found.append(({"input_ids": ids, "attention_mask": real}, counted, part))
        return found


def tokenised(specimen: Specimen, instances: Sequence[Instance], length: int) -> Texts:
    """The texts as the tokenizer cuts them, up to a length, with the kinds in the order in which they occur.

    BadData where a text has no token of its own, or one that the model does not have.
    """
    tokenizer, rows = specimen.tokenizer, specimen.model.get_input_embeddings().weight.shape[0]
    names = list(dict.fromkeys(one.function for one in instances))
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids, counted = [], []
    for one in instances:
        found = torch.tensor(tokenizer(one.text, truncation=True, max_length=length)["input_ids"], dtype=torch.long)
        own = torch.tensor([number not in special for number in found.tolist()], dtype=torch.bool)
        if not bool(own.any()) or len(found) < 2:
            raise BadData(f"the {one.function} text {one.text[:60]!r} has {int(own.sum())} tokens: too few")
        if int(found.max()) >= rows:
            raise BadData(f"the text {one.text[:60]!r} has the token {int(found.max())}, and the model {rows}")
        ids.append(found)
        counted.append(own)
    labels = torch.tensor([names.index(one.function) for one in instances])
    return Texts(ids, counted, labels, names)


@torch.no_grad()
def mean_sizes(specimen: Specimen, blocks: Sequence[Block], texts: Texts) -> tuple[Tensor, Tensor]:
    """A (P x N): mean |a_i| over each text's tokens, of the neurons of all blocks side by side; and the mean of a_i (N)
    over all tokens."""
    table, total, tokens = None, None, 0
    layers = [block.index for block in blocks]
    for batch, counted, part in specimen.shown(texts.batches(), "labelled texts"):
        batch = to_device(batch, specimen.model.device)
        with watch(specimen.anatomy, ["neurons"], layers) as seen:
            specimen.model.base_model(**inputs_of(specimen.model, batch, body=True))
        shape = batch["input_ids"].shape
        found = torch.cat([wide(seen.neurons[layer]).reshape(*shape, -1) for layer in layers], -1)
        weights = counted.to(found)[..., None]
        if table is None or total is None:
            table = torch.zeros(len(texts.ids), found.shape[-1], dtype=found.dtype)
            total = torch.zeros(found.shape[-1], dtype=torch.float64)
        table[part] = ((found.abs() * weights).sum(1) / weights.sum(1)).cpu()
        total += (found * weights).sum((0, 1)).double().cpu()
        tokens += int(counted.sum())
    assert table is not None and total is not None
    return table, total / tokens


def average_precisions(scores: Tensor, positives: Tensor) -> Tensor:
    """Average precision of ranking P texts by each of N scores, for each of C kinds (C x N), in float64.

    scores: P x N. positives: P x C, 0 or 1. Σ over recall steps of their length times the precision there; texts of
    equal score are one step, as scikit-learn has it. So a constant score has the share of positives.
    """
    found = torch.empty(positives.shape[1], scores.shape[1], dtype=torch.float64)
    step = max(1, ENTRIES // (len(scores) * (1 + positives.shape[1])))
    for start in range(0, scores.shape[1], step):
        part = slice(start, start + step)
        found[:, part] = _average_precisions(scores[:, part], positives.double())
    return found


def _average_precisions(scores: Tensor, positives: Tensor) -> Tensor:
    count = len(scores)
    values, order = scores.sort(dim=0, descending=True)
    hits = positives[order]  # P x n x C
    precision = hits.cumsum(0) / torch.arange(1, count + 1, dtype=torch.float64)[:, None, None]
    last = torch.ones_like(values, dtype=torch.bool)  # of texts with equal scores
    last[:-1] = values[1:] != values[:-1]
    place = torch.where(last, torch.arange(count)[:, None], count)
    ends = place.flip(0).cummin(0).values.flip(0)  # where the step ends that a text belongs to
    at_end = precision.gather(0, ends[..., None].expand_as(precision))
    return ((hits * at_end).sum(0) / positives.sum(0)).T
