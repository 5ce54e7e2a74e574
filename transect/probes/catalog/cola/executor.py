"""Running one input along paths through a model's layers: the model's own blocks, in the path's order, without a cache.

Masks and positions are those of the tokens, whatever the path is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....anatomy import Anatomy
from ....forward import feeds_of, inputs_of, put_out, run_at
from .paths import Path

KEPT = 1 << 24  # numbers of states behind beginnings of paths that are kept
AT_ONCE = 1024  # tokens in one pass


class Executor:
    """One sequence of token ids (T) in a model. States behind beginnings of paths are kept, so that what a path shares
    with an earlier one is not run again; of several paths, the states that the same layer reads next go through it
    together."""

    def __init__(self, anatomy: Anatomy, ids: Tensor) -> None:
        self.anatomy = anatomy
        self.batch = {"input_ids": ids[None].to(anatomy.model.device)}
        self.feed = feeds_of(anatomy, [self.batch])[0]
        self.states: dict[Path, Tensor] = {(): self.feed.hidden}
        self.rows = max(1, AT_ONCE // len(ids))

    @torch.no_grad()
    def state(self, path: Path) -> Tensor:
        """The residual stream (1 x T x d) behind the last layer of a path."""
        return self.run([path])[0]

    @torch.no_grad()
    def logits(self, path: Path) -> Tensor:
        """The model's own head on it (T x V)."""
        with put_out(self.anatomy, self.state(path)):
            return self.anatomy.model(**inputs_of(self.anatomy.model, self.batch)).logits[0]

    @torch.no_grad()
    def run(self, paths: Sequence[Path]) -> list[Tensor]:
        """The residual streams behind paths, all of them one layer further at a time."""
        at = {path: self._known(path) for path in paths}
        now = {path: self.states[path[:length]] for path, length in at.items()}
        while going := [path for path in now if at[path] < len(path)]:
            groups: dict[int, dict[Path, list[Path]]] = {}  # by layer: beginnings behind it, and whose they are
            for path in going:
                beginning = path[: at[path] + 1]
                groups.setdefault(beginning[-1], {}).setdefault(beginning, []).append(path)
            for layer, begun in groups.items():
                beginnings = list(begun)
                for start in range(0, len(beginnings), self.rows):
                    part = beginnings[start : start + self.rows]
                    outputs = self._through(layer, [now[begun[one][0]] for one in part])
                    for one, output in zip(part, outputs, strict=True):
                        self._keep(one, output)
                        for path in begun[one]:
                            now[path], at[path] = output, len(one)
        return [now[path] for path in paths]

    def _through(self, layer: int, states: list[Tensor]) -> list[Tensor]:
        if self.anatomy.architecture.head_bias:  # the bias may be laid out for one row
            return [run_at(self.anatomy, self.feed, layer, state) for state in states]
        return list(run_at(self.anatomy, self.feed, layer, torch.cat(states)).split(1))

    def _known(self, path: Path) -> int:
        """How long the longest beginning of a path is whose state is kept."""
        return next(length for length in range(len(path), -1, -1) if path[:length] in self.states)

    def _keep(self, path: Path, state: Tensor) -> None:
        if len(self.states) > 1 and len(self.states) * state.numel() >= KEPT:
            self.states.pop(next(one for one in self.states if one))  # the oldest but for the embeddings
        self.states[path] = state.clone()  # not the whole batch that it is a row of
