"""factual-recall: the MLP as a function of what it is fed."""

from importlib import import_module

import pytest
import torch

from tests.models import CAUSAL
from tests.recalled import FLOAT32_NORMS, no_hooks, problem
from transect.probes.catalog.factual_recall.application import (
    ALPHAS,
    DIRECTIONS,
    applied,
    heads,
    is_function,
    outputs,
    read_by_mlps,
    told,
    words,
)
from transect.probes.catalog.factual_recall.contributions import Attribution, head_outputs
from transect.probes.catalog.factual_recall.recall import recall


@pytest.mark.parametrize("name", CAUSAL)
def test_the_mlp_applied_to_the_real_stream_is_the_real_mlp(name):
    specimen, task, states = problem(name)
    streams = read_by_mlps(specimen, states)
    for layer, output in outputs(specimen, task, states, streams).items():
        torch.testing.assert_close(output, states.mlp[layer], rtol=1e-9, atol=1e-6 if name in FLOAT32_NORMS else 1e-9)
    assert no_hooks(specimen.model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_mlp_applied_by_hand(name):
    """An artificial stream through the model's own norm and matrices, written out."""
    specimen, task, states = problem(name)
    block = specimen.anatomy.blocks[1]
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = outputs(specimen, task, states, {1: x})[1]
    mlp, norms = block.mlp, block.norms

    def through(matrix, value):
        return torch.nn.functional.linear(value, matrix.weight, matrix.bias)

    normed = norms["mlp_input"](x)
    up = through(mlp.up, normed)
    neurons = mlp.activation(up) if mlp.gate is None else mlp.activation(through(mlp.gate, normed)) * up
    out = through(mlp.down, neurons)
    out = norms["mlp_output"](out) if "mlp_output" in norms else out
    torch.testing.assert_close(found, out.detach(), rtol=1e-5, atol=1e-6 if name in FLOAT32_NORMS else 1e-9)


def test_directions_of_subjects():
    specimen, task, _ = problem("gpt_neox")
    one = recall(specimen, task)
    path = torch.zeros(3, 4, dtype=torch.float64)
    path[0, 1], path[1, 2], path[2, 0], path[1, 0] = -5, -9, -1, 3
    found = heads(specimen, one, path)
    assert list(found) == [1, 2]  # a parallel MLP does not read the heads of its own block
    parts = head_outputs(specimen.anatomy.blocks[0], one.states.heads[0], one.states.attention[0])[:, 1]
    torch.testing.assert_close(found[1], parts - parts.mean(0))
    assert found[2].mean(0).abs().max() < 1e-12 and not torch.equal(found[2], found[1])
    assert heads(specimen, one, path.abs()) == {}
    spread = {0: torch.ones(12, 32, dtype=torch.float64)}
    word = words(one, spread)[0]
    torch.testing.assert_close(word.norm(dim=1), torch.full((12,), 32**0.5, dtype=torch.float64))
    gain, weight = specimen.lens.gain.detach(), specimen.lens.weight
    token = int(task.prompts[3][task.subjects[3]])
    expected = (weight[token] - weight.mean(0)) * gain
    assert float(torch.cosine_similarity(word[3], expected - expected.mean(), dim=0)) == pytest.approx(1)


def test_places_in_the_vocabulary(monkeypatch):
    specimen, task, states = problem("gpt2")
    attribution = Attribution(specimen.lens, states.residual[3])
    whole = (attribution.normed(states.mlp[2]) @ specimen.lens.weight.T).argsort(1, descending=True).argsort(1)
    expected = whole.gather(1, task.answers[:, None])[:, 0] + 1
    assert torch.equal(attribution.ranks(states.mlp[2], task.answers), expected)
    monkeypatch.setattr(import_module("transect.probes.catalog.factual_recall.contributions"), "_CHUNK", 7)
    assert torch.equal(attribution.ranks(states.mlp[2], task.answers), expected)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_an_mlp_that_is_a_function_is_found_and_one_that_is_not_is_not(name, monkeypatch):
    """Planted: the MLP answers with the token that the subject's stream stands for."""
    specimen, task, states = problem(name)
    one = recall(specimen, task)
    task.answers[:] = torch.arange(12) + 20
    path = torch.full((3, 4), -1.0, dtype=torch.float64)
    streams, weight = read_by_mlps(specimen, states), specimen.lens.weight
    keys = torch.linalg.pinv(streams[2] - streams[2].mean(0))  # 32 x 12: which subject a stream is of
    mean, answers = streams[2].mean(0), weight[task.answers] / specimen.lens.gain.detach()

    def planted_outputs(specimen, task, states, streams):
        return {2: ((streams[2] - mean) @ keys) @ answers}

    monkeypatch.setattr(import_module("transect.probes.catalog.factual_recall.application"), "outputs", planted_outputs)
    found = applied(specimen, one, path)
    stream, once = DIRECTIONS.index("stream"), ALPHAS.index(1.0)
    assert (found.first[2, stream, once] == 1).all() and (found.other_first[2, stream, once] == 0).all()
    assert (found.rank[2, stream, once] <= 3).all() and (found.other_rank[2, stream, once] > 1).any()
    assert is_function(found, 2, "stream")
    assert found.first[:2].isnan().all() and not is_function(found, 1, "stream")
    monkeypatch.setattr(
        import_module("transect.probes.catalog.factual_recall.application"),
        "outputs",
        lambda *given: {2: answers[:1].expand(12, -1)},
    )
    constant = applied(specimen, one, path)
    assert not is_function(constant, 2, "stream") and constant.first[2, stream, once].sum() == 1
    assert "does not act" in told(task, constant, 2)
    assert "no MLP to apply" in told(task, constant, 0)


def test_the_mean_stream_alone_knows_no_subject():
    specimen, task, _ = problem("llama")
    one = recall(specimen, task)
    found = applied(specimen, one, torch.full((3, 4), -1.0, dtype=torch.float64))
    assert torch.equal(found.first[:, :, 0], found.other_first[:, :, 0])
    assert torch.equal(found.rank[:, 0, 0], found.rank[:, 2, 0])
    assert not torch.equal(found.rank[:, 2, 0], found.rank[:, 2, 2])
