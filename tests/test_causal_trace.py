from dataclasses import replace
from functools import cache
from importlib import import_module

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import transect
from tests.models import CAUSAL, VOCABULARY, tiny
from transect.anatomy import Anatomy
from transect.claims import claims
from transect.claims.context import Context
from transect.data import Fact, Specimen, load, load_facts
from transect.errors import BadData, NotApplicable, TransectError
from transect.forward import recitations
from transect.probes import drawings, run_probes
from transect.probes.tracing import (
    Runs,
    answered,
    embedding_deviation,
    subject_noise,
    subject_span,
    trace,
    window_of,
)

PROMPT, SUBJECTS = "w3 w4 {} w5 w6", ["w7 w8", "w9 w10", "w11 w12", "w13 w14"]


@cache
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words)


def specimen_of(name, dtype=torch.float64, tokens=1, subjects=SUBJECTS):
    """A random model, and facts that it knows: its own greedy answers."""
    model = tiny(name, dtype=dtype)
    with torch.no_grad():  # let the answer depend on the subject more than on the last word
        model.get_input_embeddings().weight[6] *= 0.1
        for path, parameter in model.named_parameters():
            parameter *= 0.1 if path.endswith(("bias", "wpe.weight")) else 1
        for matrix in Anatomy(model).matrices(["v", "o"]):
            matrix.write(matrix.weight * 4)
    prompts = [torch.tensor(tokenizer()(PROMPT.replace("{}", subject))["input_ids"]) for subject in subjects]
    said = recitations(model, [(prompt, torch.zeros(tokens)) for prompt in prompts])
    facts = [
        Fact(PROMPT, subject, " ".join(f"w{number}" for number in answer.tolist()))
        for subject, answer in zip(subjects, said, strict=True)
    ]
    return Specimen(Anatomy(model), tokenizer(), known_facts=facts)


@torch.no_grad()
def probability(model, ids, answer):
    """Brute force: the answer's probability, one token after the other."""
    p = 1.0
    for token in answer:
        p *= float(model(ids[None]).logits[0, -1].softmax(-1)[token])
        ids = torch.cat([ids, torch.tensor([token])])
    return p


@pytest.mark.parametrize("kind", ["mlp", "attention", "block"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_limits(name, kind):
    specimen = specimen_of(name, tokens=2)
    fact = specimen.facts[0]
    ids, answer = specimen.encode(fact.text), specimen.continuation(fact.text, fact.answer)
    expected = probability(specimen.model, ids, answer.tolist())
    runs = Runs(specimen, fact, kind, 1.0, 3, 0)
    assert runs.clean == pytest.approx(expected, rel=1e-9)
    nothing = torch.zeros(1, len(ids), specimen.layers, dtype=torch.bool)
    noisy = runs.probabilities(nothing)
    assert ((noisy - expected).abs() > 1e-6).all()
    quiet = Runs(specimen, fact, kind, 0.0, 2, 0)
    torch.testing.assert_close(quiet.probabilities(nothing), torch.full((1, 2), expected, dtype=torch.float64))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "gemma3", "olmo2"])
def test_every_block_restored_at_every_token_is_the_clean_run(name):
    specimen = specimen_of(name)
    runs = Runs(specimen, specimen.facts[2], "block", 1.0, 3, 0)
    everything = torch.ones(1, runs.prompt, specimen.layers, dtype=torch.bool)
    assert ((runs.probabilities(~everything) - runs.clean).abs() > 1e-6).all()
    restored = runs.probabilities(everything)
    torch.testing.assert_close(restored, torch.full_like(restored, runs.clean), rtol=1e-9, atol=0)


def test_corrupted_and_restored_by_brute_force():
    specimen = specimen_of("llama")
    fact = specimen.facts[1]
    model, ids = specimen.model, specimen.encode(fact.text)
    answer = specimen.continuation(fact.text, fact.answer)
    found = trace(specimen, fact, kind="mlp", window=2, noise=2.0, samples=2, seed=3)
    assert found.subject == (2, 4) and found.effects.shape == (6, 3)
    noise = subject_noise(specimen, fact, 2.0 * embedding_deviation(specimen), 2, 3)
    kept = {}
    hooks = [
        layer.mlp.register_forward_hook(lambda m, a, o, n=number: kept.__setitem__(n, o.detach()))
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def run(token, layers):
        """Corrupted, with the MLPs of some layers restored at a token: mean over the noise."""
        total = 0.0
        for draw in noise:
            x = model.model.embed_tokens(ids[None]).clone()
            x[:, 2:4] += draw

            def restore(m, a, o, number):
                o = o.clone()
                o[:, token] = kept[number][:, token]
                return o

            handles = [
                model.model.layers[number].mlp.register_forward_hook(lambda m, a, o, n=number: restore(m, a, o, n))
                for number in layers
            ]
            total += float(model(inputs_embeds=x).logits[0, -1].softmax(-1)[answer[0]])
            for handle in handles:
                handle.remove()
        return total / len(noise)

    corrupted = run(0, [])
    assert found.corrupted == pytest.approx(corrupted, rel=1e-9)
    expected = [[run(token, window_of(layer, 2, 3)) - corrupted for layer in range(3)] for token in range(6)]
    torch.testing.assert_close(found.effects, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert found.effects[2:].abs().max() > 1e-6
    fractions = (found.effects / abs(corrupted - found.clean)).clamp_min(0)
    torch.testing.assert_close(found.by_layer, fractions[2:].amax(0))


def test_batches_do_not_matter(monkeypatch):
    specimen = specimen_of("gpt2")
    whole = trace(specimen, specimen.facts[0], kind="attention")
    monkeypatch.setattr(import_module("transect.probes.tracing"), "_TOKENS", 1)  # a batch of one
    single = trace(specimen, specimen.facts[0], kind="attention")
    torch.testing.assert_close(whole.effects, single.effects, rtol=1e-9, atol=1e-13)
    assert single.corrupted == pytest.approx(whole.corrupted, rel=1e-10)


@pytest.mark.parametrize("kind", ["mlp", "block"])
@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_in_front_are_left_out_and_change_nothing(name, kind, monkeypatch):
    specimen = specimen_of(name, tokens=2)
    fact, asked = specimen.facts[0], dict(kind=kind, window=2, samples=3)
    runs = Runs(specimen, fact, kind, 1.0, 2, 0)
    assert [runs._behind_token(token).start for token in (0, 2, 5)] == [0, 2, 5]
    found = trace(specimen, fact, **asked)
    monkeypatch.setattr("transect.forward.behind.first_of", lambda *given: None)
    whole = trace(specimen, fact, **asked)
    assert Runs(specimen, fact, kind, 1.0, 2, 0)._behind_token(5).start == 0
    torch.testing.assert_close(found.effects, whole.effects, rtol=1e-8, atol=1e-12)


def test_where_layers_choose_among_all_tokens_all_are_run(monkeypatch):
    """Blocks that process half of the first tokens choose others if some are missing."""
    specimen = specimen_of("llama")
    settings = {"p-mod": {"targets": 5, "decay": "alternate", "mean": 0.5}}
    model = transect.convert(specimen.model, "p-mod", torch.randint(1, 40, (8, 16)), settings=settings, steps=0).model
    routed = Specimen(Anatomy(model), tokenizer(), known_facts=specimen.facts)
    found = trace(routed, routed.facts[0], samples=3)
    monkeypatch.setattr("transect.forward.behind.first_of", lambda *given: None)
    whole = trace(routed, routed.facts[0], samples=3)
    assert whole.effects.abs().max() > 1e-6
    torch.testing.assert_close(found.effects, whole.effects, rtol=1e-8, atol=1e-12)


def test_windows_are_cut_off_at_both_ends():
    assert [list(window_of(layer, 1, 4)) for layer in (0, 3)] == [[0], [3]]
    assert [list(window_of(layer, 4, 6)) for layer in range(6)] == [
        [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5]
    ]  # fmt: skip
    assert [list(window_of(layer, 5, 28)) for layer in (0, 14, 27)] == [
        [0, 1, 2], [12, 13, 14, 15, 16], [25, 26, 27]
    ]  # fmt: skip


def test_the_deviation_of_embeddings_is_that_of_what_the_first_block_reads():
    table = tiny("llama", dtype=torch.float64).get_input_embeddings().weight
    specimen = Specimen(Anatomy(tiny("llama", dtype=torch.float64)))
    assert embedding_deviation(specimen) == pytest.approx(float(table.detach().std(correction=0)), rel=1e-9)
    scaled = Specimen(Anatomy(tiny("gemma2", dtype=torch.float64)))
    inside = scaled.model.get_input_embeddings().weight.std(correction=0)
    assert embedding_deviation(scaled) == pytest.approx(float(inside.detach()) * 32**0.5, rel=1e-3)
    learned = Specimen(Anatomy(tiny("gpt2", dtype=torch.float64)))  # positions do not count
    inside = learned.model.transformer.wte.weight.std(correction=0)
    assert embedding_deviation(learned) == pytest.approx(float(inside.detach()), rel=1e-9)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture(name):
    specimen = specimen_of(name, torch.float32)
    before = specimen.model(specimen.encode(PROMPT)[None]).logits
    result = run_probes(specimen, {"causal-trace": {"samples": 2, "kind": "attention"}})["causal-trace"]
    assert result.label("role", 4) == [
        "first subject token", "last subject token", "first token after the subject", "last token of the prompt"
    ]  # fmt: skip
    assert result["effect"].shape == (4, 4, 3) and result["effect"].abs().max() > 1e-6
    torch.testing.assert_close(result["role effect"], result["effect"].mean(0))
    assert len(result.findings) == 4 and len(drawings(result)) == 3
    assert torch.equal(before, specimen.model(specimen.encode(PROMPT)[None]).logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in specimen.model.modules())


def test_the_seed_decides():
    specimen = specimen_of("llama")
    one, again, other = (trace(specimen, specimen.facts[0], samples=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.effects, again.effects) and one.corrupted != other.corrupted


def test_of_more_facts_the_seed_chooses():
    specimen, chosen = specimen_of("gpt2", subjects=[f"w{n} w{n + 1}" for n in range(7, 27)]), []
    for seed in (0, 0, 1):
        specimen = replace(specimen, seed=seed)
        result = run_probes(specimen, {"causal-trace": {"samples": 1, "facts": 5}})["causal-trace"]
        chosen.append(result.label("fact", 5))
    assert chosen[0] == chosen[1] and len({*chosen[0], *chosen[2]}) > 5


def test_hooks_go_after_an_error():
    specimen = specimen_of("llama")
    handle = specimen.model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(specimen, specimen.facts[0], scale=0.1)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in specimen.model.modules())


def test_refusals():
    specimen = specimen_of("llama")
    with pytest.raises(BadData, match="not found"):
        subject_span(specimen, Fact(PROMPT, "unknown", "w1"))
    with pytest.raises(BadData, match="empty"):
        subject_span(specimen, Fact(PROMPT, " ", "w1"))
    wrong = [Fact(PROMPT, fact.subject, "w1 w2 w1") for fact in specimen.facts]
    with pytest.raises(NotApplicable, match="none of the 4 facts"):
        answered(specimen, wrong, 10)
    for given in ({"kind": "heads"}, {"samples": 0}, {"window": -1}):
        with pytest.raises(TransectError):
            run_probes(specimen, {"causal-trace": given})
    for name in ("bert", "vit"):
        other = Specimen(Anatomy(tiny(name)), tokenizer(), known_facts=specimen.facts)
        assert "next token" in run_probes(other, {"causal-trace": {}}).refused["causal-trace"]
    nothing = Specimen(specimen.anatomy, tokenizer())
    assert "--facts" in run_probes(nothing, {"causal-trace": {}}).refused["causal-trace"]


def test_claims_on_the_bundled_model(organism, monkeypatch):
    monkeypatch.setattr(import_module("transect.claims.catalog.causal_trace"), "_FACTS", 6)
    opened, specimen = organism
    data = load("organism:heldout", opened.model, opened.tokenizer, sequences=4, sequence_length=32)
    context = Context(opened.model, data, data, specimen=specimen)
    for one in claims(["causal-trace"]):
        result = one.function(context)
        assert len(result.numbers) == 8 and "6 known facts" in result.explanation


@pytest.fixture(scope="module")
def organism():
    from transect.checkpoint import open_model

    opened = open_model("organism", dtype="float32")
    return opened, Specimen(Anatomy(opened.model), opened.tokenizer, known_facts=load_facts("organism:facts"))


def test_noise_on_the_subject_destroys_what_the_bundled_model_knows(organism):
    _, specimen = organism
    result = run_probes(specimen, {"causal-trace": {"facts": 5, "kind": "block"}})["causal-trace"]
    assert result["clean"].mean() > 0.9 and result["corrupted"].mean() < 0.5
    roles = result.label("role", 2)
    effect = result["role effect"]
    lost = result["clean"].mean() - result["corrupted"].mean()
    last = effect[roles.index("last token of the prompt")]
    torch.testing.assert_close(
        last[-1], lost.double(), atol=1e-5, rtol=0
    )  # the last state is all that the answer depends on
