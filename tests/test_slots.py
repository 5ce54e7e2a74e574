"""The slots of matrices and whole blocks: what stands there is found, recorded, left alone by methods for matrices."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.anatomy.surround import Surrounded
from transect.data import Specimen, load
from transect.errors import BadCheckpoint, TransectError
from transect.parts import build_model, insert
from transect.probes import probes, run_probes

from .models import tiny

TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def toys(monkeypatch):
    """Three parts that only these tests know of."""
    from . import toy_parts

    for one in (toy_parts.Gated, toy_parts.Apart, toy_parts.Sine):
        monkeypatch.setattr(one, "kind", f"{one.slot}.toy-{one.__name__.lower()}", raising=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_a_part_around_a_block_leads_it_and_comes_back_from_a_folder(toys, name, tmp_path):
    model = tiny(name)
    expected, keys = model(TOKENS).logits, list(model.state_dict())
    insert(model, "block", "toy-gated")
    assert torch.equal(model(TOKENS).logits, expected) or torch.allclose(model(TOKENS).logits, expected, atol=1e-5)
    assert set(keys) < set(model.state_dict())  # nothing has moved
    block = Anatomy(model).blocks[0]
    assert type(block.module).__name__ == type(Anatomy(tiny(name)).blocks[0].module).__name__
    block.module.around.part.scale.fill_(0.5)
    changed = model(TOKENS).logits
    assert not torch.allclose(changed, expected, atol=1e-3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS).logits, changed)
    given = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(*(model.generate(TOKENS, use_cache=use, **given) for use in (True, False)))
    transect.compress(model, "svd", keep=0.7)
    after = model(TOKENS).logits
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(TOKENS).logits, after)
    if Anatomy(again).can_drop_blocks:
        Anatomy(again).drop_block(0)
        again.save_pretrained(tmp_path / "less")
        less = AutoModelForCausalLM.from_pretrained(tmp_path / "less")
        torch.testing.assert_close(less(TOKENS).logits, again(TOKENS).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_sublayers_are_at_hand_with_the_block_s_masks_positions_and_cache(toys, name):
    model, dense = tiny(name), tiny(name)
    insert(model, "block", "toy-apart")
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    ours, theirs = (one(TOKENS, attention_mask=mask).logits[mask.bool()] for one in (model, dense))
    torch.testing.assert_close(ours, theirs)
    given = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(TOKENS, **given), dense.generate(TOKENS, **given))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_part_for_matrices_is_no_matrix_to_any_method(toys, name, tmp_path):
    model = tiny(name)
    insert(model, "matrix", "toy-sine", roles=iter(["down", "q"]))
    for block in Anatomy(model).blocks:
        left = {"k", "v", "o", "gate", "up"} if name == "llama" else {"o", "up"}  # GPT-2 stores q, k and v as one
        assert {matrix.role for matrix in block.matrices()} == left
        assert block.mlp is None and block.attention is None  # heads and neurons cannot be told apart any more
    transect.compress(model, "svd", keep=0.7)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)


def test_what_does_not_fit_is_one_error(toys, tmp_path):
    model = tiny("llama")
    insert(model, "block", "toy-gated", layers=[0])
    assert [isinstance(block.module, Surrounded) for block in Anatomy(model).blocks][:2] == [True, False]
    for call, said in (
        (lambda: insert(model, "block", "toy-gated"), "stands around block 0 already"),
        (lambda: insert(model, "matrix", "toy-sine", roles=["x"]), "unknown roles"),
        (lambda: Anatomy(model).blocks[0].attention.drop(), "stands around block 0"),
        (lambda: build_model("mixtral", hidden=32, blocks=1, heads=4, parts={"matrix": "toy-sine"}), "has experts"),
    ):
        with pytest.raises(TransectError, match=said):
            call()
    from transect.anatomy.record import record_of
    from transect.checkpoint.replay import replay

    record = record_of(model)
    path = next(path for path in record.modules if path.endswith(".around"))
    record.modules["model.layers.1.mlp.around"] = {**record.modules[path], "part": {"kind": "mixer.identity"}}
    with pytest.raises(BadCheckpoint, match="cannot be built"):
        replay(tiny("llama"), record)


@pytest.mark.parametrize(
    "chosen",
    [
        {"mixer": "gated-linear", "mlp": "kat", "norm": "rms"},
        {"mixer": "pooling", "mlp": "hopfield"},
        {"activation": "s-kan", "block": "ultramem-v2"},
        {"matrix": "memoryformer"},
    ],
    ids=lambda chosen: "+".join(chosen.values()),
)
def test_every_probe_says_something_of_parts_or_why_it_does_not(chosen):
    model = build_model("llama", hidden=32, blocks=2, heads=4, vocabulary=64, length=32, parts=chosen)
    for block in Anatomy(model).blocks:
        assert block.adds_up == ("block" not in chosen)
        assert block.has_part("mlp") == ("mlp" in chosen or "matrix" in chosen)
    specimen = Specimen(Anatomy(model), data=load(TOKENS[:, :8], model))
    short = {"bigram-subnetworks": {"steps": 5}}
    found = run_probes(specimen, {probe.name: short.get(probe.name, {}) for probe in probes()})
    assert found.results and not found.failed, found.failed
    if chosen.keys() != {"activation", "block"}:  # heads and neurons are what it takes apart
        assert "stands in the" in found.refused["cd-t"]
    else:  # what the memory adds is of no sublayer
        assert "part stands around block 0" in found.refused["cd-t"] == found.refused["depth-efficiency"]


def test_every_method_runs_on_what_parts_leave_it_or_says_why_not():
    """Their matrices are compressed; neurons are not taken from a function that knows each of them."""
    raised = {}
    for chosen in (
        {"mixer": "crate", "mlp": "hopfield"},
        {"matrix": "memoryformer"},
        {"activation": "s-kan"},
        {"block": "ultramem-v2"},
    ):
        for method in ("svd-llm", "gptq", "mixed", "amp", "modegpt", "llm-drop"):
            model = build_model("llama", hidden=32, blocks=2, heads=4, vocabulary=64, length=32, parts=chosen)
            before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            settings = {"mixed": {"iterations": 1}} if method == "mixed" else {}
            try:
                transect.compress(model, method, 0.7, TOKENS.repeat(4, 1), settings=settings)
            except TransectError as reason:
                raised[(*chosen.values(), method)] = str(reason)
                assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
            model(TOKENS)
    assert all("nothing to compress" in said for (part, *_), said in raised.items() if part == "memoryformer")
    assert sum(part == "memoryformer" for part, *_ in raised) == 6
    assert (
        "which neurons are there" in raised["s-kan", "amp"] == raised["s-kan", "modegpt"] == raised["s-kan", "llm-drop"]
    )
    done = {("s-kan", "mixed"), ("s-kan", "svd-llm"), ("crate", "hopfield", "mixed"), ("crate", "hopfield", "gptq")}
    assert not done & set(raised)
