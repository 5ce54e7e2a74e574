"""depth-efficiency: what layers add, and what skipping one changes."""

import dataclasses

import pytest
import torch
import transformers

from tests.depth import silence, small, specimen, tokens
from tests.models import CAUSAL, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.data import Batches, Specimen
from transect.errors import TransectError
from transect.forward import changed, watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.depth_efficiency.integrated import integrated_gradients
from transect.probes.catalog.depth_efficiency.local_effects import local_effects
from transect.probes.catalog.depth_efficiency.skipping import PARTS, cut_points, depth_score, skip_effects, skips

FUTURE, MAX, MEAN = 1, 0, 1
NOTHING = 1e-12  # of double precision: rows computed in another number may be rounded otherwise


@pytest.mark.parametrize("name", CAUSAL)
def test_it_runs_on_every_architecture_and_leaves_no_trace(name):
    one = specimen(name, dtype=torch.float32)
    before = logits(one.model, inputs(name))
    inspection = run_probes(one, small())
    assert not inspection.refused
    found = inspection["depth-efficiency"]
    assert [key for key, one in found.quantities.items() if one.values.isnan().any()] == [
        "skip_later", "local_effect",
    ]  # fmt: skip
    assert name != "gpt2" or len(drawings(found)) == 7
    assert len(found.findings) == 8
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


@pytest.mark.parametrize("name", ["bert", "vit", "roberta"])
def test_encoders_are_refused(name):
    one = specimen(name, dtype=torch.float32)
    assert "predict" in run_probes(one, small()).refused["depth-efficiency"]


def test_post_norm_short_text_and_bad_settings_are_refused():
    config = transformers.OPTConfig(**{**tiny("opt").config.to_dict(), "do_layer_norm_before": False})
    post = Anatomy(transformers.OPTForCausalLM(config))
    text = Batches([inputs("opt", length=24)])
    assert "after the residual sum" in run_probes(Specimen(post, data=text), small()).refused["depth-efficiency"]
    assert "16 tokens" in run_probes(specimen("llama", length=12), small()).refused["depth-efficiency"]
    with pytest.raises(TransectError, match="prompts"):
        run_probes(specimen("llama"), small(prompts=0))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_contributions_are_the_steps_of_the_stream(name):
    """Brute force from the model's own hidden states, with padding that must not count."""
    one = specimen(name, sequences=4, length=24)
    batch = dict(next(iter(one.data)))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 20:] = 0
    one = Specimen(one.anatomy, data=Batches([batch]))
    found = run_probes(one, small())["depth-efficiency"]
    steps, cosines, counted = [], [], batch["attention_mask"].bool()
    with torch.no_grad(), watch(one.anatomy, ["residual"]) as seen:
        one.model(**batch, use_cache=False)
    for layer in range(3):
        h, after = seen.residual[layer], seen.residual[layer + 1]
        steps.append(((after - h).norm(dim=-1) / h.norm(dim=-1))[counted].mean())
        cosines.append(torch.cosine_similarity(after - h, h, dim=-1)[counted].mean())
    torch.testing.assert_close(found["contribution"][0, 0], torch.stack(steps).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["cosine"][0, 0], torch.stack(cosines).float(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["contribution"][0], found["contribution"][1], atol=1e-6)


def test_a_layer_that_adds_nothing_has_no_contribution_and_no_effect():
    one = specimen("gpt2")
    silence(one.model, 1)
    found = run_probes(one, small())["depth-efficiency"]
    assert found["contribution"][:, :, 1].abs().max() <= NOTHING
    assert found["skip_output"][..., 1].abs().max() <= NOTHING
    assert found["skip_later"][..., 1, 2].abs().max() <= NOTHING
    assert found["local_effect"][..., 1, 2].abs().max() <= NOTHING
    assert found["local_effect"][0, 0, MAX, 0, 2] > 0
    assert found["skip_output"][0, :, MAX, 0].min() > 0


def test_effects_of_skipping():
    one, ids = specimen("llama"), tokens()
    effects = skip_effects(one, ids, cut_points(3, 24, 2, 0))
    later = effects.later[:, :, MAX]
    for s in range(3):
        assert bool(later[..., s, s].isnan().all())
        assert later[..., s, :s].abs().sum() <= NOTHING  # nothing flows back
    assert later[0, :, 0, 1:].min() > 1e-6
    assert effects.output[:, FUTURE, :, -1].abs().max() <= NOTHING  # nothing behind the last layer reads its past
    assert effects.logits[:, FUTURE, :, -1].abs().max() <= NOTHING
    assert effects.output[0, FUTURE, MAX, 0] > 0
    assert bool((effects.output <= 2**0.5 + 1e-6).all())
    torch.testing.assert_close(effects.by_prompt.amax(-1), effects.output[0, :, MAX])


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "gemma3"])
def test_skipping_is_the_model_without_the_layer(name):
    """At every position: the same logits as a model whose weights make that part add nothing."""
    one, ids = specimen(name), tokens()
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    for units in PARTS.values():
        silenced = tiny(name, dtype=torch.float64)
        silence(silenced, 1, units)
        with torch.no_grad(), changed(one.anatomy, skips(one.anatomy, 1, everywhere, units)):
            now = one.model(ids).logits
        torch.testing.assert_close(now, logits(silenced, {"input_ids": ids}), rtol=0, atol=1e-9)


def test_without_attention_later_tokens_see_nothing():
    one = specimen("llama")
    for layer in range(3):
        silence(one.model, layer, ("attention",))
    effects = skip_effects(one, tokens(), cut_points(3, 24, 2, 0))
    assert effects.output[:, FUTURE].abs().max() <= NOTHING
    assert effects.later[:, FUTURE].nan_to_num().abs().max() <= NOTHING
    assert effects.output[0, 0, MEAN].min() > 0


def test_largest_effects_never_fall_with_more_prompts_or_cuts():
    one, ids = specimen("llama"), tokens(4)
    cuts = cut_points(4, 24, 2, 0)
    fewer, prompts = skip_effects(one, ids[:2], cuts[:2, :1]), skip_effects(one, ids, cuts[:, :1])
    more = skip_effects(one, ids, cuts)
    for less, greater in ((fewer, prompts), (prompts, more)):
        assert bool((greater.output[:, :, MAX] >= less.output[:, :, MAX] - 1e-7).all())
        assert bool((greater.later[:, :, MAX].nan_to_num() >= less.later[:, :, MAX].nan_to_num() - 1e-6).all())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "gemma2", "gemma3"])
def test_a_local_effect_is_what_the_whole_model_says(name):
    """Brute force: full passes in which one layer reads something else, under the model's masks and positions."""
    one, ids = specimen(name), tokens()
    cuts = cut_points(3, 24, 1, 0)
    local = local_effects(one, ids, cuts)
    assert bool(local.diagonal(dim1=-2, dim2=-1).isnan().all())
    assert local.nan_to_num().tril().abs().max() <= NOTHING  # nothing flows back
    with torch.no_grad(), watch(one.anatomy, ["residual", "attention", "mlp"]) as clean:
        one.model(ids)
    steps = [clean.attention[0].reshape(3, 24, 32), clean.mlp[0].reshape(3, 24, 32)]
    for part, missing in enumerate([sum(steps), *steps]):
        for reach, (where, measured) in enumerate(positions(cuts)):
            state = clean.residual[2] - missing * where[..., None]
            change = changed(one.anatomy, {("residual", 2): lambda h, state=state: state})
            with torch.no_grad(), change, watch(one.anatomy, ["attention", "mlp"], [2]) as seen:
                one.model(ids)
            plain, now = (sum(x[2].reshape(state.shape) for x in (s.attention, s.mlp)) for s in (clean, seen))
            expected = ((now - plain).norm(dim=-1) / plain.norm(dim=-1))[measured]
            got = local[part, reach, :, 0, 2].double()
            wanted = torch.stack([expected.max(), expected.mean(), expected.median()])
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def positions(cuts, length=24):
    """For each reach: where something is taken away, and where its effect is measured."""
    place = torch.arange(length).expand(len(cuts), length)
    return [(place > 0, place > 0), ((place > 0) & (place < cuts), place >= cuts)]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "olmo2"])
def test_between_neighbours_the_local_effect_is_that_of_skipping(name):
    """But for attention where the MLP of the block reads what it added."""
    one, ids = specimen(name), tokens()
    cuts = cut_points(3, 24, 2, 0)
    local, skipping = local_effects(one, ids, cuts), skip_effects(one, ids, cuts).later
    layer, attention, mlp = (
        (x.diagonal(1, -2, -1), y.diagonal(1, -2, -1)) for x, y in zip(local, skipping, strict=True)
    )
    torch.testing.assert_close(*layer, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(*mlp, rtol=1e-5, atol=1e-8)
    assert torch.allclose(*attention, rtol=1e-5, atol=1e-8) == (name == "gpt_neox")
    assert layer[0].min() > 1e-6
    assert not torch.allclose(local[..., 0, 2], skipping[..., 0, 2], rtol=1e-3)


def test_without_attention_no_token_reaches_a_later_one():
    one = specimen("llama")
    for layer in range(3):
        silence(one.model, layer, ("attention",))
    local = local_effects(one, tokens(), cut_points(3, 24, 2, 0)).nan_to_num()
    assert local[:, FUTURE].abs().max() <= NOTHING
    assert local[0, 0, MEAN, 0, 1:].min() > 0
    found = integrated_gradients(one, tokens(1), torch.randn(3, 32), 18, 4)
    assert found.attribution.abs().max() <= NOTHING
    assert found.change.abs().max() <= NOTHING


def test_cut_points_are_distinct_and_leave_tokens_behind():
    cuts = cut_points(5, 64, 4, 0)
    assert cuts.shape == (5, 4)
    assert set(cuts.flatten().tolist()) <= set(range(8, 61, 8))
    assert all(len(set(row.tolist())) == 4 for row in cuts)
    assert cut_points(2, 16, 4, 0).tolist() == [[8], [8]]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_lens_at_the_end_is_the_model(name):
    one = specimen(name)
    found = run_probes(one, small())["depth-efficiency"]
    assert found["lens_kl"][-1].abs() < 1e-12
    assert found["lens_overlap"][-1] == 1
    assert found["lens_kl"][:-1].min() > 0


@pytest.mark.parametrize("stage", ["local effects", "integrated gradients"])
def test_an_error_leaves_no_trace(stage):
    def progress(items, label):
        for item in items:
            yield item
            if label == stage:
                raise RuntimeError("stopped")

    one = dataclasses.replace(specimen("gpt2", dtype=torch.float32), progress=progress)
    before = logits(one.model, inputs("gpt2"))
    with pytest.raises(RuntimeError, match="stopped"):
        run_probes(one, small())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())
    assert torch.equal(logits(one.model, inputs("gpt2")), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in one.model.parameters())


def test_half_precision_and_a_dropped_sublayer():
    one = specimen("llama", dtype=torch.bfloat16)
    one.anatomy.blocks[1].attention.drop()
    found = run_probes(one, small())["depth-efficiency"]
    assert found["local_effect"][1, :, :, 1, 2].abs().max() <= NOTHING  # no attention, nothing to miss
    assert found["local_effect"][2, 0, MAX, 1, 2] > 0
    assert found["attribution"].isfinite().all()


def test_depth_score():
    effects = torch.rand(5, 20, dtype=torch.float64)
    score = depth_score(effects)
    assert bool(((score >= 0) & (score <= 4)).all())
    torch.testing.assert_close(depth_score(7 * effects), score)
    assert depth_score(torch.tensor([[0.0], [0.0], [2.0]])).item() == 2
