"""Which token follows which: counts of a text, as probabilities and as a loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ....errors import BadData


class BigramTable:
    """P(y | x) = count(x y) / count(x ·), without smoothing; V tokens.

    A context x that was never seen has the shares of single tokens (unigrams), and without any count all tokens are
    equally likely. A pair that was not seen behind a seen context has probability 0. Stored by pairs that occur.
    """

    def __init__(self, texts: Iterable[Tensor], vocabulary: int) -> None:
        """texts: token ids (T) of each sequence; pairs are counted within a sequence alone."""
        rows = [row.long().cpu() for row in texts]
        ids = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise BadData(f"the text has the token {int(ids.max())}, but the model predicts {vocabulary} tokens")
        pairs = torch.cat([torch.zeros(0, dtype=torch.long), *(row[:-1] * vocabulary + row[1:] for row in rows)])
        self.vocabulary, self.pairs = vocabulary, len(pairs)
        self.keys, counts = pairs.unique(return_counts=True)  # sorted, so by context and then by token
        contexts, self.tokens = self.keys // vocabulary, self.keys % vocabulary
        number = torch.zeros(vocabulary, dtype=torch.long).index_add_(0, contexts, torch.ones_like(contexts))
        totals = torch.zeros(vocabulary, dtype=torch.long).index_add_(0, contexts, counts)
        self.ends = number.cumsum(0)
        self.starts = self.ends - number  # where each context's pairs begin
        self.shares = counts.double() / totals[contexts]
        seen = ids.bincount(minlength=vocabulary).double()
        self.single = seen / len(ids) if len(ids) else torch.full((vocabulary,), 1 / vocabulary, dtype=torch.double)

    def known(self, contexts: Tensor) -> Tensor:
        """Whether something was seen behind these tokens."""
        return self.ends[contexts] > self.starts[contexts]

    def rows(self, contexts: Tensor) -> Tensor:
        """P(· | x) of contexts (n): n x V, float64. Each row sums to 1."""
        owner, place = self._places(contexts)
        table = torch.zeros(len(contexts), self.vocabulary, dtype=torch.float64)
        table[owner, self.tokens[place]] = self.shares[place]
        table[~self.known(contexts)] = self.single
        return table

    def surprisals(self, contexts: Tensor, following: Tensor) -> Tensor:
        """-ln P(y | x) in nats of contexts and the tokens behind them (n each); infinite for what was never seen."""
        keys = contexts * self.vocabulary + following
        place = torch.searchsorted(self.keys, keys).clamp_max(max(0, len(self.keys) - 1))
        found = torch.zeros(len(keys), dtype=torch.float64)
        if len(self.keys):
            found = torch.where(self.keys[place] == keys, self.shares[place], 0.0)
        return -torch.where(self.known(contexts), found, self.single[following]).log()

    def cross_entropies(self, contexts: Tensor, logits: Tensor) -> Tensor:
        """-Σ_y P(y | x) ln softmax(logits)_y in nats (n), with the logits' gradient. logits: n x V."""
        contexts = contexts.cpu()
        owner, place = (one.to(logits.device) for one in self._places(contexts))
        shares = self.shares.to(logits)[place]
        picked = logits[owner, self.tokens.to(logits.device)[place]] * shares
        expected = torch.zeros_like(logits[:, 0]).index_add(0, owner, picked)
        unknown = (~self.known(contexts)).to(logits.device)
        if bool(unknown.any()):
            expected = expected + unknown * (logits @ self.single.to(logits))
        return logits.logsumexp(-1) - expected

    def _places(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the contexts (n), and which of the pairs: for every pair that begins with one of them."""
        first, count = self.starts[contexts], self.ends[contexts] - self.starts[contexts]
        owner = torch.arange(len(contexts)).repeat_interleave(count)
        within = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
        return owner, first[owner] + within
