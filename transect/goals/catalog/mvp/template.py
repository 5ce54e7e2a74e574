"""Templates: where a text goes and where its class is to be read, and both as token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....errors import BadData, TransectError

TEXT, BLANK = "{text}", "{blank}"
_PARTS = re.compile(r"(\{text\}|\{blank\})")
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """ids: of a filled template. blank: the position whose logits are those of the word in the blank."""

    ids: list[int]
    blank: int


class Template:
    """A text with exactly one {text} and one {blank}, such as "{text} It was {blank} ."

    A masked model gets its mask token in the blank. A causal one is read where the blank would follow, so that the
    blank must be the last thing in the template.
    Raises TransectError for a template that is none, or that does not go with the model.
    """

    def __init__(self, written: str, tokenizer: Any, causal: bool) -> None:
        self.written, self.tokenizer, self.causal = written, tokenizer, causal
        for part in (TEXT, BLANK):
            if written.count(part) != 1:
                raise TransectError(
                    f"the template {written!r} needs {part} exactly once, not {written.count(part)} times"
                )
        if causal and not written.rstrip().endswith(BLANK):
            raise TransectError(
                f"the template {written!r} goes on behind its blank, but a causal model reads what stands before it: "
                f"put {BLANK} last"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise TransectError(
                f"{type(tokenizer).__name__} does not say where in a text its tokens lie, and the text is cut off by "
                "that: use a fast tokenizer (AutoTokenizer, use_fast=True)"
            )
        if not causal and tokenizer.mask_token_id is None:
            raise TransectError(f"{type(tokenizer).__name__} has no mask token, and the blank needs one")

    def encode(self, text: str, length: int, special: bool = True) -> Encoded:
        """At most `length` tokens: of the text the last ones are left out, of the template none.

        special: with the tokenizer's special tokens. Raises BadData if the template alone is longer.
        """
        filled, at, blank = self._filled(text, "" if self.causal else self.tokenizer.mask_token)
        ids, spans = self._tokens(filled, special)
        inside = [i for i, (start, end) in enumerate(spans) if at[0] <= start < end <= at[1]]
        over = max(0, len(ids) - length)
        if over > len(inside) or (text.strip() and over == len(inside)):
            raise BadData(
                f"the template {self.written!r} takes {len(ids) - len(inside)} tokens of the sequence_length of "
                f"{length}, so that none is left for the text: give a greater length or a shorter template"
            )
        lost = set(inside[len(inside) - over :])
        place = len(ids) - 1 if self.causal else self._mask(ids, spans, blank)
        if place < 0:
            raise BadData(f"nothing stands in front of the blank of {self.written!r}: the text is empty")
        return Encoded([token for i, token in enumerate(ids) if i not in lost], place - sum(i < place for i in lost))

    def word_id(self, word: str) -> int:
        """The token of a word in the blank; TransectError unless it is exactly one that the tokenizer knows."""
        filled, _, (start, end) = self._filled("a", word)
        ids, spans = self._tokens(filled)
        found = [i for i, (first, last) in enumerate(spans) if first < end and last > start and last > first]
        pieces = self.tokenizer.convert_ids_to_tokens([ids[i] for i in found])
        whole = len(found) == 1 and spans[found[0]][1] <= end and not filled[spans[found[0]][0] : start].strip()
        if whole and self.causal:  # and what stands before it stays what it is without it
            before = self._tokens(self._filled("a", "")[0])[0]
            whole = ids[: found[0]] == before
        if not whole:
            raise TransectError(
                f"the label word {word!r} is {len(found)} tokens ({', '.join(map(str, pieces))}) in {self.written!r}, "
                "or one with more than the word in it: label words are single tokens; choose another word"
            )
        if ids[found[0]] in self.tokenizer.all_special_ids:
            raise TransectError(f"the tokenizer does not know the label word {word!r}: it is {pieces[0]} to it")
        return ids[found[0]]

    def _filled(self, text: str, blank: str) -> tuple[str, Span, Span]:
        """The template with both put in, and where they stand in it; a causal model's ends with the blank."""
        made, places = "", {}
        for part in _PARTS.split(self.written):
            said = {TEXT: text, BLANK: blank}.get(part, part)
            if part == BLANK and self.causal and not blank:
                made = made.rstrip()  # the space belongs to the word
            places[part] = (len(made), len(made) + len(said))
            made += said
            if part == BLANK and self.causal:
                break
        return made, places[TEXT], places[BLANK]

    def _tokens(self, filled: str, special: bool = True) -> tuple[list[int], list[Span]]:
        encoded = self.tokenizer(
            filled, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
        if self.causal:  # the blank follows what is written, not a token that ends a text
            last = max((i for i, (start, end) in enumerate(spans) if end > start), default=-1)
            ids, spans = ids[: last + 1], spans[: last + 1]
        return ids, spans

    def _mask(self, ids: Sequence[int], spans: Sequence[Span], blank: Span) -> int:
        """The blank's mask token; the text may hold others."""
        mask = self.tokenizer.mask_token_id
        (place,) = (i for i, (start, end) in enumerate(spans) if ids[i] == mask and start < blank[1] and end > blank[0])
        return place


def padded(rows: Sequence[Sequence[Encoded]], padding: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B x T x L) and `blank` (B x T) of B texts in T templates, padded behind."""
    longest = max(len(one.ids) for row in rows for one in row)
    ids = torch.full((len(rows), len(rows[0]), longest), padding)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        for j, one in enumerate(row):
            ids[i, j, : len(one.ids)] = torch.tensor(one.ids)
            mask[i, j, : len(one.ids)] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "blank": torch.tensor([[one.blank for one in row] for row in rows]),
    }
