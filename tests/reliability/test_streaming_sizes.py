"""What a streamed compression stores is what it reports, and within the budget, in whatever dtypes the model lies."""

import pytest
import torch
from safetensors import safe_open

import transect

from ..models import tiny
from ..test_every_method import BLOCKWISE, DATA, QUICK

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "mixed"])
@pytest.mark.parametrize("method", [name for name in BLOCKWISE if name != "expert-count"])
def test_the_bytes_on_the_disk_are_within_the_budget(method, kind, tmp_path):
    model = tiny("llama").to(torch.float32 if kind == "float32" else torch.bfloat16)
    if kind == "mixed":
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "norm" in name else parameter.data
    model.save_pretrained(tmp_path / "dense")
    out = tmp_path / "small"
    outcome = transect.compress(tmp_path / "dense", method, 0.7, DATA, stream_to=out, **QUICK.get(method, {}))
    stored = 0
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is not a dict
                if name.endswith(".weight_shape"):  # of compressed-tensors: two numbers a matrix, no part of it
                    continue
                tensor = file.get_tensor(name)
                stored += tensor.numel() * tensor.element_size() * any(matrix in name for matrix in MATRICES)
    dense = sum(matrix.weight.numel() for matrix in transect.Anatomy(model).matrices())
    assert outcome["dense_matrix_bytes"] == dense * (4 if kind == "float32" else 2)
    assert stored == outcome["matrix_bytes"] <= 0.7 * outcome["dense_matrix_bytes"] * (1 + 1e-9)
