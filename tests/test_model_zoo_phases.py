"""Phases of a training recipe: each measurement against what is known of it, and the map with recipes of its own."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from transect.errors import Diverged, TransectError
from transect.merging import match_chain
from transect.probes import Result
from transect.store import Folder
from transect.studies import KIND, run_study, study_named
from transect.studies.catalog.model_zoo_phases import (
    Cell,
    Measures,
    Recipe,
    bezier,
    bezier_connectivity,
    cell_of,
    estimate_norms,
    hessian_trace,
    hessian_vector_product,
    linear_cka,
    losses_along,
    mean_loss,
    measured,
    mode_connectivity,
    output_similarity,
    phase_map,
    phase_of,
    recipes,
    straight,
    top_eigenvalue,
    zoo,
)
from transect.training import Schedule, optimizer_named, own_loss

from .models import inputs, tiny

NAME = "model-zoo-phases"
SMALL = {"widths": "4", "temperatures": "512,1024", "epochs": 2, "products": 3, "curve_epochs": 1}


class Numbers(nn.Module):
    """n numbers x, whose loss is a function of them alone."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(x, dtype=torch.float64))


def quadratic(a):
    """x^T A x / 2 in batches that count: each is its number of terms."""
    return lambda model, count: (count * 0.5 * model.x @ a @ model.x, count)


def symmetric(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / n


def examples(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=dtype), torch.randint(3, (count,), generator=generator)


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def wrong(model, batch):
    return (model(batch[0]).argmax(-1) != batch[1]).sum(), len(batch[1])


def network(seed=0, width=6, dtype=torch.float64, more=()):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, width), *more, nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def directions(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one)
        for name, one in model.named_parameters()
    }


def inner(one, other):
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)


def test_eigenvalue_and_trace_of_a_quadratic_loss():
    a = symmetric(12)
    model, batches = Numbers(torch.randn(12)), [3, 1, 8]
    eigenvalues = torch.linalg.eigvalsh(a)
    found = top_eigenvalue(model, quadratic(a), batches, tolerance=1e-9, steps=2000)
    assert found.settled and found.value == pytest.approx(float(eigenvalues[-1]), rel=1e-3)
    shifted = a - 2 * float(eigenvalues[-1]) * torch.eye(12, dtype=torch.float64)  # all below 0
    lowest = float(torch.linalg.eigvalsh(shifted)[0])
    assert top_eigenvalue(model, quadratic(shifted), [1], tolerance=1e-9, steps=5000).value == pytest.approx(
        lowest, rel=1e-3
    )
    found = hessian_trace(model, quadratic(a), batches, tolerance=0)
    assert found.steps == 100 and abs(found.value - float(a.trace())) < 3 * found.error
    assert math.isnan(hessian_trace(model, quadratic(a), [1], probes=1).error)


def test_trace_of_a_diagonal_takes_one_probe():
    values = torch.linspace(-1, 3, 9, dtype=torch.float64)
    found = hessian_trace(Numbers(torch.randn(9)), quadratic(values.diag()), [2, 5], probes=1)
    assert found.value == pytest.approx(float(values.sum()), rel=1e-12)


def test_a_negative_running_mean_does_not_end_the_trace():
    a = symmetric(8) - 5 * torch.eye(8, dtype=torch.float64)
    found = hessian_trace(Numbers(torch.randn(8)), quadratic(a), [1], tolerance=1e-12, probes=20)
    assert found.value < 0 and found.steps == 20 and not found.settled


def test_a_linear_loss_has_no_curvature():
    found = top_eigenvalue(Numbers(torch.randn(4)), lambda model, _: (model.x.sum(), 1), [0])
    assert found.value == 0 and found.settled
    assert hessian_trace(Numbers(torch.randn(4)), lambda model, _: (model.x.sum(), 1), [0]).value == 0


def assert_product_is_a_difference_of_gradients(model, loss, batches, rel=1e-3, step=1e-4):
    v = directions(model, 1)
    product = hessian_vector_product(model, loss, batches, v)

    def gradient(sign):
        moved = copy.deepcopy(model).eval()
        with torch.no_grad():
            for name, one in moved.named_parameters():
                one.add_(sign * step * v[name])
        total = sum(loss(moved, batch)[0] for batch in batches) / sum(loss(moved, batch)[1] for batch in batches)
        return dict(zip(v, torch.autograd.grad(total, list(moved.parameters()), materialize_grads=True), strict=True))

    up, down = gradient(1), gradient(-1)
    for name, one in product.items():
        expected = (up[name] - down[name]) / (2 * step)
        assert float((one - expected).norm()) <= rel * float(expected.norm()) + 1e-9


def test_product_with_the_hessian():
    model, batches = network(), [examples(9), examples(4, seed=1)]
    assert_product_is_a_difference_of_gradients(model, cross_entropy, batches)
    u, v = directions(model, 2), directions(model, 3)
    hu, hv = (hessian_vector_product(model, cross_entropy, batches, one) for one in (u, v))
    assert inner(u, hv) == pytest.approx(inner(v, hu), rel=1e-9)
    both = hessian_vector_product(model, cross_entropy, batches, {name: 2 * u[name] - v[name] for name in u})
    joined = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    together = hessian_vector_product(model, cross_entropy, joined, v)
    for name, one in both.items():
        torch.testing.assert_close(one, 2 * hu[name] - hv[name])
        torch.testing.assert_close(together[name], hv[name])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_product_with_the_hessian_of_a_language_model(name):
    model = tiny(name, dtype=torch.float64)
    assert model.config._attn_implementation == "sdpa"
    assert_product_is_a_difference_of_gradients(model, own_loss, [inputs(name)])


def test_the_hessian_is_that_of_evaluation_mode_and_the_model_stays_as_it_is():
    model = network(more=[nn.BatchNorm1d(6), nn.Dropout(0.5)])
    batches = [examples(8)]
    model.train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    numbers = torch.get_rng_state()
    found = top_eigenvalue(model, cross_entropy, batches)
    assert model.training and torch.equal(numbers, torch.get_rng_state())
    assert all(one.grad is None for one in model.parameters())
    assert found == top_eigenvalue(model.eval(), cross_entropy, batches)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_bad_input_of_the_hessian():
    model, batches = network(), [examples(4)]
    with pytest.raises(TransectError, match=r"2\.weight"):
        hessian_vector_product(model, cross_entropy, batches, {**directions(model, 0), "2.weight": torch.zeros(2)})
    with pytest.raises(TransectError, match="a batch or more"):
        top_eigenvalue(model, cross_entropy, [])
    with pytest.raises(TransectError, match="finite"):
        top_eigenvalue(model, lambda model, _: (model[0].weight.sum() * math.inf, 1), [0])
    with pytest.raises(TransectError, match="asks for gradients"):
        hessian_trace(copy.deepcopy(model).requires_grad_(False), cross_entropy, batches)


def test_ends_of_the_curve_are_bit_for_bit():
    ends = [{"w": torch.tensor([-0.0, 1e-30, 3.7, seed])} for seed in (1.0, 2.0)]
    path = bezier(ends[0], {"w": torch.tensor([1e30, -1.0, math.pi, 5.0])}, ends[1])
    for end, t in zip(ends, (0.0, 1.0), strict=True):
        assert torch.equal(path(t)["w"].view(torch.int32), end["w"].view(torch.int32))
        assert torch.equal(straight(*ends)(t)["w"].view(torch.int32), end["w"].view(torch.int32))
    middle = 0.25 * ends[0]["w"] + 0.5 * torch.tensor([1e30, -1.0, math.pi, 5.0]) + 0.25 * ends[1]["w"]
    torch.testing.assert_close(path(0.5)["w"], middle)


@pytest.mark.parametrize(("height", "sign"), [(1.0, -1), (-0.5, 1), (0.0, 0)])
def test_sign_of_connectivity(height, sign):
    """A hill of the loss in the middle of the line from -1 to 1, a valley, and a constant."""
    ends = [Numbers([value]) for value in (-1.0, 1.0)]

    def loss(model, _):
        return 2 + height * (1 - model.x.square()).sum(), 1

    along = losses_along(straight(*({"x": one.x.detach()} for one in ends)), ends[0], loss, [0])
    assert mode_connectivity(along) == pytest.approx(-height)
    assert math.copysign(1, mode_connectivity(along)) == sign or not sign


def test_equal_ends_and_a_bend_between_them_are_a_constant_curve():
    model, batches = network(dtype=torch.float32), [examples(16, dtype=torch.float32)]
    numbers = {name: one.detach() for name, one in model.named_parameters()}
    along = losses_along(bezier(numbers, straight(numbers, numbers)(0.5), numbers), model, cross_entropy, batches)
    torch.testing.assert_close(along, along[:1].expand(21), rtol=1e-6, atol=0)
    assert abs(mode_connectivity(along)) < 1e-6
    joined = bezier_connectivity(model, copy.deepcopy(model), cross_entropy, batches, epochs=0)
    assert abs(joined.connectivity) < 1e-6


def taught(seed, steps=300, width=32):
    """A network that has learned where the first of three numbers is the largest."""
    model, (x, _) = network(seed, width, torch.float32), examples(256, dtype=torch.float32)
    y = x[:, :3].argmax(-1)
    stepper = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(steps):
        stepper.zero_grad()
        (cross_entropy(model, (x, y))[0] / len(y)).backward()
        stepper.step()
    return model, [(x[start : start + 64], y[start : start + 64]) for start in range(0, 256, 64)]


def test_a_trained_curve_is_no_higher_than_the_line_and_leaves_its_ends():
    (first, batches), (second, _) = taught(0), taught(1)
    kept = [copy.deepcopy(one.state_dict()) for one in (first, second)]
    joined = bezier_connectivity(first, second, cross_entropy, batches)
    assert joined.losses.max() < joined.on_the_line.max()  # of independent seeds
    assert joined.connectivity > mode_connectivity(joined.on_the_line)
    for model, before in zip((first, second), kept, strict=True):
        assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert float(joined.losses[0]) == pytest.approx(mean_loss(first, cross_entropy, batches))
    assert float(joined.losses[-1]) == pytest.approx(mean_loss(second, cross_entropy, batches))
    again = bezier_connectivity(first, second, cross_entropy, batches)
    assert torch.equal(joined.losses, again.losses)
    other = bezier_connectivity(first, second, cross_entropy, batches, seed=1)
    assert not torch.equal(joined.losses, other.losses)
    matched, _ = match_chain(first, second)
    line = straight(*({name: one.detach() for name, one in model.named_parameters()} for model in (first, matched)))
    along = losses_along(line, first, cross_entropy, batches)
    assert mode_connectivity(along) > mode_connectivity(joined.on_the_line)


def test_the_bend_lowers_the_loss_and_the_decay_of_the_whole_curve():
    """One step by hand: the same t, the gradient through 2t(1-t) φ, the penalty of all numbers on the curve."""
    first, second, batch = network(0), network(1), examples(8)
    joined = bezier_connectivity(first, second, cross_entropy, [batch], epochs=1, decay=0.3, rate=0.1)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # of step 0 and seed 0
        t = float(torch.rand(()))
    model, numbers = copy.deepcopy(first), [dict(one.named_parameters()) for one in (first, second)]
    with torch.no_grad():
        for name, one in model.named_parameters():
            middle = (numbers[0][name] + numbers[1][name]) / 2
            one.copy_((1 - t) ** 2 * numbers[0][name] + 2 * t * (1 - t) * middle + t**2 * numbers[1][name])
    total = cross_entropy(model, batch)[0] / 8 + 0.15 * sum(one.square().sum() for one in model.parameters())
    total.backward()
    for name, one in model.named_parameters():
        middle = (numbers[0][name] + numbers[1][name]) / 2
        torch.testing.assert_close(joined.bend[name], (middle - 0.1 * 2 * t * (1 - t) * one.grad).detach())


def test_norms_take_their_statistics_anew_at_every_point():
    (first, second), batches = (
        [network(seed, more=[nn.BatchNorm1d(6), nn.Dropout(0.5)]) for seed in (0, 1)],
        [examples(16), examples(16, seed=1)],
    )
    before = copy.deepcopy(first.state_dict())
    joined = bezier_connectivity(first, second, cross_entropy, batches, epochs=1)
    assert all(torch.equal(one, before[name]) for name, one in first.state_dict().items())
    estimate_norms(first, cross_entropy, batches)
    seen = [first[0](x).detach() for x, _ in batches]
    torch.testing.assert_close(first[1].running_mean, torch.stack([one.mean(dim=0) for one in seen]).mean(dim=0))
    torch.testing.assert_close(first[1].running_var, torch.stack([one.var(dim=0) for one in seen]).mean(dim=0))
    assert first[1].momentum == 0.1 and all(module.training for module in first.modules())
    assert float(joined.losses[0]) == pytest.approx(mean_loss(first, cross_entropy, batches))


def test_curves_of_language_models_in_16_bits():
    first, second = (tiny("llama", dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    joined = bezier_connectivity(first, second, own_loss, [inputs("llama")], epochs=1, rate=0.01, points=3)
    assert joined.losses.isfinite().all() and first.dtype == torch.bfloat16
    assert all(one.dtype == torch.float32 for one in joined.bend.values())


def test_models_that_do_not_fit_are_refused():
    batches = [examples(8)]
    with pytest.raises(TransectError, match=r"'0.bias' is \(6,\) in one and \(7,\) in the other"):
        bezier_connectivity(network(width=6), network(width=7), cross_entropy, batches)
    measures = Measures(cross_entropy, wrong, lambda model, batch: model(batch[0]), batches, batches)
    with pytest.raises(TransectError, match="the same parameters"):
        measured([network(width=6), network(width=7)], measures)
    with pytest.raises(TransectError, match="give two"):
        measured([network()], measures)
    with pytest.raises(TransectError, match="nothing to measure"):
        mean_loss(network(), cross_entropy, [])


def tables(n=40, seed=0, d=6, e=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x[:, :e].tanh() + torch.randn(n, e, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shape", [(40, 6, 4), (8, 30, 20)])
def test_cka_of_what_is_known(shape, debiased):
    x, y = tables(shape[0], d=shape[1], e=shape[2])
    value = linear_cka(x, y, debiased=debiased)
    assert linear_cka(x, x, debiased=debiased) == pytest.approx(1)
    assert linear_cka(y, x, debiased=debiased) == pytest.approx(value)
    turn = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64)).Q
    assert linear_cka(3 * x @ turn + 7, -y, debiased=debiased) == pytest.approx(value)
    assert debiased or 0 <= value <= 1
    n = len(x)
    grams = [(one - one.mean(dim=0)) @ (one - one.mean(dim=0)).T for one in (x, y)]

    def product(k, other):
        """The estimator as its papers write it: of Gram matrices, with their diagonals left out."""
        if not debiased:
            return float((k * other).sum())
        k, other = k - k.diag().diag(), other - other.diag().diag()
        product = k @ other
        return float(
            product.trace() + k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * product.sum()
        )  # fmt: skip

    expected = product(*grams) / math.sqrt(product(grams[0], grams[0]) * product(grams[1], grams[1]))
    assert value == pytest.approx(expected)


def test_unbiased_cka_of_what_has_nothing_in_common():
    x, y = (torch.randn(24, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert linear_cka(x, y) > 0.4 and abs(linear_cka(x, y, debiased=True)) < 0.2


def test_bad_input_of_cka():
    x, _ = tables()
    assert math.isnan(linear_cka(x, torch.ones(40, 3)))
    with pytest.raises(TransectError, match=r"\(40, 6\) and \(39, 6\)"):
        linear_cka(x, x[1:])
    with pytest.raises(TransectError, match="4 examples"):
        linear_cka(x[:3], x[:3], debiased=True)
    with pytest.raises(TransectError, match="finite"):
        linear_cka(x, x * math.inf)
    with pytest.raises(TransectError, match="a batch or more"):
        output_similarity(network(), network(), lambda model, batch: model(batch[0]), [])


@pytest.mark.parametrize(
    ("loss", "connectivity", "similarity", "phase"),
    [
        (1.0, -0.5, 0.9, "I"), (1.0, 0.5, 0.1, "II"), (1.0, 0.0, 0.9, "II"), (0.1, -0.5, 0.9, "III"),
        (0.1, -0.05, 0.5, "IV-A"), (0.1, -0.05, 0.9, "IV-B"), (0.1, 0.3, 0.9, "IV-B"), (0.2, 0.0, math.nan, "IV"),
        (math.nan, 0.0, 0.9, "diverged"), (0.2, math.nan, 0.9, "diverged"),
    ],
)  # fmt: skip
def test_phases(loss, connectivity, similarity, phase):
    placed = phase_of(Cell(2.0, loss, connectivity, similarity, 12.5), 0.5)
    assert placed.phase == phase and placed.limits == {"loss": 0.2, "connectivity": 0.1, "similarity": 0.5}
    assert placed.meaning in str(placed) and "sharpness 12.5" in str(placed)  # the raw numbers, always
    if phase in ("IV-A", "IV-B"):
        assert phase_of(placed.cell).phase == "IV"


def test_thresholds_can_be_chosen():
    cell = Cell(2.0, 0.5, -0.3, 0.9)
    assert phase_of(cell, 0.5).phase == "I"
    assert phase_of(cell, 0.5, high=0.3).phase == "III" and phase_of(cell, 0.95, high=0.3, near=0.2).phase == "IV-A"
    with pytest.raises(TransectError, match="initial loss"):
        phase_of(Cell(0.0, 0.5, 0.0, 0.9))


def recipe_of(trained, diverges=()):
    """A recipe of one's own: loads are widths; what is trained is noted."""
    batches = [examples(32, dtype=torch.float32)]

    def train(model, load, temperature, seed):
        trained.append((load, temperature, seed))
        if (load, temperature) in diverges:
            raise Diverged("too hot")
        with torch.no_grad():
            for one in model.parameters():
                one.mul_(temperature)

    measures = Measures(cross_entropy, wrong, lambda model, batch: model(batch[0]), batches, batches, products=5)
    return Recipe(lambda load, seed: network(seed, load, torch.float32), train, measures)


def test_a_map_of_a_recipe_of_ones_own_goes_on_where_it_was(monkeypatch):
    trained, kept = [], {}

    def once(name, make):
        if name not in kept:
            kept[name] = make()
        return kept[name]

    def stop(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "bezier_connectivity", stop)
        with pytest.raises(KeyboardInterrupt):
            phase_map(recipe_of(trained), [2, 4], [0.5, 2.0], [0, 1], once=once)
    assert trained == [(2, 0.5, 0), (2, 0.5, 1)]
    made = phase_map(recipe_of(trained, diverges=[(4, 2.0)]), [2, 4], [0.5, 2.0], [0, 1], once=once)
    assert len(trained) == 8 == len(set(trained))
    assert [one.phase for one in made.placed()[1]][1] == "diverged"
    assert made.figures["training_loss"].isnan().tolist() == [[False, False], [False, True]]
    assert made.figures["initial_loss"].isfinite().all() and made.figures["curve"].shape == (2, 2, 21)
    assert "matched_connectivity" not in made.figures
    models = [recipe_of([]).build(2, seed) for seed in (0, 1)]
    for model in models:
        recipe_of([]).train(model, 2, 0.5, 0)
    found = measured(models, recipe_of([]).measures)
    for name, value in found.items():
        torch.testing.assert_close(made.figures[name][0, 0], value)
    cell = cell_of({**found, "initial_loss": made.figures["initial_loss"][0, 0]})
    assert phase_of(cell, made.similar) == made.placed()[0][0]


def test_a_map_needs_seeds_and_places():
    recipe = recipe_of([])
    for seeds in ([0], [], [1, 1]):
        with pytest.raises(TransectError, match="two seeds"):
            phase_map(recipe, [2], [1.0], seeds)
    with pytest.raises(TransectError, match="load"):
        phase_map(recipe, [], [1.0], [0, 1])
    with pytest.raises(TransectError, match="temperature"):
        phase_map(recipe, [2], [1.0, 1.0], [0, 1])
    made = phase_map(recipe_of([], diverges=[(2, 1.0)]), [2], [1.0], [0, 1])
    assert made.placed()[0][0].phase == "diverged"


def test_the_study(tmp_path, monkeypatch):
    folder = Folder(tmp_path / "study", KIND)
    folder.take()
    found = run_study(study_named(NAME), SMALL, folder=folder)
    assert found["training_loss"].shape == (1, 2) and found["line"].shape == (1, 2, 21)
    assert found.labels["temperature"] == ["1024", "512"]  # from cold to hot
    assert {*found.labels["phase"]} > {"I", "II", "III", "IV-A", "IV-B"}
    assert all(found[name].isfinite().all() for name in found.quantities)
    assert any("Phase" in one for one in found.findings) and found.caveats
    assert len(study_named(NAME).draw(found)) == 12
    for path in (tmp_path / "study" / "data").iterdir():
        path.unlink()  # as if it had been killed before the end

    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(recipes, "train", never)
    again = run_study(study_named(NAME), SMALL, folder=folder)
    assert torch.equal(again["curve"], found["curve"]) and again.findings == found.findings


def test_the_study_of_a_learning_rate_and_of_text(monkeypatch):
    monkeypatch.setattr(recipes, "PIECES", 16)
    settings = {
        "task": "text",
        "widths": "4",
        "temperature": "learning-rate",
        "temperatures": "0.003",
        "epochs": 1,
        "products": 2,
    }
    found = run_study(study_named(NAME), {**settings, "batch_size": 16})
    assert isinstance(found, Result) and found["similarity"].isfinite().all()
    assert "matched_connectivity" not in found.quantities and study_named(NAME).draw(found)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"seeds": 1}, "seeds"), ({"temperatures": "8,4096"}, "4096 examples is not to be had: there are 1437"),
        ({"temperature": "learning-rate", "batch_size": 2000}, "2000 examples"), ({"widths": "4,x"}, "whole numbers"),
        ({"widths": "0,4"}, "whole numbers of"), ({"temperatures": "8,nan"}, "whole numbers"),
        ({"temperature": "learning-rate", "temperatures": "nan"}, "is numbers of"), ({"widths": ""}, "whole numbers"),
        ({"task": "text", "widths": "6"}, "multiple of 4"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_any_training(settings, why, monkeypatch):
    monkeypatch.setattr(recipes, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(TransectError, match=why):
        run_study(study_named(NAME), settings)


def test_labels_that_are_wrong():
    labels = torch.randint(10, (400,))
    noisy = recipes.relabelled(labels, 10, 0.1, seed=0)
    assert int((noisy != labels).sum()) == 40 and int(noisy.min()) >= 0 and int(noisy.max()) < 10
    assert torch.equal(recipes.relabelled(labels, 10, 0.0, seed=0), labels)
    assert torch.equal(recipes.digits(0.1, 3).held_out["labels"], recipes.digits(0.0, 0).held_out["labels"])


def test_a_cell_is_trained_as_by_hand():
    """Width 3 for two epochs, against torch's SGD over the same orders with the same rates."""
    material = recipes.digits(0.1, 0)
    made = recipes.recipe(material, "batch-size", 1, 0.1, 2, 100, 1, "cpu")
    model, other = material.build(3, 5), material.build(3, 5)
    made.train(model, 3, 500, 5)
    schedule = Schedule(0.1, warm_up=0.3)
    stepper = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for step in range(6):
        draw = torch.Generator().manual_seed(5 * 1_000_003 + step // 3)
        chosen = torch.randperm(1437, generator=draw)[step % 3 * 500 : (step % 3 + 1) * 500]
        stepper.param_groups[0]["lr"] = schedule.rate(step, 6)
        stepper.zero_grad()
        x, y = material.training["pixel_values"][chosen], material.training["labels"][chosen]
        functional.cross_entropy(other(x), y).backward()
        stepper.step()
    for one, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6)


def test_the_rate_of_a_curve_stays_and_then_falls():
    schedule = Schedule(0.1, warm_up=0, shape="late")
    rates = [schedule.rate(round(share * 1000), 1000) for share in (0, 0.25, 0.5, 0.7, 0.9, 0.95, 0.999)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1 * (1 - 0.99 / 2), 0.001, 0.001, 0.001])


def test_sgd_is_by_the_formula():
    x = nn.Parameter(torch.tensor([2.0, -1.0]))
    stepper = optimizer_named("sgd").build([{"params": [("x", x)]}], 0.1, {"momentum": 0.5, "weight_decay": 0.2})
    expected, run = x.detach().clone(), torch.zeros(2)
    for step in range(3):
        x.grad = torch.tensor([1.0, float(step)])
        run = 0.5 * run + x.grad + 0.2 * expected
        expected = expected - 0.1 * run
        stepper.step()
        torch.testing.assert_close(x.detach(), expected)
    with pytest.raises(TransectError, match="momentum"):
        optimizer_named("sgd").build([{"params": [("x", x)]}], 0.1, {"momentum": 1.0})
