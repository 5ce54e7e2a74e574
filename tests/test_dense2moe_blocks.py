"""Mixture of blocks: which of a group run, by what, and what is then neither computed nor cached nor trained."""

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

import transect
from transect.anatomy import Anatomy
from transect.conversion.catalog.dense2moe.blocks import block_groups, follow_groups, influence
from transect.conversion.catalog.dense2moe.follow import follow
from transect.conversion.registry import Calibration
from transect.conversion.routed import parts_around
from transect.data import load
from transect.errors import TransectError
from transect.evaluation import operations_of
from transect.parts import insert
from transect.parts.catalog.dense2moe_blocks import BlockRouter, Dense2MoEBlocks

from .models import assert_same_tensors, tiny

TOKENS = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(3))
PROMPT = 5


def routed(active=1, layers=(0, 1, 2), seed=0):
    """A tiny model with a group of three whose texts choose differently."""
    model = tiny("llama")
    insert(model, "block", "dense2moe-blocks", layers=list(layers), settings={"prompt": PROMPT, "active": active})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bank = parts_of(model)[0].bank
        bank.weight.copy_(torch.randn(bank.weight.shape, generator=generator) * 30)
    return model


def parts_of(model):
    return list(parts_around(Anatomy(model), Dense2MoEBlocks).values())


def chosen_by(model, tokens=TOKENS):
    with torch.no_grad():
        model(tokens)
    return parts_of(model)[0].bank.chosen


@pytest.mark.parametrize("active", [1, 2, 3])
@torch.no_grad()
def test_the_window_of_the_largest_sum_of_scores_runs(active):
    torch.manual_seed(1)
    router = BlockRouter(7, 4, active)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias)
    h = torch.randn(30, 7)
    router.choose(h)
    scores = h @ router.weight.T + router.bias
    sums = torch.stack([scores[:, at : at + active].sum(1) for at in range(5 - active)], dim=1)
    torch.testing.assert_close(router.probabilities, sums.softmax(-1))
    runs = torch.stack([router.runs(place)[0] for place in range(4)], dim=1)
    assert (runs.sum(1) == active).all()
    for row, best in zip(runs, sums.argmax(1).tolist(), strict=True):
        assert row[best : best + active].all()


@torch.no_grad()
def test_behind_the_beginning_it_is_the_model_of_the_chosen_blocks():
    """Against the layers of the model run by hand: all of them on the beginning, and one of them on what follows."""
    model, dense = routed(), tiny("llama")
    chosen, found = chosen_by(model), model(TOKENS).logits
    assert len(set(chosen.tolist())) > 1
    h = dense.get_input_embeddings()(TOKENS)[:, :PROMPT]
    mean = functional.normalize(h, dim=-1).mean(1)
    assert torch.equal((mean @ parts_of(model)[0].bank.weight.T).argmax(1), chosen)
    torch.testing.assert_close(found[:, :PROMPT], dense(TOKENS).logits[:, :PROMPT])
    layers = dense.model.layers
    for row in range(8):
        x = dense.get_input_embeddings()(TOKENS[row : row + 1])
        rotary = dense.model.rotary_emb(x, torch.arange(16)[None])
        for number, layer in enumerate(layers):
            y = layer(x, position_embeddings=rotary)
            y = y[0] if isinstance(y, tuple) else y
            x = y if number == chosen[row] else torch.cat([y[:, :PROMPT], x[:, PROMPT:]], dim=1)
        expected = dense.lm_head(dense.model.norm(x))
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_behind_the_beginning_decides_nothing_and_padding_neither():
    model = routed()
    chosen, whole = chosen_by(model), model(TOKENS).logits
    other = TOKENS.clone()
    other[:, PROMPT:] = 7
    assert torch.equal(chosen_by(model, other), chosen)
    torch.testing.assert_close(model(TOKENS[:, :PROMPT]).logits, tiny("llama")(TOKENS[:, :PROMPT]).logits)
    padded = torch.cat([torch.zeros(8, 3, dtype=torch.long), TOKENS], dim=1)
    mask = (torch.arange(19) >= 3).long().expand(8, -1)
    positions = (torch.arange(19) - 3).clamp_min(0).expand(8, -1)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [2, 5, 9])
@torch.no_grad()
def test_token_by_token_is_all_at_once_and_only_what_runs_is_cached(first):
    model = routed(active=2)
    cache, chosen, whole = DynamicCache(config=model.config), chosen_by(model), model(TOKENS, use_cache=False).logits
    pieces = [model(piece, past_key_values=cache).logits for piece in TOKENS.split([first, 1, 4, 1, 10 - first], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
    for place in range(3):
        runs = (chosen <= place) & (place < chosen + 2)
        assert ((cache.layers[place].places >= 0).sum(1) == 16 * runs).all()


@torch.no_grad()
def test_skipping_is_real():
    whole, one = operations_of(tiny("llama"), 30), operations_of(routed(), 30)
    blocks = sum(p.numel() for p in Anatomy(tiny("llama")).blocks[0].module.parameters())
    assert one.active_parameters == whole.active_parameters - 2 * blocks  # the router is behind it
    assert one.flops < whole.flops - 2 * 2 * blocks * 0.7  # 25 of 30 positions skip two blocks of three


def test_blocks_that_are_passed_by_have_no_gradient_and_the_router_has():
    model = routed()
    expected = model(TOKENS).logits
    parts = parts_of(model)
    for part in parts:
        part.train()
    output = model(TOKENS, labels=TOKENS)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    # Behind the beginning alone: the first positions run all blocks.
    logits, choices = output.logits[:, PROMPT:], parts[0].bank.chosen.tolist()
    assert {chosen < 2 for chosen in choices} == {True, False}
    for chosen in set(choices):
        model.zero_grad()
        row = choices.index(chosen)
        functional.cross_entropy(logits[row], TOKENS[row, PROMPT:]).backward(retain_graph=True)
        gradients = [block.mlp.down.module.weight.grad for block in Anatomy(model).blocks]
        reached = [gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients]
        assert reached[chosen] and parts[0].bank.weight.grad.norm() > 0
        assert not any(reached[chosen + 1 :])  # those before feed keys of the beginning
    assert 1 <= parts[0].__dict__["auxiliary"].item() <= 3 and parts[1].__dict__.get("auxiliary") is None


@pytest.mark.parametrize(("options", "groups"), [({"layers": "0-1"}, 1), ({"blocks": 1}, 3), ({"blocks": 3}, 1)])
def test_a_group_adds_a_score_for_each_of_its_blocks(options, groups):
    model = tiny("llama")
    before = sum(p.numel() for p in model.parameters())
    model = transect.convert(model, "dense2moe-blocks", TOKENS, steps=0, prompt=PROMPT, **options).model
    blocks = options.get("blocks", 2)
    assert sum(p.numel() for p in model.parameters()) == before + groups * blocks * (model.config.hidden_size + 1)


@torch.no_grad()
def test_routers_begin_with_the_block_that_changes_the_stream_most():
    model = tiny("llama")
    anatomy, data = Anatomy(model), load(TOKENS, model)
    changed = influence(anatomy, Calibration(data))
    states = tiny("llama")(TOKENS, output_hidden_states=True).hidden_states
    expected = 1 - torch.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert changed[0] == pytest.approx(float(expected), abs=1e-5)
    model = transect.convert(model, "dense2moe-blocks", TOKENS, steps=0, prompt=PROMPT, layers="0-1").model
    assert set(chosen_by(model).tolist()) == {int(changed[1] > changed[0])}


def test_groups_and_the_stream_behind_each_of_them_is_followed():
    anatomy = Anatomy(tiny("llama"))
    assert block_groups(anatomy, 2, "") == [[0, 1]] and block_groups(anatomy, 1, "0,2") == [[0], [2]]
    model, teacher, batch = routed(layers=(0, 1)), tiny("llama"), {"input_ids": TOKENS}
    loss, count = follow_groups(model, teacher, batch)
    assert float(loss) == pytest.approx(float(follow(model, teacher, batch, [1])[0])) and count == 8 * 15
    assert float(loss) < float(follow(model, teacher, batch)[0])
    losses = []
    options = dict(prompt=PROMPT, epochs=6, every=1, batch_size=4, lr=1e-2, held_out=0.25)
    model = transect.convert(
        tiny("llama"), "dense2moe-blocks", TOKENS, on_check=lambda one: losses.append(one.loss), **options
    ).model
    assert losses[-1] < 0.9 * losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 3}, "active=3 of 2 blocks"), ({"blocks": 4, "active": 1}, "3 blocks are fewer than a group of 4"),
        ({"layers": "0,2"}, "0, 2 do not follow one another"), ({"layers": "0-2"}, "no groups of 2"),
        ({"prompt": 16}, "longest sequence has 16"), ({"active": 0}, "active"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_any_change(options, message):
    model = tiny("llama")
    with pytest.raises(TransectError, match=message):
        transect.convert(model, "dense2moe-blocks", TOKENS, steps=0, **options)
    assert_same_tensors(model, tiny("llama"))
