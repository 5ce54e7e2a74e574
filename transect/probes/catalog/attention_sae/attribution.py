"""Where a feature of a layer's attention output comes from: which heads write it, which source tokens it is read from.

z (D = H d_h) is the heads' outputs side by side, z_h = Σ_k A^h_qk v^h_k at query q. What the activation function of a
feature f reads is linear in z, so with A as it is it splits without a remainder (Kissane et al. 2024, Section 3):

    Σ_h Σ_k A^h_qk W_enc[f, h] v^h_k + b_enc[f] - W_enc[f] b_dec
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....dictionaries import Dictionary


def head_shares(dictionary: Dictionary, heads: int) -> Tensor:
    """Share of each head in each feature's direction (F x H), by the length of its part; a row sums to 1."""
    lengths = dictionary.decoder.unflatten(0, (heads, -1)).norm(dim=1).T
    return lengths / lengths.sum(1, keepdim=True).clamp_min(torch.finfo(lengths.dtype).tiny)


def constants(dictionary: Dictionary) -> Tensor:
    """The part that does not depend on z: b_enc - W_enc b_dec (F)."""
    return dictionary.encoder_bias - dictionary.encoder @ dictionary.decoder_bias


def by_head(dictionary: Dictionary, z: Tensor, features: Tensor, heads: int) -> Tensor:
    """W_enc[f, h] z_h (n x H) of vectors z (n x D) and a feature of each (n)."""
    return (dictionary.encoder[features] * z).unflatten(1, (heads, -1)).sum(2)


def by_source(dictionary: Dictionary, features: Tensor, patterns: Tensor, values: Tensor) -> Tensor:
    """A^h_qk W_enc[f, h] v^h_k (n x H x T).

    features: n. patterns: a query's attention (n x H x T). values: n x T x G x d_h; where there are fewer than heads,
    each serves H / G heads that are side by side.
    """
    heads = patterns.shape[1]
    rows = dictionary.encoder[features].unflatten(1, (values.shape[2], heads // values.shape[2], -1))
    return torch.einsum("ngsd,ntgd->ngst", rows, values.to(rows)).flatten(1, 2) * patterns.to(rows)
