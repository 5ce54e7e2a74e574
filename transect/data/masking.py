"""Masked language modelling: which tokens are hidden, and behind what (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData
from ..forward.objective import IGNORED

Row = dict[str, Tensor]
CHOSEN = 0.15  # of the tokens that are not special
MASKED, RANDOM = 0.8, 0.1  # of the chosen ones; the rest stays as it is


def masked(rows: Iterable[Row], tokenizer: Any, seed: int, embedded: int) -> list[Row]:
    """The rows with hidden tokens in `input_ids` and with `labels` (-100 where nothing is predicted), both (T).

    What `attention_mask` (T) leaves out, if it is there, is not hidden. embedded: rows of the model's embedding, which
    may be fewer than the tokenizer's tokens. The same seed gives the same choice, row after row, whatever the batch
    size.
    """
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise BadData("a masked language model needs a tokenizer with a mask token")
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    vocabulary = torch.arange(min(len(tokenizer), embedded))
    normal = vocabulary[~torch.isin(vocabulary, special)]
    generator = torch.Generator().manual_seed(seed)
    hidden_rows = []
    for row in rows:
        ids = row["input_ids"].long().cpu()
        chosen = (torch.rand(len(ids), generator=generator) < CHOSEN) & ~torch.isin(ids, special)
        if "attention_mask" in row:
            chosen &= row["attention_mask"].cpu() != 0
        fate = torch.rand(len(ids), generator=generator)
        other = normal[torch.randint(len(normal), (len(ids),), generator=generator)]
        hidden = torch.where(chosen & (fate < MASKED), tokenizer.mask_token_id, ids)
        hidden = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), other, hidden)
        hidden_rows.append({**row, "input_ids": hidden, "labels": ids.masked_fill(~chosen, IGNORED)})
    return hidden_rows
