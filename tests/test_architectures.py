"""Descriptions of architectures: all that are built in are true, wrong ones are found, and what they say is used."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import AutoModelForCausalLM

from transect.anatomy import Anatomy, architecture, known_model_types
from transect.cli import main_group
from transect.errors import NotApplicable, TransectError, WrongDescription
from transect.forward import Lens, check_description, watch
from transect.forward.description import check
from transect.forward.description.bench import CHECKS
from transect.forward.description.twin import plain_experts
from transect.forward.lens import norm_centres, norm_gain
from transect.operators import LowRank
from transect.statistics import SublayerSimilarity, collect

from .models import CONFIGS, MOE_CONFIGS, MORE_CONFIGS, entry, inputs, logits, tiny
from .suite import some

DENSE = [*CONFIGS, *MORE_CONFIGS]
ALL = [*DENSE, *MOE_CONFIGS]
SEEING = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}  # inside others only: see test_vision_language


@pytest.fixture
def registry(monkeypatch):
    """Descriptions that a test registers are forgotten afterwards."""
    monkeypatch.setattr(architecture, "_registered", {})
    monkeypatch.setattr(check, "_verified", [])


def small(name):
    """A model for the checks: eager, and in float64 where the architecture can compute in that."""
    model = tiny(name, dtype=torch.float32 if name == "xglm" else torch.float64)
    model.set_attn_implementation("eager")
    return plain_experts(model)


def described(name):
    return architecture._built_in()[entry(name)[0].model_type]


def test_there_is_a_model_of_every_built_in_type():
    assert {entry(name)[0].model_type for name in ALL} == set(architecture._built_in()) - SEEING


@pytest.mark.parametrize("name", ALL)
def test_every_check_holds_of_every_built_in_description(name):
    made = check_description(small(name), described(name))
    assert not [one.complaint for one in made if not one.passed]
    skipped = {one.what for one in made if not one.applies}
    assert len(made) == len(CHECKS)
    assert len(skipped) <= (4 if entry(name)[1] is AutoModelForCausalLM else 7), skipped


def wrong(name, /, **changes):
    return replace(described(name), **changes)


def swapped(name, first, second):
    matrices = dict(described(name).matrices)
    matrices[first], matrices[second] = matrices[second], matrices[first]
    return wrong(name, matrices=matrices)


WRONG = {
    "attention adds the residual": ("bloom", lambda: wrong("bloom", attention_adds=None), "attention_adds"),
    "ALiBi": ("bloom", lambda: wrong("bloom", head_bias=()), "head_bias"),
    "a block returns a tuple": ("gptj", lambda: wrong("gptj", block_returns=0), "block_returns"),
    "a block returns a tensor": ("llama", lambda: wrong("llama", block_returns=2), "block_returns"),
    "attention returns a tensor": ("esm", lambda: wrong("esm", attention_returns=2), "attention_returns"),
    "multiplier": ("granite", lambda: wrong("granite", residual_multiplier=None), "residual_multiplier"),
    "scaled logits": ("granite", lambda: wrong("granite", logits={}), "logits"),
    "multiplied logits": ("cohere", lambda: wrong("cohere", logits={"divisor": "logit_scale"}), "logits"),
    "capped logits": ("nanochat", lambda: wrong("nanochat", logits={}), "logits"),
    "head behind a map": (
        "modernbert-decoder",
        lambda: wrong("modernbert-decoder", head_transform=False),
        "head_transform",
    ),
    "parallel": ("llama", lambda: wrong("llama", parallel=True), "parallel"),
    "not parallel": ("gptj", lambda: wrong("gptj", parallel=False), "parallel"),
    "q for k": ("opt", lambda: swapped("opt", "q", "k"), "matrices"),
    "v for k": ("opt", lambda: swapped("opt", "v", "k"), "matrices"),
    "up for gate": ("llama", lambda: swapped("llama", "up", "gate"), "matrices"),
    "order of a fused matrix": (
        "persimmon",
        lambda: wrong("persimmon", fused={"self_attn.query_key_value": architecture.FusedMatrix(("q", "k", "v"))}),
        "fused",
    ),
    "neighbours": ("gptj", lambda: wrong("gptj", rotation={"width": "rotary_dim"}), "rotation"),
    "halves": ("llama", lambda: wrong("llama", rotation={"pairs": "neighbours"}), "rotation"),
    "rotation": ("roformer", lambda: wrong("roformer", rotation={}), "rotation"),
    "activation": ("gpt2", lambda: wrong("gpt2", activation="ln_2"), "activation"),
    "a norm that is not there": ("llama", lambda: wrong("llama", norms={}), "norms"),
    "final norm": ("llama", lambda: wrong("llama", final_norm=None), "final_norm"),
    "attributes": ("gpt2", lambda: wrong("gpt2", attributes={}), "attributes"),
    "sinks": ("granite_swa", lambda: wrong("granite_swa", head_parameters=()), "head_parameters"),
    "a norm over all heads": ("olmo2", lambda: wrong("olmo2", q_norm=None), "q_norm"),
    "lists by block": ("smollm3", lambda: wrong("smollm3", per_block=()), "per_block"),
    "blocks that differ": ("gpt_neo", lambda: wrong("gpt_neo", fixed_blocks=False), "fixed_blocks"),
    "sizes": ("llama", lambda: wrong("llama", config={**described("llama").config, "neurons": "vocab_size"}), "config"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_description_fails_and_the_key_is_named(case):
    name, description, key = WRONG[case]
    failed = [one for one in check_description(small(name), description()) if not one.passed]
    assert any(key in one.keys for one in failed), [one.complaint for one in failed]
    assert all(f"`{key}`" in one.complaint for one in failed if key in one.keys)


def plain(description):
    """A description as it stands in a JSON file."""
    return json.loads(json.dumps(asdict(description)))


def test_a_registered_description_is_checked_before_its_first_use(registry):
    model = tiny("granite")
    with pytest.raises(WrongDescription, match=r"'granite' does not fit GraniteForCausalLM: .*off by .*`logits`"):
        Anatomy(model, plain(wrong("granite", logits={})))
    with pytest.raises(WrongDescription):  # and again: what was refused is not used the second time
        Anatomy(model)
    before = copy.deepcopy(model.state_dict())
    assert len(Anatomy(model, plain(wrong("granite", name="mine"))).matrices()) == 21
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert len(check._verified) == 1


def test_a_description_that_says_what_a_built_in_one_says_is_that_one(registry, monkeypatch):
    """Other processes of a contest are given the description that the model was opened with."""
    monkeypatch.setattr(check, "check_description", lambda *_: 1 / 0)
    for name in ("llama", "bloom", "mixtral"):
        assert Anatomy(tiny(name), plain(described(name))).architecture is described(name)


def test_a_check_draws_no_random_numbers_of_the_caller_s(registry):
    torch.manual_seed(3)
    expected = torch.rand(4)
    model = tiny("bloom")
    torch.manual_seed(3)
    Anatomy(model, plain(wrong("bloom", name="mine")))
    assert torch.equal(torch.rand(4), expected)


def test_a_description_is_checked_once_for_each_kind_of_model(registry, monkeypatch):
    made = []
    monkeypatch.setattr(check, "check_description", lambda model, _: made.append(type(model).__name__) or [])
    for name in ("gptj", "gptj", "granite"):
        Anatomy(tiny(name), plain(wrong(name, name="mine")))
    assert made == ["GPTJForCausalLM", "GraniteForCausalLM"]


def test_a_model_that_cannot_be_made_tiny_is_checked_itself_if_it_is_small(registry, monkeypatch):
    monkeypatch.setattr(check, "twin", lambda *_: 1 / 0)
    Anatomy(tiny("llama"), plain(wrong("llama", name="mine")))
    with pytest.raises(WrongDescription, match="residual_multiplier"):
        Anatomy(tiny("granite"), plain(wrong("granite", residual_multiplier=None)))
    monkeypatch.setattr(check, "SMALL", 10)
    with pytest.warns(UserWarning, match="could not be checked"):
        Anatomy(tiny("bloom"), plain(wrong("bloom", name="mine")))


def test_the_command_line(tmp_path, registry):
    def run(*arguments):
        return CliRunner().invoke(main_group, ["check-architecture", *map(str, arguments)])

    listed = json.loads(run("--json").stdout)
    assert [one["model_type"] for one in listed] == known_model_types() and "bloom" in run().stdout
    good, bad, broken = (tmp_path / f"{name}.json" for name in ("good", "bad", "broken"))
    good.write_text(json.dumps(plain(wrong("bloom", name="mine"))))
    bad.write_text(json.dumps(plain(wrong("bloom", attention_adds=None))))
    broken.write_text("{")
    result = run(good)
    assert result.exit_code == 0 and result.stdout.count("holds") == len(CHECKS) and "FAILS" not in result.stdout
    result = run(bad, "--json")
    failed = [one["what"] for one in json.loads(result.stdout) if not one["passed"]]
    assert failed == ["dropping attention equals zeroing its output"]
    assert isinstance(result.exception, WrongDescription) and "`attention_adds`" in str(result.exception)
    tiny("granite").save_pretrained(tmp_path / "model")
    assert run("--model", tmp_path / "model").exit_code == 0
    with_model = run(bad, "--model", tmp_path / "model")
    assert isinstance(with_model.exception, TransectError) and "blocks" in str(with_model.exception)
    assert "cannot be read as JSON" in str(run(broken).exception) and not architecture._registered


def changed(model):
    """A model that lacks what it can lack: attention, heads, neurons, and a matrix's full rank."""
    anatomy = Anatomy(model)
    first, second, third = anatomy.blocks
    if not first.post_norm:
        first.attention.drop()
        third.mlp.drop()
    shared = second.attention.heads // second.attention.key_value_heads
    second.attention.keep(reversed(range(shared)) if second.attention.key_value_heads > 1 else [2, 0])
    second.mlp.keep(range(5, second.mlp.neurons))
    for role in ("v", "up"):
        matrix = second.matrix(role)
        generator = torch.Generator().manual_seed(2)
        left, right = (
            torch.randn(shape, generator=generator) for shape in ((matrix.shape[0], 2), (2, matrix.shape[1]))
        )
        matrix.replace(LowRank.from_factors(left, right, matrix.bias))
    return anatomy


@pytest.mark.parametrize("name", some(DENSE, len(DENSE)))
def test_what_was_changed_is_saved_loads_and_generates(name, tmp_path):
    model = tiny(name)
    anatomy = changed(model)
    batch = inputs(name)
    model.save_pretrained(tmp_path)
    again = entry(name)[1].from_pretrained(tmp_path).eval()
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(copy.deepcopy(again), batch), logits(again, batch), rtol=1e-5, atol=1e-5)
    if entry(name)[1] is AutoModelForCausalLM:
        made = [
            again.generate(
                batch["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache, pad_token_id=0
            )
            for cache in (True, False)
        ]
        assert torch.equal(*made)
    if anatomy.can_drop_blocks:
        anatomy.drop_block(0)
        model.save_pretrained(tmp_path / "shallow")
        shallow = entry(name)[1].from_pretrained(tmp_path / "shallow").eval()
        torch.testing.assert_close(logits(shallow, batch), logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi"])
def test_heads_keep_their_alibi_when_others_go_in_two_steps(name):
    model, once = tiny(name, dtype=torch.float64), tiny(name, dtype=torch.float64)
    attention = Anatomy(model).blocks[1].attention
    attention.keep([3, 1, 2])
    Anatomy(model).blocks[1].attention.keep([2, 0])
    Anatomy(once).blocks[1].attention.keep([2, 3])
    torch.testing.assert_close(logits(model, inputs(name)), logits(once, inputs(name)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_the_cache_counts_positions_where_the_first_attention_is_gone(name):
    """No positions are given here: transformers asks the first layer of the cache how many there were."""
    model, ids = tiny(name, dtype=torch.float64), inputs(name)["input_ids"]
    Anatomy(model).blocks[0].attention.drop()
    with torch.no_grad():
        whole = model(ids).logits
        start = model(ids[:, :8], use_cache=True)
        rest = model(ids[:, 8:9], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 8:9], rtol=1e-6, atol=1e-6)


def test_a_description_holds_only_where_it_says_so():
    model = tiny("stablelm")
    model.config.qk_layernorm = True
    with pytest.raises(TransectError, match="qk_layernorm = False only"):
        Anatomy(model)


def test_the_lens_honours_what_multiplies_the_logits():
    for name, factor in (("granite", 1 / 8), ("cohere", 0.125), ("hyperclovax", 0.5), ("llama", 1)):
        lens = Lens(Anatomy(tiny(name)))
        torch.testing.assert_close(lens.weight, factor * lens.head.weight.detach())
    with pytest.raises(NotApplicable, match="transforms"):
        Lens(Anatomy(tiny("modernbert-decoder")))


def test_contributions_are_what_enters_the_stream_for_statistics_too():
    """Granite multiplies what a sublayer adds, and Falcon adds to what the MLP gave in place."""
    for name in ("granite", "falcon"):
        model, batch = tiny(name), inputs(name)
        anatomy = Anatomy(model)
        with torch.no_grad(), watch(anatomy, ["residual", "attention", "mlp"]) as seen:
            model(**batch)
        middle = seen.residual[1] if anatomy.blocks[1].parallel else seen.residual[1] + seen.attention[1]
        expected = [
            nn.functional.cosine_similarity(x, x + added, dim=-1).mean().item()
            for x, added in ((seen.residual[1], seen.attention[1]), (middle, seen.mlp[1]))
        ]
        found = collect(anatomy, [batch], [SublayerSimilarity()]).value("blocks.1", SublayerSimilarity())
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_norms_are_known_by_what_they_do():
    """Cohere's and OLMo's are layer norms of their own class; OLMo's and nanochat's have no gain."""
    centres = {"cohere": True, "olmo": True, "nemotron": True, "nanochat": False, "llama": False, "gpt2": True}
    for name, expected in centres.items():
        norm = Anatomy(tiny(name)).final_norm
        assert norm_centres(norm) is expected
        gain, x = norm_gain(norm), torch.linspace(-300, 200, 32)
        centred = x - x.mean() if expected else x
        by_hand = gain * centred / centred.square().mean().sqrt()
        bias = getattr(norm, "bias", None)
        torch.testing.assert_close(norm(x).detach(), by_hand if bias is None else by_hand + bias, rtol=1e-4, atol=1e-4)
