"""Rates by layer: the factors that FARMS' exponents give, whose numbers get them, and going on bit for bit."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner

import transect
from transect.adaptation import Settings
from transect.adaptation.attached import Attached
from transect.adaptation.rates import renew_rates, weight_now
from transect.adaptation.registry import adapter_named
from transect.adaptation.targets import targets_of
from transect.anatomy import Anatomy
from transect.cli import main_group
from transect.errors import TransectError
from transect.spectra import tail_exponent
from transect.training import Machine, Parametrized, Problem, Run, Schedule, State, layer_rates_named, train

from .models import VOCABULARY, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(5))
LR = 1e-3


def gaussian(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def farms(weights, **settings):
    entry = layer_rates_named("farms")
    return entry.function(**entry.settings(settings)).of(weights)


def test_factors_rise_with_the_exponent_from_the_smallest_to_the_largest():
    weights = {
        name: gaussian(48, 64, seed) + spikes * gaussian(48, 6, seed + 10) @ gaussian(6, 64, seed + 20)
        for seed, (name, spikes) in enumerate({"light": 0.0, "middle": 0.5, "heavy": 1.0}.items())
    }
    found = farms(weights, smallest=0.6, largest=1.4)
    alphas = {name: tail_exponent(weight, 48, 4, "hill-median") for name, weight in weights.items()}
    assert found["heavy"] == pytest.approx(0.6) and found["light"] == pytest.approx(1.4)
    share = (alphas["middle"] - alphas["heavy"]) / (alphas["light"] - alphas["heavy"])
    assert 0.1 < share < 0.9 and found["middle"] == pytest.approx(0.6 + 0.8 * share)
    scaled = farms({name: 1e-3 * weight for name, weight in weights.items()}, smallest=0.6, largest=1.4)
    assert scaled == pytest.approx(found, abs=1e-6)
    with_zeros = farms({**weights, "zeros": torch.zeros(48, 64)}, smallest=0.6, largest=1.4)
    assert with_zeros == pytest.approx({**found, "zeros": 1.0})


def test_equal_exponents_change_nothing():
    same = gaussian(32, 32)
    for weights in ({"a": same, "b": same}, {"a": same}, {"a": torch.zeros(8, 8), "b": torch.zeros(8, 8)}):
        assert farms(weights, smallest=0.1, largest=1.9) == dict.fromkeys(weights, 1.0)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_number_is_stepped_at_the_rate_of_its_layer(method):
    """The first step of AdamW moves each number that has a gradient by the rate."""
    dense = tiny("gpt2")
    paths = targets_of(Anatomy(dense), None)
    factors = farms({path: dense.get_submodule(path).weight.detach().T for path in paths})
    assert min(factors.values()) == 0.5 and max(factors.values()) == 1.5
    model, settings = copy.deepcopy(dense), {} if method == "full" else {"alpha": 1.0}
    transect.adapt(model, method, DATA, layer_rates="farms", lr=LR, steps=1, batch_size=18, device="cpu", **settings)
    moved = {}
    for name, parameter in model.named_parameters():
        if method == "full":
            moved[name] = (parameter - dense.get_parameter(name)).abs().max().item()
        elif "lora_B" in name:  # which begins at zero
            moved[name] = parameter.abs().max().item()
    for name, distance in moved.items():
        (factor,) = [
            factors[path] for path in paths if name in (f"{path}.weight", f"{path}.lora_B.default.weight")
        ] or [1]
        assert distance == pytest.approx(factor * LR, rel=2e-3), name
    assert len(moved) > len(paths) or method == "lora"


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "dora"), ("gpt2", "pissa"), ("llama", "lift"), ("llama", "mole")]
)
def test_the_weight_is_that_of_layer_and_adapter(name, method):
    model = tiny(name)
    paths, adapter = targets_of(Anatomy(model), None), adapter_named(method)
    dense = {path: weight_now(model.get_submodule(path), shape[1]).clone() for path, shape in paths.items()}
    found = Attached(
        model, adapter.config(list(paths), {adapter.size: 4} | ({"filter_rank": 4} if method == "lift" else {})), 0
    )
    with torch.no_grad():
        for parameter in found.parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.train()
    now = {path: weight_now(model.get_submodule(path), shape[1], adapter.merges) for path, shape in paths.items()}
    assert all(module.training for module in model.modules())
    merged = found.merge() if adapter.merges else None
    for path in paths:
        if merged is None:  # an adapter that chooses by token makes no weight
            torch.testing.assert_close(now[path], dense[path], rtol=0, atol=0)
        else:
            expected = weight_now(merged.get_submodule(path), paths[path][1])
            torch.testing.assert_close(now[path], expected, rtol=1e-4, atol=1e-5)
            assert (now[path] - dense[path]).abs().max() > 1e-3


def test_rates_are_renewed_at_every_epoch_or_so_many_steps():
    def at(every):
        one, seen = torch.nn.Parameter(torch.zeros(2)), []
        problem = Problem(
            "test", {"one": one}, [0, 1, 2], lambda batch: ((one - 1).square().sum(), 1.0), None, lambda: None,
            renew=lambda: seen.append(one[0].item()) or {"one": 0.0 if len(seen) == 2 else 1.0}, renew_every=every,
        )  # fmt: skip
        schedule = Schedule(lr=0.1, epochs=3, shape="constant", warm_up=0)
        train(problem, Run(schedule, Machine("cpu"), State(None)), {})
        return seen

    first, second, third = at(0)
    assert first == 0 and second == pytest.approx(0.3, abs=0.01) and third == second  # a factor of 0 in between
    assert len(at(2)) == 5 and len(at(100)) == 1


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    options = {
        "layer_rates": "farms", "settings": {"farms": {"every": 2, "windows": 2}}, "lr": 1e-2, "steps": 5,
        "batch_size": 4, "every": 3, "device": "cpu",
    }  # fmt: skip

    def stop(check):
        if check.step == 3:  # the rates are those of step 2
            raise KeyboardInterrupt

    whole, parts = tiny("llama"), tiny("llama")
    transect.adapt(whole, "full", DATA, **options)
    with pytest.raises(KeyboardInterrupt):
        transect.adapt(tiny("llama"), "full", DATA, **options, checkpoint=tmp_path / "c", on_check=stop)
    transect.adapt(parts, "full", DATA, **options, checkpoint=tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_on_the_command_line(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("\n".join(f'{{"input_ids": {row.tolist()}}}' for row in DATA))
    place = tmp_path / "out"
    words = ["adapt", tmp_path / "model", "--method", "full", "--data", tmp_path / "text.jsonl", "--steps", 1,
             "--json", "--device", "cpu", "--layer-rates", "farms", "--farms.largest", 1.2, "--out", place]  # fmt: skip
    result = CliRunner().invoke(main_group, [str(word) for word in words], catch_exceptions=False)
    noted = json.loads(result.stdout)["settings"]
    assert noted["layer_rates"] == "farms" and noted["layer_rates_options"]["largest"] == 1.2
    assert noted["layer_rates_options"]["smallest"] == 0.5


def test_what_does_not_go():
    with pytest.raises(TransectError, match="unknown rates by layer 'far'; known: farms"):
        transect.adapt(tiny("llama"), "full", DATA, layer_rates="far")
    with pytest.raises(TransectError, match=r"largest=0\.9 must be"):
        transect.adapt(tiny("llama"), "full", DATA, layer_rates="farms", settings={"farms": {"largest": 0.9}})
    model = tiny("llama")
    Anatomy(model).blocks[1].mlp.up.write(torch.eye(48, 32))
    before = logits(model.eval(), inputs("llama"))
    with pytest.raises(
        TransectError, match=r"farms cannot choose a rate for model\.layers\.1\.mlp\.up_proj.*falls off"
    ):
        transect.adapt(model, "lora", DATA, layer_rates="farms", device="cpu")
    assert torch.equal(logits(model.eval(), inputs("llama")), before)


def test_with_a_parametrization_the_numbers_of_a_layer_get_its_rate():
    model = tiny("phi3")  # which stores several matrices as one
    layers = targets_of(Anatomy(model), None)
    factors = farms({path: model.get_submodule(path).weight.detach().clone() for path in layers})
    with_other_numbers = Parametrized(Anatomy(model), "weight-compander")
    problem = Problem("test", with_other_numbers.parameters, [], lambda batch: None, None, lambda: None)
    renew_rates(problem, Settings("weight-compander", layer_rates="farms").resolved(), model, layers)
    rates = problem.renew()
    assert {name for name in problem.parameters if name not in rates} == {
        name for name in problem.parameters if "norm" in name or "embed" in name or "lm_head" in name
    }
    for name, rate in rates.items():
        (factor,) = [factor for path, factor in factors.items() if name.startswith(f"{path}.")]
        assert rate == pytest.approx(factor, abs=1e-3)
