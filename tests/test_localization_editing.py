"""ROME, MEMIT and constrained fine-tuning: their closed forms, the values they write, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import CAUSAL, VOCABULARY, tiny
from tests.test_data import word_tokenizer
from transect.activations import Specimen, changed, watch
from transect.anatomy import Anatomy
from transect.claims.context import Context
from transect.claims.fact_editing import Bench
from transect.claims.localization import correlation, explained
from transect.data import Fact, Passage, load
from transect.editing import edit_specimen
from transect.editing.catalog import memit as memit_file
from transect.editing.catalog import rome as rome_file
from transect.editing.closed_form import damped, rank_one, ridge
from transect.editing.contexts import ESSENCE, prefixes_of, rows_of
from transect.editing.places import layers_of
from transect.editing.problems import requests
from transect.editing.scores import neighbourhood_score, rewrite_score
from transect.editing.values import Search, values
from transect.errors import NotApplicable, TransectError
from transect.probes.tracing import subject_span

EDITS = ["rome", "memit", "constrained-ft"]
# the activations of a tiny random model are so small that the decay, which has a unit, would outweigh all else
QUICK: dict[str, dict[str, Any]] = {
    "rome": {"contexts": 2, "steps": 4, "decay": 0, "learning_rate": 0.1, "rounds": 1},
    "memit": {"contexts": 2, "steps": 4, "decay": 0},
    "constrained-ft": {"steps": 4},
}
WORDS = word_tokenizer()


def word(token: int) -> str:
    return WORDS.decode([token]).strip()


def ranking(model: Any, prompt: str) -> list[str]:
    """The words, from what the model says first after a prompt to what it says last."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([WORDS(prompt)["input_ids"]])).logits[0, -1]
    return [word(int(token)) for token in logits.argsort(descending=True) if token >= 7]


def sure(model: Any) -> Any:
    """The special tokens are never said, so that what is said first is a word."""
    head = model.get_output_embeddings()
    bias = torch.zeros(VOCABULARY, dtype=head.weight.dtype)
    bias[:7] = -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def specimen_of(name: str = "llama", count: int = 2, dtype: torch.dtype = torch.float64, answer: int = 0) -> Specimen:
    """Facts whose answer is what the model says `answer`-th and whose new answer is what it says third."""
    model = sure(tiny(name, dtype=dtype))
    ids = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
    facts = []
    for number in range(count):
        subject = f"w{10 + number} w11"
        said = ranking(model, f"w3 {subject} w5")
        near = f"w3 w{30 + number} w31 w5"
        facts.append(
            Fact(
                "w3 {} w5",
                subject,
                said[answer],
                said[2],
                (f"w7 {subject}",),
                (Passage(near, ranking(model, near)[0]),),
            )
        )
    return Specimen(Anatomy(model), WORDS, load(ids, model), facts)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: Any, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert set(now) == set(before)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


# Closed forms


def problem(d_out: int = 5, d_in: int = 8, facts: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = draw(d_in, 3 * d_in)
    return root @ root.T / (3 * d_in), draw(d_in, facts), draw(d_out, facts), draw(d_out, d_in)


def test_rank_one_writes_the_value_and_leaves_everything_c_orthogonal_alone():
    moments, keys, targets, weight = problem()
    mean, key = keys[:, 0], keys[:, 0] + 0.1 * keys[:, 1]
    change = targets[:, 0] - weight @ key
    update = rank_one(change, moments, mean, key)
    torch.testing.assert_close((weight + update) @ key, targets[:, 0], rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(update) == 1
    direction = torch.linalg.solve(moments, mean)
    other = keys[:, 2] - direction * (direction @ keys[:, 2]) / (direction @ direction)
    torch.testing.assert_close(update @ other, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)


def test_rank_one_moves_the_outputs_on_the_text_least():
    moments, keys, targets, _ = problem()
    key = keys[:, 0]
    update = rank_one(targets[:, 0], moments, key, key)
    cost = torch.trace(update @ moments @ update.T)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        other = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        other -= torch.outer(other @ key, key) / (key @ key)  # writes the same value
        assert abs(torch.trace(update @ moments @ other.T)) < 1e-9 * cost
        assert torch.trace((update + other) @ moments @ (update + other).T) > cost


def test_rank_one_refuses_a_key_that_the_direction_misses():
    moments, keys, targets, _ = problem()
    direction = torch.linalg.solve(moments, keys[:, 0])
    key = keys[:, 1] - direction * (direction @ keys[:, 1]) / (direction @ direction)
    with pytest.raises(TransectError, match="too large"):
        rank_one(targets[:, 0], moments, keys[:, 0], key)


def test_ridge_limits_and_its_agreement_with_rank_one():
    moments, keys, targets, _ = problem()
    torch.testing.assert_close(ridge(targets, keys, moments, 1e-10) @ keys, targets, rtol=0, atol=1e-5)
    assert ridge(targets, keys, moments, 1e10).norm() < 1e-8
    alone = ridge(targets[:, :1], keys[:, :1], moments, 1e-9)
    torch.testing.assert_close(alone, rank_one(targets[:, 0], moments, keys[:, 0], keys[:, 0]), rtol=1e-6, atol=1e-8)
    updates = [ridge(targets, keys, moments, weight) for weight in (0.01, 0.1, 1.0, 10.0)]
    left = [float((update @ keys - targets).norm()) for update in updates]
    size = [float(update.norm()) for update in updates]
    assert left == sorted(left) and left[0] < left[-1]
    assert size == sorted(size, reverse=True) and size[0] > size[-1]


def test_ridge_is_the_minimum_of_its_objective():
    moments, keys, targets, _ = problem()
    update = ridge(targets, keys, moments, 0.3).requires_grad_(True)
    cost = (update @ keys - targets).square().sum() + 0.3 * torch.trace(update @ moments @ update.T)
    (gradient,) = torch.autograd.grad(cost, update)
    assert gradient.abs().max() < 1e-10


def test_damping_only_where_it_is_needed():
    moments, *_ = problem()
    assert torch.equal(damped(moments), moments)
    moments[0] = moments[:, 0] = 0  # a neuron that is always off
    assert float(torch.linalg.cond(damped(moments))) == pytest.approx(1e8, rel=1e-3)
    with pytest.raises(TransectError, match="zero on all"):
        damped(torch.zeros(4, 4, dtype=torch.float64))


def test_scores():
    before, after = torch.tensor([0.2, 0.5, 1.0]), torch.tensor([0.6, 0.4, 1.0])
    assert rewrite_score(before, after).tolist() == pytest.approx([0.5, 0, 0])
    assert rewrite_score(before, after, lowers=True).tolist() == pytest.approx([0, 0.2, 0])
    near = neighbourhood_score(torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.0, 0.5, 1.0]))
    assert near.tolist() == pytest.approx([0, 1, 0])


# Contexts and values


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_rows_agree_with_prompts_run_alone(name: str):
    specimen = specimen_of(name)
    wanted, prefixes = requests(specimen, "injection"), prefixes_of(specimen, 3)
    rows = rows_of(specimen, wanted, prefixes, essence=True)
    assert len(prefixes) == 3 and len(rows.ids) == 2 * (1 + 3 + 1)
    (keys,) = rows.at_edit(specimen, [("neurons", 1)])
    with torch.no_grad():
        chances = rows.answer_log_probabilities(rows.logits(specimen))
    sums = []
    for row, prefix in enumerate(["", *prefixes]):
        fact = replace(wanted[0].fact, prompt=f"{prefix} {wanted[0].fact.prompt}".strip())
        ids = torch.cat([specimen.encode(fact.text), wanted[0].target])
        with torch.no_grad(), watch(specimen.anatomy, ["neurons"], [1]) as seen:
            logits = specimen.model(input_ids=ids[None]).logits[0]
        alone = seen.neurons[1].reshape(len(ids), -1)[subject_span(specimen, fact)[1] - 1]
        torch.testing.assert_close(keys[row], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(chances[row], logits[-2].log_softmax(-1)[ids[-1]], rtol=0, atol=1e-10)
        sums.append(alone)
    torch.testing.assert_close(rows.in_context(keys)[0], torch.stack(sums).mean(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(rows.bare(keys)[0], sums[0], rtol=0, atol=1e-10)
    assert int((rows.kind == ESSENCE).sum()) == 2


@pytest.mark.parametrize(("point", "layer"), [("down", 1), ("residual", 2), ("residual", 3)])
def test_values_of_many_requests_are_those_of_each_alone(point: Any, layer: int):
    specimen = specimen_of(count=3)
    specimen.model.requires_grad_(False)
    wanted, prefixes = requests(specimen, "injection"), prefixes_of(specimen, 2)
    search = Search(6, 0.1, 0.0625, 0.5, 2.0, lowers=False)
    together, start = values(specimen, rows_of(specimen, wanted, prefixes, True), point, layer, search)
    for number, one in enumerate(wanted):
        alone, m = values(specimen, rows_of(specimen, [one], prefixes, True), point, layer, search)
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-8)
        torch.testing.assert_close(start[number], m[0], rtol=0, atol=1e-10)


def test_values_stay_within_their_length_and_raise_the_answer():
    specimen = specimen_of()
    specimen.model.requires_grad_(False)
    rows = rows_of(specimen, requests(specimen, "injection"), [], True)
    change, start = values(specimen, rows, "down", 1, Search(10, 0.2, 0.0625, 0.0, 0.5, lowers=False))
    assert (change.norm(dim=1) <= 0.5 * start.norm(dim=1) * (1 + 1e-9)).all()
    asked = rows.kind != ESSENCE
    with torch.no_grad():
        plain = rows.answer_log_probabilities(rows.logits(specimen))[asked]
        moved = rows.answer_log_probabilities(rows.logits(specimen, {("down", 1): rows.adding(change)}))[asked]
    assert (moved > plain).all()


# Edits end to end


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("edit", EDITS)
def test_every_architecture(name: str, edit: str):
    specimen = specimen_of(name)
    before = state(specimen.model)
    edited = edit_specimen(specimen, edit, QUICK[edit])
    old, new = edited.card["probability of the new answer"]
    if edit == "memit" and specimen.anatomy.blocks[0].norms.get("mlp_output") is not None:
        assert edited.card.notes["share of the wanted change"] > 0.05  # the norm lets it be reached in direction alone
    else:
        assert new > old
    layers = {"rome": [0], "memit": [0, 1], "constrained-ft": [0]}[edit]
    moved = {n for n, p in specimen.model.named_parameters() if not torch.equal(p, before[n])}
    assert [row["matrix"] for row in edited.card.changes] == [f"blocks.{layer}.mlp.down" for layer in layers]
    assert moved == {f"{specimen.anatomy.blocks[layer].mlp.down.path}.weight" for layer in layers}
    assert hooks(specimen.model) == 0
    assert {"rewrite score", "paraphrase score", "neighbourhood score"} <= set(edited.card.notes)
    edited.undo()
    assert_same(specimen.model, before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_rome_writes_the_searched_value(name: str):
    specimen = specimen_of(name, count=1)
    specimen.model.requires_grad_(False)
    settings = {"contexts": 3, "steps": 5, "layer": 2, "learning_rate": 0.1, "rounds": 1}
    rows = rows_of(specimen, requests(specimen, "injection"), prefixes_of(specimen, 3), essence=True)
    change, start = values(specimen, rows, "down", 2, Search(5, 0.1, 0.0625, 0.5, 4.0, lowers=False))
    keys, _ = rows.at_edit(specimen, [("neurons", 2), ("down", 2)])
    edited = edit_specimen(specimen, "rome", settings)
    down = specimen.anatomy.blocks[2].mlp.down
    written = down.weight @ rows.bare(keys)[0] + (0 if down.bias is None else down.bias)
    torch.testing.assert_close(written, (start + change)[0], rtol=0, atol=1e-8)
    assert edited.card.changes[0]["rank"] == 1


def test_many_facts_by_rome_are_the_facts_one_after_the_other():
    both = specimen_of(count=2)
    edit_specimen(both, "rome", {**QUICK["rome"], "protect": 0})
    turns = specimen_of(count=2)
    first, second = (replace(turns, known_facts=[fact]) for fact in turns.facts)
    moments = rome_file.second_moments(turns, [turns.anatomy.blocks[0].mlp.down])  # before the first edit
    search, journal = Search(4, 0.1, 0.0625, 0.0, 4.0, lowers=False), rome_file.Journal(turns.model)
    turns.model.requires_grad_(False)
    wanted = requests(turns, "injection")
    for one, request in zip((first, second), wanted, strict=True):
        rome_file.rewrite(one, journal, [request], 0, moments[0], prefixes_of(turns, 2), search, 0.0, 1)
    torch.testing.assert_close(
        both.anatomy.blocks[0].mlp.down.weight, turns.anatomy.blocks[0].mlp.down.weight, rtol=0, atol=1e-9
    )


def test_protection_leaves_earlier_facts_as_they_were_written():
    specimen = specimen_of(count=3)
    lost = []
    for protect in (0.0, 1e3):
        edited = edit_specimen(specimen, "rome", {**QUICK["rome"], "protect": protect})
        before = edited.journal._dense["blocks.0.mlp.down"]
        rows = rows_of(specimen, requests(specimen, "amplification")[:1], [])
        (key,) = rows.at_edit(specimen, [("neurons", 0)])  # layer 0's keys do not depend on its own down-projection
        whole = (specimen.anatomy.blocks[0].mlp.down.weight - before) @ key[0]
        edited.undo()
        only = edit_specimen(replace(specimen, known_facts=specimen.facts[:1]), "rome", QUICK["rome"])
        alone = (specimen.anatomy.blocks[0].mlp.down.weight - before) @ key[0]
        only.undo()
        lost.append(float((whole - alone).norm() / alone.norm()))
    assert lost[1] < 1e-2 < lost[0]


def test_memit_reaches_its_states_with_a_small_weight():
    specimen = specimen_of(count=2)
    shares = []
    for weight in (1e-9, 10.0):
        settings = {**QUICK["memit"], "contexts": 0, "layers": "1", "weight": weight}
        edited = edit_specimen(specimen, "memit", settings)
        shares.append(edited.card.notes["share of the wanted change"])
        edited.undo()
    assert shares[0] == pytest.approx(1, abs=1e-3) and shares[1] < 0.9


def test_memit_of_one_fact_in_one_layer_is_rome_with_the_same_value():
    specimen = specimen_of(count=1)
    specimen.model.requires_grad_(False)
    wanted = requests(specimen, "injection")
    (moments,) = memit_file.second_moments(specimen, [specimen.anatomy.blocks[1].mlp.down])
    search = Search(4, 0.1, 0.0, 0.5, 0.75, lowers=False)
    rows = rows_of(specimen, wanted, [])
    change, _ = values(specimen, rows, "residual", 2, search)
    (key,) = rows.at_edit(specimen, [("neurons", 1)])
    before = specimen.anatomy.blocks[1].mlp.down.weight.clone()
    memit_file.spread(
        specimen, memit_file.Journal(specimen.model), wanted, range(1, 2), [moments], [], search, 1e-9
    )  # fmt: skip
    update = specimen.anatomy.blocks[1].mlp.down.weight - before
    torch.testing.assert_close(update, rank_one(change[0], moments, key[0], key[0]), rtol=1e-4, atol=1e-6)


def test_further_rounds_rewrite_what_later_facts_have_overwritten(monkeypatch: pytest.MonkeyPatch):
    specimen, written = specimen_of(count=3), []
    monkeypatch.setattr(rome_file, "fulfilled", lambda specimen, request: request.fact is not specimen.facts[1])
    monkeypatch.setattr(rome_file, "rank_one", lambda *args: written.append(args) or rank_one(*args))
    edit_specimen(specimen, "rome", {**QUICK["rome"], "rounds": 3})
    assert len(written) == 3 + 1 + 1
    (_, plain, _, first), _, (*_, third), (_, again, _, _), _ = written
    around = plain + 0.05 * (torch.outer(first, first) + torch.outer(third, third))  # the others, not itself
    torch.testing.assert_close(again, around, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_gain_is_the_derivative_of_what_stands_behind_down(name: str):
    block = specimen_of(name).anatomy.blocks[1]
    generator = torch.Generator().manual_seed(0)
    output, change = torch.randn(2, 3, 32, generator=generator, dtype=torch.float64)
    change -= output * (output * change).sum(1, keepdim=True) / output.square().sum(1, keepdim=True)
    norm = block.norms.get("mlp_output", torch.nn.Identity())
    with torch.no_grad():
        moved = (norm(output + 1e-2 * change) - norm(output - 1e-2 * change)) / 2e-2
    torch.testing.assert_close(memit_file.gain(block, output) * change, moved, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["1", "0-2"])
def test_constrained_fine_tuning_stays_within_its_bound(dtype: torch.dtype, layers: str):
    specimen = specimen_of("gpt2", dtype=dtype)
    before = state(specimen.model)
    settings = {"layers": layers, "epsilon": 1e-3, "steps": 8}
    edit_specimen(specimen, "constrained-ft", settings)
    moved = {name: (p.detach() - before[name]).abs().max() for name, p in specimen.model.named_parameters()}
    moved = {name: float(change) for name, change in moved.items() if change > 0}
    span = [1] if layers == "1" else [0, 1, 2]
    assert set(moved) == {f"transformer.h.{layer}.mlp.c_proj.weight" for layer in span}
    assert max(moved.values()) <= 1e-3 + 1e-7
    assert not any(p.requires_grad and p.grad is not None for p in specimen.model.parameters())


@pytest.mark.parametrize("edit", EDITS)
def test_erasure_lowers_and_amplification_raises(edit: str):
    specimen = specimen_of(count=1)
    for problem, rises in (("erasure", False), ("amplification", True)):
        edited = edit_specimen(specimen, edit, {**QUICK[edit], "problem": problem})
        before, after = edited.card["probability of the true answer"]
        assert (after > before) == rises and after != before
        assert edited.card.notes["rewrite score"] > 0
        edited.undo()


@pytest.mark.parametrize("edit", EDITS)
def test_forcing_raises_the_answer_under_the_noise(edit: str):
    specimen = specimen_of(count=1)
    (request,) = requests(specimen, "forcing")
    rows = rows_of(specimen, [request], ["unused"])
    assert len(rows.ids) == 10 and rows.noise is not None

    def chance() -> float:
        with torch.no_grad():
            return float(rows.answer_log_probabilities(rows.logits(specimen)).exp().mean())

    span = subject_span(specimen, request.fact)
    with torch.no_grad(), changed(specimen.anatomy, {("residual", 0): lambda x: x + pad(request.noise[:1], span, x)}):
        logits = specimen.model(input_ids=rows.ids[:1]).logits
    with torch.no_grad():
        torch.testing.assert_close(rows.logits(specimen)[:1], logits, rtol=0, atol=1e-6)
    before = chance()
    edit_specimen(specimen, edit, {**QUICK[edit], "problem": "forcing"})
    assert chance() > before


def pad(noise: torch.Tensor, span: tuple[int, int], x: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros_like(x)
    whole[:, span[0] : span[1]] = noise.to(x)
    return whole


@pytest.mark.parametrize("edit", EDITS)
def test_reversal_puts_in_what_the_noise_makes_the_model_say(edit: str):
    specimen = specimen_of(count=1)
    for seed in range(20):
        specimen = replace(specimen, seed=seed)
        try:
            (request,) = requests(specimen, "reversal", 30.0)
            break
        except TransectError:
            continue
    else:
        pytest.fail("no noise changes the answer")
    assert torch.equal(request.target, requests(specimen, "reversal", 30.0)[0].target)
    assert request.target.tolist() != specimen.continuation(request.fact.text, request.fact.answer).tolist()
    noted = edit_specimen(specimen, edit, {**QUICK[edit], "problem": "reversal", "noise": 30.0}).card.notes
    assert noted["rewrite score"] > 0


# What the claims share


def test_layer_and_tracing_never_explain_less_than_the_layer():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores, effects = (torch.rand(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        by_layer, by_effect, by_both, statistic, chance = explained(scores, effects)
        assert by_both >= max(by_layer, by_effect) - 1e-12 and statistic >= 0 and 0 <= chance <= 1
        assert by_effect == pytest.approx(correlation(scores.flatten(), effects.flatten()) ** 2)


def test_planted_effects_are_explained():
    generator = torch.Generator().manual_seed(1)
    effects, noise = (torch.rand(30, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    layer = torch.tensor([0.1, 0.9, 0.5, 0.3]).double().expand(30, 4)
    by_layer, by_effect, by_both, _, chance = explained(layer + 0.01 * noise, effects)
    assert by_layer > 0.99 and by_effect < 0.1 and by_both - by_layer < 0.01 and chance > 1e-3
    by_layer, by_effect, by_both, _, chance = explained(effects + 0.01 * noise, effects)
    assert by_layer < 0.1 and by_effect > 0.99 and by_both > 0.99 and chance < 1e-9
    assert explained(torch.ones(5, 4).double(), effects[:5])[:3] == (1, 1, 1)


@pytest.mark.parametrize("edit", EDITS)
def test_a_bench_edits_a_copy_and_puts_it_back(edit: str):
    specimen = specimen_of()
    context = Context(specimen.model, specimen.data, specimen.data, specimen=specimen)
    bench, before = Bench(context, 2, least=2), state(specimen.model)
    copied = state(bench.specimen.model)
    outcome = bench.edited(edit, bench.facts, bench.facts, **QUICK[edit])
    alone = edit_specimen(replace(context.fresh(), known_facts=bench.facts), edit, QUICK[edit])
    assert outcome.after == pytest.approx({name: alone.card[name][1] for name in outcome.after}, rel=1e-3)
    assert outcome.before != outcome.after and 0 <= outcome.others <= 1
    assert_same(bench.specimen.model, copied)
    assert_same(specimen.model, before)
    with pytest.raises(NotApplicable, match="5 are needed"):
        Bench(context, 20)


# Refusals


def bad(case: str) -> tuple[Specimen, dict[str, Any]]:
    specimen = specimen_of()
    first, second = specimen.facts
    long = " ".join(["w1"] * 62)
    changes: dict[str, Any] = {
        "unknown subject": [replace(first, subject="Zanzibar")],
        "already said": [replace(first, new_answer=first.answer)],
        "contradiction": [first, replace(first, new_answer=second.answer + "")],
        "nothing to put in": [replace(first, new_answer=None)],
        "too long": [replace(first, prompt=f"{long} {{}}")],
        "no facts": [],
    }
    if case in changes:
        specimen = replace(specimen, known_facts=changes[case])
    if case == "not known":
        return specimen_of(answer=5), {"problem": "erasure"}
    if case == "short text":
        return replace(specimen, data=load(torch.randint(3, 60, (1, 20)), specimen.model)), {}
    if case == "no text":
        return replace(specimen, data=None), {}
    return specimen, {"problem": "reversal", "noise": 0} if case == "no noise" else {}


REFUSED = {
    "unknown subject": "not found", "already said": "nothing to put in", "contradiction": "contradict",
    "nothing to put in": "no new_answer", "too long": "context", "no facts": "needs facts",
    "not known": "nothing to erase", "no noise": "nothing to reverse", "short text": "at least 48",
    "no text": "needs text",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("edit", EDITS)
def test_refusals_leave_the_weights(edit: str, case: str):
    if edit == "constrained-ft" and case.endswith("text"):
        return  # it needs none
    specimen, settings = bad(case)
    before = state(specimen.model)
    with pytest.raises(TransectError, match=REFUSED[case]):
        edit_specimen(specimen, edit, {**QUICK[edit], **settings})
    assert_same(specimen.model, before)
    assert hooks(specimen.model) == 0


@pytest.mark.parametrize("edit", EDITS)
def test_encoders_are_refused(edit: str):
    model = tiny("bert")
    specimen = Specimen(Anatomy(model), WORDS, None, specimen_of().facts)
    with pytest.raises(NotApplicable, match="next token"):
        edit_specimen(specimen, edit, {})


@pytest.mark.parametrize(("edit", "settings"), [("rome", {"layer": 3}), ("memit", {"layers": "2-1"})])
def test_layers_that_do_not_exist(edit: str, settings: dict[str, Any]):
    with pytest.raises(TransectError, match=r"do not exist|does not exist"):
        edit_specimen(specimen_of(), edit, settings)
    with pytest.raises(TransectError, match="numbers and ranges"):
        edit_specimen(specimen_of(), "memit", {"layers": "late"})


@pytest.mark.parametrize(
    ("text", "layers"), [("1", [1]), ("0-1", [0, 1]), ("2, 0-1,1", [0, 1, 2]), ("0,2", [0, 2]), ("all", [0, 1, 2])]
)
def test_layers_as_they_are_written(text: str, layers: list[int]):
    assert layers_of(specimen_of(), text) == layers


def test_an_error_on_the_way_takes_everything_back(monkeypatch: pytest.MonkeyPatch):
    specimen, calls = specimen_of(), []

    def breaks(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise TransectError("the second fact fails")
        return rank_one(*arguments)

    monkeypatch.setattr(rome_file, "rank_one", breaks)
    before = state(specimen.model)
    with pytest.raises(TransectError, match="second fact"):
        edit_specimen(specimen, "rome", QUICK["rome"])
    assert len(calls) == 2 and hooks(specimen.model) == 0
    assert_same(specimen.model, before)
