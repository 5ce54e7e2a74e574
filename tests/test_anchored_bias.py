"""The anchored letter: its parts against brute force, a planted anchor, every architecture, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.models import CAUSAL, VOCABULARY, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.claims import Verdict, run_claims
from transect.data import Choice, Specimen, load, load_choices
from transect.editing import Journal, edit_specimen
from transect.editing.catalog.anchored_bias.anchored_bias import mean_lead, turn
from transect.editing.catalog.anchored_bias.anchors import (
    final_scale,
    leaning,
    letter_direction,
    letter_lens,
    project_out,
    value_logits,
    written_direction,
)
from transect.editing.catalog.anchored_bias.letters import (
    Answers,
    averaged_letter_logits,
    averaged_pattern,
    items_of,
    letter_logits,
    rotated,
    swapped_letter_logits,
    swapped_pattern,
)
from transect.editing.catalog.anchored_bias.told import (
    Told,
    told_answers,
    told_change,
    told_heads,
    told_neuron,
    told_swap,
)
from transect.errors import BadData, NotApplicable, TransectError
from transect.forward import changed, watch

LETTERS = ("A", "B", "C")


def tokenizer() -> Any:
    names = ["<unk>", *"ABCD", *",.?:", "Question", "Options", "Answer"]
    names += [f"w{number}" for number in range(VOCABULARY - len(names))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def choices(count: int = 12, letters: int = 3) -> list[Choice]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        drawn = [f"w{int(i)}" for i in torch.randperm(40, generator=generator)[: letters + 1 + number % 2]]
        made.append(
            {"question": " ".join(drawn[letters:]), "options": drawn[:letters], "answer": number % letters}
        )  # fmt: skip
    return load_choices(made)


def specimen_of(name: str = "llama", dtype: torch.dtype = torch.float64, count: int = 12) -> Specimen:
    return Specimen(Anatomy(tiny(name, dtype=dtype)), tokenizer(), known_choices=choices(count))


def blocks(specimen: Specimen) -> list[Any]:
    return specimen.anatomy.blocks


def hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def prompt_of(specimen: Specimen, item: int = 0) -> Tensor:
    return specimen.encode(specimen.choices[item].prompt)[None]


# Items and answers


def test_rotating_moves_every_option_and_comes_back():
    (item,) = load_choices([{"question": "who?", "options": ["one", "two words", "x"], "answer": 2}])
    once = rotated(item, 1)
    assert once.prompt == "Question: who? Options: A x, B one, C two words. Answer:" and once.answer == 0
    assert [once.prompt[start] for start in once.positions] == ["A", "B", "C"]
    assert rotated(once, 2) == item == rotated(item, 0)


def test_an_item_that_hides_its_end_is_refused():
    with pytest.raises(BadData, match="where its options end"):
        rotated(replace(choices(1)[0], end=None), 1)


def test_the_scores_of_answers():
    right = torch.tensor([[0, 1], [1, 0]])
    always_first = Answers(torch.zeros(2, 2, dtype=torch.long), right)
    assert always_first.accuracy == 0.5 and always_first.spread == 1 and always_first.by_place.tolist() == [1, 0]
    assert always_first.bias_rate(0) == 1 and always_first.bias_rate(1) == 0 and always_first.consistency == 0
    assert always_first.answered.tolist() == [1, 0]
    perfect = Answers(right, right)
    assert perfect.accuracy == 1 and perfect.spread == 0 and perfect.consistency == 1
    assert Answers(1 - right, right).consistency == 1  # the same wrong option in every rotation


# Attribution


@pytest.mark.parametrize("name", CAUSAL)
def test_neurons_add_up_to_the_mlp_and_the_stream_to_the_logits(name):
    specimen = specimen_of(name)
    anatomy, lens, layers = specimen.anatomy, specimen.lens, specimen.layers
    tokens = torch.tensor([specimen.single_token("Answer:", letter) for letter in LETTERS])
    towards = letter_direction(lens, tokens, 1)
    with torch.no_grad(), watch(anatomy, ["residual", "mlp", "neurons"]) as seen:
        given = specimen.model(prompt_of(specimen)).logits[:, -1]
    state = seen.residual[layers][:, -1]
    scale = final_scale(lens, state)
    lead = letter_lens(lens, state, tokens, 1)
    bias = getattr(lens.norm, "bias", None)
    against = torch.tensor([-0.5, 1, -0.5], dtype=torch.float64)
    offset = 0.0 if bias is None else float(against @ lens.weight[tokens] @ bias.detach())
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # transformers takes RMS norms in float32
    offset += 0.0 if lens.bias is None else float(against @ lens.bias[tokens].double())
    torch.testing.assert_close(state @ towards / scale + offset, lead, **close)
    if lens.softcap is None:
        torch.testing.assert_close(given[:, tokens[1]] - given[:, tokens[[0, 2]]].mean(-1), lead, **close)
    for block in blocks(specimen):
        active, added = seen.neurons[block.index][:, -1], seen.mlp[block.index][:, -1]
        down = block.mlp.down
        if block.norms.get("mlp_output") is None:
            whole = active @ down.weight.T + (0 if down.bias is None else down.bias)
            torch.testing.assert_close(whole * block.residual_multiplier, added, rtol=0, atol=1e-9)
        shares = value_logits(block, active, added, towards, scale).sum(-1)
        from_bias = 0 if down.bias is None else down.bias @ written_direction(block, towards) / scale
        torch.testing.assert_close(shares + from_bias, added @ towards / scale, **close)


def test_projection():
    direction, vectors = torch.randn(8, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    once = project_out(vectors, direction, 1.0)
    assert float((direction @ once).abs().max()) < 1e-12
    torch.testing.assert_close(project_out(once, direction, 1.0), once, rtol=0, atol=1e-12)
    assert torch.equal(project_out(vectors, direction, 0.0), vectors)
    torch.testing.assert_close(direction @ project_out(vectors, direction, 0.25), 0.75 * (direction @ vectors))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_neuron_counts_by_its_activation_and_changes_one_vector(name):
    specimen = specimen_of(name)
    block, neuron = blocks(specimen)[1], 5
    towards = letter_direction(specimen.lens, torch.tensor([1, 2, 3]), 0)
    ids = prompt_of(specimen)
    with torch.no_grad(), watch(specimen.anatomy, ["neurons", "mlp"], [1]) as seen:
        specimen.model(ids)
    before, old = seen.mlp[1].clone(), block.mlp.down.weight.clone()
    journal = Journal(specimen.model)
    turn(specimen, journal, [(1, neuron)], towards, 1.0)
    change = block.mlp.down.weight - old
    assert int((change != 0).sum()) == len(change) == int((change[:, neuron] != 0).sum())
    with torch.no_grad(), watch(specimen.anatomy, ["neurons", "mlp"], [1]) as seen:
        specimen.model(ids)
    torch.testing.assert_close(
        seen.mlp[1] - before, seen.neurons[1][..., [neuron]] * change[:, neuron], atol=1e-9, rtol=0
    )
    journal.undo()
    assert torch.equal(block.mlp.down.weight, old)


# Attention


def test_averaging_keeps_the_sum_and_forgets_the_order():
    pattern = torch.rand(2, 3, 9, dtype=torch.float64).softmax(-1)
    places = torch.tensor([[1, 4, 6], [2, 3, 8]])
    averaged = averaged_pattern(pattern, places)
    torch.testing.assert_close(averaged.sum(-1), pattern.sum(-1))
    torch.testing.assert_close(averaged_pattern(averaged, places), averaged)
    permuted = pattern.clone()
    for row, order in enumerate(places):
        permuted[row][:, order] = pattern[row][:, order[[2, 0, 1]]]
        assert len(averaged[row, 0, order].unique()) == 1
    torch.testing.assert_close(averaged_pattern(permuted, places), averaged)
    rest = torch.ones(9, dtype=torch.bool)
    rest[places[0]] = False
    assert torch.equal(averaged[0][:, rest], pattern[0][:, rest])


@pytest.mark.parametrize("name", CAUSAL)
def test_averaged_attention_is_that_of_changed_patterns(name):
    specimen = specimen_of(name, count=2)
    model, items = specimen.model, items_of(specimen, specimen.choices[:1])
    plain = letter_logits(specimen, items)
    torch.testing.assert_close(averaged_letter_logits(specimen, items, {}), plain, rtol=0, atol=1e-5)
    block = blocks(specimen)[2]  # the last one, so that its change reaches the logits in one step
    ids, places = items.prompts[0][1][None], items.places[0][1][None]
    assert specimen.decode(ids[0, places[0]].tolist()).split() == list(LETTERS)
    with torch.no_grad(), watch(specimen.anatomy, ["patterns", "v", "heads"], [2]) as seen:
        model(ids)
    size, heads = block.attention.head_size, block.attention.heads
    values = seen.v[2].unflatten(-1, (-1, size)).repeat_interleave(heads // block.attention.key_value_heads, 2)
    built = torch.einsum("bhqt,bthe->bqhe", seen.patterns[2], values).flatten(-2)
    torch.testing.assert_close(built, seen.heads[2], rtol=0, atol=1e-6)
    pattern = seen.patterns[2].clone()
    pattern[:, 1, -1, places[0]] = pattern[:, 1, -1, places[0]].mean()
    wanted = torch.einsum("bhqt,bthe->bqhe", pattern, values).flatten(-2)
    with torch.no_grad(), changed(specimen.anatomy, {("heads", 2): lambda heads: wanted}):
        expected = model(ids).logits[0, -1, items.tokens]
    given = averaged_letter_logits(specimen, items, {2: [1]})[0, 1]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)  # transformers takes the softmax in float32
    assert not torch.allclose(given, plain[0, 1])
    assert hooks(model) == 0


def test_later_heads_see_what_earlier_ones_do_and_only_what_is_asked_is_answered():
    specimen = specimen_of(count=2)
    items = items_of(specimen, specimen.choices)
    both = averaged_letter_logits(specimen, items, {0: [1], 2: [3]})
    asked = torch.zeros(len(items), 3, dtype=torch.bool)
    asked[1, 2] = True
    alone = averaged_letter_logits(specimen, items, {0: [1], 2: [3]}, asked)
    torch.testing.assert_close(alone[asked], both[asked], rtol=0, atol=1e-5)
    assert (alone[~asked] == 0).all() and torch.equal(letter_logits(specimen, items, asked) != 0, alone != 0)
    o = blocks(specimen)[2].attention.o  # without the later heads it is what the earlier ones do
    o.write(torch.zeros_like(o.weight))
    first = averaged_letter_logits(specimen, items, {0: [1]})
    torch.testing.assert_close(averaged_letter_logits(specimen, items, {0: [1], 2: [3]}), first, rtol=0, atol=1e-5)
    assert not torch.allclose(first, letter_logits(specimen, items))


def test_swapping_is_an_exchange():
    pattern = torch.rand(2, 3, 9, dtype=torch.float64).softmax(-1)
    first, second = torch.tensor([1, 8]), torch.tensor([4, 3])
    swapped = swapped_pattern(pattern, first, second)
    assert torch.equal(swapped.sort(-1).values, pattern.sort(-1).values)  # so the sums of rows stay
    torch.testing.assert_close(swapped.sum(-1), pattern.sum(-1))
    assert torch.equal(swapped[0, :, [1, 4]], pattern[0, :, [4, 1]])
    assert torch.equal(swapped[1, :, [8, 3]], pattern[1, :, [3, 8]])
    assert not torch.equal(swapped, pattern)
    assert torch.equal(swapped_pattern(swapped, first, second), pattern)
    assert torch.equal(swapped_pattern(pattern, second, first), swapped)
    assert torch.equal(swapped_pattern(pattern, first, first), pattern)


@pytest.mark.parametrize("name", CAUSAL)
def test_swapped_attention_is_that_of_changed_patterns(name):
    specimen = specimen_of(name, count=2)
    model, items = specimen.model, items_of(specimen, specimen.choices[:1])
    plain, given = (swapped_letter_logits(specimen, items, heads, 0) for heads in ({}, {2: [1, 3]}))
    block, size = blocks(specimen)[2], blocks(specimen)[2].attention.head_size
    shared = block.attention.heads // block.attention.key_value_heads
    for number, ids in enumerate(items.prompts[0]):
        right = int(items.answers[0, number])
        at, to = items.places[0][number][[0, right]].tolist()
        with torch.no_grad(), watch(specimen.anatomy, ["patterns", "v"], [2]) as seen:
            model(ids[None])
        values = seen.v[2].unflatten(-1, (-1, size)).repeat_interleave(shared, 2)
        pattern = seen.patterns[2].clone()
        pattern[:, [1, 3], -1, at], pattern[:, [1, 3], -1, to] = (
            seen.patterns[2][:, [1, 3], -1, to],
            seen.patterns[2][:, [1, 3], -1, at],
        )
        wanted = torch.einsum("bhqt,bthe->bqhe", pattern, values).flatten(-2)
        with torch.no_grad(), changed(specimen.anatomy, {("heads", 2): lambda heads, wanted=wanted: wanted}):
            expected = model(ids[None]).logits[0, -1, items.tokens]
        torch.testing.assert_close(given[0, number], expected, rtol=0, atol=1e-5)
        assert torch.allclose(given[0, number], plain[0, number], rtol=0, atol=1e-9) == (right == 0)
    assert hooks(model) == 0


# The edit


def planted() -> tuple[Specimen, int, int]:
    """GPT-2 with a neuron that is always on and writes the letter B; its layer and number."""
    specimen = specimen_of("gpt2")
    block, neuron = blocks(specimen)[2], 7
    up, down = block.mlp.up, block.mlp.down
    weight, bias, written = up.weight.clone(), up.bias.clone(), down.weight.clone()
    weight[neuron], bias[neuron] = 0, 5.0
    tokens = torch.tensor([specimen.single_token("Answer:", letter) for letter in LETTERS])
    towards = letter_direction(specimen.lens, tokens, 1)
    written[:, neuron] = 3 * towards / towards.norm()
    up.write(weight, bias)
    down.write(written)
    return specimen, 2, neuron


def test_a_planted_anchor_is_found_and_taken_out():
    specimen, layer, neuron = planted()
    items = items_of(specimen, specimen.choices)
    found = leaning(specimen, items, 1)
    assert int(found.neurons[layer].argmax()) == neuron and float(found.mlps[layer]) > 0
    assert float(found.activations[layer][neuron]) == pytest.approx(5.0, abs=1e-4)
    edited = edit_specimen(specimen, "anchored-bias", {"neurons": 1, "cancel": "all"})
    assert edited.card.notes["letter"] == "B" and edited.card.notes["neurons turned"] == f"{layer}:{neuron}"
    before, after = edited.card["answered B"]
    assert before > 0.9 and after < before - 0.2
    before, after = edited.card["accuracy where A is wrong"]
    assert before == 0.5 and after < before  # always B is right wherever B is, and wrong at C
    towards = letter_direction(specimen.lens, items.tokens, 1)
    column = blocks(specimen)[layer].mlp.down.weight[:, neuron]
    assert abs(float(towards @ column)) < 1e-10
    assert [row["matrix"] for row in edited.card.changes] == [f"blocks.{layer}.mlp.down"]


def test_only_the_lead_goes_where_the_lead_is_asked_for():
    specimen, _, _ = planted()
    items = items_of(specimen, specimen.choices[:6])
    lead = mean_lead(letter_logits(specimen, items), 1)
    notes = edit_specimen(specimen, "anchored-bias", {"neurons": 1}).card.notes
    assert notes["lead of the letter, logits"] == pytest.approx(lead)
    part = min(1, lead / notes["what they add to the letter, logits"])
    assert notes["share of their letter direction taken out"] == pytest.approx(part)
    assert abs(mean_lead(letter_logits(specimen, items), 1)) < 0.6 * lead


def test_no_strength_changes_nothing_and_no_right_letter_is_read():
    specimen = specimen_of()
    before = logits(specimen.model, inputs("llama"))
    edited = edit_specimen(specimen, "anchored-bias", {"beta": 0, "threshold": -100})
    assert torch.equal(logits(specimen.model, inputs("llama")), before)
    edited.undo()
    edit_specimen(specimen, "anchored-bias", {"threshold": -100})
    weights = [block.mlp.down.weight.clone() for block in blocks(specimen)]
    other = specimen_of()
    moved = [replace(one, answer=(one.answer + 1) % 3) for one in other.choices]
    edit_specimen(replace(other, known_choices=moved), "anchored-bias", {"threshold": -100})
    assert all(torch.equal(a, b.mlp.down.weight) for a, b in zip(weights, blocks(other), strict=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture(name):
    specimen = specimen_of(name)
    model, batch = specimen.model, inputs(name)
    before = logits(model, batch)
    edited = edit_specimen(
        specimen, "anchored-bias", {"threshold": -100, "neurons": 3, "cancel": "all", "oracle_upper_bound": True}
    )
    assert not torch.equal(logits(model, batch), before) and hooks(model) == 0
    assert all(row["matrix"].endswith("mlp.down") for row in edited.card.changes)
    towards = letter_direction(specimen.lens, torch.tensor([1, 2, 3]), LETTERS.index(edited.card.notes["letter"]))
    for place in edited.card.notes["neurons turned"].split(", "):
        layer, neuron = map(int, place.split(":"))
        block = blocks(specimen)[layer]
        assert abs(float(written_direction(block, towards) @ block.mlp.down.weight[:, neuron])) < 1e-10
    edited.undo()
    assert torch.equal(logits(model, batch), before)


# The published edit, told the answers


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_sign_of_the_activation_turns_the_edit_round(name):
    specimen = specimen_of(name)
    lens, block = specimen.lens, blocks(specimen)[2]
    tokens = torch.tensor([1, 2, 3])
    change = told_change(lens, tokens, 0, 2, 1.0)
    both = letter_direction(lens, tokens[[0, 2]], 1)  # C against A
    assert float(both @ change) > 0
    ids = prompt_of(specimen)
    with torch.no_grad(), watch(specimen.anatomy, ["residual", "neurons", "mlp"], [2]) as seen:
        specimen.model(ids)
    active = seen.neurons[2][:, -1]
    positive, negative = int(active[0].argmax()), int(active[0].argmin())
    assert active[0, positive] > 0 > active[0, negative]
    for neuron in (positive, negative):
        old = block.mlp.down.weight.clone()
        moved = []
        for sign in (float(active[0, neuron].sign()), -float(active[0, neuron].sign())):
            weight = old.clone()
            weight[:, neuron] += sign * change
            block.mlp.down.write(weight)
            with torch.no_grad(), watch(specimen.anatomy, ["mlp"], [2]) as after:
                specimen.model(ids)
            moved.append(float((after.mlp[2] - seen.mlp[2])[0, -1] @ both))
            block.mlp.down.write(old)
        assert moved[0] > 1e-6 and moved[1] == pytest.approx(-moved[0])  # raises C over A, and the other way round


def test_it_is_told_and_leaves_no_trace():
    specimen, layer, neuron = planted()
    items = items_of(specimen, specimen.choices)
    before = blocks(specimen)[layer].mlp.down.weight.clone()
    plain = letter_logits(specimen, items).argmax(-1)
    told = told_neuron(specimen, items, plain, 1, 0.0)
    assert told is not None and told == Told(layer, neuron, 1.0)
    given = told_answers(specimen, items, plain, 1, told, 1.0)
    assert Answers(given, items.answers).accuracy > 2 * Answers(plain, items.answers).accuracy
    untouched = (plain != 1) | (items.answers == 1)
    assert torch.equal(given[untouched], plain[untouched])
    assert torch.equal(blocks(specimen)[layer].mlp.down.weight, before)
    assert told_neuron(specimen, items, plain, 1, 1e9) is None


def head_that_copies_letters() -> tuple[Specimen, dict[int, list[int]]]:
    """GPT-2 whose head 0.1, at the last token, reads the letters' tokens, mostly A's, and writes what it reads.

    Where its attention is swapped, it writes the right letter.
    """
    specimen = specimen_of("gpt2")
    for one in blocks(specimen):
        for matrix in (one.attention.o, one.mlp.down):
            matrix.write(torch.zeros_like(matrix.weight), torch.zeros_like(matrix.bias))
    embedding, head = specimen.anatomy.embedding, specimen.model.get_output_embeddings()
    tokens = torch.tensor([specimen.single_token("Answer:", letter) for letter in LETTERS])
    asking = specimen.encode("w1 :")[-1]
    with torch.no_grad():
        specimen.model.transformer.wpe.weight.zero_()
        embedding.weight.zero_()
        embedding.weight[tokens, torch.arange(3)] = 1.0
        embedding.weight[asking, 3] = 1.0
        head.weight = nn.Parameter(torch.zeros_like(head.weight))
        head.weight[tokens, torch.arange(4, 7)] = 1.0
        block, size = blocks(specimen)[0], blocks(specimen)[0].attention.head_size
        attention, rows = block.attention, slice(size, 2 * size)  # head 1
        for matrix, pairs in (
            (attention.q, [(0, 3, 8.0)]),
            (attention.k, [(0, 0, 1.0), (0, 1, 0.5), (0, 2, 0.5)]),
            (attention.v, [(number, number, 1.0) for number in range(3)]),
        ):
            weight = torch.zeros_like(matrix.weight)
            for row, column, value in pairs:
                weight[rows.start + row, column] = value
            matrix.write(weight, torch.zeros_like(matrix.bias))
        weight = torch.zeros_like(attention.o.weight)
        weight[torch.arange(4, 7), rows.start + torch.arange(3)] = 4.0
        attention.o.write(weight, torch.zeros_like(attention.o.bias))
    return specimen, {0: [1]}


def test_a_head_that_looks_at_the_letter_is_found_and_swapped():
    specimen, wanted = head_that_copies_letters()
    items = items_of(specimen, specimen.choices)
    plain = Answers(letter_logits(specimen, items).argmax(-1), items.answers)
    assert plain.bias_rate(0) == 1 and plain.accuracy == pytest.approx(1 / 3)
    ((layer, head, lead),) = told_heads(specimen, items, plain.chosen, 0, 0.0)
    assert {layer: [head]} == wanted and lead > 0
    assert told_heads(specimen, items, plain.chosen, 0, 1e9) == []
    before = {name: tensor.clone() for name, tensor in specimen.model.state_dict().items()}
    assert Answers(told_swap(specimen, items, plain.chosen, 0, wanted), items.answers).accuracy == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in specimen.model.state_dict().items())
    assert hooks(specimen.model) == 0


def test_where_another_letter_or_the_right_one_was_said_the_swap_is_not_asked():
    specimen = specimen_of()
    items = items_of(specimen, specimen.choices)
    plain = letter_logits(specimen, items).argmax(-1)
    letter = int(torch.bincount(plain.flatten()).argmax())
    given = told_swap(specimen, items, plain, letter, {1: [0, 2]})
    untouched = (plain != letter) | (items.answers == letter)
    assert untouched.any() and torch.equal(given[untouched], plain[untouched])


def test_the_signs_of_a_neuron_and_its_vector_mean_nothing_together():
    specimen = specimen_of()
    items = items_of(specimen, specimen.choices)
    up, down = blocks(specimen)[2].mlp.up, blocks(specimen)[2].mlp.down
    plain = letter_logits(specimen, items).argmax(-1)
    letter = int(plain.flatten().bincount().argmax())
    found, told = leaning(specimen, items, letter), told_neuron(specimen, items, plain, letter, -100.0)
    assert told is not None
    weight, written = up.weight.clone(), down.weight.clone()
    weight[::2] *= -1
    written[:, ::2] *= -1
    up.write(weight)
    down.write(written)
    again, other = leaning(specimen, items, letter), told_neuron(specimen, items, plain, letter, -100.0)
    torch.testing.assert_close(again.neurons[2], found.neurons[2], rtol=0, atol=1e-9)
    flipped = told.layer == 2 and told.neuron % 2 == 0
    assert other == told._replace(sign=-told.sign if flipped else told.sign)


def test_the_claims_say_what_their_numbers_say():
    specimen, _, _ = planted()
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    text = load(ids, specimen.model)
    outcomes = run_claims(specimen.model, text, text, ["anchored-bias"], specimen=replace(specimen, data=text))
    results = {one.claim.name.partition("/")[2]: one.result for one in outcomes}
    assert set(results) == {"spread", "bias-rate", "consistency", "attention-swap"}
    assert all(result.verdict is not Verdict.NOT_APPLICABLE for result in results.values())
    rows = {row["model"]: row for row in results["spread"].numbers}
    plain, edited, swapped = rows["unedited"], rows["edited"], rows["told the answers, swapped (upper bound)"]
    assert plain["bias_rate"] > 0.9 and plain["where_right"] > 0.9
    control = [row["accuracy"] for name, row in rows.items() if name.startswith("told the answers, random")]
    holds = {
        "spread": edited["spread"] < plain["spread"],
        "bias-rate": edited["bias_rate"] < plain["bias_rate"]
        and edited["where_wrong"] > plain["where_wrong"]
        and abs(edited["where_right"] - plain["where_right"]) < 0.05
        and abs(math.exp(edited["loss"] - plain["loss"]) - 1) < 0.01,
        "consistency": edited["consistent"] > plain["consistent"],
        "attention-swap": swapped["accuracy"] > max(plain["accuracy"], sum(control) / len(control)),
    }
    assert {name: result.verdict is Verdict.HOLDS for name, result in results.items()} == holds


# Refusals


def test_refusals_before_any_work():
    with pytest.raises(NotApplicable, match="predict"):
        edit_specimen(Specimen(Anatomy(tiny("bert")), tokenizer(), known_choices=choices()), "anchored-bias", {})
    plain = specimen_of()
    with pytest.raises(NotApplicable, match="multiple-choice"):
        edit_specimen(replace(plain, known_choices=()), "anchored-bias", {})
    with pytest.raises(BadData, match="at least two items"):
        edit_specimen(replace(plain, known_choices=choices(1)), "anchored-bias", {})
    with pytest.raises(TransectError, match="anchor='E' should be"):
        edit_specimen(plain, "anchored-bias", {"anchor": "E"})
    with pytest.raises(TransectError, match="beta"):
        edit_specimen(plain, "anchored-bias", {"beta": 2})
    with pytest.raises(NotApplicable, match="tokenizer"):
        edit_specimen(replace(plain, tokenizer=None), "anchored-bias", {})
    with pytest.raises(NotApplicable, match="does not know or not tell apart"):
        edit_specimen(replace(plain, known_choices=choices(4, letters=5)), "anchored-bias", {})


def test_nothing_to_take_out_is_said_and_undone():
    specimen = specimen_of()
    before = logits(specimen.model, inputs("llama"))
    with pytest.raises(NotApplicable, match="lower the threshold"):
        edit_specimen(specimen, "anchored-bias", {"threshold": 1e6})
    assert torch.equal(logits(specimen.model, inputs("llama")), before) and hooks(specimen.model) == 0
