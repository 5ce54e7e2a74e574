"""Multi-level training: coalescing, de-coalescing and interpolating, and the V-cycle."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.checkpoint.config import history_of
from transect.conversion.catalog.multi_level import Levels, v_cycle
from transect.conversion.catalog.multi_level.maps import interpolated, resized
from transect.data import load
from transect.errors import TransectError
from transect.training import Machine, Problem, Run, Schedule, State, own_loss, train

from .models import CAUSAL, VOCABULARY, apart, assert_alike, assert_same_tensors, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
WIDE = [name for name in CAUSAL if name not in ("bloom", "gemma2", "gemma3")]  # ALiBi; embeddings by the width's root


def grown(model, **given):
    return resized(Anatomy(model), Levels("grow", **given))


def shrunk(model, **given):
    return resized(Anatomy(model), Levels("shrink", **given))


def furthest(one, other):
    """The largest difference of any two parameters of the same name."""
    expected = dict(other.named_parameters())
    assert {n: p.shape for n, p in one.named_parameters()} == {n: p.shape for n, p in expected.items()}
    return max(float((p - expected[name]).detach().abs().max()) for name, p in one.named_parameters())


@pytest.mark.parametrize("groups", ["halves", "neighbours"])
@pytest.mark.parametrize("name", WIDE)
def test_growing_and_shrinking_again_is_the_identity_and_width_loses_nothing(name, groups):
    model, batch = tiny(name), inputs(name)
    wide = grown(model, width=2, depth=1, groups=groups)
    assert apart(logits(wide, batch), logits(model, batch)) < 1e-5
    big = grown(model, width=2, depth=2, groups=groups)
    assert furthest(shrunk(big, width=2, depth=2, groups=groups), model) < 1e-6
    assert_same_tensors(model, tiny(name))


@pytest.mark.parametrize("groups", ["halves", "neighbours"])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "vit", "deit"])
def test_encoders_too_with_norms_behind_their_sublayers_or_in_front(name, groups):
    """BERT with scaled embeddings, as released: norms follow them. Images have none that would have to be scaled."""
    model, batch = tiny(name), inputs(name)
    given = {"groups": groups, "keeping": "norm" if name in ("vit", "deit") else "embedding"}
    before = logits(model, batch)
    assert float(before.std()) > 0.02  # of logits that say something
    assert apart(logits(grown(model, width=2, depth=1, **given), batch), before) < 1e-5
    big = grown(model, width=2, depth=2, **given)
    assert furthest(shrunk(big, width=2, depth=2, **given), model) < 1e-6
    three = shrunk(grown(model, width=3, depth=1, **given), width=3, depth=1, **given)
    assert apart(logits(three, batch), before) < 1e-5
    assert_same_tensors(model, tiny(name))


def test_an_encoder_is_shrunk_and_blended_with_the_one_before(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    small = transect.convert(tiny("bert"), "multi-level", depth=3, keeping="embedding").model
    assert (small.config.hidden_size, small.config.num_hidden_layers) == (16, 1)
    back = transect.convert(
        small, "multi-level", direction="grow", depth=3, keeping="embedding", before=str(tmp_path), alpha=0.25
    ).model
    expected = interpolated(tiny("bert"), grown(small, width=2, depth=3, keeping="embedding"), 0.25)
    assert furthest(back, expected) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "gpt_neox", "olmo2", "qwen3", "opt"])
def test_what_really_repeats_is_merged_without_loss(name):
    """Also with factors of 3."""
    batch = inputs(name)
    wide = grown(tiny(name), width=3, depth=1)
    assert apart(logits(shrunk(wide, width=3, depth=1), batch), logits(tiny(name), batch)) < 2e-5


@pytest.mark.parametrize("groups", ["halves", "neighbours"])
def test_the_maps_are_the_matrices_of_the_paper(groups):
    """Rows of F and T sum to 1, F T = I, R G = I; W' = T W N(F), and T x goes to T (W x + b)."""
    small, big = Levels("shrink", 3, 3, groups), Levels("grow", 3, 3, groups)
    f, t = small.outputs(torch.eye(12, dtype=torch.float64), 0), big.outputs(torch.eye(4, dtype=torch.float64), 0)
    assert f.shape == (4, 12) and t.shape == (12, 4)
    torch.testing.assert_close(f.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(t.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(f @ t, torch.eye(4, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    w, b, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 4), (4,), (4,)))
    wide = big.inputs(big.outputs(w, 0), 1)
    torch.testing.assert_close(wide, t @ w @ (t.T / t.T.sum(1, keepdim=True)))
    torch.testing.assert_close(wide @ (t @ x) + big.outputs(b, 0), t @ (w @ x + b))
    large = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(small.inputs(small.outputs(large, 0), 1), f @ large @ t)


def test_scaled_embeddings_are_the_release_and_lose_something_in_front_of_norms():
    batch = inputs("gpt2")
    exact, released = (grown(tiny("gpt2"), width=2, depth=1, keeping=way) for way in ("norm", "embedding"))
    before = logits(tiny("gpt2"), batch)
    assert apart(logits(exact, batch), before) < 1e-5 < 1e-2 < apart(logits(released, batch), before)
    assert furthest(shrunk(released, width=2, depth=1, keeping="embedding"), tiny("gpt2")) < 1e-6
    table = released.get_input_embeddings().weight
    torch.testing.assert_close(table[:, :32], tiny("gpt2").get_input_embeddings().weight / 2)


def test_depth_is_copied_and_is_not_the_same_function():
    model = tiny("llama")
    deep = grown(model, width=1, depth=2)
    blocks = deep.model.layers
    assert len(blocks) == 6 and deep.config.num_hidden_layers == 6
    for first, second in ((0, 3), (1, 4), (2, 5)):
        assert_same_tensors(blocks[first], blocks[second])
    assert apart(logits(deep, inputs("llama")), logits(model, inputs("llama"))) > 1e-2
    by_pairs = grown(model, width=1, depth=2, groups="neighbours").model.layers
    assert_same_tensors(by_pairs[0], by_pairs[1])


def steps(model, count=2):
    """A few steps of every number, without dropout."""
    batches = [{"input_ids": DATA[:4]}]
    problem = Problem("steps", dict(model.named_parameters()), batches, lambda b: own_loss(model, b), None, model.eval)
    schedule = Schedule(lr=1e-2, epochs=count, steps=count, clip=None)
    train(problem, Run(schedule, Machine(), State(None)), {})
    return model


def twins_apart(model):
    """How far the copies of heads and neurons have gone from one another in a model grown by halves."""
    mlp, attention = Anatomy(model).blocks[0].mlp, Anatomy(model).blocks[0].attention
    up, q = mlp.up.weight, attention.q.weight
    return max(float((one[: len(one) // 2] - one[len(one) // 2 :]).abs().max()) for one in (up, q))


def test_copies_stay_alike_unless_they_are_blended():
    before = tiny("llama", seed=0)
    small = shrunk(before, width=2, depth=1)
    whole = grown(small, width=2, depth=1)
    own_loss(whole, {"input_ids": DATA})[0].backward()
    gradient = Anatomy(whole).blocks[0].mlp.up.module.weight.grad
    torch.testing.assert_close(gradient[:24], gradient[24:])
    assert gradient.abs().max() > 1e-4
    whole.zero_grad()
    assert twins_apart(steps(whole)) < 1e-4  # but for rounding, which Adam's first steps make larger
    blended = interpolated(before, grown(small, width=2, depth=1), 0.5)
    assert twins_apart(steps(blended)) > 1e-2


def test_blending_is_linear_and_without_a_share_it_is_the_model_before():
    before, other = tiny("gpt2"), tiny("gpt2", seed=1)
    assert_same_tensors(interpolated(before, copy.deepcopy(other), 0.0), before)
    assert_same_tensors(interpolated(before, copy.deepcopy(other), 1.0), other)
    quarter = dict(interpolated(before, copy.deepcopy(other), 0.25).named_parameters())
    for (name, a), (_, b) in zip(before.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(quarter[name], 0.75 * a + 0.25 * b)
    with pytest.raises(TransectError, match="has not the sizes"):
        interpolated(before, grown(before, width=2, depth=1), 0.5)


def test_a_smaller_model_is_ordinary_and_grows_again_with_the_one_before(tmp_path):
    transect.convert(tiny("llama"), "multi-level", DATA, steps=0, depth=3).model.save_pretrained(tmp_path / "small")
    tiny("llama").save_pretrained(tmp_path / "before")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    config = small.config
    sizes = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    assert (*sizes, config.num_hidden_layers, config.head_dim) == (16, 2, 1, 24, 1, 8)
    back = transect.convert(
        small, "multi-level", DATA, steps=0, direction="grow", depth=3, before=str(tmp_path / "before"), alpha=0.25
    ).model
    grown_alone = grown(small, width=2, depth=3)
    expected = interpolated(tiny("llama"), grown_alone, 0.25)
    assert furthest(back, expected) < 1e-6
    history = history_of(vars(back.config), "") + Anatomy(back).record.history
    methods = [entry["convert"]["method"] for entry in history]
    assert methods == ["multi-level", "multi-level"]


def test_the_cycle_counts_its_trainings_and_changes_no_sizes():
    model = tiny("gpt2")
    blended, legs = v_cycle(
        model, load(DATA, model, batch_size=4), load(DATA, model), steps=(2, 4, 4), width=2, depth=3, every=2
    )
    assert [leg.name for leg in legs] == ["large", "small", "blended"]
    assert [leg.course.steps for leg in legs] == [2, 4, 4]
    assert 4 * legs[1].flops < legs[0].flops == legs[2].flops
    assert {n: p.shape for n, p in blended.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert legs[2].course.checks[-1][2] < legs[2].course.before
    with torch.no_grad():
        loss, count = own_loss(blended, {"input_ids": DATA})
    assert float(loss) / count == pytest.approx(legs[2].course.best, abs=1e-5)  # the last state is what comes out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"depth": 2}, "3 blocks cannot be put into groups of 2"),
        ("llama", {"width": 3, "depth": 1}, "cannot be put into groups of 3"),
        ("llama", {"width": 4, "depth": 1}, "2 key/value heads cannot be put into groups of 4"),
        ("llama", {"width": 1, "depth": 1}, "nothing to change"), ("bloom", {"depth": 1}, "ALiBi"),
        ("gemma2", {"depth": 1}, "root of the width"), ("gemma3", {"depth": 1}, "root of the width"),
        ("gemma2", {"width": 1, "depth": 3}, "different kinds"), ("mixtral", {"depth": 3}, "no ordinary MLP"),
        ("llama", {"depth": 3, "before": "x"}, "does not go with shrink"),
        ("bert", {"depth": 1}, "choose keeping=embedding"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_change(name, options, message):
    model = tiny(name)
    with pytest.raises(TransectError, match=message):
        transect.convert(model, "multi-level", **options)
    assert_same_tensors(model, tiny(name))


def test_cut_and_compressed_models_are_refused():
    small = transect.compress(tiny("llama"), "svd", keep=0.7)
    with pytest.raises(TransectError, match="resize the dense model"):
        transect.convert(small, "multi-level", depth=3)
    model = tiny("gpt2")
    Anatomy(model).blocks[0].attention.keep([0, 1])
    with pytest.raises(TransectError, match=r"cut block by block|other sizes"):
        transect.convert(model, "multi-level", depth=3)
    assert_alike(logits(model, inputs("gpt2")), logits(copy.deepcopy(model), inputs("gpt2")))
