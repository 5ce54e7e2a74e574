"""Rows whose process was lost: each is tried again once, and then reported."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from .plan import Row

_logger = logging.getLogger(__name__)


class Losses:
    """why: of each row that was lost twice, what became of its process."""

    def __init__(self) -> None:
        self.why: dict[Row, str] = {}
        self._times: Counter[Row] = Counter()

    def rest(self, rows: Sequence[Row], ended: str) -> list[Row]:
        """What is to be tried again after a process ended.

        rows: those of its group that it had not finished, the one in progress first. ended: what became of it.
        """
        if not rows:
            return []
        row = rows[0]
        self._times[row] += 1
        if self._times[row] == 1:
            _logger.info("%s: its process %s; it is tried again", row, ended)
            return list(rows)
        self.why[row] = f"not computed: its process {ended}, twice"
        return list(rows[1:])
