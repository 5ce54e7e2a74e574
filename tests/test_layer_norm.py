"""LayerNorm: its own identities, the cells that have it, and lossless rewrites of models that have it."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models import CONFIGS, apart, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.forward.lens import norm_gain
from transect.parts import Around, fold_norms, insert, rms_norms
from transect.parts.catalog.layer_norm import GRU, LSTM, RNN
from transect.parts.catalog.standard_norms import Layer

F64 = dict(dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


def norm_of(width, eps=1e-5):
    return Layer(width, eps).double()


def test_the_norm_is_that_of_torch_example_by_example():
    norm, a = norm_of(24), normal(5, 24) * 3 + 2
    with torch.no_grad():
        norm.weight.copy_(normal(24, seed=1))
        norm.bias.copy_(normal(24, seed=2))
    y = norm(a)
    expected = (a - a.mean(1, keepdim=True)) / (a.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(y, expected * norm.weight + norm.bias, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(norm(a[2:3]), y[2:3])  # the others in the batch do not matter
    torch.testing.assert_close(norm(torch.full((1, 24), 7.0, **F64)), norm.bias[None])
    plain, variance = norm_of(24)(a), a.var(1, unbiased=False)
    torch.testing.assert_close(plain.mean(1), torch.zeros(5, **F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(plain.var(1, unbiased=False), variance / (variance + 1e-5))
    torch.testing.assert_close(norm_of(24, 0)(a).norm(dim=1), torch.full((5,), 24.0, **F64).sqrt())  # on a sphere


def test_gradients_are_orthogonal_to_ones_to_the_input_and_to_the_weights_before_it():
    norm, a, delta = norm_of(24, 0), normal(5, 24).requires_grad_(), normal(5, 24, seed=3)
    (gradient,) = torch.autograd.grad((norm(a) * delta).sum(), a)
    with torch.no_grad():
        unit, sigma = norm(a), a.std(1, keepdim=True, unbiased=False)
        formula = (delta - delta.mean(1, keepdim=True) - unit * (delta * unit).mean(1, keepdim=True)) / sigma
    torch.testing.assert_close(gradient, formula)
    torch.testing.assert_close((gradient * unit).sum(1), torch.zeros(5, **F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(5, **F64), atol=1e-12, rtol=0)
    weight, x = normal(24, 7), normal(5, 7, seed=4)

    def slope(scale):
        scaled = (scale * weight).requires_grad_()
        return torch.autograd.grad((norm(x @ scaled.T) * delta).sum(), scaled)[0]

    torch.testing.assert_close(slope(3.0), slope(1.0) / 3)
    assert abs(float((slope(1.0) * weight).sum())) < 1e-10


def test_what_the_norm_is_invariant_to_and_what_not():
    weight, x, b = normal(24, 7), normal(5, 7, seed=1), 0.0
    shift, row = normal(7, seed=2), torch.ones(24, 1, **F64)
    row[3] = 5
    one = torch.ones(5, 1, **F64)
    one[2] = 4

    def layer(w, inputs, bias=b):
        return torch.relu(norm_of(24, 0)(inputs @ w.T + bias))

    y = layer(weight, x)
    for same in (layer(3 * weight, x), layer(weight + shift, x), layer(weight, 3 * x), layer(weight, one * x)):
        torch.testing.assert_close(same, y, atol=1e-9, rtol=0)
    for other in (layer(row * weight, x), layer(weight, x + shift), layer(-weight, x)):
        assert float((other - y).detach().abs().max()) > 0.1


def cell(made, norms=True, width=6, hidden=8):
    torch.manual_seed(0)
    return made(width, 2, hidden // 2, True, norms=norms).double()


def by_hand(mixer, x, h, c):
    """One step for one example, number by number where it can be."""

    def ln(norm, sums):
        centred = [one - sum(sums) / len(sums) for one in sums]
        scale = (sum(one**2 for one in centred) / len(sums) + norm.eps) ** -0.5
        return [float(g) * one * scale + float(b) for g, one, b in zip(norm.weight, centred, norm.bias, strict=True)]

    def sums(linear, vector):
        bias = [0.0] * len(linear.weight) if linear.bias is None else linear.bias.tolist()
        return [sum(map(float.__mul__, row, vector)) + b for row, b in zip(linear.weight.tolist(), bias, strict=True)]

    def sigmoid(one):
        return float(torch.sigmoid(torch.tensor(one, **F64)))

    def tanh(one):
        return float(torch.tanh(torch.tensor(one, **F64)))

    n, from_x, from_h = len(h), sums(mixer.from_x, x), sums(mixer.from_h, h)
    if isinstance(mixer, RNN):
        return [tanh(one) for one in ln(mixer.norm, [a + b for a, b in zip(from_x, from_h, strict=True)])], None
    if isinstance(mixer, LSTM):
        both = zip(ln(mixer.norm_x, from_x), ln(mixer.norm_h, from_h), mixer.bias.flatten().tolist(), strict=True)
        z = [sum(three) for three in both]
        c = [sigmoid(z[n + j]) * c[j] + sigmoid(z[j]) * tanh(z[3 * n + j]) for j in range(n)]
        return [sigmoid(z[2 * n + j]) * tanh(one) for j, one in enumerate(ln(mixer.norm_c, c))], c
    gates = [
        a + b for a, b in zip(ln(mixer.norm_x[0], from_x[: 2 * n]), ln(mixer.norm_h[0], from_h[: 2 * n]), strict=True)
    ]
    new_x, new_h = ln(mixer.norm_x[1], from_x[2 * n :]), ln(mixer.norm_h[1], from_h[2 * n :])
    new = [tanh(new_x[j] + sigmoid(gates[j]) * new_h[j]) for j in range(n)]
    return [sigmoid(gates[n + j]) * h[j] + (1 - sigmoid(gates[n + j])) * new[j] for j in range(n)], None


@pytest.mark.parametrize(("made", "extra"), [(RNN, 1), (LSTM, 18), (GRU, 12)])
@torch.no_grad()
def test_a_cell_steps_as_by_hand_and_copies_its_state_at_padding(made, extra):
    mixer, hidden = cell(made), 8
    for parameter in mixer.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7), **F64))
    numbers = [sum(p.numel() for p in one.parameters()) for one in (mixer, cell(made, norms=False))]
    assert numbers[0] - numbers[1] == extra * hidden
    x, h, c = normal(1, 1, 6, seed=1), normal(1, hidden, seed=2), normal(1, hidden, seed=3)
    state = {name: tensor.clone() for name, tensor in {"h": h, "c": c}.items() if name in mixer.kept}
    y = mixer(x, Around(state=state))
    new_h, new_c = by_hand(mixer, x.flatten().tolist(), h.flatten().tolist(), c.flatten().tolist())
    torch.testing.assert_close(state["h"][0], torch.tensor(new_h, **F64), atol=1e-6, rtol=0)
    torch.testing.assert_close(y[0], mixer.o_proj(state["h"]))
    if new_c is not None:
        torch.testing.assert_close(state["c"][0], torch.tensor(new_c, **F64), atol=1e-6, rtol=0)
    before = {name: tensor.clone() for name, tensor in state.items()}
    mixer(x, Around(real=torch.zeros(1, 1, dtype=torch.bool), state=state))
    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("made", [LSTM, GRU])
@torch.no_grad()
def test_the_scale_of_the_recurrent_matrix_does_not_matter_and_long_sequences_stay_bounded(made):
    x, full = normal(2, 1000, 6), {}
    for norms in (True, False):
        mixer = cell(made, norms)
        for module in mixer.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.0
        # At the first step the state is 0, whose norm without eps is none: begin from another one.
        start = {name: normal(2, 8, seed=5) for name in mixer.kept}
        y = mixer(x[:, :20], Around(state=dict(start)))
        mixer.from_h.weight.mul_(10)
        change = (mixer(x[:, :20], Around(state=dict(start))) - y).abs().max()
        assert (change < 1e-6) == norms
        state, seen = dict(start), []
        for at in range(0, 1000, 5):
            mixer(x[:, at : at + 5], Around(state=state))
            seen.append(state["h"].abs())
        full[norms] = float((torch.stack(seen) > 0.9).double().mean())
    assert 5 * full[True] < full[False]  # the plain cell saturates


@torch.no_grad()
def test_an_lstm_begins_by_keeping_what_it_has():
    """With weights of 0 the forget gate is what the bias says, 1, and the new state half of nothing."""
    mixer, c = cell(LSTM), normal(2, 8)
    assert mixer.bias.tolist() == [[0.0] * 8, [1.0] * 8, [0.0] * 8, [0.0] * 8]
    for linear in (mixer.from_x, mixer.from_h):
        linear.weight.zero_()
    state = {"h": normal(2, 8, seed=1), "c": c.clone()}
    mixer(normal(2, 1, 6), Around(state=state))
    torch.testing.assert_close(state["c"], c * torch.sigmoid(torch.ones(1, **F64)))


def test_a_cell_of_one_unit_and_a_norm_of_one_number_are_refused():
    with pytest.raises(TransectError, match="2 or more, not 1"):
        Layer(1, 1e-5)
    with pytest.raises(TransectError, match="2 or more, not 1"):
        LSTM(6, 1, 1, True)
    with pytest.raises(TransectError, match="cannot be bidirectional"):
        LSTM(6, 2, 4, False)


PRE_NORM = ["phi", *(name for name in CONFIGS if name not in ("bert", "roberta", "olmo2", "gptj"))]


@pytest.mark.parametrize("name", PRE_NORM)
def test_folded_norms_are_plain_and_the_model_says_the_same(name):
    model = tiny(name)
    expected = logits(model, inputs(name))
    folded = fold_norms(model)
    assert apart(logits(model, inputs(name)), expected) < 1e-4
    assert "blocks.0.attention_input" in folded
    norms = {norm: key for key, norm in reversed(Anatomy(model).blocks[0].norms.items()) if key.endswith("_input")}
    assert {f"blocks.0.{key}" for key in norms.values()} <= set(folded)
    for norm in norms:
        torch.testing.assert_close(norm_gain(norm), torch.ones(32))
        assert getattr(norm, "bias", None) is None or not norm.bias.any()


def test_norms_that_a_part_reads_stay_and_those_around_peri_ln_are_folded():
    model = tiny("llama")
    insert(model, "mixer", "gated-linear", layers=[0])
    insert(model, "norm", "peri-ln", layers=[1])
    expected = logits(model, inputs("llama"))
    folded = fold_norms(model)
    assert "blocks.0.attention_input" not in folded and "blocks.0.mlp_input" in folded
    assert "blocks.1.attention_input" in folded
    assert apart(logits(model, inputs("llama")), expected) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "gptj", "cohere", "vit"])
def test_layer_norms_become_rms_norms_and_the_model_says_the_same(name, tmp_path):
    model = tiny(name)
    expected = logits(model, inputs(name))
    tied = Anatomy(model).embeddings_tied
    replaced = rms_norms(model)
    assert apart(logits(model, inputs(name)), expected) < 1e-5
    anatomy = Anatomy(model)
    assert len(replaced) == sum(len(set(block.norms.values())) for block in anatomy.blocks) + 1
    assert all(type(norm).__name__ == "RMS" for norm in anatomy.blocks[1].norms.values())
    assert not anatomy.embeddings_tied
    if tied and name != "vit":
        model.save_pretrained(tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert apart(logits(again, inputs(name)), expected) < 1e-5
    if name != "gptj":  # whose norms have a bias, and whose matrices have none
        fold_norms(model)
        assert apart(logits(model, inputs(name)), expected) < 1e-4


def test_what_cannot_be_rewritten_stays_as_it_was():
    for name, rewrite, said in (
        ("bert", fold_norms, "behind the residual sum"), ("bert", rms_norms, "write to the stream"),
        ("llama", rms_norms, "no LayerNorm"), ("bloom", rms_norms, "neither an embedding nor a block"),
        ("gptj", fold_norms, "none that could take it"),
    ):  # fmt: skip
        model = tiny(name)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(TransectError, match=said):
            rewrite(model)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert Anatomy(model).embeddings_tied == Anatomy(tiny(name)).embeddings_tied
        assert not Anatomy(model).record
