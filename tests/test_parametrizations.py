"""Every parametrization through the frame: attached and taken away, finished and stored, resumed, and by command."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import transect
from transect.anatomy import Anatomy
from transect.cli import main_group
from transect.errors import TransectError
from transect.training import Parametrized, parametrization_named, parametrizations
from transect.training.parametrizations.stand_in import StandIn

from .models import VOCABULARY, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(5))
NAMES = [one.name for one in parametrizations()]
SMALL: dict[str, dict] = {  # settings for the tiny model (width 32), and what else should be tried
    "dsformer": {"variant": "m", "keep": 0.8, "width": 16, "iterations": 2, "refresh": 3},
    "maestro": {"keep": 0.6, "interval": 3, "ramp": 0.0, "tries": 2},
    "ofq": {"activation_bits": 8, "annealing": 0.5, "boundary": 0.1, "probe": True},
    "pst": {"sparsity": 0.5, "weight_rank": 2, "score_rank": 2},
}
FAST = dict(lr=1e-2, epochs=2, batch_size=4, device="cpu")


def adapt(model, name, **options):
    return transect.adapt(model, name, DATA, settings={name: SMALL.get(name, {})}, **{**FAST, **options})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_taken_away_it_leaves_the_model_bit_for_bit(kind, name):
    model, dense = tiny(kind), tiny(kind)
    modules = {path: type(module) for path, module in dense.named_modules()}
    found = Parametrized(Anatomy(model), name, SMALL.get(name))
    assert found.parameters and len(found.stand_ins) == len(found.matrices)
    assert sum(isinstance(module, StandIn) for module in model.modules()) == len(found.matrices)
    found.detach()
    assert {path: type(module) for path, module in model.named_modules()} == modules
    for (key, ours), theirs in zip(model.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    assert not Anatomy(model).record


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_learns_and_comes_back_from_its_folder_as_it_was_judged(kind, name, tmp_path):
    model = tiny(kind)
    outcome = adapt(model, name, eval_data=DATA[:5], out=tmp_path / "out").outcome
    assert outcome["loss_after"] < outcome["loss_before"] or outcome["kept"] == "start"
    assert outcome["trained"] > 0 and outcome["steps"] == 10
    assert not any(isinstance(module, StandIn) for module in model.modules())
    stored = logits(model.eval(), inputs(kind))
    again = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again, inputs(kind)), stored, atol=1e-5, rtol=1e-4)
    held = transect.evaluate(again, DATA[-2:])["loss"]  # the tenth that chose the state
    assert held == pytest.approx(outcome["loss_after"], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_training_goes_on_bit_for_bit(name, tmp_path):
    whole = tiny("llama")
    adapt(whole, name, every=2)
    state, model = tmp_path / "state", tiny("llama")

    def stop(check):
        if check.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(model, name, every=2, checkpoint=state, on_check=stop)
    for ours, theirs in zip(model.parameters(), tiny("llama").parameters(), strict=True):
        assert torch.equal(ours, theirs)
    checks, again = [], tiny("llama")
    adapt(again, name, every=2, checkpoint=state, on_check=checks.append)
    assert [check.step for check in checks] == [6, 8, 10]
    for (key, ours), theirs in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_by_command_with_its_options(name, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in DATA.tolist()))
    given = {p.name: p.default for p in parametrization_named(name).parameters} | SMALL.get(name, {})
    options = [
        text for key, value in given.items()
        for text in (f"--{name}.{key.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value))
    ]  # fmt: skip
    result = CliRunner().invoke(
        main_group,
        ["adapt", str(tmp_path / "model"), "--method", name, "--data", str(tmp_path / "data.jsonl"), "--out",
         str(tmp_path / "out"), "--steps", "2", "--batch-size", "4", "--device", "cpu", *options],
    )  # fmt: skip
    assert result.exit_code == 0, result.output[-400:]
    assert "numbers trained" in result.output


def test_what_does_not_go_is_said_before_anything_changes():
    model = tiny("gpt2")
    with pytest.raises(TransectError, match="name v too"):
        Parametrized(Anatomy(model), NAMES[0], SMALL.get(NAMES[0]), roles=["q", "k"])
    with pytest.raises(TransectError, match="unknown parametrization"):
        Parametrized(Anatomy(model), "nothing")
    transect.compress(model, "svd", keep=0.5)
    with pytest.raises(TransectError, match="begin with the dense model"):
        Parametrized(Anatomy(model), NAMES[0], SMALL.get(NAMES[0]))
    with pytest.raises(TransectError, match="unknown method"):
        transect.adapt(tiny("llama"), "nothing", DATA)


def test_a_stand_in_is_what_its_weight_says():
    class Doubled(StandIn):
        def __init__(self, weight, bias):
            super().__init__(weight, bias)
            self.halved = nn.Parameter(weight / 2)

        @property
        def weight(self):
            return 2 * self.halved

    layer = nn.Linear(3, 5)
    one, x = Doubled(layer.weight, layer.bias), torch.randn(2, 3)
    torch.testing.assert_close(one(x), layer(x))
    assert torch.equal(one.finished(), one.weight) and (one.in_features, one.out_features) == (3, 5)
