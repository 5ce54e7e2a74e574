import dataclasses
import itertools

import pytest
import torch
import transformers

from tests.models import CAUSAL, VOCABULARY, inputs, logits, tiny
from transect.activations import Specimen, changed, watch
from transect.anatomy import Anatomy
from transect.claims import Context, Verdict, claims, run_claims
from transect.claims.depth_efficiency import share_as_near
from transect.claims.shallower import text_of, train, untrained
from transect.data import Batches
from transect.errors import BadData, NotApplicable, TransectError
from transect.probes import run_probes
from transect.probes.convergence import late_share
from transect.probes.depth_maps import cross_model_maps, offsets, solve
from transect.probes.erasure import erasure_effects
from transect.probes.integrated import integrated_gradients, legendre
from transect.probes.local_effects import local_effects
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
        bias = None if matrix.bias is None else torch.zeros_like(matrix.bias)
        matrix.write(torch.zeros_like(matrix.weight), bias)


@torch.no_grad()
def continued(one, ids, start):
    """Distributions that the whole model predicts from position `start` on."""
    return one.model(ids, use_cache=False).logits[:, start:].softmax(-1)


def erased(one, ids, layer, where, mean, start):
    """The same with what block `layer` reads replaced by `mean` where `where` is True."""
    erase = lambda h: torch.where(where[..., None], mean.to(h), h)  # noqa: E731
    with changed(one.anatomy, {("residual", layer): erase}):
        return continued(one, ids, start)


def small(**settings):
    return {"depth-efficiency": {"prompts": 2, "length": 20, "cuts": 1, "erased": 1, "steps": 4} | settings}


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
    assert name != "gpt2" or len(found.plots()) == 7
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
    assert found["contribution"][:, :, 1].abs().max() == 0
    assert found["skip_output"][..., 1].abs().max() == 0
    assert found["skip_later"][..., 1, 2].abs().max() == 0
    assert found["local_effect"][..., 1, 2].abs().max() == 0
    assert found["local_effect"][0, 0, MAX, 0, 2] > 0
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


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "gemma2", "gemma3"])
def test_a_local_effect_is_what_the_whole_model_says(name):
    """Brute force: full passes in which one layer reads something else, under the model's masks and positions."""
    one, ids = specimen(name), tokens()
    cuts = cut_points(3, 24, 1, 0)
    local = local_effects(one, ids, cuts)
    assert bool(local.diagonal(dim1=-2, dim2=-1).isnan().all())
    assert local.nan_to_num().tril().abs().max() == 0  # nothing flows back
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
    assert local[:, FUTURE].abs().max() == 0
    assert local[0, 0, MEAN, 0, 1:].min() > 0
    found = integrated_gradients(one, tokens(1), torch.randn(3, 32), 18, 4)
    assert found.attribution.abs().max() == 0
    assert found.change.abs().max() == 0


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


@pytest.mark.parametrize("name", CAUSAL)
def test_effects_of_erased_tokens_are_those_of_passes_of_the_whole_model(name):
    one, ids, start = specimen(name), tokens(2, 12), 8
    means = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(len(ids), 3, start, dtype=torch.float64)
    for token in range(start):
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, token] = True
        for layer in range(3):
            moved = erased(one, ids, layer, where, means[layer], start) - continued(one, ids, start)
            expected[:, layer, token] = moved.norm(dim=-1).amax(1)
    found = erasure_effects(one, ids, means, start)
    torch.testing.assert_close(found.double(), expected.amax(0), rtol=1e-5, atol=1e-7)


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


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_attributions_sum_to_what_the_states_do(name):
    """Completeness, against outputs that the whole model gives with the mean states in place."""
    one, ids, start = specimen(name), tokens(2), 18
    means = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) / 2
    found = integrated_gradients(one, ids, means, start, 48)
    assert found.attribution.shape == (3, start)
    assert found.error.max() < 1e-3 < found.change.abs().min()
    rough = integrated_gradients(one, ids, means, start, 1)  # one point is not enough, and it says so
    assert rough.error.max() > 10 * found.error.max()
    for one_of_them in (found, rough):
        missing = (one_of_them.attribution.sum(1) - one_of_them.change).abs()
        assert bool((missing <= one_of_them.error + 1e-6).all())
    where = (torch.arange(24) < start).expand_as(ids)
    for layer in range(3):
        values = []
        for probabilities in (continued(one, ids, start), erased(one, ids, layer, where, means[layer], start)):
            right = probabilities[:, :-1].gather(-1, ids[:, start + 1 :, None])
            values.append(right.log().mean())
        torch.testing.assert_close(found.change[layer].double(), values[0] - values[1], rtol=1e-5, atol=1e-7)


def test_attributions_are_integrals_of_finite_differences():
    one, ids, start, layer, token = specimen("gpt2"), tokens(1), 18, 1, 5
    means = torch.zeros(3, 32)
    found = integrated_gradients(one, ids, means, start, 6)
    with torch.no_grad(), watch(one.anatomy, ["residual"]) as clean:
        one.model(ids)
    h, total, small_step = clean.residual[layer], 0.0, 1e-5
    for point, weight in zip(*legendre(6), strict=True):
        ends = []
        for sign in (1, -1):
            state = torch.cat([h[:, :start] * point, h[:, start:]], 1)
            state[0, token] += sign * small_step * h[0, token]
            with torch.no_grad(), changed(one.anatomy, {("residual", layer): lambda x, state=state: state}):
                scores = one.model(ids).logits[0, start:-1].log_softmax(-1)
            ends.append(scores.gather(-1, ids[0, start + 1 :, None]).mean())
        total += float(weight * (ends[0] - ends[1]) / (2 * small_step))
    assert found.attribution[layer, token].item() == pytest.approx(total, rel=1e-4)
    means[layer] = h[0, token].float()
    one.model.float()  # so that the mean is the very state
    assert integrated_gradients(one, ids, means, start, 6).attribution[layer, token].abs() < 1e-6


def test_quadrature_is_exact_for_polynomials():
    for count in (1, 2, 5, 20):
        points, weights = legendre(count)
        powers = torch.arange(2 * count, dtype=torch.float64)
        torch.testing.assert_close((points[:, None] ** powers * weights[:, None]).sum(0), 1 / (powers + 1))


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
    assert found["local_effect"][1, :, :, 1, 2].abs().max() == 0  # no attention, nothing to miss
    assert found["local_effect"][2, 0, MAX, 1, 2] > 0
    assert found["attribution"].isfinite().all()


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


def test_a_random_path_is_as_near_as_often_as_counting_says():
    for deep, shallow, best in ((4, 2, [0, 1, 2, 1, 2]), (5, 2, [2, 0, 0, 1, 1, 2]), (4, 2, [0, 2, 0, 0, 0])):
        away = [[abs(m * deep - state * shallow) for m in range(shallow + 1)] for state in range(1, deep + 1)]
        own = sum(row[m] for row, m in zip(away, best[1:], strict=True))
        paths = list(itertools.product(*away))
        share = sum(sum(path) <= own for path in paths) / len(paths)
        assert share_as_near(deep, shallow, torch.tensor(best)) == pytest.approx(share)
    assert offsets([0, 2, 4], [0, 1, 2], 4, 2).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def test_the_share_of_the_approach_that_comes_late():
    assert late_share(torch.tensor([4.0, 3.0, 1.0, 0.5, 0.0])) == 0.25
    assert (
        late_share(torch.tensor([4.0, 3.0, 1.0, 0.0])) == 0.75
    )  # the middle one of three layers is in the second half
    assert late_share(torch.zeros(3)) != late_share(torch.zeros(3))


def four_layers():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**tiny("llama").config.to_dict(), "num_hidden_layers": 4})
    return transformers.LlamaForCausalLM(config).eval()


def checked(name, model, *text):
    """The outcome of one claim, as the user's call gives it."""
    calibration, evaluation = text * 2 if len(text) == 1 else text
    return run_claims(model, calibration, evaluation, [name])[0].result


def test_the_claim_on_the_lens_follows_where_the_work_is_done():
    text = Batches([inputs("llama", batch=4, length=20)])
    early, late = four_layers(), four_layers()
    for layer in (0, 1):
        silence(early, layer + 2)
        silence(late, layer)
    held = checked("depth-efficiency/lens", late, text)
    assert held.verdict == Verdict.HOLDS
    assert [row["KL, nats"] for row in held.numbers][2:] != [0.0] * 3
    found = checked("depth-efficiency/lens", early, text)
    assert found.verdict == Verdict.DOES_NOT_HOLD
    assert [row["KL, nats"] for row in found.numbers][2:] == pytest.approx([0.0] * 3, abs=1e-6)
    assert checked("depth-efficiency/lens", tiny("llama"), text).verdict == Verdict.NOT_APPLICABLE


def test_the_claim_on_two_models_trains_the_shallower_one(monkeypatch):
    monkeypatch.setattr("transect.claims.shallower.STEPS", 3)
    monkeypatch.setattr("transect.claims.shallower.TOKENS", 320)
    text = Batches([inputs("llama", batch=24, length=40)])
    model = four_layers()
    before, state = logits(model, inputs("llama")), torch.random.get_rng_state()
    result = checked("depth-efficiency/cross-model", model, text)
    assert result.verdict in (Verdict.HOLDS, Verdict.DOES_NOT_HOLD)
    assert [row["in proportion"] for row in result.numbers] == [0, 0.5, 1, 1.5, 2]
    for row in result.numbers:
        errors = [row[f"error from state {m}"] for m in range(3)]
        assert min(errors) == errors[row["best"]]
    assert torch.equal(logits(model, inputs("llama")), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert checked("depth-efficiency/cross-model", model, text) == result  # seeds are fixed


def test_what_the_claim_on_two_models_refuses(monkeypatch):
    enough, little = (Batches([inputs("llama", batch=count, length=40)]) for count in (24, 4))
    monkeypatch.setattr("transect.claims.depth_efficiency.train", None)  # all of this before any training
    for model, data, why in (
        (tiny("llama"), (enough, enough), "4 layers"),
        (four_layers(), (little, enough), "at least 640 tokens; there are 160"),
        (four_layers(), (enough, little), "held-out text is too little"),
    ):
        result = checked("depth-efficiency/cross-model", model, *data)
        assert result.verdict == Verdict.NOT_APPLICABLE
        assert why in result.explanation
    monkeypatch.setattr("transect.claims.shallower.LARGEST", 1000)
    assert "more than the 1,000" in checked("depth-efficiency/cross-model", four_layers(), enough).explanation


def test_training_lowers_the_loss(monkeypatch):
    monkeypatch.setattr("transect.claims.shallower.STEPS", 30)
    monkeypatch.setattr("transect.claims.shallower.TOKENS", 160)
    text = Batches([inputs("gpt2", batch=24, length=40)])
    context = Context(tiny("gpt2"), text, text)
    model = untrained(context, 1)
    assert len(Anatomy(model).blocks) == 1
    before = context.evaluate(model, 1.0).loss
    rows, source = text_of(context)
    assert (len(rows), source) == (24, "960 tokens of the calibration text")
    train(model, rows)
    assert context.evaluate(model, 1.0).loss < before
    assert not model.training


def test_the_claim_also_leaves_out_the_layers_that_decide_it_by_construction():
    text = Batches([inputs("llama", batch=4, length=20)])
    with pytest.raises(NotApplicable, match="at least 4 layers"):
        claims(["depth-efficiency/halves"])[0].function(Context(tiny("llama"), text, text))
    model = four_layers()
    silence(model, 1)  # then what the first half does is layer 0 alone
    result = claims(["depth-efficiency/halves"])[0].function(Context(model, text, text))
    added, later = (
        [row[key] for row in result.numbers] for key in ("length added / stream", "skipped: change at later tokens")
    )
    assert added[1] == later[1] == later[3] == 0 < min(added[0], later[0], later[2])
    assert result.verdict == Verdict.DOES_NOT_HOLD
