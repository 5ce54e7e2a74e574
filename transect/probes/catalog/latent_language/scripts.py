"""What kind of token each one is: by Unicode script, and whether a space comes before it."""

from __future__ import annotations

import unicodedata
from typing import Any

import torch
from torch import Tensor

SPACES = ("▁", "Ġ", " ")  # how tokenizers write the space before a word
BROKEN = "\ufffd"  # what part of a character's bytes decodes to


def kinds_of_tokens(tokenizer: Any, size: int) -> tuple[list[str], Tensor]:
    """The kinds that occur, and the kind of each of `size` token ids as an index into them (size).

    Kinds: a script in lower case, such as `cyrillic`; for Latin, `latin, new word` and `latin, inside`, where the
    tokenizer shows the space before a word; `digits`; `punctuation`; `white space`; `bytes` for parts of
    characters; `special`; and `unused` for ids that no token has.
    """
    special, known = set(tokenizer.all_special_ids), len(tokenizer)
    written = tokenizer.convert_ids_to_tokens(list(range(min(size, known))))
    shows = sum(str(token).startswith(SPACES) for token in written) > len(written) / 100
    kinds: dict[str, int] = {}
    index = []
    for number in range(size):
        if number in special:
            kind = "special"
        elif number >= len(written) or written[number] is None:
            kind = "unused"
        else:
            kind = kind_of_text(tokenizer.decode([number]), written[number].startswith(SPACES), shows)
        index.append(kinds.setdefault(kind, len(kinds)))
    return list(kinds), torch.tensor(index, dtype=torch.long)


def kind_of_text(text: str, spaced: bool, shows: bool = True) -> str:
    """The kind of one token. spaced: a space stands before it. shows: the tokenizer says so of tokens at all."""
    text = text.strip()
    if not text:
        return "white space"
    if BROKEN in text:
        return "bytes"
    letter = next((character for character in text if character.isalpha()), None)
    if letter is None:
        return "digits" if any(character.isnumeric() for character in text) else "punctuation"
    script = unicodedata.name(letter, "other").split()[0].lower()
    if script != "latin" or not shows:
        return script
    return "latin, new word" if spaced else "latin, inside"
