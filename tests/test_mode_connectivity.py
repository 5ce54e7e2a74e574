"""Curves between two models, and what is measured along them."""

import copy
import math

import pytest
import torch
from torch import nn

from transect.errors import TransectError
from transect.merging import match_chain
from transect.studies.catalog.model_zoo_phases import (
    Measures,
    bezier,
    bezier_connectivity,
    estimate_norms,
    losses_along,
    mean_loss,
    measured,
    mode_connectivity,
    straight,
)
from transect.training import Schedule, own_loss

from .models import inputs, tiny
from .networks import Numbers, cross_entropy, examples, network, wrong


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


def test_the_rate_of_a_curve_stays_and_then_falls():
    schedule = Schedule(0.1, warm_up=0, shape="late")
    rates = [schedule.rate(round(share * 1000), 1000) for share in (0, 0.25, 0.5, 0.7, 0.9, 0.95, 0.999)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1 * (1 - 0.99 / 2), 0.001, 0.001, 0.001])
