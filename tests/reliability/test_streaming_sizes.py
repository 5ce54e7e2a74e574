"""What a streamed compression stores is what it reports, and within the budget, in whatever dtypes the model lies."""

import pytest
import torch

import transect

from ..models import tiny
from ..test_every_method import BLOCKWISE, DATA, KEEP, QUICK, assert_the_disk_holds

# Every method where the norms are in float32 (test_every_method.py: where all is); one for each form of storage where
# all is in bfloat16.
CASES = [*((name, "mixed") for name in BLOCKWISE), *((name, "bfloat16") for name in ("svd", "gptq", "monarch", "amp"))]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_the_bytes_on_the_disk_are_within_the_budget(method, kind, tmp_path):
    model = tiny("llama").to(torch.bfloat16)
    if kind == "mixed":
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "norm" in name else parameter.data
    model.save_pretrained(tmp_path / "dense")
    out = tmp_path / "small"
    outcome = transect.compress(tmp_path / "dense", method, KEEP, DATA, stream_to=out, **QUICK.get(method, {}))
    assert_the_disk_holds(out, outcome, number_bytes=2)
