"""Folders of reward models, damaged anywhere or made up: one BadCheckpoint, or what they say; nothing in them runs."""

import contextlib
import json
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from transect.errors import BadCheckpoint, TransectError
from transect.preference import RewardModel
from transect.preference.reward_model import CARD, OF
from transect.preference.scorer import Router, Scorer
from transect.store import keep_json

from ..models import tiny
from ..test_checkpoint import tokenizer
from .damage import JUNK, copied, damage, memory

PLACES = [".", "category-0", "category-0/aspect-0", "category-0/backbone", "category-1", "router", "router/backbone"]


@pytest.fixture(scope="module")
def good_reward(tmp_path_factory):
    """Not trained, and not to be changed."""
    torch.manual_seed(0)
    first = Scorer(tiny("llama")).eval()
    first.add_aspects(("x", "y"), ("q", "v"), {"rank": 2, "alpha": 4.0, "dropout": 0.0})
    first.add_aggregator()
    model = RewardModel(("a", "b"), [first, Scorer(tiny("llama"))], Router(tiny("llama"), 2), tokenizer(), 16, {})
    return model.save(tmp_path_factory.mktemp("reward") / "r")


@pytest.fixture
def reward(good_reward, tmp_path):
    return copied(good_reward, tmp_path / "r")


def test_any_damage_gives_a_reward_model_or_an_error(good_reward, tmp_path):
    ended = []
    for number in range(24):
        random = Random(number)
        folder = copied(good_reward, tmp_path / "r")
        done = damage(folder / random.choice(PLACES), random)
        try:
            with memory(2**30):
                ended.append(RewardModel.load(folder).length)
        except TransectError as error:
            message = str(error).replace(str(folder), "")
            assert "allocate" not in message and len(message) < 500, (done, message)
            ended.append(error)
    assert 0 < ended.count(16) < 20


@pytest.mark.parametrize("junk", JUNK[::3], ids=lambda junk: repr(junk)[:12])
def test_a_card_that_somebody_made_up(reward, junk):
    """With a checksum that is right."""
    card = json.loads((reward / CARD).read_text())
    card = {name: value for name, value in card.items() if not name.startswith("transect.")}
    entry = card["categories"][0]
    for changed in (
        {"categories": junk}, {"categories": [junk]}, {"length": junk},
        *({"categories": [{**entry, name: junk}]} for name in entry),
    ):  # fmt: skip
        keep_json(reward / CARD, {**card, **changed}, OF)
        with contextlib.suppress(BadCheckpoint):
            made = RewardModel.load(reward)
            assert all(isinstance(name, str) for name in made.categories) and made.length > 0
            assert len(made.scorers) == len(made.categories)


def in_adapter(folder, **entries):
    file = folder / "category-0/aspect-0/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_nothing_that_an_adapter_names_is_imported(reward, tmp_path, monkeypatch):
    """PEFT imports the module that `megatron_core` names."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    in_adapter(reward, megatron_config={"x": 1}, megatron_core="evil", auto_mapping={"parent_library": "evil"})
    made = RewardModel.load(reward)
    assert not (tmp_path / "ran").exists() and made.scorers[0].aspects == ("x", "y")


def test_an_adapter_is_sizes_and_numbers(reward):
    """No pickle is read, the hub is not asked, and what a config says beyond its sizes changes nothing."""
    file = reward / "category-0/aspect-0/adapter_model.safetensors"
    before = RewardModel.load(reward)
    in_adapter(reward, init_lora_weights="pissa", use_dora=True, modules_to_save=["lm_head"])
    again = RewardModel.load(reward)
    for name, tensor in before.scorers[0].state_dict().items():
        assert torch.equal(again.scorers[0].state_dict()[name], tensor), name
    for entries in (
        {"r": 3}, {"r": 10**9}, {"r": "2"}, {"target_modules": "all-linear"}, {"target_modules": ["lm_head"]},
        {"peft_type": "BOFT"}, {"lora_alpha": 0}, {"lora_dropout": 7}, {"lora_alpha": None},
    ):  # fmt: skip
        copy = copied(reward, reward.with_name("copy"))
        in_adapter(copy, **entries)
        with pytest.raises(BadCheckpoint):
            RewardModel.load(copy)
    numbers = load_file(file)
    file.unlink()
    torch.save(numbers, file.with_suffix(".bin"))
    with pytest.raises(BadCheckpoint, match=r"adapter_model\.safetensors"):
        RewardModel.load(reward)


def test_heads_that_are_no_numbers(reward):
    heads = load_file(reward / "category-1/heads.safetensors")
    save_file({**heads, "head.bias": torch.full((1,), float("nan"))}, reward / "category-1/heads.safetensors")
    with pytest.raises(BadCheckpoint, match=r"head\.bias holds NaN"):
        RewardModel.load(reward)
