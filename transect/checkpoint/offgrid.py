"""The same function with weights on no quantization grid, for a model that was unpacked from a few bits."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import TransectError

_LEAST, _MOST = 0.8, 1.25
_SEED = 0


@torch.no_grad()
def off_the_grid(model: Any) -> None:
    """Rescale, in place, what a Llama model's blocks hand on, by fixed factors in [0.8, 1.25], and undo it there.

    Weights that were unpacked from 4 bits in groups of 32 lie on a grid, and rounding them to 4 bits in such groups
    loses nothing, which says nothing about rounding. Three rescalings leave the function as it is, up to rounding:
    norm gains against the columns that read the norm's output, value rows against the columns of o, and up rows
    against the columns of down.

    Raises TransectError for another architecture.
    """
    if model.config.model_type != "llama":
        raise TransectError(f"only a Llama model is taken off its grid, and this is {model.config.model_type!r}")
    generator = torch.Generator().manual_seed(_SEED)

    def factors(count: int) -> torch.Tensor:
        return _LEAST + (_MOST - _LEAST) * torch.rand(count, generator=generator)

    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = factors(model.config.hidden_size)
            norm.weight /= scale
            for reader in readers:
                reader.weight *= scale
        value = factors(attention.v_proj.out_features)
        attention.v_proj.weight *= value[:, None]
        heads = value.view(model.config.num_key_value_heads, 1, -1).expand(-1, groups, -1)  # each is read by a group
        attention.o_proj.weight /= heads.reshape(-1)
        up = factors(mlp.up_proj.out_features)
        mlp.up_proj.weight *= up[:, None]
        mlp.down_proj.weight /= up
