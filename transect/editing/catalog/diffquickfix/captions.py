"""Captions around a phrase, what a matrix of the model reads at their tokens, and their embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....anatomy import Matrix
from ....anatomy.body import body_of
from ....data import Fact, Specimen
from ....errors import BadData, NotApplicable, TransectError
from ....forward import changed, stopping_behind, watch
from ....forward.points import Place, Reader
from ....probes.tracing import subject_span

_TOKENS = 8192  # in one pass


@dataclass(frozen=True)
class Caption:
    """ids: its tokens, those around a text included (1-D). last: position of the phrase's last token."""

    ids: Tensor
    last: int


def captions_of(specimen: Specimen, fact: Fact, phrase: str, prefixes: Sequence[str]) -> list[Caption]:
    """The phrase in the fact's own prompt, then behind each prefix; all as long as the model's context at most."""
    prompts = [fact.prompt, *(f"{prefix} {{}}" for prefix in prefixes)]
    return [caption(specimen, replace(fact, prompt=prompt, subject=phrase)) for prompt in dict.fromkeys(prompts)]


def caption(specimen: Specimen, fact: Fact) -> Caption:
    """The fact's prompt with its subject as the phrase."""
    return Caption(whole(specimen, fact.text), subject_span(specimen, fact)[1] - 1)


def whole(specimen: Specimen, text: str) -> Tensor:
    """Token ids of a text, with what the tokenizer puts before and behind it."""
    specimen.encode(text)  # refuses what the model has no embedding for
    ids = torch.tensor(specimen.tokenizer(text)["input_ids"], dtype=torch.long)
    context = getattr(specimen.anatomy.config, "max_position_embeddings", None)
    if context is not None and len(ids) > context:
        raise TransectError(f"the caption {text[:60]!r} has {len(ids)} tokens, and the model's context has {context}")
    return ids


def fills_up(specimen: Specimen) -> bool:
    """Whether captions are filled up to the context and the model reads the filling, as CLIP's text tower does."""
    return specimen.anatomy.architecture.name == "clip"


def batch_of(specimen: Specimen, ids: Sequence[Tensor]) -> dict[str, Tensor]:
    """Token ids on the model's device, filled up on the right: to the context, or with a mask to the longest."""
    length = specimen.anatomy.config.max_position_embeddings if fills_up(specimen) else max(map(len, ids))
    filling = getattr(specimen.tokenizer, "pad_token_id", None) or 0
    rows = torch.full((len(ids), length), filling)
    for row, one in zip(rows, ids, strict=True):
        row[: len(one)] = one
    made = {"input_ids": rows}
    if not fills_up(specimen):
        made["attention_mask"] = (torch.arange(length) < torch.tensor([[len(one)] for one in ids])).long()
    return {name: tensor.to(specimen.model.device) for name, tensor in made.items()}


def run(specimen: Specimen, batch: Mapping[str, Tensor]) -> None:
    """One pass of the part of the model that holds the blocks."""
    body_of(specimen.model)(**batch)


@torch.no_grad()
def read_by(specimen: Specimen, matrix: Matrix, captions: Sequence[Caption], after: bool) -> list[Tensor]:
    """What a matrix reads (tokens x d_in, float64) at each caption's phrase's last token.

    after: and at those behind it, up to the caption's end, or where captions are filled up, to that of the filling.
    """
    found: list[Tensor] = []
    for part in _parts(specimen, captions):
        seen: list[Tensor] = []
        reader = Reader(
            Place(matrix.host, before=True, block=specimen.anatomy.block_list[matrix.block.index]), seen.append
        )
        try:
            with stopping_behind(specimen.anatomy, matrix.block.index):
                run(specimen, batch_of(specimen, [one.ids for one in part]))
        finally:
            reader.remove()
        for one, states in zip(part, seen[0], strict=True):
            end = (len(states) if fills_up(specimen) else len(one.ids)) if after else one.last + 1
            found.append(states[one.last : end].double().cpu())
    return found


@torch.no_grad()
def embeddings(specimen: Specimen, ids: Sequence[Tensor], changes: Mapping[Any, Any] | None = None) -> Tensor:
    """The texts' embeddings (n x d, float64): what the last block leaves, behind the final norm, at one token.

    At the last token where the model looks back only (CLIP pools there too), else the mean over all tokens (ours).
    """
    anatomy, found = specimen.anatomy, []
    looks_back = _looks_back(specimen)
    for part in _parts(specimen, ids):
        with changed(anatomy, dict(changes or {})), watch(anatomy, ["residual"], [specimen.layers]) as seen:
            run(specimen, batch_of(specimen, part))
        states = seen.residual[specimen.layers]
        states = states if anatomy.final_norm is None else anatomy.final_norm(states)
        for one, state in zip(part, states.double().cpu(), strict=True):
            found.append(state[len(one) - 1] if looks_back else state[: len(one)].mean(0))
    return torch.stack(found)


@torch.no_grad()
def _looks_back(specimen: Specimen) -> bool:
    """Whether a token's state depends on earlier tokens alone: another last token is then not seen at the first."""
    ids = torch.tensor([[3, 4, 5], [3, 4, 6]], device=specimen.model.device)
    with watch(specimen.anatomy, ["residual"], [specimen.layers]) as seen:
        run(specimen, {"input_ids": ids})
    first, second = seen.residual[specimen.layers][:, 0]
    return bool((first - second).abs().max() <= 1e-5 * first.abs().max())


def _parts(specimen: Specimen, items: Sequence[Any]) -> list[Sequence[Any]]:
    length = specimen.anatomy.config.max_position_embeddings if fills_up(specimen) else max(
        len(getattr(one, "ids", one)) for one in items
    )  # fmt: skip
    step = max(1, _TOKENS // length)
    return [items[start : start + step] for start in range(0, len(items), step)]


def refuse_other_models(specimen: Specimen) -> None:
    """NotApplicable for what reads no text, or images too and cannot run without."""
    name = type(specimen.model).__name__
    if getattr(specimen.model, "main_input_name", "input_ids") == "pixel_values":
        raise NotApplicable(f"diffquickfix maps phrases of a text, and {name} reads images")
    try:
        specimen.model.get_input_embeddings()
    except NotImplementedError:
        raise NotApplicable(
            f"diffquickfix edits a text encoder, and {name} is more than that: open its text tower alone, such as the "
            "text_encoder folder of a pipeline, or CLIPTextModelWithProjection.from_pretrained"
        ) from None


def meant(fact: Fact) -> str:
    """The phrase that the subject is to be read as."""
    if not (fact.new_answer or "").strip():
        raise BadData(
            f"diffquickfix: {fact.text!r} has no new_answer, and that is the phrase to read {fact.subject!r} as"
        )
    return str(fact.new_answer)
