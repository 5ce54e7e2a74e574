"""flash-linear-attention's kernels for the linear recurrence, on a GPU where they are installed and compute the same.

Its package is no dependency: `pip install flash-linear-attention` beside a CUDA build of torch. Before a kernel is used
for heads of a size, its outputs, states and gradients are compared with ours on random numbers (relative to the largest
of each, 1e-4); where they differ, or it fails, ours is used and a warning says so. In float32, Triton's products round
to TF32 unless the environment has TRITON_F32_DEFAULT=ieee, and would not pass. Its kernels of the delta rule take no
float32 at all, and none lets channels of the values decay: these recurrences are always ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from .precision import wide

_logger = logging.getLogger(__name__)
_FUSED_ERROR = 1e-4  # of the largest number
_FUSED_FROM = 64  # positions; fewer are a step of generation, where starting a kernel is what takes the time

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def fused(q: Tensor, v: Tensor, log_decay: Tensor | None, ours: Recurrence) -> Recurrence | None:
    """The kernel that computes what `ours` does for such q, v and decays (B x h x N x size each); None without one."""
    if not _can_run(q) or q.shape[2] < _FUSED_FROM:
        return None
    channels = 0 if log_decay is None else log_decay.shape[-1]
    if not _fused_passes(q.shape[-1], v.shape[-1], channels, q.device, ours):
        return None
    return fused_kernel


def fused_kernel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `recurrence.decayed_recurrence`. One decay of a head has a kernel of its own, which runs without any, too.

    The kernels want as many heads of keys as of queries, so that shared ones, and their state, are repeated for them.
    """
    shared = q.shape[1] // k.shape[1]
    of_channels = log_decay is not None and log_decay.shape[-1] > 1
    run = _fla("gla", "chunk_gla") if of_channels else _fla("simple_gla", "chunk_simple_gla")
    q, k, v = _by_positions(q), _by_positions(k, shared), _by_positions(v, shared)
    decays = None if log_decay is None else _by_positions(log_decay, shared)
    if decays is not None and not of_channels:
        decays = decays[..., 0]  # B x N x h
    state = None if state is None else wide(state).repeat_interleave(shared, dim=1)
    y, state = run(q, k, v, g=decays, scale=1.0, initial_state=state, output_final_state=True)
    return y.transpose(1, 2), state[:, ::shared]


def _by_positions(one: Tensor, times: int = 1) -> Tensor:
    """B x N x h x size, as the kernels have it, each head so many times."""
    return wide(one).transpose(1, 2).repeat_interleave(times, dim=2).contiguous()


def _can_run(q: Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float64 and find_spec("fla") is not None


def _fla(family: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(import_module(f"fla.ops.{family}"), name)


@cache
def _fused_passes(d_k: int, d_v: int, channels: int, device: torch.device, ours: Recurrence) -> bool:
    """Whether the kernel is as good as ours. channels: of the decays; 0 without, 1 for one of each head."""
    try:
        apart = max(
            _fused_apart(theirs, own)
            for strength in ((0.05, 3.0) if channels else (0.0,))
            for theirs, own in zip(
                *(_fused_results(one, d_k, d_v, channels, strength, device) for one in (fused_kernel, ours)),
                strict=True,
            )
        )
    except Exception as error:
        _logger.warning("flash-linear-attention is not used for heads of %d and %d: %s", d_k, d_v, error)
        return False
    if apart > _FUSED_ERROR:
        _logger.warning(
            "flash-linear-attention is not used for heads of %d and %d: it is off by %.1e of the largest number, "
            "above %.0e; TRITON_F32_DEFAULT=ieee in the environment keeps its products in float32",
            d_k, d_v, apart, _FUSED_ERROR,
        )  # fmt: skip
    return apart <= _FUSED_ERROR


def _fused_results(
    one: Recurrence, d_k: int, d_v: int, channels: int, strength: float, device: torch.device
) -> list[Tensor]:
    """Outputs, states and gradients on the same random numbers: 2 sequences of two and a half chunks, 2 heads."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(160, d_k), (160, d_k), (160, d_v), (d_k, d_v), *([(160, channels)] if channels else [])]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        q, k, v, state, *decay = (torch.randn(2, 2, *size, generator=draw).to(device) for size in sizes)
        given = [q, k, v, state, *(-strength * one.sigmoid() for one in decay)]
        for tensor in given:
            tensor.requires_grad_()
        y, after = one(q, k, v, given[4] if decay else None, state)
        gradients = torch.autograd.grad(y.square().mean() + after.square().mean(), given)
    return [y.detach(), after.detach(), *gradients]


def _fused_apart(one: Tensor, other: Tensor) -> float:
    apart = ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()
    return apart if apart == apart else float("inf")  # NaN is no agreement
