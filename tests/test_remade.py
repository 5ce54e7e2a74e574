"""What operators make of their numbers and keep: of the numbers as they are now, in every mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from transect.operators.atoms import Atoms
from transect.operators.dictionary import SparseRows
from transect.operators.grouped_integer import GroupedInteger
from transect.operators.semi_structured import SemiStructured
from transect.operators.shared import Bank

Made = tuple[nn.Module, torch.Tensor]  # a module and the numbers of it that its output is proportional to


def atoms() -> Made:
    made = Atoms.from_numbers("g", Bank(torch.randn(3, 32, 64)), True, torch.randn(3))
    return made, made.coefficients


def rows() -> Made:
    made = SparseRows.from_entries(torch.randn(32, 4), torch.stack([torch.randperm(64)[:4] for _ in range(32)]), 64)
    return made, made.values


def integers() -> Made:
    made = GroupedInteger.from_codes(
        torch.randint(0, 16, (32, 64), dtype=torch.uint8), torch.rand(32, 1, dtype=torch.bfloat16), None, 4, 64
    )
    return made, made.scale


def two_four() -> Made:
    made = SemiStructured.from_dense(torch.randn(32, 64), (torch.arange(64) % 4 < 2).expand(32, -1))
    return made, made.values


@pytest.mark.parametrize("loading", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("make", [atoms, rows, integers, two_four])
def test_it_follows_a_write_in_place(make: Callable[[], Made], loading: Callable[[], torch.no_grad]):
    """Also where the model was loaded in inference mode, in which tensors do not count their changes."""
    torch.manual_seed(0)
    with loading():
        made, numbers = make()
        x = torch.randn(5, 64, dtype=numbers.dtype)
        before = made(x)
        numbers.mul_(2)
        after = made(x)
    assert before.any()
    torch.testing.assert_close(after, 2 * before)
    with torch.no_grad():
        torch.testing.assert_close(made(x), after)
