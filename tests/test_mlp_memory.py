"""MLP Memory: neighbours and targets by brute force, limits, the loss, the mixture in a model, sizes, bad input."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.evaluation import evaluate_loss
from transect.memory import Datastore, Memory, attach, memory_loss, memory_of, mixed_loss, neighbours_of, states_of

from .models import tiny

TOKENS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def store(count=20, vocabulary=5):
    values = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(2))
    return Datastore(drawn(count, 3), values, drawn(count))


def dense(targets, vocabulary=5):
    return torch.zeros(len(targets.tokens), vocabulary, dtype=torch.float64).scatter_add_(
        1, targets.tokens, targets.weights.double()
    )


def test_targets_by_brute_force_and_their_limits(monkeypatch):
    found = store()
    monkeypatch.setattr("transect.memory.datastore.BLOCK", 60)  # three rows at once
    targets = neighbours_of(found, 6, 2.0)
    for i in range(20):
        apart = (found.keys - found.keys[i]).square().sum(1)
        apart[i] = torch.inf
        expected = torch.zeros(5, dtype=torch.float64)
        for j in apart.argsort()[:6]:
            expected[found.values[j]] += math.exp(-float(apart[j]) / 2)
        expected /= expected.sum()
        torch.testing.assert_close(dense(targets)[i], expected)
        assert float(targets.entropy[i]) == pytest.approx(float(-torch.xlogy(expected, expected).sum()))
    hot, cold = neighbours_of(found, 6, 1e9), neighbours_of(found, 6, 1e-6)
    torch.testing.assert_close(hot.weights, torch.full_like(hot.weights, 1 / 6))
    nearest = torch.cdist(found.keys, found.keys).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(dense(cold).argmax(1), found.values[nearest]) and float(cold.entropy.max()) < 1e-6
    everything = dense(neighbours_of(found, 19, 1e9))
    others = torch.bincount(found.values, minlength=5) - functional.one_hot(found.values, 5)
    torch.testing.assert_close(everything, others.double() / 19, atol=1e-6, rtol=0)
    assert neighbours_of(found, 6).temperature > 0
    with pytest.raises(TransectError, match="neighbours=20 of 20"):
        neighbours_of(found, 20)


def test_the_loss_is_the_distance_and_the_cross_entropy():
    found = store()
    targets, rows = neighbours_of(found, 6, 2.0), torch.tensor([3, 7])
    logits = drawn(2, 5, seed=5)
    p, log_q = dense(targets)[rows], logits.log_softmax(-1)
    divergence = functional.kl_div(log_q, p, reduction="sum")
    nll = functional.cross_entropy(logits, found.values[rows], reduction="sum")
    for share in (0.0, 0.5, 1.0):
        torch.testing.assert_close(
            memory_loss(logits, found.values[rows], targets, rows, share), share * divergence + (1 - share) * nll
        )
    at_target = memory_loss(p.clamp_min(1e-30).log(), found.values[rows], targets, rows, 1.0)
    assert float(at_target) == pytest.approx(0, abs=1e-9) and float(divergence) > 0


def test_the_best_share_and_its_loss():
    ours, memory = drawn(50).abs().neg(), drawn(50, seed=1).abs().neg()
    loss, share = mixed_loss(ours, memory)
    grid = [float(-((1 - s) * ours.exp() + s * memory.exp()).log().mean()) for s in (k / 100 for k in range(101))]
    assert loss == pytest.approx(min(grid)) and share == grid.index(min(grid)) / 100
    bend = [a - 2 * b + c for a, b, c in zip(grid, grid[1:], grid[2:], strict=False)]
    assert min(bend) > -1e-12  # convex


def test_sizes_of_the_published_ones():
    with torch.device("meta"):
        one = Memory(1280, 54)
    assert sum(p.numel() for p in one.parameters()) + 1280 * 50257 == pytest.approx(772.6e6, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_model_with_a_memory_is_an_ordinary_checkpoint(name, tmp_path):
    model, plain = tiny(name), tiny(name)
    anatomy = Anatomy(model)
    batch = {"input_ids": TOKENS}
    states, before = states_of(anatomy, [batch]), plain(TOKENS).logits
    expected = before[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None]).flatten()
    torch.testing.assert_close(states.own, expected)
    assert torch.equal(states.values, TOKENS[:, 1:].flatten())
    torch.manual_seed(0)
    memory, width = Memory(states.keys.shape[1], 2), states.keys.shape[1]
    head = torch.randn(before.shape[-1], width)
    names = set(model.state_dict())
    attach(anatomy, memory, head, 0.25)
    assert names < set(model.state_dict())
    logits = model(TOKENS).logits
    said = (memory(states.keys) @ head.T).softmax(-1).view(3, 11, -1)
    torch.testing.assert_close(logits[:, :-1].exp(), 0.75 * before[:, :-1].softmax(-1) + 0.25 * said)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 12))
    mixing = memory_of(model)[1]
    mixing.share = 0.0
    assert torch.equal(model(TOKENS).logits, before)
    mixing.share = 1.0
    torch.testing.assert_close(model(TOKENS).logits[:, :-1].exp(), said)
    changed = TOKENS.clone()
    changed[:, -1] = 5
    torch.testing.assert_close(model(changed).logits[:, :-1], model(TOKENS).logits[:, :-1])
    mixing.share = 0.25
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(TOKENS).logits, logits)
    torch.testing.assert_close(evaluate_loss(again, [batch]).loss, evaluate_loss(model, [batch]).loss)
    picked = logits[:, :-1].gather(2, TOKENS[:, 1:, None]).mean()
    assert evaluate_loss(again, [batch]).loss == pytest.approx(-float(picked), rel=1e-5)
    given = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(*(again.generate(TOKENS, use_cache=use, **given) for use in (True, False)))
    with pytest.raises(TransectError, match="has a memory already"):
        attach(Anatomy(again), memory, head, 0.5)


def test_memorizing_lowers_the_loss_and_leaves_the_model_alone(tmp_path):
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    repeated = torch.arange(3, 15).repeat(40, 1)  # which a memory learns at once
    transect.memorize(model, repeated, blocks=1, neighbours=4, epochs=20, batch=64, lr=1e-2, out=tmp_path / "m")
    outcome = Anatomy(model).record.history[-1]
    assert outcome["loss_after"] < 0.2 * outcome["loss_before"] and outcome["share"] > 0.9
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad == asked[name] for name, p in model.named_parameters() if name in asked)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(again(repeated[:2]).logits, model.eval()(repeated[:2]).logits)


def test_bad_input():
    for name, said in (("opt", "no MLP in one module"), ("bert", "needs a model that predicts")):
        with pytest.raises(TransectError, match=said):
            states_of(Anatomy(tiny(name)), [])
    with pytest.raises(TransectError, match="imitation"):
        transect.memorize(tiny("llama"), TOKENS, imitation=2)
    with pytest.raises(TransectError, match="has no memory"):
        memory_of(tiny("llama"))
