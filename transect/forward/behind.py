"""The blocks on the last tokens of some sequences alone, for many runs that differ from one pass there only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..anatomy import Anatomy
from .blocks import Feed, feeds_of, run_at
from .past import agree, first_of


class Behind:
    """The blocks on the tokens from `start` on of n sequences of one length, or of any number of copies of all of them.

    What is in front of these tokens is what one pass has left, and is not computed again. start: as asked for; 0 where
    the model has no cache of keys and values that gives the same (one whose layers choose among tokens sees others
    then), so that whole sequences run.
    """

    def __init__(self, anatomy: Anatomy, ids: Tensor, start: int, cache: Any, streams: Mapping[int, Tensor]) -> None:
        """ids: n x T. cache: what a pass over them has left. streams: what entered each block in it, and last what left
        the last one (n x T x d each)."""
        self.anatomy, self.ids, self.start = anatomy, ids, start
        self._feeds: dict[int, Feed] = {}
        self._past = first_of(cache, start, ids.shape[1]) if start else None
        if self._past is None or not self._agrees(streams):
            self.start, self._past, self._feeds = 0, None, {}

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """The residual stream (B x tokens x d) after a block. hidden: what it reads, for copies of all sequences."""
        rows = len(hidden)
        if rows not in self._feeds:
            batch = {"input_ids": self.ids[:, self.start :].repeat(rows // len(self.ids), 1)}
            (self._feeds[rows],) = feeds_of(self.anatomy, [batch], self._past)
        return run_at(self.anatomy, self._feeds[rows], layer, hidden)

    def _agrees(self, streams: Mapping[int, Tensor]) -> bool:
        hidden, layers = streams[0][:, self.start :], len(self.anatomy.block_list)
        for layer in range(layers):
            hidden = self.run(layer, hidden)
        return agree(hidden, streams[layers][:, self.start :])
