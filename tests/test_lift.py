"""LIFT: which entries are trained, what the layer computes and keeps, refreshed masks, PEFT and the Trainer."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import transect
from tests.models import VOCABULARY, assert_alike, inputs, logits, tiny
from transect.adaptation import adapter_named
from transect.adaptation.catalog.lift import LiftConfig, RefreshMasks, masks
from transect.adaptation.catalog.lift.layer import LiftLayer
from transect.claims.catalog import lift as claim
from transect.errors import TransectError

MATRICES = {"llama": ["q_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def decaying(d_out: int = 64, d_in: int = 48, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall off."""
    torch.manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(d_out, d_in, dtype=torch.float64), full_matrices=False)
    return (left * 0.9 ** torch.arange(min(d_out, d_in))) @ right


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = LiftConfig(target_modules=MATRICES[name], **{"rank": 2, "filter_rank": 4, "interval": 0, **settings})
    return get_peft_model(tiny(name, dtype=dtype), config)


def layers(model: Any) -> list[LiftLayer]:
    return [module for module in model.modules() if isinstance(module, LiftLayer)]


def train(model: Any, name: str, steps: int, optimizer: Any = None, rate: float = 1e-2) -> torch.optim.Optimizer:
    """A few steps on one batch, with the hook that a training loop calls after each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    batch = inputs(name)
    for step in range(1, steps + 1):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers(model):
            layer.after_step(step, optimizer)
    return optimizer


def refreshed(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A model whose masks have changed twice."""
    model = adapted(name, dtype, interval=2)
    train(model, name, 5, rate=0.3)
    assert sum(len(layer.lift_settled_index["default"]) for layer in layers(model)) > 0
    return model


# Which entries


@pytest.mark.parametrize(("shape", "rank", "count"), [((4096, 4096), 128, 2**20), ((5, 7), 2, 24), ((5, 7), 3, 35)])
def test_as_many_entries_as_low_rank_updates_have_numbers(shape, rank, count):
    assert masks.budget(*shape, rank) == count == adapter_named("lift").trained([shape], rank)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_mask_is_the_largest_of_the_low_rank_approximation(rank):
    weight = decaying(24, 20)
    left, values, right = torch.linalg.svd(weight)
    expected = ((left[:, :rank] * values[:rank]) @ right[:rank]).abs()
    positions = masks.principal(weight, 60, rank)
    assert len(positions.unique()) == 60
    inside = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, positions, True)
    assert expected.flatten()[inside].min() > expected.flatten()[~inside].max()


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (20, 20)])
def test_the_approximation_is_the_best_of_its_rank(shape):
    weight = decaying(*shape)
    left, values, right = torch.linalg.svd(weight)
    for rank in (1, 7, 19, 20, 30):
        best = (left[:, :rank] * values[:rank]) @ right[:rank] if rank < 20 else weight
        torch.testing.assert_close(masks.low_rank(weight, rank), best)
    assert masks.low_rank(weight.bfloat16(), 3).dtype == torch.float32


def test_of_equal_scores_the_first_are_taken():
    assert masks.largest(torch.ones(4, 5), 3).tolist() == [0, 1, 2]
    scores = torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 3.0]])
    assert masks.largest(scores, 4).tolist() == [0, 1, 3, 5] and masks.largest(scores, 6).tolist() == list(range(6))


def test_a_filter_that_drops_nothing_gives_the_magnitude_mask_and_a_narrow_one_does_not():
    weight, count = decaying(), 154  # 5 %
    by_size = set(masks.by_magnitude(weight, count).tolist())
    assert set(masks.principal(weight, count, 48).tolist()) == by_size
    exact = weight @ torch.linalg.svd(weight).Vh[:30].T @ torch.linalg.svd(weight).Vh[:30]  # of rank 30
    assert set(masks.principal(exact, count, 40).tolist()) == set(masks.by_magnitude(exact, count).tolist())
    assert len(by_size & set(masks.principal(weight, count, 8).tolist())) < 0.9 * count


def test_other_selections():
    weight, gradient = torch.tensor([[3.0, -1.0], [0.5, -2.0]]), torch.tensor([[-1.0, 2.0], [-5.0, 3.0]])
    assert masks.by_magnitude(weight, 2).tolist() == [0, 3]
    assert masks.by_gradient(gradient, 2).tolist() == [2, 3]
    assert masks.by_movement([(weight, gradient)], 2).tolist() == [0, 3]  # 3, 2, 2.5, 6
    then = torch.tensor([[1.0, 0.0], [0.0, -9.0]])
    assert masks.by_movement([(weight, gradient), (weight, then)], 2).tolist() == [1, 2]  # 0, 2, 2.5, -12
    drawn = masks.at_random((6, 7), 9, seed=4)
    assert len(drawn.unique()) == 9 and drawn.tolist() == sorted(drawn.tolist())
    assert torch.equal(drawn, masks.at_random((6, 7), 9, seed=4)) and drawn.tolist() != list(range(9))


@pytest.mark.parametrize("select", ["lift", "magnitude", "random"])
def test_a_layer_trains_what_was_selected(select):
    layer = layers(adapted(select=select))[0]
    weight, positions = layer.weight, layer.lift_index["default"].long()
    expected = {
        "lift": masks.principal(weight, 128, 4), "magnitude": masks.by_magnitude(weight, 128),
        "random": masks.at_random((32, 32), 128),
    }[select]  # fmt: skip
    assert torch.equal(positions, expected)


# The layer


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_output_and_gradients_are_those_of_the_changed_weight(name):
    model = adapted(name, torch.float64)
    layer = layers(model)[0]
    layer.lift_delta["default"].data.normal_()
    layer.lift_settled_index["default"] = torch.tensor([n for n in range(9) if n not in layer.lift_index["default"]])
    layer.lift_settled_value["default"] = torch.ones(len(layer.lift_settled_index["default"]), dtype=torch.float64)
    assert layer.lift_delta["default"].dtype == torch.float64 and len(layer.lift_settled_index["default"])
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    weight = (layer.weight + layer.delta("default")).detach().requires_grad_()
    expected = nn.functional.linear(x, weight, layer.get_base_layer().bias)
    torch.testing.assert_close(layer(x), expected)
    pull = torch.randn_like(expected)
    into_x, into_weight = torch.autograd.grad((expected * pull).sum(), (x, weight))
    ours = torch.autograd.grad((layer(x) * pull).sum(), (x, layer.lift_delta["default"]))
    torch.testing.assert_close(ours, (into_x, into_weight.flatten()[layer.lift_index["default"]]))


def test_no_dense_copy_is_kept_for_the_way_back():
    layer, x = layers(adapted())[0], torch.randn(3, 32, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    weight = layer.weight
    large = [tensor for tensor in kept if tensor.numel() >= weight.numel()]
    assert len(kept) > 2 and all(tensor.data_ptr() == weight.data_ptr() for tensor in large)


def test_under_autocast_products_are_narrow_and_the_trained_numbers_wide():
    layer, x = layers(adapted())[0], torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert layer.lift_delta["default"].grad.dtype == torch.float32 and layer.lift_delta["default"].grad.abs().sum() > 0


def test_narrow_weights_have_wide_trained_numbers_and_the_output_of_what_is_merged():
    model = refreshed(dtype=torch.bfloat16)
    assert all(layer.lift_delta["default"].dtype == torch.float32 for layer in layers(model))
    for layer in layers(model):
        weight = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T  # products with 0 and 1 are exact
        layer.merge()
        assert torch.equal(layer.weight, weight)


# Training


def test_other_entries_never_move_while_the_mask_is_fixed():
    model = adapted()
    before = {n: layer.weight.clone() for n, layer in enumerate(layers(model))}
    train(model, "llama", 4)
    ours = layers(model)
    positions = [layer.lift_index["default"].long() for layer in ours]
    model.merge_adapter()
    for n, layer in enumerate(ours):
        moved = (layer.weight != before[n]).flatten().nonzero()[:, 0]
        assert set(moved.tolist()) <= set(positions[n].tolist()) and len(moved) > 0.9 * len(positions[n])


def test_with_all_entries_it_is_dense_adam():
    model, dense = adapted(dtype=torch.float64, rank=32), tiny("llama", dtype=torch.float64)
    weights = [m.weight for path, m in dense.named_modules() if path.rpartition(".")[2] in MATRICES["llama"]]
    dense.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_()
    train(model, "llama", 5)
    train(dense, "llama", 5)
    for layer, weight in zip(layers(model), weights, strict=True):
        assert layer.lift_index["default"].numel() == weight.numel()
        torch.testing.assert_close(layer.weight + layer.delta("default"), weight, rtol=0, atol=1e-6)


def test_the_optimizer_holds_two_numbers_an_entry():
    model = adapted(interval=1)
    optimizer = train(model, "llama", 2)
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    assert held == 2 * 3 * (masks.budget(32, 32, 2) * 2 + masks.budget(32, 48, 2))


def test_the_change_is_of_high_rank():
    model = adapted()
    train(model, "llama", 2)
    assert all(torch.linalg.matrix_rank(layer.delta("default")) > 8 for layer in layers(model))


# Refresh


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_refresh_carries_what_stays_and_begins_what_enters_with_zeros(kind):
    model = adapted()
    more = {"amsgrad": True} if kind is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.3, **more)
    train(model, "llama", 3, optimizer)
    layer = layers(model)[0]
    values, index = layer.lift_delta["default"], layer.lift_index["default"].clone()
    state = {key: held.clone() for key, held in optimizer.state[values].items() if torch.is_tensor(held)}
    changed = layer.delta("default").detach().clone()
    layer.refresh(optimizer)
    after = layer.lift_index["default"]
    assert torch.equal(after.long(), masks.principal(layer.weight + changed, len(index), 4))
    assert torch.equal(layer.delta("default"), changed)  # nothing is forgotten
    stays = torch.isin(after, index)
    assert 0 < int(stays.sum()) < len(index)
    assert set(layer.lift_settled_index["default"].tolist()) == set(index.tolist()) - set(after.tolist())
    carried = [key for key, held in state.items() if held.dim()]
    assert carried and all(held.dim() or torch.equal(held, optimizer.state[values][key]) for key, held in state.items())
    for key in carried:
        now = optimizer.state[values][key]
        assert torch.equal(now[stays], state[key][torch.isin(index, after)]) and not now[~stays].any()
    train(model, "llama", 1, optimizer)  # and training goes on
    assert (values[~stays] != 0).any()


def test_entries_that_come_back_have_the_change_that_they_had(monkeypatch):
    model = adapted()
    optimizer = train(model, "llama", 3)
    layer = layers(model)[0]
    first, values = layer.lift_index["default"].clone(), layer.lift_delta["default"].detach().clone()
    for positions in (torch.arange(len(first)), first.long()):
        monkeypatch.setattr(layer, "choose", lambda weight, config, chosen=positions: chosen)
        layer.refresh(optimizer)
        assert torch.equal(layer.lift_index["default"].long(), positions)
    assert torch.equal(layer.lift_delta["default"], values) and len(layer.lift_settled_index["default"]) == 0


def test_masks_are_refreshed_behind_every_so_many_steps(monkeypatch):
    model, seen = adapted(interval=3), []
    monkeypatch.setattr(LiftLayer, "refresh", lambda layer, optimizer, name: seen.append(name))
    for step in range(1, 8):
        layers(model)[0].after_step(step, torch.optim.SGD([torch.zeros(1)]))
    assert seen == ["default"] * 2
    layers(adapted(interval=0))[0].after_step(3, torch.optim.SGD([torch.zeros(1)]))
    assert len(seen) == 2


def test_a_training_with_refreshed_masks_goes_on_bit_for_bit_and_keeps_its_best_state(tmp_path):
    data = torch.randint(3, VOCABULARY, (10, 12), generator=torch.Generator().manual_seed(5))
    options = dict(interval=1, rank=2, filter_rank=4, lr=0.3, epochs=2, batch_size=3, every=1, device="cpu")
    seen: list[Any] = []

    def stop(check):
        if check.step == 4:
            raise KeyboardInterrupt

    whole = transect.adapt(tiny("llama"), "lift", data, on_check=seen.append, **options)
    with pytest.raises(KeyboardInterrupt):
        transect.adapt(tiny("llama"), "lift", data, checkpoint=tmp_path / "state", on_check=stop, **options)
    again = transect.adapt(tiny("llama"), "lift", data, checkpoint=tmp_path / "state", **options)
    assert len(seen) == 6 and again.outcome["checks"] == whole.outcome["checks"]
    losses = [whole.outcome["loss_before"], *(check.held_out for check in seen)]
    assert whole.outcome["loss_after"] == min(losses)
    held_out = {"input_ids": data[-1:], "labels": data[-1:]}
    for adapted in (whole.model, again.model):
        assert adapted.eval()(**held_out).loss.item() == pytest.approx(min(losses), rel=1e-4)


def test_a_merged_layer_is_not_refreshed():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(TransectError, match="unmerge"):
        layers(model)[0].refresh(torch.optim.SGD([torch.zeros(1)]))


# PEFT


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32)])
@pytest.mark.parametrize("low", [False, True])
def test_a_loaded_adapter_is_exact(name, dtype, low, tmp_path):
    model = refreshed(name, dtype)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(name, dtype=dtype), tmp_path, low_cpu_mem_usage=low)
    for ours, theirs in zip(layers(model), layers(again), strict=True):
        for one, other in zip(ours.changes("default"), theirs.changes("default"), strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype
    assert_alike(logits(again, inputs(name)), logits(model, inputs(name)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_taking_back_and_turning_off(name):
    model, batch = refreshed(name), inputs(name)
    plain, trained = logits(tiny(name), batch), logits(model, batch)
    assert (trained - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert_alike(logits(model, batch), plain)
    model.merge_adapter()
    assert_alike(logits(model, batch), trained)
    model.unmerge_adapter()
    assert_alike(logits(model, batch), trained)
    whole = copy.deepcopy(model).merge_and_unload()
    assert not layers(whole)
    assert_alike(logits(whole, batch), trained)


def test_several_adapters():
    model, batch = adapted(), inputs("llama")
    train(model, "llama", 2)
    first = logits(model, batch)
    model.add_adapter("other", LiftConfig(target_modules=["q_proj"], rank=1, select="random"))
    assert_alike(logits(model, batch), first)
    model.set_adapter("other")
    train(model, "llama", 2)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, batch)
    assert (both - first).abs().max() > 1e-3
    model.merge_adapter(["default", "other"])
    assert_alike(logits(model, batch), both)
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert_alike(logits(model, batch), first)
    assert all(list(layer.lift_index) == ["default"] for layer in layers(model))


def test_the_trainer_refreshes_masks(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = adapted(interval=2)
    before = [layer.lift_index["default"].clone() for layer in layers(model)]
    rows = [{"input_ids": row, "labels": row} for row in inputs("llama", batch=4)["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.3, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[RefreshMasks()]).train()  # type: ignore[arg-type]
    after = [layer.lift_index["default"] for layer in layers(model)]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


# What it refuses


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"filter_rank": 0}, "filter_rank must be at least 1, got 0"),
        ({"interval": -1}, "interval must be at least 0, got -1"),
        ({"select": "gradient"}, "select must be one of lift, magnitude, random, got 'gradient'"),
    ],
)
def test_settings_that_mean_nothing(settings, told):
    with pytest.raises(TransectError, match=told):
        LiftConfig(**settings)


def test_a_filter_above_the_rank_is_no_filter_and_is_warned_of():
    with pytest.warns(UserWarning, match=r"filter_rank 33 is above the rank 32 that a weight of \(32, 32\)"):
        layer = layers(adapted(filter_rank=33))[0]
    assert torch.equal(layer.lift_index["default"].long(), masks.by_magnitude(layer.weight, 128))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="filter_rank")
        adapted(filter_rank=32)


def test_one_weight_is_not_trained_twice():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with pytest.raises(TransectError, match="1 and 0 are one weight"):
        get_peft_model(model, LiftConfig(target_modules=["0", "1"], rank=1, filter_rank=2))  # type: ignore[arg-type]


# The claim


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_noise_is_as_large_as_it_says_lies_where_it_should_and_is_taken_back(name):
    weights = [layer.weight for layer in layers(adapted(name))]
    before = [weight.clone() for weight in weights]
    where = [masks.by_magnitude(weight, 200) for weight in weights]
    with claim._noisy(weights, where, [0.5] * len(weights), 0):
        for weight, old, positions in zip(weights, before, where, strict=True):
            noise = (weight - old).flatten()
            assert set(noise.nonzero()[:, 0].tolist()) == set(positions.tolist())
            assert 0.4 < noise[positions].std() < 0.6
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
