"""What dense matrices and the units that slicing removes store."""

from __future__ import annotations

from ..anatomy import MLP, Block, Matrix


def dense_bytes(matrix: Matrix) -> int:
    """Of W (d_out x d_in) in its module's dtype, if it is dense."""
    d_out, d_in = matrix.shape
    return d_out * d_in * matrix.module.weight.element_size()


def neuron_bytes(block: Block) -> int:
    """Of one neuron's rows of gate and up and its column of down; 0 for a block without an MLP, or with experts."""
    if not isinstance(block.mlp, MLP):
        return 0
    return sum(dense_bytes(m) for m in block.matrices() if m.role in ("gate", "up", "down")) // block.mlp.neurons
