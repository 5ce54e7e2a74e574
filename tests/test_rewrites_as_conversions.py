"""What rewrites and fits of trained models keep: merged attention, fitted functions, memory and tables beside."""

import pytest
import torch
import transformers as tf
from torch.nn import functional

import transect
from transect.anatomy import Anatomy
from transect.conversion.catalog.kat import fit_rational
from transect.conversion.catalog.minimal_transformer import symmetrized, whole_similarities
from transect.conversion.catalog.polycom import fit_polynomial
from transect.errors import TransectError
from transect.parts.catalog.kat import Rational
from transect.parts.catalog.polycom import NormedPowers, ReLUPowers

from .models import CONFIGS, VOCABULARY, assert_alike, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def one_head(monkeypatch):
    config = tf.GPT2Config(**{**CONFIGS["gpt2"][0].to_dict(), "n_head": 1})
    monkeypatch.setitem(CONFIGS, "one-head", (config, CONFIGS["gpt2"][1]))
    return tiny("one-head")


def test_one_head_needs_half_the_numbers_and_half_the_cache(one_head):
    before = logits(one_head, inputs("gpt2"))
    found = transect.convert(one_head, "merge-attention", lengths=[16])
    assert_alike(logits(found.model, inputs("gpt2")), before)
    (was,), (now,) = found.outcome["quality"]
    assert 2 * now["cache_bytes"] == pytest.approx(was["cache_bytes"], rel=0.1)  # and which positions are real
    assert found.outcome["told"]["numbers of attention, times those before"] == pytest.approx(
        (2 * 32 * 32 + 2 * 32) / (4 * 32 * 32 + 4 * 32)
    )


@pytest.mark.parametrize("merge", ["both", "qk", "vo"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "vit"])
def test_heads_with_biases_are_merged_exactly_and_how_many_numbers_that_takes_is_said(name, merge):
    model = tiny(name)
    attention = Anatomy(model).blocks[0].attention
    q, k = (
        (functional.linear(drawn(5, 32), m.weight.double(), m.bias.double())).view(5, 4, 8).transpose(0, 1)
        for m in (attention.q, attention.k)
    )
    expected = (q @ k.mT) * 8**-0.5
    found = transect.convert(model, "merge-attention", merge=merge, several=True)
    assert_alike(logits(found.model, inputs(name)), logits(tiny(name), inputs(name)))
    assert found.outcome["told"]["numbers of attention, times those before"] > 1
    if merge != "vo":
        part = Anatomy(found.model).blocks[0].part("attention")
        x, m = drawn(5, 32), part.similarity.detach().double()
        scores = (x @ m + part.shift.detach().double()[:, None]) @ x.mT * 8**-0.5
        off = scores - expected  # what is the same for all keys: the key bias
        torch.testing.assert_close(off, off[..., :1].expand_as(off), atol=1e-4, rtol=0)
        assert torch.linalg.matrix_rank(m, rtol=1e-5).tolist() == [8] * 4


def test_what_stands_between_the_matrices_is_refused(one_head):
    for name, options, said in (
        ("gpt2", {}, "has 4 heads of 8"), ("llama", {"several": True}, "rotary positions"),
        ("qwen3", {"several": True, "merge": "qk"}, "rotary positions"), ("gpt_neox", {"merge": "vo"}, "4 heads"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=said):
            transect.convert(tiny(name), "merge-attention", **options)
    merged = transect.convert(one_head, "merge-attention").model
    with pytest.raises(TransectError, match="a part stands there"):
        transect.convert(merged, "symmetrize-attention")


def test_the_nearest_symmetric_similarity(one_head):
    m = drawn(3, 6, 6)
    factor, probe, off = symmetrized(m)
    assert torch.equal(factor, factor.tril()) and probe == pytest.approx(2**0.5, abs=0.3) and 0 < off < 1
    values, vectors = torch.linalg.eigh((m + m.mT) / 2)
    torch.testing.assert_close(factor @ factor.mT, vectors @ (values.clamp_min(0)[..., None] * vectors.mT))
    again = symmetrized(factor @ factor.mT)
    assert again[1] < 1e-12 and again[2] < 1e-7
    before = whole_similarities(Anatomy(one_head).blocks[1]).matrix
    found = transect.convert(one_head, "symmetrize-attention", layers="1")
    part = Anatomy(found.model).blocks[1].part("attention")
    assert part.similarity.shape == (1, 32 * 33 // 2)
    distance = (part.similarities().detach().double() - before).norm() / before.norm()
    told = found.outcome["told"]
    assert told["||T T' - M|| / ||M||, the largest of a block"] == pytest.approx(float(distance), rel=1e-4)
    assert told["||M - M'|| / ||M||, the largest of a block"] > 0.5


@pytest.mark.parametrize(("function", "most"), [(functional.silu, 2e-6), (functional.gelu, 4.1e-3)])
def test_rational_fits_are_as_near_as_the_published_coefficients(function, most):
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    a, b = fit_rational(x, function(x), torch.ones_like(x))
    one = Rational(2, 1, "swish")
    with torch.no_grad():
        one.numerator.copy_(a)
        one.denominator.copy_(b[None])
        assert float((one(x[:, None].expand(-1, 2))[:, 0] - function(x)).abs().max()) < most
    a, b = (one.double().clone() for one in (drawn(6).abs(), drawn(4, seed=1).abs()))
    y = sum(a[i] * x**i for i in range(6)) / (1 + sum(b[j] * x.abs() ** (j + 1) for j in range(4)))
    found = fit_rational(x, y, torch.ones_like(x))
    above = sum(found[0][i] * x**i for i in range(6))
    torch.testing.assert_close(
        above / (1 + sum(found[1][j] * x.abs() ** (j + 1) for j in range(4))), y, atol=1e-3, rtol=1e-3
    )


def test_polynomials_are_least_squares():
    x = 2 * drawn(70, 12)
    for one in (ReLUPowers(3).double(), NormedPowers(3, 1e-6).double()):
        y = functional.gelu(x)
        error = fit_polynomial(one, x, y)
        off = (one(x) - y).detach()
        assert error == pytest.approx(float(off.norm() / y.norm()), rel=1e-4)
        for power in [torch.ones_like(x), *one.powers(x)]:
            assert abs(float((off * power).sum())) < 1e-6 * float(power.norm() * y.norm())


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_kat_is_near_the_model_and_its_matrices_are_the_trained_ones(name):
    data = DATA if name != "vit" else inputs("vit", batch=8)
    found = transect.convert(tiny(name), "kat", data, steps=0)
    (error,) = found.outcome["told"].values()
    assert error < 0.02
    expected = logits(tiny(name), inputs(name))
    assert (logits(found.model, inputs(name)) - expected).norm() < 0.05 * expected.norm()
    part = Anatomy(found.model).blocks[1].part("mlp")
    torch.testing.assert_close(part.down_proj.weight, Anatomy(tiny(name)).blocks[1].mlp.down.weight)
    assert (part.gate_proj is not None) == (name == "llama")
    part.between.forward = Anatomy(tiny(name)).blocks[1].mlp.activation.forward
    x = drawn(4, 32).float()
    mlp = Anatomy(tiny(name)).blocks[1]
    whole = tiny(name).get_submodule(mlp.slot_path("mlp"))
    torch.testing.assert_close(part(x), whole(x), atol=1e-6, rtol=1e-5)
    with pytest.raises(TransectError, match="5 groups do not divide"):
        transect.convert(tiny(name), "kat", groups=5)


def test_polynomials_follow_the_function_and_need_data_to_do_so():
    with pytest.raises(TransectError, match="pass data"):
        transect.convert(tiny("llama"), "polycom")
    errors = {}
    for order in (2, 3):
        found = transect.convert(tiny("llama"), "polycom", DATA, steps=0, order=order)
        (errors[order],) = found.outcome["told"].values()
    assert errors[3] <= errors[2] < 1
    assert transect.convert(tiny("llama"), "polycom", DATA, steps=0, kind="poly-norm").outcome["generates"]


def test_tables_follow_matrices_nearer_the_fewer_their_bits_and_memory_alone_is_trained():
    errors = []
    for bits in (2, 4):
        found = transect.convert(tiny("llama"), "memoryformer", DATA, steps=0, bits=bits)
        errors += found.outcome["told"].values()
    assert all(error < 1 for error in errors)
    with pytest.raises(TransectError, match="no whole number of chunks of 5"):
        transect.convert(tiny("llama"), "memoryformer", DATA, bits=5)
    with pytest.raises(TransectError, match="unknown roles z"):
        transect.convert(tiny("llama"), "memoryformer", DATA, roles="up,z")
    model, before = tiny("llama"), tiny("llama").state_dict()
    transect.convert(model, "ultramem-v2", DATA, steps=2, side=8, top=4, batch_size=2)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    assert any(state[key].any() for key in state if key.endswith("part.out_proj.weight"))
    transect.convert(tiny("llama"), "ultramem-v2", DATA, steps=0, side=8, top=9)  # half of three parts: 9 x 9 slots
    with pytest.raises(TransectError, match="top=10 of 9 rows"):
        transect.convert(tiny("llama"), "ultramem-v2", DATA, side=8, top=10)
