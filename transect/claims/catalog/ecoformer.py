"""Claims of EcoFormer (Liu et al., NeurIPS 2022, arXiv:2209.09004)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...anatomy import Anatomy
from ...conversion import conversion_named
from ...forward import watch
from ...parts import Around
from ...parts.catalog.ecoformer import EcoFormer, binary_codes, codes_of, learned_hash, similarity_labels
from ..context import Context
from ..converted import converted
from ..registry import NotApplicable, Result, Verdict, claim

SIMILAR, BITS, ANCHORS = 10, 16, 25
SEQUENCES, SEEDS = 4, (0, 1)  # learned from, and tested on; draws of anchors and random projections
STEPS, RATE = 30, 1e-3
_CLEAR = 2  # standard errors


@claim(
    "ecoformer/learned-codes",
    method="ecoformer",
    paper="arXiv:2209.09004",
    statement="Codes whose projection was learned from what is similar tell a token's most similar tokens from its "
    "least similar ones better than codes of a random projection, also among new tokens.",
)
def learned_codes(context: Context) -> Result:
    """Of the model's own queries before rotation, by heads, each of length 1: as if they were keys too.

    Learned with the paper's settings from calibration sequences. A head's margin is the mean share of bits that agree
    less those that do not, among each held-out token's 10 most similar ones, less the same of its 10 least similar
    ones. Errors are over heads; two draws of the anchors and the projections that both begin from. The label error,
    |Y - H Hᵀ / b|² over |Y|², is what learning lowers, and is not judged.
    """
    seen, new = (_queries(context, rows) for rows in (context.calibration, context.evaluation))
    rows = []
    for layer in seen:
        for seed in SEEDS:
            margins, errors = {}, {}
            for way, steps in (("random", 0), ("learned", 100)):
                hashed = learned_hash(seen[layer], ANCHORS, BITS, similar=SIMILAR, steps=steps, seed=seed)
                codes = codes_of(new[layer], hashed)
                margins[way], errors[way] = margin(new[layer], codes), label_error(new[layer], codes)
            rows += [
                {"layer": layer, "head": head, "draw": seed}
                | {way: float(found[head]) for way, found in margins.items()}
                | {f"label error, {way}": float(found[head]) for way, found in errors.items()}
                for head in range(new[layer].shape[1])
            ]
    gains = torch.tensor([row["learned"] - row["random"] for row in rows]).double()
    error = float(gains.std() / len(gains) ** 0.5)
    means = {way: sum(row[way] for row in rows) / len(rows) for way in ("random", "learned")}
    left = {way: sum(row[f"label error, {way}"] for row in rows) / len(rows) for way in means}
    told = f"Margin of learned codes {means['learned']:.4f}, of random ones {means['random']:.4f}: more by "
    told += f"{float(gains.mean()):.4f} ± {error:.4f}, in {int((gains > 0).sum())} of {len(gains)} heads and draws. "
    told += f"Label error {left['learned']:.3f} and {left['random']:.3f}"
    return Result(Verdict.of(gains.mean() > _CLEAR * error), told, rows)


def margin(z: Tensor, codes: Tensor) -> Tensor:
    """How much more of their codes a token's most similar tokens share than its least similar ones, for each head."""
    alike, shared = z @ z.mT, codes @ codes.mT / codes.shape[-1]
    near, far = (
        shared.gather(-1, alike.topk(SIMILAR, -1, largest=largest).indices).mean((-1, -2)) for largest in (True, False)
    )
    return (near - far).mean(0)


def label_error(z: Tensor, codes: Tensor) -> Tensor:
    """How far the products of codes are from the labels of similar and other tokens, over the labels, for each head."""
    labels = similarity_labels(z, SIMILAR)
    apart = (labels - codes @ codes.mT / codes.shape[-1]).square().sum((0, 2, 3))
    return apart / labels.square().sum((0, 2, 3))


@torch.no_grad()
def _queries(context: Context, data: Any) -> dict[int, Tensor]:
    """Layer -> queries of length 1 (S x heads x N x head size), of the first sequences of full length."""
    context.require_language_model()
    texts = list(data.texts())
    length = max(map(len, texts), default=0)
    chosen = [text for text in texts if len(text) == length][:SEQUENCES]
    if length <= 2 * SIMILAR:
        raise NotApplicable(f"it needs sequences of more than {2 * SIMILAR} tokens, and there are {length}")
    ids = torch.stack(chosen).to(context.model.device)
    with watch(context.anatomy, ["q"]) as seen:
        context.model(input_ids=ids)
    size = context.anatomy.head_size
    found = {
        layer: functional.normalize(q.float().unflatten(-1, (-1, size)).transpose(1, 2), dim=-1)
        for layer, q in seen.q.items()
    }
    if not found:
        raise NotApplicable("no layer of this model has queries")
    return found


@claim(
    "ecoformer/trained-codes",
    method="ecoformer",
    paper="arXiv:2209.09004",
    statement="Converted and trained as long, a model with learned codes is better than with random codes of as many "
    "bits, and than with the signs of queries.",
)
def trained_codes(context: Context) -> Result:
    """Queries and keys merged, then 30 steps at 1e-3 in both stages (the paper: 130 epochs at 5e-5, from a source with
    shared queries and keys). Random codes have random projections of the learned anchors; signs are those of 16 random
    directions. The same training of softmax attention with the shared projection is reported, and not judged.
    """
    rows, found = [], {}
    for way in ("learned", "random", "signs", "softmax"):
        settings = {"bits": BITS, "anchors": ANCHORS, "similar": SIMILAR, "hash_steps": 100 if way == "learned" else 0}
        stages = conversion_named("ecoformer").training(conversion_named("ecoformer").settings(settings))
        if way == "softmax":
            stages = [replace(stages[0], share=1.0, end=None)]
        change = _read_signs if way == "signs" else lambda anatomy: None
        made = converted(context, "ecoformer", settings, STEPS, lr=RATE, change=change, stages=stages)
        found[way] = made.after
        rows.append({"way": way, "converted": made.before.loss, "trained": made.after.loss})
    held = []
    for way in ("random", "signs"):
        more, error = found[way].minus(found["learned"])
        held.append(more > _CLEAR * error)
    told = ", ".join(f"{row['way']} {row['trained']:.4f} (untrained {row['converted']:.4f})" for row in rows)
    told += f"; as it was {context.dense.loss:.4f}"
    return Result(Verdict.of(all(held)), told, rows)


def _read_signs(anatomy: Anatomy) -> None:
    """Let codes be the signs of fixed random directions of each head's units."""
    draw = torch.Generator().manual_seed(0)
    for block in anatomy.blocks:
        part = block.part("attention")
        assert isinstance(part, EcoFormer)
        directions = torch.randn(part.head_size, BITS, generator=draw)

        def codes(x: Tensor, around: Around, part: EcoFormer = part, directions: Tensor = directions) -> Tensor:
            z = part.units(x, around)
            return binary_codes(z @ directions.to(z))

        part.codes = codes  # type: ignore[method-assign]
