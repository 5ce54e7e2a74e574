import pytest
import torch

from tests.models import CAUSAL, VOCABULARY, inputs, logits, tiny
from transect.activations import Specimen, changed, watch
from transect.anatomy import Anatomy
from transect.claims import Context, Verdict, claims
from transect.data import Batches
from transect.errors import BadData, NotApplicable, TransectError
from transect.probes import run_probes
from transect.probes.depth_maps import cross_model_maps, solve
from transect.probes.erasure import continued, erased
from transect.probes.skipping import PARTS, cut_points, depth_score, skip_effects, skips

FUTURE, MAX, MEAN = 1, 0, 1


def specimen(name, length=32, sequences=4, dtype=torch.float64, seed=0):
    batch = inputs(name, batch=sequences, length=length)
    return Specimen(Anatomy(tiny(name, seed, dtype)), data=Batches([batch]))


def tokens(sequences=3, length=24, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (sequences, length), generator=generator)


def silence(model, layer, units=("attention", "mlp")):
    """Let sublayers of a layer add exactly nothing, by their weights."""
    block = Anatomy(model).blocks[layer]
    for role in [{"attention": "o", "mlp": "down"}[unit] for unit in units]:
        matrix = block.matrix(role)
        matrix.write(torch.zeros_like(matrix.weight), None if matrix.bias is None else torch.zeros_like(matrix.bias))


def small(**settings):
    return {"depth-efficiency": {"prompts": 2, "length": 20, "cuts": 1, "erased": 1} | settings}


@pytest.mark.parametrize("name", CAUSAL)
def test_it_runs_on_every_architecture_and_leaves_no_trace(name):
    one = specimen(name, dtype=torch.float32)
    before = logits(one.model, inputs(name))
    inspection = run_probes(one, small())
    assert not inspection.refused
    found = inspection["depth-efficiency"]
    assert [key for key, one in found.quantities.items() if one.values.isnan().any()] == ["skip_later"]
    assert len(found.plots()) == 4
    assert len(found.findings) == 6
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


@pytest.mark.parametrize("name", ["bert", "vit", "roberta"])
def test_encoders_are_refused(name):
    one = specimen(name, dtype=torch.float32)
    assert "predict" in run_probes(one, small()).refused["depth-efficiency"]


def test_post_norm_short_text_and_bad_settings_are_refused():
    import transformers

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
    assert found["contribution"][:, :, 1].abs().max() == 0
    assert found["skip_output"][..., 1].abs().max() == 0
    assert found["skip_later"][..., 1, 2].abs().max() == 0
    assert found["skip_output"][0, :, MAX, 0].min() > 0


def test_effects_of_skipping():
    one, ids = specimen("llama"), tokens()
    effects = skip_effects(one, ids, cut_points(3, 24, 2, 0))
    later = effects.later[:, :, MAX]
    for s in range(3):
        assert bool(later[..., s, s].isnan().all())
        assert later[..., s, :s].abs().sum() == 0  # nothing flows back
    assert later[0, :, 0, 1:].min() > 1e-6
    assert effects.output[:, FUTURE, :, -1].abs().max() == 0  # nothing behind the last layer reads its past
    assert effects.logits[:, FUTURE, :, -1].abs().max() == 0
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
    assert effects.output[:, FUTURE].abs().max() == 0
    assert effects.later[:, FUTURE].nan_to_num().abs().max() == 0
    assert effects.output[0, 0, MEAN].min() > 0


def test_largest_effects_never_fall_with_more_prompts_or_cuts():
    one, ids = specimen("llama"), tokens(4)
    cuts = cut_points(4, 24, 2, 0)
    fewer, prompts = skip_effects(one, ids[:2], cuts[:2, :1]), skip_effects(one, ids, cuts[:, :1])
    more = skip_effects(one, ids, cuts)
    for less, greater in ((fewer, prompts), (prompts, more)):
        assert bool((greater.output[:, :, MAX] >= less.output[:, :, MAX] - 1e-7).all())
        assert bool((greater.later[:, :, MAX].nan_to_num() >= less.later[:, :, MAX].nan_to_num() - 1e-6).all())


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
    ids = tokens()
    torch.testing.assert_close(continued(one, ids, 3), one.model(ids).logits[:, 3:].softmax(-1), rtol=0, atol=1e-9)


def test_erasing_every_token_at_the_start_makes_the_tokens_irrelevant():
    one = specimen("llama")  # rotary positions: nothing but the tokens is in the embedding
    mean = torch.randn(32, dtype=torch.float64)
    everywhere = torch.ones(3, 24, dtype=torch.bool)
    first, second = (erased(one, tokens(seed=seed), 0, everywhere, mean, 4) for seed in (5, 6))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    assert (continued(one, tokens(seed=5), 4) - continued(one, tokens(seed=6), 4)).abs().max() > 1e-3


def test_erasing_a_token_reaches_only_what_comes_after_it():
    one, ids = specimen("llama"), tokens()
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, 10] = True
    moved = (erased(one, ids, 1, where, torch.zeros(32), 0) - continued(one, ids, 0)).abs().amax(-1)
    assert moved[:, :10].max() == 0
    assert moved[:, 10:].min() > 0


def test_depth_score():
    effects = torch.rand(5, 20, dtype=torch.float64)
    score = depth_score(effects)
    assert bool(((score >= 0) & (score <= 4)).all())
    torch.testing.assert_close(depth_score(7 * effects), score)
    assert depth_score(torch.tensor([[0.0], [0.0], [2.0]])).item() == 2


def test_maps_between_models():
    long = dict(length=48, sequences=24)
    deep, shallow = specimen("llama", **long), specimen("gpt2", **long)
    same = cross_model_maps(deep, deep, ridge=0.0)
    assert same["error"].diagonal().max() < 1e-6
    assert same["best"].tolist() == [0, 1, 2, 3]
    crossed = cross_model_maps(deep, shallow, deep_layers=[1, 3], shallow_layers=[0, 2])
    assert crossed["error"].shape == (2, 2)
    assert crossed["error"].min() > 0
    with pytest.raises(BadData, match="at least 640"):
        cross_model_maps(specimen("llama"), specimen("gpt2"))
    with pytest.raises(TransectError, match="0 to 3"):
        cross_model_maps(deep, deep, deep_layers=[4])
    with pytest.raises(NotApplicable):
        cross_model_maps(deep, specimen("bert", **long))


def test_maps_do_not_depend_on_the_basis_of_the_source():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, d, generator=generator, dtype=torch.float64) for d in (6, 4))
    change = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    ones = torch.ones(300, 1, dtype=torch.float64)

    def predicted(x, y):
        x = torch.cat([x, ones], 1)
        return x @ solve(x.T @ x, (x.T @ y)[None], 0.0)[0]

    plain = predicted(x, y)
    design = torch.cat([x, ones], 1)
    torch.testing.assert_close(plain, design @ torch.linalg.lstsq(design, y).solution)
    torch.testing.assert_close(predicted(x @ change, y), plain)
    torch.testing.assert_close((predicted(x, y @ rotation) - y @ rotation).norm(dim=1), (plain - y).norm(dim=1))


def test_the_claim_also_leaves_out_the_layers_that_decide_it_by_construction():
    import transformers

    text = Batches([inputs("llama", batch=4, length=20)])
    with pytest.raises(NotApplicable, match="at least 4 layers"):
        claims(["depth-efficiency/halves"])[0].function(Context(tiny("llama"), text, text))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**tiny("llama").config.to_dict(), "num_hidden_layers": 4})
    model = transformers.LlamaForCausalLM(config).eval()
    silence(model, 1)  # then what the first half does is layer 0 alone
    result = claims(["depth-efficiency/halves"])[0].function(Context(model, text, text))
    added, later = (
        [row[key] for row in result.numbers] for key in ("length added / stream", "skipped: change at later tokens")
    )
    assert added[1] == later[1] == later[3] == 0 < min(added[0], later[0], later[2])
    assert result.verdict == Verdict.DOES_NOT_HOLD
