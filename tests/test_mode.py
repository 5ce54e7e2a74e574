"""Whatever runs a model leaves it as it was: each module's mode, gradients, settings, and torch's random numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import transect
from tests.models import VOCABULARY, tiny
from tests.test_data import word_tokenizer
from tests.test_every_method import KEEPS, METHODS, QUICK
from transect import Anatomy
from transect.compression.compress import compress_anatomy
from transect.compression.recipe import Recipe
from transect.data import Fact, Passage, Specimen, load
from transect.evaluation import evaluate_loss, measure_speed
from transect.forward import answer_log_probabilities, at_rest, next_logits, recitations
from transect.probes import probes, run_probes
from transect.statistics import InputCovariance, collect

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
ALLOCATIONS = [one.name for one in transect.allocations()]


def noisy(training: bool) -> Any:
    """A GPT-2, whose configuration has dropout everywhere, in a mode that is not the same in all modules."""
    model = tiny("gpt2").train(training)
    if training:
        model.transformer.h[1].attn.eval()
        model.transformer.wte.requires_grad_(False)
    return model


def state_of(model: Any) -> dict[str, Any]:
    """What nobody may change: modes, gradients asked for, the configuration, torch's random numbers."""
    return {
        **{f"mode of {name}": module.training for name, module in model.named_modules()},
        **{f"gradient of {name}": parameter.requires_grad for name, parameter in model.named_parameters()},
        "cache": model.config.use_cache,
        "random": torch.get_rng_state().tolist(),
    }


def in_both_modes(function: Any) -> tuple[Any, Any]:
    """What a function of a model gives in evaluation mode, and in training mode; it leaves the latter as it was."""
    model = noisy(training=True)
    torch.manual_seed(7)
    before = state_of(model)
    found = function(model)
    after = state_of(model)
    assert {name: value for name, value in before.items() if after.get(name, value) != value} == {}
    return function(noisy(training=False)), found


def test_at_rest_and_back_one_by_one():
    model = noisy(training=True)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), at_rest(model, frozen=True):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with at_rest(model):
            torch.rand(3)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise ZeroDivisionError
    assert state_of(model) == before


def test_what_is_put_in_takes_the_mode_around_it_and_what_goes_is_not_kept():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))).eval()
    model[1].train()
    with at_rest(model):
        model[0][0], model[1][0] = nn.Linear(2, 2).train(), nn.Linear(2, 2).eval()
    assert not model[0][0].training and model[1][0].training and model[1].training and not model.training


def compressed(model: Any, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
    before = {name: module.training for name, module in model.named_modules()}
    transect.compress(model, *args, data=DATA, **options)
    for name, module in model.named_modules():  # modules that were put in, too
        around = name
        while around not in before:
            around = around.rpartition(".")[0]
        assert module.training == before[around], name
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(pair: tuple[Any, Any]) -> None:
    evaluated, trained = pair
    assert evaluated.keys() == trained.keys()
    assert all(torch.equal(evaluated[name], trained[name]) for name in evaluated)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method):
    keep, quick = KEEPS.get(method, 0.7), QUICK.get(method, {})
    same(in_both_modes(lambda model: compressed(model, method, keep, **quick)))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_and_block_by_block(allocation):
    options: dict[str, Any] = {"allocation": allocation, **({"allocation_trials": 2} if allocation == "ilp" else {})}
    same(in_both_modes(lambda model: compressed(model, "svd-llm", 0.7, **options)))
    if allocation in ("uniform", "ilp"):
        options |= {"sequential": True, "refit": True}
        same(in_both_modes(lambda model: compressed(model, "svd-llm", 0.7, **options)))


def test_also_after_an_error():
    def fail(model: Any) -> str:
        batches = load(DATA, model)
        with pytest.raises(ZeroDivisionError):  # in the second pass, block by block
            compress_anatomy(
                Anatomy(model), Recipe("svd-llm", 0.7, sequential=True), batches,
                progress=lambda items, label: 1 / 0,
            )  # fmt: skip
        handle = model.transformer.h[2].register_forward_hook(lambda *_: 1 / 0)
        for function in (evaluate_loss, measure_speed, collected):
            with pytest.raises(ZeroDivisionError):
                function(model, *([load(DATA, model)] if function is evaluate_loss else []))
        failed = run_probes(specimen(model), {probe.name: {} for probe in probes()}).failed
        assert {"lac", "lazy-neuron", "depth-efficiency"} <= set(failed)
        handle.remove()
        return "failed"

    assert in_both_modes(fail) == ("failed", "failed")


def collected(model: Any) -> dict[str, torch.Tensor]:
    return collect(Anatomy(model), load(DATA, model), [InputCovariance()]).state()


def specimen(model: Any) -> Specimen:
    """A small model with a text, facts, choices and passages."""
    text = torch.randint(3, VOCABULARY, (8, 48), generator=torch.Generator().manual_seed(5))
    facts = [Fact("w3 {} w5", f"w{n} w11", "w20", "w21") for n in (10, 12, 14)]
    passages = [Passage("w3 w4 w5 w6", "w7 w8"), Passage("w9 w4 w5 w6", "w7 w9")]
    return Specimen(Anatomy(model), word_tokenizer(), load(text, model), facts, (), passages)


def inspected(model: Any) -> dict[str, Any]:
    """Every probe that says something about it."""
    short = {"bigram-subnetworks": {"steps": 5}}
    found = run_probes(specimen(model), {probe.name: short.get(probe.name, {}) for probe in probes()})
    assert len(found) >= 6 and not found.failed, (found.refused, found.failed)
    return {
        f"{name} {quantity}": found[name].quantities[quantity].values
        for name in found
        for quantity in found[name].quantities
    }


def test_every_probe():
    evaluated, trained = in_both_modes(inspected)
    assert evaluated.keys() == trained.keys()
    for name, values in evaluated.items():
        torch.testing.assert_close(trained[name], values, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", ["evaluation", "statistics", "answers", "next", "recitations"])
def test_every_measurement(name):
    pairs = [(row[:9], row[9:12]) for row in DATA]
    functions = {
        "evaluation": lambda model: evaluate_loss(model, load(DATA, model)).loss,
        "statistics": lambda model: sum(float(tensor.double().sum()) for tensor in collected(model).values()),
        "answers": lambda model: answer_log_probabilities(model, pairs).tolist(),
        "next": lambda model: next_logits(model, [row for row in DATA]).tolist(),
        "recitations": lambda model: [row.tolist() for row in recitations(model, pairs)],
    }
    evaluated, trained = in_both_modes(functions[name])
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=1e-6)


def test_a_repair():
    teacher = noisy(training=True)
    before = state_of(teacher)

    def repaired(model: Any) -> dict[str, torch.Tensor]:
        transect.compress(model, "svd", 0.7)
        transect.recover(model, DATA, "blocks", teacher=teacher, steps=1, batch_size=4, held_out=0.5)
        return copy.deepcopy(model.state_dict())

    same(in_both_modes(repaired))
    assert {**state_of(teacher), "random": None} == {**before, "random": None}


def test_an_edit():
    facts = [Fact("w3 {} w5", "w10 w11", "w20", "w21")]

    def edited(model: Any) -> dict[str, torch.Tensor]:
        words = word_tokenizer()
        transect.edit(model, "constrained-ft", facts=facts, tokenizer=words, data=load(DATA, model), steps=2)
        return copy.deepcopy(model.state_dict())

    same(in_both_modes(edited))
