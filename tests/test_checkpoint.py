"""Saving and loading changed models: in this process, and in fresh ones with Transect, without, and with neither."""

import copy
import gc
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from transect.anatomy import Anatomy, StructureRecord, record_of
from transect.checkpoint import check_folder, modeling_file, open_model, replay, save
from transect.checkpoint.modeling_file import modeling_source
from transect.operators import LowRank, operator_kinds

from .models import (
    CAUSAL,
    CONFIGS,
    TOLERANCE,
    VOCABULARY,
    assert_alike,
    assert_same_model,
    assert_same_tensors,
    inputs,
    logits,
    tiny,
)


def low_rank(matrix, rank=5):
    left, values, right = torch.linalg.svd(matrix.weight.float(), full_matrices=False)
    left = (left[:, :rank] * values[:rank]).to(matrix.weight.dtype)
    matrix.replace(LowRank.from_factors(left, right[:rank].to(matrix.weight.dtype), matrix.bias))


def change(model):
    """A low-rank q and up, fewer heads in one block, fewer neurons in another."""
    first, second, third = Anatomy(model).blocks
    low_rank(first.matrix("q"))
    low_rank(second.matrix("up"))
    attention = second.attention
    attention.keep(range(attention.heads // attention.key_value_heads, attention.heads))
    third.mlp.keep(range(5, 40))
    return model


def same_size_everywhere(model):
    for block in Anatomy(model).blocks:
        block.mlp.keep(range(block.index, 20 + block.index))
    return model


def two_heads_everywhere(model):
    for block in Anatomy(same_size_everywhere(model)).blocks:
        block.attention.keep([2, 3])
    return model


def drop_attention(model):
    Anatomy(model).blocks[0].attention.drop()
    return model


def drop_mlp(model):
    Anatomy(model).blocks[1].mlp.drop()
    return model


def drop_middle_block(model):
    Anatomy(model).drop_block(1)
    return model


def replace_linear(role, bias):
    """A dense stand-in of the same shape; with a bias where there was none, no tensor's shape tells."""

    def replace(model):
        matrix = Anatomy(model).blocks[0].matrix(role)
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias)
        linear.weight.data = matrix.weight.clone()
        matrix.replace(linear)
        return model

    return replace


def only_up(model):
    low_rank(Anatomy(model).blocks[1].matrix("up"))
    return model


STRUCTURED = {name: (name, change) for name in CONFIGS} | {
    "llama-attention-dropped": ("llama", drop_attention),
    "gpt2-attention-dropped": ("gpt2", drop_attention),
    "qwen2-mlp-dropped": ("qwen2", drop_mlp),
    "gpt2-mlp-dropped": ("gpt2", drop_mlp),
    "gpt2-fused": ("gpt2", lambda model: low_rank(Anatomy(model).blocks[0].matrix("q")) or model),
    "gpt_neox-fused": ("gpt_neox", lambda model: low_rank(Anatomy(model).blocks[0].matrix("v")) or model),
    "phi3-fused": ("phi3", only_up),
    "llama-low-rank": ("llama", only_up),
    "llama-new-bias": ("llama", replace_linear("q", bias=True)),
    "bert-lost-heads": ("bert", lambda model: Anatomy(model).blocks[0].attention.keep([0, 1]) or model),
}
PLAIN = {
    "llama-uniform": ("llama", two_heads_everywhere),
    "phi3-uniform": ("phi3", two_heads_everywhere),
    "qwen3-uniform": ("qwen3", two_heads_everywhere),
    "olmo2-uniform": ("olmo2", two_heads_everywhere),
    "vit-uniform": ("vit", two_heads_everywhere),
    "gpt2-neurons": ("gpt2", same_size_everywhere),
    "bert-neurons": ("bert", same_size_everywhere),
    "gpt2-block-dropped": ("gpt2", drop_middle_block),
    "gemma3-block-dropped": ("gemma3", drop_middle_block),
    "gpt2-square-linear": ("gpt2", replace_linear("o", bias=True)),
    "gpt2-linear-without-bias": ("gpt2", replace_linear("up", bias=False)),
}

CHILD = """
import json, os, sys
from pathlib import Path
root, mode = Path(sys.argv[1]), sys.argv[2]
import torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error()
if mode == "with":
    import transect.checkpoint
else:
    sys.modules["transect"] = None  # not importable
from tests.models import CONFIGS, apart, inputs, logits

def attempt(name, arch, load):
    try:
        model = load()
        expected = torch.load(root / (name + ".pt"), weights_only=True)
        return [apart(logits(model, inputs(arch)), expected), type(model).__module__]
    except Exception as error:
        return [type(error).__name__ + ": " + str(error), None]

results = {}
AGAIN = ("gpt2", "phi3", "vit", "bert", "gemma3", "llama-attention-dropped", "qwen3-uniform")
for name, arch in json.loads((root / "list.json").read_text()).items():
    auto, folder = CONFIGS[arch][1], root / name
    named = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    if mode == "trust":
        results[name + " auto"] = attempt(name, arch, lambda: auto.from_pretrained(folder, trust_remote_code=True))
        if name in AGAIN:
            auto.from_pretrained(folder, trust_remote_code=True).save_pretrained(root / (name + "-again"))
            again = lambda: auto.from_pretrained(root / (name + "-again"), trust_remote_code=True)
            results[name + " again"] = attempt(name, arch, again)
    else:
        results[name + " auto"] = attempt(name, arch, lambda: auto.from_pretrained(folder))
    if mode == "neither":
        results[name + " named"] = attempt(name, arch, lambda: named.from_pretrained(folder))
    if mode == "neither":
        assert sys.modules["transect"] is None
        flat = root / (name + "-flat")  # an older transformers, which knows no per_layer_config
        flat.mkdir()
        config = json.loads((folder / "config.json").read_text())
        config.pop("per_layer_config", None)
        (flat / "config.json").write_text(json.dumps(config))
        os.link(folder / "model.safetensors", flat / "model.safetensors")
        results[name + " flat"] = attempt(name, arch, lambda: auto.from_pretrained(flat))
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (arch, edit) in (STRUCTURED | PLAIN).items():
        model = edit(tiny(arch))
        torch.save(logits(model, inputs(arch)), root / f"{name}.pt")
        model.save_pretrained(root / name)
    (root / "list.json").write_text(json.dumps({name: arch for name, (arch, _) in (STRUCTURED | PLAIN).items()}))
    return root


def in_fresh_process(elsewhere, root, mode):
    return json.loads(elsewhere.python(CHILD, root, mode).rpartition("RESULTS")[2])


def test_a_fresh_process_with_transect_loads_everything(root, elsewhere):
    for what, (difference, module) in in_fresh_process(elsewhere, root, "with").items():
        assert difference <= TOLERANCE[torch.float32], what
        assert module.startswith("transformers.models."), what  # the folder's own code was neither run nor asked for


def test_a_fresh_process_without_transect_loads_everything_through_the_folders_own_code(root, elsewhere):
    for what, (difference, module) in in_fresh_process(elsewhere, root, "trust").items():
        assert difference <= TOLERANCE[torch.float32], what
        assert module.startswith("transformers_modules." if what.split()[0] in STRUCTURED else "transformers."), what


def test_a_fresh_process_with_neither_refuses_what_is_not_plain(root, elsewhere):
    for what, (outcome, _) in in_fresh_process(elsewhere, root, "neither").items():
        if what.split()[0] in PLAIN:
            assert isinstance(outcome, float) and outcome <= TOLERANCE[torch.float32], what
        else:
            assert isinstance(outcome, str), f"{what} was loaded without its structure"
            assert "per-layer" in outcome or "mismatched" in outcome or "import it, or pass" in outcome, outcome


def test_plain_results_need_nothing(root):
    for name in PLAIN:
        config = json.loads((root / name / "config.json").read_text())
        assert not {"quantization_config", "auto_map", "per_layer_config"} & set(config), name
        assert not list((root / name).glob("*.py"))
    config = json.loads((root / "llama-uniform" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    assert config["intermediate_size"] == 20
    assert json.loads((root / "gpt2-neurons" / "config.json").read_text())["n_inner"] == 20


def test_sizes_that_differ_by_layer_are_in_per_layer_config(root):
    model = AutoModelForCausalLM.from_pretrained(root / "mistral")
    written = json.loads((root / "mistral" / "config.json").read_text())["per_layer_config"]
    assert written == {"1": {"num_attention_heads": 2, "num_key_value_heads": 1}, "2": {"intermediate_size": 35}}
    assert [layer.intermediate_size for layer in model.config.per_layer_config] == [48, 48, 35]
    assert model.config.intermediate_size == 48
    for name, unit in (("llama-attention-dropped", "attention"), ("qwen2-mlp-dropped", "mlp")):
        table = json.loads((root / name / "config.json").read_text())["per_layer_config"]
        assert [entry["skip"] for entry in table.values()] == [[unit]]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_can_be_changed_and_saved_again(root, name, tmp_path):
    model = CONFIGS[name][1].from_pretrained(root / name)
    low_rank(Anatomy(model).blocks[2].matrix("v"))
    Anatomy(model).blocks[0].mlp.keep(range(30))
    if name not in ("bert", "roberta"):
        Anatomy(model).drop_block(1)
    model.save_pretrained(tmp_path / "again")
    check_folder(tmp_path / "again")
    again = CONFIGS[name][1].from_pretrained(tmp_path / "again")
    assert_same_model(again, model, inputs(name))
    assert record_of(again).modules == record_of(model).modules


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_the_cache_equals_generation_without(root, name):
    model = AutoModelForCausalLM.from_pretrained(root / name)
    ids = inputs(name)["input_ids"]
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, use_cache=False))


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "llama-attention-dropped", "qwen2-mlp-dropped"])
def test_shards_dtype_and_device_map(root, name, tmp_path):
    arch = STRUCTURED[name][0]
    expected = torch.load(root / f"{name}.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(root / name, device_map="cpu")
    assert_alike(logits(model, inputs(arch)), expected)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    check_folder(tmp_path / "sharded")
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", device_map="auto")
    assert_same_tensors(spread, model)
    assert_alike(logits(spread, inputs(arch)), expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(half, inputs(arch)).float(), expected, atol=0.5, rtol=0.1)
    half.save_pretrained(tmp_path / "half")
    assert next(AutoModelForCausalLM.from_pretrained(tmp_path / "half").parameters()).dtype == torch.bfloat16


def test_a_loaded_model_is_an_ordinary_one(root):
    """It can be cast, trained, copied and pickled; each copy saves its own weights."""
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "_is_quantized")
    model.double().float()
    model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        twin.save_pretrained(root / "twin")
        loaded = AutoModelForCausalLM.from_pretrained(root / "twin")
        assert loaded.lm_head.weight.abs().sum() == 0 < model.lm_head.weight.abs().sum()
        assert record_of(loaded).modules == record_of(model).modules


def test_the_same_body_loads_under_another_head_or_none(root):
    body = AutoModel.from_pretrained(root / "llama")
    whole = AutoModelForCausalLM.from_pretrained(root / "llama")
    ids = inputs("llama")["input_ids"]
    with torch.no_grad():
        assert_same_tensors(body, whole.model)
        assert_alike(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    assert "layers.0.self_attn.q_proj" in record_of(body).modules


def test_replaying_twice_is_replaying_once():
    model, skeleton = change(tiny("phi3")), tiny("phi3")
    drop_attention(model)
    for _ in range(2):
        replay(skeleton, record_of(model))
        skeleton.load_state_dict(model.state_dict())
        assert_same_model(skeleton, model, inputs("phi3"))


def test_an_attention_implementation_may_be_chosen(root):
    for name in ("llama", "llama-new-bias"):
        model = AutoModelForCausalLM.from_pretrained(root / name, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
    assert AutoModelForCausalLM.from_pretrained(root / "llama-new-bias").config._attn_implementation == "sdpa"


def test_dense_edits_and_history_are_kept(tmp_path):
    model = tiny("llama")
    record_of(model).history.append({"method": "rome"})
    matrix = Anatomy(model).blocks[0].mlp.down
    matrix.write(matrix.weight * 2)
    model.save_pretrained(tmp_path / "edited")
    config = json.loads((tmp_path / "edited" / "config.json").read_text())
    assert "quantization_config" not in config and "auto_map" not in config
    opened = open_model(tmp_path / "edited")
    assert record_of(opened.model).history == [{"method": "rome"}]
    change(opened.model).save_pretrained(tmp_path / "more")
    assert record_of(open_model(tmp_path / "more").model).history == [{"method": "rome"}]


def test_every_operator_can_be_put_into_the_modeling_file():
    """Self-contained: it compiles, needs nothing of Transect, and no two definitions share a name."""
    record = StructureRecord(modules={kind: {"kind": kind} for kind in operator_kinds()})
    source = modeling_source(LlamaForCausalLM, record)
    modeling_file._definitions.cache_clear()
    assert source == modeling_source(LlamaForCausalLM, record)
    compile(source, "modeling_transect.py", "exec")
    assert "import transect" not in source and "from transect" not in source and "from ." not in source


def test_an_operator_without_source_is_saved_all_the_same(tmp_path):
    namespace = {"LowRank": LowRank, "__name__": "typed_in"}
    exec("class Typed(LowRank):\n    kind = 'typed'", namespace)
    sys.modules["typed_in"] = type(sys)("typed_in")
    try:
        model = tiny("llama")
        matrix = Anatomy(model).blocks[0].matrix("q")
        matrix.replace(namespace["Typed"].from_factors(matrix.weight.clone(), torch.eye(32)))
        with pytest.warns(UserWarning, match="imported"):
            model.save_pretrained(tmp_path / "typed")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "typed")
        assert_same_model(again, model, inputs("llama"))
    finally:
        del sys.modules["typed_in"], namespace, matrix, model, again
        gc.collect()  # other tests list the operators that exist


def tokenizer(size=VOCABULARY):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1")


def test_open_model(root, tmp_path):
    save(change(tiny("llama")), tmp_path / "m", tokenizer())
    opened = open_model(tmp_path / "m", dtype=torch.float64, device="cpu")
    assert (opened.source, opened.path) == (str(tmp_path / "m"), tmp_path / "m")
    assert opened.tokenizer("w5 w7")["input_ids"] == [5, 7] and opened.processor is None
    assert opened.model.dtype == torch.float64 and not opened.model.training
    for name in ("bert", "vit", "gpt2-mlp-dropped", "vit-uniform"):
        opened = open_model(root / name)
        arch = (STRUCTURED | PLAIN)[name][0]
        assert_alike(logits(opened.model, inputs(arch)), torch.load(root / f"{name}.pt", weights_only=True))
        assert opened.tokenizer is None


def test_the_tokenizer_goes_along(tmp_path):
    """Given, or attached by `open_model`, or found where the model came from."""
    save(tiny("llama"), tmp_path / "a", tokenizer())
    open_model(tmp_path / "a").model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "tokenizer.json").exists()  # unchanged: transformers' own save_pretrained
    change(open_model(tmp_path / "a").model).save_pretrained(tmp_path / "b")
    change(AutoModelForCausalLM.from_pretrained(tmp_path / "a")).save_pretrained(tmp_path / "c")
    for name in "abc":
        assert AutoTokenizer.from_pretrained(tmp_path / name)("w5")["input_ids"] == [5]


def test_a_folder_is_replaced_but_foreign_files_stay(tmp_path):
    """A tokenizer saved before the model, a trainer's state, a README: none of these are ours to delete."""
    folder = tmp_path / "m"
    tokenizer().save_pretrained(folder)
    (folder / "state").mkdir()
    (folder / "state" / "optimizer").write_text("o")
    change(tiny("llama")).save_pretrained(folder, max_shard_size="10KB")
    assert AutoModelForCausalLM.from_pretrained(folder) and (folder / "tokenizer.json").exists()
    model = same_size_everywhere(tiny("llama"))
    model.save_pretrained(folder)  # plain, and in one file
    assert not list(folder.glob("model-*")) and not list(folder.glob("*.py"))
    assert (folder / "state" / "optimizer").read_text() == "o" and (folder / "tokenizer.json").exists()
    assert_same_model(AutoModelForCausalLM.from_pretrained(folder), model, inputs("llama"))
    model = open_model(folder).model  # over the very files that it was loaded from
    only_up(model).save_pretrained(folder)
    assert_same_model(open_model(folder).model, model, inputs("llama"))


@pytest.mark.parametrize("way", [".", "relative", "link"])
def test_a_folder_that_is_there_keeps_the_user_s_files_and_links(tmp_path, monkeypatch, way):
    """The current directory is the same folder before and after, and so are the user's files and links everywhere."""
    folder = tmp_path / "m"
    save(tiny("llama", seed=1), folder)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    number, notes = folder.stat().st_ino, (folder / "notes.txt").stat().st_ino
    monkeypatch.chdir(folder if way == "." else tmp_path)
    model = change(tiny("llama"))
    model.save_pretrained({".": ".", "relative": "m", "link": "link"}[way])
    assert (folder / "notes.txt").stat().st_ino == notes
    assert folder.stat().st_ino == number or way != "."
    assert (tmp_path / "link").is_symlink() and Path.cwd().exists()
    assert not [name for name in [*os.listdir(folder), *os.listdir(tmp_path)] if name.startswith(".")]
    again = AutoModelForCausalLM.from_pretrained(".") if way == "." else AutoModelForCausalLM.from_pretrained(folder)
    assert_same_model(again, model, inputs("llama"))


def test_tensors_are_those_of_the_modules(root):
    state = load_file(root / "llama-low-rank" / "model.safetensors")
    path = "model.layers.1.mlp.up_proj"
    assert {name.removeprefix(path): list(tensor.shape) for name, tensor in state.items() if name.startswith(path)} == {
        ".weight": [0], ".left.weight": [48, 5], ".right.weight": [5, 32],
    }  # fmt: skip
