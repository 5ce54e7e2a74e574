"""Subsampled attention: what is kept, the weights of what is kept, what is never seen, ensembles."""

import pytest
import torch

from transect.errors import TransectError
from transect.parts import Around, build_model
from transect.parts.catalog.softmax import Softmax
from transect.parts.catalog.ssa import SSA, ensemble, of_kept, shuffled_windows, some_positions, thinned

N, SIZES = 12, dict(width=16, heads=4, key_value_heads=2, head_size=4)
TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(causal=True, **settings):
    torch.manual_seed(0)
    return SSA(**SIZES, causal=causal, **settings).double().train()


def tiny(**settings):
    sizes = dict(hidden=16, blocks=2, heads=2, neurons=24, vocabulary=64, length=32)
    return build_model("llama", **sizes, parts={"mixer": "ssa"}, settings={"ssa": settings})


@pytest.mark.parametrize("causal", [True, False])
def test_all_keys_are_softmax_attention_with_its_gradients(causal):
    ours, dense, x = made(causal, rate=0.5), Softmax(**SIZES, causal=causal).double(), drawn(2, N, 16)
    ours.load_state_dict(dense.state_dict())
    torch.testing.assert_close(ours.eval()(x, Around()), dense(x, Around()))
    everything = torch.arange(N).expand(2, 1, N)  # through the code for some of them
    q, k, v = drawn(3, 2, 4, N, 4).unbind()
    q.requires_grad_()
    some = of_kept(q, k, v, everything, torch.ones(2, N, dtype=torch.bool), causal)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(some, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), q) for y in (some, plain)))
    with thinned(ours.train(), 1):
        torch.testing.assert_close(ours(x, Around()), dense(x, Around()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kept", [[[1, 4, 5, 9]], [[0, 5], [3, 7], [1, 11]]])  # for all queries, or by window
def test_weights_are_the_dense_ones_over_what_is_kept(kept, causal):
    q, k = drawn(2, 1, 2, N, 4).unbind()
    v = torch.eye(N, dtype=torch.float64).expand(1, 2, -1, -1)
    real = torch.ones(1, N, dtype=torch.bool)
    real[0, 4] = False
    found = of_kept(q, k, v, torch.tensor([kept]), real, causal)
    dense = (q @ k.mT / 2).softmax(-1)
    for i in range(N):
        seen = [j for j in kept[i * len(kept) // N] if real[0, j] and (j < i or not causal)] + [i] * causal
        share = torch.zeros(2, N, dtype=torch.float64)
        share[:, seen] = dense[0, :, i, seen]
        torch.testing.assert_close(found[0, :, i], share / share.sum(-1, keepdim=True))


@pytest.mark.parametrize("sampling", ["unbiased", "local"])
def test_no_sample_shows_what_is_later_or_padding(sampling):
    mixer, x = made(rate=0.3, sampling=sampling, neighbours=1), drawn(2, N, 16)
    real = torch.ones(2, N, dtype=torch.bool)
    real[0, :6] = False
    other, hidden = x.clone(), x.clone()
    other[:, 7:] += 1
    hidden[0, :6] = 9
    for seed in range(5):
        outputs = []
        for given in (x, other, hidden):
            torch.manual_seed(seed)
            outputs.append(mixer(given, Around(real)))
        assert all(bool(y.isfinite().all()) for y in outputs)
        torch.testing.assert_close(outputs[1][:, :7], outputs[0][:, :7])
        torch.testing.assert_close(outputs[2][0, 6:], outputs[0][0, 6:])


def test_a_sample_has_its_size_and_the_first_position():
    real = torch.ones(3, N, dtype=torch.bool)
    real[0, :5] = False
    kept = some_positions(real, 4, 1, torch.Generator().manual_seed(0))
    assert kept.shape == (3, 4) and bool((kept.diff(dim=1) > 0).all())
    assert kept[0].min() == 5 and kept[1].min() == kept[2].min() == 0
    assert not torch.equal(kept[1], kept[2])


def test_local_samples_are_shuffled_windows():
    many = torch.ones(4000, N, dtype=torch.bool)
    draw = torch.Generator().manual_seed(0)
    still = shuffled_windows(many[:1], 4, 0.0, 0, draw)
    assert still.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]
    assert shuffled_windows(many[:1], 5, 0.0, 1, draw)[0, 2].tolist() == [5, 6, 7, 8, 9, 10, 11, *[-1] * 8]
    near = shuffled_windows(many, 4, 3.0, 0, draw)
    assert torch.equal(near.flatten(1).sort(dim=1).values, torch.arange(N).expand(4000, -1))  # each in one window
    share = (near[:, 0, :, None] == torch.arange(N)).any(1).double().mean(0)  # of draws in which the first window has j
    assert bool((share[1:].diff() < 0).all())
    far = shuffled_windows(many, 4, 1e4, 0, draw)
    share = (far[:, 0, :, None] == torch.arange(N)).any(1).double().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 1 / 3), atol=0.03, rtol=0)  # 4 standard errors


def test_draws_differ_by_pass_and_layer_and_are_repeated_by_seed():
    model = tiny(rate=0.25)
    seen, made_by = [], some_positions
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("transect.parts.catalog.ssa.some_positions", lambda *a: seen.append(made_by(*a)) or seen[-1])
        dense = model(TOKENS).logits
        assert not seen and torch.equal(model(TOKENS).logits, dense)
        model.train()(TOKENS), model(TOKENS)
        assert len(seen) == 4 and all(not torch.equal(seen[0], one) for one in seen[1:])
    model.eval()
    log_p = [ensemble(model, {"input_ids": TOKENS}, 0.25, passes, seed=3) for passes in (1, 1, 3)]
    assert torch.equal(log_p[0], log_p[1])
    with thinned(model, 0.25, seed=3), torch.no_grad():
        members = [model(TOKENS).logits.log_softmax(-1) for _ in range(3)]
    torch.testing.assert_close(log_p[0], members[0])
    torch.testing.assert_close(log_p[2].exp(), torch.stack(members).exp().mean(0))
    losses = [-one[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean() for one in (log_p[2], *members)]
    assert losses[0] <= sum(losses[1:]) / 3
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, dense)  # as it was


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(TransectError, match=r"share of 0.05 of 12 positions is none"):
        made(rate=0.05)(drawn(1, N, 16), Around())
    with pytest.raises(TransectError, match="rate=0"):
        tiny(rate=0)
    with pytest.raises(TransectError, match="no mixer of this model is `ssa`"), thinned(torch.nn.Linear(2, 2), 0.5):
        pass
    with pytest.raises(TransectError, match="at most 1, not 2"), thinned(tiny(), 2):
        pass
