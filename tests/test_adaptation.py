"""Every adapter through the frame: the same start, what is trained, round trips, merging, resuming, and bad input."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

import transect
from transect.adaptation import Settings, adapter_named, adapters
from transect.adaptation.attached import Attached
from transect.adaptation.targets import targets_of
from transect.anatomy import Anatomy
from transect.cli import main_group
from transect.errors import OutOfReach, TransectError

from .models import VOCABULARY, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(5))
OTHER = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(6))
# A size for each that fits the tiny model (width 32, keys of 16, MLP of 48), where the default does not or is no count.
SMALL = {"bone": {"block": 4}, "miss": {"rank": 4}, "svfit": {"rank": 4}, "mole": {"rank": 4}}
NAMES = [one.name for one in adapters()]
PEFT = [name for name in NAMES if name != "full"]
FAST = dict(lr=1e-2, epochs=2, batch_size=4, device="cpu")


def adapt(model, name, data=DATA, **options):
    given = {name: SMALL.get(name, {})}
    return transect.adapt(model, name, data, settings=given, **{**FAST, **options})


def attached(model, name, **options):
    targets = list(targets_of(Anatomy(model), None))
    return Attached(model, adapter_named(name).config(targets, {**SMALL.get(name, {}), **options}), 0)


@pytest.mark.parametrize("name", PEFT)
def test_it_starts_as_the_frozen_model_and_trains_what_it_says(name):
    model = tiny("llama")
    model.requires_grad_(False)
    before = logits(model.eval(), inputs("llama"))
    found = attached(model, name)
    torch.testing.assert_close(logits(model.eval(), inputs("llama")), before, atol=1e-5, rtol=1e-4)
    one = adapter_named(name)
    plain, settings = tiny("llama"), one.settings(SMALL.get(name, {}))
    targets = list(targets_of(Anatomy(plain), None))
    count = sum(p.numel() for p in found.parameters.values())
    assert count == one.trained_in(plain, targets, settings)
    assert one.size_in(plain, targets, count, settings) == settings[one.size]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_keeps_the_base_and_comes_back_from_its_folder(name, tmp_path):
    model, dense = tiny("llama"), tiny("llama")
    found = adapt(model, name, eval_data=DATA[:5], forgets=OTHER, out=tmp_path / "out")
    outcome = found.outcome
    assert outcome["loss_after"] <= outcome["loss_before"] and outcome["steps"] == 10 and outcome["tokens"] == 36 * 12
    learned = outcome["texts"]["eval"]
    assert learned["after"] < learned["before"] and learned["error"] > 0 and "forgets" in outcome["texts"]
    assert outcome["texts"]["forgets"]["before"] == pytest.approx(transect.evaluate(dense, OTHER)["loss"], abs=1e-4)
    assert outcome["texts"]["forgets"]["after"] == pytest.approx(transect.evaluate(model, OTHER)["loss"], abs=1e-4)
    assert outcome["trained"] > 0 and outcome["optimizer_bytes"] > 0
    changed = logits(model.eval(), inputs("llama"))
    assert (changed - logits(dense.eval(), inputs("llama"))).abs().max() > 1e-4
    written = json.loads((tmp_path / "out" / ("config.json" if name == "full" else "adaptation.json")).read_text())
    if name == "full":
        again = type(model).from_pretrained(tmp_path / "out")
        assert written["model_type"] == "llama"
    else:
        assert written["trained"] == outcome["trained"]
        assert {n for n, p in found.model.named_parameters() if p.requires_grad} and isinstance(found.model, PeftModel)
        again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again.eval(), inputs("llama")), changed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in PEFT if adapter_named(name).merges])
def test_merged_it_is_an_ordinary_model(name, tmp_path):
    model, kept = tiny("llama"), tiny("llama")
    adapt(kept, name)
    merged = adapt(model, name, merge=True, out=tmp_path / "out").model
    torch.testing.assert_close(
        logits(merged.eval(), inputs("llama")), logits(kept.eval(), inputs("llama")), atol=1e-4, rtol=1e-3
    )
    again = type(model).from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(again.eval(), inputs("llama")), logits(merged.eval(), inputs("llama")))


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_adaptation_goes_on_bit_for_bit(name, tmp_path):
    whole = tiny("llama")
    adapt(whole, name, every=2)
    state, model = tmp_path / "state", tiny("llama")

    def stop(check):
        if check.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(model, name, every=2, checkpoint=state, on_check=stop)
    again = tiny("llama")
    if name != "full":  # whose numbers are the best so far
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    checks = []
    adapt(again, name, every=2, checkpoint=state, on_check=checks.append)
    assert [check.step for check in checks] == [6, 8, 10]
    for (key, ours), theirs in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


def test_what_does_not_go_is_said_before_anything_changes():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    gpt2 = tiny("gpt2")
    for attempt, said in [
        (lambda: transect.adapt(model, "lorra", DATA), "unknown method 'lorra'; known: bone, .*, dora"),
        (lambda: transect.adapt(model, "lora", DATA, rank=17), "rank=17 is above 16, the largest for model.layers.0"),
        (lambda: transect.adapt(model, "bone", DATA, block=5), "block=5 does not fit .* 1, 2, 4, 8, 16, 32 would"),
        (lambda: transect.adapt(model, "lora", DATA, alpha=-1), "alpha=-1 must be of type float"),
        (lambda: transect.adapt(model, "lora", DATA, optimizer="adam"), "unknown optimizer 'adam'; known: adamw"),
        (lambda: transect.adapt(model, "lora", DATA[:1]), "none is left to train on"),
        (lambda: transect.adapt(model, "lora", DATA, lr=-1.0), "lr must be"),
        (lambda: transect.adapt(gpt2, "lora", DATA, roles=["q"]), "stores k, q, v in one layer"),
        (lambda: transect.adapt(gpt2, "lora", DATA, roles=["gate"]), "has no matrices gate; it has: "),
        (lambda: transect.adapt(tiny("llama", dtype=torch.float16), "lora", DATA), "vanish in float16"),
    ]:
        with pytest.raises(TransectError, match=said):
            attempt()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(OutOfReach, match="it trains 1,"):
        adapter_named("lora").size_for([(32, 32)] * 20, 100)


def test_a_rate_that_diverges_is_one_error_and_the_model_as_it_was():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TransectError, match=r"the loss is not finite after .* Lower the rate"):
        adapt(model, "lora", lr=1e30)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("name", ["lora", "pissa", "dora", "shira", "full"])
@pytest.mark.parametrize(("architecture", "dtype"), [("gpt2", torch.float32), ("llama", torch.bfloat16)])
def test_transposed_layers_and_half_precision(name, architecture, dtype):
    if name == "shira" and architecture == "gpt2":
        with pytest.raises(TransectError, match=r"shira adapts Linear layers alone, and .* is a Conv1D"):
            adapt(tiny(architecture), name)
        return
    model = tiny(architecture, dtype=dtype)
    outcome = adapt(model, name, merge=True).outcome
    assert outcome["loss_after"] < outcome["loss_before"]
    assert all(p.dtype == dtype for p in model.parameters())
    assert transect.evaluate(model, DATA[18:])["loss"] == pytest.approx(outcome["loss_after"], abs=0.02)


def test_roles_and_layers_that_are_stored_together():
    assert len(targets_of(Anatomy(tiny("llama")), ["q", "v"])) == 6
    assert len(targets_of(Anatomy(tiny("gpt2")), ["q", "k", "v", "down"])) == 6
    small = transect.compress(tiny("llama"), "svd", 0.5)
    assert any(path.endswith(("left", "right")) for path in targets_of(Anatomy(small), ["up"]))


def test_settings_are_validated_and_filled_in():
    settings = Settings("lora").resolved()
    assert settings.options == {"rank": 8, "alpha": 16.0, "dropout": 0.05} and settings.lr == 3e-4
    assert settings.optimizer_options["weight_decay"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_command(name, tmp_path):
    words = ["adapt", "organism", "--method", name, "--data", "organism:calibration", "--sequences", "6", "--steps",
             "1", "--batch-size", "2", "--sequence-length", "16", "--forgets", "organism:heldout", "--eval-sequences",
             "2", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(main_group, words, catch_exceptions=False)
    assert result.exit_code == 0 and "numbers trained" in result.output and "must not be forgotten" in result.output
    assert (tmp_path / "out" / ("config.json" if name == "full" else "adapter_config.json")).is_file()


LOADS = """
import os, sys
os.chdir(sys.argv[1])
import transect
assert "peft" not in sys.modules  # which takes seconds
from peft import AutoPeftModelForCausalLM, PeftConfig
assert PeftConfig.from_pretrained("adapter").peft_type == "SVFIT"
model = AutoPeftModelForCausalLM.from_pretrained("adapter")
import torch
print(model(torch.arange(3, 15)[None]).logits.double().sum().item())
"""


def test_a_fresh_process_that_has_imported_transect_loads_our_adapters(tmp_path, elsewhere):
    tiny("llama").save_pretrained(tmp_path / "base")
    opened = transect.checkpoint.open_model(tmp_path / "base")
    adapted = adapt(opened, "svfit", out=tmp_path / "adapter").model.eval()
    with torch.no_grad():
        expected = adapted(torch.arange(3, 15)[None]).logits.double().sum().item()
    said = elsewhere.python(LOADS, tmp_path)
    assert float(said) == pytest.approx(expected, abs=1e-3)
