"""Concepts as token ids, and how probable each layer makes their words in each language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Specimen
from ....data.concepts import Concept
from ....errors import BadData, NotApplicable
from ....forward import Lens, watch
from ...neurons import ENTRIES, wide

BATCH = 64


@dataclass(frozen=True)
class Asked:
    """A concept as token ids.

    prompt: (T). target: the language that it asks for. forms: language -> token ids of the word's forms, none of
    which begins another. meaning: equal where two concepts mean the same.
    """

    prompt: Tensor
    target: str
    forms: Mapping[str, Sequence[Tensor]]
    meaning: Hashable


@dataclass(frozen=True)
class Lexicon:
    """Concepts that can be told apart.

    languages: of their words. left_out: concepts whose words in two languages begin with the same token.
    given_away: prompts that contain a word of the answer.
    """

    asked: Sequence[Asked]
    languages: Sequence[str]
    left_out: int = 0
    given_away: int = 0

    @property
    def targets(self) -> Tensor:
        """The language that each concept asks for, as an index (n)."""
        return torch.tensor([self.languages.index(one.target) for one in self.asked])


def tokenised(specimen: Specimen, known: Sequence[Concept]) -> Lexicon:
    """The concepts whose words share no first token between languages; NotApplicable where there is none."""
    asked, given_away = [], 0
    for concept in known:
        prompt = specimen.encode(concept.prompt)
        if not len(prompt):
            raise BadData(f"the prompt {concept.prompt!r} has no tokens, so nothing precedes its answer")
        forms = {name: forms_of(specimen, concept, words) for name, words in concept.words.items()}
        starts = [{int(form[0]) for form in one} for one in forms.values()]
        if sum(map(len, starts)) == len(set().union(*starts)):
            meaning = frozenset((name, word) for name, words in concept.words.items() for word in words)
            asked.append(Asked(prompt, concept.target, forms, meaning))
            said = concept.prompt.split()
            given_away += any(form in said for words in concept.words.values() for form in words)
    if not asked:
        raise NotApplicable(
            "in every concept, words of two languages begin with the same token: nothing tells them apart"
        )
    languages = list(dict.fromkeys(language for concept in known for language in concept.words))
    return Lexicon(asked, languages, len(known) - len(asked), given_away)


def forms_of(specimen: Specimen, concept: Concept, words: Sequence[str]) -> list[Tensor]:
    """Token ids of a word's forms, without those that another one begins."""
    unknown = getattr(specimen.tokenizer, "unk_token_id", None)
    cut = [tuple(specimen.continuation(concept.prompt, word).tolist()) for word in words]
    for word, ids in zip(words, cut, strict=True):
        if unknown is not None and unknown in ids:
            raise BadData(f"the word {word!r} after {concept.prompt!r} is not in the tokenizer's vocabulary")
    cut = list(dict.fromkeys(cut))
    return [torch.tensor(ids) for ids in cut if not any(ids != other and ids[: len(other)] == other for other in cut)]


def by_language(specimen: Specimen, lens: Lens, lexicon: Lexicon) -> tuple[Tensor, Tensor]:
    """P_l of each concept's word in each language (n x (L + 1) x languages), float64; NaN where it has no word.

    First the sum over the word's forms; second the largest geometric mean over a form's tokens.
    """
    names = list(lexicon.languages)
    spoken = [
        (number, name, form) for number, one in enumerate(lexicon.asked)
        for name, forms in one.forms.items() for form in forms
    ]  # fmt: skip
    logs = lens_log_probabilities(specimen, lens, [(lexicon.asked[n].prompt, form) for n, _, form in spoken])
    whole = torch.full((len(lexicon.asked), logs.shape[1], len(names)), torch.nan, dtype=torch.float64)
    normed = whole.clone()
    for (number, name, form), row in zip(spoken, logs, strict=True):
        place = (number, slice(None), names.index(name))
        whole[place] = whole[place].nan_to_num(0) + row.exp()
        normed[place] = torch.maximum(normed[place].nan_to_num(0), (row / len(form)).exp())
    return whole, normed


def by_target(values: Tensor, lexicon: Lexicon) -> Tensor:
    """Mean over the concepts that ask for each language (targets x (L + 1) x languages); NaN where none does."""
    return torch.stack([values[lexicon.targets == target].nanmean(0) for target in range(len(lexicon.languages))])


def middle(states: int) -> range:
    """The middle half of the states 0 ... L."""
    return range(states // 4, states - states // 4)


@torch.no_grad()
def lens_log_probabilities(specimen: Specimen, lens: Lens, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """log P_l of each continuation after its prompt, in every layer (n x (L + 1)), nats, float64.

    pairs: token ids of the prompt and of the continuation. Nothing is padded: pairs of one shape go together.
    """
    out = torch.zeros(len(pairs), specimen.layers + 1, dtype=torch.float64)
    for numbers, ids, length in alike(pairs, len(lens.weight)):
        ids = ids.to(specimen.model.device)
        with watch(specimen.anatomy, ["residual"]) as seen:
            specimen.model.base_model(input_ids=ids, use_cache=False)
        for state in range(out.shape[1]):
            out[numbers, state] = said(lens, seen.residual[state], ids, length)
    return out


def said(lens: Lens, residual: Tensor, ids: Tensor, length: int) -> Tensor:
    """log P (B) that the lens reads in a state (B x T x d) for the last `length` of ids (B x T), on the CPU."""
    logs = wide(lens(residual[:, -length - 1 : -1])).log_softmax(-1)
    return logs.gather(-1, ids[:, -length:, None])[..., 0].double().sum(1).cpu()


def alike(pairs: Sequence[tuple[Tensor, Tensor]], vocabulary: int) -> Iterator[tuple[list[int], Tensor, int]]:
    """Pairs of one shape: their numbers, prompt and continuation together (B x T), and the continuation's length.

    At most BATCH at a time, and not more than ENTRIES logits over that vocabulary.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (prompt, word) in enumerate(pairs):
        groups[len(prompt), len(word)].append(number)
    for (_, length), group in groups.items():
        step = max(1, min(BATCH, ENTRIES // (max(length, 1) * vocabulary)))
        for start in range(0, len(group), step):
            numbers = group[start : start + step]
            yield numbers, torch.stack([torch.cat(pairs[number]) for number in numbers]), length
