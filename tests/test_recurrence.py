"""Chunked recurrences against plain loops over positions."""

import pytest
import torch

from transect.parts import fused
from transect.parts.recurrence import decayed_recurrence, delta_recurrence, value_decayed_recurrence

from .models import assert_alike


def assert_is_in_every_length_of_chunks(recurrence, problem, expected):
    """Outputs and state step by step, in chunks, and all at once: to 1e-12 of the largest, and 1e-5 in float32."""
    for chunk in (1, 32, 256):
        for dtype in (torch.float64, torch.float32):
            results = recurrence(*(tensor.to(dtype) for tensor in problem), chunk=chunk)
            for found, looped in zip(results, expected, strict=True):
                assert found.dtype == dtype
                assert_alike(found, looped.to(dtype))


def looped(q, k, v, log_decay, state):
    outputs = []
    for t in range(q.shape[2]):
        state = log_decay[:, :, t].exp()[..., None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.stack(outputs, dim=2), state


@pytest.mark.parametrize("strength", [0.05, 3.0, 200.0])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("count", [1, 37, 130])
def test_it_is_the_loop_in_every_length_of_chunks(strength, channels, count):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, count, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    v = torch.randn(2, 3, count, 4, dtype=torch.float64, generator=draw)
    log_decay = -strength * torch.rand(2, 3, count, channels, dtype=torch.float64, generator=draw)
    state = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=draw)
    expected = looped(q, k, v, log_decay.expand(2, 3, count, 5), state)
    assert_is_in_every_length_of_chunks(decayed_recurrence, (q, k, v, log_decay, state), expected)


def test_gradients_are_finite_where_everything_is_forgotten():
    q, k, v = (torch.randn(1, 1, 40, 4, requires_grad=True) for _ in range(3))
    log_decay = torch.full((1, 1, 40, 4), -1e4, requires_grad=True)
    y, _ = decayed_recurrence(q, k, v, log_decay)
    y.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v, log_decay))
    torch.testing.assert_close(y, (q * k).sum(-1, keepdim=True) * v)  # only the position itself is left


@pytest.mark.parametrize("strength", [0.5, 1.4, 3.0])
def test_gradients_are_the_loop_s_in_float32_too(strength):
    """At 1.4 a chunk decays by e^-50 and more, whose square leaves float32."""
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 70, 4, dtype=torch.float64, generator=draw) for _ in range(3)]
    given.append(-strength * (0.6 + 0.4 * torch.rand(1, 2, 70, 4, dtype=torch.float64, generator=draw)))
    found = []
    for one in (looped, decayed_recurrence):
        dtype = torch.float64 if one is looped else torch.float32
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in given]
        more = (torch.zeros(1, 2, 4, 4, dtype=dtype),) if one is looped else ()
        one(*leaves, *more)[0].square().sum().backward()
        found.append([leaf.grad.double() for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_a_weak_decay_between_strong_ones_keeps_its_digits():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 4, dtype=torch.float64, generator=draw) for _ in range(3))
    log_decay = torch.full((1, 2, 64, 4), -0.01, dtype=torch.float64)
    log_decay[:, :, 5::20, 1:] = -1e6
    expected, last = looped(q, k, v, log_decay, q.new_zeros(1, 2, 4, 4))
    y, after = decayed_recurrence(*(tensor.float() for tensor in (q, k, v, log_decay)))
    assert_alike(y, expected.float())
    assert_alike(after, last.float())


def test_without_decay_it_is_with_decays_of_one_and_autocast_changes_nothing():
    q, k, v = (torch.randn(1, 2, 70, 4) for _ in range(3))
    expected, last = decayed_recurrence(q, k, v, q.new_zeros(1, 2, 70, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y, after = decayed_recurrence(q, k, v)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, last)


@pytest.mark.parametrize("recurrence", [decayed_recurrence, value_decayed_recurrence])
@pytest.mark.parametrize("strength", [0.05, 3.0, 200.0])
@pytest.mark.parametrize("count", [1, 37, 130])
def test_heads_of_queries_share_a_state_as_if_each_had_its_own(recurrence, strength, count):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, count, 5, dtype=torch.float64, generator=draw)
    k, v = (torch.randn(2, 2, count, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    log_decay = -strength * torch.rand(2, 2, count, 5, dtype=torch.float64, generator=draw)
    state = torch.randn(2, 2, 5, 5, dtype=torch.float64, generator=draw)
    given = k, v, log_decay, state
    expected, last = recurrence(q, *(one.repeat_interleave(3, dim=1) for one in given))
    y, after = recurrence(q, *given)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, last[:, ::3])


def delta_looped(q, k, v, beta, log_decay, state):
    outputs = []
    for t in range(q.shape[2]):
        state = log_decay[:, :, t, :, None].exp() * state
        u = beta[:, :, t] * (v[:, :, t] - (state * k[:, :, t, :, None]).sum(-2))
        state = state + k[:, :, t, :, None] * u[:, :, None, :]
        outputs.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.stack(outputs, dim=2), state


def delta_problem(count, strength):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, count, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    v = torch.randn(2, 3, count, 4, dtype=torch.float64, generator=draw)
    beta, decay = (torch.rand(2, 3, count, 1, dtype=torch.float64, generator=draw) for _ in range(2))
    state = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=draw)
    return q, torch.nn.functional.normalize(k, dim=-1), v, beta, -strength * decay, state


@pytest.mark.parametrize("strength", [0.0, 0.3, 200.0])
@pytest.mark.parametrize("count", [1, 37, 130])
def test_the_delta_rule_is_its_loop_in_every_length_of_chunks(strength, count):
    problem = delta_problem(count, strength)
    expected = delta_looped(*problem)
    assert_is_in_every_length_of_chunks(delta_recurrence, problem, expected)
    if not strength:
        q, k, v, beta, _, state = problem
        for found, looped in zip(delta_recurrence(q, k, v, beta, None, state), expected, strict=True):
            assert_alike(found, looped)


def test_the_delta_rule_has_finite_gradients_where_everything_is_forgotten():
    q, k, v = (torch.randn(1, 1, 40, 4, requires_grad=True) for _ in range(3))
    log_decay = torch.full((1, 1, 40, 1), -1e4, requires_grad=True)
    y, _ = delta_recurrence(q, k, v, torch.ones(1, 1, 40, 1), log_decay)
    y.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v, log_decay))
    torch.testing.assert_close(y, (q * k).sum(-1, keepdim=True) * v)


def value_looped(q, k, v, log_decay, state):
    outputs = []
    for t in range(q.shape[2]):
        state = state * log_decay[:, :, t, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.stack(outputs, dim=2), state


@pytest.mark.parametrize("strength", [0.05, 3.0, 200.0])
@pytest.mark.parametrize("count", [1, 37, 130])
def test_decay_of_the_values_is_its_loop_in_every_length_of_chunks(strength, count):
    q, k, v, _, _, state = delta_problem(count, 0.0)
    draw = torch.Generator().manual_seed(1)
    log_decay = -strength * torch.rand(v.shape, dtype=torch.float64, generator=draw)
    problem = q, k, v, log_decay, state
    assert_is_in_every_length_of_chunks(value_decayed_recurrence, problem, value_looped(*problem))


@pytest.mark.parametrize("strength", [0.5, 1.4, 3.0, 1e4])
def test_decay_of_the_values_has_the_loop_s_gradients_in_float32_too(strength):
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 70, 4, dtype=torch.float64, generator=draw) for _ in range(3)]
    given.append(-strength * (0.6 + 0.4 * torch.rand(1, 2, 70, 4, dtype=torch.float64, generator=draw)))
    found = []
    for one in (value_looped, value_decayed_recurrence):
        dtype = torch.float64 if one is value_looped else torch.float32
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in given]
        more = (torch.zeros(1, 2, 4, 4, dtype=dtype),) if one is value_looped else ()
        one(*leaves, *more)[0].square().sum().backward()
        found.append([leaf.grad.double() for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU with the package: the kernels that were started, and a function that sets what they do."""
    started, does = [], {}

    def load(family, name):
        def run(q, k, v, *, g, scale, initial_state, output_final_state):
            started.append(name)
            assert scale == 1.0 and output_final_state and all(one.is_contiguous() for one in (q, k, v))
            if g is None:
                g = q.new_zeros(*q.shape[:3], 1)
            given = (one.transpose(1, 2) for one in (q, k, v, g if g.dim() == 4 else g[..., None]))
            before = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state
            y, after = does["run"](*given, before)
            return y.transpose(1, 2).contiguous(), after

        return run

    monkeypatch.setattr("transect.parts.fused._can_run", lambda q: q.dtype == torch.float32)
    monkeypatch.setattr("transect.parts.fused._fla", load)
    fused._fused_passes.cache_clear()
    yield started, lambda run: does.update(run=run)
    fused._fused_passes.cache_clear()


@pytest.mark.parametrize("channels, name", [(0, "chunk_simple_gla"), (1, "chunk_simple_gla"), (5, "chunk_gla")])
def test_a_kernel_that_computes_the_same_is_used(gpu, channels, name, caplog):
    started, does = gpu
    does(lambda q, k, v, g, state: looped(q, k, v, g.expand(*g.shape[:3], q.shape[-1]), state))
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 70, 5, generator=draw) for _ in range(2))
    v, state = torch.randn(2, 3, 70, 4, generator=draw), torch.randn(2, 3, 5, 4, generator=draw)
    log_decay = -torch.rand(2, 3, 70, channels, generator=draw) if channels else None
    with torch.inference_mode():
        y, after = decayed_recurrence(q, k, v, log_decay, state)
    assert set(started) == {name} and not caplog.records
    tried = len(started)
    decay = q.new_zeros(q.shape) if log_decay is None else log_decay.expand(q.shape)
    expected, last = looped(q, k, v, decay, state)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, last)
    decayed_recurrence(q, k, v, log_decay)
    assert len(started) == tried + 1  # compared once for all heads of this size
    decayed_recurrence(q[:, :, :1], k[:, :, :1], v[:, :, :1], log_decay if log_decay is None else log_decay[:, :, :1])
    decayed_recurrence(q.double(), k.double(), v.double())
    assert len(started) == tried + 1  # nor for a step, or in float64


def test_a_kernel_is_given_shared_keys_as_often_as_there_are_queries(gpu):
    started, does = gpu
    does(lambda q, k, v, g, state: looped(q, k, v, g.expand(*g.shape[:3], q.shape[-1]), state))
    draw = torch.Generator().manual_seed(0)
    q, state = torch.randn(2, 6, 70, 5, generator=draw), torch.randn(2, 2, 5, 4, generator=draw)
    k, log_decay = torch.randn(2, 2, 70, 5, generator=draw), -torch.rand(2, 2, 70, 5, generator=draw)
    v = torch.randn(2, 2, 70, 4, generator=draw)
    y, after = decayed_recurrence(q, k, v, log_decay, state)
    assert started
    expected, last = decayed_recurrence(q.double(), k.double(), v.double(), log_decay.double(), state.double())
    torch.testing.assert_close(y, expected.float())
    torch.testing.assert_close(after, last.float())


def wrong(q, k, v, g, state):
    y, after = looped(q, k, v, g.expand(*g.shape[:3], q.shape[-1]), state)
    return y, after * (1 + 1e-3)


def failing(*given):
    raise AssertionError("does not support float32")


@pytest.mark.parametrize("run, said", [(wrong, "off by 2.0e-03"), (failing, "does not support float32")])
def test_a_kernel_that_does_not_is_not_used_and_that_is_said_once(gpu, run, said, caplog):
    started, does = gpu
    does(run)
    q, k, v = (torch.randn(1, 2, 70, 4) for _ in range(3))
    log_decay = -torch.rand(1, 2, 70, 4)
    y, after = decayed_recurrence(q, k, v, log_decay)
    expected, last = looped(q, k, v, log_decay, q.new_zeros(1, 2, 4, 4))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, last, rtol=1e-4, atol=1e-4)
    tried = len(started)
    decayed_recurrence(q, k, v, log_decay)
    assert len(started) == tried and len(caplog.records) == 1 and said in caplog.records[0].getMessage()
