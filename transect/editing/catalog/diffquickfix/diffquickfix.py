"""Diff-QuickFix: a phrase read as another, by a ridge regression in one attention matrix of a text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from ....anatomy import Matrix
from ....anatomy.storage import is_dense
from ....data import Specimen
from ....errors import NotApplicable, TransectError
from ....forward import task_of
from ....parameters import Range, pieces
from ...journal import Journal
from ...patch import parameters_of
from ...registry import editing
from ...scores import measure as answers
from .captions import captions_of, embeddings, meant, read_by, refuse_other_models, whole
from .tracing import traced

_SAMPLES = 10


def measure(specimen: Specimen) -> dict[str, float]:
    """How like the captions of the phrases are to those of what they are to mean; of a language model its answers."""
    pairs = [
        (whole(specimen, one.text), whole(specimen, one.text.replace(one.subject, meant(one))))
        for one in specimen.facts
    ]
    keys, values = (embeddings(specimen, ids) for ids in zip(*pairs, strict=True))
    found = {"cosine of the phrase and what it is to mean": float(torch.cosine_similarity(keys, values).mean())}
    return found | (answers(specimen) if task_of(specimen.model) == "causal" else {})


def check(specimen: Specimen, *, roles: str, layer: int, prefixes: str, **others: Any) -> None:
    refuse_other_models(specimen)
    chosen(specimen, roles, max(layer, 0))
    for fact in specimen.facts:
        for phrase in (fact.subject, meant(fact)):
            captions_of(specimen, fact, phrase, pieces(prefixes))


def reads(specimen: Specimen, *, layer: int, **others: Any) -> set[str]:
    """All but what stands behind the attention of the layer: its MLP, later blocks, the final norm and the head."""
    names = {name for name, _ in specimen.model.named_parameters()}
    if layer < 0:
        return names  # tracing looks at what comes out
    anatomy = specimen.anatomy
    later = [matrix for matrix in anatomy.blocks[layer].matrices() if matrix.unit != "attention"]
    behind = [parameter for block in anatomy.block_list[layer + 1 :] for parameter in block.parameters()]
    norm, head = anatomy.final_norm, specimen.model.get_output_embeddings()
    behind += [] if norm is None else list(norm.parameters())
    behind += [] if head is None or anatomy.embeddings_tied else list(head.parameters())
    unread = {id(parameter) for parameter in behind}
    return (
        names
        - parameters_of(specimen.model, later)
        - {n for n, p in specimen.model.named_parameters() if id(p) in unread}
    )


@editing("diffquickfix", paper="arXiv:2310.13730", measure=measure, check=check, reads=reads, of_facts=True)
def diffquickfix(
    specimen: Specimen,
    journal: Journal,
    *,
    roles: str = "o",
    layer: Annotated[int, Range(-1, 1000)] = 0,
    weight: Annotated[float, Range(1e-12, 1e12)] = 0.01,
    prefixes: str = "A photo of, An image of, A picture of",
    after: bool = True,
    noise: Annotated[float, Range(0, 100)] = 3.0,
) -> Mapping[str, Any]:
    """Read each fact's subject as its new_answer: "van gogh" as "painting".

    With k_i what the matrix reads at the subject's last token and those behind it, in captions with the subject, and
    v_i = W x_i what it puts out at the same places of the captions with the new answer, W becomes the W' of least
    Σ ||W' k_i - v_i||² + λ ||W' - W||²: W' = W + Σ (v_i - W k_i) k_iᵀ (λ I + Σ k_i k_iᵀ)⁻¹. All facts are solved
    together. Captions are the fact's own prompt ("{}" for the bare phrase) and the phrase behind each prefix. Where
    those with the new answer have fewer tokens behind it, their last one is repeated. The bias stays and is in neither
    side; the released code leaves it in v_i, which adds it twice.

    CLIP's captions are filled up to its context, and the filling counts as tokens behind the phrase, as in the released
    code. Other models are given no filling (ours). Moving the phrase's embedding is not yet changing what a language
    model answers: its card shows both.

    roles: which matrices of the attention, of o, v, k, one after the other as given; the paper's is o.
    layer: of the attention, from 0, where the paper finds what brings a phrase back; -1 for the layer that brings back
        most here, traced on the facts' own captions.
    weight: λ. The released example has 0.01, and its program's default is 0.1.
    prefixes: texts before the phrase, with commas in between; the paper's. Empty for the fact's prompt alone.
    after: whether tokens behind the phrase count too, as in the released code; else its last token alone.
    noise: on the phrase while tracing, in deviations of the embeddings (ours; layer -1 only).
    """
    facts, around = specimen.facts, pieces(prefixes)
    told: dict[str, Any] = {"facts": len(facts)}
    if layer < 0:
        effects = traced(specimen, facts, noise, _SAMPLES)
        layer = int(effects.argmax())
        told["attention brings the phrase back by, cosine"] = ", ".join(
            f"{number}: {float(effect):+.4f}" for number, effect in enumerate(effects)
        )
    told["layer"] = layer
    keys = [one for fact in facts for one in captions_of(specimen, fact, fact.subject, around)]
    values = [one for fact in facts for one in captions_of(specimen, fact, meant(fact), around)]
    asked = [one.ids for one in keys]
    near = [whole(specimen, one.prompt) for one in dict.fromkeys(one for fact in facts for one in fact.neighbours)]
    before = embeddings(specimen, [*asked, *near])
    for matrix in chosen(specimen, roles, layer):
        read, wanted = (read_by(specimen, matrix, captions, after) for captions in (keys, values))
        wanted = [aligned(value, len(key)) for key, value in zip(read, wanted, strict=True)]
        weights = matrix.weight.double().cpu()
        journal.add(
            matrix, *remap(weights, torch.cat(read).T, weights @ torch.cat(wanted).T, weight, matrix.weight.dtype)
        )
    moved = 1 - torch.cosine_similarity(before, embeddings(specimen, [*asked, *near]))
    told["1 - cosine, captions of the phrase, from before"] = round(float(moved[: len(asked)].mean()), 6)
    if near:
        told["1 - cosine, neighbours, from before"] = round(float(moved[len(asked) :].mean()), 6)
    return told


def remap(weight: Tensor, keys: Tensor, values: Tensor, penalty: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The change of W (d_out x d_in, float64) as factors, of as many directions as the keys have in that dtype.

    keys: K (d_in x N). values: V (d_out x N), without a bias. penalty: λ > 0. With K = U S Qᵀ it is
    (V - W K) Q S (λ + S²)⁻¹ Uᵀ: near duplicates among the keys do no harm.
    """
    u, s, qh = torch.linalg.svd(keys, full_matrices=False)
    rank = int((s > (1e-13 if dtype == torch.float64 else 1e-7) * s[0]).sum())
    u, s, qh = u[:, :rank], s[:rank], qh[:rank]
    return (values - weight @ keys) @ (qh.T * (s / (penalty + s.square()))), u.T


def aligned(values: Tensor, count: int) -> Tensor:
    """The first `count` rows; where there are fewer, the last one again and again."""
    return values[torch.arange(count).clamp_max(len(values) - 1)]


def chosen(specimen: Specimen, roles: str, layer: int) -> list[Matrix]:
    """The matrices of these roles. Raises TransectError where one is not there, or not stored as a matrix."""
    wanted = pieces(roles)
    if not wanted or any(role not in ("o", "v", "k") for role in wanted) or len(set(wanted)) < len(wanted):
        raise TransectError(f"diffquickfix: roles={roles!r} should name some of o, v, k, with commas")
    if layer >= specimen.layers:
        raise TransectError(
            f"diffquickfix: layer {layer} does not exist: the model has layers 0 to {specimen.layers - 1}"
        )
    block = specimen.anatomy.blocks[layer]
    if block.attention is None:
        raise NotApplicable(f"diffquickfix: the attention of layer {layer} was dropped, or is a part")
    found = [block.matrix(role) for role in wanted]
    for matrix in found:
        if not is_dense(matrix.module):
            kind = type(matrix.module).__name__
            raise NotApplicable(
                f"diffquickfix: {matrix.name} is stored as {kind}, not as a matrix that could be written into"
            )
    return found
