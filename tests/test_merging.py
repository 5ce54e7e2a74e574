"""Merging: what comes out of it exactly, what is refused, and what is written."""

import json
import re
from typing import Any

import pytest
import torch
from peft.utils.merge_utils import ties as ties_of_peft
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import transect
from tests.models import VOCABULARY, assert_alike, assert_same_tensors, inputs, logits, tiny
from transect.errors import TransectError
from transect.merging import barrier_of, mergings
from transect.merging.catalog.ties import elected_mean, trimmed
from transect.merging.registry import tensors_of

DATA = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(5))


def near(model, seed, scale=0.01):
    """A model that a short training could have made of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_an_average_is_the_mean_of_every_tensor(name):
    a, b = tiny(name), tiny(name, 1)
    merged = transect.merge([a, b], "average", weights="0.25,0.75").model
    first, second = tensors_of(a), tensors_of(b)
    for key, tensor in tensors_of(merged).items():
        torch.testing.assert_close(tensor, 0.25 * first[key] + 0.75 * second[key])
    assert_same_tensors(a, tiny(name))  # the given ones stay as they are
    assert_same_tensors(b, tiny(name, 1))


@pytest.mark.parametrize("method", ["average", "weight-matching"])
def test_a_share_of_1_is_that_model_bit_for_bit(method):
    a, b = tiny("llama", dtype=torch.bfloat16), tiny("llama", 1, torch.bfloat16)
    assert_same_tensors(transect.merge([a, b], method, weights="1,0").model, a)
    merged = transect.merge([a, b], method, weights="0,1").model
    assert_alike(logits(merged, inputs("llama")), logits(b, inputs("llama")))
    assert merged.dtype == torch.bfloat16


def test_task_arithmetic_adds_and_takes_away():
    base = tiny("llama")
    one, two = near(tiny("llama"), 1), near(tiny("llama"), 2)
    merged = transect.merge([one, two], "task-arithmetic", base=base, scale=1.0).model
    start = tensors_of(base)
    for key, tensor in tensors_of(merged).items():
        torch.testing.assert_close(tensor, tensors_of(one)[key] + tensors_of(two)[key] - start[key])
    untouched = transect.merge([one, two], "task-arithmetic", base=base, scale=0.0).model
    assert_same_tensors(untouched, base)
    doubled = transect.merge([one, one], "task-arithmetic", base=base, scale=0.5).model  # half of the same, twice
    for key, tensor in tensors_of(doubled).items():
        torch.testing.assert_close(tensor, tensors_of(one)[key])


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_ties_of_one_tensor_is_that_of_peft(keep):
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(20, 30, generator=generator) for _ in range(3)]
    ours = elected_mean(torch.stack([trimmed({"w": one}, keep)["w"] for one in updates]))
    torch.testing.assert_close(ours, ties_of_peft(updates, torch.ones(3), keep))


def test_ties_trims_over_all_tensors_together():
    update = {"large": torch.tensor([5.0, -4.0]), "small": torch.tensor([[0.1, -0.2]])}
    kept = trimmed(update, 0.5)
    assert kept["large"].tolist() == [5, -4] and not kept["small"].any()
    assert [int((one != 0).sum()) for one in trimmed(update, 0.01).values()] == [1, 0]  # at least one number stays


def test_ties_of_a_model_and_itself_at_keep_1_is_that_model():
    base, one = tiny("llama"), near(tiny("llama"), 1)
    merged = transect.merge([one, one], "ties", base=base, keep=1.0).model
    for key, tensor in tensors_of(merged).items():
        torch.testing.assert_close(tensor, tensors_of(one)[key])


def shorter(model):
    transect.Anatomy(model).drop_block(0)
    return model


def wider(model):
    mlp: Any = transect.Anatomy(model).blocks[1].mlp
    mlp.keep(range(40))
    return model


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: tiny("qwen2"), "is a 'llama' model and model 2 a 'qwen2' model"),
        (lambda: shorter(tiny("llama", 1)), r"has a tensor model\.layers\.2\..*, and model 2 has none"),
        (lambda: wider(tiny("llama", 1)), r"model\.layers\.1\.mlp\.\w+\.weight is \[\d+, \d+\] in model 1 and \["),
        (lambda: tiny("llama", 1, torch.bfloat16), r"of type float32 in model 1 and bfloat16 in model 2.*--dtype"),
        (lambda: transect.compress(tiny("llama", 1), "svd", keep=0.8), "factors do not add up"),
    ],
)
@pytest.mark.parametrize("method", ["average", "weight-matching"])
def test_models_that_do_not_fit_are_refused_by_the_name_of_the_tensor(other, said, method):
    with pytest.raises(TransectError, match=said):
        transect.merge([tiny("llama"), other()], method)


def words(order):
    found = Tokenizer(models.WordLevel({f"w{word}": number for number, word in enumerate(order)}, "w0"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found)


def test_other_tokenizers_are_refused_by_the_token(tmp_path):
    for name, order in {"a": range(64), "b": [0, 2, 1, *range(3, 64)]}.items():
        tiny("llama").save_pretrained(tmp_path / name)
        words(order).save_pretrained(tmp_path / name)
    with pytest.raises(TransectError, match=r"tokenizers of .* are not the same: 'w1' is number 1 and 2"):
        transect.merge([str(tmp_path / "a"), str(tmp_path / "b")], "average")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(method="magic"), "unknown way to merge 'magic'; known: average"),
        (dict(method="ties"), "needs the model that the others were trained from"),
        (dict(method="average", base=True), "no use for a base"),
        (dict(method="average", weights="0.5"), "2 numbers from 0 that add up to 1"),
        (dict(method="average", weights="0.9,0.9"), "add up to 1"), 
        (dict(method="average", weights="x"), "weights='x'"),
        (dict(method="average", scale=2), "average has no parameter scale"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_work(given, said, tmp_path):
    options = {key: tiny("llama") if key == "base" else value for key, value in given.items()}
    with pytest.raises(TransectError, match=re.escape(said)):
        transect.merge([tiny("llama"), tiny("llama", 1)], out=tmp_path / "out", **options)
    with pytest.raises(TransectError, match="two models or more"):
        transect.merge([tiny("llama")], "average")
    assert not list(tmp_path.iterdir())


def test_a_difference_of_configs_is_said(caplog):
    other = tiny("llama", 1)
    other.config.rms_norm_eps = 0.5
    with caplog.at_level("WARNING", logger="transect"):
        merged = transect.merge([tiny("llama"), other], "average").model
    assert "rms_norm_eps" in caplog.text and merged.config.rms_norm_eps != 0.5


@pytest.mark.parametrize("method", [entry.name for entry in mergings()])
def test_what_is_written_is_an_ordinary_checkpoint(method, tmp_path):
    base = {"base": tiny("llama")} if next(one for one in mergings() if one.name == method).needs_base else {}
    given = [near(tiny("llama"), 1), near(tiny("llama"), 2)]
    merged = transect.merge(given, method, out=tmp_path / "m", curve=DATA, points=3, **base)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert_same_tensors(again, merged.model)
    assert (tmp_path / "m" / "curve.png").read_bytes()[1:4] == b"PNG"
    outcome = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert outcome == json.loads(json.dumps(merged.outcome))
    assert [name for name, _ in outcome["losses"]] == ["model 1", "model 2", "merged"]
    curve = outcome["curves"]["as they are"]
    assert curve["shares"] == [0, 0.5, 1] and [curve["losses"][0], curve["losses"][-1]] == [
        loss for _, loss in outcome["losses"][:2]
    ]
    assert curve["barrier"] == barrier_of(curve["shares"], curve["losses"])
    assert not (tmp_path / "m" / "modeling_transect.py").exists()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["transect"]["history"][-1]["merge"] == outcome


def test_a_barrier_is_how_far_the_loss_rises_above_the_straight_line():
    assert barrier_of([0, 0.5, 1], [1.0, 3.0, 2.0]) == pytest.approx(1.5)
    assert barrier_of([0, 0.5, 1], [1.0, 0.5, 2.0]) == 0  # below it: none
