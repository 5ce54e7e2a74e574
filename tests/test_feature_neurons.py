"""Feature neurons: decoding against a loop, planted neurons, the random control, and what holding one does."""

import math

import pytest
import torch

from transect.anatomy import Anatomy
from transect.claims import Verdict, run_claims
from transect.data import Batches, Specimen
from transect.errors import NotApplicable, TransectError
from transect.forward import changed, watch
from transect.forward.lens import norm_gain
from transect.probes import drawings, neurons, run_probes
from transect.probes.catalog.feature_neurons.clamping import Chosen, clamp_effects
from transect.probes.catalog.feature_neurons.decoded import decode, random_z
from transect.probes.catalog.feature_neurons.stability import stability

from .models import CAUSAL, CONFIGS, inputs, logits, tiny
from .test_checkpoint import tokenizer

NAME = "feature-neurons"


def specimen(name="llama", dtype=torch.float64, data=True, **kwargs):
    model = tiny(name, dtype=dtype)
    return Specimen(Anatomy(model), data=Batches([inputs(name)]) if data else None, **kwargs)


def inspected(one, **settings):
    return run_probes(one, {NAME: {"controls": 2, "clamp": 2, **settings}})


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_model_runs_and_is_as_before(name):
    one = specimen(name, torch.float32)
    before = logits(one.model, inputs(name))
    result = inspected(one)[NAME]
    assert len(drawings(result)) == 3 and result["own"].shape == (2,) and result["own"].isfinite().all()
    assert ("gate" in result.label("vector", 0)) == (one.anatomy.blocks[0].mlp.gate is not None)
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(CAUSAL)))
def test_encoders_are_refused(name):
    assert "does not predict a next token" in inspected(specimen(name)).refused[NAME]


def test_decoding_equals_a_loop_and_does_not_depend_on_the_chunks(monkeypatch):
    one = specimen()
    head = one.lens.weight
    made = decode(one, head, ("up", "gate", "down"), top=3)
    monkeypatch.setattr(neurons, "ENTRIES", 64 * 5)
    chunked = decode(one, head, ("up", "gate", "down"), top=3)
    assert torch.equal(made.tokens, chunked.tokens)
    torch.testing.assert_close(made.z, chunked.z)
    for layer, block in enumerate(one.anatomy.blocks):
        into, final = block.norms["mlp_input"].weight, one.anatomy.final_norm.weight
        for kind, which in enumerate(made.kinds):
            for neuron in (0, 17, 47):
                if which == "down":
                    vector = block.matrix("down").weight[:, neuron] * final
                else:
                    vector = block.matrix(which).weight[neuron] * into
                scores = torch.stack([row @ vector for row in head])
                for sign, signed in enumerate((scores, -scores)):
                    z = (signed.max() - signed.mean()) / signed.std(correction=0)
                    assert float(made.z[kind, sign, layer, neuron]) == pytest.approx(float(z.detach()), rel=1e-5)
                    assert made.tokens[kind, sign, layer, neuron].tolist() == signed.topk(3).indices.tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "phi3"])
def test_folded_norms_are_what_the_model_computes(name):
    """What up makes of a normed state is the folded row times that state, up to the norm's own scale."""
    one = specimen(name)
    block = one.anatomy.blocks[1]
    folded = neurons.vectors(block, "up", one.lens)
    norm = block.norms.get("mlp_input")
    x = torch.randn(32, dtype=torch.float64)
    x = x - x.mean()
    read = x if norm is None else norm(x) - (getattr(norm, "bias", None) if hasattr(norm, "bias") else 0)
    scale = 1 if norm is None else float((read / (x * norm_gain(norm))).median())
    torch.testing.assert_close(block.matrix("up").weight @ read, scale * (folded @ x))


@pytest.mark.parametrize("kind", ["up", "gate"])
def test_a_planted_neuron_is_named_whatever_its_size_and_its_negative_is_the_other_sign(kind):
    one = specimen()
    head, block = one.lens.weight, one.anatomy.blocks[1]
    gain = block.norms["mlp_input"].weight.detach()
    for size in (1e-3, 5.0):
        weight = block.matrix(kind).weight.clone()
        weight[4], weight[9] = size * head[33] / gain, -size * head[21] / gain
        block.matrix(kind).write(weight)
        made = decode(one, head, (kind,), top=1)
        assert made.tokens[0, 0, 1, 4].item() == 33 and made.tokens[0, 1, 1, 9].item() == 21
        if size == 1e-3:
            first = made.z
        else:
            torch.testing.assert_close(made.z, first)


def test_one_vector_added_to_every_row_of_the_head_changes_nothing():
    one = specimen()
    made = decode(one, one.lens.weight, ("up", "down"), top=3)
    moved = decode(one, one.lens.weight + torch.randn(32, dtype=torch.float64), ("up", "down"), top=3)
    torch.testing.assert_close(made.z, moved.z, rtol=1e-5, atol=1e-5)
    assert torch.equal(made.tokens, moved.tokens)


def test_random_vectors_reach_what_the_maximum_of_normals_reaches():
    size = 2000
    head = torch.randn(size, 128, generator=torch.Generator().manual_seed(3))
    count = math.log(2 * size)  # either sign counts, so it is the largest of 2 V normals
    leading = math.sqrt(2 * count)
    expected = leading - (math.log(count) + math.log(4 * math.pi)) / (2 * leading) + 0.5772 / leading
    assert float(random_z(head, 0).mean()) == pytest.approx(expected, abs=0.06)


def test_random_weights_have_no_specialised_neurons():
    one = specimen(data=False)
    generator = torch.Generator().manual_seed(0)
    for block in one.anatomy.blocks:
        for matrix in block.matrices():
            matrix.write(torch.randn(matrix.shape, generator=generator, dtype=torch.float64))
    found = inspected(one)[NAME]
    assert "no specialised neurons" in " ".join(found.findings)
    assert "No neuron was held" in " ".join(found.caveats)
    assert "own" not in found.quantities


def test_rows_of_length_1_are_those_of_the_head():
    one = specimen()
    one.model.lm_head.weight.data[50] *= 1000  # wins everywhere
    plain, equal = (inspected(one, normalise=choice)[NAME] for choice in (False, True))
    assert plain["distinct"].max() < equal["distinct"].min()
    assert (plain["tokens"][:, :, :, :, 0] == 50).float().mean() > 0.4


def test_search_finds_the_planted_neuron():
    one = specimen(tokenizer=tokenizer())
    block = one.anatomy.blocks[2]
    weight = block.mlp.up.weight.clone()
    word = one.tokenizer.convert_ids_to_tokens(40)
    weight[11] = -one.lens.weight[40] / block.norms["mlp_input"].weight
    block.mlp.up.write(weight)
    result = inspected(one, search=word)[NAME]
    assert result.label("found", 0)[0] == "2:11 up" and result["search z"][0] < 0
    assert len(drawings(result)) == 4
    with pytest.raises(TransectError, match="not a single token"):
        inspected(one, search="nowhere to be found")
    assert "needs the model's tokenizer" in inspected(specimen(), search="dog").refused[NAME]


def test_a_dropped_mlp_has_no_neurons():
    one = specimen()
    one.anatomy.blocks[1].mlp.drop()
    result = inspected(one)[NAME]
    assert result["z"][:, :, 1].isnan().all() and (result["tokens"][:, :, 1] == -1).all()
    for block in one.anatomy.blocks:
        block.mlp and block.mlp.drop()
    assert "has an MLP of neurons left" in inspected(one).refused[NAME]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_holding_a_neuron_at_its_own_value_changes_nothing_and_leaves_no_trace(name):
    one, batch = specimen(name), inputs(name, batch=1, length=1)
    before = logits(one.model, batch)
    with torch.no_grad(), watch(one.anatomy, ["up"]) as seen:
        one.model(**batch)
    own = seen.up[1][0, 0, [3, 30]].clone()
    with changed(one.anatomy, {("up", 1): neurons.held([3, 30], own)}):
        torch.testing.assert_close(logits(one.model, batch), before, rtol=1e-12, atol=1e-12)
    with changed(one.anatomy, {("up", 1): neurons.held([3, 30], own + 1)}):
        assert not torch.allclose(logits(one.model, batch), before)
    assert torch.equal(logits(one.model, batch), before)
    for wrong in (48 * 4, -1):
        change = {("up", 1): neurons.held([wrong], [0.0])}
        with pytest.raises(TransectError, match="does not exist"), changed(one.anatomy, change):
            logits(one.model, batch)
    assert torch.equal(logits(one.model, batch), before)


def test_the_slope_of_holding_is_what_autograd_says():
    one, batch = specimen("gpt2"), inputs("gpt2", batch=1, length=5)
    value = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def at(constant):
        with changed(one.anatomy, {("up", 1): neurons.held([3], constant)}):
            return one.model(**batch).logits[0, -1, 20]

    (slope,) = torch.autograd.grad(at(value), value)
    with torch.no_grad():
        difference = (at(value + 1e-5) - at(value - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(difference), rel=1e-6) and float(slope) != 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_first_order_effect_is_the_unembedded_output_of_the_neuron(name):
    """In the last block only norms and head come behind: there act(gate) W_down[:, i], linearised, is the slope."""
    one, batch, neuron = specimen(name), inputs(name, batch=1, length=5), 7
    block, value = one.anatomy.blocks[2], torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    with changed(one.anatomy, {("up", 2): neurons.held([neuron], value)}):
        (slope,) = torch.autograd.grad(one.model(**batch).logits[0, -1, 20], value)
    hold = changed(one.anatomy, {("up", 2): neurons.held([neuron], value.detach())})
    with torch.no_grad(), hold, watch(one.anatomy, ["gate", "residual", "down"]) as seen:
        one.model(**batch)
    gate, down = seen.gate[2][0, -1, neuron], seen.down[2][0, -1]
    pushed = block.mlp.activation(gate) * block.matrix("down").weight[:, neuron]
    norm = block.norms.get("mlp_output")

    def said(output):
        added = output if norm is None else norm(output)
        before = seen.residual[3][0, -1] - (down if norm is None else norm(down))
        return one.lens(before + added)[20]

    _, expected = torch.func.jvp(said, (down,), (pushed,))
    torch.testing.assert_close(slope[0], expected.detach(), rtol=1e-5, atol=1e-9)
    assert slope.abs() > 1e-6


@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_compared_with_itself_keeps_every_token(name):
    found = stability(specimen(name, torch.float32), specimen(name, torch.float32))
    assert (found.shares == 1).all() and (found.layers == 1).all()
    assert found.layers.shape == (len(found.kinds), 3)
    assert (found.chance < 0.5).all() and (found.chance > 0).all()


def test_neurons_that_changed_their_token_are_counted():
    base, tuned = specimen(), specimen()
    head, block = base.lens.weight, tuned.anatomy.blocks[1]
    before = decode(base, head, ("up",), top=1).tokens[0, 0, 1, :, 0]
    weight, gain = block.matrix("up").weight.clone(), block.norms["mlp_input"].weight.detach()
    fresh = (before[:6] + 1) % len(head)
    weight[:6] = head[fresh] / gain
    weight[6:] *= 3  # the size of a row does not matter
    block.matrix("up").write(weight)
    names = decode(tuned, head, ("up",), top=1).tokens[0, 0, 1, :, 0]
    assert torch.equal(names[:6], fresh) and torch.equal(names[6:], before[6:])
    found = stability(base, tuned)
    row = found.kinds.index("up")
    assert found.layers[row].tolist() == pytest.approx([1, 42 / 48, 1])
    assert float(found.shares[row]) == pytest.approx(138 / 144)
    assert found.shares[[kind != row for kind in range(3)]].tolist() == [1, 1]
    count, other = (tokens.bincount(minlength=64).double() for tokens in (before, names))
    tops = [decode(base, head, ("up",), top=1).tokens[0, 0, layer, :, 0].bincount(minlength=64) for layer in (0, 2)]
    expected = float(count @ other) + sum(float(top.double() @ top.double()) for top in tops)
    assert float(found.chance[row]) == pytest.approx(expected / 48 / 144)


def test_a_dropped_mlp_has_nothing_to_keep_and_other_shapes_are_refused():
    base, tuned = specimen(), specimen()
    for one in (base, tuned):
        one.anatomy.blocks[1].mlp.drop()
    found = stability(base, tuned)
    assert found.layers[:, 1].isnan().all() and (found.shares == 1).all()
    with pytest.raises(TransectError, match="tuned from the other"):
        stability(base, specimen())
    for one in (base, tuned):
        for block in one.anatomy.blocks:
            block.mlp and block.mlp.drop()
    with pytest.raises(NotApplicable, match="has an MLP of neurons left"):
        stability(base, tuned)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_controls_push_as_hard_and_effects_are_those_of_a_loop(name):
    one = specimen(name)
    ids = inputs(name)["input_ids"]
    effects = clamp_effects(one, [Chosen(1, 3, 1, 20), Chosen(2, 5, 1, 9)], ids, strength=4, controls=3)
    assert torch.allclose(effects.norms, effects.norms[:, :1].expand(-1, 4))
    with torch.no_grad(), watch(one.anatomy, ["up", "mlp"]) as seen:
        one.model(ids)
    size = seen.up[1][..., 3].square().mean().sqrt()
    assert float(effects.values[0]) == pytest.approx(4 * float(size), rel=1e-6)
    before = logits(one.model, {"input_ids": ids}).log_softmax(-1)
    with changed(one.anatomy, {("up", 1): neurons.held([3], [4 * float(size)])}):
        after = logits(one.model, {"input_ids": ids}).log_softmax(-1)
    assert float(effects.own[0]) == pytest.approx(float((after - before)[..., 20].mean()), rel=1e-5)
    cost = -(after - before)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert float(effects.loss[0]) == pytest.approx(float(cost), rel=1e-5)


def test_a_planted_neuron_moves_its_own_token_more_than_others():
    one = specimen()
    block = one.anatomy.blocks[2]
    down = block.mlp.down.weight.clone()
    down[:, 3] = 3 * one.lens.weight[20]
    block.mlp.down.write(down)
    effects = clamp_effects(one, [Chosen(2, 3, 1, 20)], inputs("llama")["input_ids"], strength=30, controls=5)
    assert effects.own.abs() > effects.others.abs().max()


@pytest.mark.parametrize("settings", [{"strength": 0}, {"clamp": -1}, {"top": 0}, {"nothing": 1}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(TransectError, match="feature-neurons"):
        inspected(specimen(), **settings)


def test_the_claim_runs_and_needs_text(monkeypatch):
    monkeypatch.setattr("transect.claims.catalog.feature_neurons.NEURONS", 3)
    monkeypatch.setattr("transect.claims.catalog.feature_neurons.CONTROLS", 2)
    model, data = tiny("llama"), Batches([inputs("llama")])
    (outcome,) = run_claims(model, data, data, ["feature-neurons/own-token"])
    assert outcome.result.verdict is not Verdict.NOT_APPLICABLE
    assert len(outcome.result.numbers) == 4
    (outcome,) = run_claims(model, None, data, ["feature-neurons/own-token"])
    assert outcome.result.verdict is Verdict.NOT_APPLICABLE


def test_the_claim_of_stability_tunes_a_copy(monkeypatch):
    monkeypatch.setattr("transect.claims.catalog.feature_neurons.STEPS", 5)
    model, data = tiny("llama"), Batches([inputs("llama", batch=6)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (outcome,) = run_claims(model, data, data, ["feature-neurons/stability"])
    rows = outcome.result.numbers
    assert [row["rate"] for row in rows] == [1e-5, 1e-4, 1e-3]
    assert (outcome.result.verdict is Verdict.HOLDS) == (rows[1]["kept, up"] > 0.75)
    moved = [row["change of up, relative"] for row in rows]
    assert 0 < moved[0] < moved[1] < moved[2]
    assert rows[2]["held-out loss after"] < rows[2]["held-out loss before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    (outcome,) = run_claims(model, None, data, ["feature-neurons/stability"])
    assert outcome.result.verdict is Verdict.NOT_APPLICABLE
