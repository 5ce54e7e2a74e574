"""The five editing problems: what an edit is to make more or less probable, and what is refused before any work.

Source: Hase et al., arXiv:2301.04213, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..data import Fact, Specimen
from ..errors import BadData, TransectError
from ..forward import changed, last_logits, recitations
from ..probes.tracing import corrupting, embedding_deviation, subject_noise, subject_span

Problem = Literal["injection", "reversal", "erasure", "amplification", "forcing"]
SAMPLES = 10  # draws of the noise, as in the study


@dataclass(frozen=True)
class Request:
    """One fact to edit.

    prompt, target: token ids (1-D) of the prompt and of the answer whose probability is to change. lowers: whether it
    is to fall. noise: samples x subject tokens x d, added to the subject's embeddings during the edit (forcing), or
    None.
    """

    fact: Fact
    prompt: Tensor
    target: Tensor
    lowers: bool
    noise: Tensor | None


class NothingToEdit(TransectError):
    """The model does already what an edit was to make it do."""


def requests(specimen: Specimen, problem: Problem, noise: float = 3.0) -> list[Request]:
    """What an edit of the specimen's facts is to do.

    problem: "injection" makes the new answer probable; "reversal" what the model says greedily when noise lies on the
    subject (one draw); "erasure" makes the true answer improbable; "amplification" makes it more probable; "forcing"
    makes it probable although noise lies on the subject. noise: its standard deviation, in those of the embeddings.

    Raises TransectError, before anything else: no next-token head; a subject that is not found among the prompt's
    tokens; a prompt and answer longer than the context; facts that contradict each other. NothingToEdit: an answer to
    put in that the model gives already, token by token; an answer to erase that it does not give.
    """
    specimen.require_causal()
    facts = specimen.facts
    spans = [subject_span(specimen, fact) for fact in facts]
    prompts = [specimen.encode(fact.text) for fact in facts]
    truths = [specimen.continuation(fact.text, _new(fact) if problem == "injection" else fact.answer) for fact in facts]
    context = getattr(specimen.anatomy.config, "max_position_embeddings", None)
    for fact, prompt, target in zip(facts, prompts, truths, strict=True):
        if context is not None and len(prompt) + len(target) > context:
            raise TransectError(
                f"the prompt {fact.text[:60]!r} and its answer have {len(prompt) + len(target)} tokens, and the "
                f"model's context has {context}"
            )
    _refuse_contradictions(facts, truths)
    draws: list[Tensor | None] = [None] * len(facts)
    if problem in ("reversal", "forcing"):
        deviation = noise * embedding_deviation(specimen)
        draws = [subject_noise(specimen, fact, deviation, SAMPLES, specimen.seed) for fact in facts]
    said = recitations(specimen.model, list(zip(prompts, truths, strict=True)))
    targets = truths
    if problem == "reversal":
        targets = [
            _greedy(specimen, prompt, len(truth), corrupting(draw[:1], span))
            for prompt, truth, draw, span in zip(prompts, truths, draws, spans, strict=True)
            if draw is not None
        ]
    _refuse_without_effect(specimen, problem, facts, targets, said)
    return [
        Request(fact, prompt, target, problem == "erasure", draw if problem == "forcing" else None)
        for fact, prompt, target, draw in zip(facts, prompts, targets, draws, strict=True)
    ]


def fulfilled(specimen: Specimen, request: Request) -> bool:
    """Whether the model says the target, or for an erasure something else. With noise it is not asked: True."""
    if request.noise is not None:
        return True
    (said,) = recitations(specimen.model, [(request.prompt, request.target)])
    return torch.equal(said, request.target) != request.lowers


def _new(fact: Fact) -> str:
    if not fact.new_answer:
        raise BadData(f"the fact {fact.text!r} has no new_answer, and an edit needs to know what to put in")
    return fact.new_answer


def _refuse_contradictions(facts: Sequence[Fact], targets: Sequence[Tensor]) -> None:
    seen: dict[tuple[str, str], tuple[int, ...]] = {}
    for fact, target in zip(facts, targets, strict=True):
        key = (" ".join(fact.text.split()), fact.subject.strip())
        if seen.setdefault(key, tuple(target.tolist())) != tuple(target.tolist()):
            raise BadData(
                f"two edits contradict each other: {fact.text!r} is to be answered in two ways; keep one of them"
            )


def _refuse_without_effect(
    specimen: Specimen, problem: Problem, facts: Sequence[Fact], targets: Sequence[Tensor], said: Sequence[Tensor]
) -> None:
    right = [torch.equal(target, it) for target, it in zip(targets, said, strict=True)]
    wrong = {"injection": True, "reversal": True, "erasure": False}.get(problem)
    bad = [number for number, one in enumerate(right) if one == wrong]
    if not bad:
        return
    fact, answer = facts[bad[0]], specimen.decode(targets[bad[0]]).strip()
    reason = {
        "injection": f"the model already answers {answer!r}: there is nothing to put in",
        "reversal": f"the model says {answer!r} with and without the noise: there is nothing to reverse",
        "erasure": f"the model does not answer {answer!r}: there is nothing to erase",
    }[problem]
    raise NothingToEdit(f"{fact.text!r}: {reason}. This is so for {len(bad)} of {len(facts)} facts; leave them out")


@torch.no_grad()
def _greedy(specimen: Specimen, prompt: Tensor, count: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`count` tokens that the model says after a prompt while its embeddings are changed."""
    ids = prompt[None].to(specimen.model.device)
    with changed(specimen.anatomy, {("residual", 0): change}):
        for _ in range(count):
            said = last_logits(specimen.model, ids).argmax(-1)
            ids = torch.cat([ids, said], 1)
    return ids[0, len(prompt) :].cpu()
