"""What every registered method owes its user, whatever it does: a budget kept, a checkpoint that loads, streaming."""

import copy
from functools import cache

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.compression import method as registered
from transect.errors import OutOfReach, TransectError

from .models import VOCABULARY, assert_same_model, assert_same_tensors, tiny

# expert-count is for mixtures of experts: test_experts.py
METHODS = [method.name for method in transect.methods() if method.name != "expert-count"]
BLOCKWISE = [method.name for method in transect.methods() if method.family != "restructuring"]
KEEP = 0.7
DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
# Sharing the attention matrices alone cannot keep less of a model whose MLPs are larger.
KEEPS = {"masa": 0.9}
# What takes long at its defaults, made short; the mathematics has tests of its own.
QUICK = {
    "cospadi": {"iterations": 2}, "cospadi-shared": {"iterations": 2}, "armor": {"rounds": 3},
    "fusegpt": {"epochs": 1}, "jlcm": {"steps": 5}, "mixed": {"iterations": 2}, "caldera": {"rounds": 2},
    "dsformer": {"iterations": 2},
}  # fmt: skip
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def compressed(method, keep=None, **options):
    keep = keep or KEEPS.get(method, KEEP)
    return transect.compress(tiny("llama"), method, keep, DATA, **QUICK.get(method, {}), **options)


@cache
def made(method):
    """The compressed model, which several tests look at and none changes."""
    return compressed(method)


def assert_the_disk_holds(folder, outcome, number_bytes):
    """A compressed tiny Llama, of so many bytes a number when it was dense: what was reported, within the budget."""
    stored = 0
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if name.endswith(".weight_shape"):  # of compressed-tensors: two numbers a matrix, no part of it
                continue
            stored += tensor.numel() * tensor.element_size() * any(matrix in name for matrix in MATRICES)
    dense = sum(matrix.weight.numel() for matrix in Anatomy(tiny("llama")).matrices())
    assert outcome["dense_matrix_bytes"] == dense * number_bytes
    assert stored == outcome["matrix_bytes"] <= KEEP * outcome["dense_matrix_bytes"] * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_kept_and_the_result_loads_and_generates(method, tmp_path):
    dense = Anatomy(tiny("llama")).matrix_bytes()
    model = made(method)
    kept = Anatomy(model).matrix_bytes()
    least = 0.1 if registered(method).even or method == "mixed" else 0.4  # integers: so many bits, and none between
    assert least * dense < kept <= KEEPS.get(method, KEEP) * dense * (1 + 1e-9)
    history = Anatomy(model).record.history[-1]
    assert history["compress"]["method"] == method and history["kept"] == pytest.approx(kept / dense)
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same_model(loaded, model, {"input_ids": DATA[:2]})
    with torch.no_grad():
        whole = model(DATA[:2]).logits
        assert torch.isfinite(whole).all()
        cached = loaded(DATA[:2, :9], use_cache=True)
        steps = [cached.logits]
        for position in range(9, 16):
            cached = loaded(DATA[:2, position : position + 1], past_key_values=cached.past_key_values, use_cache=True)
            steps.append(cached.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-3)
    assert loaded.generate(DATA[:1, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)
    # A second generation: what was loaded can be saved and copied like any model.
    copy.deepcopy(loaded).bfloat16().save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_what_it_puts_into_a_model_lies_in_memory_as_loading_lays_it_out(method):
    """Among fused and transposed matrices. Products round differently for another layout of the same numbers."""
    model = transect.compress(tiny("gpt2"), method, KEEPS.get(method, KEEP), DATA, **QUICK.get(method, {}))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.stride() == torch.empty(tensor.shape).stride(), name


@pytest.mark.parametrize("method", METHODS)
def test_it_is_reproducible_and_keeping_everything_changes_nothing(method):
    assert_same_tensors(compressed(method), made(method))
    assert_same_model(compressed(method, keep=1.0), tiny("llama"), {"input_ids": DATA[:2]})


@pytest.mark.parametrize("method", METHODS)
def test_nan_weights_and_impossible_budgets_are_refused_and_change_nothing(method):
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OutOfReach):
        transect.compress(model, method, 0.002, DATA)
    for keep in (0, 1.5):
        with pytest.raises(TransectError, match="above 0 and at most 1"):
            transect.compress(model, method, keep, DATA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    Anatomy(model).blocks[1].mlp.up.weight[0, 0] = float("nan")
    with pytest.raises(TransectError, match="NaN"):
        transect.compress(model, method, KEEPS.get(method, KEEP), DATA)


@pytest.mark.parametrize("method", BLOCKWISE)
def test_streaming_gives_the_same_model(method, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    outcome = transect.compress(
        tmp_path / "dense", method, KEEP, DATA, stream_to=tmp_path / "small", **QUICK.get(method, {})
    )
    assert_the_disk_holds(tmp_path / "small", outcome, number_bytes=4)
    model = made(method)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert outcome["kept"] == pytest.approx(Anatomy(model).record.history[-1]["kept"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(DATA[:2]).logits, model(DATA[:2]).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in BLOCKWISE])
def test_what_needs_the_whole_model_is_not_streamed(method, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(TransectError, match="whole"):
        transect.compress(tmp_path / "dense", method, KEEPS.get(method, KEEP), DATA, stream_to=tmp_path / "small")


@pytest.mark.parametrize("method", [m.name for m in transect.methods() if m.family != "restructuring" and m.needs])
def test_calibrating_on_compressed_blocks(method):
    model = compressed(method, sequential=True)
    assert Anatomy(model).matrix_bytes() <= KEEP * Anatomy(tiny("llama")).matrix_bytes() * (1 + 1e-9)
    with torch.no_grad():
        assert torch.isfinite(model(DATA[:2]).logits).all()


def test_a_comparison_of_every_method(tmp_path):
    """One statistics pass serves all; a method that cannot keep so little has a note instead of numbers."""
    frame = transect.compare(
        tiny("llama"), METHODS, [0.9, 0.45], DATA, DATA[:4], tmp_path / "run", settings=QUICK
    )  # fmt: skip
    assert set(frame["method"]) == {"dense", *METHODS}
    measured = frame[frame["loss"].notna()]
    assert set(measured[measured["keep"] == 0.9]["method"]) == set(METHODS)
    assert (measured["kept"] <= measured["keep"] + 1e-9).all()
    unreachable = frame[frame["loss"].isna()]
    assert 0.9 not in set(unreachable["keep"]) and unreachable["note"].notna().all()
    again = transect.compare(
        tiny("llama"), METHODS, [0.9, 0.45], DATA, DATA[:4], tmp_path / "run", settings=QUICK
    )  # fmt: skip
    pd.testing.assert_frame_equal(again, frame)  # everything was there already
