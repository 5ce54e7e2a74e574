"""SVFit: what it trains and what it cannot, the two forms of its layer, its folder, PEFT and the Trainer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tests.models import apart, assert_alike, inputs, logits, tiny
from transect.adaptation import adapter_named
from transect.adaptation.catalog.svfit import layer as layer_module
from transect.adaptation.catalog.svfit.layer import SvfitLayer
from transect.adaptation.catalog.svfit.spectrum import chosen, enough
from transect.adaptation.catalog.svfit.tuner import SvfitConfig
from transect.errors import TransectError

OUT, IN, LEAST = 12, 20, 12
MATRICES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


class One(nn.Module):
    """A single linear layer, stored either way."""

    def __init__(self, kind: str = "linear", weight: torch.Tensor | None = None, dtype: Any = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = (nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)).to(dtype)
        with torch.no_grad():
            weight = torch.randn(OUT, IN) if weight is None else weight
            self.map.weight.copy_(weight if kind == "linear" else weight.T)
            self.map.bias.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


def around(one: nn.Module, **settings: Any) -> tuple[Any, SvfitLayer]:
    """The adapted model and its layer."""
    model = get_peft_model(one, SvfitConfig(target_modules=["map"], **settings))  # type: ignore[arg-type]
    return model, model.base_model.model.map


def moved(layer: SvfitLayer, seed: int = 1, size: float = 0.5) -> None:
    """As after some training."""
    with torch.no_grad():
        for shift in layer.svfit_shift.values():
            generator = torch.Generator().manual_seed(seed)
            shift.copy_(size * torch.randn(shift.shape, generator=generator, dtype=shift.dtype))


def batch(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """A tiny model of which every matrix has changed."""
    config = SvfitConfig(target_modules=MATRICES[name], **{"r": 3, **settings})
    model = get_peft_model(tiny(name, seed, dtype), config).eval()
    for layer in layers(model):
        moved(layer)
    return model


def layers(model: Any) -> list[SvfitLayer]:
    return [module for module in model.modules() if isinstance(module, SvfitLayer)]


# What it is


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_start_is_exact_for_every_rank_in_any_type(kind, dtype):
    x = batch(dtype)
    expected = One(kind, dtype=dtype)(x)
    for rank in range(1, LEAST + 1):
        for relative in (False, True):
            model, layer = around(One(kind, dtype=dtype), r=rank, relative=relative)
            assert torch.equal(model(x), expected)
            assert len(layer.svfit_shift["default"]) == rank


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("relative", [False, True])
def test_the_gradient_of_a_value_is_that_of_the_weight_between_its_vectors(kind, relative):
    one = One(kind)
    weight = one.map.weight.detach().clone() if kind == "linear" else one.map.weight.detach().T.clone()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    model, layer = around(one, r=4, relative=relative)
    moved(layer)
    (model(batch()) ** 3).sum().backward()
    changed = (weight + layer.delta("default").detach()).requires_grad_(True)
    (functional.linear(batch(), changed, one.map.bias.detach()) ** 3).sum().backward()
    assert changed.grad is not None
    expected = torch.stack([left[:, i] @ changed.grad @ right[i] for i in range(4)])
    found = layer.svfit_shift["default"].grad
    assert found is not None
    close(found / expected, values[:4] if relative else torch.ones_like(expected), 1e-9)


@pytest.mark.parametrize("relative", [False, True])
def test_the_singular_vectors_stay(relative):
    one = One()
    weight = one.map.weight.detach().clone()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    _, layer = around(one, r=5, relative=relative)
    moved(layer, size=3.0 if relative else 20.0)
    inside = left.T @ layer.delta("default").detach() @ right.T
    sigma = layer.sigma("default").detach()
    close(inside, torch.diag(torch.cat([sigma - values[:5], torch.zeros(LEAST - 5)])))
    assert torch.linalg.matrix_rank(layer.delta("default").detach()) == 5
    assert sigma.min() < 0 and (sigma.diff() > 0).any()  # of any sign, in any order
    layer.merge()
    expected = torch.cat([sigma.abs(), values[5:]]).sort(descending=True).values
    close(torch.linalg.svdvals(layer.weight), expected)


def test_two_forms_of_the_layer_and_the_merged_weight_agree():
    one = One()
    weight, bias = one.map.weight.detach().clone(), one.map.bias.detach().clone()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    model, layer = around(one, r=4)
    moved(layer)
    rest = weight - (left[:, :4] * values[:4]) @ right[:4]
    x, sigma = batch(), layer.sigma("default").detach()
    expected = x @ rest.T + (x @ right[:4].T * sigma) @ left[:, :4].T + bias
    close(model(x), expected)
    layer.merge()
    close(model(x), expected)
    close(layer.weight, rest + (left[:, :4] * sigma) @ right[:4])
    layer.unmerge()
    close(layer.weight, weight)
    close(model(x), expected)


def test_all_values_leave_no_rest_and_are_a_diagonal_in_the_full_basis():
    one = One()
    weight = one.map.weight.detach().clone()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    _, layer = around(one, r=LEAST)
    close((left * layer.sigma("default").detach()) @ right, weight)
    moved(layer)
    diagonal = left.T @ (layer.weight + layer.delta("default").detach()) @ right.T - torch.diag(values)
    close(diagonal, torch.diag(layer.svfit_shift["default"].detach()))


def test_the_output_is_linear_in_the_values():
    one = One()
    left, values, right = torch.linalg.svd(one.map.weight.detach(), full_matrices=False)
    model, layer = around(one, r=4)
    start = model(batch()).detach()
    leading = batch() @ ((left[:, :4] * values[:4]) @ right[:4]).T
    for factor in (0.0, 0.5, -3.0):
        with torch.no_grad():
            layer.svfit_shift["default"].copy_((factor - 1) * values[:4])
        close(model(batch()) - start, (factor - 1) * leading)


def test_what_lies_outside_the_diagonal_cannot_be_learned():
    one = One()
    left, _, right = torch.linalg.svd(one.map.weight.detach(), full_matrices=False)
    _, layer = around(one, r=LEAST)
    target = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.svfit_shift.parameters(), lr=0.5)  # the bottom of this bowl in one step
    for _ in range(2):
        error = (layer.delta("default") - target).square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    inside = left.T @ target @ right.T
    outside = (target.square().sum() - inside.diagonal().square().sum()).sqrt()
    close((layer.delta("default").detach() - target).norm(), outside)
    assert outside > 0.9 * target.norm()


def test_a_sign_shared_by_two_vectors_means_nothing():
    found = []
    for flipped in ([], [0, 2]):
        model, layer = around(One(), r=4)
        moved(layer)
        basis: Any = layer.svfit_basis["default"]
        basis.left[:, flipped] *= -1
        basis.right[flipped] *= -1
        output = model(batch())
        (output**3).sum().backward()
        found.append((output.detach(), layer.svfit_shift["default"].grad))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1], 1e-9)


def test_equal_values_have_no_vectors_of_their_own_and_that_is_said():
    left, values, right = torch.linalg.svd(One().map.weight.detach(), full_matrices=False)
    values[1] = values[2]
    weight = (left * values) @ right
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="2 of 4 singular values are equal to others or zero"):
        model, layer = around(One(weight=weight), r=4)
    basis: Any = layer.svfit_basis["default"]
    outputs, shift = [], layer.svfit_shift["default"]
    for change in ([0.3, 0.5, 0.5, 0.1], [0.3, 0.5, -0.5, 0.1]):
        for _ in range(2):  # in one basis and in another that is as good
            with torch.no_grad():
                basis.left[:, 1:3] = basis.left[:, 1:3] @ turn.T
                basis.right[1:3] = turn @ basis.right[1:3]
                shift.zero_()
                close(model(batch()), One(weight=weight)(batch()))
                shift.copy_(torch.tensor(change))
                outputs.append(model(batch()))
    close(outputs[0], outputs[1])
    assert apart(outputs[2], outputs[3]) > 1e-2
    with pytest.warns(UserWarning, match="2 of 12 singular values"):
        around(One(weight=torch.cat([torch.randn(OUT - 2, IN), torch.zeros(2, IN)])), r=LEAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        around(One(), r=LEAST)
        around(One(weight=weight), r=1)


# How many, and which


def test_as_few_values_as_carry_the_energy():
    values = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # squares 9, 4, 1, 1 of 15
    for energy, count in [(0.1, 1), (0.6, 1), (0.61, 2), (13 / 15, 2), (0.9, 3), (0.99, 4), (1.0, 4)]:
        assert enough(values, energy) == count
    assert enough(torch.ones(1000, dtype=torch.float64), 0.99) == 990  # a flat spectrum has no few that lead
    assert enough(torch.zeros(5, dtype=torch.float64), 0.99) == 1
    weight = torch.diag_embed(2.0 ** -torch.arange(OUT))
    _, layer = around(One(weight=functional.pad(weight, (0, IN - OUT))))
    assert len(layer.svfit_shift["default"]) == 4  # 1 - 4^-r of the whole
    assert "default: 4 of 12 singular values" in repr(layer)


@pytest.mark.parametrize(("select", "places"), [("leading", [0, 1, 2]), ("smallest", [9, 10, 11])])
def test_which_values(select, places):
    one = One()
    left, values, right = torch.linalg.svd(one.map.weight.detach(), full_matrices=False)
    _, layer = around(one, r=3, select=select)
    assert chosen(3, LEAST, select, 0).tolist() == places
    close(layer.svfit_start["default"], values[places])
    moved(layer)
    expected = (left[:, places] * layer.svfit_shift["default"].detach()) @ right[places]
    close(layer.delta("default").detach(), expected)


def test_random_values_are_drawn_by_their_seed():
    draws = [chosen(5, 100, "random", seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) == 5 and (draws[0].diff() > 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_the_values_are_trained(name):
    model = adapted(name, r=5)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    shapes = [(layer.out_features, layer.in_features) for layer in layers(model)]
    assert sum(p.numel() for p in trained.values()) == 5 * len(shapes) == adapter_named("svfit").trained(shapes, 5)
    assert all(".svfit_shift." in key for key in trained) and len(trained) == len(shapes)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ids = inputs(name)
    model(**ids, labels=ids["input_ids"]).loss.backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == set(trained)
    torch.optim.SGD(trained.values(), lr=1.0).step()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == set(trained)


def test_weight_decay_leads_back_to_the_weight():
    one = One()
    weight = one.map.weight.detach().clone()
    _, layer = around(one, r=LEAST)
    moved(layer)
    distance = layer.delta("default").detach().norm()
    optimizer = torch.optim.AdamW([layer.svfit_shift["default"]], lr=0.1, weight_decay=5.0)
    layer.svfit_shift["default"].grad = torch.zeros(LEAST, dtype=torch.float64)
    optimizer.step()
    close(layer.delta("default").detach().norm(), 0.5 * distance)
    assert torch.equal(layer.weight, weight)


# In a model, with PEFT


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("relative", [False, True])
def test_merged_and_taken_back(name, relative):
    model = adapted(name, relative=relative)
    ids = inputs(name)
    expected, frozen = logits(model, ids), logits(tiny(name), ids)
    assert apart(expected, frozen) > 1e-2
    with model.disable_adapter():
        assert_alike(logits(model, ids), frozen)
    model.merge_adapter()
    assert_alike(logits(model, ids), expected)
    model.unmerge_adapter()
    assert_alike(logits(model, ids), expected)
    for layer, original in zip(layers(model), _matrices(name), strict=True):
        close(layer.weight, original, 1e-5)
    whole = model.merge_and_unload()
    assert type(whole) is type(tiny(name)) and not layers(whole)
    assert_alike(logits(whole, ids), expected)


def _matrices(name: str) -> list[torch.Tensor]:
    return [layer.weight for layer in layers(adapted(name))]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_folder_has_numbers_alone_and_loads(tmp_path, name, low):
    model = adapted(name, r=None, energy=0.6, relative=low)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in held} == {"svfit_shift", "svfit_start"}
    assert all(tensor.ndim == 1 for tensor in held.values())
    again = PeftModel.from_pretrained(tiny(name), tmp_path, low_cpu_mem_usage=low).eval()
    assert_alike(logits(again, inputs(name)), logits(model, inputs(name)))
    assert not any(p.requires_grad for p in again.parameters())
    again.merge_adapter()
    assert_alike(logits(again, inputs(name)), logits(model, inputs(name)))


def test_a_count_that_rounding_chose_is_that_of_the_folder(tmp_path, monkeypatch):
    model = adapted(r=None, energy=0.6)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(layer_module, "enough", lambda values, energy: enough(values, energy) + 1)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert_alike(logits(again, inputs("llama")), logits(model, inputs("llama")))


@pytest.mark.parametrize("low", [False, True])
def test_a_folder_of_another_model_is_refused(tmp_path, low):
    adapted().save_pretrained(tmp_path)
    merged = adapted().merge_and_unload()
    for other in (tiny("llama", seed=1), tiny("llama", dtype=torch.bfloat16), merged):
        with pytest.raises(TransectError, match=r"layers\.0\.\S*: this adapter was trained on another weight"):
            PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low)


def test_a_model_in_bfloat16_keeps_what_is_trained_in_float32(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    base = tiny("llama", dtype=torch.bfloat16)
    for layer in layers(model):
        basis: Any = layer.svfit_basis["default"]
        assert basis.left.dtype == basis.right.dtype == torch.bfloat16
        assert layer.svfit_shift["default"].dtype == layer.svfit_start["default"].dtype == torch.float32
    ids = inputs("llama")
    model(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert apart(logits(model, ids), logits(base, ids)) > 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert_alike(logits(again, ids), logits(model, ids))
    assert_alike(logits(again.merge_and_unload(), ids), logits(model, ids))
    # A checkpoint in bfloat16 is the same numbers in float32.
    wide = PeftModel.from_pretrained(tiny("llama", dtype=torch.bfloat16).float(), tmp_path).eval()
    assert_alike(logits(wide, ids).bfloat16(), logits(model, ids))


def test_two_adapters_add_up():
    one = One()
    model, layer = around(one, r=4)
    model.add_adapter("other", SvfitConfig(target_modules=["map"], r=LEAST, relative=True))
    moved(layer)
    assert not layer.svfit_shift["other"].requires_grad
    parts = [layer.delta(name).detach() for name in ("default", "other")]
    model.base_model.set_adapter(["default", "other"])
    expected = functional.linear(batch(), layer.weight + parts[0] + parts[1], one.map.bias)
    close(model(batch()), expected)
    model.merge_adapter()
    close(model(batch()), expected)
    model.unmerge_adapter()
    model.delete_adapter("default")
    close(model(batch()), functional.linear(batch(), layer.weight + parts[1], one.map.bias))


def test_trains_with_the_trainer_of_hugging_face(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny("llama"), SvfitConfig(target_modules=MATRICES["llama"], r=3))
    row = inputs("llama")["input_ids"][0]
    told = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    Trainer(model, told, train_dataset=[{"input_ids": row, "labels": row}] * 16).train()  # type: ignore[arg-type]
    for layer in layers(model):
        assert layer.svfit_shift["default"].abs().min() > 0
    expected = logits(model.eval(), inputs("llama"))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    assert_alike(logits(again, inputs("llama")), expected)


# What it refuses


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 0}, "r must be at least 1, or None"),
        ({"r": 13}, "map: svfit cannot train 13 singular values of a weight of 12 x 20: it has 12"),
        ({"energy": 0.0}, "energy must be above 0 and at most 1, got 0"),
        ({"energy": 1.5}, "energy must be above 0"),
        ({"select": "largest"}, "select must be one of leading, smallest, random, got 'largest'"),
    ],
)
def test_settings_that_mean_nothing(settings, match):
    with pytest.raises(TransectError, match=match):
        around(One(), **settings)


def test_weights_that_have_no_singular_vectors():
    broken = One()
    with torch.no_grad():
        broken.map.weight[0, 0] = torch.nan
    with pytest.raises(TransectError, match="map: the weight of a layer that is to be adapted holds NaN"):
        around(broken, r=1)
    with pytest.raises(TransectError, match="map: svfit needs the weights themselves"):
        around(One().to("meta"), r=1)
    stored = One()
    stored.map.weight = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TransectError, match=r"map: the weight is stored as torch\.int8"):
        around(stored, r=1)
    model, _ = around(One(), r=1)
    model.merge_adapter()
    with pytest.raises(TransectError, match="unmerge it before one is added"):
        model.add_adapter("other", SvfitConfig(target_modules=["map"], r=1))


def test_as_registered():
    svfit = adapter_named("svfit")
    assert svfit.size_for([(12, 20), (9, 30)], 10**6) == 9
    assert svfit.trained([(12, 20)], 13) is None
    assert svfit.trained([(12, 20)], 0) == 12  # the weights decide: at most all
    config = svfit.config(["map"], {"rank": 0, "energy": 0.5})
    assert config.r is None and config.energy == 0.5 and svfit.config(["map"], {"rank": 4}).r == 4
    with pytest.raises(TransectError, match="energy=0 must be"):
        svfit.settings({"energy": 0})
