"""Words as token ids, each cut by itself, so that no token belongs to two words."""

from __future__ import annotations

from collections.abc import Iterable

from ..data import Specimen
from ..errors import BadData

Ids = tuple[int, ...]


def word_tokens(specimen: Specimen, words: Iterable[str], space: bool = True) -> dict[str, Ids]:
    """Token ids of each word as it is written behind another one; of one that has an unknown token, or none, ().

    space: whether words are separated by spaces.
    """
    unknown = getattr(specimen.tokenizer, "unk_token_id", None)
    found: dict[str, Ids] = {}
    for word in words:
        if word in found:
            continue
        ids = _behind_another(specimen, word, space)
        found[word] = () if unknown is not None and unknown in ids else ids
    return found


def _behind_another(specimen: Specimen, word: str, space: bool) -> Ids:
    if space:
        try:
            return tuple(specimen.continuation(":", word).tolist())
        except BadData:
            return ()
    before, whole = specimen.encode(":").tolist(), specimen.encode(f":{word}").tolist()
    return tuple(whole[len(before) :]) if whole[: len(before)] == before else ()
