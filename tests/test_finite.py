import pytest
import torch

from transect.anatomy.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_numbers_are_finite_however_large_their_sum(dtype):
    numbers = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(numbers) and all_finite(-numbers) and all_finite(numbers[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = torch.ones(7, 1000, dtype=dtype)
        spoiled[3, 77] = bad
        assert not all_finite(spoiled) and not all_finite(spoiled.T)
    opposite = torch.zeros(1000, dtype=dtype)
    opposite[10], opposite[500] = float("inf"), -float("inf")
    assert not all_finite(opposite)


def test_whole_numbers_are_finite():
    assert all_finite(torch.arange(5)) and all_finite(torch.tensor([True]))
