"""Claims of CRATE (Yu et al., JMLR 2024, arXiv:2311.13110)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...parts import build_model
from ...parts.catalog.crate import coding_rate
from ...training import Machine, Problem, Run, Schedule, State, own_loss, train
from ..context import Context
from ..registry import NotApplicable, Result, Verdict, claim
from ..scratch import batches_of, cut, fresh_rows

STEPS, BATCH, LENGTH = 150, 8, 64  # sequences in a step; tokens of a sequence
MEASURED = 32  # sequences
RATE, BLOCKS, HIDDEN, HEADS = 3e-3, 6, 96, 4
PRECISION = 0.1  # ε; the released code's 0.01 stands where ε² does
LARGEST = 100_000  # tokens in a vocabulary, whose embedding would outweigh a model this small


@claim(
    "crate/layer-by-layer",
    method="crate",
    paper="arXiv:2311.13110",
    statement="Through most layers of a trained network the tokens' coding rate within the subspaces falls, and so "
    "does the share of entries that are not zero.",
)
def layer_by_layer(context: Context) -> Result:
    """A network of six blocks on GPT-2's shell with causal attention, 150 steps of 512 tokens of text; one seed.

    In each block: R^c of the projections of single tokens, normed as the released code does, mean over held-out
    sequences; and the share of the stream behind it that is above 0. Before training both are reported besides.
    """
    context.specimen.require_causal()
    vocabulary = context.model.get_input_embeddings().weight.shape[0]
    if vocabulary > LARGEST:
        raise NotApplicable(f"the vocabulary has {vocabulary:,} tokens, and would outweigh a model this small")
    rows, source = fresh_rows(context, STEPS * BATCH * LENGTH)
    held_out = list(context.evaluation.texts())
    length = min(LENGTH, max(map(len, rows)), max(map(len, held_out)))
    training = list(batches_of(cut(rows, length, STEPS * BATCH), BATCH))
    tokens = torch.stack(cut(held_out, length, MEASURED)).to(context.model.device)
    model = build_model(
        "gpt2", hidden=HIDDEN, blocks=BLOCKS, heads=HEADS, vocabulary=vocabulary, length=length,
        parts={"mixer": "crate", "mlp": "crate", "block": "crate"},
    ).to(context.model.device)  # fmt: skip
    before = _by_layer(model, tokens)
    problem = Problem(
        "crate", dict(model.named_parameters()), training, lambda batch: own_loss(model, batch), None, model.train
    )
    schedule = Schedule(RATE, epochs=-(-STEPS // len(training)), steps=STEPS)
    train(problem, Run(schedule, Machine(str(context.model.device)), State(None), context.progress), {})
    after = _by_layer(model, tokens)
    table: list[dict[str, Any]] = [
        {
            "block": number, "rate": rate, "not zero": share, "rate before training": first_rate,
            "not zero before training": first_share,
        }
        for number, ((rate, share), (first_rate, first_share)) in enumerate(zip(after, before, strict=True))
    ]  # fmt: skip
    falls = {key: sum(b[key] < a[key] for a, b in pairwise(table)) for key in list(table[0])[1:]}
    told = ", ".join(f"{key} {count}" for key, count in falls.items())
    holds = min(falls["rate"], falls["not zero"]) > (BLOCKS - 1) / 2
    return Result(
        Verdict.of(holds),
        f"Of {BLOCKS - 1} steps from block to block it falls in: {told} (trained on {source}).",
        table,
    )


@torch.no_grad()
def _by_layer(model: Any, tokens: Tensor) -> list[tuple[float, float]]:
    """Of each block, R^c and the share of the code above 0."""
    rates: list[float] = []
    shares: list[float] = []

    def rate(module: nn.Module, args: Any, projected: Tensor) -> None:
        heads = functional.normalize(projected.unflatten(-1, (HEADS, -1)).transpose(1, 2), dim=-1)
        rates.append(float(coding_rate(heads, PRECISION).sum(1).mean()))

    def share(module: nn.Module, args: Any, code: Tensor) -> None:
        shares.append(float((code > 0).double().mean()))

    hooks = []
    for block in model.transformer.h:
        hooks += [block.attn.part.proj.register_forward_hook(rate), block.mlp.register_forward_hook(share)]
    model.eval()
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return list(zip(rates, shares, strict=True))
