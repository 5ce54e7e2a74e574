"""factual-recall: contributions, path patching, and the MLP split into readable parts."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from tests.models import CAUSAL, tiny
from tests.recalled import SUBJECTS, known, no_hooks, problem
from tests.test_causal_trace import PROMPT, specimen_of, tokenizer
from transect.anatomy import Anatomy
from transect.claims import claims
from transect.claims.context import Context
from transect.data import Batches, Fact, Specimen, load, load_facts
from transect.errors import BadData, NotApplicable, TransectError
from transect.forward import changed, watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.factual_recall.application import (
    ALPHAS,
    DIRECTIONS,
)
from transect.probes.catalog.factual_recall.contributions import Attribution, head_outputs
from transect.probes.catalog.factual_recall.last_layer import answer_probabilities, fixes, frequent_direction
from transect.probes.catalog.factual_recall.last_token import states_of, tasks_of
from transect.probes.catalog.factual_recall.mlp_split import TRUSTED, split
from transect.probes.catalog.factual_recall.path_patching import (
    answer_metric,
    at_the_end,
    path_patched,
    percent,
    senders_of,
)
from transect.probes.catalog.factual_recall.recall import correlation, recall


@pytest.mark.parametrize("name", CAUSAL)
def test_parts_of_the_stream_add_up_to_the_logits(name):
    """Embedding, heads, biases of W_O and MLPs, at the final norm's scale: the model's logits, but for constants."""
    specimen, task, states = problem(name)
    layers = specimen.layers
    attribution = Attribution(specimen.lens, states.residual[layers])
    total = attribution.logits(states.residual[0], task.answers)
    for layer, block in enumerate(specimen.anatomy.blocks):
        parts = head_outputs(block, states.heads[layer], states.attention[layer])
        assert parts.shape == (12, 4, 32)
        bias = states.attention[layer] - parts.sum(1)
        stored = block.matrix("o").bias
        if stored is None:
            assert bias.abs().max() < 1e-6  # Gemma's and OLMo's norms compute in float32
        else:
            torch.testing.assert_close(bias, stored.expand_as(bias))
        for part in (*parts.unbind(1), bias, states.mlp[layer]):
            total = total + attribution.logits(part, task.answers)
    logits, lens = states.logits, specimen.lens
    if lens.softcap is not None:
        logits = lens.softcap * torch.atanh(logits / lens.softcap)
    bias = getattr(lens.norm, "bias", None)
    if bias is not None:
        logits = logits - lens.weight @ bias.detach()
    if lens.head.bias is not None:
        logits = logits - lens.head.bias.detach()
    centred = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(total, centred.gather(1, task.answers[:, None])[:, 0], rtol=1e-5, atol=1e-6)
    one = attribution.normed(states.mlp[0])[0] @ lens.weight.T  # the lens reads the same order of tokens
    assert attribution.top(states.mlp[0][0], 5) == one.topk(5).indices.tolist()


def brute_force(specimen, task, states, new, sender, freeze_mlps, metric):
    """Every head set by hand, one prompt at a time, in the model's own modules."""
    model, size, found = specimen.model, specimen.anatomy.head_size, []
    layer, head = sender
    for number, prompt in enumerate(task.prompts):
        handles = []
        for index, block in enumerate(model.model.layers):
            value = states.heads[index][number].clone()
            if index == layer and head is not None:
                value[head * size : (head + 1) * size] = new.heads[index][number, head * size : (head + 1) * size]

            def set_heads(module, args, value=value):
                x = args[0].clone()
                x[0, -1] = value
                return (x,)

            def set_mlp(module, args, output, value):
                output = output.clone()
                output[0, -1] = value
                return output

            handles.append(block.self_attn.o_proj.register_forward_pre_hook(set_heads))
            value = new.mlp[index][number] if (index == layer and head is None) else states.mlp[index][number]
            if freeze_mlps or (index == layer and head is None):
                handles.append(block.mlp.register_forward_hook(lambda m, a, o, v=value: set_mlp(m, a, o, v)))
        with torch.no_grad():
            logits = model(prompt[None]).logits[:, -1]
        for handle in handles:
            handle.remove()
        found.append(metric(logits, torch.tensor([number]))[0])
    return torch.stack(found)


@pytest.mark.parametrize(("variant", "freeze_mlps"), [("mean", False), ("example", True)])
def test_path_patching_by_brute_force(variant, freeze_mlps):
    specimen, task, states = problem()
    metric = answer_metric(task, "difference")
    new = senders_of(states, task.other, variant)
    heads, mlps = path_patched(specimen, task, states, new, metric, freeze_mlps=freeze_mlps)
    assert heads.shape == (3, 4, 12) and mlps.shape == (3, 12)
    for sender in ((0, 1), (1, 3), (2, 2)):
        expected = brute_force(specimen, task, states, new, sender, freeze_mlps, metric)
        torch.testing.assert_close(heads[sender], expected, rtol=1e-5, atol=1e-6)  # Llama's norms are float32
    expected = brute_force(specimen, task, states, new, (1, None), freeze_mlps, metric)
    torch.testing.assert_close(mlps[1], expected, rtol=1e-5, atol=1e-6)
    assert (heads - metric(states.logits, torch.arange(12))).abs().max() > 1e-4
    assert no_hooks(specimen.model)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen3", "gemma3"])
def test_path_patching_limits(name, monkeypatch):
    specimen, task, states = problem(name)
    metric = answer_metric(task, "answer")
    original = metric(states.logits, torch.arange(12))
    assert torch.equal(original, states.logits[torch.arange(12), task.answers])
    heads, mlps = path_patched(specimen, task, states, states, metric)  # the senders say what they said
    tiny = 1e-8 if name == "gpt2" else 1e-4  # norms or rotations in float32
    assert percent(heads, original).abs().max() < tiny and percent(mlps, original).abs().max() < tiny
    new = senders_of(states, task.other, "example")
    whole = path_patched(specimen, task, states, new, metric)
    monkeypatch.setattr(import_module("transect.probes.catalog.factual_recall.path_patching"), "_TOKENS", 1)
    for a, b in zip(whole, path_patched(specimen, task, states, new, metric), strict=True):
        torch.testing.assert_close(a, b)
    o = specimen.anatomy.blocks[1].matrix("o")
    silent = o.weight.clone()
    silent[:, 8:16] = 0  # head 1
    o.write(silent)
    states = states_of(specimen, task)
    heads, _ = path_patched(specimen, task, states, senders_of(states, task.other, "mean"), metric)
    scores = percent(heads, metric(states.logits, torch.arange(12)))
    assert scores[1, 1].abs() < tiny / 10 and scores[1, 2].abs() > tiny


@pytest.mark.parametrize("name", CAUSAL)
def test_the_last_token_alone_says_what_whole_prompts_do(name, monkeypatch):
    specimen, task, states = problem(name)
    metric, new = answer_metric(task, "difference"), senders_of(states, task.other, "example")
    receivers = [("residual", 2, slice(None)), ("mlp", 1, slice(0, 8))]
    given = [{}, {"freeze_mlps": True, "receivers": receivers}]
    found = [path_patched(specimen, task, states, new, metric, **one) for one in given]
    monkeypatch.setattr("transect.forward.behind.first_of", lambda *given: None)
    for alone, one in zip(found, given, strict=True):
        whole = path_patched(specimen, task, states, new, metric, **one)
        for a, b in zip(alone, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_receivers_of_everything_that_a_layer_reads():
    """With frozen MLPs a head of layer 1 reaches the logits directly, through the heads' inputs, or not at all."""
    specimen, task, states = problem("gpt2")
    metric = answer_metric(task, "answer")
    new = senders_of(states, task.other, "example")
    direct, _ = path_patched(specimen, task, states, new, metric, freeze_mlps=True)
    last = [("residual", 3, slice(None))]
    same, _ = path_patched(specimen, task, states, new, metric, freeze_mlps=True, receivers=last)
    torch.testing.assert_close(direct, same, rtol=1e-9, atol=1e-11)
    queries = [("q", 2, slice(0, 8))]
    heads, _ = path_patched(specimen, task, states, new, metric, receivers=queries)
    original = metric(states.logits, torch.arange(12))
    torch.testing.assert_close(heads[2], original.expand(4, -1), rtol=1e-9, atol=1e-11)  # too late to be read
    assert (heads[1] - original).abs().max() > 1e-6
    patterns = {}
    for number, change in enumerate(({}, {("heads", 1): lambda x: x * 0})):
        with changed(specimen.anatomy, change), watch(specimen.anatomy, ["q"], [2]) as seen:
            specimen.model(task.prompts[0][None])
        patterns[number] = seen.q[2][0, -1, :8].detach()
    assert not torch.equal(patterns[0], patterns[1])  # the queries do read layer 1


def test_everything_replaced_at_every_position_is_the_new_run():
    specimen, task, _ = problem("gemma2")
    ids, new = (torch.stack([task.prompts[number] for number in numbers]) for numbers in ((0, 1), (2, 3)))
    points = ("residual", "heads", "mlp")
    with torch.no_grad(), watch(specimen.anatomy, points) as seen:
        expected = specimen.model(new).logits
    changes = {("residual", 0): at_the_end(seen.residual[0])}
    changes |= {(point, layer): at_the_end(getattr(seen, point)[layer]) for point in points[1:] for layer in range(3)}
    with torch.no_grad(), changed(specimen.anatomy, changes):
        found = specimen.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def planted(n=20, heads=4, d=64, noise=0.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, r, c = normal(n, heads, d), normal(n, d), normal(d)
    w = torch.tensor([-0.9, 0.5, 0.0, 2.0], dtype=torch.float64)
    return torch.einsum("h,nhd->nd", w, a) + 0.3 * r + c + noise * normal(n, d), a, r, w, c


def test_the_split_finds_what_was_planted():
    m, a, r, w, c = planted()
    found = split(m, a, r, ridge=1e-6)
    torch.testing.assert_close(found.weights, w, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.component, c, rtol=0, atol=1e-4)
    assert float(found.stream) == pytest.approx(0.3, abs=1e-4) and found.explained == pytest.approx(1, abs=1e-6)
    assert float(found.in_stream[2]) == pytest.approx(1, abs=1e-4)
    assert found.names()[:2] == ["erased", "amplified"] and found.names()[3] == "amplified"
    torch.testing.assert_close(split(m, a, r).weights, w, rtol=0, atol=5e-3)  # the default ridge shrinks by 0.1 %
    assert 1 <= found.condition < 10


def test_identities_of_the_split():
    m, a, r, _, _ = planted(noise=3.0)
    found = split(m, a, r)
    fitted = torch.einsum("h,nhd->nd", found.weights, a) + found.stream * r + found.component
    torch.testing.assert_close(fitted + found.left, m, rtol=1e-12, atol=1e-12)
    assert 0 < found.explained < TRUSTED and found.names() == [""] * 4
    order = torch.randperm(len(m), generator=torch.Generator().manual_seed(1))
    again = split(m[order], a[order], r[order])
    torch.testing.assert_close(again.weights, found.weights)
    torch.testing.assert_close(again.explained_each, found.explained_each[order])
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    turned = split(m @ rotation, a @ rotation, r @ rotation)
    torch.testing.assert_close(turned.weights, found.weights)
    torch.testing.assert_close(turned.component, found.component @ rotation)
    least = split(m, a, r, ridge=0.0)
    assert found.explained < least.explained <= 1
    constant = split(m, a, r[:1].expand_as(r), ridge=0.0)  # a stream that does not vary, and no ridge
    assert float(constant.stream) == pytest.approx(0, abs=1e-9)


def test_the_split_refuses_what_cannot_be_compared():
    m, a, r, _, _ = planted()
    with pytest.raises(BadData, match="there is 1"):
        split(m[:1], a[:1], r[:1])
    with pytest.raises(BadData, match="the same for all prompts"):
        split(m[:1].expand_as(m), a, r)


def test_correlation():
    x, y = torch.tensor([[1.0, 1], [2, 1], [4, 1]]).double(), torch.tensor([[-1.0, 3], [-2, 5], [-4, 0]]).double()
    found = correlation(x, y)
    assert float(found[0]) == pytest.approx(-1) and found[1].isnan()


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_the_last_mlp_turned_down(name):
    specimen, task, states = problem(name)
    specimen = replace(specimen, data=Batches([{"input_ids": torch.tensor([[5, 5, 6, 7], [5, 9, 9, 5]])}]))
    direction = frequent_direction(specimen, specimen.lens)
    assert direction is not None and float(direction.norm()) == pytest.approx(1)
    weight, lens = specimen.lens.weight, specimen.lens
    expected = (weight[5] * 4 + weight[6] + weight[7] + weight[9] * 2) / 8 - weight.mean(0)
    expected = expected * lens.gain.detach()
    torch.testing.assert_close(direction, expected / expected.norm())
    changes = fixes(direction)
    assert list(changes) == ["1", "0.75", "0.5", "0.25", "0", "without the frequent direction"]
    ids = task.prompts[0][None]
    with torch.no_grad():
        plain = specimen.model(ids).logits
        with changed(specimen.anatomy, {("mlp", 2): changes["1"]}):
            assert torch.equal(specimen.model(ids).logits, plain)
        with changed(specimen.anatomy, {("mlp", 2): changes["0"]}):
            off = specimen.model(ids).logits
        with changed(specimen.anatomy, {("mlp", 2): torch.zeros_like}):
            assert torch.equal(specimen.model(ids).logits, off)
    assert not torch.equal(off, plain)
    without = changes["without the frequent direction"](states.mlp[2])
    assert (without @ direction).abs().max() < 1e-12
    found = answer_probabilities(specimen, task.facts, changes)
    direct = states.logits.softmax(-1)[torch.arange(12), task.answers]
    torch.testing.assert_close(found[0], direct)
    assert found.shape == (6, 12) and (found[4] - found[0]).abs().max() > 1e-6


def test_tasks():
    specimen = known("llama")
    task = tasks_of(specimen, 3, 12)[0]
    assert len(task.facts) == 12 and (task.subjects == 3).all()
    assert (task.answers != task.answers[task.other]).all()
    with pytest.raises(NotApplicable, match="at most 7 of one prompt"):
        tasks_of(replace(specimen, known_facts=specimen.facts[:7]), 1, 12)
    alike = [replace(fact, subject=SUBJECTS[0], answer=specimen.facts[0].answer) for fact in specimen.facts]
    with pytest.raises(NotApplicable, match="not all the same"):
        tasks_of(replace(specimen, known_facts=alike), 1, 12)
    same = replace(task, prompts=[task.prompts[0]] * 12)
    with pytest.raises(BadData, match="the same subject"):
        states_of(specimen, same)


def test_prompts_of_different_lengths():
    """Subjects of one and of two tokens: each prompt's numbers are its own."""
    specimen = specimen_of("llama", subjects=[*SUBJECTS[:6], *(f"w{number}" for number in range(40, 46))])
    task = tasks_of(specimen, 1, 12)[0]
    states = states_of(specimen, task)
    for number, prompt in enumerate(task.prompts):
        with torch.no_grad(), watch(specimen.anatomy, ["heads", "patterns"]) as seen:
            logits = specimen.model(prompt[None]).logits[0, -1]
        torch.testing.assert_close(states.logits[number], logits)
        torch.testing.assert_close(states.heads[1][number], seen.heads[1][0, -1])
        torch.testing.assert_close(states.looking[2][number], seen.patterns[2][0, :, -1, task.subjects[number]])
    metric = answer_metric(task, "difference")
    heads, _ = path_patched(specimen, task, states, states, metric)
    torch.testing.assert_close(heads[1, 2], metric(states.logits, torch.arange(12)), rtol=1e-5, atol=1e-6)


def test_a_parallel_mlp_is_split_by_the_heads_of_the_layer_before():
    specimen, task, states = problem("gpt_neox")
    assert specimen.anatomy.blocks[0].parallel
    found = recall(specimen, task)
    assert sorted(found.splits) == [1, 2] and found.numbers["explained"][0].isnan()
    before = head_outputs(specimen.anatomy.blocks[0], states.heads[0], states.attention[0])
    expected = split(states.mlp[1], before, states.residual[0])
    torch.testing.assert_close(found.splits[1].weights, expected.weights)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture(name):
    text = Batches([{"input_ids": torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))}])
    specimen = known(name, torch.float32, data=text)
    before = specimen.model(specimen.encode(PROMPT)[None]).logits
    result = run_probes(specimen, {"factual-recall": {"facts": 10}})["factual-recall"]
    assert result["path"].shape == (1, 3, 4) and result["path"].isfinite().all()
    assert result["probability"].shape == (2, 6) and result["direct"].isfinite().all()
    assert len(result.findings) == 5 and len(drawings(result)) == 4
    assert result["applied first"].shape == (1, 3, 3, 5) and result["control rank"].shape == (1, 3, 3, 5)
    assert result["applied first"][:, :, DIRECTIONS.index("stream")].isfinite().all()
    said = " ".join(result.findings)
    assert ("No suppression was found" in said) == bool(result["mlp direct"][0, 2] >= 0)
    assert torch.equal(before, specimen.model(specimen.encode(PROMPT)[None]).logits)
    assert no_hooks(specimen.model)


def test_dropped_sublayers_are_gaps():
    specimen = specimen_of("llama", torch.float32, subjects=SUBJECTS)
    anatomy = specimen.anatomy
    attention, mlp = anatomy.blocks[1].attention, anatomy.blocks[2].mlp
    assert attention is not None and mlp is not None
    attention.drop()
    mlp.drop()
    model = anatomy.model
    facts = []
    for fact in specimen.facts:
        with torch.no_grad():
            token = int(model(specimen.encode(fact.text)[None]).logits[0, -1].argmax())
        facts.append(replace(fact, answer=f"w{token}"))
    specimen = replace(specimen, known_facts=facts)
    result = run_probes(specimen, {"factual-recall": {}, "causal-trace": {"samples": 2}})
    path = result["factual-recall"]["path"][0]
    assert path[1].isnan().all() and path[[0, 2]].isfinite().all()
    assert result["factual-recall"]["mlp path"][0, 2].isnan() and result["factual-recall"]["explained"][0, 1].isnan()
    assert "layer 1" in result["factual-recall"].findings[-1]  # the last MLP that is left
    assert result["causal-trace"]["fraction"][:, 2].abs().max() < 1e-4  # blocks behind run for many at once
    assert len(drawings(result["factual-recall"])) == 4


def test_hooks_go_after_an_error():
    specimen, task, states = problem()
    handle = specimen.model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        path_patched(specimen, task, states, states, answer_metric(task, "answer"))
    handle.remove()
    assert no_hooks(specimen.model)


def test_refusals():
    specimen = known("llama")
    for given in ({"variant": "both"}, {"facts": 3}, {"metric": "p"}):
        with pytest.raises(TransectError):
            run_probes(specimen, {"factual-recall": given})
    for name in ("bert", "vit"):
        other = Specimen(Anatomy(tiny(name)), tokenizer(), known_facts=specimen.facts)
        assert "next token" in run_probes(other, {"factual-recall": {}}).refused["factual-recall"]
    lost = replace(specimen, known_facts=[Fact(PROMPT, "unknown", "w1")] * 8)
    assert run_probes(lost, {"factual-recall": {}}).refused["factual-recall"]


def test_claims_on_the_bundled_model(monkeypatch):
    from transect.checkpoint import open_model

    monkeypatch.setattr(import_module("transect.claims.catalog.factual_recall"), "_TASKS", 1)
    monkeypatch.setattr(import_module("transect.claims.catalog.factual_recall"), "_FACTS", 10)
    opened = open_model("organism", dtype="float32")
    data = load("organism:heldout", opened.model, opened.tokenizer, sequences=4, sequence_length=32)
    specimen = Specimen(Anatomy(opened.model), opened.tokenizer, data, known_facts=load_facts("organism:facts"))
    context = Context(opened.model, data, data, specimen=specimen)
    results = {one.name: one.function(context) for one in claims(["factual-recall"])}
    assert len(results["factual-recall/task-head"].numbers) == 4
    assert sum(row["chosen"] for row in results["factual-recall/task-head"].numbers) == 1
    assert [row["change"] for row in results["factual-recall/last-layer-suppression"].numbers][:2] == ["1", "0.75"]
    assert -1 <= results["factual-recall/reading-head"].numbers[0]["correlation"] <= 1
    rows = results["factual-recall/function-application"].numbers
    assert len(rows) == len(DIRECTIONS) * len(ALPHAS)
    real = next(row for row in rows if (row["direction"], row["alpha"]) == ("stream", 1.0))
    assert real["applied first"] > 0.8 > real["control first"]  # a trained model's last MLP, on what it really reads
    assert 0 <= results["factual-recall/mlp-answers"].numbers[0]["own raises"] <= 1
    assert no_hooks(opened.model)
