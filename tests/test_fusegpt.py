"""FuseGPT: what its card demands, on tiny random models against brute force."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.compression.catalog.fusegpt.fusion import (
    FusedGroup,
    FusedMatrix,
    FusedVector,
    distance,
    lessons_of,
    train,
    window,
)
from transect.compression.catalog.fusegpt.macro_influence import macro_influence
from transect.errors import OutOfReach, TransectError
from transect.forward.blocks import feeds_of

from .models import CAUSAL, CONFIGS, VOCABULARY, assert_same_model, assert_same_tensors, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
ONE = [{"input_ids": DATA}]


def generator():
    return torch.Generator().manual_seed(0)


def deep(blocks=6, dtype=torch.float32, **changes):
    """A random Llama with that many blocks, each of which changes the residual stream a little."""
    config = copy.deepcopy(CONFIGS["llama"][0])
    config.update({"num_hidden_layers": blocks, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def batch_of(name, dtype=torch.float32):
    batch = inputs(name, batch=3, dtype=dtype)
    if name in ("bert", "roberta"):
        batch["labels"] = batch["input_ids"].clone()
    return batch


def last_hidden(model, batch, without=None):
    """What leaves the last block, read off the model itself, brute force."""
    model = copy.deepcopy(model)
    anatomy = Anatomy(model)
    if without is not None:
        anatomy.drop_block(without)
    seen = []
    if anatomy.final_norm is None:
        anatomy.block_list[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    else:
        anatomy.final_norm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    logits(model, batch)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def injected(group):
    """Give everything that is learned a random value."""
    draw = generator()
    with torch.no_grad():
        for tensor in [*group.coefficients, *group.repairs]:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype))


def group_of(model, removed, first, size, inject=True, rank=4):
    blocks = Anatomy(model).blocks
    receivers = [block for block in blocks[first : first + size] if block.index != removed]
    return FusedGroup(receivers, blocks[removed], rank, generator(), inject)


# Macro Influence


@pytest.mark.parametrize("name", list(CONFIGS))
def test_macro_influence_is_that_of_really_leaving_blocks_out(name):
    model, batch = tiny(name, dtype=torch.float64), batch_of(name, torch.float64)
    whole = last_hidden(model, batch)
    expected = [
        1 - functional.cosine_similarity(whole, last_hidden(model, batch, without=index), dim=-1).mean().item()
        for index in range(3)
    ]
    found = macro_influence(Anatomy(model), [batch])
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert (found >= 0).all() and (found <= 2).all() and found.max() > 1e-3
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(macro_influence(Anatomy(model), halves), found)


def test_a_block_that_adds_nothing_has_no_influence():
    model = tiny("llama", dtype=torch.float64)
    block = Anatomy(model).blocks[1]
    for matrix in (block.attention.o, block.mlp.down):
        matrix.write(torch.zeros(matrix.shape))
    found = macro_influence(Anatomy(model), ONE)
    assert found[1].abs() < 1e-12 and found[0] > 1e-3 and found[2] > 1e-3


def test_the_last_block_matters_as_much_as_it_turns_its_own_input():
    model = tiny("llama", dtype=torch.float64)
    seen = {}
    Anatomy(model).block_list[2].register_forward_hook(lambda m, args, out: seen.update(before=args[0], after=out))
    logits(model, ONE[0])
    own = 1 - functional.cosine_similarity(seen["before"], seen["after"], dim=-1).mean()
    torch.testing.assert_close(macro_influence(Anatomy(model), ONE)[2], own)


def test_padding_counts_neither_for_influence_nor_for_training():
    model = tiny("llama", dtype=torch.float64)
    short = {"input_ids": DATA[:1, :9], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    padded = {key: functional.pad(value, (0, 7)) for key, value in short.items()}
    plain = macro_influence(Anatomy(model), [{"input_ids": DATA[:1, :9]}])
    torch.testing.assert_close(macro_influence(Anatomy(model), [padded]), plain)
    losses = []
    for batch in (short, padded):
        anatomy = Anatomy(model)
        lessons = lessons_of(feeds_of(anatomy, [batch]), anatomy.blocks, 0, 1, 3)
        losses.append(train(group_of(model, 1, 0, 3), lessons, 2, "kl", 1e-2, 1e-3))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


# The group


@pytest.mark.parametrize("blocks", [2, 5, 12])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_window_contains_the_block_and_is_as_long_as_it_can_be(blocks, size):
    for removed in range(blocks):
        first, found = window(removed, blocks, size)
        assert found == min(size, blocks) and 0 <= first <= removed < first + found <= blocks
    assert window(6, 12, 8) == (2, 8)  # p - 4 ... p + 3
    assert window(0, 12, 8) == (0, 8) and window(11, 12, 8) == (4, 8)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("inject", [True, False])
def test_before_training_the_group_is_plain_removal(name, inject):
    model, batch = tiny(name, dtype=torch.float64), batch_of(name, torch.float64)
    anatomy = Anatomy(model)
    (feed,) = feeds_of(anatomy, [batch])
    (lesson,) = lessons_of([feed], anatomy.blocks, 0, 1, 3)
    torch.testing.assert_close(lesson.target, last_hidden(model, batch))
    output = group_of(model, 1, 0, 3, inject).run(lesson.hidden, lesson.calls)
    torch.testing.assert_close(output.detach(), last_hidden(model, batch, without=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_collapsed_group_is_the_group(name):
    model, batch = tiny(name), batch_of(name)
    anatomy = Anatomy(model)
    biases = {m.name: m.bias.clone() for m in anatomy.matrices() if m.bias is not None}
    (lesson,) = lessons_of(feeds_of(anatomy, [batch]), anatomy.blocks, 0, 0, 2)
    group = group_of(model, 0, 0, 2)
    injected(group)
    output = group.run(lesson.hidden, lesson.calls).detach()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    others = set(before) - {key for key in before if key.startswith(anatomy.blocks[1].path + ".")}
    anatomy.drop_block(0)
    group.collapse()
    (feed,) = feeds_of(anatomy, [batch])
    with torch.no_grad():
        made = anatomy.block_list[0](feed.hidden, *feed.calls[0][0], **feed.calls[0][1])
    torch.testing.assert_close(made[0] if isinstance(made, tuple) else made, output, rtol=1e-5, atol=1e-5)
    moved = [m for m in anatomy.blocks[0].matrices() if m.bias is not None]
    assert all((m.bias - biases[m.name.replace(".0.", ".1.")]).abs().max() > 1e-3 for m in moved)
    # Blocks outside the group, embeddings and head are as they were.
    start = anatomy._prefix + anatomy.architecture.blocks + "."
    after = model.state_dict()
    for key in others:
        renumbered = key
        if key.startswith(start):
            index, _, rest = key.removeprefix(start).partition(".")
            if index == "0":
                continue
            renumbered = f"{start}{int(index) - 1}.{rest}"
        assert torch.equal(after[renumbered], before[key]), key


def test_the_injected_path_is_exact():
    """With a mask of ones, W = 0, b = 0 and c = 1 a receiver computes what the removed block did."""
    model = tiny("gpt2", dtype=torch.float64)
    anatomy = Anatomy(model)
    (feed,) = feeds_of(anatomy, ONE)
    removed = anatomy.blocks[1]
    expected = removed.module(feed.hidden, *feed.calls[1][0], **feed.calls[1][1])
    group = group_of(model, 1, 0, 2)
    with torch.no_grad():
        for name, part in group.parts[0].items():
            if isinstance(part, FusedMatrix):
                p, q, _ = part.terms[0]
                part.weight.zero_()
                p.fill_(1 / p.shape[1])
                q.fill_(1)
            elif part.terms:
                part.own.zero_()
                part.terms[0][0].fill_(1)
            else:
                part.own.copy_(dict(removed.module.named_parameters())[name])  # norms are not injected
    output = group.run(feed.hidden, feed.calls[:1])
    torch.testing.assert_close(output, expected[0] if isinstance(expected, tuple) else expected)


def test_effective_weights_by_definition():
    draw = generator()
    weight, *removed = (torch.randn(7, 5, generator=draw).double() for _ in range(3))
    matrix, vector = FusedMatrix(weight, 3, draw), FusedVector(weight[:, 0])
    assert matrix.coefficients == [] and vector.coefficients == []
    for one in removed:
        matrix.receive(one)
        vector.receive(one[:, 0])
    torch.testing.assert_close(matrix.effective(), weight)
    (p1, q1, _), (p2, q2, _) = matrix.terms
    (c1, _), (c2, _) = vector.terms
    assert p1.shape == (7, 3) and q1.shape == (3, 5)
    assert q1.abs().max() <= 5**-0.5 and matrix.a.abs().max() <= 5**-0.5 and not torch.equal(q1, matrix.a)
    assert FusedMatrix(weight, 100, draw).a.shape == (5, 5)
    for tensor in (matrix.b, p1, p2, c1, c2):
        tensor.data += torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
    expected = weight + matrix.b @ matrix.a + (p1 @ q1) * removed[0] + (p2 @ q2) * removed[1]
    torch.testing.assert_close(matrix.effective(), expected)
    torch.testing.assert_close(vector.effective(), weight[:, 0] + c1 * removed[0][:, 0] + c2 * removed[1][:, 0])
    assert len(matrix.coefficients) == 4 and len(vector.coefficients) == 2


# Training


def test_distances_by_definition_and_independent_of_batching():
    draw = generator()
    student, target = (torch.randn(3, 4, 6, generator=draw).double() for _ in range(2))
    p, q = target.softmax(-1), student.softmax(-1)
    whole = distance(student, target, None, "kl")
    torch.testing.assert_close(whole, (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(distance(student, target, None, "mse"), (student - target).square().mean())
    parts = [distance(student[i : i + 1], target[i : i + 1], None, "kl") for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    mask = torch.tensor([[True, True, False, False]] * 3)
    torch.testing.assert_close(
        distance(student, target, mask, "kl"), distance(student[:, :2], target[:, :2], None, "kl")
    )
    assert distance(target, target, None, "kl").abs() < 1e-12


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_training_lowers_the_error_epoch_by_epoch_also_on_held_out_text(loss):
    model = deep(4)
    anatomy = Anatomy(model)
    draw = torch.Generator().manual_seed(3)
    texts = [{"input_ids": torch.randint(3, VOCABULARY, (16, 16), generator=draw)} for _ in range(5)]
    lessons = lessons_of(feeds_of(anatomy, texts), anatomy.blocks, 0, 1, 4)
    held_out = lessons.pop()

    def error():
        with torch.no_grad():
            return distance(group.run(held_out.hidden, held_out.calls), held_out.target, None, loss).item()

    group = group_of(model, 1, 0, 4)
    outside = [error()]
    inside = train(group, lessons, 4, loss, 1e-2, 1e-3, on_epoch=lambda value: outside.append(error()))
    assert inside == sorted(inside, reverse=True) and outside == sorted(outside, reverse=True)
    assert inside[-1] < 0.95 * inside[0] and outside[-1] < 0.95 * outside[0]


def test_only_what_is_learned_gets_gradients_and_the_model_is_untouched():
    model = tiny("llama")
    anatomy = Anatomy(model)
    before = copy.deepcopy(model.state_dict())
    lessons = lessons_of(feeds_of(anatomy, ONE), anatomy.blocks, 0, 1, 3)
    group = group_of(model, 1, 0, 3)
    start = [tensor.detach().clone() for tensor in [*group.coefficients, *group.repairs]]
    train(group, lessons, 2, "kl", 1e-3, 1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moved = [*group.coefficients, *group.repairs]
    assert all(not torch.equal(new, old) for new, old in zip(moved, start, strict=True))


def test_a_rate_that_diverges_is_an_error():
    model = tiny("llama")
    lessons = lessons_of(feeds_of(Anatomy(model), ONE), Anatomy(model).blocks, 0, 1, 3)
    with pytest.raises(TransectError, match=r"diverged.*fusion_rate=1e\+30"):
        train(group_of(model, 1, 0, 3), lessons, 3, "mse", 1e30, 1.0)


# The method


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_loses_a_block_within_the_budget_and_loads_as_a_plain_model(name, tmp_path):
    dense, batch = tiny(name), batch_of(name)
    whole = Anatomy(dense).matrix_bytes()
    model, removal = copy.deepcopy(dense), copy.deepcopy(dense)
    data = [batch] if name in ("vit", "deit", "bert", "roberta") else DATA
    transect.compress(model, "fusegpt", 0.7, data, epochs=2, group=3)
    transect.compress(removal, "fusegpt", 0.7, data, epochs=0)
    anatomy = Anatomy(model)
    assert len(anatomy.blocks) == 2 and anatomy.matrix_bytes() <= 0.7 * whole and not anatomy.record
    assert not torch.equal(logits(model, batch), logits(removal, batch))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_transect.py").exists()
    loaded = CONFIGS[name][1].from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == 2
    assert_same_model(loaded, model, batch)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_cache_is_renumbered(name):
    model = tiny(name, dtype=torch.float64)
    transect.compress(model, "fusegpt", 0.7, DATA, epochs=1)
    with torch.no_grad():
        whole = model(DATA[:2], use_cache=False).logits
        cached = model(DATA[:2, :9], use_cache=True)
        steps = [cached.logits]
        for position in range(9, 16):
            cached = model(DATA[:2, position : position + 1], past_key_values=cached.past_key_values, use_cache=True)
            steps.append(cached.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)  # Gemma's norms are in float32


def test_blocks_go_one_by_one_by_influence_measured_anew():
    dense = deep(6)
    order, plain = [], copy.deepcopy(dense)
    for _ in range(3):
        anatomy = Anatomy(plain)
        worst = int(macro_influence(anatomy, ONE).argmin())
        order.append(worst)
        anatomy.drop_block(worst)
    model = transect.compress(copy.deepcopy(dense), "fusegpt", 0.5, DATA, epochs=0, batch_size=12)
    assert len(Anatomy(model).blocks) == 3
    assert_same_model(model, plain, ONE[0])


@pytest.mark.parametrize("choice", ["once", "cosine"])
def test_blocks_by_the_dense_models_ranking(choice):
    dense = deep(6)
    if choice == "once":
        scores = macro_influence(Anatomy(dense), ONE)
    else:
        states = dense(DATA, output_hidden_states=True).hidden_states[:-1] + (last_hidden(dense, ONE[0]),)
        pairs = itertools.pairwise(states)
        scores = 1 - torch.stack([functional.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs])
    plain = copy.deepcopy(dense)
    for index in sorted(scores.argsort()[:2].tolist(), reverse=True):
        Anatomy(plain).drop_block(index)
    model = transect.compress(copy.deepcopy(dense), "fusegpt", 1.0, DATA, drop=2, epochs=0, choice=choice)
    assert_same_model(model, plain, ONE[0])


def test_blocks_far_from_the_removed_one_are_untouched():
    dense = deep(6)
    removed = int(macro_influence(Anatomy(dense), ONE).argmin())
    model = transect.compress(copy.deepcopy(dense), "fusegpt", 1.0, DATA, drop=1, group=3, epochs=2, batch_size=12)
    first, size = window(removed, 6, 3)
    survivors = [index for index in range(6) if index != removed]
    for now, index in enumerate(survivors):
        old, new = Anatomy(dense).blocks[index], Anatomy(model).blocks[now]
        same = all(
            torch.equal(a, b) for a, b in zip(old.module.parameters(), new.module.parameters(), strict=True)
        )  # fmt: skip
        assert same == (not first <= index < first + size)
    outside = [(n, p) for n, p in dense.named_parameters() if ".layers." not in n]
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in outside)


def removals(dense, **settings):
    """For each removal, its donor's weights then, its group, what that learns, and its start; and the model left."""
    found, make = [], FusedGroup.__init__

    def noting(self, receivers, removed, *more):
        make(self, receivers, removed, *more)
        learned = [*self.coefficients, *self.repairs]
        start = [tensor.detach().clone() for tensor in learned]
        found.append((copy.deepcopy(removed.module.state_dict()), self, learned, start))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedGroup, "__init__", noting)
        model = transect.compress(copy.deepcopy(dense), "fusegpt", 0.5, DATA, epochs=1, fusion_rate=1e-2, **settings)
    assert len(found) == 2 and len(Anatomy(model).blocks) == 2
    return found, model


@pytest.mark.parametrize("collapse", ["last", "every"])
def test_a_receiver_passes_on_what_it_received(collapse):
    """The second removed block's weights hold what it had learned from the first."""
    dense = deep(4)
    found, _ = removals(dense, collapse=collapse)
    donor = found[1][0]
    untouched = [block.module.state_dict() for block in Anatomy(dense).blocks]
    assert not any(all(torch.equal(donor[key], old[key]) for key in donor) for old in untouched)


def test_earlier_terms_go_on_learning_and_are_collapsed_in_the_end():
    dense = deep(4)
    found, model = removals(dense)
    (first_donor, _, first, _), (second_donor, group, second, start) = found
    survivors = {id(tensor) for tensor in second}
    earlier = [index for index, tensor in enumerate(second) if any(tensor is old for old in first)]
    # Two of the three receivers are left; what they learned is learned on, from where it was.
    assert len(earlier) == len([tensor for tensor in first if id(tensor) in survivors]) > 0
    assert all(not torch.equal(second[index], start[index]) for index in earlier)
    dense_state = [block.module.state_dict() for block in Anatomy(dense).blocks]
    for block, parts in zip(Anatomy(model).blocks, group.parts, strict=True):
        name, part = next((name, part) for name, part in parts.items() if isinstance(part, FusedMatrix))
        assert any(torch.equal(part.weight, state[name]) for state in dense_state)  # the base is the dense model's own
        pairs = zip(part.terms, (first_donor, second_donor), strict=True)
        assert all(torch.equal(term[2], donor[name]) for term, donor in pairs)
        expected = part.weight + part.b @ part.a + sum((p @ q) * removed for p, q, removed in part.terms)
        torch.testing.assert_close(block.module.get_parameter(name), expected)


def test_collapsing_after_every_removal_starts_anew():
    dense = deep(4)
    (first, second), model = removals(dense, collapse="every")
    assert not any(tensor is old for tensor in second[2] for old in first[2])
    assert all(len(part.terms) == 1 for part in second[1].parts[0].values() if isinstance(part, FusedMatrix))
    assert not torch.equal(logits(model, ONE[0]), logits(removals(dense)[1], ONE[0]))


def test_keeping_all_changes_nothing_and_settings_change_something():
    dense = tiny("llama")
    before = logits(dense, ONE[0])
    assert torch.equal(logits(transect.compress(copy.deepcopy(dense), "fusegpt", 1.0, DATA), ONE[0]), before)
    results = []
    quick = {"epochs": 1, "fusion_rate": 1e-2}
    for change in ({}, {"inject": False}, {"loss": "mse"}, {"rank": 1}, {"group": 2}, {"training_sequences": 3}):
        model = transect.compress(copy.deepcopy(dense), "fusegpt", 0.7, DATA, **(quick | change))
        results.append(logits(model, ONE[0]))
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_it_is_reproducible_and_leaves_the_training_flag_and_global_seed():
    models = [tiny("llama").train() for _ in range(2)]
    for model in models:
        torch.manual_seed(9)
        transect.compress(model, "fusegpt", 0.7, DATA, epochs=1)
        assert model.training and torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(9)))
    assert_same_tensors(*models)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = transect.compress(tiny("llama", dtype=dtype), "fusegpt", 0.7, DATA, epochs=2, fusion_rate=1e-2)
    plain = transect.compress(tiny("llama", dtype=dtype), "fusegpt", 0.7, DATA, epochs=0)
    assert model.dtype == dtype and torch.isfinite(logits(model, ONE[0])).all()
    assert not torch.equal(logits(model, ONE[0]), logits(plain, ONE[0]))


def test_a_share_that_is_not_exact_costs_no_block():
    assert len(Anatomy(transect.compress(tiny("llama"), "fusegpt", 2 / 3, DATA, epochs=0)).blocks) == 2


def test_progress_is_shown():
    shown = []

    def progress(items, label):
        shown.append(label)
        return items

    transect.compress(tiny("llama"), "fusegpt", 0.7, DATA, epochs=1, progress=progress)
    assert any("influence" in label for label in shown) and any("fusing block" in label for label in shown)


# Refusals


@pytest.mark.parametrize(
    ("keep", "settings", "kind", "message"),
    [
        (0.3, {}, OutOfReach, "less than one of the 3 blocks"), (1.0, {"drop": 3}, TransectError, "leave no block"),
        (0.5, {"drop": 1}, TransectError, "more than keep=0.5"), (0.7, {"group": 1}, TransectError, "group=1"),
        (0.7, {"loss": "cosine"}, TransectError, "one of"), (0.7, {"epochs": -1}, TransectError, "epochs=-1"),
    ],
)  # fmt: skip
def test_what_is_refused_before_any_work(keep, settings, kind, message, monkeypatch):
    monkeypatch.setattr("transect.compression.compress.calibrate", lambda *a, **k: pytest.fail("worked"))
    with pytest.raises(kind, match=message):
        transect.compress(tiny("llama"), "fusegpt", keep, DATA, **settings)


def test_models_that_cannot_be_fused_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("transect.compression.compress.calibrate", lambda *a, **k: pytest.fail("worked"))
    narrow = tiny("llama")
    Anatomy(narrow).blocks[1].mlp.keep(range(20))
    with pytest.raises(TransectError, match=r"one shape.*mlp.*block 1"):
        transect.compress(narrow, "fusegpt", 0.7, DATA)
    factored = transect.compress(tiny("llama"), "svd", 0.7)
    with pytest.raises(TransectError, match="LowRank"):
        transect.compress(factored, "fusegpt", 0.7, DATA)
    scaled = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["gpt2"][0]))
    scaled.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(TransectError, match="place enters what it computes"):
        transect.compress(scaled, "fusegpt", 0.7, DATA)
    with pytest.raises(TransectError, match="data="):
        transect.compress(tiny("llama"), "fusegpt", 0.7)


def test_plain_removal_takes_blocks_of_any_structure():
    model = tiny("llama")
    Anatomy(model).blocks[1].mlp.keep(range(20))
    whole = Anatomy(model).matrix_bytes()
    transect.compress(model, "fusegpt", 0.7, DATA, epochs=0)
    assert Anatomy(model).matrix_bytes() <= 0.7 * whole and torch.isfinite(logits(model, ONE[0])).all()
