"""Whether two models compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..errors import TransectError
from ..forward import at_rest, computing_wide

MOST = 1e-3  # of the largest output: what rounding can do


@torch.no_grad()
def changed_by(before: Anatomy, after: Anatomy) -> float:
    """The largest difference of two models' outputs on random input, as a share of the largest output.

    TransectError where it is more than rounding: then a permutation was no symmetry of this architecture.
    """
    one, other = (_outputs(anatomy.model) for anatomy in (before, after))
    change = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
    if not change <= MOST:
        raise TransectError(
            f"putting the units of a {before.config.model_type!r} model in another order changes what it computes (by "
            f"{change:.2g} of its largest output): models of this architecture can only be averaged as they are"
        )
    return change


def _outputs(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    given: Any
    if model.main_input_name == "pixel_values":
        side, channels = config.image_size, getattr(config, "num_channels", 3)
        given = torch.randn(2, channels, side, side, generator=generator).to(model.device, torch.float32)
    else:
        rows = model.get_input_embeddings().weight.shape[0]
        most = getattr(config.get_text_config(), "max_position_embeddings", None) or 16
        given = torch.randint(rows, (2, min(16, most)), generator=generator).to(model.device)
    with at_rest(model), computing_wide(model):
        output = model(**{model.main_input_name: given})
    found: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found.double()
