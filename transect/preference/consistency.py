"""Labels of a judge that can be wrong about the order: each pair is asked both ways round."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..data import Preference
from ..errors import BadData

Judge = Callable[[str, str, str], bool | None]  # prompt, first, second -> whether the first is better; None: neither


def judged(
    answers: Iterable[tuple[str, str, str]], judge: Judge, *, category: str, aspect: str | None = None
) -> tuple[list[Preference], float]:
    """Preferences where the judge names the same answer whichever comes first, and the share of pairs where it does.

    answers: (prompt, one, other). A judge that always takes the first is consistent nowhere.
    Raises BadData for no pairs at all.
    """
    made, asked = [], 0
    for prompt, one, other in answers:
        asked += 1
        first, second = judge(prompt, one, other), judge(prompt, other, one)
        if first is not None and second is not None and first != second:
            better, worse = (one, other) if first else (other, one)
            made.append(Preference(prompt, better, worse, category, aspect))
    if not asked:
        raise BadData("there are no pairs to judge")
    return made, len(made) / asked
