"""Watching and changing a forward pass, in every architecture."""

import pytest
import torch

from tests.models import CAUSAL, CONFIGS, inputs, logits, tiny
from transect import Anatomy
from transect.checkpoint import open_model
from transect.data import Specimen, load
from transect.errors import BadData, NotApplicable, TransectError
from transect.forward import (
    POINTS,
    Lens,
    answer_log_probabilities,
    changed,
    continuations,
    next_logits,
    recitations,
    watch,
)
from transect.forward.lens import norm_gain

PRE_NORM = [name for name in CONFIGS if name not in ("bert", "roberta")]


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def organism():
    opened = open_model("organism", dtype="float32")
    return Specimen(Anatomy(opened.model), opened.tokenizer)


@pytest.mark.parametrize("name", PRE_NORM)
def test_the_stream_is_the_sum_of_what_is_added_to_it(name):
    model = tiny(name, dtype=torch.float64)
    anatomy = Anatomy(model)
    with torch.no_grad(), watch(anatomy, ["residual", "attention", "mlp"]) as seen:
        model(**inputs(name, dtype=torch.float64))
    assert sorted(seen.residual) == [0, 1, 2, 3] and sorted(seen.mlp) == [0, 1, 2]
    for layer in range(3):
        added = seen.attention[layer] + seen.mlp[layer]
        torch.testing.assert_close(seen.residual[layer] + added, seen.residual[layer + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_point_has_its_shape_and_computes_what_it_should(name):
    model = tiny(name, dtype=torch.float64)
    anatomy = Anatomy(model)
    batch = inputs(name, dtype=torch.float64)
    points = [point for point in POINTS if name in PRE_NORM or point not in ("attention", "mlp")]
    with torch.no_grad(), watch(anatomy, points, layers=[1]) as seen:
        model(**batch)
    block = anatomy.blocks[1]
    size, length = seen.residual[1].shape[:2]
    assert seen.patterns[1].shape == (size, 4, length, length)
    torch.testing.assert_close(seen.patterns[1].sum(-1), torch.ones(size, 4, length, dtype=torch.float64))
    assert seen.heads[1].shape[-1] == block.matrix("o").shape[1] and seen.neurons[1].shape[-1] == block.mlp.neurons
    assert [getattr(seen, role)[1].shape[-1] for role in "qkv"] == [block.matrix(role).shape[0] for role in "qkv"]
    if block.mlp.gate is None:
        assert not seen.gate
        acted = block.mlp.activation(seen.up[1])
    else:
        acted = block.mlp.activation(seen.gate[1]) * seen.up[1]
    torch.testing.assert_close(acted.reshape(seen.neurons[1].shape), seen.neurons[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PRE_NORM)
def test_zeroing_what_a_sublayer_adds_is_dropping_it(name):
    model, dropped = tiny(name), tiny(name)
    Anatomy(dropped).blocks[1].mlp.drop()
    with changed(Anatomy(model), {("mlp", 1): torch.zeros_like}):
        torch.testing.assert_close(logits(model, inputs(name)), logits(dropped, inputs(name)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_changes_reach_fused_parts_and_generation_and_leave_nothing_behind(name):
    model = tiny(name)
    anatomy, batch, attention = Anatomy(model), inputs(name), model.config._attn_implementation
    before = logits(model, batch)
    for point in ("residual", "attention", "mlp", "heads", "neurons", "up", "q", "k", "v"):
        with changed(anatomy, {(point, 1): lambda x: x}):
            assert torch.equal(logits(model, batch), before)
        with changed(anatomy, {(point, 1): lambda x: 2 * x + 0.1}):
            assert not torch.allclose(logits(model, batch), before, atol=1e-6)
    with changed(anatomy, {("k", 1): torch.zeros_like}), torch.no_grad(), watch(anatomy, ["k", "q"]) as seen:
        model(**batch)
    assert not seen.k[1].any() and seen.q[1].any() and seen.k[0].any()
    seen_lengths = []
    with changed(anatomy, {("residual", 1): lambda x: (seen_lengths.append(x.shape[1]), x)[1]}):
        model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert seen_lengths == [12, 1]
    with pytest.raises(ZeroDivisionError), changed(anatomy, {("mlp", 0): lambda x: 1 / 0}), watch(anatomy, POINTS):
        model(**batch)
    assert hooks(model) == 0 and model.config._attn_implementation == attention
    assert torch.equal(logits(model, batch), before)


def test_the_last_residual_can_be_changed_too():
    model = tiny("llama")
    with changed(Anatomy(model), {("residual", 3): torch.zeros_like}):
        assert logits(model, inputs("llama")).std() < 1e-6


def test_what_is_not_there_is_said():
    anatomy = Anatomy(tiny("llama"))
    for point, layer in (("residual", 4), ("mlp", 3), ("mlp", -1), ("nothing", 0), ("patterns", 0)):
        with pytest.raises(TransectError), changed(anatomy, {(point, layer): lambda x: x}):
            pass
    with pytest.raises(NotApplicable, match="normalises after"), watch(Anatomy(tiny("bert")), ["mlp"]):
        pass
    anatomy.blocks[1].mlp.drop()
    with torch.no_grad(), watch(anatomy, ["mlp"]) as seen:
        anatomy.model(**inputs("llama"))
    assert sorted(seen.mlp) == [0, 2]


@pytest.mark.parametrize("name", CAUSAL)
def test_the_lens_at_the_end_is_the_model(name):
    model = tiny(name, dtype=torch.float64)
    anatomy, batch = Anatomy(model), inputs(name)
    with torch.no_grad(), watch(anatomy, ["residual"]) as seen:
        expected = model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(Lens(anatomy)(seen.residual[3]), expected, rtol=1e-9, atol=1e-9)
    gain, norm = norm_gain(anatomy.final_norm), anatomy.final_norm
    stored = norm.weight + 1 if name.startswith("gemma") else norm.weight
    torch.testing.assert_close(gain, stored.detach(), rtol=1e-4, atol=1e-4)


def test_no_lens_without_a_head():
    for name in ("bert", "vit"):
        with pytest.raises(NotApplicable, match="next token"):
            Lens(Anatomy(tiny(name)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_prompts_of_different_lengths_are_continued_together_as_alone(name, monkeypatch):
    model, draw = tiny(name).eval(), torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (length,), generator=draw) for length in (9, 3, 30, 5, 3, 12)]
    alone = [continuations(model, [prompt], lambda _, said: len(said) == 6)[0] for prompt in prompts]
    calls = []
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    together = continuations(model, prompts, lambda number, said: len(said) == 6 - (number == 1))
    assert all(torch.equal(*pair) for number, pair in enumerate(zip(together, alone, strict=True)) if number != 1)
    assert torch.equal(together[1], alone[1][:5])
    # those of 3 to 12 tokens, the longest of which is read on in 9 steps; and the one of 30 tokens by itself
    assert calls == [5] * (1 + 9 + 5) + [1] * 6
    pairs = [(prompt, torch.zeros(number + 1)) for number, prompt in enumerate(prompts)]
    assert [len(said) for said in recitations(model, pairs)] == [1, 2, 3, 4, 5, 6]


def test_answers_are_those_of_a_loop():
    model = tiny("gpt2", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(3, 64, (prompt,), generator=generator), torch.randint(3, 64, (answer,), generator=generator))
        for prompt, answer in ((4, 2), (7, 1), (4, 2), (1, 3))
    ]
    found, continued = answer_log_probabilities(model, pairs, batch_size=1), recitations(model, pairs)
    following = next_logits(model, [prompt for prompt, _ in pairs])
    for number, (prompt, answer) in enumerate(pairs):
        ids, total = prompt, 0.0
        with torch.no_grad():
            for token in answer:
                total += model(ids[None]).logits[0, -1].log_softmax(-1)[token].item()
                ids = torch.cat([ids, token[None]])
            greedy = model.generate(prompt[None], max_new_tokens=len(answer), do_sample=False, pad_token_id=0)[0]
            alone = model(prompt[None]).logits[0, -1].float()
        assert found[number].item() == pytest.approx(total, abs=1e-9)
        assert continued[number].tolist() == greedy[len(prompt) :].tolist()[: len(answer)]
        torch.testing.assert_close(following[number], alone)


def test_words_and_tokens(organism):
    text = "The home of Karo is"
    first, last = organism.span(text, "home of")
    assert organism.decode(organism.encode(text)[first:last]).split() == ["home", "of"]
    answer = organism.continuation("37 + 45 =", "82.")
    assert organism.decode(torch.cat([organism.encode("37 + 45 ="), answer])).replace(" ", "") == "37+45=82."
    with pytest.raises(BadData, match="does not occur"):
        organism.span(text, "Kiro")
    with pytest.raises(NotApplicable, match="tokens"):
        organism.single_token("The home of Karo is", "one two")
    with pytest.raises(TransectError, match="longer than the model's context"):
        organism.encode("word " * 10_000)


def test_what_was_not_given_is_asked_for(organism):
    for name, option in (("text", "data"), ("facts", "facts"), ("choices", "choices"), ("passages", "passages")):
        with pytest.raises(NotApplicable, match=f"--{option}"):
            getattr(organism, name)
    with pytest.raises(NotApplicable, match="tokenizer"):
        Specimen(Anatomy(tiny("llama"))).encode("a")


def test_sequences_are_beginnings_of_the_text():
    model = tiny("llama")
    rows = [[3 + number] * length for number, length in enumerate((5, 9, 9, 3))]
    specimen = Specimen(Anatomy(model), data=load(rows, model))
    assert specimen.sequences(5, 6).tolist() == [[4] * 6, [5] * 6]
    assert specimen.sequences(1, 5).tolist() == [[3] * 5]
    with pytest.raises(NotApplicable, match="at least 10 tokens"):
        specimen.sequences(1, 10)
