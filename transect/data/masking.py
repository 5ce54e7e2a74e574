"""Masked language modelling: which tokens are hidden, and behind what (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BadData
from ..forward.objective import IGNORED

CHOSEN = 0.15  # of the tokens that are not special
MASKED, RANDOM = 0.8, 0.1  # of the chosen ones; the rest stays as it is


def masked(sequences: list[Tensor], tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
    """`input_ids` with hidden tokens and `labels` (-100 where nothing is predicted), both (T), for each sequence (T).

    The same seed gives the same choice, sequence after sequence, whatever the batch size.
    """
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise BadData("a masked language model needs a tokenizer with a mask token")
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    vocabulary = torch.arange(len(tokenizer))
    normal = vocabulary[~torch.isin(vocabulary, special)]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ids in sequences:
        ids = ids.long()
        chosen = (torch.rand(len(ids), generator=generator) < CHOSEN) & ~torch.isin(ids, special)
        fate = torch.rand(len(ids), generator=generator)
        other = normal[torch.randint(len(normal), (len(ids),), generator=generator)]
        hidden = torch.where(chosen & (fate < MASKED), tokenizer.mask_token_id, ids)
        hidden = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), other, hidden)
        rows.append({"input_ids": hidden, "labels": ids.masked_fill(~chosen, IGNORED)})
    return rows
