"""Models without a head whose loss is known: whatever needs only their inner activations works, a loss is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel, BertForTokenClassification

import transect
from tests.models import CONFIGS, assert_alike, assert_same_tensors, inputs
from tests.test_data import word_tokenizer, words
from tests.test_every_method import QUICK
from transect import Anatomy
from transect.checkpoint import open_model
from transect.compression import method as registered
from transect.data import Specimen, load
from transect.errors import NotApplicable, TransectError
from transect.evaluation import evaluate_loss, measure_speed
from transect.forward import feeds_of, run_blocks, task_of
from transect.probes import run_probes
from transect.probes.curvature import curvature
from transect.statistics import BlockSimilarity, FeatureNorm, HeadContribution, InputCovariance, collect

NAMES = ["bert", "roberta", "gpt2", "llama", "vit"]
INPUTS_ONLY = ["svd-llm", "asvd", "wanda", "sparsegpt", "amp", "cospadi", "armor"]
SHORT: dict[str, Any] = {**QUICK, "cospadi": {"iterations": 1}, "armor": {"rounds": 1}}


def headless(name: str, cls: Any = AutoModel) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name][0]
    config = type(config).from_dict(config.to_dict())
    return (AutoModel.from_config(config) if cls is AutoModel else cls(config)).eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in inputs(name).items() if key != "labels"}


def states(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(name)).last_hidden_state


@pytest.mark.parametrize("name", NAMES)
def test_statistics_and_single_blocks(name):
    model = headless(name)
    anatomy = Anatomy(model)
    assert task_of(model) == ("unknown" if name == "vit" else "embedding")
    wanted = [InputCovariance(), FeatureNorm(), BlockSimilarity(), HeadContribution()]
    store = collect(anatomy, [batch(name)], wanted)
    seen: list[torch.Tensor] = []
    matrix = anatomy.blocks[1].matrix("down")
    handle = matrix.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    whole = states(model, name)
    handle.remove()
    expected = seen[0].double().T @ seen[0].double() / len(seen[0])
    torch.testing.assert_close(store.value(matrix.source, InputCovariance()), expected, rtol=1e-4, atol=1e-6)
    (feed,) = feeds_of(anatomy, [batch(name)])
    assert all("past_key_values" not in call[1] or call[1]["past_key_values"] is None for call in feed.calls)
    with torch.no_grad():
        last = run_blocks(anatomy, feed, 0, feed.hidden)
        torch.testing.assert_close(last if anatomy.final_norm is None else anatomy.final_norm(last), whole)
    assert measure_speed(model, new_tokens=1, repeats=1).decode_tokens_per_second is None


@pytest.mark.parametrize("method", INPUTS_ONLY)
def test_methods_that_need_only_inputs(method, tmp_path):
    assert all(one.needs in ("input", "matrix", "block") for one in registered(method).needs)
    model = headless("bert")
    before = Anatomy(model).matrix_bytes()
    transect.compress(model, method, 0.7, [batch("bert")], **SHORT.get(method, {}))
    assert Anatomy(model).matrix_bytes() <= 0.7 * before * (1 + 1e-9)
    model.save_pretrained(tmp_path / "small")
    again = AutoModel.from_pretrained(tmp_path / "small").eval()
    assert_same_tensors(again, model)
    assert_alike(states(again, "bert"), states(model, "bert"))
    assert type(open_model(tmp_path / "small").model).__name__ == "BertModel"


def test_block_by_block_and_from_texts():
    """Sequences are wrapped as the tokenizer wraps a text, since the model was trained so."""
    model, tokenizer = headless("bert"), word_tokenizer(wrap=True)
    data = load([words(100)], model, tokenizer, sequence_length=20)
    first = next(iter(data))["input_ids"][0]
    assert len(first) == 20 and first[[0, -1]].tolist() == tokenizer("")["input_ids"]
    transect.compress(model, "svd-llm", 0.7, data, sequential=True, refit=True)


def test_a_loss_is_refused():
    """For a text model without a head see test_encoder_states.py."""
    model = headless("bert", BertForTokenClassification)
    message = "BertForTokenClassification has no head whose loss is known here"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for function in (
        lambda: evaluate_loss(model, [batch("bert")]),
        lambda: transect.evaluate(model, [batch("bert")]),
        lambda: transect.compress(model, "kfac-svd", 0.7, [batch("bert")]),
        lambda: transect.compress(model, "svd", 0.7, [batch("bert")], allocation="ilp"),
        lambda: transect.recover(model, [batch("bert")] * 4, "full"),
    ):
        with pytest.raises(TransectError, match=message):
            function()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    specimen = Specimen(Anatomy(model), data=load([batch("bert")], model))
    with pytest.raises(NotApplicable):
        curvature(specimen, Anatomy(model).matrices(("q",)))
    found = run_probes(specimen, {"nuclear-norm": {}, "lazy-neuron": {}, "kfac-spectrum": {}})
    assert set(found) == {"nuclear-norm", "lazy-neuron"} and set(found.refused) == {"kfac-spectrum"}
