"""EcoFormer (Liu et al., NeurIPS 2022, arXiv:2209.09004): attention between binary codes, learned from trained text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ...anatomy import Anatomy, Block
from ...anatomy.storage import dense
from ...data import Batches
from ...errors import TransectError
from ...forward import at_rest, run_body, to_device
from ...parameters import block_numbers
from ...parts import Around, insert
from ...parts.catalog.ecoformer import EcoFormer
from ...parts.projection import Projection
from ..attention import Trained, check_is_softmax, put_projection, trained_projections
from ..registry import Calibration, Range, conversion
from ..stage import Stage


def _check(anatomy: Anatomy, layers: str, **_: Any) -> None:
    check_is_softmax(anatomy, block_numbers(layers, anatomy.blocks))


def _parts(anatomy: Anatomy) -> list[EcoFormer]:
    found = (block.part("attention") for block in anatomy.blocks)
    return [part for part in found if isinstance(part, EcoFormer)]


def _set_soft(soft: bool) -> Callable[[Anatomy], None]:
    """Let all of these parts be softmax attention of their shared projection, or read codes."""

    def setting(anatomy: Anatomy) -> None:
        for part in _parts(anatomy):
            part.soft = soft

    return setting


def _stages(similar: int, hash_steps: int, hash_rate: float, **_: Any) -> Sequence[Stage]:
    def learn(anatomy: Anatomy, data: Batches) -> None:
        learn_hashes(anatomy, data, similar, hash_steps, hash_rate)

    return (
        Stage("shared", train="full", lr=5e-5, share=10 / 13, begin=_set_soft(True), end=_set_soft(False)),
        Stage("codes", train="full", lr=5e-5, share=3 / 13, learn=learn),
    )


@conversion(
    "ecoformer",
    paper="arXiv:2209.09004",
    group="linear attention",
    exact="never; values and output stay, and the shared projection is the nearest to trained queries and keys",
    check=_check,
    stages=_stages,
)
@torch.no_grad()
def ecoformer(
    anatomy: Anatomy,
    calibration: Calibration,
    *,
    bits: Annotated[int, Range(1, 4096)] = 16,
    anchors: Annotated[int, Range(1, 4096)] = 25,
    offset: Annotated[float, Range(1, 1e6)] = 1.0,
    similar: Annotated[int, Range(1, 4096)] = 10,
    hash_steps: Annotated[int, Range(0, 2**20)] = 100,
    hash_rate: Annotated[float, Range(0, above=True)] = 5e-4,
    layers: str = "",
) -> None:
    """Queries and keys become one projection, whose short binary codes say how much is read: linear in the length.

    The merge of queries and keys loses (a product of one projection with itself is symmetric and never negative), and
    so do codes. Two stages mend it: first softmax attention with the shared projection, then, with hashes learned anew
    from the first batch, attention between codes (100 and 30 epochs in the paper: the steps are shared out so). The
    merge is ours; the paper trains its source with shared queries and keys from public weights. It leaves the last
    of its four stages of layers as it is; here `layers` says which blocks are converted.

    bits: of a code.
    anchors: tokens that each token is compared with.
    offset: by how much the constant is above the bits; the larger, the nearer to the mean of all values.
    similar: how many tokens count as similar to each, and as unlike it, where codes are learned; of long sequences,
        among 512 tokens that are drawn.
    hash_steps: of the descent for each bit.
    hash_rate: of that descent.
    layers: only these blocks, such as 0-5,7; default all.
    """
    numbers = block_numbers(layers, anatomy.blocks)
    _first_batch(calibration.batches, anchors, similar)
    trained = {number: trained_projections(anatomy.blocks[number]) for number in numbers}
    shared = {number: shared_projection(anatomy.blocks[number], found) for number, found in trained.items()}
    settings = {"bits": bits, "anchors": anchors, "offset": offset, "seed": calibration.seed}
    insert(anatomy.model, "mixer", "ecoformer", layers=numbers, settings=settings, seed=calibration.seed)
    for number in numbers:
        path = f"{anatomy.blocks[number].slot_path('attention')}.part"
        roles = {"q": dense(*shared[number]), "v": trained[number].repeated["v"], "o": trained[number].repeated["o"]}
        for role, module in roles.items():
            put_projection(anatomy, f"{path}.{EcoFormer.roles[role]}", module)
    learn_hashes(anatomy, calibration.batches, similar, hash_steps, hash_rate)


def shared_projection(block: Block, trained: Trained) -> tuple[Tensor, Tensor | None]:
    """W (heads * size x d) and b for which (W x)ᵀ R (W y) is nearest to what queries and keys give, before their norms.

    R turns by positions, so that each pair of channels is a complex number, merged by itself; channels that are not
    turned are merged together. The bias is one more column of the matrices, and a norm's gains are rows' factors.
    """
    q, k = (_rows(trained.repeated[role]) for role in "qk")
    biased = any(_bias(trained.repeated[role]) is not None for role in "qk")
    heads = len(q) // block.head_size
    q, k = (rows.double().view(heads, block.head_size, -1) for rows in (q, k))
    width = block.rotary_width
    half = width // 2
    pairs = [torch.complex(one[:, :half], one[:, half:width])[:, :, None] for one in (q, k)]
    turned = nearest(*pairs).squeeze(2)
    rest = nearest(q[:, width:], k[:, width:])
    merged = torch.cat([turned.real, turned.imag, rest], dim=1).flatten(0, 1).to(_linear(trained.shared["q"]).weight)
    return merged[:, :-1], merged[:, -1] if biased else None


def nearest(q: Tensor, k: Tensor) -> Tensor:
    """Z (... x u x d), real or complex, for which Zᴴ Z is nearest to qᴴ k (q, k: ... x u x d) in the Frobenius norm.

    That is the part of (qᴴ k + kᴴ q) / 2 with its u largest eigenvalues that are above 0.
    """
    count = q.shape[-2]
    if not count:
        return q
    basis, inner = torch.linalg.qr(torch.cat([q, k], dim=-2).mH)  # d x 2u, 2u x 2u
    a, b = inner.mH.split(count, dim=-2)  # of q and k in the basis
    values, vectors = torch.linalg.eigh((a.mH @ b + b.mH @ a) / 2)
    found = vectors[..., -count:] * values[..., None, -count:].clamp(min=0).sqrt()
    return (basis @ found).mH


def _bias(module: Any) -> Tensor | None:
    return module.shift if isinstance(module, Projection) and module.shift is not None else _linear(module).bias


def _linear(module: Any) -> Any:
    return module.linear if isinstance(module, Projection) else module


def _rows(module: Any) -> Tensor:
    """A projection's rows, with its gains in them and its bias behind them (heads * size x d + 1)."""
    weight, bias = _linear(module).weight, _bias(module)
    rows = torch.cat([weight, torch.zeros_like(weight[:, :1]) if bias is None else bias[:, None]], dim=1)
    if isinstance(module, Projection):
        if module.gain is not None:
            rows = torch.cat([rows[:, :-1] * module.gain[:, None], rows[:, -1:]], dim=1)
        rows = rows.unflatten(0, (module.heads, 1, -1)).expand(-1, module.repeats, -1, -1).flatten(0, 2)
    return rows


def _first_batch(data: Batches, anchors: int, similar: int) -> Any:
    """Whole sequences of one length, from which codes are learned; TransectError where they are too few or short."""
    texts = list(data.texts())
    length = max(map(len, texts), default=0)
    chosen = [text for text in texts if len(text) == length][:4]
    if length <= 2 * similar or len(chosen) * length < anchors:
        raise TransectError(
            f"ecoformer learns codes from sequences of more than {2 * similar} tokens, and from {anchors} tokens in "
            f"all; the data has {len(chosen)} of {length}: pass longer text, or lower similar and anchors"
        )
    return {"input_ids": torch.stack(chosen)}


@torch.no_grad()
def learn_hashes(anatomy: Anatomy, data: Batches, similar: int, steps: int, rate: float) -> None:
    """Let every part learn its codes from what it reads of the first sequences while all are softmax attention."""
    parts = _parts(anatomy)
    size = parts[0].anchors.shape[1]
    seen: list[tuple[Tensor, Around]] = []
    handles = [part.register_forward_pre_hook(lambda part, given: seen.append((given[0], given[1]))) for part in parts]
    _set_soft(True)(anatomy)
    try:
        with at_rest(anatomy.model):
            run_body(anatomy.model, to_device(_first_batch(data, size, similar), anatomy.model.device))
    finally:
        _set_soft(False)(anatomy)
        for handle in handles:
            handle.remove()
    for number, (part, (x, around)) in enumerate(zip(parts, seen, strict=True)):
        part.learn(x, Around(rotary=around.rotary), similar=similar, steps=steps, rate=rate, seed=number)
