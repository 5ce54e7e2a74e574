"""What every conversion owes its user, on every causal architecture: exact where it says so, whole, and generating."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.checkpoint import open_model
from transect.checkpoint.config import history_of
from transect.checkpoint.modeling_file import loader_of
from transect.conversion import Plan, conversion_named, conversions, convert_anatomy
from transect.data import load
from transect.errors import TransectError
from transect.evaluation import evaluate_loss
from transect.parts import parts
from transect.report.conversion import lines_of

from .models import CAUSAL, VOCABULARY, assert_alike, assert_same_tensors, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
# Settings with which a conversion leaves the tiny models what they were; those without an entry are not exact at any.
EXACT = {
    "algoformer": {"times": 1}, "dense2moe": {"active": 12, "gates": "one"},
    "dense2moe-blocks": {"active": 2, "prompt": 4}, "first": {"prompt": 4}, "fold-norms": {},
    "gamma-mod": {"routable": 6, "skip": 0.0, "start": 100.0, "layers": "1"}, "liger": {"alpha": 0.0, "beta": 1.0},
    "matformer": {}, "matformer-cut": {"width": "1", "untrained": True},
    "merge-attention": {"merge": "vo", "several": True}, "mixer": {"mixer": "softmax"},
    "multi-level": {"direction": "grow", "depth": 1}, "p-mod": {"targets": 6, "decay": "constant", "mean": 1.0},
    "polycom": {}, "relaxed-recursive": {"loops": 3, "rank": 64, "norms": "own"}, "rms-norms": {},
    "spikingbrain": {"windows": 1}, "spikingbrain-experts": {"experts": 4, "spread": 0.0, "scaled": "down"},
    "ultramem-v2": {}, "uoe": {"active": 4, "gates": "rank"},
}  # fmt: skip
# What makes a conversion fit models of three blocks and 48 neurons, where its defaults do not.
SMALL = {
    "dense2moe-blocks": {"prompt": 4},
    "ecoformer": {"anchors": 9, "bits": 8, "similar": 3, "hash_steps": 3}, "first": {"prompt": 4, "skip": 0.2},
    "gamma-mod": {"routable": 6, "layers": "0-1"}, "liger": {"window": 4}, "matformer-cut": {"untrained": True},
    "merge-attention": {"merge": "vo", "several": True}, "multi-level": {"depth": 3}, "p-mod": {"targets": 6},
    "relaxed-recursive": {"loops": 3, "rank": 2}, "spikingbrain": {"window": 4}, "spikingbrain-experts": {"experts": 4},
    "symmetrize-attention": {"several": True}, "ultramem-v2": {"side": 8, "top": 4},
}  # fmt: skip
# Architectures that a conversion refuses, with a word of the reason; all others it takes.
_SOFTMAX = dict.fromkeys(("gemma2", "gemma3", "gptj", "bloom"), "softmax")
_MLP = {"opt": "no MLP in one module", "bloom": "takes more than its input"}
_ONE_RMS = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite"), "no LayerNorm"
)  # fmt: skip
_TURNED = [name for name in CAUSAL if name not in ("gpt2", "opt", "bloom")]
REFUSED = {
    "dense2moe": _MLP,
    "dense2moe-blocks": {"bloom": "positions are routed"},
    "ecoformer": _SOFTMAX,
    "first": {"bloom": "positions are routed"},
    "fold-norms": {"gptj": "none that could take it"},
    "gamma-mod": {"bloom": "positions are routed", "olmo2": "no norm there"},
    "kat": {"bloom": "more than its input", "opt": "no MLP in one module"},
    "liger": _SOFTMAX,
    "merge-attention": _SOFTMAX,
    "multi-level": {"bloom": "ALiBi", "gemma2": "different kinds|root of the width", "gemma3": "root of the width"},
    "p-mod": {"bloom": "positions are routed"},
    "peri-ln": {
        "bloom": "adds the stream", "opt": "no MLP in one module", "granite": "multiplies",
        **dict.fromkeys(("cohere", "gpt_neox", "gptj"), "side by side"),
        **dict.fromkeys(("gemma2", "gemma3", "olmo2"), "has the norms"),
    },
    "rms-norms": {**_ONE_RMS, "bloom": "neither an embedding nor a block"},
    "spikingbrain": _SOFTMAX,
    "spikingbrain-experts": _MLP,
    "symmetrize-attention": {**dict.fromkeys(_TURNED, "rotary positions"), "bloom": "softmax"},
    "uoe": _MLP,
}  # fmt: skip
# Architectures whose attention, or activation, is more than what a conversion is exact with.
MORE = {"mixer": {"gemma2", "gemma3", "gptj", "bloom"}, "polycom": set(CAUSAL) - {"opt"}}
OF_IMAGES = {"ia-red2", "sret"}  # all others are asked on models that predict the next token
FOR_CAUSAL = [entry for entry in conversions() if entry.name not in OF_IMAGES]


def converted(entry, name, settings=None, **options):
    """A tiny model, converted; or None if it is refused as expected, and then it is as it was."""
    model = tiny(name)
    plan = Plan(entry.name, settings or SMALL.get(entry.name, {}), steps=0, **options)
    data = load(DATA, model, batch_size=4)
    reason = REFUSED.get(entry.name, {}).get(name)
    if reason is None:
        return convert_anatomy(Anatomy(model), plan, data)
    with pytest.raises(TransectError, match=reason):
        convert_anatomy(Anatomy(model), plan, data)
    assert_same_tensors(model, tiny(name))
    return None


WRITTEN = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
ELSEWHERE = f"""
import sys, torch
from transformers import AutoModelForCausalLM

def of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    written = [model.generate(ids, use_cache=cached, **{WRITTEN}) for cached in (True, False)]
    return model(ids).logits, written, sum(parameter.numel() for parameter in model.parameters())

torch.set_grad_enabled(False)
ids, folders = torch.load("asked.pt")
torch.save({{folder: of(folder) for folder in folders}}, "found.pt")
assert "transect" not in sys.modules
"""


@pytest.fixture(scope="module")
def kept(request, tmp_path_factory):
    """Of each case of the test below: the model, its outcome, its folder, and what that one is in a fresh process.

    There all of them are opened one after the other by the modeling file in their folders alone.
    """
    path, made = tmp_path_factory.mktemp("kept"), {}
    for item in request.session.items:
        if getattr(item, "originalname", "") == test_it_comes_back_in_a_fresh_process_and_generates.__name__:
            entry, name = item.callspec.params["entry"], item.callspec.params["name"]
            with pytest.MonkeyPatch.context() as patch:
                if name != "llama":  # the other process asks the same
                    patch.setattr("transect.conversion.convert.generates_alike", lambda model: None)
                found = converted(entry, name)
            if found is not None:
                found[0].eval().save_pretrained(path / f"{entry.name}-{name}")
                made[f"{entry.name}-{name}"] = found
    torch.save((DATA[:2, :12], list(made)), path / "asked.pt")
    (path / "run.py").write_text(ELSEWHERE)
    ran = subprocess.run([sys.executable, "run.py"], cwd=path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    there = torch.load(path / "found.pt")
    return {case: (*found, path / case, there[case]) for case, found in made.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("entry", FOR_CAUSAL, ids=lambda entry: entry.name)
def test_it_comes_back_in_a_fresh_process_and_generates(entry, name, kept):
    """With Transect in this process, and without it in another, where it writes the same with a cache and without."""
    found = kept.get(f"{entry.name}-{name}")
    assert (found is None) == (name in REFUSED.get(entry.name, {}))
    if found is None:
        return
    model, outcome, folder, (logits_, (cached, uncached), numbers) = found
    assert outcome["exact"] == entry.exact and (outcome["generates"] or name != "llama")
    batch = {"input_ids": DATA[:2, :12]}
    assert_alike(logits_, logits(model, batch))
    assert torch.equal(cached, uncached) and torch.equal(cached, model.generate(DATA[:2, :12], **WRITTEN))
    assert numbers == sum(parameter.numel() for parameter in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_tensors(again, model)
    assert_alike(logits(again, batch), logits(model, batch))
    if name == "llama":  # as the command line opens it, which looks at the files first
        assert_same_tensors(open_model(folder).model, model)
    # a plain model of another kind has no record but only a history, in its config
    history = Anatomy(again).record.history or history_of(vars(again.config), "the config")
    assert history[-1]["convert"]["method"] == entry.name


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("entry", [one for one in FOR_CAUSAL if one.name in EXACT], ids=lambda entry: entry.name)
def test_it_is_the_model_as_it_was_where_it_says_so(entry, name, monkeypatch):
    monkeypatch.setattr("transect.conversion.convert.generates_alike", lambda model: None)  # asked above
    found = converted(entry, name, EXACT[entry.name])
    if found is not None and name not in MORE.get(entry.name, ()):
        batch = inputs(name)
        expected = logits(tiny(name), batch)
        torch.testing.assert_close(
            logits(found[0], batch), expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("entry", FOR_CAUSAL, ids=lambda entry: entry.name)
def test_padding_and_the_kind_of_cache_change_nothing_and_nothing_peeks(entry, name, monkeypatch):
    monkeypatch.setattr("transect.conversion.convert.generates_alike", lambda model: None)  # asked above
    found = converted(entry, name)
    if found is None:
        return
    model = found[0]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    batched, static = (
        model.generate(DATA[:2, :12], attention_mask=mask, cache_implementation=cache, **asked)
        for cache in (None, "static")
    )
    assert torch.equal(batched, static)
    alone = model.generate(DATA[:1, 4:12], attention_mask=mask[:1, 4:], **asked)[0, 8:]
    assert torch.equal(batched[0, 12:], alone)
    other = DATA[:2, :12].clone()
    other[:, 8:] = 5
    torch.testing.assert_close(model(other).logits[:, :8], model(DATA[:2, :12]).logits[:, :8], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("entry", [one for one in conversions() if one.stages], ids=lambda entry: entry.name)
def test_its_training_goes_on_after_an_interruption(entry, tmp_path):
    """The same tensors bit for bit, whichever stage was interrupted."""
    name = "llama" if entry.causal else "vit"
    if REFUSED.get(entry.name, {}).get(name):
        pytest.skip("refused")
    given = dict(SMALL.get(entry.name, {}))
    options = dict(steps=4, epochs=2, every=1, batch_size=2, held_out=0.25, settings={entry.name: given})
    data = DATA if entry.causal else inputs("vit", batch=8)
    done = transect.convert(tiny(name), entry.name, data, **options)
    for stop in (1, 3) if len(done.outcome["stages"]) > 1 else (3,):
        seen = []

        def interrupt(check, stop=stop, seen=seen):
            seen.append(check)
            if len(seen) == stop:
                raise KeyboardInterrupt

        folder = tmp_path / f"unfinished-{stop}"
        with pytest.raises(KeyboardInterrupt):
            transect.convert(tiny(name), entry.name, data, checkpoint=folder, on_check=interrupt, **options)
        resumed = transect.convert(tiny(name), entry.name, data, checkpoint=folder, **options).model
        assert_same_tensors(resumed, done.model)
        assert not folder.exists()


def test_a_converted_model_is_not_converted_again_by_the_same_way():
    model = tiny("llama")
    transect.convert(model, "liger")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TransectError, match="a part stands there"):
        transect.convert(model, "mixer")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ligre"}, "unknown conversion 'ligre'; known:.*liger"), ({"steps": 3}, "training needs data"),
        ({"alpha": 0.5, "beta": 0.2}, "alpha \\+ beta should be 1"), ({"layers": "1-9"}, "blocks 0 to 2"),
        ({"layers": "a"}, "numbers and ranges"), ({"keep_every": 1}, "no block is converted"),
        ({"method": "mixer", "mixer": "pooling"}, "has no k, o, q, v"), ({"window": 0}, "window=0 must be"),
        ({"train": "new", "data": DATA}, "does not train what it adds by itself"),
        ({"method": "fold-norms", "data": DATA, "steps": 2}, "prescribes no training: leave steps out"),
        ({"lr": -1.0}, "lr should be a number above 0"), ({"steps": -1}, "steps should be a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_change(options, message):
    model = tiny("llama")
    with pytest.raises(TransectError, match=message):
        transect.convert(model, **{"method": "liger", **options})
    assert_same_tensors(model, tiny("llama"))


# What is still converted after a conversion, or a compression; everything else that fits the model is refused.
_ANYWHERE = {"algoformer", "fold-norms", "matformer", "matformer-cut", "polycom", "spikingbrain-spikes"}
_ROUTED = {"dense2moe-blocks", "first", "gamma-mod", "p-mod"}
AFTERWARDS = {
    "svd": {"algoformer", "peri-ln", "ultramem-v2", *_ROUTED},
    "liger": {
        "dense2moe", "kat", "memoryformer", "peri-ln", "relaxed-recursive", "spikingbrain-experts", "ultramem-v2",
        "uoe", *_ANYWHERE,
    },
    "uoe": {
        "dense2moe-blocks", "ecoformer", "first", "liger", "merge-attention", "mixer", "peri-ln", "relaxed-recursive",
        "spikingbrain", "ultramem-v2", *_ANYWHERE - {"matformer", "matformer-cut", "polycom"},
    },
    "first": {"memoryformer", "multi-level", *_ANYWHERE},
}  # fmt: skip


@pytest.mark.parametrize("earlier", AFTERWARDS)
def test_a_changed_model_is_converted_again_where_that_makes_sense_and_else_left_as_it_is(earlier):
    if earlier == "svd":
        changed = transect.compress(tiny("llama"), "svd", keep=0.7)
    else:
        changed, _ = converted(conversion_named(earlier), "llama")
    done = set()
    for entry in FOR_CAUSAL:
        model = copy.deepcopy(changed)
        plan = Plan(entry.name, SMALL.get(entry.name, {}), steps=0)
        try:
            _, outcome = convert_anatomy(Anatomy(model), plan, load(DATA, model, batch_size=4))
        except TransectError:
            assert_same_tensors(model, changed)
        else:
            assert outcome["generates"], entry.name
            done.add(entry.name)
    assert done == AFTERWARDS[earlier]


def test_data_that_is_too_short_and_a_package_that_is_missing_are_said_before_any_change(monkeypatch):
    for entry in conversions():
        model, data = (tiny("llama"), DATA) if entry.causal else (tiny("vit"), inputs("vit", batch=8))
        if entry.stages and "llama" not in REFUSED.get(entry.name, {}):
            before = copy.deepcopy(model.state_dict())
            short = {key: rows[:1] for key, rows in data.items()} if isinstance(data, dict) else data[:1]
            with pytest.raises(TransectError, match="none is left to train on"):
                transect.convert(model, entry.name, short, **SMALL.get(entry.name, {}))
            assert model.state_dict().keys() == before.keys(), entry.name
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), entry.name
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny("llama")
    with pytest.raises(TransectError, match="pip install"):
        transect.convert(model, "liger", DATA, steps=1)
    assert_same_tensors(model, tiny("llama"))


def test_it_is_said_which_class_loads_it():
    for model, loader in (
        (tiny("llama"), "AutoModelForCausalLM"), (tiny("bert"), "AutoModelForMaskedLM"),
        (tiny("vit"), "AutoModelForImageClassification"), (tiny("bert").bert, "AutoModel"),
    ):  # fmt: skip
        assert loader_of(model) == loader
    converted = transect.convert(tiny("llama"), "fold-norms", steps=0)
    *_, last = lines_of(converted.outcome, "out", loader_of(tiny("vit")))
    assert 'AutoModelForImageClassification.from_pretrained("out")' in last


def test_a_compressed_matrix_is_refused_and_encoders_are():
    small = transect.compress(tiny("llama"), "svd", keep=0.7)
    with pytest.raises(TransectError, match="convert first, and compress what comes out"):
        transect.convert(small, "liger")
    with pytest.raises(TransectError, match="predict the next token"):
        transect.convert(tiny("bert"), "liger")


def test_what_comes_out_is_compressed_and_inspected_as_any_other(tmp_path):
    for name in ("llama", "qwen3", "gpt2"):  # qwen3 norms its keys: the matrix is within the projection
        model = transect.convert(tiny(name), "liger").model
        roles = {matrix.role for matrix in Anatomy(model).matrices()}
        assert {"q", "k", "v", "o"} < roles
        transect.compress(model, "svd", keep=0.7)
        model.save_pretrained(tmp_path / name)
        assert_alike(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), {"input_ids": DATA}),
            logits(model, {"input_ids": DATA}),
        )


@pytest.mark.parametrize("name", CAUSAL)
def test_any_linear_mixer_stands_for_the_attention_of_any_of_them(name, monkeypatch):
    """Of those that have queries, keys, values and an output; that they generate is asked of llama and gpt2."""
    monkeypatch.setattr("transect.conversion.convert.generates_alike", lambda model: None)
    entries = [one for one in parts("mixer") if one.function.cost == "N" and "causal" in one.function.can_be]
    mixers = [one.name for one in entries if {"q", "k", "v", "o"} <= set(one.function.roles)]
    assert {"linear", "performer", "gated-linear", "delta-rule", "liger", "spikingbrain", "local"} <= set(mixers)
    for mixer in mixers:
        model, _ = converted(conversion_named("mixer"), name, {"mixer": mixer})
        assert model(DATA[:2]).logits.isfinite().all(), mixer


def test_what_a_user_trains_is_what_is_trained():
    """`train` in place of what the paper prescribes: new numbers alone, all of the blocks, or low-rank updates."""
    plain = dict(tiny("llama").named_parameters())
    for train in ("new", "full", "lora"):
        given = dict(train=train, steps=2, epochs=2, batch_size=4, lr=1e-2, held_out=0.25, every=1)
        model = transect.convert(tiny("llama"), "ultramem-v2", DATA, **given, **SMALL["ultramem-v2"]).model
        changed = {name for name, p in model.named_parameters() if name in plain and not torch.equal(p, plain[name])}
        assert bool(changed) == (train != "new"), train
        assert train != "lora" or all(name.endswith("proj.weight") for name in changed)


def test_training_mends_and_the_table_says_what_it_costs():
    model = tiny("llama")
    dense = evaluate_loss(model, load(DATA, model)).loss
    found = transect.convert(
        model, "liger", DATA, eval_data=DATA, epochs=10, lr=1e-2, lengths=[8, 32], batch_size=4, window=8
    )
    losses = found.outcome["texts"]["eval"]["loss"]
    assert losses[0] == pytest.approx(dense) and losses[2] < losses[1]
    before, after = found.outcome["quality"]
    assert before[1]["cache_bytes"] == 4 * before[0]["cache_bytes"]
    assert after[1]["cache_bytes"] == after[0]["cache_bytes"]  # a window of 8 and a matrix a head
    assert found.outcome["parameters"][0] == found.outcome["parameters"][1]
    words = model.get_input_embeddings().weight
    assert after[0]["active_parameters"] == found.outcome["parameters"][1] - words.numel() + words.shape[1]
