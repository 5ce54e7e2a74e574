"""Bigram subnetworks: the table, masks put on and taken off, the soft masks' training, and what is found."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.data import Batches, Specimen
from transect.errors import BadData, NotApplicable, TransectError
from transect.probes import drawings, run_probes
from transect.probes.catalog.bigram_subnetworks import masks as masking
from transect.probes.catalog.bigram_subnetworks.bigram_subnetworks import FOUND, FULL, KINDS, NONE
from transect.probes.catalog.bigram_subnetworks.lenses import Sums, lenses, turned
from transect.probes.catalog.bigram_subnetworks.predictions import bigram_surprisals, correlation, outcome
from transect.probes.catalog.bigram_subnetworks.search import is_stable, search
from transect.probes.catalog.bigram_subnetworks.table import BigramTable
from transect.training import Parametrized
from transect.training.parametrizations.continuous_sparsification import NEVER, SoftlyMasked

from .models import VOCABULARY, inputs, logits, tiny

NAME = "bigram-subnetworks"
QUICK = {"price": 1.0, "steps": 20, "rate": 0.3, "sharp": 1000.0, "start": 0.0}


def chain(tokens, seed=0):
    """A first-order Markov chain's transitions (V x V)."""
    return torch.distributions.Dirichlet(torch.full((tokens, tokens), 0.3, dtype=torch.float64)).sample()


def walked(transitions, rows, length, seed=0):
    """Sequences drawn from a chain."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(transitions), (rows, length), generator=generator)
    for place in range(1, length):
        ids[:, place] = torch.multinomial(transitions[ids[:, place - 1]], 1, generator=generator)[:, 0]
    return ids


@pytest.fixture(scope="module")
def transitions():
    torch.manual_seed(3)
    return chain(12)


def exact(transitions):
    """A model that predicts by a chain exactly: its blocks add nothing, and its head holds the chain's logarithms."""
    size = len(transitions)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, head_dim=4,
        max_position_embeddings=64, rms_norm_eps=0.0, tie_word_embeddings=False, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for matrix in Anatomy(model).matrices():
            matrix.write(torch.zeros(matrix.shape))
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(
            transitions.log().T / size**0.5
        )  # the norm brings a unit vector to length sqrt(size)
    return model


def test_the_table_is_the_counts_and_its_three_forms_agree():
    texts = [torch.tensor([1, 2, 1, 3, 1, 2]), torch.tensor([2, 2])]
    table = BigramTable(texts, 5)
    contexts = torch.tensor([1, 2, 3, 0, 1])
    rows = table.rows(contexts)
    torch.testing.assert_close(rows.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(rows[0], torch.tensor([0, 0, 2 / 3, 1 / 3, 0], dtype=torch.float64))
    torch.testing.assert_close(rows[1], torch.tensor([0, 0.5, 0.5, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(rows[3], torch.tensor([0, 3, 4, 1, 0], dtype=torch.float64) / 8)  # never seen: unigrams
    following = torch.tensor([2, 1, 1, 2, 4])
    expected = -rows.gather(1, following[:, None])[:, 0].log()
    torch.testing.assert_close(table.surprisals(contexts, following), expected)
    assert table.surprisals(contexts, following)[-1] == math.inf
    given = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = table.cross_entropies(contexts, given), -(rows * given.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(one.sum(), given, retain_graph=True)[0] for one in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_a_table_of_nothing_is_uniform_and_foreign_tokens_are_refused():
    empty = BigramTable([], 4)
    torch.testing.assert_close(empty.rows(torch.tensor([2])), torch.full((1, 4), 0.25, dtype=torch.float64))
    assert float(empty.surprisals(torch.tensor([2]), torch.tensor([3]))) == pytest.approx(math.log(4))
    with pytest.raises(BadData, match="has the token 7"):
        BigramTable([torch.tensor([1, 7])], 4)


def test_a_model_that_is_a_bigram_table_agrees_with_it_without_any_weight(transitions):
    model, text = exact(transitions), walked(transitions, 64, 32)
    known = BigramTable([], 12)
    known.keys, known.shares = torch.arange(144), transitions.flatten()
    known.tokens, known.starts = known.keys % 12, torch.arange(12) * 12
    known.ends = known.starts + 12
    held_out = Batches([{"input_ids": text[:16]}])
    found, bigram = outcome(model, held_out, known), bigram_surprisals(model, held_out, known)
    torch.testing.assert_close(found.surprisals, bigram)
    assert correlation(found.surprisals, bigram) == pytest.approx(1)
    assert found.distance == pytest.approx(float(-(transitions * transitions.log()).sum(1)[text[:16, :-1]].mean()))
    result = run_probes(Specimen(Anatomy(model), data=Batches([{"input_ids": text}])), {NAME: {"steps": 2}})[NAME]
    assert int(result["weights"]) == 0 and "keeps none" in result.findings[0]  # all weights are 0
    assert float(result["correlation"][KINDS.index(NONE)]) > 0.95  # what was counted is near what is known


def test_soft_masks_of_a_model_of_a_chain_come_near_the_chains_entropy(transitions):
    """Without a price, on a random model with the chain's text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for matrix in Anatomy(model).matrices(["up", "gate", "down"]):
        matrix.write(matrix.weight * 20)
    model.lm_head.weight *= 20
    text = Batches([{"input_ids": part} for part in walked(transitions, 64, 32).split(8)])
    one, table = Specimen(Anatomy(model), data=text), BigramTable(text.texts(), 12)
    found = search(one, text, table, **{**QUICK, "price": 0.0, "steps": 60, "rate": 0.2})
    entropy = float(-(table.rows(torch.arange(12)).clamp_min(1e-30).log() * table.rows(torch.arange(12))).sum(1).mean())
    assert found.losses[-1] < found.losses[0] and found.losses[-1] < entropy + 0.25 * (found.losses[0] - entropy)


def random_text(rows=16, length=20):
    generator = torch.Generator().manual_seed(5)
    return Batches([{"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3_moe"])
def test_all_and_none_and_back_bit_for_bit(name):
    model = tiny(name)
    anatomy = Anatomy(model)
    matrices, batch = anatomy.matrices(), inputs(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    whole = logits(model, batch)
    with masking.applied(matrices, masking.uniform(matrices, True)):
        assert torch.equal(logits(model, batch), whole)
    generator = torch.Generator().manual_seed(0)
    some = {one.name: torch.rand(one.shape, generator=generator) > 0.5 for one in matrices}
    parts = []
    for mask in (some, masking.complement(some)):
        with masking.applied(matrices, mask):
            parts.append([one.weight.clone() for one in matrices])
    for one, a, b in zip(matrices, *parts, strict=True):
        assert torch.equal(a + b, one.weight)
    with masking.applied(matrices, masking.uniform(matrices, False)):
        bare = logits(model, batch)
    other = tiny(name)
    for one in Anatomy(other).matrices():
        one.write(torch.zeros(one.shape))
    torch.testing.assert_close(bare, logits(other, batch))
    with pytest.raises(ZeroDivisionError), masking.applied(matrices, some):
        _ = 1 / 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_masks_are_counted_combined_shuffled_and_stored():
    matrices = Anatomy(tiny("llama")).matrices()
    generator = torch.Generator().manual_seed(0)
    some = {one.name: torch.rand(one.shape, generator=generator) > 0.8 for one in matrices}
    drawn, large = masking.shuffled(some, generator), masking.largest(some, matrices)
    for one in matrices:
        assert some[one.name].sum() == drawn[one.name].sum() == large[one.name].sum()
        kept = one.weight.abs()[large[one.name]]
        assert not len(kept) or kept.min() >= one.weight.abs()[~large[one.name]].max()
    assert (
        masking.density(masking.uniform(matrices, True)) == 1 and masking.density(masking.uniform(matrices, False)) == 0
    )
    assert masking.density(masking.union(some, masking.complement(some))) == 1
    names = [one.name for one in matrices]
    again = masking.unpacked(masking.packed(some, names), matrices)
    assert all(torch.equal(again[name], some[name]) for name in names)
    with pytest.raises(TransectError, match="of another model"):
        masking.unpacked(masking.packed(some, names)[:-1], matrices)
    with (
        pytest.raises(TransectError, match="no such matrix"),
        masking.applied(matrices, {"blocks.9.mlp.up": some[names[0]]}),
    ):
        pass
    with (
        pytest.raises(TransectError, match="should be bool of shape"),
        masking.applied(matrices, {names[0]: torch.ones(2, 2)}),
    ):
        pass
    with pytest.raises(TransectError, match="have the shapes"):
        masking.union(some, {names[0]: torch.ones(1, 1, dtype=torch.bool)})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_the_masks_are_trained_and_they_become_hard(name):
    model = tiny(name).requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    one, text = Specimen(Anatomy(model), data=random_text()), random_text()
    table = BigramTable(text.texts(), VOCABULARY)
    found = search(one, text, table, **QUICK)
    assert len(found.losses) == QUICK["steps"] and found.undecided < 0.01
    assert 0 < masking.density(found.masks) < 1
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_higher_price_keeps_no_more():
    text = random_text()
    table, shares = BigramTable(text.texts(), VOCABULARY), []
    for price in (0.0, 1.0, 100.0, 1e6):
        one = Specimen(Anatomy(tiny("llama").requires_grad_(False)), data=text)
        shares.append(masking.density(search(one, text, table, **{**QUICK, "price": price}).masks))
    assert all(more <= less * 1.05 for less, more in pairwise(shares)) and shares[-1] == 0


def test_soft_becomes_hard_and_zeros_are_never_kept():
    model = tiny("llama")
    first = Anatomy(model).matrices()[0]
    first.write(first.weight * (torch.rand(first.shape, generator=torch.Generator().manual_seed(0)) > 0.3))
    zero = first.weight == 0
    masked = Parametrized(Anatomy(model), "continuous-sparsification", {"sharp": 1e4})
    one = masked.stand_ins[first.name]
    assert isinstance(one, SoftlyMasked)
    assert bool((one.scores[zero] == NEVER).all())
    with torch.no_grad():
        one.scores.add_(torch.randn(one.scores.shape, generator=torch.Generator().manual_seed(1)))
    gaps = []
    for step in range(6):
        masked.after_step(step, 5)
        gaps.append(float((one.soft() - one.hard().to(one.scores)).abs().mean()))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-3
    masked.detach()


def test_what_counts_as_stable():
    falling = [5 - 0.01 * step for step in range(200)]
    assert is_stable(falling) and is_stable([1.0])
    back = [*falling[:50], 6.0, *falling[50:]]
    assert is_stable(back)  # reached again in time
    assert not is_stable([*falling[:-5], 6.0, *falling[-5:]])  # too late
    assert not is_stable([*falling[:50], *[9.0] * 150])


def test_correlation_is_pearsons_on_what_the_table_knows():
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(50, dtype=torch.float64, generator=generator),
        torch.randn(50, dtype=torch.float64, generator=generator),
    )
    assert correlation(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))
    unknown = y.clone()
    unknown[::7] = math.inf
    kept = unknown.isfinite()
    assert correlation(x, unknown) == pytest.approx(correlation(x[kept], y[kept]))
    impossible, largest = x.clone(), x.clone()
    impossible[3], largest[3] = math.inf, torch.cat([x[:3], x[4:]]).max()
    assert correlation(impossible, y) == pytest.approx(correlation(largest, y))
    assert math.isnan(correlation(torch.ones(5), y[:5])) and math.isnan(correlation(x[:1], y[:1]))


def test_ridge_is_the_regression_of_all_at_once_and_a_rotation_is_seen():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, size, dtype=torch.float64, generator=generator) for size in (5, 3))
    sums = Sums()
    for part in (slice(0, 13), slice(13, 40)):
        sums.add(x[part], y[part])
    slope, shift = sums.solve()
    cx, cy = x - x.mean(0), y - y.mean(0)
    torch.testing.assert_close(slope, torch.linalg.solve(cx.T @ cx + torch.eye(5, dtype=x.dtype), cx.T @ cy))
    torch.testing.assert_close(shift, y.mean(0) - x.mean(0) @ slope)
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    assert turned(turn) == pytest.approx(0.7) and turned(torch.eye(3)) == 0


def test_lenses_end_with_the_models_own_prediction_and_begin_with_the_token():
    model = tiny("llama", dtype=torch.float64)
    one = Specimen(Anatomy(model), data=random_text(64, 20))
    found = lenses(one, one.text, random_text(4, 20))
    assert float(found.output[-1]) > 0.99 and float(found.rotation[-1]) < 1e-6
    assert float(found.recall[0]) > 0.9


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_the_probe_through_the_frame(name):
    model = tiny(name)
    one = Specimen(Anatomy(model), data=random_text())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = run_probes(one, {NAME: {"steps": 10, "rate": 0.3, "batch": 8, "price": 1}})[NAME]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    kept = dict(zip(KINDS, result["kept"].tolist(), strict=True))
    assert kept[FULL] == 1 and kept[NONE] == 0 and kept["all but the subnetwork"] == pytest.approx(1 - kept[FOUND])
    masks = masking.unpacked(result["masks"], one.matrices())
    assert masking.count(masks) == int(result["weights"]) and masking.density(masks) == pytest.approx(kept[FOUND])
    assert result.findings and len(drawings(result)) == 6


def test_bad_input_is_refused_before_any_work(tmp_path):
    one = Specimen(Anatomy(tiny("llama")), data=random_text())
    for wrong in ({"price": -1}, {"price": math.inf}, {"steps": 0}, {"rate": 0}):
        with pytest.raises(TransectError):
            run_probes(one, {NAME: wrong})
    short = Specimen(one.anatomy, data=Batches([{"input_ids": torch.tensor([[5], [6]])}]))
    assert "two pieces of text" in run_probes(short, {NAME: {}}).refused[NAME]
    assert "--data" in run_probes(Specimen(one.anatomy), {NAME: {}}).refused[NAME]
    assert "tokenizer" in run_probes(one, {NAME: {"corpus": "x.txt"}}).refused[NAME]
    assert "next token" in run_probes(Specimen(Anatomy(tiny("bert")), data=random_text()), {NAME: {}}).refused[NAME]
    apart = Batches([{"input_ids": torch.tensor([[3, 4], [5, 6], [5, 6], [4, 9]])}])
    found = run_probes(Specimen(one.anatomy, data=apart), {NAME: {"steps": 1}})
    assert NAME in found or "more text" in found.refused[NAME]
    small = tiny("llama")
    transect.compress(small, "svd", keep=0.5)
    with pytest.raises(NotApplicable, match="begin with the dense model"):
        search(Specimen(Anatomy(small)), random_text(), BigramTable([], VOCABULARY), **QUICK)
