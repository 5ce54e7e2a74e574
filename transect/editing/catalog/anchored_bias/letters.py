"""Multiple choice by letters: what a model answers when the options are moved round.

Li and Gao, 2025, arXiv:2405.03205, trace a letter that GPT-2 answers whatever is asked. They compare it with each
item's right letter. What is here needs no right answers (our design): every item is asked with its options moved round
the letters, so that each content stands once at each letter, and a preference that is left on average is for a letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from ....data import Choice, Specimen
from ....errors import BadData, NotApplicable
from ....forward import Seen, changed, watch
from ....forward.blocks import feeds_of, put_out, run_at
from ....forward.head import last_logits
from ....forward.points import eager_attention

SEPARATOR = ", "  # between two options of a prompt
_TOGETHER = 64  # prompts in one forward pass
Change = Callable[[Tensor], Tensor]
Recalibration = Callable[[Tensor, Tensor, Tensor], Tensor]  # weights B x h x T, letters' places B x c, right ones B


@dataclass(frozen=True)
class Items:
    """n multiple-choice items of c letters each, asked in all c rotations of their options.

    letters: the letters. tokens (c): their ids. prompts: n x c token sequences; rotation r moves the option of letter i
    to letter i + r. answers (n x c): which letter is right. places: as prompts, the tokens of the listed letters (c).
    """

    letters: tuple[str, ...]
    tokens: Tensor
    prompts: list[list[Tensor]]
    answers: Tensor
    places: list[list[Tensor]]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Answers:
    """What was answered: `chosen` and `right`, numbers of letters (n items x c rotations)."""

    chosen: Tensor
    right: Tensor

    @property
    def accuracy(self) -> float:
        return float((self.chosen == self.right).double().mean())

    @property
    def by_place(self) -> Tensor:
        """Accuracy where the right answer stands at each letter (c): every item counts once at each of them."""
        count = self.right.shape[1]
        hits = (self.chosen == self.right).double()
        return torch.stack([hits[self.right == letter].mean() for letter in range(count)])

    @property
    def spread(self) -> float:
        """Largest accuracy over the places minus the smallest."""
        return float(self.by_place.max() - self.by_place.min())

    @property
    def answered(self) -> Tensor:
        """Share of each letter among the answers (c)."""
        return torch.bincount(self.chosen.flatten(), minlength=self.right.shape[1]).double() / self.chosen.numel()

    @property
    def consistency(self) -> float:
        """Share of items for which the same option is chosen in every rotation; 1/c^(c-1) by chance."""
        count = self.right.shape[1]
        contents = (self.chosen - torch.arange(count)) % count
        return float((contents == contents[:, :1]).all(1).double().mean())

    def bias_rate(self, letter: int) -> float:
        """Share answered with this letter where another one is right."""
        elsewhere = self.right != letter
        return float((self.chosen[elsewhere] == letter).double().mean())


def rotated(choice: Choice, shift: int) -> Choice:
    """The same item with every option moved `shift` letters on, the last ones to the front.

    Raises BadData for an item that does not say where its options end.
    """
    if choice.end is None:
        raise BadData(f"the item {choice.prompt!r} does not say where its options end; make it with load_choices")
    count = len(choice.letters)
    ends = [start - len(SEPARATOR) for start in choice.positions[1:]] + [choice.end]
    options = [
        choice.prompt[start + len(letter) : end]
        for letter, start, end in zip(choice.letters, choice.positions, ends, strict=True)
    ]
    moved = [options[(number - shift) % count] for number in range(count)]
    starts, shown = [], ""
    for letter, option in zip(choice.letters, moved, strict=True):
        shown += SEPARATOR if shown else ""
        starts.append(choice.positions[0] + len(shown))
        shown += letter + option
    prompt = choice.prompt[: choice.positions[0]] + shown + choice.prompt[choice.end :]
    end = choice.positions[0] + len(shown)
    return replace(
        choice, prompt=prompt, answer=(choice.answer + shift) % count, positions=tuple(starts), end=end
    )  # fmt: skip


def usual(choices: Sequence[Choice]) -> list[Choice]:
    """The items with the most common set of letters: one question is asked of one set at a time."""
    counts = Counter(choice.letters for choice in choices)
    letters = counts.most_common(1)[0][0]
    return [choice for choice in choices if choice.letters == letters]


def items_of(specimen: Specimen, choices: Sequence[Choice]) -> Items:
    """Encode items of one set of letters in all rotations.

    Raises NotApplicable where a letter, as the tokenizer writes it behind a prompt, is not one known token of its own.
    """
    letters = choices[0].letters
    tokens = torch.tensor([specimen.single_token(choices[0].prompt, letter) for letter in letters])
    unknown = getattr(specimen.tokenizer, "unk_token_id", None)
    if len(tokens.unique()) < len(tokens) or unknown in tokens.tolist():
        raise NotApplicable(
            f"the letters {', '.join(letters)} hold some that this tokenizer does not know or not tell apart"
        )
    prompts, answers, places = [], [], []
    for choice in choices:
        turns = [rotated(choice, shift) for shift in range(len(letters))]
        prompts.append([specimen.encode(turn.prompt) for turn in turns])
        answers.append([turn.answer for turn in turns])
        places.append([_places(specimen, turn) for turn in turns])
    return Items(letters, tokens, prompts, torch.tensor(answers), places)


def _places(specimen: Specimen, choice: Choice) -> Tensor:
    """The last token of each listed letter (c)."""
    pairs = zip(choice.letters, choice.positions, strict=True)
    return torch.tensor([specimen.span_of(choice.prompt, start, start + len(letter))[1] - 1 for letter, start in pairs])


@torch.no_grad()
def letter_logits(specimen: Specimen, items: Items, asked: Tensor | None = None) -> Tensor:
    """Logits of the letters as the next token, n items x c rotations x c letters, float64, on the CPU.

    asked (n x c): which prompts; the others have 0. Default: all.
    """
    out = _table(items)
    for where, ids, _ in alike(items, asked):
        out[where] = _next(specimen, ids.to(specimen.model.device), items.tokens)
    return out


@torch.no_grad()
def recalibrated_letter_logits(
    specimen: Specimen, items: Items, heads: Mapping[int, Sequence[int]], recalibrated: Recalibration,
    asked: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same where the last row of some heads' patterns, by layer, is another: n x c x c, float64, on the CPU.

    recalibrated: the new weights, from the old ones (B x h x T), where the letters are (B x c), and which is right (B).
    A head's output changes by the sum over tokens of (new - old) v. Block by block, since what a later head sees
    depends on the earlier ones; a block with such heads runs twice, and is looked at first.
    """
    anatomy, out = specimen.anatomy, _table(items)
    with eager_attention(specimen.model):  # of which the masks are made, too
        for where, ids, places in alike(items, asked):
            ids, places, right = (one.to(specimen.model.device) for one in (ids, places, items.answers[where]))
            (feed,) = feeds_of(anatomy, [{"input_ids": ids}])
            hidden = feed.hidden
            for layer in range(specimen.layers):
                changes: dict[tuple[str, int], Change] = {}
                if layer in heads:
                    with watch(anatomy, ["patterns", "v"], [layer]) as seen:
                        run_at(anatomy, feed, layer, hidden)
                    pattern = seen.patterns[layer][:, list(heads[layer]), -1]  # B x h x T
                    more = recalibrated(pattern, places, right) - pattern
                    changes["heads", layer] = _attending(specimen, seen, layer, heads[layer], more)
                with changed(anatomy, changes):
                    hidden = run_at(anatomy, feed, layer, hidden)
            with put_out(anatomy, hidden):
                out[where] = _next(specimen, ids, items.tokens)
    return out


def _next(specimen: Specimen, ids: Tensor, tokens: Tensor) -> Tensor:
    """Logits (B x c, float64) of the tokens (c) behind prompts of one length (B x T), on the CPU."""
    return last_logits(specimen.model, ids)[:, 0].cpu()[:, tokens].double()


def averaged_letter_logits(
    specimen: Specimen, items: Items, heads: Mapping[int, Sequence[int]], asked: Tensor | None = None
) -> Tensor:
    """Logits where these heads look at all listed letters alike, see `averaged_pattern`."""
    return recalibrated_letter_logits(
        specimen, items, heads, lambda pattern, places, right: averaged_pattern(pattern, places), asked
    )


def swapped_letter_logits(
    specimen: Specimen, items: Items, heads: Mapping[int, Sequence[int]], letter: int, asked: Tensor | None = None
) -> Tensor:
    """Logits where these heads look at the right letter as they do at `letter`, and the other way round."""
    return recalibrated_letter_logits(
        specimen, items, heads,
        lambda pattern, places, right: swapped_pattern(pattern, places[:, letter], _chosen(places, right)), asked,
    )  # fmt: skip


def averaged_pattern(pattern: Tensor, places: Tensor) -> Tensor:
    """Attention weights (B x h x T) with those at each prompt's places (B x c) replaced by their mean.

    The sum of a row stays.
    """
    index = places[:, None].expand(-1, pattern.shape[1], -1)
    mean = pattern.gather(-1, index).mean(-1, keepdim=True)
    return pattern.scatter(-1, index, mean.expand_as(index))


def swapped_pattern(pattern: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Attention weights (B x h x T) with those at two places of each prompt (B each) exchanged; the row's sum stays."""
    index = torch.stack([first, second], -1)[:, None].expand(-1, pattern.shape[1], -1)
    return pattern.scatter(-1, index, pattern.gather(-1, index.flip(-1)))


def _chosen(places: Tensor, letter: Tensor) -> Tensor:
    """The place (B) of each prompt's own letter (B)."""
    return places.gather(1, letter[:, None])[:, 0]


def _attending(specimen: Specimen, seen: Seen, layer: int, heads: Sequence[int], more: Tensor) -> Change:
    """What changes the outputs of all heads (B x T x (H d_h)) where the last token attends by `more` (B x h x T)."""
    attention = specimen.anatomy.blocks[layer].attention
    assert attention is not None  # it has a pattern
    size, shared = attention.head_size, attention.heads // attention.key_value_heads
    values = seen.v[layer].unflatten(-1, (-1, size))[:, :, [head // shared for head in heads]]  # B x T x h x d_h
    added = torch.einsum("bht,bthd->bhd", more, values)

    def change(outputs: Tensor) -> Tensor:
        new = outputs.clone()
        new.unflatten(-1, (-1, size))[:, -1, list(heads)] += added
        return new

    return change


def _table(items: Items) -> Tensor:
    return torch.zeros(len(items), *[len(items.letters)] * 2, dtype=torch.float64)


def alike(
    items: Items, asked: Tensor | None = None
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:  # fmt: skip
    """Prompts of one length, at most `_TOGETHER`, as ((item numbers, rotations), ids B x T, places B x c).

    asked (n x c): which prompts. Default: all.
    """
    flat = [
        (len(prompt), item, turn)
        for item, turns in enumerate(items.prompts)
        for turn, prompt in enumerate(turns)
        if asked is None or asked[item, turn]
    ]
    for _, group in groupby(sorted(flat), key=lambda one: one[0]):
        same = list(group)
        for start in range(0, len(same), _TOGETHER):
            part = same[start : start + _TOGETHER]
            where = torch.tensor([one[1] for one in part]), torch.tensor([one[2] for one in part])
            ids = torch.stack([items.prompts[item][turn] for _, item, turn in part])
            yield where, ids, torch.stack([items.places[item][turn] for _, item, turn in part])
