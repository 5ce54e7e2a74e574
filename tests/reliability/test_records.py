"""Structure records that somebody made up: they set sizes and put known operators in place, and nothing else."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from transect.anatomy import Anatomy, StructureRecord
from transect.anatomy.surgery import KEPT_HEADS, assign
from transect.checkpoint import check_folder, open_model, replay, save
from transect.errors import BadCheckpoint

from ..models import inputs, logits, tiny
from ..test_parts import TOKENS, built
from .damage import JUNK, attempt, changed, memory
from .folders import Q, edit, edit_record, edit_weights


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


@pytest.mark.parametrize(("kind", "entries"), [
    ("mixer.hopfield", {"layer_idx": 2**30}), ("mixer.hopfield", {"layer_idx": True}),
    ("mixer.hopfield", {"returns": 2**30}), ("mixer.hopfield", {"part": {"updates": 2**31}}),
    ("mixer.hopfield", {"part": {"beta": -1.0}}), ("mixer.random", {"part": {"seed": -1}}),
    ("mixer.local", {"part": {"window": 2**40}}), ("mlp.hopfield", {"updates": 2**31}),
    ("activation.s-kan", {"size": 2**20}), ("activation.s-kan", {"size": "all"}),
])  # fmt: skip
def test_a_part_is_asked_for_nothing_that_no_user_could_choose(kind, entries, tmp_path):
    """It would compute, or fill a cache, without end."""
    save(built(kind), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    described = next(iter(config["quantization_config"]["record"]["modules"].values()))
    described |= {name: {**described[name], **value} if name == "part" else value for name, value in entries.items()}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    for opening in (open_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(BadCheckpoint, match="cannot be built"):
            opening(tmp_path / "m")


@pytest.mark.parametrize(
    ("kind", "names"),
    [("strided", ["stride"]), ("fixed", ["stride"]), ("longformer", ["window"]), ("bigbird", ["window"]),
     ("reformer", ["window"]), ("routing", ["window"]), ("transformer-xl", ["segment", "memory"]),
     ("compressive", ["segment", "memory", "compressed"]), ("compressive", ["memory", "compressed"])],
)  # fmt: skip
def test_a_pattern_wider_than_the_text_takes_no_memory_for_what_is_not_there(kind, names):
    narrow, wide = (built(f"mixer.{kind}") for _ in range(2))
    for model, size in ((wide, 2**20), (narrow, 12)):
        for block in model.model.layers:
            for name in names:
                assert hasattr(block.self_attn.part, name)
                setattr(block.self_attn.part, name, size)
    with memory(2**29):
        torch.testing.assert_close(wide(TOKENS).logits, narrow(TOKENS).logits)
