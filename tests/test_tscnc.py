"""TSCNC: sparse and well-conditioned weights, as penalties and as gates."""

import math
import sys

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.data import Batches, Specimen
from transect.errors import TransectError
from transect.forward.blocks import feeds_of, run_blocks
from transect.operators.scattered import ScatteredRows
from transect.probes import drawings, run_probes
from transect.training import Parametrized, Seen
from transect.training.parametrizations.tscnc_gates import tscnc_gates
from transect.training.penalties.tscnc import tscnc
from transect.training.penalties.tscnc.conditioning import FLOOR, FORMS, kappa, normalized, raw, spread
from transect.training.penalties.tscnc.sparsity import transformed
from transect.training.penalties.tscnc.weights import trained_weights

from .models import VOCABULARY, tiny

DATA = torch.randint(3, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))
SHAPES = [(4, 4), (5, 3), (3, 5)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values, rows, seed=0):
    """A tall matrix with these singular values."""
    left, right = gaussian(rows, len(values), seed=seed), gaussian(len(values), len(values), seed=seed + 1)
    return torch.linalg.qr(left).Q * values @ torch.linalg.qr(right).Q.T


def condition(weight):
    values = torch.linalg.svdvals(weight.detach())
    return float(values[0] / values[-1])


def descended(weight, form, steps, length):
    """The condition number after steps along the gradient, of a length that falls to 0."""
    for step in range(steps):
        weight = weight.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(form(weight), weight)
        weight = weight - length * (1 - step / steps) * gradient / gradient.norm().clamp_min(1e-12)
    return condition(weight)


def seen_of(model):
    return Seen(model.requires_grad_(True), {}, [])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_papers_form_is_its_formula(shape):
    weight, side = gaussian(*shape).requires_grad_(True), min(shape)
    gram = weight @ weight.T if shape[0] < shape[1] else weight.T @ weight
    naive = torch.log(1e-5 + torch.det(gram / side)) ** 2
    torch.testing.assert_close(raw(weight), naive)
    torch.testing.assert_close(torch.autograd.grad(raw(weight), weight), torch.autograd.grad(naive, weight))
    at_one = weight.detach() * ((1 - 1e-5) / torch.det(gram / side).detach()) ** (1 / (2 * side))
    assert float(raw(at_one)) < 1e-20 < 1e-6 < min(float(raw(1.001 * at_one)), float(raw(0.999 * at_one)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS.values())
def test_turning_changes_nothing_and_the_gradient_is_right(form, shape):
    weight = gaussian(*shape)
    turned = torch.linalg.qr(gaussian(shape[0], shape[0], seed=1)).Q @ weight @ torch.linalg.qr(
        gaussian(shape[1], shape[1], seed=2)
    ).Q  # fmt: skip
    torch.testing.assert_close(form(turned), form(weight))
    assert torch.autograd.gradcheck(form, (weight.requires_grad_(True),))
    if form is not raw:
        torch.testing.assert_close(form(7.0 * weight), form(weight))


def test_the_determinant_bounds_the_condition_number():
    """κ |det W| (√n / ‖W‖_F)^n <= 2 for square W: why a determinant says something about κ."""
    for number in range(140):
        weight = gaussian(2 + number % 7, 2 + number % 7, seed=number)
        volume = math.exp(-math.sqrt(float(normalized(weight)))) - 1e-5  # the square of all but κ
        assert float(kappa(weight)) + 0.5 * math.log(volume) <= math.log(2)


@pytest.mark.parametrize("form", FORMS.values())
def test_singular_matrices_and_extreme_volumes_have_finite_gradients(form):
    row_of_zeros, thin = gaussian(6, 6), gaussian(6, 1) @ gaussian(1, 6)
    row_of_zeros[2] = 0
    for weight in (row_of_zeros, thin, torch.zeros(5, 3), 1e3 * gaussian(60, 60), 1e-3 * gaussian(60, 90).float()):
        weight.requires_grad_(True)
        value = form(weight)
        (gradient,) = torch.autograd.grad(value, weight)
        assert value.isfinite() and gradient.isfinite().all()
    for weight in (row_of_zeros.detach(), torch.zeros(5, 3)):
        assert form not in (raw, normalized) or float(form(weight)) == pytest.approx(FLOOR)
    assert float(form(torch.full((3, 3), math.nan))) != float(form(torch.full((3, 3), math.nan)))


def test_the_shape_between_sizes_and_their_number():
    sizes = torch.linspace(0, 1, 51, dtype=torch.float64)
    for a in (0.1, 1.0, 100.0):
        found = transformed(sizes, a)
        assert float(found[0]) == 0 and float(found[-1]) == pytest.approx(1)
        assert bool((found.diff() > 0).all()) and bool((found.diff().diff() < 0).all())
        assert bool((found >= sizes - 1e-12).all()) and bool((found <= (sizes > 0).double() + 1e-12).all())
        assert float(transformed(torch.tensor(1e12), a)) == pytest.approx(a + 1)
        start = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        assert float(torch.autograd.grad(transformed(start, a).sum(), start)[0]) == pytest.approx((a + 1) / a)
    torch.testing.assert_close(transformed(5 * sizes, 1e12), 5 * sizes)
    torch.testing.assert_close(transformed(sizes[1:], 1e-9), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("form", [spread, normalized, kappa])
def test_flat_spectra_and_they_alone_are_at_zero_and_descent_goes_there(form):
    flat, steep = torch.ones(5, dtype=torch.float64), torch.logspace(0, -math.log10(29), 5, dtype=torch.float64)
    assert abs(float(form(3 * with_values(flat, 8)))) < 2e-5
    assert float(form(with_values(torch.tensor([1, 1, 1, 1, 0.9], dtype=torch.float64), 8))) > 2e-4
    start = with_values(steep, 8)
    assert condition(start) == pytest.approx(29) and descended(start, form, 150, 0.05) < 1.1


def test_the_papers_form_controls_the_volume_and_raises_a_good_condition():
    classifier = gaussian(640, 10)
    assert condition(classifier) < 1.3 and descended(classifier, raw, 150, 1.0) > 2
    assert descended(classifier, spread, 50, 1.0) < condition(classifier)


def test_only_spread_and_kappa_have_a_gradient_in_large_matrices():
    weight = gaussian(40, 40).requires_grad_(True)
    sizes = {name: float(torch.autograd.grad(form(weight), weight)[0].norm()) for name, form in FORMS.items()}
    assert max(sizes["raw"], sizes["normalized"]) < 1e-6 and min(sizes["spread"], sizes["kappa"]) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral"])
def test_it_sees_every_matrix_as_it_is_stored(name):
    model = tiny(name).requires_grad_(True)
    found, expected = dict(trained_weights(model, "all")), Anatomy(model).matrices()
    assert list(found) == [matrix.name for matrix in expected]
    assert all(torch.equal(found[matrix.name], matrix.weight) for matrix in expected)
    hosts = {id(matrix.host): matrix.host for matrix in expected}.values()
    stored = [p for host in hosts for key, p in host.named_parameters() if "bias" not in key and "norm" not in key]
    sums = torch.autograd.grad(sum(weight.sum() for weight in found.values()), stored)
    assert all(torch.equal(one, torch.ones_like(one)) for one in sums)
    ((place, head),) = trained_weights(model, "head")
    assert place == "head" and head is model.get_output_embeddings().weight
    value = tscnc(seen_of(model), sparse=2.0, a=0.5, sparse_in="q,head", condition=3.0, form="kappa", condition_in="o")
    by_hand = [2 * transformed(w.abs(), 0.5).sum() for k, w in found.items() if k.endswith(".q")]
    by_hand += [2 * transformed(head.abs(), 0.5).sum()]
    by_hand += [3 * kappa(w) for k, w in found.items() if k.endswith(".o")]
    torch.testing.assert_close(value, torch.stack([one.float() for one in by_hand]).sum())


@pytest.mark.parametrize(("method", "name"), [
    ("lora", "phi3"), ("dora", "llama"), ("lift", "gpt2"), ("mole", "llama"),
])  # fmt: skip
def test_with_an_adapter_it_sees_what_both_make_together(method, name):
    peft = pytest.importorskip("peft")
    from transect.adaptation import adapter_named
    from transect.adaptation.targets import targets_of

    model = tiny(name)
    roles = ["gate", "up", "down"] if method == "mole" else ["o", "down"]
    config = adapter_named(method).config(list(targets_of(Anatomy(model), roles)), {})
    adapted = peft.get_peft_model(model, config).train()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if method == "mole":
        with pytest.raises(TransectError, match=r"gate.*no matrix times its input"):
            list(trained_weights(model, "all"))
        return
    found = dict(trained_weights(model, "all"))
    assert [place.rpartition(".")[2] for place in found] == ["o", "down"] * 3  # nothing is trained in the others
    value = tscnc(Seen(model, {}, []), sparse=1.0, condition=1.0)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value, trained, allow_unused=True)
    assert any(one is not None and one.abs().max() > 0 for one in gradients)
    merged = Anatomy(adapted.merge_and_unload())
    for matrix in merged.matrices(["o", "down"]):
        torch.testing.assert_close(found[matrix.name], matrix.weight, rtol=1e-4, atol=1e-5)


def test_adapting_with_it_makes_the_weights_what_it_says():
    found = []
    for given in ({"sparse": 0.0, "condition": 0.0}, {"sparse": 0.1, "condition": 3.0}):
        model = tiny("llama")
        transect.adapt(
            model, "full", DATA, penalties=["tscnc"], settings={"tscnc": given}, lr=2e-2, epochs=3, batch_size=4,
            device="cpu",
        )  # fmt: skip
        weights = [matrix.weight for matrix in Anatomy(model).matrices()]
        found.append(
            [sum(float(spread(w)) for w in weights), sum(float(transformed(w.abs(), 1).sum()) for w in weights)]
        )
        assert model.state_dict().keys() == tiny("llama").state_dict().keys()  # nothing is left of it
    assert found[1][0] < 0.9 * found[0][0] and found[1][1] < 0.9 * found[0][1]


def test_a_contest_takes_it_for_every_training(tmp_path, monkeypatch):
    plans = []
    verb = sys.modules["transect.verbs.race"]
    monkeypatch.setattr(verb, "race_model", lambda model, plan, *_, **__: plans.append(plan) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        given = {"penalties": ["tscnc"], "settings": {"tscnc": {"condition": "0.5"}}}
        transect.race(tiny("llama"), ["full"], DATA, DATA[:4], tmp_path / "run", **given)
    assert plans[0].shared.penalties["tscnc"]["condition"] == 0.5 and plans[0].shared.penalties["tscnc"]["a"] == 1.0


def gated(rows=6, columns=5, **settings):
    weight, bias = gaussian(rows, columns), gaussian(rows)
    return weight, bias, tscnc_gates(weight, bias, **settings)


def test_gates_are_random_in_training_and_not_at_rest_where_the_layer_begins_as_it_was():
    weight, bias, one = gated(drop=0.4)
    x = gaussian(3, 5, seed=1)
    torch.testing.assert_close(one.eval()(x), x @ weight.T + bias)
    assert torch.equal(one(x), one(x))
    assert not torch.equal(one.train()(x), one(x))
    for drop, temperature in ((0.2, 2 / 3), (0.8, 0.5)):
        many = tscnc_gates(torch.ones(40000, 1), None, drop=drop, temperature=temperature)
        torch.manual_seed(0)
        drawn, opens = many.drawn().detach(), float(many.opens()[0].detach())
        assert float((drawn > 0).double().mean()) == pytest.approx(opens, abs=0.01)
        assert float(drawn.min()) == 0 and float(drawn.max()) == 1


def test_the_price_of_gates_is_the_formula_and_that_of_shut_ones_is_0():
    _, _, one = gated(sparse=0.3, a=2.0, decay=4.0, count=0.1)
    expected = 0.0
    for row, opens in zip(one.values, one.opens(), strict=True):
        u = opens * sum(2.0 * w**2 + 0.1 for w in row)
        expected += 0.3 * 3 * u / (2 + u)
    torch.testing.assert_close(one.penalty(), expected)
    gradients = torch.autograd.grad(one.penalty(), (one.slow, one.values))
    assert bool((gradients[0] > 0).all()) and bool((gradients[1] * one.values > 0).all())  # shut, and smaller
    with torch.no_grad():
        one.slow.fill_(-2.0)
    assert 0 <= float(one.penalty().detach()) < 1e-40
    one.after_step(0.5)
    torch.testing.assert_close(one.log_alpha, torch.full((6,), -math.log(100)))  # it can come back
    assert float(one.opens().detach().min()) > 0.04 and not one.eval().weight.any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_with_shut_gates_are_not_stored(name):
    model, anatomy = tiny(name), Anatomy(tiny(name))
    gates = Parametrized(Anatomy(model), "tscnc-gates")
    with torch.no_grad():
        for one in gates.stand_ins.values():
            one.slow[::2] = -3 / one.speed
    model.eval()
    judged = model(input_ids=DATA).logits
    value = tscnc(Seen(model, {}, []), sparse=1.0, condition=0.0, sparse_in="q")
    gates.finish()
    assert all(isinstance(matrix.module, ScatteredRows) for matrix in Anatomy(model).matrices())
    torch.testing.assert_close(model(input_ids=DATA).logits, judged, rtol=1e-4, atol=1e-5)
    assert Anatomy(model).matrix_bytes() < 0.55 * anatomy.matrix_bytes()
    torch.testing.assert_close(value, tscnc(seen_of(model), sparse=1.0, condition=0.0, sparse_in="q"))
    for gate, rows in ((-3.0, 0), (3.0, 6)):  # all the same: an ordinary matrix
        _, _, one = gated()
        with torch.no_grad():
            one.slow.fill_(gate / one.speed)
        found = one.finished()
        assert isinstance(found, torch.Tensor) and int(found.any(1).sum()) == rows


def test_the_slope_of_a_margin_is_that_of_a_small_move_and_the_steepest_is_no_less():
    anatomy, rows = Anatomy(tiny("llama", dtype=torch.float64)), DATA[:2]

    def found(**settings):
        given = Specimen(anatomy, data=Batches([{"input_ids": rows}]))
        return run_probes(given, {"local-lipschitz": settings})["local-lipschitz"]

    short, rows = found(length=4)["slope"], rows[:, :4]
    torch.testing.assert_close(found()["slope"], short)  # of the beginnings
    rows = DATA[:2]

    def margins(states, best):
        with torch.no_grad():
            logits = lens(run_blocks(anatomy, feed, 0, states)[:, -1])
        return logits[:, best[0]] - logits[:, best[1]]

    one, more, lens = found(samples=3), found(samples=6, ball=0.3), Specimen(anatomy).lens
    assert bool((one["steepest"] >= one["slope"]).all()) and bool((more["steepest"] > more["slope"]).any())
    torch.testing.assert_close(more["slope"], one["slope"])
    torch.testing.assert_close(more["radius"], (more["margin"] / more["steepest"]).clamp_max(0.3))
    assert drawings(one) and one.findings
    (feed,) = feeds_of(anatomy, [{"input_ids": rows[:1]}])
    with torch.no_grad():
        best = anatomy.model(rows[:1]).logits[0, -1].topk(2).indices
    assert float(margins(feed.hidden, best)) == pytest.approx(float(one["margin"][0]))
    states = feed.hidden.detach().requires_grad_(True)
    logits = lens(run_blocks(anatomy, feed, 0, states)[:, -1])[0]
    (gradient,) = torch.autograd.grad(logits[best[0]] - logits[best[1]], states)
    move = 1e-3 * gradient / gradient.norm() * feed.hidden.norm()
    change = margins(torch.cat([feed.hidden + move, feed.hidden - move]), best)
    assert float(change[0] - change[1]) / 2e-3 == pytest.approx(float(one["slope"][0]), rel=1e-3)


def test_what_does_not_go():
    for form in FORMS.values():
        for weight in (torch.ones(3), torch.ones(0, 4), torch.ones(2, 2, 2)):
            with pytest.raises(TransectError, match="of a matrix with entries"):
                form(weight)
    model = tiny("llama")
    for places in ("", "q,everything", "all,q"):
        with pytest.raises(TransectError, match="should be all, or some of q"):
            tscnc(seen_of(model), condition_in=places)
    with pytest.raises(TransectError, match="nothing is trained in the matrices head"):
        tscnc(Seen(model.requires_grad_(False), {}, []), sparse=0.0, condition_in="head")
    with pytest.raises(TransectError, match="no linear layer behind its blocks"):
        tscnc(seen_of(model.model), sparse=0.0, condition_in="head")
    with pytest.raises(TransectError, match="a=0 must be of type float above 0"):
        transect.adapt(model, "full", DATA, penalties="tscnc", settings={"tscnc": {"a": 0}})
    assert float(tscnc(seen_of(model), sparse=0.0, condition=0.0)) == 0
