"""The bundled model: a small Llama trained on an invented world whose truth is known.

`World` is the ground truth, `corpus` text about it, `examples` and `evaluate` what the model can do, `load` the model.
`python -m transect.organism.train --out FOLDER` trains it anew.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from transect.organism.corpus import corpus
from transect.organism.documents import Example
from transect.organism.tasks import SKILLS, evaluate, examples
from transect.organism.world import Fact, Passage, Relation, World
from transect.pretrained import pretrained

__all__ = [
    "MODEL_PATH",
    "SKILLS",
    "Example",
    "Fact",
    "Passage",
    "Relation",
    "World",
    "corpus",
    "evaluate",
    "examples",
    "load",
]

MODEL_PATH: Path = Path(__file__).parent / "model"


def load(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The bundled model in evaluation mode, on the CPU, and its tokenizer. It is stored in bfloat16."""
    model = pretrained(AutoModelForCausalLM, MODEL_PATH, dtype=dtype)
    return model, pretrained(AutoTokenizer, MODEL_PATH)
