"""Attention whose projections are mixtures of shared atoms, to train (MASA: Zhussip et al., AAAI 2026,
arXiv:2508.04581).

    share_attention(model, atoms=4)      # before training: new random numbers in place of q, k and v
    ...                                  # train; the loss is the model's own
    store_coefficients(model)            # after training: the networks are dropped, their outputs stored

Between the two calls the model can be saved and loaded as well, to go on training.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from ..anatomy import Anatomy, Matrix
from ..anatomy.storage import parameter_of
from ..errors import TransectError
from ..operators.atoms import Atoms, CoefficientBank, EmbeddedAtoms
from ..operators.shared import Bank


def share_attention(
    model: Any,
    atoms: int,
    projections: Literal["qkv", "qkvo"] = "qkv",
    *,
    embedding: int = 64,
    hidden: int = 128,
    seed: int = 0,
) -> Any:
    """Replace attention matrices by trainable mixtures of atoms that all layers share, in place; returns the model.

    What the matrices held is lost (the biases stay): this is for training from scratch. For a trained model there is
    the method `masa`. Each projection has its own S atoms, so that a share 1 - S/L of its parameters is saved.

    atoms: S, at most the number of blocks L. projections: which matrices; o is the most sensitive one.
    embedding, hidden: widths of the network that maps a layer's embedding to its coefficients. seed: of the numbers.

    What the paper leaves open, and we chose: widths 64 and 128; GELU; a network and the layers' embeddings for each
    projection. Embeddings start as standard normal numbers. The network's last layer is scaled so that the
    coefficients' squares sum to 1 in the mean over the layers, since small ones would starve the atoms of gradients.
    Then the atoms' standard deviation, the config's `initializer_range` or 0.02, is also that of the mixed matrices.

    Raises TransectError, before any change, where layers have different shapes or a matrix is shared already.
    """
    anatomy = Anatomy(model)
    if projections not in ("qkv", "qkvo"):
        raise TransectError(f"projections={projections!r} must be 'qkv' or 'qkvo'")
    families = [anatomy.matrices(role) for role in projections]
    for family in families:
        _check(family, atoms, len(anatomy.blocks))
    spread = getattr(anatomy.config, "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(seed)
    for family in families:
        _share(family, atoms, embedding, hidden, spread, generator)
    return model


def _check(family: list[Matrix], atoms: int, blocks: int) -> None:
    if len(family) < blocks:
        raise TransectError("some blocks have no attention; its matrices cannot be shared by all layers")
    shapes = {matrix.name: matrix.shape for matrix in family}
    if len(set(shapes.values())) > 1:
        raise TransectError(f"layers that share atoms need matrices of one shape, but these differ: {shapes}")
    if not 1 <= atoms <= len(family):
        raise TransectError(f"atoms={atoms} must be from 1 to the number of blocks, {len(family)}")
    for matrix in family:
        if hasattr(matrix.module, "bank_group"):
            raise TransectError(f"{matrix.name} shares numbers with other layers already")


@torch.no_grad()
def _share(
    family: list[Matrix], atoms: int, embedding: int, hidden: int, spread: float, generator: torch.Generator
) -> None:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    d_out, d_in = family[0].shape
    like = family[0].module.weight
    bank: Any = CoefficientBank(spread * normal(atoms, d_out, d_in), embedding, hidden)
    linears = [layer for layer in bank.network if isinstance(layer, nn.Linear)]
    for layer in linears:
        layer.weight.copy_(normal(*layer.weight.shape) * layer.in_features**-0.5)
        layer.bias.zero_()
    embeddings = normal(len(family), embedding)
    linears[-1].weight.div_(bank.network(embeddings).square().sum(1).mean().sqrt())
    bank.to(like)
    group = f"{family[0].role}.0"
    for number, (matrix, start) in enumerate(zip(family, embeddings, strict=True)):
        bias = matrix.bias
        with torch.device("meta"):
            operator = EmbeddedAtoms(d_in, d_out, atoms, embedding, hidden, False, group, bank, number == 0)
        operator.weight = like.new_empty(0)
        operator.embedding = parameter_of(start.to(like))
        operator.set_bias(bias)
        matrix.replace(operator)


def store_coefficients(model: Any) -> Any:
    """Put numbers in the place of the networks that gave the coefficients, in place; returns the model.

    The model computes the same. Its matrices are then `Atoms` with S d_out d_in + L S numbers a projection. Optimizers
    have to be made anew. Nothing happens to a model without such networks.
    """
    anatomy = Anatomy(model)
    banks: dict[int, Bank] = {}
    for matrix in anatomy.matrices():
        trained = matrix.module
        if not isinstance(trained, EmbeddedAtoms):
            continue
        key, owner = id(trained.bank), id(trained.bank) not in banks
        bank = banks.setdefault(key, Bank(trained.bank.weight))
        stored = Atoms.from_numbers(trained.bank_group, bank, owner, trained.coefficients.detach(), bias=matrix.bias)
        matrix.replace(stored)
    return model
