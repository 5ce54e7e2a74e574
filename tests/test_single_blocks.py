"""Running a model's blocks one by one."""

from __future__ import annotations

import pytest
import torch

from tests.models import CAUSAL, inputs, tiny
from transect import Anatomy
from transect.forward import changed, watch
from transect.forward.blocks import feeds_of, run_blocks


@pytest.mark.parametrize("name", CAUSAL)
def test_the_last_blocks_alone_leave_what_they_leave_in_the_model(name):
    """Also several copies of one sequence, and with what is changed in them."""
    anatomy = Anatomy(tiny(name))
    ids, last = inputs(name, batch=1)["input_ids"], len(anatomy.block_list)
    (feed,) = feeds_of(anatomy, [{"input_ids": ids}])
    with torch.no_grad():
        with watch(anatomy, ["residual"]) as seen:
            anatomy.model(input_ids=ids, use_cache=False)
        assert torch.equal(feed.hidden, seen.residual[0])
        for layer in range(last + 1):
            state = seen.residual[layer]
            assert torch.equal(run_blocks(anatomy, feed, layer, state), seen.residual[last])
            copies = run_blocks(anatomy, feed, layer, state.expand(3, -1, -1))
            torch.testing.assert_close(copies, seen.residual[last].expand(3, -1, -1), rtol=1e-5, atol=1e-6)
        with changed(anatomy, {("mlp", 1): torch.zeros_like}), watch(anatomy, ["residual"], [last]) as whole:
            anatomy.model(input_ids=ids, use_cache=False)
            assert torch.equal(run_blocks(anatomy, feed, 1, seen.residual[1]), whole.residual[last])
