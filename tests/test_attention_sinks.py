"""Attention sinks and massive activations: brute force, planted cases, padding, and every architecture."""

import pytest
import torch

from transect.anatomy import Anatomy
from transect.data import Batches, Specimen
from transect.errors import TransectError
from transect.forward import changed
from transect.probes import drawings, run_probes

from .models import CAUSAL, CONFIGS, inputs, logits, tiny

NAME = "attention-sinks"


def specimen(name, *batches, dtype=torch.float64):
    model = tiny(name, dtype=dtype)
    return Specimen(Anatomy(model), data=Batches(list(batches) or [inputs(name)]))


def inspected(one, **settings):
    return run_probes(one, {NAME: settings})


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_model_runs_and_is_as_before(name):
    one = specimen(name, dtype=torch.float32)
    before = logits(one.model, inputs(name))
    result = inspected(one)[NAME]
    assert result.findings and result.caveats and len(drawings(result)) == 4
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())
    assert result["first"].shape == (3, 4) and float(result["first"].min()) > 0


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(CAUSAL)))
def test_other_models_run_or_are_refused(name):
    batch = inputs(name)
    batch.setdefault("labels", batch.get("input_ids"))
    found = inspected(specimen(name, batch, dtype=torch.float32))
    if name in ("vit", "deit"):
        assert found[NAME]["first"].shape == (3, 4)
        assert drawings(found[NAME])
    else:
        assert "normalises after the residual sum" in found.refused[NAME]


def test_scores_and_cosines_are_those_of_a_loop():
    one, batch = specimen("llama"), inputs("llama")
    one.model.set_attn_implementation("eager")
    with torch.no_grad():
        output = one.model(**batch, output_attentions=True, output_hidden_states=True)
    result = inspected(one, threshold=0.16, queries=4)[NAME]
    length = batch["input_ids"].shape[1]
    sinks = torch.zeros(3, 2)
    for layer, weights in enumerate(output.attentions):
        for head in range(4):
            expected = sum(float(weights[b, head, q, 0]) for b in range(2) for q in range(length)) / (2 * length)
            assert float(result["first"][layer, head]) == pytest.approx(expected, abs=1e-6)
        for b in range(2):
            for t in range(length - 4):
                score = sum(float(weights[b, h, q, t]) for h in range(4) for q in range(t, length)) / (4 * (length - t))
                sinks[layer, int(t > 0)] += score > 0.16
    assert sinks.sum() > 0
    assert torch.equal(result["sinks"], sinks)
    for layer in range(3):
        states = output.hidden_states[layer]
        cosines = torch.cosine_similarity(states[:, 1:], states[:, :1], dim=-1)
        assert float(result["cosine"][layer]) == pytest.approx(float(cosines.mean()), abs=1e-6)
        assert float(result["cosine squared"][layer]) == pytest.approx(float(cosines.square().mean()), abs=1e-6)


def planted(one, unit, layer, feature):
    """The sublayer adds a huge number to one feature of every token 7."""
    ids = one.text.batches[0]["input_ids"]

    def add(activations):
        out = activations.clone()
        out[..., feature] += 1e6 * (ids == 7)
        return out

    return changed(one.anatomy, {(unit, layer): add})


@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_a_planted_massive_activation_is_found_with_its_place(name, unit):
    ids = torch.tensor([[3, 4, 7, 5, 6, 7, 8, 9, 10, 11, 12, 13]])
    one = specimen(name, {"input_ids": ids})
    assert "none found" in " ".join(inspected(one, ratio=1e5)[NAME].findings[2:])
    with planted(one, unit, 1, 5):
        result = inspected(one, ratio=1e5)[NAME]
    assert result["features"][:2].sum() == 0
    assert result["features"][2:, 5].tolist() == [2, 2] and result["features"].sum() == 4
    assert result["strict"].sum() > 0
    assert result["massive"][2].tolist() == [0, 2]
    assert result["started"].nonzero().tolist() == [[1, ["attention", "mlp"].index(unit)]]
    place = "attention" if unit == "attention" else "the MLP"
    assert f"start mostly in {place} of block 1" in " ".join(result.findings)
    assert result.label("token", 1) == ["'7'"]
    assert result["sink tokens"][0].tolist()[1:] == [2, 2]


def test_nothing_found_is_said():
    found = " ".join(inspected(specimen("gpt2"), threshold=1.0, ratio=1e6)[NAME].findings)
    assert found.count("none found") == 3


def test_a_head_that_looks_at_the_first_token_alone_is_a_sink_head():
    """Queries and keys along one direction that only the first token has, by its place."""
    one = specimen("gpt2")
    block = one.anatomy.blocks[1]
    attention = block.attention
    mark = torch.zeros(32, dtype=torch.float64)
    query, key = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    one.model.transformer.wpe.weight.data[0, 3] += 50  # survives the norm as feature 3
    mark[3] = 40
    key[:, 3] = mark[3]
    bias = torch.ones(32, dtype=torch.float64)
    attention.q.write(query, bias)
    attention.k.write(key, bias * 0)
    result = inspected(one, threshold=0.9)[NAME]
    assert (result["first"][1] > 0.9).all()
    assert result["sinks"][1].tolist() == [2, 0]
    assert "heads pay the first token more than 0.9" in result.findings[0]


def test_padding_and_batching_change_nothing():
    long, short = inputs("gpt2", batch=1, length=12), inputs("gpt2", batch=1, length=9, seed=5)
    alone = inspected(specimen("gpt2", long, short), ratio=3.0)[NAME]
    ids = torch.cat([long["input_ids"], torch.nn.functional.pad(short["input_ids"], (0, 3))])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    padded = inspected(specimen("gpt2", {"input_ids": ids, "attention_mask": mask}), ratio=3.0)[NAME]
    assert alone["features"].sum() > 0
    for name in alone.quantities:
        torch.testing.assert_close(padded[name], alone[name], rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)


@pytest.mark.parametrize("settings", [{"threshold": 2}, {"ratio": 0}, {"queries": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(TransectError, match="attention-sinks"):
        inspected(specimen("gpt2"), **settings)


def test_a_dropped_sublayer_is_left_out():
    one = specimen("llama")
    one.anatomy.blocks[1].attention.drop()
    result = inspected(one)[NAME]
    assert result["first"][1].isnan().all() and result["first"][0].isfinite().all()
    assert drawings(result)
