"""Integers as compressed-tensors stores them: read without Transect, read back bit for bit, and what is neither."""

import json
import logging
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, CompressedTensorsConfig

import transect
from transect.anatomy import Anatomy, record_of
from transect.checkpoint import check_folder, open_model, save
from transect.checkpoint.packed import pack_rows, unpack_rows
from transect.compression import method
from transect.errors import BadCheckpoint, TransectError
from transect.operators import LowRank
from transect.operators.grouped_integer import GroupedInteger

from .models import TOLERANCE, VOCABULARY, apart, assert_same_model, assert_same_tensors, inputs, logits, tiny
from .reliability.damage import JUNK, attempt, changed, copied
from .reliability.folders import Q, edit, edit_weights


def rounded(arch, roles=None, **settings):
    """A tiny model whose matrices (of those roles) are rounded. settings: of `rtn`, by role where they are a dict."""
    model = tiny(arch)
    for matrix in Anatomy(model).matrices(roles):
        given = {key: value[matrix.role] if isinstance(value, dict) else value for key, value in settings.items()}
        made = method("rtn").function(matrix.weight, **given)
        made.set_bias(matrix.bias)
        matrix.replace(made)
    return model


KINDS = {role: 8 if role in ("q", "k", "v", "up", "gate") else 4 for role in ("q", "k", "v", "o", "gate", "up", "down")}
PACKED = {
    "4 bits": ("llama", lambda: rounded("llama", bits=4, group=16)),
    "4 bits, symmetric": ("llama", lambda: rounded("llama", bits=4, group=16, symmetric=True)),
    "8 bits": ("llama", lambda: rounded("llama", bits=8, group=8)),
    "8 bits, symmetric, whole rows": ("llama", lambda: rounded("llama", bits=8, group=64, symmetric=True)),
    "2 bits, words that are not full": ("llama", lambda: rounded("llama", bits=2, group=8)),
    "two widths, symmetric": ("llama", lambda: rounded("llama", bits=KINDS, group=16, symmetric=True)),
    "some matrices, biases": ("qwen2", lambda: rounded("qwen2", ["q", "down"], bits=4, group=16)),
    "biases everywhere": ("opt", lambda: rounded("opt", bits=4, group=16)),
    "bfloat16": ("llama", lambda: rounded("llama", bits=8, group=16).bfloat16()),
}  # fmt: skip

CHILD = """
import json, sys
from pathlib import Path
root = Path(sys.argv[1])
sys.modules["transect"] = None  # not importable
import torch
from transformers import AutoModelForCausalLM
from tests.models import apart, inputs, logits
results = {}
for name, arch in json.loads((root / "list.json").read_text()).items():
    model = AutoModelForCausalLM.from_pretrained(root / name)
    results[name] = apart(logits(model, inputs(arch)), torch.load(root / (name + ".pt"), weights_only=True))
    assert model.generate(**inputs(arch), max_new_tokens=2, do_sample=False).shape[1] > 2
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    for name, (arch, make) in PACKED.items():
        model = make()
        torch.save(logits(model, inputs(arch)), root / f"{name}.pt")
        model.save_pretrained(root / name)
    (root / "list.json").write_text(json.dumps({name: arch for name, (arch, _) in PACKED.items()}))
    return root


@pytest.fixture
def folder(root, tmp_path):
    return copied(root / "4 bits", tmp_path / "m")


def settings_of(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config", {})


# who reads it


def test_a_fresh_process_without_transect_finds_the_same_logits(root, elsewhere):
    pytest.importorskip("compressed_tensors")
    found = json.loads(elsewhere.python(CHILD, root).rpartition("RESULTS")[2])
    assert set(found) == set(PACKED)
    for name, difference in found.items():
        assert difference <= TOLERANCE[torch.bfloat16 if name == "bfloat16" else torch.float32], name


@pytest.mark.parametrize("name", PACKED)
def test_transect_reads_the_same_operators_and_writes_the_same_folder(root, name, tmp_path):
    arch, make = PACKED[name]
    model, folder = make(), root / name
    assert settings_of(folder)["quant_method"] == "compressed-tensors" and not list(folder.glob("*.py"))
    check_folder(folder)
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), open_model(folder).model):
        assert_same_tensors(loaded, model)
        assert_same_model(loaded, model, inputs(arch))
        kinds = {path: type(module) for path, module in model.named_modules()}
        assert {path: type(module) for path, module in loaded.named_modules()} == kinds
        loaded.save_pretrained(tmp_path / "again")
        assert settings_of(tmp_path / "again") == settings_of(folder)
        first, again = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def test_the_history_stays_and_what_was_loaded_can_be_changed(root, tmp_path):
    model = tiny("llama")
    transect.compress(model, "rtn", 0.2, group=16, symmetric=True)
    save(model, tmp_path / "m")
    assert settings_of(tmp_path / "m")["quant_method"] == "compressed-tensors"
    opened = open_model(tmp_path / "m").model
    assert record_of(opened).history == record_of(model).history and len(record_of(model).history) == 1
    for loaded in (opened, AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)):
        assert sum(isinstance(matrix.module, GroupedInteger) for matrix in Anatomy(loaded).matrices()) == 21
        Anatomy(loaded).drop_block(1)
        save(loaded, tmp_path / "again", overwrite=True)
        assert settings_of(tmp_path / "again") == settings_of(tmp_path / "m")  # a block less is an ordinary model too
        again = open_model(tmp_path / "again").model
        assert_same_model(again, loaded, inputs("llama"))
        assert record_of(again).history == record_of(model).history
    body = AutoModel.from_pretrained(tmp_path / "m")
    assert_same_tensors(body, AutoModelForCausalLM.from_pretrained(tmp_path / "m").model)


def test_shards_and_offloading(root, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(root / "4 bits", device_map="cpu")
    model.save_pretrained(tmp_path / "m", max_shard_size="5KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 3
    check_folder(tmp_path / "m")
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="auto"), model)
    assert_same_tensors(open_model(tmp_path / "m").model, model)
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    with pytest.raises(TransectError, match="offloaded"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", device_map=places | {"model.layers": "disk"}, offload_folder=str(tmp_path / "elsewhere")
        )


@pytest.mark.parametrize("symmetric", [False, True])
def test_streaming_writes_the_same_folder(tmp_path, symmetric):
    data = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
    options = dict(method="gptq", keep=0.2, data=data, group=16, symmetric=symmetric)
    tiny("llama").save_pretrained(tmp_path / "dense")
    transect.compress(tmp_path / "dense", **options, stream_to=tmp_path / "streamed")
    save(transect.compress(tiny("llama"), **options), tmp_path / "whole")
    assert settings_of(tmp_path / "streamed") == settings_of(tmp_path / "whole")
    assert settings_of(tmp_path / "whole")["quant_method"] == "compressed-tensors"
    assert_same_tensors(open_model(tmp_path / "streamed").model, open_model(tmp_path / "whole").model)


def test_a_note_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "transect"):
        save(rounded("llama", bits=4, group=16), tmp_path / "a")
        assert "without Transect. So should vLLM" in caplog.text
        caplog.clear()
        save(rounded("llama", ["q", "k", "o", "down"], bits=4, group=16), tmp_path / "c")
        assert "vLLM may not: the matrices of model.layers.0.self_attn" in caplog.text
        caplog.clear()
        save(rounded("llama", bits=3, group=16), tmp_path / "b")
        assert "without Transect" not in caplog.text


# what it is


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 15, 16, 33])
def test_the_words_are_those_of_the_format(bits, columns):
    """Integer j of a row takes the bits from j * bits on, of all the row's words as one long number."""
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(bits))
    packed = pack_rows(codes, bits)
    for row, number in zip(packed.tolist(), codes.tolist(), strict=True):
        whole = sum((word % 2**32) << (32 * i) for i, word in enumerate(row))
        assert whole == sum(code << (bits * j) for j, code in enumerate(number))
        assert len(row) == -(-columns * bits // 32)
    assert torch.equal(unpack_rows(packed, bits, columns).long(), codes)


@pytest.mark.parametrize("name", PACKED)
def test_the_package_itself_packs_and_unpacks_so(root, name):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    packer = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    model, state = PACKED[name][1](), load_file(root / name / "model.safetensors")
    groups = settings_of(root / name)["config_groups"].values()
    for path, operator in model.named_modules():
        if not isinstance(operator, GroupedInteger):
            continue
        group = next(g for g in groups if g["targets"] == ["Linear"] or path in g["targets"])
        scheme = quantization.QuantizationScheme.model_validate(group)
        stored = {key.rpartition(".")[2]: tensor for key, tensor in state.items() if key.startswith(path + ".")}
        stored.pop("bias", None)
        found = packer.decompress(stored, scheme)
        assert torch.equal(found["weight"], operator.to_dense())
        again = packer.compress(found, scheme)
        assert set(again) == set(stored) and torch.equal(again["weight_shape"], stored["weight_shape"])
        if operator.scale.dtype == torch.float32:  # in bfloat16 the package cannot tell 255 steps apart again
            assert all(torch.equal(again[key], stored[key]) for key in stored)


def lower(model):
    matrix = Anatomy(model).blocks[1].matrix("o")
    matrix.replace(LowRank.from_factors(*torch.linalg.qr(matrix.weight)))
    return model


def without_attention(model):
    Anatomy(model).blocks[1].attention.drop()
    return model


NOT_PACKED = {
    "Conv1D": lambda: rounded("gpt2", bits=4, group=16),
    "fused matrices": lambda: rounded("phi3", bits=4, group=16),
    "3 bits": lambda: rounded("llama", bits=3, group=16),
    "a group that does not divide": lambda: rounded("llama", bits=4, group=24),
    "two widths with zero points": lambda: rounded("llama", bits=KINDS, group=16),
    "another structure beside": lambda: lower(rounded("llama", ["q"], bits=4, group=16)),
    "a sublayer less": lambda: without_attention(rounded("llama", ["up"], bits=4, group=16)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PACKED)
def test_what_the_format_cannot_say_stays_transects_own(name, tmp_path):
    model = NOT_PACKED[name]()
    save(model, tmp_path / "m")
    assert settings_of(tmp_path / "m")["quant_method"] == "transect"
    loaded = open_model(tmp_path / "m").model
    assert_same_tensors(loaded, model)


# folders of others


def by_others(folder, **entries):
    """As other programs write it: under another name, with more entries."""
    settings = settings_of(folder)
    group = settings["config_groups"].pop("transect_0")
    group["weights"] |= {"observer": "minmax", "actorder": "weight"}
    settings.pop("dequantize", None)
    edit(folder, quantization_config={**settings, "config_groups": {"group_0": group}, "version": "0.9.4", **entries})
    return folder


def test_integers_of_other_programs_are_opened_as_operators(root, folder, tmp_path):
    model = PACKED["4 bits"][1]()
    assert_same_tensors(open_model(by_others(folder)).model, model)
    pytest.importorskip("compressed_tensors")
    other = by_others(copied(root / "4 bits, symmetric", tmp_path / "s"))
    theirs = AutoModelForCausalLM.from_pretrained(other)  # read as without Transect
    assert not any(isinstance(module, GroupedInteger) for module in theirs.modules())
    ours = open_model(other).model
    assert apart(logits(theirs, inputs("llama")), logits(ours, inputs("llama"))) <= TOLERANCE[torch.float32]


def test_the_advice_for_what_is_refused_helps(folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    dense = AutoModelForCausalLM.from_pretrained(
        by_others(folder), quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    dense.save_pretrained(tmp_path / "dense")
    opened = open_model(tmp_path / "dense").model
    assert_same_tensors(opened, dense)
    for matrix, expected in zip(Anatomy(opened).matrices(), Anatomy(PACKED["4 bits"][1]()).matrices(), strict=True):
        assert torch.equal(matrix.weight, expected.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "float-quantized"}, "float-quantized"),
        ({"format": None}, "format None"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"config_groups": {}}, "config_groups"),
        ({"weights": {"num_bits": 3}}, "num_bits 3"),
        ({"weights": {"type": "float"}}, "type 'float'"),
        ({"weights": {"strategy": "tensor"}}, "strategy 'tensor'"),
        ({"weights": {"actorder": "group"}}, "actorder 'group'"),
        ({"group": {"input_activations": {"num_bits": 8}}}, "activations"),
        ({"group": {"weights": None}}, "'weights': None"),
    ],
)  # fmt: skip
def test_what_no_operator_holds_is_refused_with_advice(folder, change, said):
    settings = settings_of(by_others(folder))
    group = settings["config_groups"]["group_0"] | change.pop("group", {})
    group |= {"weights": group["weights"] and group["weights"] | change.pop("weights", {})}
    edit(folder, quantization_config={**settings, "config_groups": {"group_0": group}} | change)
    with pytest.raises(TransectError, match=r"quantised \(compressed-tensors.*Take the model") as caught:
        open_model(folder)
    assert said in str(caught.value)


# damage


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q}.weight_scale": None}, Q),
        ({f"{Q}.weight_zero_point": None}, Q),
        ({f"{Q}.weight_shape": None}, Q),
        ({f"{Q}.weight_packed": None}, Q),
        ({f"{Q}.weight_packed": torch.zeros(32, 4, dtype=torch.int64)}, Q),
        ({f"{Q}.weight_packed": torch.zeros(32, 5, dtype=torch.int32)}, Q),
        ({f"{Q}.weight_packed": torch.zeros(32, dtype=torch.int32)}, Q),
        ({f"{Q}.weight_scale": torch.ones(32, 3)}, Q),
        ({f"{Q}.weight_scale": torch.ones(32, 2, dtype=torch.int32)}, Q),
        ({f"{Q}.weight_zero_point": torch.zeros(32, 2, dtype=torch.int32)}, Q),
        ({f"{Q}.weight_shape": torch.tensor([2**40, 32])}, "the matrix there is 32 x 32"),
        ({f"{Q}.weight_shape": torch.tensor([32, 32, 1])}, Q),
        ({f"{Q}.weight_scale": torch.full((32, 2), torch.nan)}, "NaN"),
        ({f"{Q}.weight_g_idx": torch.zeros(32, dtype=torch.int32)}, "does not have"),
        ({f"{Q}.weight": torch.zeros(32, 32)}, "does not have"),
        ({"model.norm.weight_packed": torch.zeros(1, 1, dtype=torch.int32)}, "no linear layer"),
        ({"model.layers.7.mlp.up_proj.weight_packed": torch.zeros(1, 1, dtype=torch.int32)}, "layers.7"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_one_error(folder, tensors, said):
    edit_weights(folder, **tensors)
    with pytest.raises(BadCheckpoint) as caught:
        open_model(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize("weights", [{"num_bits": 8}, {"group_size": 8}, {"group_size": 17}, {"symmetric": True},
                                     {"strategy": "channel"}])  # fmt: skip
def test_a_config_that_belies_its_tensors_is_one_error(folder, weights):
    settings = settings_of(folder)
    settings["config_groups"]["transect_0"]["weights"] |= weights
    edit(folder, quantization_config=settings)
    for opening in (open_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(BadCheckpoint, match="by any of the config_groups"):
            opening(folder)


def test_any_change_of_the_settings_is_the_same_model_or_one_error(folder):
    good, random = settings_of(folder), Random(7)
    model = PACKED["4 bits"][1]()
    refused = 0
    for _ in range(20):
        settings = json.loads(json.dumps(good))
        changed(settings, random)
        edit(folder, quantization_config=settings)
        if attempt(folder) is None:
            assert_same_tensors(open_model(folder).model, model)
        else:
            refused += 1
    assert 3 < refused < 20
    for junk in JUNK:
        edit(folder, quantization_config={**good, "config_groups": junk})
        assert attempt(folder) is not None
