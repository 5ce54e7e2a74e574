"""One view of any transformer: blocks, attention and MLP units, and every weight matrix as d_out x d_in."""

from .architecture import (
    Architecture,
    ExpertPaths,
    FusedMatrix,
    architecture_of,
    known_model_types,
    read_architecture,
    register_architecture,
    verify_with,
)
from .attention import Attention
from .body import model_in, refuse_encoder_decoder
from .matrix import Matrix
from .mixture import Expert, ExpertMatrix, Experts, experts_apart
from .mlp import MLP
from .record import StructureRecord, record_of
from .storage import Stacked
from .surgery import SkipAttention, set_attribute
from .view import Anatomy, Block

__all__ = [
    "MLP", "Anatomy", "Architecture", "Attention", "Block", "Expert", "ExpertMatrix", "ExpertPaths", "Experts",
    "FusedMatrix", "Matrix", "SkipAttention", "Stacked", "StructureRecord", "architecture_of", "experts_apart",
    "known_model_types", "model_in", "read_architecture", "record_of", "refuse_encoder_decoder",
    "register_architecture", "set_attribute", "verify_with",
]  # fmt: skip
