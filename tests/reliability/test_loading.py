"""Damaged, tampered and ill-meant model folders: the right model, or one error that a user can read. Nothing else."""

import json
import os
import struct
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy, StructureRecord
from transect.anatomy.surgery import KEPT_HEADS, assign
from transect.checkpoint import check_folder, open_model, replay, save
from transect.checkpoint.header import read_stored
from transect.errors import BadCheckpoint, TransectError

from ..models import assert_same_tensors, inputs, logits, tiny
from ..test_checkpoint import change, tokenizer
from .damage import JUNK, attempt, changed, copied, damage, good_folders, write_header
from .faults import digest

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return good_folders(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
    return copied(good[1], tmp_path / "m")


@pytest.fixture
def plain(good, tmp_path):
    return copied(good[0], tmp_path / "p")


def edit(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def edit_record(folder, table, path, **entries):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["record"][table].setdefault(path, {}).update(entries)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, **tensors):
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in {**state, **tensors}.items() if v is not None}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


# Any damage.


@settings(max_examples=60, deadline=None)
@given(random=st.randoms(use_true_random=False), which=st.integers(0, 1))
def test_any_damage_gives_a_model_or_an_error(good, tmp_path_factory, random, which):
    place = tmp_path_factory.mktemp("damaged")
    folder = copied(good[which], place / "m")
    before = digest(good[0].parent)
    damage(folder, random)
    attempt(folder)
    assert digest(good[0].parent) == before and os.listdir(place) == ["m"]


def test_the_same_damage_every_time(good, tmp_path):
    """A fixed part of what `fuzz_loader` goes on with."""
    errors = []
    for number in range(40):
        folder = copied(good[number % 2], tmp_path / "m")
        damage(folder, Random(number))
        errors.append(attempt(folder))
    assert sum(error is None for error in errors) < 20  # most damage matters


def test_an_undamaged_folder_is_the_model(good):
    assert_same_tensors(open_model(good[1]).model, change(tiny("llama")))


# The structure record.


@settings(max_examples=80, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_any_record_replays_or_is_a_bad_checkpoint(good, random):
    record = json.loads((good[1] / "config.json").read_text())["quantization_config"]["record"]
    for _ in range(random.randrange(1, 3)):
        changed(record, random)
    forward, kept = nn.Linear.forward, dict(vars(nn.Module))
    try:
        with torch.device("meta"):
            replay(tiny("llama"), StructureRecord.from_dict(record))
    except BadCheckpoint:
        pass
    assert nn.Linear.forward is forward and dict(vars(nn.Module)) == kept


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:12])
def test_a_record_of_any_type(junk):
    for record in (junk, *({"format": 1, name: junk} for name in ("modules", "attributes", "parameters", "history"))):
        if record not in ({"format": 1, "modules": {}}, {"format": 1, "attributes": {}}) and isinstance(record, dict):
            try:
                replay(tiny("llama"), StructureRecord.from_dict(record))
            except BadCheckpoint:
                continue
            assert not any(record.get(name) for name in ("modules", "parameters", "attributes"))
        elif not isinstance(record, dict):
            with pytest.raises(BadCheckpoint):
                StructureRecord.from_dict(record)


ATTRIBUTES = [
    ("__class__.forward", 1), ("__class__", 1), ("forward", 1), ("training", 1), ("_parameters", 1),
    ("q_proj.weight", 1), ("q_proj.in_features", 0), ("config.__class__", 1), ("config._attn_implementation", "x"),
    ("config.vocab_size", True),
    ("config.x", 1), ("head_dim", 10**12), ("head_dim", 0), ("head_dim", -1), ("head_dim", 1.0), ("head_dim", True),
    ("head_dim", None), ("scaling", 1), ("new", 1), ("", 1), (".", 1), ("config.", 1), ("config.config.x", 1),
    ("kept_heads", 1), ("kept_heads", {"arguments": ["forward"], "of": 2, "heads": [2]}),
    ("kept_heads", {"arguments": [1], "of": 2, "heads": [1]}), ("kept_heads", {"arguments": [], "of": 2, "heads": []}),
    ("kept_heads", {"arguments": [], "of": 2, "heads": [0, 0]}), ("kept_heads.x", 1), ("q_proj.forward.x", 1),
]  # fmt: skip


@pytest.mark.parametrize(("attribute", "value"), ATTRIBUTES)
def test_a_record_sets_sizes_and_nothing_else(folder, attribute, value):
    before, other = dict(vars(type(tiny("llama").model.layers[0].self_attn))), tiny("llama")
    edit_record(folder, "attributes", "model.layers.0.self_attn", **{attribute: value})
    for opening in (open_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(BadCheckpoint):
            opening(folder)
    assert dict(vars(type(other.model.layers[0].self_attn))) == before
    torch.testing.assert_close(logits(other, inputs("llama")), logits(tiny("llama"), inputs("llama")))


def test_what_is_a_size_can_be_set():
    model = tiny("llama")
    attention, shared = model.model.layers[0].self_attn, model.config
    assign(attention, "head_dim", 4)
    assign(attention, "config.num_attention_heads", 2)
    assign(attention, KEPT_HEADS, {"arguments": ["alibi"], "of": 4, "heads": [1, 2]})
    assert attention.head_dim == 4 and attention.config.num_attention_heads == 2
    assert shared.num_attention_heads == 4 and model.model.layers[1].self_attn.config is shared


@pytest.mark.parametrize("entry", [
    {"kind": "low_rank", "in": 10**12, "out": 32, "rank": 5, "bias": False}, {"in": 32.0}, {"rank": True}, {"bias": 1},
    {"kind": "stacked", "parts": [["q", {"kind": "stacked", "parts": [], "head_size": 0}]], "head_size": 0},
    {"kind": "skip_attention", "layer_idx": 10**9, "stand_in": "o_proj"},
    {"kind": "skip_attention", "layer_idx": 0, "stand_in": ".".join("x" * 5000)},
    {"kind": "skip_attention", "layer_idx": 0, "stand_in": "o_proj", "returns": 10**9},
    {"kind": "skip_attention", "layer_idx": 0, "stand_in": "forward"},
    {"kind": "experts", "each": [{"gate": {"kind": "linear"}}], "activation": "silu"},
    {"kind": "experts", "each": 7, "activation": ["silu"]}, {"kind": "skip_experts", "experts": "__class__"},
    {"kind": ["linear"]}, {"kind": "shared_sparse_dictionary", "atoms": 4, "nonzeros": 2, "group": 3, "owns_bank": 1},
    {"kind": "atoms", "atoms": 4, "group": "nobody's", "owns_bank": False},
])  # fmt: skip
def test_descriptions_that_were_never_written(folder, entry):
    edit_record(folder, "modules", Q, **entry)
    message = attempt(folder, most=2**28)
    assert message is not None and ("q_proj" in message or "record" in message)


@pytest.mark.parametrize("path", [
    "", ".", "model", "lm_head.weight", "model.layers", "model.layers.0.forward", "model.layers.0.self_attn.__class__",
    "model.config", "model.layers.7.mlp",
])  # fmt: skip
def test_paths_that_lead_to_no_module_or_break_the_model(folder, path):
    edit_record(folder, "modules", path, **{"kind": "skip_experts", "experts": "x"})
    assert attempt(folder) is not None


def test_sizes_that_contradict_one_another(tmp_path):
    """Each fits its tensor, and the model cannot compute: found before it is used."""
    model = tiny("llama")
    block = Anatomy(model).blocks[0]
    block.mlp.keep(range(20))
    save(model, tmp_path / "m")
    name = "model.layers.0.mlp.up_proj"
    edit_record(tmp_path / "m", "modules", name, out=19)
    up = load_file(tmp_path / "m" / "model.safetensors")[f"{name}.weight"]
    edit_weights(tmp_path / "m", **{f"{name}.weight": up[:19].contiguous()})
    check_folder(tmp_path / "m")
    with pytest.raises(BadCheckpoint, match="cannot compute"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize("history", [1, "x", {}, [1], {"history": 1}, {"history": [1]}])
def test_a_history_is_a_list_of_objects(plain, folder, history):
    if history != {}:
        edit(plain, transect=history)
        with pytest.raises(BadCheckpoint, match=r"transect|history"):
            open_model(plain)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["record"]["history"] = history
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match="history"):
        open_model(folder)


# Headers and indexes.


def header(**entries):
    return json.dumps(entries).encode()


def entry(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


BAD_HEADERS = {
    "a gap": header(a=entry(0, 2), b=entry(3, 4)), "an overlap": header(a=entry(0, 3), b=entry(2, 4)),
    "the same bytes": header(a=entry(0, 4), b=entry(0, 4)), "not from 0": header(a=entry(1, 4)),
    "backwards": header(a={"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}), "negative": header(a=entry(-4, 0)),
    "a negative size": header(a=entry(0, 4, shape=[-2, -2])), "bool": header(a=entry(0, 4, shape=[True, 4])),
    "a fraction": header(a=entry(0, 4, shape=[4.0])), "a text": header(a=entry(0, 4, shape="4")),
    "three offsets": header(a={"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}),
    "an unknown type": header(a=entry(0, 4, "X32")), "no type": header(a={"shape": [4], "data_offsets": [0, 4]}),
    "twice": b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), "a list": b"[]", "a number": b"4",
    "nothing": b"", "space first": b" " + header(a=entry(0, 4)), "NaN": b'{"__metadata__": {"x": NaN}}',
    "metadata": header(__metadata__={"x": 1}, a=entry(0, 4)), "a surrogate": header(**{"\ud800": entry(0, 4)}),
    "no UTF-8": b'{"\xff": 1}', "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000, "digits": b'{"a": 1%s}' % (b"0" * 10000),
    "too large": header(a=entry(0, 4, shape=[2**62, 2**62, 4])), "too long": header(a=entry(0, 2)),
    "too short": header(a=entry(0, 8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_headers_that_safetensors_would_not_take(tmp_path, kind):
    write_header(tmp_path / "x.safetensors", BAD_HEADERS[kind], b"1234")
    with pytest.raises(BadCheckpoint):
        read_stored(tmp_path / "x.safetensors")


@settings(max_examples=150, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_what_is_taken_is_taken_by_safetensors_too(tmp_path_factory, random):
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    value = {"a": entry(0, 4, "F32", [1]), "b": entry(4, 12, "F16", [2, 2]), "c": entry(12, 12, "U8", [0])}
    changed(value, random)
    write_header(file, json.dumps(value).encode() + b" " * random.randrange(3), bytes(12))
    try:
        stored = read_stored(file)
    except BadCheckpoint:
        return
    with safe_open(file, "pt") as other:
        assert {name: tuple(other.get_slice(name).get_shape()) for name in other.keys()} == {  # noqa: SIM118
            name: tensor.shape for name, tensor in stored.items()
        }


def test_a_header_beyond_the_limit_of_safetensors(tmp_path):
    with (tmp_path / "x.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001) + b"{}")
        stream.truncate(100_000_009)
    with pytest.raises(BadCheckpoint, match="allows 100000000"):
        read_stored(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", [
    "../m/model-00001-of-00004.safetensors", "/etc/passwd", "a\0b.safetensors", "", ".", 7, None, ["x"], "x.bin",
    "sub/x.safetensors", "..\\x.safetensors",
])  # fmt: skip
def test_shards_are_files_of_the_folder(folder, name):
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][next(iter(table["weight_map"]))] = name
    index.write_text(json.dumps(table))
    for opening in (check_folder, open_model):
        with pytest.raises(BadCheckpoint, match="names the shard"):
            opening(folder)


def test_a_tensor_in_two_shards(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(first))
    save_file({**second, name: first[name] + 1}, shards[1], metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="another shard"):
        check_folder(folder)


# Weights and config that do not belong together.


@pytest.mark.parametrize("dtype", [torch.int16, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.uint8])
def test_weights_that_are_no_ordinary_numbers(plain, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(plain, **{name: load_file(plain / "model.safetensors")[name].to(dtype)})
    for opening in (open_model, lambda path: transect.compress(path, "svd", 0.5, stream_to=path.parent / "out")):
        with pytest.raises(BadCheckpoint, match=r"up_proj\.weight.*stored as"):
            opening(plain)


@pytest.mark.parametrize("dtype", ["int8", "complex64", "bool", "float8_e4m3fn", 5, "nonsense"])
def test_a_config_that_would_load_them_as_something_else(plain, dtype):
    edit(plain, dtype=dtype)
    with pytest.raises(BadCheckpoint, match="dtype"):
        open_model(plain)


EXTRA = ["model.layers.3.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias", "layers.9.x"]
HARMLESS = ["model.layers.1.self_attn.rotary_emb.inv_freq", "score.weight", "cls.predictions.bias"]


@pytest.mark.parametrize("name", EXTRA + HARMLESS)
def test_tensors_that_the_model_does_not_have(plain, name):
    edit_weights(plain, **{name: torch.ones(4)})
    if name in HARMLESS:
        assert_same_tensors(open_model(plain).model, tiny("llama"))
        return
    for opening in (open_model, lambda path: transect.compress(path, "svd", 0.5, stream_to=path.parent / "out")):
        with pytest.raises(BadCheckpoint, match="does not have"):
            opening(plain)


def test_fewer_and_more_layers_than_are_stored(plain):
    edit(plain, num_hidden_layers=2)
    with pytest.raises(BadCheckpoint, match=r"layers\.2"):
        open_model(plain)
    edit(plain, num_hidden_layers=4)
    with pytest.raises(BadCheckpoint, match=r"layers\.3"):
        open_model(plain)


@pytest.mark.parametrize("entries", [
    {"vocab_size": 10_000_000}, {"vocab_size": 10**12}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": 120_000},
    {"num_labels": 10**9}, {"hidden_size": 10**9}, {"head_dim": 10**9}, {"intermediate_size": 2**62},
    {"num_attention_heads": 10**9},
])  # fmt: skip
def test_a_small_folder_takes_little_memory_whatever_it_claims(plain, entries):
    edit(plain, **entries)
    for opening in (open_model, lambda path: transect.compress(path, "svd", 0.5, stream_to=path.parent / "out")):
        before = torch.get_rng_state()
        with pytest.raises(BadCheckpoint):
            opening(plain)
        assert torch.equal(torch.get_rng_state(), before)  # no weight was drawn
    assert attempt(plain, most=2**28) is not None


def test_a_table_of_positions_is_bounded_too(tmp_path):
    save(tiny("xglm"), tmp_path / "m")
    edit(tmp_path / "m", max_position_embeddings=10**8)
    assert "tables" in (attempt(tmp_path / "m", most=2**28) or "")


def test_a_token_around_every_text_must_have_an_embedding(tmp_path):
    chosen = tokenizer()
    chosen.add_special_tokens({"bos_token": "<begin>"})
    chosen.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", chosen.convert_tokens_to_ids("<begin>"))]
    )
    assert chosen.convert_tokens_to_ids("<begin>") >= 64
    save(tiny("llama"), tmp_path / "m", chosen)
    with pytest.raises(BadCheckpoint, match="disagree"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "rope_parameters", "rms_norm_eps", "pad_token_id",
                                 "architectures", "model_type", "hidden_act", "quantization_config", "layer_types",
                                 "attention_bias", "id2label", "per_layer_config", "tie_word_embeddings"])  # fmt: skip
def test_config_entries_of_every_type(plain, key):
    for junk in JUNK:
        edit(plain, **{key: junk})
        attempt(plain)


# What lies in the folder's place.


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "other"]
)
def test_a_pipe_is_not_waited_for(plain, name):
    (plain / name).unlink(missing_ok=True)
    os.mkfifo(plain / name)
    for opening in (open_model, lambda path: transect.compress(path, "svd", 0.5, stream_to=path.parent / "out")):
        with pytest.raises(BadCheckpoint, match="ordinary file"):
            opening(plain)


def test_places_that_are_no_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("pipe", "pipe.gguf", "loop", "dangling", "a\0b", "x" * 5000):
        with pytest.raises(TransectError):
            open_model(tmp_path / name)
    with pytest.raises(TransectError):
        open_model("~nobody-of-this-name/m")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"x":' * 100_000, '{"x": 1%s}' % ("0" * 10_000), "", "[]", "1", '"x"', "null"]
)
def test_json_that_is_none_or_no_object(plain, text):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        place = copied(plain, plain.parent / "c")
        (place / name).write_text(text)
        assert name in (attempt(place) or "")


# GGUF files.


@settings(max_examples=40, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_damaged_gguf_files(tmp_path_factory, random):
    from ..test_opening import write_gguf

    place = tmp_path_factory.mktemp("gguf")
    content = bytearray(write_gguf(place / "m.gguf", tiny("llama")).read_bytes())
    at = random.choice([random.randrange(len(content)), random.randrange(2000)])
    how = random.randrange(3)
    content[at : at + 8 * (how == 0)] = random.choice([bytes(8), b"\xff" * 8, random.randbytes(8)]) if how < 2 else b""
    (place / "m.gguf").write_bytes(content[:at] if how == 2 else content)
    attempt(place / "m.gguf")


def test_a_gguf_file_of_many_layers_and_one_beside_an_adapter(tmp_path):
    from ..test_opening import write_gguf

    content = write_gguf(tmp_path / "m.gguf", tiny("llama")).read_bytes()
    at = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    (tmp_path / "many.gguf").write_bytes(content[:at] + struct.pack("<I", 10**9) + content[at + 4 :])
    assert "block_count" in (attempt(tmp_path / "many.gguf", most=2**28) or "")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="adapter"):
        open_model(tmp_path / "m.gguf")
