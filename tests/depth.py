"""What the tests of depth-efficiency share."""

import torch

from tests.models import VOCABULARY, inputs, tiny
from transect.anatomy import Anatomy
from transect.data import Batches, Specimen


def specimen(name, length=32, sequences=4, dtype=torch.float64, seed=0):
    batch = inputs(name, batch=sequences, length=length)
    return Specimen(Anatomy(tiny(name, seed, dtype)), data=Batches([batch]))


def tokens(sequences=3, length=24, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (sequences, length), generator=generator)


def silence(model, layer, units=("attention", "mlp")):
    """Let sublayers of a layer add exactly nothing, by their weights."""
    block = Anatomy(model).blocks[layer]
    for role in [{"attention": "o", "mlp": "down"}[unit] for unit in units]:
        matrix = block.matrix(role)
        bias = None if matrix.bias is None else torch.zeros_like(matrix.bias)
        matrix.write(torch.zeros_like(matrix.weight), bias)


def small(**settings):
    return {"depth-efficiency": {"prompts": 2, "length": 20, "cuts": 1, "erased": 1, "steps": 4} | settings}
