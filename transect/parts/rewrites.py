"""Lossless rewrites of a trained model's norms: the same function in other numbers, exact but for rounding.

LN(x) = g ⊙ C x / sqrt(|C x|² / d + eps) + b with C = I - 11ᵀ / d: the gain and the bias go into the matrices that read
the norm, and C into whatever writes to the stream, where it leaves an RMSNorm.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Block, Matrix
from ..anatomy.storage import is_dense
from ..anatomy.surround import Surrounded
from ..errors import TransectError
from ..forward.description.twin import batch_for
from ..forward.lens import norm_centres, norm_gain
from .catalog.standard_norms import RMS

_READERS = {"attention_input": ("q", "k", "v"), "mlp_input": ("gate", "up")}
_ROUNDING = 1e-3  # how far rounding may move a result, as a share of the largest number


@torch.no_grad()
def fold_norms(model: Any) -> list[str]:
    """Give the gain g and bias b of each norm in front of matrices to these: W diag(g) and W b + their bias. In place.

    Returns the names of the norms that are now plain, such as "blocks.0.mlp_input". A norm stays as it is where
    something else reads it too (a router, or a part in a sublayer's place or around the block). The final norm goes
    into the unembedding where that is a matrix of its own; of tied embeddings it stays.
    Raises TransectError, before any change, where the norms stand behind the residual sum, where a norm has a bias and
    a matrix none that could take it, and for matrices that are not stored entry by entry.
    """
    anatomy = Anatomy(model)
    found = foldable(anatomy)
    for _, norm, readers in found:
        gain, bias = norm_gain(norm), _bias(norm)
        for matrix in readers:
            moved = None if bias is None or matrix.bias is None else matrix.bias + matrix.weight @ bias
            matrix.write(matrix.weight * gain, moved)
        _make_plain(norm)
    names = [name for name, _, _ in found]
    head: Any = anatomy.unembedding
    final = anatomy.final_norm
    own = isinstance(head, nn.Linear) and not anatomy.embeddings_tied and not anatomy.architecture.head_transform
    if own and final is not None and (_bias(final) is None or head.bias is not None):
        gain, bias = norm_gain(final), _bias(final)
        if bias is not None:
            head.bias.add_(head.weight @ bias)
        head.weight.mul_(gain)
        _make_plain(final)
        names.append("final_norm")
    return names


def foldable(anatomy: Anatomy) -> list[tuple[str, Any, list[Matrix]]]:
    """The norms of the blocks that `fold_norms` folds: name, norm, and the matrices that read it; or its error."""
    if not anatomy.blocks or anatomy.blocks[0].post_norm:
        raise TransectError(
            f"the norms of {type(anatomy.model).__name__} stand behind the residual sum: the stream itself is what "
            "they give, so that nothing of them can be folded"
        )
    found = []
    for block in anatomy.blocks:
        for name, norm in block.norms.items():
            names = [other for other, one in block.norms.items() if one is norm]  # one norm for both (GPT-J)
            readers = [_readers(block, other) for other in names]
            if all(readers) and name == names[0]:
                found.append((f"blocks.{block.index}.{name}", norm, [matrix for some in readers for matrix in some]))
    for name, norm, readers in found:
        for matrix in readers:
            if not is_dense(matrix.module):
                raise TransectError(
                    f"{matrix.name} is stored as {type(matrix.module).__name__}: fold before compressing"
                )
            if _bias(norm) is not None and matrix.bias is None:
                raise TransectError(f"{name} has a bias, and {matrix.name} none that could take it")
    return found


def _readers(block: Block, name: str) -> list[Matrix]:
    """The matrices that read a norm of the block under that name, if they are all that does; else none."""
    unit = name.removesuffix("_input")
    if name not in _READERS or getattr(block, unit) is None or (unit == "mlp" and block.has_experts):
        return []
    if isinstance(block.module, Surrounded) and not block.module.leading.places_norms:
        return []  # who knows what that reads
    return [matrix for matrix in block.matrices() if matrix.role in _READERS[name]]


def _bias(norm: Any) -> Tensor | None:
    bias = getattr(norm, "bias", None)
    return None if bias is None else bias.detach()


def _make_plain(norm: Any) -> None:
    """Gain 1 and bias 0, whichever number the norm keeps for a gain of 1."""
    if _bias(norm) is not None:
        norm.bias.zero_()
    if getattr(norm, "weight", None) is None:
        return
    for number in (1.0, 0.0):
        norm.weight.fill_(number)
        if (norm_gain(norm) - 1).abs().max() < _ROUNDING:
            return
    raise TransectError(f"a {type(norm).__name__} keeps its gain in a way that is not known")


@torch.no_grad()
def rms_norms(model: Any) -> list[str]:
    """Put an RMSNorm (the part norm.rms) in place of every LayerNorm of a model whose blocks norm first. In place.

    C goes into the embeddings and into every matrix that writes to the stream, whose channels then have mean 0. A head
    that shares the embedding's matrix gets its own, as it was. Returns the paths of the norms.
    Raises TransectError, before any change, for a model without LayerNorm, one whose norms stand behind the residual
    sum or write to the stream, and one whose matrices are not stored entry by entry; and, with the numbers as they
    were, where something writes to the stream that is not found.
    """
    anatomy = Anatomy(model)
    name = type(anatomy.model).__name__
    norms, matrices = check_rms_norms(anatomy)
    batch = {key: tensor.to(anatomy.model.device) for key, tensor in batch_for(anatomy.model).items()}
    before, expected = copy.deepcopy(anatomy.model.state_dict()), _outputs(anatomy.model, batch)
    head: Any = anatomy.unembedding
    tied = anatomy.embeddings_tied
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone())
    for matrix in matrices:
        bias = None if matrix.bias is None else matrix.bias - matrix.bias.mean()
        matrix.write(matrix.weight - matrix.weight.mean(0), bias)
    _centre_embeddings(anatomy)
    made = {path: _rms_of(norm, anatomy.config_value("hidden")) for path, norm in norms.items() if norm_centres(norm)}
    for path, new in made.items():
        anatomy.model.set_submodule(path, new)
    off = max(map(_apart, _outputs(anatomy.model, batch), expected))
    if not off < max(_ROUNDING, 8 * torch.finfo(anatomy.model.dtype).eps):
        for path in made:
            anatomy.model.set_submodule(path, norms[path])
        if tied:
            head.weight = anatomy.embedding.weight
        anatomy.model.load_state_dict(before)
        raise TransectError(
            f"something in {name} writes to the stream, or reads it, that is neither an embedding nor a block: with "
            f"RMSNorms its outputs would be off by {off:.2g} of the largest, so its LayerNorms stay"
        )
    for path, new in made.items():
        anatomy.record.set_module(path, new.describe())
    if tied:
        anatomy.model.config.tie_word_embeddings = anatomy.config.tie_word_embeddings = False
    return list(made)


def check_rms_norms(anatomy: Anatomy) -> tuple[dict[str, Any], list[Matrix]]:
    """The norms by their paths and the matrices that write to the stream; the error of `rms_norms` where it has one.

    Whether something else writes to the stream shows when it is tried.
    """
    name = type(anatomy.model).__name__
    norms = {
        path: module
        for path, module in anatomy.model.named_modules()
        if any(module is norm for block in anatomy.blocks for norm in block.norms.values())
        or (anatomy.final_norm is not None and module is anatomy.final_norm)
    }
    if not any(norm_centres(norm) for norm in norms.values()):
        raise TransectError(f"{name} has no LayerNorm that an RMSNorm could stand for")
    for block in anatomy.blocks:
        if block.post_norm or any(key.endswith("_output") for key in block.norms):
            raise TransectError(f"norms of {name} write to the stream: it cannot be centred by its matrices")
        for unit, role in (("attention", "o"), ("mlp", "down")):
            if block.part(unit) is not None and role not in block.part(unit).roles:
                raise TransectError(f"the part in the {unit} of block {block.index} has no matrix that writes alone")
    matrices = anatomy.matrices(("o", "down"))
    for matrix in matrices:
        if not is_dense(matrix.module):
            raise TransectError(
                f"{matrix.name} is stored as {type(matrix.module).__name__}: rewrite before compressing"
            )
    return norms, matrices


def _outputs(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Every tensor that the model gives."""
    mode = model.training
    found = [one for one in model.eval()(**batch, return_dict=True).to_tuple() if isinstance(one, Tensor)]
    model.train(mode)
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def _rms_of(norm: Any, width: int) -> RMS:
    """The RMSNorm that does what a LayerNorm does to what has mean 0."""
    gain, bias = norm_gain(norm), _bias(norm)
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-5)
    made = RMS(width, eps, bias=bias is not None).to(gain).train(norm.training)
    made.weight.copy_(gain.expand(width))
    if made.bias is not None and bias is not None:
        made.bias.copy_(bias)
    return made


def _centre_embeddings(anatomy: Anatomy) -> None:
    """Take the mean over channels off whatever outside the blocks could write to the stream.

    Embeddings and parameters whose last dimension is the stream's, and maps (linear, convolution) that give it.
    """
    width, body = anatomy.config_value("hidden"), anatomy.body
    inside = {id(module) for part in (anatomy.block_list, anatomy.final_norm) if part for module in part.modules()}
    for module in body.modules():
        if id(module) in inside:
            continue
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            if len(module.weight) == width:
                module.weight.sub_(module.weight.mean(0))
                if module.bias is not None:
                    module.bias.sub_(module.bias.mean())
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1 and parameter.shape[-1] == width:
                parameter -= parameter.mean(-1, keepdim=True)
