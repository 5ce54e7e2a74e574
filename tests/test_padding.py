"""Padding on either side, and several sequences in a row, change nothing of what is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.nn import functional

from tests.models import CAUSAL, VOCABULARY, inputs, tiny
from transect import Anatomy
from transect.compression.divergence import Divergence
from transect.data import Batches, Specimen
from transect.evaluation import evaluate_loss
from transect.forward import backpropagate, feeds_of, predictions, run_blocks, scored, summed_loss
from transect.forward.objective import inputs_of
from transect.probes import run_probes
from transect.probes.curvature import counted_positions, factors
from transect.statistics import (
    BlockSimilarity,
    FeatureNorm,
    FisherDiagonal,
    HeadContribution,
    InputCovariance,
    InputMean,
    OutputGradientCovariance,
    SublayerSimilarity,
    collect,
)
from transect.training.machine import Machine
from transect.training.objectives import distance_from, held_out_loss

WANTED = [
    InputCovariance(), InputMean(), FeatureNorm(1), FeatureNorm(2), OutputGradientCovariance(),
    OutputGradientCovariance(trim=0.125, clip=(0.1, 10)), FisherDiagonal(), HeadContribution(), BlockSimilarity(),
    SublayerSimilarity(),
]  # fmt: skip
ENCODERS = ["bert", "roberta"]
SIDES = ["left", "right"]
PAD = 9  # a token like any other: the mask says where padding is


def exact(name: str) -> torch.dtype:
    """float64; but the attention of Gemma 2 and BLOOM gives NaN in it where a position sees nothing but padding, and
    GPT-J's computes in float32 whatever the type."""
    return torch.float32 if name in ("gemma2", "bloom", "gptj") else torch.float64


def rows(lengths: tuple[int, ...] = (16, 9, 1)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(10, VOCABULARY, (length,), generator=generator) for length in lengths]


def masked(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """With labels for a masked language model: every third token, by its value."""
    if name in ENCODERS:
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] % 3 != 0, -100)
    return batch


def apart(texts: list[Tensor], name: str = "") -> Batches:
    return Batches([masked({"input_ids": text[None]}, name) for text in texts])


def padded(texts: list[Tensor], side: str, name: str = "") -> Batches:
    longest = max(map(len, texts))
    missing = [(longest - len(text), 0) if side == "left" else (0, longest - len(text)) for text in texts]
    ids = torch.stack([functional.pad(text, by, value=PAD) for text, by in zip(texts, missing, strict=True)])
    mask = torch.stack([functional.pad(torch.ones_like(text), by) for text, by in zip(texts, missing, strict=True)])
    return Batches([masked({"input_ids": ids, "attention_mask": mask}, name)])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_the_loss_and_every_statistic(name, side):
    model, texts = tiny(name, dtype=exact(name)), rows()
    near = {"rtol": 1e-7, "atol": 1e-11} if model.dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    together, alone = padded(texts, side, name), apart(texts, name)
    found, expected = evaluate_loss(model, together), evaluate_loss(model, alone)
    assert found.tokens == expected.tokens and found.accuracy == expected.accuracy
    assert found.loss == pytest.approx(expected.loss, rel=near["rtol"])
    sums = [collect(Anatomy(model), batches, WANTED).state() for batches in (together, alone)]
    assert sums[0].keys() == sums[1].keys()
    for key, tensor in sums[1].items():
        torch.testing.assert_close(sums[0][key], tensor, **near, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma3", "roberta"])
def test_single_blocks_and_what_repairs_and_searches_measure(name, side):
    model, texts = tiny(name, dtype=torch.float64), rows()
    other = tiny(name, seed=3, dtype=torch.float64)
    together, alone = padded(texts, side, name), apart(texts, name)
    (feed,) = feeds_of(Anatomy(model), together)
    last = len(Anatomy(model).block_list)
    with torch.no_grad():
        states = run_blocks(Anatomy(model), feed, 0, feed.hidden)[feed.mask.bool()]
        each = [run_blocks(Anatomy(model), one, 0, one.hidden)[0] for one in feeds_of(Anatomy(model), alone)]
        torch.testing.assert_close(states, torch.cat(each), rtol=1e-9, atol=1e-9)
        assert len(feed.calls) == last
        machine = Machine("cpu")
        held_out = [held_out_loss(model, batches, machine) for batches in (together, alone)]
        distances = [
            sum(float(distance_from(other, model, batch, 2.0)[0]) for batch in batches) for batches in (together, alone)
        ]
        searched = [Divergence(Anatomy(model), [], {}, list(batches)).of(other) for batches in (together, alone)]
    for pair in (held_out, distances, searched):
        assert pair[0] == pytest.approx(pair[1], rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_probes_of_a_text(name):
    """Those that look at running text, and that run experiments on a piece of it."""
    model, texts = tiny(name), rows((60, 60, 41))
    wanted: dict[str, Any] = {one: {} for one in ("attention-sinks", "lazy-neuron", "nuclear-norm", "latent-language",
                                                  "depth-efficiency", "lac", "feature-neurons")}  # fmt: skip
    found = [
        run_probes(Specimen(Anatomy(model), data=batches), wanted)
        for batches in (apart(texts), padded(texts, "left"), padded(texts, "right"))
    ]
    assert found[0].results.keys() == found[1].results.keys() and len(found[0]) >= 4, found[0].refused
    for one, result in found[0].items():
        for side in (1, 2):
            for quantity, expected in result.quantities.items():
                got = found[side][one].quantities[quantity].values
                torch.testing.assert_close(
                    got, expected.values, rtol=2e-3, atol=2e-4, equal_nan=True, msg=f"{one} {quantity}"
                )


def test_curvature_from_either_side():
    model, texts = tiny("gpt2", dtype=torch.float64), rows()
    matrices = Anatomy(model).blocks[1].matrices()
    left, right = (
        factors(Specimen(Anatomy(model)), matrices, list(padded(texts, side))).state() for side in SIDES
    )  # fmt: skip
    for key, tensor in right.items():
        torch.testing.assert_close(left[key], tensor, rtol=1e-7, atol=1e-11)
    counted = counted_positions(Anatomy(model), next(iter(padded(texts, "left"))))
    assert counted.sum(1).tolist() == [15, 8, 0] and not counted[:, -1].any()


def test_labels_at_the_first_token_are_not_predicted_from_padding():
    model, (batch,) = tiny("llama"), padded(rows(), "left")
    _, plain = predictions(model, batch)
    _, given = predictions(model, {**batch, "labels": batch["input_ids"]})
    assert torch.equal(plain, given) and len(plain) == 15 + 8


def test_positions_that_the_user_gives_are_kept():
    model, (batch,) = tiny("gpt2"), padded(rows(), "left")
    mine = torch.arange(16).expand(3, -1)
    assert torch.equal(inputs_of(model, {**batch, "position_ids": mine})["position_ids"], mine)
    assert inputs_of(model, batch)["position_ids"][1].tolist() == [0] * 7 + list(range(9))
    assert inputs_of(tiny("roberta"), batch)["position_ids"][1, -9:].tolist() == list(range(1, 10))
    for whole in ({"input_ids": batch["input_ids"]}, {**batch, "attention_mask": torch.ones_like(mine)}):
        assert "position_ids" not in inputs_of(model, whole)


def packed(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": inputs("llama", batch=1, length=len(positions), seed=seed)["input_ids"],
        "position_ids": positions[None],
    }


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_rows_packed_otherwise_have_masks_and_rotations_of_their_own(name):
    """Batches of one shape; the plain ones among them still share theirs."""
    anatomy = Anatomy(tiny(name, dtype=torch.float64))
    plain = {"input_ids": inputs(name, batch=1, length=12, seed=3)["input_ids"]}
    batches = [packed([12]), packed([5, 7]), packed([7, 5], seed=1), plain, {"input_ids": plain["input_ids"] + 0}]
    feeds = feeds_of(anatomy, batches)
    for batch, feed in zip(batches, feeds, strict=True):
        with torch.no_grad():
            whole = anatomy.model.base_model(**batch, use_cache=False).last_hidden_state
            states = run_blocks(anatomy, feed, 0, feed.hidden)
        torch.testing.assert_close(anatomy.final_norm(states), whole, rtol=1e-12, atol=1e-12)

    def tensors(value: Any) -> list[int]:
        if isinstance(value, Tensor):
            return [id(value)]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return [found for part in parts for found in tensors(part)]

    assert tensors(feeds[3].calls) == tensors(feeds[4].calls)


def test_no_prediction_across_packed_sequences():
    model = tiny("llama", dtype=torch.float64)
    batch = packed([5, 7])
    parts = [{"input_ids": part} for part in batch["input_ids"].split([5, 7], 1)]
    found, expected = evaluate_loss(model, [batch]), evaluate_loss(model, parts)
    assert found.tokens == expected.tokens == 10 and found.loss == pytest.approx(expected.loss, rel=1e-9)


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS, "vit"])
def test_parts_of_the_head_are_the_whole(name, monkeypatch):
    """Logits, labels and gradients, with softcaps, scales and transforms, in parts of a few positions."""
    monkeypatch.setattr("transect.forward.head.NUMBERS", 5 * VOCABULARY)
    model = tiny(name, dtype=exact(name))
    near = {"rtol": 1e-9, "atol": 1e-12} if model.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    batch = inputs(name, dtype=torch.float64) if name == "vit" else next(iter(padded(rows(), "left", name)))
    logits, labels = predictions(model, batch)
    with torch.no_grad():
        parts = list(scored(model, batch))
        assert name == "vit" or all(len(part) <= 5 for part, *_ in parts)
        torch.testing.assert_close(torch.cat([part for part, *_ in parts]), logits, **near)
    assert torch.equal(torch.cat([part for _, part, _ in parts]), labels)
    assert not any("forward" in module.__dict__ for module in model.modules())
    summed_loss(logits, labels).backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    backpropagate(model, batch, summed_loss)
    for key, parameter in model.named_parameters():
        if expected[key] is not None:
            torch.testing.assert_close(parameter.grad, expected[key], **near)


@pytest.mark.parametrize("config", [
    tf.GraniteConfig(logits_scaling=3.0, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48,
                     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2),
    tf.CohereConfig(logit_scale=0.3, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
])  # fmt: skip
def test_scaled_logits_in_parts(config, monkeypatch):
    monkeypatch.setattr("transect.forward.head.NUMBERS", 5 * VOCABULARY)
    model = tf.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        parts = torch.cat([part for part, *_ in scored(model, inputs("llama"))])
        torch.testing.assert_close(parts, model(**inputs("llama")).logits[:, :-1].flatten(0, 1), rtol=1e-12, atol=1e-12)
