"""Chunked recurrences against a plain loop over positions."""

import pytest
import torch

from transect.parts.recurrence import decayed_recurrence


def looped(q, k, v, log_decay, state):
    outputs = []
    for t in range(q.shape[2]):
        state = log_decay[:, :, t].exp()[..., None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.stack(outputs, dim=2), state


@pytest.mark.parametrize("strength", [0.05, 3.0, 200.0])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("count", [1, 37, 70])
def test_it_is_the_loop(strength, channels, count):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, count, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    v = torch.randn(2, 3, count, 4, dtype=torch.float64, generator=draw)
    log_decay = -strength * torch.rand(2, 3, count, channels, dtype=torch.float64, generator=draw)
    state = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=draw)
    expected, last = looped(q, k, v, log_decay.expand(2, 3, count, 5), state)
    y, after = decayed_recurrence(q, k, v, log_decay, state, chunk=32)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, last)
    half, _ = decayed_recurrence(*(tensor.float() for tensor in (q, k, v, log_decay, state)), chunk=32)
    torch.testing.assert_close(half, expected.float(), atol=2e-4, rtol=1e-4)


def test_gradients_are_finite_where_everything_is_forgotten():
    q, k, v = (torch.randn(1, 1, 40, 4, requires_grad=True) for _ in range(3))
    log_decay = torch.full((1, 1, 40, 4), -1e4, requires_grad=True)
    y, _ = decayed_recurrence(q, k, v, log_decay)
    y.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v, log_decay))
    torch.testing.assert_close(y, (q * k).sum(-1, keepdim=True) * v)  # only the position itself is left
