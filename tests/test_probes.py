"""The frame of the probes: one pass, results on disk, refusals, and the model as it was."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import transect
from tests.models import inputs, logits, tiny
from transect import Anatomy
from transect.data import Specimen, load
from transect.errors import NotApplicable, TransectError
from transect.probes import KIND, Quantity, Result, names_of, probes, probing, run_probes
from transect.probes import registry as registered
from transect.store import Folder


@pytest.fixture
def scratch():
    """Probes that a test registers are gone after it."""
    before = dict(registered._probes)
    yield
    registered._probes.clear()
    registered._probes.update(before)


def specimen(name="llama", rows=6, length=10):
    model = tiny(name)
    text = [inputs(name, batch=1, length=length, seed=seed)["input_ids"][0] for seed in range(rows)]
    return Specimen(Anatomy(model), data=load(text, model, batch_size=2))


def looking(name, watches, log, fail_at=None):
    @probing(name, title=name, paper="ours", watches=watches)
    def look(specimen, *, scale: float = 1.0):
        """Sum a point.

        scale: of the sum.
        """
        total, batches = 0.0, 0
        while (seen := (yield)) is not None:
            batches += 1
            if batches == fail_at:
                raise NotApplicable("enough")
            point = seen.logits if watches == ["logits"] else getattr(seen, watches[0])[0]
            total += float(point.double().sum())
            log.append((name, tuple(seen.ids.shape)))
        return Result({"sum": Quantity(torch.tensor(scale * total), (), "", "sum")}, [f"{batches} batches"])


def test_one_pass_serves_all_and_sees_what_the_model_computes(scratch):
    log = []
    looking("one", ["residual"], log)
    looking("two", ["logits"], log)
    looking("three", ["mlp"], log, fail_at=2)
    one = specimen()
    runs = []
    handle = one.model.register_forward_hook(lambda *args: runs.append(1))
    found = run_probes(one, {"one": {}, "two": {"scale": "2"}, "three": {}})
    handle.remove()
    assert len(runs) == 3 and log[:2] == [("one", (2, 10)), ("two", (2, 10))]
    assert found.refused == {"three": "enough"} and list(found) == ["one", "two"]
    expected = sum(logits(one.model, batch).double().sum() for batch in one.text)
    assert float(found["two"]["sum"]) == pytest.approx(2 * float(expected), rel=1e-4)
    assert found["two"].settings == {"scale": 2.0} and found["two"].findings == ["3 batches"]


def test_what_a_probe_makes_of_attention_weights_is_all_that_is_kept_for_it(scratch):
    sent = {}

    def register(name, watches, of_patterns=None):
        @probing(name, title=name, paper="ours", watches=watches, of_patterns=of_patterns)
        def look(specimen):
            """Keep the patterns."""
            while (seen := (yield)) is not None:
                sent.setdefault(name, []).append(seen.patterns)
            return Result({})

    register("paid", ["patterns"], lambda weights, real: weights.sum(2) + (real is not None))
    register("whole", ["patterns"])
    register("none", ["residual"])
    run_probes(specimen(rows=4), {"paid": {}, "whole": {}, "none": {}})
    assert len(sent["paid"]) == 2 and sent["none"] == [{}, {}]
    for paid, whole in zip(sent["paid"], sent["whole"], strict=True):
        assert sorted(paid) == sorted(whole) == [0, 1, 2]
        assert all(torch.equal(paid[layer], whole[layer].sum(2)) for layer in paid)
        assert whole[0].shape == (2, 4, 10, 10)


def test_results_come_back_from_disk_and_are_not_computed_again(scratch, tmp_path):
    log = []
    looking("one", ["residual"], log)
    one = specimen()
    folder = Folder(tmp_path, KIND)
    folder.take()
    first = run_probes(one, {"one": {}}, folder, "key")["one"]
    computed = len(log)
    again = run_probes(one, {"one": {}}, folder, "key")["one"]
    assert len(log) == computed and torch.equal(first["sum"], again["sum"]) and again.findings == ["3 batches"]
    run_probes(one, {"one": {}}, folder, "another model")
    run_probes(one, {"one": {"scale": 3}}, folder, "another model")
    assert len(log) == 3 * computed
    described = json.loads((tmp_path / "data" / "one.json").read_text())
    assert described["quantities"]["sum"] == {"axes": [], "unit": "", "about": "sum", "shape": []}
    assert set(load_file(tmp_path / "data" / "one.safetensors")) == {"sum"}
    (tmp_path / "data" / "one.safetensors").write_bytes(b"\0" * 20)
    run_probes(one, {"one": {"scale": 3}}, folder, "another model")
    assert len(log) == 4 * computed


def test_the_model_is_as_before_also_after_an_error(scratch):
    @probing("broken", title="", paper="ours", watches=["patterns", "residual"])
    def broken(specimen):
        """Break."""
        yield
        raise ZeroDivisionError

    one = specimen("gpt2")
    one.model.train()
    one.model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in one.model.parameters()]
    batch = inputs("gpt2")
    before, attention = logits(one.model.eval(), batch), one.model.config._attn_implementation
    one.model.train()
    with pytest.raises(ZeroDivisionError):
        run_probes(one, {"broken": {}})
    assert one.model.training and flags == [parameter.requires_grad for parameter in one.model.parameters()]
    assert one.model.config._attn_implementation == attention
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.model.modules())
    assert torch.equal(logits(one.model.eval(), batch), before)


def test_a_probe_that_fails_does_not_end_the_others(scratch, tmp_path):
    log = []
    looking("fine", ["residual"], log)

    @probing("broken", title="Broken", paper="ours", watches=["residual"])
    def broken(specimen):
        """Break at the second batch."""
        yield
        yield
        raise KeyError("no such head")

    @probing("undrawn", title="Undrawn", paper="ours", draw=lambda result: 1 / 0)
    def undrawn(specimen):
        """Find what cannot be drawn."""
        return Result({}, ["found"])

    @probing("stopped", title="Stopped", paper="ours")
    def stopped(specimen):
        """Ctrl-C."""
        raise KeyboardInterrupt

    one = specimen()
    found = transect.inspect(one.model, ["fine", "broken", "undrawn"], one.data, out=tmp_path)
    assert list(found) == ["fine", "undrawn"] and found["fine"].findings == ["3 batches"] and not found.refused
    assert (
        found.failed["broken"].message == "KeyError: 'no such head'" and "in broken" in found.failed["broken"].traceback
    )
    assert "ZeroDivisionError" in found.failed["undrawn"].message
    page = (tmp_path / "index.html").read_text()
    assert "no such head" in page and "found" in page and "3 batches" in page
    with pytest.raises(KeyError, match="no such head"):  # nothing is left to tell
        run_probes(one, {"broken": {}})
    with pytest.raises(KeyboardInterrupt):
        run_probes(one, {"fine": {}, "stopped": {}})


def test_a_pass_that_fails_is_the_failure_of_those_that_watch_it(scratch):
    looking("one", ["residual"], [])
    subject = specimen()
    handle = subject.model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    looking("two", ["logits"], [])
    found = run_probes(subject, {"one": {}, "two": {}, "spectra": {}})
    handle.remove()
    assert list(found) == ["spectra"] and set(found.failed) == {"one", "two"}


def test_what_cannot_be_done_is_said_before_any_work():
    one = specimen()
    with pytest.raises(TransectError, match="unknown probe 'nothing'"):
        run_probes(one, {"nothing": {}})
    with pytest.raises(TransectError, match="has no parameter"):
        run_probes(one, {"spectra": {"colour": 1}})
    without = Specimen(one.anatomy)
    assert "--data" in run_probes(without, {"lazy-neuron": {}}).refused["lazy-neuron"]
    with pytest.raises(ValueError, match="2 axes"):
        Quantity(torch.zeros(3), ("a", "b"), "", "wrong")


def test_every_probe_is_described_and_says_what_its_settings_do():
    names = {
        "spectra", "depth-efficiency", "lac", "lazy-neuron", "attention-sinks", "feature-neurons", "latent-language",
        "talking-heads", "factual-recall", "cd-t", "kfac-spectrum", "causal-trace", "cola",
        "hftp", "brain-alignment",
    }  # fmt: skip
    assert names <= {one.name for one in probes()}
    for one in probes():
        assert one.title and one.summary.endswith(".") and one.draw is not None
        assert all(parameter.help for parameter in one.parameters), one.name


def test_what_trains_something_is_run_where_it_is_asked_for():
    trained = {one.name for one in probes() if one.trains}
    assert trained >= {"attention-sae", "bigram-subnetworks"}
    assert set(names_of(None, [])) == {one.name for one in probes()} - trained
    assert set(names_of(None, ["attention-sae"])) - set(names_of(None, [])) == {"attention-sae"}
    assert names_of(["bigram-subnetworks", "lac"], ["spectra"]) == ["bigram-subnetworks", "lac"]


def test_inspect_as_a_verb_writes_a_report(tmp_path):
    one = specimen("gpt2")
    found = transect.inspect(
        one.model, ["spectra", "lazy-neuron", "factual-recall"], one.data, out=tmp_path, settings={"lazy-neuron": {}}
    )
    assert list(found) == ["spectra", "lazy-neuron"] and "factual-recall" in found.refused
    page = (tmp_path / "index.html").read_text()
    assert "Not run" in page and "data/spectra.json" in page and found["spectra"].findings[0][:20] in page
    assert np.isfinite(load_file(tmp_path / "data" / "spectra.safetensors")["stable_rank"]).all()
    with pytest.raises(TransectError, match="unknown probe"):
        transect.inspect(one.model, ["nothing"], one.data)
