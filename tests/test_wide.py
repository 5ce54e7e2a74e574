"""Narrow weights are measured with wide arithmetic, and are what they were afterwards."""

import copy

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.data import Specimen, load
from transect.evaluation import evaluate_loss
from transect.forward import computing_wide
from transect.probes import run_probes

from .depth import small
from .models import VOCABULARY, apart, tiny

DATA = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_is_as_it_was_afterwards(dtype):
    model = tiny("llama").to(dtype)
    before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with pytest.raises(KeyError), computing_wide(model), computing_wide(model.model):
        assert {p.dtype for p in model.parameters()} == {torch.float32} and model.dtype == torch.float32
        raise KeyError
    assert dict(model.named_parameters()) == parameters  # the very same
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and tensor.data_ptr() == before[name][1] and torch.equal(tensor, before[name][2])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_narrow_model_has_the_loss_and_the_statistics_of_its_wide_copy(name):
    narrow = tiny(name).bfloat16()
    wide = copy.deepcopy(narrow).float()
    losses = [evaluate_loss(model, load(DATA, model)).loss for model in (narrow, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for method in ("svd-llm", "kfac-svd"):
        ours, theirs = copy.deepcopy(narrow), copy.deepcopy(wide)
        for model in (ours, theirs):
            transect.compress(model, method, 0.5, DATA)
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
        for mine, its in zip(ours.parameters(), theirs.bfloat16().parameters(), strict=True):
            assert apart(mine.float(), its.float()) < 0.01


@pytest.mark.parametrize("options", [{"sequential": True}, {"sequential": True, "refit": True}])
def test_block_by_block_too(options):
    narrow = tiny("llama").bfloat16()
    wide = copy.deepcopy(narrow).float()
    for model in (narrow, wide):
        transect.compress(model, "svd-llm", 0.5, DATA, **options)
    with torch.no_grad(), computing_wide(narrow):
        assert apart(narrow(DATA).logits, wide(DATA).logits) < 0.05


PROBES = {"cd-t": {"prompts": 2, "length": 5, "most": 2}, **small(), "attention-sinks": {}, "stream-growth": {}}


def test_probes_of_a_narrow_model_say_what_they_say_of_its_wide_copy():
    """With a stream as long as those of large models are: float16 cannot hold its squares, nor what a layer adds."""
    narrow = tiny("llama")
    with torch.no_grad():
        narrow.model.embed_tokens.weight.mul_(400 / narrow.model.embed_tokens.weight.std())
    narrow = narrow.half()
    wide = copy.deepcopy(narrow).float()
    texts = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(5))
    ours, theirs = (run_probes(Specimen(Anatomy(one), data=load(texts, one)), PROBES) for one in (narrow, wide))
    assert not ours.failed and ours.keys() == theirs.keys() == PROBES.keys()
    for name, result in theirs.items():
        for key, quantity in result.quantities.items():
            torch.testing.assert_close(ours[name][key], quantity.values, equal_nan=True, msg=f"{name}: {key}")
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float16}
