"""One view of any transformer: blocks, attention and MLP units, and every weight matrix as d_out x d_in."""

from .architecture import (
    Architecture,
    FusedMatrix,
    architecture_of,
    known_model_types,
    read_architecture,
    register_architecture,
    verify_with,
)
from .matrix import Matrix
from .record import StructureRecord, record_of
from .storage import Stacked
from .surgery import SkipAttention, set_attribute
from .view import MLP, Anatomy, Attention, Block

__all__ = [
    "MLP", "Anatomy", "Architecture", "Attention", "Block", "FusedMatrix", "Matrix", "SkipAttention", "Stacked",
    "StructureRecord", "architecture_of", "known_model_types", "read_architecture", "record_of",
    "register_architecture", "set_attribute", "verify_with",
]  # fmt: skip
