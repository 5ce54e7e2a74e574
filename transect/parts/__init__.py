"""Parts: published layers that stand in the slots of any transformer that the anatomy knows.

A slot is a place in a block: the token mixer (attention), the MLP, its activation, the norms, a matrix; or the block
as a whole, which a part then stands around. One file or folder a part in `catalog`; a file put there is registered,
nothing else has to know of it.
"""

from ..modules import import_all
from . import catalog
from .build import build_model
from .catalog.peri_ln import add_output_norms
from .insert import insert
from .part import Activation, Around, BlockPart, Inside, MatrixPart, Mixer, MLPPart, Norm, Part
from .registry import PartEntry, part_named, parts
from .rewrites import fold_norms, rms_norms

import_all(catalog.__name__, catalog.__path__)

__all__ = [
    "Activation", "Around", "BlockPart", "Inside", "MLPPart", "MatrixPart", "Mixer", "Norm", "Part", "PartEntry",
    "add_output_norms", "build_model", "fold_norms", "insert", "part_named", "parts", "rms_norms",
]  # fmt: skip
