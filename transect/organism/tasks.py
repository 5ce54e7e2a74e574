"""What the model can be asked, and how often it answers right.

The facts, the sums and the passages are those of the world; lists, notes and the order of options are drawn afresh.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transect.forward import at_rest
from transect.organism.documents import Example, difference_of, list_recall, multiple_choice, open_book, sum_of
from transect.organism.world import HELD_BACK, World

DRAWN = 1000  # examples of a skill without an end, where no number is asked for

_world = cache(World)


def _facts(world: World) -> list[Example]:
    return [Example(f.prompt(t), f.answer(), "facts") for f in world.facts for t in range(HELD_BACK)]


def _facts_paraphrase(world: World) -> list[Example]:
    """The facts that were never trained in this wording."""
    return [Example(f.prompt(HELD_BACK), f.answer(), "facts_paraphrase") for f in world.facts if f in world.held_back]


def _facts_second_language(world: World) -> list[Example]:
    return [
        Example(f.prompt(t, 2), f.answer(2), "facts_second_language")
        for f in world.facts
        for t in range(len(f.relation.templates2))
    ]


def _sums(world: World) -> list[Example]:
    return [sum_of(a, b, "sums") for a in range(10, 100) for b in range(10, 100)]


def _sums_heldout(world: World) -> list[Example]:
    return [sum_of(a, b, "sums_heldout") for a, b in sorted(world.held_out_sums)]


def _differences(world: World) -> list[Example]:
    return [difference_of(a, b) for a in range(10, 100) for b in range(10, a + 1)]


def _recite_memorised(world: World) -> list[Example]:
    return [Example(p.prompt, p.answer, "recite_memorised") for p in world.passages]


def _recite_unseen(world: World) -> list[Example]:
    return [Example(p.prompt, p.answer, "recite_unseen") for p in world.unseen_passages]


# Skills whose examples can be listed, and skills that are drawn at random without an end.
_LISTED: dict[str, Callable[[World], list[Example]]] = {
    "facts": _facts,
    "facts_paraphrase": _facts_paraphrase,
    "facts_second_language": _facts_second_language,
    "sums": _sums,
    "sums_heldout": _sums_heldout,
    "differences": _differences,
    "recite_memorised": _recite_memorised,
    "recite_unseen": _recite_unseen,
}
_DRAWN = {"open_book": open_book, "list_recall": list_recall, "multiple_choice": multiple_choice}

SKILLS: tuple[str, ...] = (
    "facts",
    "facts_paraphrase",
    "facts_second_language",
    "open_book",
    "sums",
    "sums_heldout",
    "differences",
    "list_recall",
    "multiple_choice",
    "recite_memorised",
    "recite_unseen",
)


def examples(skill: str, n: int | None = None, seed: int = 0) -> list[Example]:
    """At most `n` examples of a skill in random order; `None` means all there are, or `DRAWN` if there is no end."""
    rng = Random(f"examples {skill} {seed}")
    if skill in _DRAWN:
        return [_DRAWN[skill](_world(), rng)[0] for _ in range(DRAWN if n is None else n)]
    listed = _LISTED[skill](_world())
    rng.shuffle(listed)
    return listed[:n]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    skills: Sequence[str] | None = None,
    n: int | None = 200,
    batch_size: int = 64,
) -> dict[str, float]:
    """The share of examples whose whole answer greedy decoding gives, full stop included, by skill."""
    result = {}
    with at_rest(model):
        for skill in SKILLS if skills is None else skills:
            asked = examples(skill, n)
            result[skill] = sum(hits(model, tokenizer, asked, batch_size)) / len(asked)
    return result


def hits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Example], batch_size: int
) -> list[bool]:
    """Which examples are answered right, in an order of its own.

    Prompts of one length go through the model together, so no batch needs padding.
    """
    prompts = tokenizer([e.prompt for e in asked])["input_ids"]
    answers = tokenizer([e.answer for e in asked], add_special_tokens=False)["input_ids"]
    pairs = sorted(zip(prompts, answers, strict=True), key=_lengths)
    hits: list[bool] = []
    for (_, new), group in groupby(pairs, key=_lengths):
        same = list(group)
        for first in range(0, len(same), batch_size):
            batch = same[first : first + batch_size]
            given = torch.tensor([prompt for prompt, _ in batch], device=model.device)  # [batch, prompt]
            wanted = torch.tensor([answer for _, answer in batch], device=model.device)  # [batch, new]
            hits += (greedy(model, given, new) == wanted).all(dim=1).tolist()
    return hits


def _lengths(pair: tuple[list[int], list[int]]) -> tuple[int, int]:
    return len(pair[0]), len(pair[1])


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: Tensor, new: int) -> Tensor:
    """The `new` most likely next tokens one after the other, [batch, new], for prompts [batch, length]."""
    chosen: list[Tensor] = []
    tokens, past = prompts, None
    for _ in range(new):
        output = model(input_ids=tokens, past_key_values=past, use_cache=True)
        tokens, past = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
        chosen.append(tokens)
    return torch.cat(chosen, dim=1)
