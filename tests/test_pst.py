"""PST: mask, schedule, straight-through gradients, what is trained and what stays."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.operators import stored_bytes
from transect.operators.sparse import Sparse
from transect.training import Parametrized, parametrization_named
from transect.training.parametrizations.pst import Pruned, kept, ramp

from .models import inputs, logits, tiny

PST = parametrization_named("pst")


def made(d_out=4, d_in=6, **options):
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out).double()
    given = {"sparsity": 0.5, "weight_rank": 2, "score_rank": 3, **options}
    return layer, PST.function(layer.weight, layer.bias, **PST.settings(given))


def trained(one):
    """Give every trained number a value, as if some steps had been made."""
    with torch.no_grad():
        for parameter in (one.v, one.b, one.r, one.c):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return one


def test_it_starts_as_the_frozen_model():
    model, before = tiny("gpt2"), logits(tiny("gpt2").eval(), inputs("gpt2"))
    found = Parametrized(Anatomy(model), "pst", {"weight_rank": 2, "score_rank": 2})
    for one in found.stand_ins.values():
        one.train()
    found.after_step(0, 10)
    torch.testing.assert_close(logits(model, inputs("gpt2")), before, atol=1e-6, rtol=1e-6)
    names = {name.rpartition(".")[2] for name in found.parameters}
    assert names == {"u", "v", "a", "b", "r", "c"}
    starts = [one.start.clone() for one in found.stand_ins.values()]
    optimizer = torch.optim.AdamW(found.parameters.values(), lr=0.1)
    found.after_step(1, 2)
    model(**inputs("gpt2")).logits.square().sum().backward()
    optimizer.step()
    for one, start in zip(found.stand_ins.values(), starts, strict=True):
        assert torch.equal(one.start, start) and one.start.grad is None and one.v.any() and one.c.any()


@pytest.mark.parametrize("scores", [torch.arange(20.0).flip(0), torch.ones(20), torch.arange(20.0) // 6])
def test_as_many_go_as_are_asked_for_also_where_scores_are_equal(scores):
    for pruned in range(20):
        mask = kept(scores.view(4, 5), pruned)
        assert mask.shape == (4, 5) and int((~mask).sum()) == pruned
        assert not pruned or scores[~mask.flatten()].max() <= scores[mask.flatten()].min()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.9])
def test_the_share_of_zeros_is_the_schedules_and_the_start_is_magnitude_pruning(sparsity):
    layer, one = made(5, 4, sparsity=sparsity)
    for gone in (0.0, 0.35, 0.5, 1.0):
        one.train().after_step(gone)
        count = int(sparsity * ramp(gone, 0.1, 0.3) * 20 + 1e-9)
        assert int((one.weight == 0).sum()) == count
        smallest = layer.weight.abs().flatten().sort().indices[:count]
        assert not one.weight.flatten()[smallest].any()
    one.after_step(0.0)
    assert int((one.eval().weight == 0).sum()) == int(sparsity * 20 + 1e-9)  # judged as it will be stored


def test_the_schedule_is_cubic_between_its_ends():
    shares = [ramp(step / 1000, 0.1, 0.3) for step in range(1001)]
    rises = [after - before for before, after in pairwise(shares)]
    assert shares[0] == shares[100] == 0 and shares[701] == shares[-1] == 1
    assert min(rises) >= 0 and max(rises) < 0.01
    assert 1 - ramp(0.4, 0.1, 0.3) == pytest.approx(0.5**3)


def test_gradients_go_straight_through_the_mask():
    _, one = made(alpha1=0.5, alpha2=2.0, beta=0.7)
    one.train().after_step(1.0)
    g = torch.randn(4, 6, dtype=torch.float64)
    (one.weight * g).sum().backward()
    assert not one.a.grad.any() and not one.u.grad.any() and one.b.grad.any() and one.v.grad.any()
    trained(one).zero_grad()
    weight, scores = one.parts()
    mask = kept(scores, 12)
    (one.weight * g).sum().backward()
    of_mask, of_weight = g * weight, g * mask + g * weight.abs()
    torch.testing.assert_close(one.r.grad, 2 * of_mask.sum(1))
    torch.testing.assert_close(one.c.grad, 2 * of_mask.sum(0))
    torch.testing.assert_close(one.a.grad, 0.5 * of_mask @ one.b.T)
    torch.testing.assert_close(one.b.grad, 0.5 * one.a.T @ of_mask)
    torch.testing.assert_close(one.u.grad, 0.7 * of_weight @ one.v.T)
    torch.testing.assert_close(one.v.grad, 0.7 * one.u.T @ of_weight)


def test_a_constant_in_the_scores_changes_nothing():
    _, one = made()
    weight = trained(one).eval().weight
    with torch.no_grad():
        one.r.add_(0.25)
        assert torch.equal(one.weight, weight)
        one.c.sub_(0.25)
    assert torch.equal(one.weight, weight)


def test_what_stays_is_stored_sparse_and_computes_the_same():
    _, one = made()
    trained(one).eval()
    done, x = one.finished(), torch.randn(3, 6, dtype=torch.float64)
    done.set_bias(one.bias)
    torch.testing.assert_close(done(x), one(x), atol=1e-6, rtol=1e-6)
    assert isinstance(done, Sparse) and done.values.numel() == 12
    assert stored_bytes(done) == 8 * 12 + 3 + 8 * 4  # values, a bit for each of 24 entries, bias
    _, whole = made(sparsity=0.0)
    assert torch.equal(whole.finished(), whole.start)


def test_it_is_put_together_once():
    model = tiny("llama")
    found = Parametrized(Anatomy(model), "pst", {"sparsity": 0.5, "weight_rank": 2, "score_rank": 2})
    with pytest.raises(TransectError, match="Pruned"):
        Parametrized(Anatomy(model), "pst")
    found.finish()
    with pytest.raises(TransectError, match="begin with the dense model"):
        Parametrized(Anatomy(model), "pst")


@pytest.mark.parametrize(("ranks", "millions", "percent"), [((8, 8), 2.82, 3.3), ((4, 4), 1.49, 1.8)])
def test_trained_numbers_of_bert_base(ranks, millions, percent):
    shapes = 12 * [*4 * [(768, 768)], (3072, 768), (768, 3072)]
    trained = frozen = 0
    for shape in dict.fromkeys(shapes):
        one = Pruned(torch.empty(shape, device="meta"), None, 0.9, *ranks, 1.0, 1.0, 1.0, 0.1, 0.3)
        trained += shapes.count(shape) * sum(p.numel() for p in one.parameters() if p.requires_grad)
        frozen += shapes.count(shape) * one.start.numel()
    assert round(frozen / 1e6, 2) == 84.93 and round(trained / 1e6, 2) == millions
    assert round(100 * trained / frozen, 1) == percent


def test_scores_in_few_bits_and_scores_that_are_left_out():
    layer = nn.Linear(40, 30).bfloat16()
    one = PST.function(layer.weight, layer.bias, **PST.settings({"alpha1": 0.0, "alpha2": 0.0})).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert one.weight.dtype == torch.bfloat16 and one.parts()[1].dtype == torch.float32
    assert [name for name, p in one.named_parameters() if p.requires_grad] == ["u", "v"]


@pytest.mark.parametrize("wrong", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"weight_rank": 0}, {"score_rank": 0}])
def test_what_means_nothing_is_refused(wrong):
    with pytest.raises(TransectError, match=next(iter(wrong))):
        PST.settings(wrong)
    with pytest.raises(TransectError, match="together they must stay below 1"):
        made(warm_up=0.6, settle=0.4)
