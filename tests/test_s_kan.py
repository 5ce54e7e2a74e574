"""S-KAN: basis functions, selection, its limits, pruning and its round trip, counts, bad input."""

import copy

import pytest
import torch
from scipy.interpolate import BSpline
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from transect.errors import TransectError
from transect.parts import build_model
from transect.parts.catalog.s_kan import KANLayer, SelectableActivation, entropy, prune, set_temperature
from transect.parts.catalog.s_kan.part import ALL_FAMILIES, FAMILIES, chebyshev, families_named, rbf, spline
from transect.parts.catalog.s_kan.phases import energy
from transect.training import Seen
from transect.training.penalties.s_kan import s_kan

ALL = families_named(ALL_FAMILIES, 6)
TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(families=ALL, inputs=5, outputs=4):
    torch.manual_seed(0)
    made = KANLayer(inputs, outputs, families, 6).double()
    made.logits.data = drawn(inputs, len(families), seed=1)
    return made


def test_the_basis_functions():
    u = torch.linspace(-1, 1, 201, dtype=torch.float64)
    knots = torch.linspace(-3, 3, 10, dtype=torch.float64).numpy()  # for 6 cubic splines over [-1, 1], 3 more each side
    expected = BSpline(knots, torch.eye(6).numpy(), 3, extrapolate=False)(u.numpy())
    torch.testing.assert_close(spline(u, 6), torch.from_numpy(expected))
    torch.testing.assert_close(spline(u, 6).sum(-1), torch.ones_like(u))
    assert not spline(torch.tensor([-3.01, 3.01, 50.0]), 6).any()
    torch.testing.assert_close(chebyshev(u, 6), torch.cos(torch.arange(6) * u.arccos()[:, None]))
    assert float(rbf(torch.tensor(0.2), 6)[3]) == 1  # at its centre
    for name, family in FAMILIES.items():
        far = torch.tensor([-1e3, 0.0, 1e3])
        assert family(far.tanh() if name == "chebyshev" else far, 6).isfinite().all(), name


def test_a_layer_is_the_sum_over_edges_and_one_family_is_a_plain_kan():
    one, x = layer(), drawn(3, 5, seed=2)
    s = (one.logits / 1).softmax(-1)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for o in range(4):
        for i in range(5):
            expected[:, o] += one.base[o, i] * functional.silu(x[:, i])
            for f, name in enumerate(ALL):
                basis = FAMILIES[name](x[:, i].tanh(), 6) / one.rms[f]
                expected[:, o] += s[i, f] * basis @ one.coefficients[name][o, 6 * i : 6 * i + 6]
    torch.testing.assert_close(one(x), expected)
    torch.testing.assert_close(s.sum(-1), torch.ones(5, dtype=torch.float64))
    order = list(reversed(ALL))
    other = layer(order)
    other.load_state_dict({**one.state_dict(), "logits": one.logits.flip(1)})
    torch.testing.assert_close(other(x), one(x))
    single = layer(["spline"])
    plain = functional.linear(functional.silu(x), single.base)
    basis = spline(x.tanh(), 6) / single.rms[0]
    plain += torch.einsum("tik,oik->to", basis, single.coefficients["spline"].unflatten(1, (5, 6)))
    torch.testing.assert_close(single(x), plain)
    assert torch.autograd.gradcheck(one, drawn(2, 5).requires_grad_())


@pytest.mark.parametrize("kind", ["layer", "functions"])
def test_pruning_is_the_layer_with_a_one_hot_selection(kind):
    made = layer() if kind == "layer" else SelectableActivation(5).double().functions
    for parameter in made.coefficients.values():
        parameter.data = drawn(*parameter.shape, seed=3)
    made.log_scale.data += drawn(5, 6, seed=4) / 9
    choice, x = torch.tensor([2, 0, 4, 2, 3]), drawn(3, 5, seed=2)  # no node keeps rbf
    pruned = made.pruned(choice)
    made.logits.data = torch.full((5, 5), -1e9, dtype=torch.float64)
    made.logits.data[torch.arange(5), choice] = 0
    torch.testing.assert_close(pruned(x), made(x))
    edges = 5 * 4 if kind == "layer" else 5
    waves = 2 * 6  # place and scale
    assert sum(p.numel() for p in made.parameters()) == edges * (5 * 6 + 1) + 5 * 5 + 5 * waves
    assert sum(p.numel() for p in pruned.parameters()) == edges * (6 + 1) + 2 * waves
    assert pruned.flops < made.flops / 3


def part_of(model):
    return model.model.layers[0].mlp


def test_the_phases_of_a_model_and_its_round_trip(tmp_path):
    sizes = dict(hidden=16, blocks=1, heads=2, neurons=12, vocabulary=64, length=32)
    settings = {"s-kan": {"families": "spline, rbf,wavelet"}}
    model = build_model("llama", parts={"mlp": "s-kan"}, settings=settings, **sizes)
    assert float(entropy(model).detach()) == pytest.approx(torch.tensor(3.0).log())
    s_kan(Seen(model, {}, []), weight=2.0).backward()
    assert part_of(model).first.logits.grad is not None
    model(TOKENS, labels=TOKENS).loss.backward()
    part = part_of(model)
    assert part.first.logits.grad.abs().max() > 0
    part.first.logits.data = drawn(16, 3).float()
    warm = float(entropy(model).detach())
    set_temperature(model, 0.1)
    assert float(entropy(model).detach()) < warm
    part.first.coefficients["rbf"].data *= 30  # whose energy is then the largest, whatever the selection says
    part.first.logits.data[:, 1] = part.first.logits.detach().amin(1)
    set_temperature(model, 10)
    torch.testing.assert_close(s_kan(Seen(model, {}, []), weight=2.0), 2 * entropy(model))
    prune(model, [{"input_ids": TOKENS}])
    assert part.first.counts == [0, 16, 0]
    logits = model(TOKENS).logits
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(again(TOKENS).logits, logits)
    for call in (prune, lambda pruned: s_kan(Seen(pruned, {}, []))):
        with pytest.raises(TransectError, match="no S-KAN part that still selects"):
            call(again)


@pytest.mark.parametrize("made", [layer(), SelectableActivation(5).double().functions])
@torch.no_grad()
def test_the_energy_is_that_of_the_family_alone(made):
    made.coefficients["rbf"].copy_(drawn(*made.coefficients["rbf"].shape, seed=3))
    x = drawn(4, 3, 5, seed=2)
    for node in range(5):  # all but this one off
        alone = copy.deepcopy(made)
        alone.base.zero_()
        for name, parameter in alone.coefficients.items():
            kept = parameter.clone().unflatten(-1, (-1, 6)).reshape(-1, 5, 6)
            parameter.zero_()
            if name == "rbf":
                parameter.view(-1, 5, 6)[:, node] = kept[:, node]
        expected = alone(x).square().sum()
        torch.testing.assert_close(energy(made, "rbf", made.bases(x)["rbf"])[node], expected)


def test_bad_input():
    for families, size, said in (("", 6, "each once"), ("spline,bezier", 6, "each once"), ("fourier", 5, "even")):
        with pytest.raises(TransectError, match=said):
            SelectableActivation(4, families=families, size=size)
    with pytest.raises(TransectError, match="from 4 to 32"):
        build_model("llama", hidden=16, blocks=1, parts={"mlp": "s-kan"}, settings={"s-kan": {"size": 3}})
    with pytest.raises(TransectError, match="above 0"):
        set_temperature(nn.Sequential(SelectableActivation(4)), 0)
