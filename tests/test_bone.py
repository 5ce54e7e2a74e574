"""PEFT's MiSS against the mathematics of Bone: the block affine form, and the sum form that followed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from tests.models import assert_alike, inputs, logits, tiny
from transect.adaptation import adapter_named
from transect.errors import TransectError

OUT, IN, BLOCK = 24, 40, 8
SIZES = {"bone": "block", "miss": "rank"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


class One(nn.Module):
    """A single linear layer."""

    def __init__(self, d_out: int = OUT, d_in: int = IN, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(d_in, d_out, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def config(name: str, size: int, paths: list[str] | None = None) -> Any:
    return adapter_named(name).config(paths or ["map"], {SIZES[name]: size})


def adapted(name: str, one: One, size: int = BLOCK) -> tuple[Any, Any]:
    """The adapted model and its layer."""
    model = get_peft_model(one, config(name, size))  # type: ignore[arg-type]
    return model, model.base_model.model.map


def drawn(like: Tensor, seed: int, size: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def put(layer: Any, value: Tensor, adapter: str = "default") -> None:
    with torch.no_grad():
        layer.miss_block[adapter].copy_(value)


def batch(d_in: int = IN) -> Tensor:
    return torch.randn(2, 3, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def affine(weight: Tensor, blocks: Tensor) -> Tensor:
    """W_ij B_i + B_i, block by block."""
    side, update = blocks.shape[-1], torch.zeros_like(weight)
    for i, block in enumerate(blocks):
        rows = slice(i * side, (i + 1) * side)
        for start in range(0, weight.shape[1], side):
            columns = slice(start, start + side)
            update[rows, columns] = weight[rows, columns] @ block + block
    return update


def repeated(matrix: Tensor, d_in: int) -> Tensor:
    """[Cᵀ Cᵀ ...] (d_out x d_in) of C (r x d_out), cut at the end."""
    return torch.stack([matrix[column % len(matrix)] for column in range(d_in)], dim=1)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# Both forms


@pytest.mark.parametrize("name", ["bone", "miss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_frozen_model(name, dtype):
    frozen = logits(tiny("llama", dtype=dtype), inputs("llama"))
    model = get_peft_model(tiny("llama", dtype=dtype), config(name, BLOCK, TARGETS))
    assert torch.equal(logits(model, inputs("llama")), frozen)


@pytest.mark.parametrize("name", ["bone", "miss"])
@pytest.mark.parametrize(("d_out", "d_in"), [(24, 40), (24, 16), (8, 64)])
def test_as_many_numbers_as_rows_times_the_size(name, d_out, d_in):
    model, _ = adapted(name, One(d_out, d_in))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == d_out * BLOCK == adapter_named(name).trained([(d_out, d_in)], BLOCK)


@pytest.mark.parametrize("name", ["bone", "miss"])
def test_the_update_is_linear_in_what_is_trained(name):
    model, layer = adapted(name, One())
    one, other = (drawn(layer.miss_block["default"], seed) for seed in (2, 3))
    start, changes = model(batch()).detach(), []
    for value in (one, other, one + other):
        put(layer, value)
        changes.append(model(batch()).detach() - start)
    close(changes[0] + changes[1], changes[2])
    assert changes[2].abs().max() > 0.1


@pytest.mark.parametrize(("name", "rank"), [("bone", 64), ("miss", 8)])
def test_the_rank_of_the_update(name, rank):
    model, layer = adapted(name, One(64, 64))
    before = layer.base_layer.weight.detach().clone()
    put(layer, drawn(layer.miss_block["default"], 2))
    model.merge_adapter()
    assert torch.linalg.matrix_rank(layer.base_layer.weight.detach() - before) == rank


@pytest.mark.parametrize("name", ["bone", "miss"])
def test_two_adapters_one_after_the_other(name):
    model, layer = adapted(name, One())
    model.add_adapter("other", config(name, 4))
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias.detach()
    values = {"default": drawn(layer.miss_block["default"], 2), "other": drawn(layer.miss_block["other"], 3)}
    found = []
    for order in (["default", "other"], ["other", "default"]):
        running = weight.clone()
        for adapter in order:
            put(layer, values[adapter], adapter)
            value = values[adapter]
            running = running + (affine(running, value) if name == "bone" else repeated(value, IN))
        model.base_model.set_adapter(order)
        found.append(model(batch()).detach())
        close(found[-1], functional.linear(batch(), running, bias))
    difference = (found[0] - found[1]).abs().max()
    assert difference > 1e-2 if name == "bone" else difference < 1e-12


@pytest.mark.parametrize("name", ["bone", "miss"])
def test_on_weights_in_bfloat16_it_is_trained_in_float32(name, tmp_path):
    model = get_peft_model(tiny("llama", dtype=torch.bfloat16), config(name, BLOCK, TARGETS)).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = inputs("llama")
    model(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().min() > 0 for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama", dtype=torch.bfloat16), tmp_path).eval()
    assert_alike(logits(again, ids), expected)
    assert_alike(logits(model.merge_and_unload(), ids), expected)


# The block affine form


def test_bone_is_the_loop_over_blocks():
    model, layer = adapted("bone", One())
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias.detach()
    blocks = drawn(layer.miss_block["default"], 2)
    assert blocks.shape == (OUT // BLOCK, BLOCK, BLOCK)
    put(layer, blocks)
    changed = weight + affine(weight, blocks)
    close(model(batch()), functional.linear(batch(), changed, bias))
    model.merge_adapter()
    close(layer.base_layer.weight, changed)
    close(model(batch()), functional.linear(batch(), changed, bias))


@pytest.mark.parametrize("size", [0.0, 0.3])
def test_bone_has_the_gradient_of_the_formula(size):
    model, layer = adapted("bone", One())
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias.detach()
    blocks = drawn(layer.miss_block["default"], 2, size)
    put(layer, blocks)
    (model(batch()) ** 3).sum().backward()
    changed = (weight + affine(weight, blocks)).requires_grad_(True)
    (functional.linear(batch(), changed, bias) ** 3).sum().backward()
    assert changed.grad is not None
    unit = torch.eye(BLOCK, dtype=torch.float64)
    expected = torch.zeros_like(blocks)
    for i in range(OUT // BLOCK):
        for j in range(IN // BLOCK):
            place = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            expected[i] += (weight[place] + unit).T @ changed.grad[place]
    close(layer.miss_block["default"].grad, expected, 1e-9)
    assert expected.abs().max() > 0.1  # at the start, too


def test_bone_is_taken_back():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):  # PEFT inverts in float32 in any type
        model, layer = adapted("bone", One(dtype=dtype))
        weight = layer.base_layer.weight.detach().clone()
        blocks = drawn(layer.miss_block["default"], 2, 0.1)
        put(layer, blocks)
        model.merge_adapter()
        merged = layer.base_layer.weight.detach().clone()
        assert (merged - weight).abs().max() > 0.1
        model.unmerge_adapter()
        close(layer.base_layer.weight, weight, tolerance)
    inverses = torch.linalg.inv(torch.eye(BLOCK, dtype=torch.float64) + blocks)
    for i, inverse in enumerate(inverses):  # the merged weight itself has lost nothing
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        tiled = torch.cat([blocks[i]] * (IN // BLOCK), dim=1)
        back = (merged[rows] - tiled).reshape(BLOCK, -1, BLOCK) @ inverse
        close(back.reshape(BLOCK, IN), weight[rows], 1e-13)


# The sum form


@pytest.mark.parametrize("d_in", [40, 37])
def test_miss_adds_one_matrix_under_every_piece_of_the_input(d_in):
    model, layer = adapted("miss", One(d_in=d_in))
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias.detach()
    matrix = drawn(layer.miss_block["default"], 2)
    assert matrix.shape == (BLOCK, OUT)
    put(layer, matrix)
    x = batch(d_in)
    pieces = torch.stack([functional.pad(piece, (0, BLOCK - piece.shape[-1])) for piece in x.split(BLOCK, -1)])
    expected = functional.linear(x, weight, bias) + pieces.sum(0) @ matrix
    close(model(x), expected)
    model.merge_adapter()
    close(layer.base_layer.weight, weight + repeated(matrix, d_in))
    close(model(x), expected)
    model.unmerge_adapter()
    close(layer.base_layer.weight, weight)


# What is refused, before any layer is touched


@pytest.mark.parametrize("name", ["bone", "miss", "shira"])
def test_a_layer_that_peft_does_not_adapt_is_named_with_the_methods_that_do(name):
    path = "transformer.h.0.attn.c_attn"
    layers = {path: tiny("gpt2").get_submodule(path)}
    with pytest.raises(
        TransectError, match=rf"{name} adapts Linear layers alone, and {path} is a Conv1D: .*lora.*svfit"
    ):
        adapter_named(name).check_kinds(layers)
    with pytest.raises(TypeError, match="not supported"):  # if PEFT does by now, it is refused for nothing
        get_peft_model(tiny("gpt2"), adapter_named(name).config([path], {}))
    for other in ("lora", "svfit"):
        adapter_named(other).check_kinds(layers)
        get_peft_model(tiny("gpt2"), adapter_named(other).config([path], {}))


def test_a_size_above_the_width_of_a_layer_does_not_fit_it():
    assert adapter_named("miss").trained([(24, 40)], 40) == 24 * 40
    assert adapter_named("miss").trained([(24, 40)], 41) is None
    assert adapter_named("bone").trained([(24, 40), (24, 36)], 8) is None
    assert adapter_named("bone").size_for([(24, 40), (24, 36)], 10**6) == 4
