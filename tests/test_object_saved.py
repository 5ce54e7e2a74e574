"""The object that was changed and the object that is saved may be different views of one model."""

import copy
import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

import transect
from transect.anatomy import Anatomy, record_of
from transect.checkpoint import open_model, save
from transect.errors import TransectError

from .models import VOCABULARY, assert_same_model, inputs, logits, tiny
from .test_checkpoint import change, low_rank

VIEWS = {
    "outer": lambda model: model,
    "inner": lambda model: model.base_model,
    "compiled outer": lambda model: torch.compile(model, backend="eager"),
    "compiled inner": lambda model: torch.compile(model.base_model, backend="eager"),
    "parallel": nn.DataParallel,
}
LORA = dict(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def hidden(model):
    with torch.no_grad():
        return model(**inputs("llama")).last_hidden_state


def loaded(folder):
    """The language model in a folder, by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def same(folder, model):
    """Whether the folder holds the model's tensors, bit for bit, and computes what it does."""
    again = loaded(folder)
    assert_same_model(again, model, inputs("llama"))
    return again


@pytest.mark.parametrize("saved", ["outer", "inner", "compiled outer", "compiled inner"])
@pytest.mark.parametrize("changed", list(VIEWS))
def test_whatever_was_changed_whatever_is_saved(tmp_path, changed, saved):
    model = tiny("llama")
    change(VIEWS[changed](model))
    VIEWS[saved](model).save_pretrained(tmp_path)
    if saved.endswith("outer"):
        again = same(tmp_path, model)
        assert record_of(again).modules == record_of(model).modules
    else:
        torch.testing.assert_close(hidden(AutoModel.from_pretrained(tmp_path).eval()), hidden(model.base_model))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_the_record_is_one_from_inside_and_outside(tmp_path, name):
    model = tiny(name)
    inside, outside = Anatomy(model.base_model), Anatomy(model)
    inside.blocks[2].mlp.keep(range(9))
    outside.drop_block(0)
    low_rank(inside.blocks[0].matrix("q"))
    prefix = model.base_model_prefix + "."
    assert {prefix + path for path in inside.record.modules} == set(outside.record.modules)
    assert len({path.split(".")[-3] for path in inside.record.modules}) > 0
    record_of(model).modules = {}  # also when a table is set as a whole
    assert not inside.record
    with pytest.raises(TransectError, match=r"q.*no structure record names|attn.*no structure record names"):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_compress_returns_what_it_was_given_and_a_compiled_model_computes_the_new_thing():
    model = tiny("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1  # each is traced, for seconds
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled, inputs("llama"))
    assert transect.compress(compiled, "svd", keep=0.5) is compiled
    assert not torch.equal(logits(compiled, inputs("llama")), before)
    torch.testing.assert_close(logits(compiled, inputs("llama")), logits(model, inputs("llama")))


def test_blocks_compiled_one_by_one(tmp_path):
    model = tiny("llama")
    plain = change(copy.deepcopy(model))
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    change(model).save_pretrained(tmp_path)
    same(tmp_path, plain)


def test_an_operator_moved_by_hand_is_not_saved_as_if_it_would_load(tmp_path):
    model, other = change(tiny("llama")), tiny("llama")
    other.model.layers[0].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(TransectError, match=r"layers\.0\.self_attn\.q_proj holds a LowRank that no structure record"):
        other.save_pretrained(tmp_path / "moved")
    other.model.layers[0].self_attn.q_proj = nn.Linear(32, 20, bias=False)
    Anatomy(other).blocks[2].mlp.keep(range(30))
    with pytest.raises(TransectError, match=r"q_proj\.weight is \[20, 32\], and by LlamaForCausalLM's config"):
        other.save_pretrained(tmp_path / "moved")
    assert not (tmp_path / "moved").exists()
    other.model.layers = model.model.layers  # and with what was recorded of them
    with pytest.raises(TransectError, match="no structure record"):
        other.save_pretrained(tmp_path / "moved")


def test_hooks_of_accelerate_do_not_matter(tmp_path):
    model = tiny("llama")
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    change(model).save_pretrained(tmp_path)
    same(tmp_path, model)


def test_a_pipeline_stands_for_its_model(tmp_path):
    opened = open_model("organism")
    pipe = pipeline("text-generation", model=opened.model, tokenizer=opened.tokenizer)
    assert transect.compress(pipe, "svd", keep=0.6) is pipe
    pipe.save_pretrained(tmp_path)
    again = pipeline("text-generation", model=str(tmp_path))
    ids = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, opened.model(ids).logits)
    assert again("the", max_new_tokens=3, do_sample=False) == pipe("the", max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("how", ["peft", "transformers"])
def test_an_adapter_on_a_changed_model_is_saved_with_its_base(tmp_path, how):
    model = change(tiny("llama"))
    model.name_or_path = "the-dense-one"
    adapted = get_peft_model(model, LoraConfig(**LORA)) if how == "peft" else model
    if how == "transformers":
        model.add_adapter(LoraConfig(**LORA))
    expected = logits(adapted, inputs("llama"))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "adapter" / "base")
    for load in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        again = load.from_pretrained(tmp_path / "adapter", dtype="auto").eval()
        torch.testing.assert_close(logits(again, inputs("llama")), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TransectError, match="carries an adapter"):
        save(adapted, tmp_path / "whole")


@pytest.mark.parametrize("by", ["saving", "loading"])
def test_a_base_that_is_on_disk_is_named_and_not_saved_again(tmp_path, by):
    model = change(tiny("llama"))
    model.save_pretrained(tmp_path / "small")
    if by == "loading":
        model = loaded(tmp_path / "small")
    model.add_adapter(LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "small") and not (tmp_path / "adapter" / "base").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload().eval()
    Anatomy(model).blocks[0].mlp.keep(range(7))  # from now on it is not what is there
    model.add_adapter(LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "adapter" / "base")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "adapter"), inputs("llama")), logits(model, inputs("llama")), rtol=1e-5, atol=1e-5
    )


def test_a_merged_adapter_is_in_the_saved_model(tmp_path):
    model = change(tiny("llama"))
    adapted = get_peft_model(model, LoraConfig(**{**LORA, "target_modules": "all-linear"})).eval()
    expected = logits(adapted, inputs("llama"))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs("llama")), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert not torch.equal(
        logits(same(tmp_path, merged), inputs("llama")), logits(change(tiny("llama")), inputs("llama"))
    )
    assert Anatomy(merged).record.modules  # and it can be opened up again


def test_peft_may_be_imported_after_transect(elsewhere):
    """This process imported it before."""
    code = """
import sys, transect
assert "peft" not in sys.modules
from peft import PeftModel
assert PeftModel.save_pretrained.completes_adapter
"""
    elsewhere.python(code)


@pytest.mark.parametrize("kind", ["plain", "compiled", "peft"])
def test_the_trainer_saves_it(tmp_path, kind):
    model = change(tiny("llama"))
    if kind == "peft":
        model = get_peft_model(model, LoraConfig(**LORA))
    settings = TrainingArguments(
        tmp_path / "run", use_cpu=True, max_steps=1, report_to=[], torch_compile=kind == "compiled",
        torch_compile_backend="eager" if kind == "compiled" else None, save_strategy="no",
    )  # fmt: skip
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out"), inputs("llama")), logits(model.eval(), inputs("llama")), rtol=1e-5, atol=1e-5
    )
