"""Items of work whose process was lost: each is tried again once, and then reported."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

_logger = logging.getLogger(__name__)


class Losses:
    """why: of each item that was lost twice, what became of its process."""

    def __init__(self) -> None:
        self.why: dict[Any, str] = {}
        self._times: Counter[Any] = Counter()

    def rest(self, items: Sequence[Any], ended: str) -> list[Any]:
        """What is to be tried again after a process ended.

        items: those of its group that it had not finished, the one in progress first. ended: what became of it.
        """
        if not items:
            return []
        first = items[0]
        self._times[first] += 1
        if self._times[first] == 1:
            _logger.info("%s: its process %s; it is tried again", first, ended)
            return list(items)
        self.why[first] = f"not computed: its process {ended}, twice"
        return list(items[1:])
