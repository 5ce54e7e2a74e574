"""Claims of Monarch matrices (Dao et al., ICML 2022, arXiv:2204.00595)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ...anatomy import Anatomy
from ...compression import method as registered
from ...forward import task_of
from ...layers import MonarchLinear
from ...operators import LowRank
from ..context import Context, Measured, Variant
from ..descent import descend
from ..ordering import claim_order
from ..registry import NotApplicable, Result, Verdict, claim

MONARCH, SVD = registered("monarch"), registered("svd")
WIDTH, NEURONS = 64, 256  # of the model that is trained
STEPS, BATCH, RATE, SEEDS = 200, 8, 2e-3, (0, 1)


# The closed form alone is not a good compressor; the paper trains after it.
claim_order(
    "monarch/projection-above-svd", (Variant(SVD), Variant(MONARCH)),
    paper="Transect's own",
    statement="Without training, Monarch projection loses more than SVD of the same size.",
    any_task=True,
)  # fmt: skip


@claim(
    "monarch/trained-mlp",
    method="monarch",
    paper=MONARCH.paper,
    statement="Trained from scratch, a Monarch MLP reaches a loss no higher than a low-rank MLP of the same size.",
    uses=["monarch"],
)
def trained_mlp(context: Context) -> Result:
    """Scaled down: a Llama of two blocks, width 64 and 256 neurons, trained on the calibration data from two seeds.

    The same data, order and schedule for both; either structure has 5,120 numbers a matrix, 0.31 of the dense ones.
    """
    if task_of(context.model) != "causal":
        raise NotApplicable(
            f"it trains a model that predicts the next token, and {type(context.model).__name__} does not"
        )
    numbers = []
    for seed in SEEDS:
        structured, thin = trained(context, monarch_layer, seed), trained(context, low_rank_layer, seed)
        difference, error = structured.minus(thin)
        numbers.append(
            {"seed": seed, "steps": STEPS, "monarch_loss": structured.loss, "low_rank_loss": thin.loss,
             "monarch_kept": structured.kept, "low_rank_kept": thin.kept,
             "difference": difference, "standard_error": error}
        )  # fmt: skip
    held = [row["difference"] <= 0 for row in numbers]
    return Result(
        Verdict.of(all(held)),
        f"No higher from {sum(held)} of {len(held)} seeds, after {STEPS} steps of {BATCH} sequences",
        numbers,
    )


def monarch_layer(d_in: int, d_out: int) -> nn.Module:
    """A Monarch layer to train, without a bias."""
    return MonarchLinear(d_in, d_out, bias=False)


def low_rank_layer(d_in: int, d_out: int) -> nn.Module:
    """As many numbers as `monarch_layer`, or fewer; each factor is initialised like a linear layer."""
    numbers = sum(parameter.numel() for parameter in monarch_layer(d_in, d_out).parameters())
    return LowRank(d_in, d_out, numbers // (d_in + d_out), bias=False)


def trained(context: Context, make: Callable[[int, int], nn.Module], seed: int) -> Measured:
    """The held-out loss of a small model whose MLP matrices `make` makes, trained for STEPS steps (see `descend`)."""
    rows = list(context.calibration.texts())
    device, vocabulary = context.model.device, context.anatomy.config.vocab_size
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=max(map(len, rows)) + 1, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        anatomy = Anatomy(model)
        whole = anatomy.matrix_bytes()
        for matrix in anatomy.matrices(("gate", "up", "down")):
            d_out, d_in = matrix.shape
            matrix.replace(make(d_in, d_out))
    model.to(device)
    order = torch.Generator().manual_seed(seed)

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(rows), (BATCH,), generator=order).tolist()
        length = min(len(rows[index]) for index in chosen)
        ids = torch.stack([rows[index][:length] for index in chosen]).to(device)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    descend(model, loss, STEPS, RATE)
    return context.evaluate(model, anatomy.matrix_bytes() / whole)
