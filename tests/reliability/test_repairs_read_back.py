"""What a repair goes on from is its own state, and whole; from anything else it does not."""

import logging
import os
import shutil

import pytest
import torch

import transect

from ..models import tiny
from .runs import DAMAGE, DATA, noted, recover

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def unfinished(tmp_path):
    """A repair that was interrupted after its first step."""

    def stop(check):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(checkpoint=tmp_path / "state", on_check=stop)
    return tmp_path / "state"


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_not_gone_on_from(unfinished, damage, caplog):
    damage(unfinished / "state.safetensors")
    checks = []
    with caplog.at_level(logging.INFO, "transect"):
        found = recover(checkpoint=unfinished, on_check=checks.append)
    assert noted(caplog, unfinished / "state.safetensors") and [check.step for check in checks] == [1, 2]
    assert equal(tensors(found), tensors(recover())) and not unfinished.exists()


def test_a_state_is_of_the_whole_repair(unfinished, tmp_path, caplog):
    """One of other settings, data or model is not gone on from, and the same one is."""
    steps = []
    options = {"on_check": lambda check: steps.append(check.step)}
    for number, changed in enumerate(({"lr": 2e-2}, {"seed": 1}, {"accumulate": 2}, {})):
        shutil.copytree(unfinished, tmp_path / str(number))
        recover(checkpoint=tmp_path / str(number), **options, **changed)
    turns = tiny("llama")
    turns.config.rope_parameters = {**turns.config.rope_parameters, "rope_theta": 77.0}  # the weights are the same
    shutil.copytree(unfinished, tmp_path / "turned")
    transect.recover(turns, DATA, "full", steps=2, every=1, batch_size=4, lr=1e-2, epochs=2, device="cpu",
                     checkpoint=tmp_path / "turned", **options)  # fmt: skip
    assert steps == [1, 2] * 3 + [2] + [1, 2]


def test_what_others_put_beside_a_state_stays(unfinished):
    (unfinished / "notes.txt").write_text("mine")
    recover(checkpoint=unfinished)
    assert os.listdir(unfinished) == ["notes.txt"] and (unfinished / "notes.txt").read_text() == "mine"
