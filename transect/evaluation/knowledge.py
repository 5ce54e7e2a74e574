"""What a model knows: the answers that it gives by itself, in free greedy generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import Fact, Passage, Specimen
from ..errors import TransectError
from ..forward import continuations


def says(specimen: Specimen, questions: Sequence[Fact | Passage], batch_size: int = 64) -> list[bool]:
    """Of each fact or passage, whether the model, given the prompt alone, goes on with the answer.

    The most likely token follows the most likely token, and the text that they make is compared, not the tokens: it
    begins with the answer after a space, and there a word ends ("Paris." is Paris, "Parisian" is not). Passages are
    thus recited word for word; a space may be a line's end. Prompts of one length go through the model together, with
    its cache, until each is told. A prompt whose answer finds no room in the model's context is not answered.
    Raises NotApplicable for a model that predicts no next token, and without a tokenizer.
    """
    specimen.require_causal()
    prompts = [specimen.encode(one.text if isinstance(one, Fact) else one.prompt) for one in questions]
    return _goes_on(specimen, prompts, [one.answer for one in questions], batch_size)


def recalls(specimen: Specimen, facts: Sequence[Fact], text: Tensor, distance: int, batch_size: int = 8) -> list[bool]:
    """Of each fact, whether the model goes on with what a note at the beginning says instead of it.

    The note is the fact with its `new_answer`; then comes another text of so many tokens, then the question: what it
    needs is recall from the context, and no knowledge. text: token ids (1-D), of which `distance` are taken for each
    fact, one piece after the other. A fact without `new_answer` keeps its own, and knowledge may help it.
    Raises NotApplicable as `says` does, and TransectError for a text that is shorter than the distance.
    """
    specimen.require_causal()
    if len(text) < distance:
        raise TransectError(f"a text of {distance} tokens is to stand between, and there are {len(text)}")
    answers = [fact.new_answer or fact.answer for fact in facts]
    prompts = []
    for number, (fact, answer) in enumerate(zip(facts, answers, strict=True)):
        start = number * distance % max(1, len(text) - distance + 1)
        note, question = specimen.encode(f"{fact.text} {answer}."), specimen.encode(fact.text)
        prompts.append(torch.cat([torch.as_tensor(one) for one in (note, text[start : start + distance], question)]))
    return _goes_on(specimen, prompts, answers, batch_size)


def _goes_on(specimen: Specimen, prompts: Sequence[Tensor], answers: Sequence[str], batch_size: int) -> list[bool]:
    """Of each prompt (token ids), whether greedy generation goes on with the answer."""
    answers = [" ".join(answer.split()) for answer in answers]
    asked = [specimen.decode(prompt) for prompt in prompts]

    def text(number: int, said: Tensor) -> str:
        return specimen.decode([*prompts[number], *said])[len(asked[number]) :]

    def enough(number: int, said: Tensor) -> bool:
        most = len(f" {answers[number]}".encode()) + 1  # a token has a byte or more, unless it never shows
        return len(said) >= most or begins_with(text(number, said), answers[number]) is not None

    given = continuations(specimen.model, prompts, enough, batch_size)
    texts = [text(number, said) for number, said in enumerate(given)]
    return [
        begins_with(said, answer) or " ".join(said.split()) == answer
        for said, answer in zip(texts, answers, strict=True)
    ]


def begins_with(said: str, answer: str) -> bool | None:
    """Whether a text begins with a space and the answer, up to a word's end; None while it is too short to tell.

    answer: its words with one space between them.
    """
    if said and not said[0].isspace():
        return False
    whole = said.rstrip("\ufffd")  # the first bytes of a letter that is not complete yet
    words = " ".join(whole.split())
    if len(words) > len(answer):
        return words.startswith(answer) and not words[len(answer)].isalnum()
    if words == answer and whole[-1:].isspace():
        return True
    return None if answer.startswith(words) else False
