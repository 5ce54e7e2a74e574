"""Peri-LN in a trained model that norms in front alone: output norms with gains from data. Ours; not exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ....anatomy import Anatomy
from ....errors import TransectError
from ....forward import Batch, at_rest, real_positions, run_body, to_device, watch
from ...insert import insert, sizes_of

_UNITS = ("attention", "mlp")


@torch.no_grad()
def add_output_norms(model: Any, batches: Iterable[Batch]) -> Any:
    """Put Peri-LN around every block of a trained model, in place, with the gains that change the least; the model.

    Of what a sublayer adds, a (d), the RMSNorm behind it keeps the direction â = a / rms(a), and its gain stands for
    the scale that each token had: g_j = E[a_j â_j] / E[â_j²], the least squares fit over the batches. What is lost is
    that the scale differs from token to token, so train the model afterwards. There is no way back.
    Raises TransectError where Peri-LN does not fit (see `insert`), and where no batch has a position.
    """
    anatomy = Anatomy(model)
    eps = sizes_of(anatomy).eps
    sums: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    with at_rest(anatomy.model):
        for batch in batches:
            on_device = to_device(batch, anatomy.model.device)
            real = real_positions(on_device)
            with watch(anatomy, _UNITS) as seen:
                run_body(anatomy.model, on_device)
            for unit in _UNITS:
                for layer, added in getattr(seen, unit).items():
                    a = (added.flatten(0, -2) if real is None else added[real]).double()
                    unit_length = a / (a.square().mean(-1, keepdim=True) + eps).sqrt()
                    both, own = sums.get((unit, layer), (0.0, 0.0))
                    sums[unit, layer] = both + (a * unit_length).sum(0), own + unit_length.square().sum(0)
    if not sums:
        raise TransectError("gains are fitted to text or images: give at least one batch of them")
    insert(model, "norm", "peri-ln")
    for (unit, layer), (both, own) in sums.items():
        weight: Any = anatomy.blocks[layer].norms[f"{unit}_output"].weight
        weight.copy_(both / own.clamp_min(1e-12))
    return model
