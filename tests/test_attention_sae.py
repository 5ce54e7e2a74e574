"""The probe `attention-sae`: exact attribution, what it reports, its folder, and bad input."""

import json

import pytest
import torch

import transect
from tests.models import CAUSAL, inputs, logits, tiny
from tests.test_data import word_tokenizer
from tests.test_dictionaries import foreign
from transect.anatomy import Anatomy
from transect.data import Batches, Specimen
from transect.dictionaries import Dictionary
from transect.errors import BadCheckpoint, NotApplicable, TransectError
from transect.evaluation import evaluate_loss
from transect.forward import watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.attention_sae.attribution import by_head, by_source, constants, head_shares
from transect.probes.catalog.attention_sae.contexts import KINDS, Example, contexts_of, examples_of, kinds_of
from transect.probes.catalog.attention_sae.dictionaries import chosen_layers

NAME = "attention-sae"
QUICK = {"tokens": 512, "batch": 32, "expansion": 2, "shown": 3, "held_out": 0.4}


def text(name="llama", count=5, **more):
    return Batches([inputs(name, seed=seed, **more) for seed in range(count)])


def specimen(name="llama", dtype=torch.float32, **more):
    return Specimen(Anatomy(tiny(name, dtype=dtype)), word_tokenizer(), data=text(name, **more))


def asked(one, **settings):
    return run_probes(one, {NAME: {**QUICK, **settings}})


def dictionary_of(anatomy, layer, seed=0):
    width = anatomy.blocks[layer].find("o").shape[1]
    dictionary = Dictionary(width, 2 * width, seed, anatomy.model.dtype).requires_grad_(False)
    dictionary.decoder_bias.copy_(torch.linspace(-0.1, 0.1, width))
    return dictionary


@pytest.mark.parametrize("name", CAUSAL)
def test_it_runs_on_every_architecture_and_leaves_no_trace(name):
    one = specimen(name)
    before = logits(one.model, inputs(name))
    inspection = asked(one)
    assert not inspection.refused and not inspection.failed
    found = inspection[NAME]
    assert len(drawings(found)) == 5 + ("kinds" in found.quantities)
    assert found["loss"].shape == (1, 4) and bool(found["loss"].isfinite().all())
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


@pytest.mark.parametrize("name", CAUSAL)
def test_heads_and_sources_add_up_to_what_a_feature_reads(name):
    """Σ_h Σ_k DFA + b_enc - W_enc b_dec is the pre-activation; Σ_h W_O^h z_h + b_O is the attention's output."""
    anatomy = Anatomy(tiny(name, dtype=torch.float64))
    layer, batch = 1, inputs(name, dtype=torch.float64)
    attention, dictionary = anatomy.blocks[layer].attention, dictionary_of(anatomy, layer)
    with torch.no_grad(), watch(anatomy, ["heads", "patterns", "v"], [layer]) as seen:
        anatomy.model(**batch)
    z = seen.heads[layer].reshape(2, 12, -1)
    values = seen.v[layer].reshape(2, 12, -1, attention.head_size)
    features, reads = torch.tensor([0, 3, 7]), dictionary.before(z)
    for row, position in ((0, 0), (0, 11), (1, 5)):
        at = z[row, position].expand(3, -1)
        heads = by_head(dictionary, at, features, attention.heads)
        wanted = reads[row, position, features]
        torch.testing.assert_close(heads.sum(1) + constants(dictionary)[features], wanted, rtol=0, atol=1e-13)
        patterns = seen.patterns[layer][row, :, position].expand(3, -1, -1)
        split = by_source(dictionary, features, patterns, values[row].expand(3, -1, -1, -1))
        torch.testing.assert_close(split.sum(2), heads, rtol=0, atol=1e-12)
        assert not split[..., position + 1 :].any()
    o = attention.o
    parts = torch.stack([z[..., h * attention.head_size : (h + 1) * attention.head_size]
                         @ o.weight[:, h * attention.head_size : (h + 1) * attention.head_size].T
                         for h in range(attention.heads)]).sum(0)  # fmt: skip
    whole = z @ o.weight.T
    torch.testing.assert_close(parts, whole)
    shares = head_shares(dictionary, attention.heads)
    assert bool((shares >= 0).all())
    torch.testing.assert_close(shares.sum(1), torch.ones(dictionary.features, dtype=torch.float64))


def test_counts_places_and_losses_are_those_of_a_direct_count(tmp_path):
    one = specimen(dtype=torch.float64)
    found = asked(one, dictionary=str(tmp_path / "d"), layers="1")[NAME]
    dictionary = transect.dictionaries.read_dictionary(tmp_path / "d" / "blocks.1.attn.hook_z")[0]
    rows = torch.cat([batch["input_ids"] for batch in one.data])[-4:]  # the last 40 %
    with torch.no_grad(), watch(one.anatomy, ["heads"], [1]) as seen:
        one.model(input_ids=rows)
    x = seen.heads[1][:, 1:]
    a = dictionary.encode(x.to(dictionary.decoder))
    on = (a > 0).double()
    assert float(found["l0"][0]) == pytest.approx(float(on.sum(-1).mean()))
    torch.testing.assert_close(found["frequency"][0].double(), on.mean((0, 1)))
    assert float(found["dead"][0]) == pytest.approx(float((on.sum((0, 1)) == 0).double().mean()))
    spread = (x - x.mean((0, 1))).square().sum()
    explained = 1 - (dictionary(x.to(dictionary.decoder)) - x).square().sum() / spread
    assert float(found["explained"][0]) == pytest.approx(float(explained), rel=1e-4)
    assert float(found["loss"][0, 0]) == pytest.approx(evaluate_loss(one.model, [{"input_ids": rows}]).loss, rel=1e-5)
    contexts = contexts_of(one.anatomy, 1, dictionary, [{"input_ids": rows}], False)
    best = a.amax(1).sort(0, descending=True).values[:3]
    torch.testing.assert_close(contexts.values, best.float().clamp_min(0))
    for feature in contexts.fired.nonzero()[:4, 0].tolist():
        row, place = contexts.sequences[0, feature], contexts.positions[0, feature]
        assert float(a[row, place - 1, feature]) == pytest.approx(float(best[0, feature]))


def test_without_a_feature_the_loss_is_what_it_says(tmp_path):
    one = specimen()
    found = asked(one, dictionary=str(tmp_path / "d"), layers="1")[NAME]
    dictionary = transect.dictionaries.read_dictionary(tmp_path / "d" / "blocks.1.attn.hook_z")[0]
    rows, feature = torch.cat([batch["input_ids"] for batch in one.data])[-4:], int(found["shown"][0, 0])

    def without(x):
        taken = x - dictionary.encode(x)[..., feature, None] * dictionary.decoder[:, feature]
        return torch.cat([x[:, :1], taken[:, 1:]], 1)

    text = [{"input_ids": rows}]
    with transect.forward.changed(one.anatomy, {("heads", 1): without}):
        loss = evaluate_loss(one.model, text).loss
    assert float(found["effect"][0, 0]) == pytest.approx(loss - evaluate_loss(one.model, text).loss, abs=1e-5)


def test_sources_are_called_by_what_they_are():
    def example(ids, position, source):
        sources = torch.zeros(len(ids))
        sources[source] = 1
        return Example(0, 1.0, torch.tensor(ids), position, 0, torch.ones(2), sources, 0.0)

    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 6, 16]
    expected = [(11, 11, 0), (11, 10, 1), (11, 9, 2), (11, 0, 3), (11, 2, 5), (12, 3, 4), (11, 1, 4)]
    for position, source, kind in expected:
        assert example(ids, position, source).kind == kind, (KINDS[kind], source)
    assert kinds_of([example(ids, 11, 10), example(ids, 11, 2), example(ids, 12, 11)]) == {0: 1}


def test_a_source_is_the_token_that_matters():
    """Taking the value of the source away lowers what the feature reads by exactly its contribution."""
    one = specimen(dtype=torch.float64)
    dictionary, text = dictionary_of(one.anatomy, 1), list(one.data)
    contexts = contexts_of(one.anatomy, 1, dictionary, text, False)
    alive = contexts.fired.nonzero()[:5, 0].tolist()
    examples = examples_of(one.anatomy, 1, contexts, alive, text)
    assert {example.feature for example in examples} == set(alive)
    for example in examples[:6]:
        places = {}
        for source in (None, example.source):

            def change(v, source=source):
                v = v.clone()
                if source is not None:
                    v[:, source] = 0
                return v

            zeroed = transect.forward.changed(one.anatomy, {("v", 1): change})
            with torch.no_grad(), zeroed, watch(one.anatomy, ["heads"], [1]) as seen:
                one.model(input_ids=example.ids[None])
            places[source] = float(dictionary.before(seen.heads[1])[0, example.position, example.feature])
        part = float(example.sources[example.source])
        assert places[None] - places[example.source] == pytest.approx(part, abs=1e-6)  # norms in float32


def test_it_is_kept_and_read_the_next_time(tmp_path):
    one, place = specimen(), tmp_path / "d"
    first = asked(one, dictionary=str(place), layers="0,1")[NAME]
    assert sorted(folder.name for folder in place.iterdir()) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    said = json.loads((place / "blocks.1.attn.hook_z" / "cfg.json").read_text())
    assert said["metadata"]["hook_name"] == "blocks.1.attn.hook_z"
    again = asked(one, dictionary=str(place), layers="1", tokens=64)[NAME]  # nothing is trained
    assert int(again["rounds"][0]) == 0 and float(first["rounds"][1]) > 0
    assert "was read" in " ".join(again.findings)
    for name in ("loss", "recovered", "l0", "dead", "frequency", "head_share", "shown", "effect"):
        torch.testing.assert_close(again[name][0], first[name][1], equal_nan=True)
    alone = asked(one, dictionary=str(place / "blocks.1.attn.hook_z"), layers="1")[NAME]
    assert torch.equal(alone["loss"], again["loss"])
    kept = asked(one, layers="1")[NAME]  # the same training, not kept
    torch.testing.assert_close(kept["loss"][0], first["loss"][1])
    assert "not kept" in kept.findings[-1]


def test_a_result_is_not_taken_for_that_of_another_dictionary(tmp_path):
    one = specimen()
    more = {"out": tmp_path / "report", "settings": {NAME: {**QUICK, "dictionary": str(tmp_path / "d"), "layers": "1"}}}
    first = transect.inspect(one.model, [NAME], one.data, **more)[NAME]
    other = Specimen(one.anatomy, word_tokenizer(), one.data, seed=5)
    asked(other, dictionary=str(tmp_path / "e"), layers="1")
    for file in ("cfg.json", "sae_weights.safetensors"):
        here = f"blocks.1.attn.hook_z/{file}"
        (tmp_path / "d" / here).write_bytes((tmp_path / "e" / here).read_bytes())
    assert not torch.equal(transect.inspect(one.model, [NAME], one.data, **more)[NAME]["loss"], first["loss"])


def test_what_does_not_fit_is_refused_before_any_work(tmp_path, monkeypatch):
    one, place = specimen(), tmp_path / "d"
    asked(one, dictionary=str(place), layers="1")
    monkeypatch.setattr("transect.probes.catalog.attention_sae.dictionaries.train_dictionary", None)
    changed = Specimen(Anatomy(tiny("llama", seed=1)), word_tokenizer(), one.data)
    with pytest.raises(TransectError, match=r"trained on another model.*foreign=true"):
        asked(changed, dictionary=str(place), layers="1")
    assert NAME in asked(changed, dictionary=str(place), layers="1", foreign=True)
    with pytest.raises(TransectError, match=r"is of blocks.1.attn.hook_z, and not.*choose layers=1"):
        asked(one, dictionary=str(place / "blocks.1.attn.hook_z"), layers="0")
    (tmp_path / "narrow").mkdir()
    foreign(tmp_path / "narrow" / "blocks.1.attn.hook_z")
    with pytest.raises(TransectError, match=r"vectors of 6 numbers, and the heads of layer 1 put out"):
        asked(one, dictionary=str(tmp_path / "narrow"), layers="1")
    (place / "blocks.1.attn.hook_z" / "sae_weights.safetensors").write_bytes(b"broken")
    with pytest.raises(BadCheckpoint, match="truncated"):
        asked(one, dictionary=str(place), layers="1")
    (tmp_path / "mine" / "blocks.1.attn.hook_z").mkdir(parents=True)
    (tmp_path / "mine" / "blocks.1.attn.hook_z" / "notes.txt").write_text("mine")
    with pytest.raises(TransectError, match="not a sparse dictionary"):
        asked(one, dictionary=str(tmp_path / "mine"), layers="1")
    for layers, match in (("9", "layer 9 cannot be looked at: .* are 0, 1"), ("-1", "layer -1"), ("x", "middle, all")):
        with pytest.raises(TransectError, match=match):
            asked(one, layers=layers)


def test_what_it_cannot_say_anything_about_is_refused():
    without = Specimen(Anatomy(tiny("llama")))
    assert "--data" in asked(without).refused[NAME]
    one = Specimen(Anatomy(tiny("llama")), data=text(count=1, batch=1))
    assert "none is left to train on" in asked(one).refused[NAME]
    short = Specimen(Anatomy(tiny("llama")), data=text(count=4, length=1))
    assert "no token to train" in asked(short).refused[NAME]
    assert "next token" in asked(Specimen(Anatomy(tiny("bert")), data=text("bert"))).refused[NAME]
    anatomy = Anatomy(tiny("llama"))
    for block in anatomy.blocks:
        block.attention.drop()
    assert "no block has attention heads" in asked(Specimen(anatomy, data=text())).refused[NAME]


def test_layers_without_attention_are_passed_by():
    anatomy = Anatomy(tiny("llama"))
    last = len(anatomy.blocks) - 1
    anatomy.blocks[0].attention.drop()
    one = Specimen(anatomy, data=text())
    assert chosen_layers(one, "all") == list(range(1, last + 1)) and chosen_layers(one, "middle")[0] > 0
    assert chosen_layers(one, "1,1") == [1]
    with pytest.raises(TransectError, match="layer 0 cannot"):
        chosen_layers(one, f"0,{last}")
    with pytest.raises(NotApplicable):
        for block in anatomy.blocks[1:]:
            block.attention.drop()
        chosen_layers(one, "all")


def test_the_report_shows_features_in_their_text(tmp_path):
    one = specimen()
    found = transect.inspect(one.model, [NAME], one.data, tokenizer=word_tokenizer(), out=tmp_path / "r",
                             settings={NAME: {**QUICK, "layers": "all"}})  # fmt: skip
    page = (tmp_path / "r" / "index.html").read_text()
    assert "Sparse features of attention outputs" in page and found[NAME].findings[0][:30] in page
    assert "The strongest features" in page and "«" in page
