"""Union of experts: a dense MLP and attention in pieces that add up, and what each position then runs of them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.anatomy.grouping import balanced
from transect.conversion.catalog.uoe.partition import fit_router, in_groups
from transect.conversion.experts import cuttable_mlp
from transect.conversion.inputs import inputs_of_modules
from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.softmax import Softmax
from transect.parts.catalog.uoe import UnionAttention, UnionMLP
from transect.parts.experts import Sent, SplitMLP, best_experts, by_expert, set_active
from transect.parts.rotary import rotated

from .models import VOCABULARY, assert_same_tensors, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
WIDTH, NEURONS, EXPERTS = 12, 24, 4


def converted(model, **settings):
    """Without training."""
    return transect.convert(model, "uoe", DATA, steps=0, **settings).model


def stream(*shape, seed=0):
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(causal=False, seed=0, **chosen):
    torch.manual_seed(seed)
    part = UnionMLP(WIDTH, NEURONS, causal, **{"experts": EXPERTS, "bias": True, "out_bias": True, **chosen}).double()
    if part.out_bias is not None:
        torch.nn.init.normal_(part.out_bias)
    return part.eval()


def dense(part, x):
    """The MLP whose neurons the part holds."""
    split = part.split
    up, gate, down = (one if one is None else one.flatten(0, 1) for one in (split.up, split.gate, split.down))
    up_bias, gate_bias = (one if one is None else one.flatten() for one in (split.up_bias, split.gate_bias))
    hidden = functional.linear(x, up, up_bias)
    act = split.function
    hidden = act(hidden) if gate is None else act(functional.linear(x, gate, gate_bias)) * hidden
    return hidden @ down + (0 if part.out_bias is None else part.out_bias)


def by_masks(part, x):
    """What the part gives, with every expert run for every position."""
    flat = x.flatten(0, -2)
    sent, y = part.sent(x), torch.zeros_like(flat)
    weights = torch.ones_like(flat[sent.positions, 0]) if sent.weights is None else sent.weights
    start = 0
    for number, size in enumerate(sent.sizes):
        mask = torch.zeros(len(flat), 1, dtype=flat.dtype)
        here = slice(start, start + size)
        mask[sent.positions[here], 0] = weights[here]
        y, start = y + mask * part.split.one(number, flat), start + size
    if part.out_bias is not None:
        y = y + part.out_bias
    return y.view(x.shape)


@settings(max_examples=25, deadline=None)
@given(
    gated=st.booleans(), bias=st.booleans(), out_bias=st.booleans(), active=st.integers(1, EXPERTS),
    function=st.sampled_from(["silu", "gelu", "relu2", "gelu_new"]), gates=st.sampled_from(["rank", "scaled"]),
    selection=st.sampled_from(["token", "expert", "sequence"]),
)  # fmt: skip
@torch.no_grad()
def test_what_is_gathered_is_what_masks_would_give_and_all_experts_are_the_dense_mlp(
    gated, bias, out_bias, active, function, gates, selection
):
    part = made(
        gated=gated, bias=bias, out_bias=out_bias, active=active, function=function, gates=gates, selection=selection
    )
    x = stream(2, 7)
    torch.testing.assert_close(part(x), by_masks(part, x), atol=1e-10, rtol=1e-8)
    part.active = EXPERTS
    if gates == "rank":
        torch.testing.assert_close(part(x), dense(part, x), atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(by_masks(part, x), dense(part, x), atol=1e-10, rtol=1e-8)
    torch.nn.init.zeros_(part.router.weight)  # even gates, as large as each other
    torch.nn.init.zeros_(part.router.bias)
    torch.testing.assert_close(part(x), dense(part, x), atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_both_ways_of_running_experts_are_one_function():
    torch.manual_seed(0)
    split = SplitMLP(WIDTH, 3, 4, "silu", True, True).double()
    x = stream(9)
    even = Sent(torch.tensor([0, 3, 6, 1, 3, 7, 0, 1, 8]), [3, 3, 3], torch.rand(9, dtype=torch.float64))
    uneven = Sent(torch.tensor([0, 1, 2, 3, 4, 5, 6, 2]), [7, 0, 1])
    for sent, most in ((even, 3), (uneven, 7)):
        numbers = torch.arange(3).repeat_interleave(torch.tensor(sent.sizes)).tolist()
        weights = [1.0] * len(numbers) if sent.weights is None else sent.weights.tolist()
        expected = torch.zeros_like(x)
        for number, position, weight in zip(numbers, sent.positions.tolist(), weights, strict=True):
            expected[position] += weight * split.one(number, x[position : position + 1])[0]
        torch.testing.assert_close(split(x, sent), expected)
        batched = split._batched(x, sent, most)
        torch.testing.assert_close(
            batched, torch.cat([split.one(n, x[at]) for n, at in enumerate(sent.positions.split(sent.sizes))])
        )


@torch.no_grad()
def test_experts_may_be_put_in_another_order_with_their_gates():
    part, other = made(active=2), made(active=2)
    order = torch.tensor([2, 0, 3, 1])
    for name in ("up", "gate", "down", "up_bias", "gate_bias"):
        getattr(other.split, name).copy_(getattr(part.split, name)[order])
    other.router.weight.copy_(part.router.weight[order])
    other.router.bias.copy_(part.router.bias[order])
    torch.testing.assert_close(other(stream(2, 7)), part(stream(2, 7)))


@torch.no_grad()
def test_a_position_that_no_expert_takes_gets_the_bias_alone():
    part = made(active=1, selection="expert")
    part.router.weight[1:] = part.router.weight[0]  # all take the same positions
    part.router.bias[:] = 0
    x = stream(1, 8)
    taken = set(part.sent(x).positions.tolist())
    assert len(taken) == 2
    y = part(x)[0]
    for position in range(8):
        assert torch.equal(y[position], part.out_bias) == (position not in taken)


@torch.no_grad()
@pytest.mark.parametrize(("count", "active", "each"), [(1, 1, 1), (2, 1, 1), (3, 2, 2), (3, 4, 3)])
def test_experts_of_fewer_positions_than_there_are_experts_take_at_least_one_each(count, active, each):
    part, x = made(active=active, selection="expert"), stream(2, count)
    assert part.sent(x).sizes == [2 * each] * EXPERTS
    torch.testing.assert_close(part(x), by_masks(part, x))


@torch.no_grad()
def test_experts_that_take_positions_look_ahead_and_positions_that_take_experts_do_not():
    x = stream(1, 12)
    other = x.clone()
    other[:, 9:] = stream(1, 3, seed=7) * 5
    assert torch.equal(made(causal=True, active=1)(other)[:, :9], made(causal=True, active=1)(x)[:, :9])
    for selection in ("expert", "sequence"):
        part, moved = made(active=1, selection=selection), []
        for number in range(EXPERTS):  # what is behind asks for this one
            other[:, 9:] = 20 * part.router.weight[number]
            moved.append(float((part(other)[:, :9] - part(x)[:, :9]).abs().max()))
        assert max(moved) > 1e-3
        with pytest.raises(TransectError, match="reads what is behind a position"):
            made(causal=True, selection=selection)
        with pytest.raises(TransectError, match="it is for models of images"):
            transect.convert(tiny("llama"), "uoe", DATA, selection=selection)


def test_the_gate_learns_from_the_loss_only_where_its_values_are_used():
    for gates, learns in (("rank", False), ("scaled", True)):
        part = made(gates=gates, active=2)
        part(stream(2, 7)).square().sum().backward()
        gradient = part.router.weight.grad
        assert (gradient is not None and float(gradient.abs().max()) > 1e-6) == learns
        assert float(part.split.up.grad.abs().max()) > 0


@torch.no_grad()
def test_the_factor_makes_up_for_those_that_are_left_out():
    plain, more = (made(active=1, gates="rank", out_bias=False, compensate=c) for c in (False, True))
    torch.testing.assert_close(more(stream(5)), EXPERTS * plain(stream(5)))


@torch.no_grad()
def test_only_what_is_chosen_is_computed():
    def counted(part, x):
        with FlopCounterMode(display=False) as counter:
            part(x)
        return counter.get_total_flops()

    x = stream(64)
    flops = {active: counted(made(active=active, gates="rank", bias=False), x) for active in (1, 2, 4)}
    gate = 2 * 64 * WIDTH * EXPERTS
    whole = 6 * 64 * WIDTH * NEURONS
    assert flops[4] == whole  # without the gate, which has nothing to say
    for active in (1, 2):
        exact = gate + whole * active / EXPERTS
        assert exact <= flops[active] <= gate + 1.25 * (exact - gate)  # padded a little, where that is faster
        assert made(active=active, gates="rank", bias=False).flops * 64 == exact


def attention(experts=2, active=1, causal=True, seed=0, **more):
    torch.manual_seed(seed)
    return UnionAttention(WIDTH, 4, 2, 6, causal, experts=experts, active=active, **more).double().eval()


def rotary(count):
    angles = torch.arange(count)[None, :, None] * torch.tensor([1.0, 0.3, 0.1]).repeat(2).double()
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_all_groups_of_heads_are_the_dense_attention(causal):
    part = attention(active=2, causal=causal, gates="rank", out_bias=True)
    torch.nn.init.normal_(part.out_bias)
    whole = Softmax(WIDTH, 4, 2, 6, causal, bias=True).double()
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(whole, name).weight.copy_(torch.cat([getattr(one, name).weight for one in part.experts]))
        getattr(whole, name).bias.zero_()
    whole.o_proj.weight.copy_(torch.cat([one.o_proj.weight for one in part.experts], dim=1))
    whole.o_proj.bias.copy_(part.out_bias)
    x, around = stream(2, 9), Around(rotary=rotary(9))
    torch.testing.assert_close(part(x, around), whole(x, around))


@torch.no_grad()
def test_a_group_of_heads_attends_among_its_own_positions_at_their_own_places():
    part, x = attention(), stream(1, 10)
    chosen, weights = best_experts(part.router(x), 1, True)
    expected = torch.zeros_like(x)
    cos, sin = rotary(10)
    for number, group in enumerate(part.experts):
        at = (chosen[0, :, 0] == number).nonzero()[:, 0]
        assert 1 < len(at) < 10
        expected[:, at] += group(x[:, at], Around(rotary=(cos[:, at], sin[:, at])), True)
    torch.testing.assert_close(part(x, Around(rotary=(cos, sin))), expected)
    torch.testing.assert_close(weights, torch.ones_like(weights))


def by_masked_attention(part, x, around):
    """What the attention gives, with every group's heads run over all positions and masks for those it does not get."""
    values, chosen = part.router(x).topk(part.active, dim=-1)
    weights = values.softmax(-1) * part.active if part.scaled else torch.ones_like(values)
    given = torch.zeros(*x.shape[:-1], len(part.experts), dtype=x.dtype).scatter(-1, chosen, weights)
    took = torch.zeros_like(given, dtype=torch.bool).scatter(-1, chosen, True) & around.real[..., None]
    count = x.shape[1]
    before = torch.ones(count, count, dtype=torch.bool).tril() if part.causal else torch.ones(count, count) > 0
    y = torch.zeros_like(x)
    for number, group in enumerate(part.experts):
        q, k, v = (
            one(x).unflatten(-1, (-1, group.head_size)).transpose(1, 2)
            for one in (group.q_proj, group.k_proj, group.v_proj)
        )
        q, k = rotated(q, around.rotary), rotated(k, around.rotary)
        scores = (q @ k.mT / group.head_size**0.5).masked_fill(~(took[:, None, None, :, number] & before), -1e30)
        added = group.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = y + added * (given[..., number] * took[..., number])[..., None]
    return y


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gates", ["scaled", "rank"])
def test_attention_in_two_of_four_groups_is_what_masks_would_give_and_so_is_the_gate_s_gradient(causal, gates):
    """Of texts of which each has another number of positions for a group, and one is padded."""
    torch.manual_seed(3)
    part = UnionAttention(WIDTH, 4, 4, 6, causal, experts=4, active=2, gates=gates).double()
    x, real = stream(3, 9), torch.ones(3, 9, dtype=torch.bool)
    real[1, 6:] = False
    around, upstream = Around(rotary=rotary(9), real=real), stream(3, 9, seed=1) * real[..., None]
    counts = (torch.zeros(3, 9, 4).scatter(-1, part.router(x).topk(2).indices, 1) * real[..., None]).sum(1)
    assert (counts.amax(0) > counts.amin(0)).any()
    found, gradients = [], []
    for one in (part, lambda x, around: by_masked_attention(part, x, around)):
        part.zero_grad()
        y = one(x, around)
        (y * upstream).sum().backward()
        found.append(y[real].detach())
        gradients.append({name: p.grad for name, p in part.named_parameters()})
    torch.testing.assert_close(*found)
    for name, gradient in gradients[0].items():
        if gates == "rank" and name.startswith("router"):
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, gradients[1][name])
            assert float(gradient.abs().max()) > 1e-8
    with torch.no_grad():  # groups in another order, with their gates
        other, order = copy.deepcopy(part), [2, 0, 3, 1]
        other.experts = torch.nn.ModuleList(part.experts[number] for number in order)
        torch.testing.assert_close(part(x, around), by_masked_attention(part, x, around))
        other.router.weight.copy_(part.router.weight[order])
        other.router.bias.copy_(part.router.bias[order])
        torch.testing.assert_close(other(x, around), part(x, around))


@torch.no_grad()
def test_attention_costs_the_square_of_its_own_positions():
    def counted(part, x):
        with FlopCounterMode(display=False) as counter:
            part(x, Around())
        return counter.get_total_flops()

    x = stream(1, 64)
    half, whole = attention(gates="rank"), attention(active=2, gates="rank")
    for part in (half, whole):
        part.router.weight.zero_()
    half.router.bias[:] = 0
    half.router.weight[0] = x[0, :32].sum(0)
    half.router.weight[1] = -half.router.weight[0]
    counts = [int((half.router(x)[0].argmax(-1) == number).sum()) for number in range(2)]
    router = 2 * 64 * WIDTH * 2
    pieces = [one - router for one in (counted(half, x), counted(whole, x))]
    projections = sum(2 * p.numel() for p in whole.experts[0].parameters())
    assert pieces[0] <= sum(count * projections + 4 * count**2 * 12 for count in counts)
    assert pieces[0] < 0.55 * pieces[1]


def test_parameters_are_those_of_the_model_and_a_gate():
    model = tiny("gpt2")
    before = sum(p.numel() for p in model.parameters())
    converted(model, groups=2)
    width = model.config.n_embd
    assert sum(p.numel() for p in model.parameters()) == before + 3 * (4 * width + 4) + 3 * (2 * width + 2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "qwen3", "cohere"])
def test_attention_cut_into_all_its_groups_is_the_model_as_it_was(name):
    model = converted(tiny(name), groups=2, active_groups=2, active=4, gates="rank")
    expected = logits(tiny(name), inputs(name))
    torch.testing.assert_close(
        logits(model, inputs(name)), expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["co-activation", "random", "order"])
def test_every_partition_is_one_and_gives_the_dense_model(kind):
    model = tiny("llama")
    block = Anatomy(model).blocks[0]
    x = inputs_of_modules(Anatomy(model), {0: model.model.layers[0].mlp}, [{"input_ids": DATA}], 4096)[0]
    assert x.shape == (8 * 16, 32)
    order = in_groups(cuttable_mlp(block), 4, kind, torch.Generator().manual_seed(0), x)
    assert order.sort().values.tolist() == list(range(48))
    assert (order.tolist() == list(range(48))) == (kind == "order")
    converted(model, partition=kind, active=4, gates="rank")
    torch.testing.assert_close(logits(model, {"input_ids": DATA}), logits(tiny("llama"), {"input_ids": DATA}))


def test_neurons_that_are_active_together_come_together():
    """Three kinds of inputs, each of which drives a third of the neurons."""
    model = tiny("llama")
    mlp = cuttable_mlp(Anatomy(model).blocks[0])
    kind = torch.arange(48) % 3
    directions = torch.eye(32)[:3] * 4
    mlp.gate.copy_(directions[kind])
    mlp.up.copy_(directions[kind])
    x = directions[torch.arange(30) % 3]
    order = in_groups(mlp, 3, "co-activation", torch.Generator().manual_seed(1), x)
    assert [len(set(kind[group].tolist())) for group in order.view(3, 16)] == [1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_shares_are_even_and_nobody_would_rather_change(groups, size, seed):
    scores = torch.randn(groups * size, groups, generator=torch.Generator().manual_seed(seed))
    group = balanced(scores, size)
    assert torch.bincount(group, minlength=groups).tolist() == [size] * groups
    worst = torch.stack([scores[group == number, number].min() for number in range(groups)])
    own = scores.gather(1, group[:, None])
    assert not bool(((scores > own) & (scores > worst)).any())


@torch.no_grad()
def test_a_gate_finds_a_linear_rule():
    x, rule = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)), torch.arange(18.0).view(3, 6).sin()
    router = torch.nn.Linear(6, 3)
    fit_router(router, x, x @ rule.T + 1.5, ridge=1e-9)
    torch.testing.assert_close(router.weight, rule, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(router.bias, torch.full((3,), 1.5), atol=1e-4, rtol=1e-4)


def test_inputs_are_read_of_real_positions_alone():
    mask = torch.ones_like(DATA)
    mask[:, :5] = 0
    other = DATA.masked_fill(mask == 0, 9)
    batches = [[{"input_ids": ids, "attention_mask": mask}] for ids in (DATA, other)]
    model = tiny("llama")
    one, two = (inputs_of_modules(Anatomy(model), {2: model.model.layers[2].mlp}, batch, 4096)[2] for batch in batches)
    assert len(one) == int(mask.sum())
    torch.testing.assert_close(one, two)


def test_more_experts_are_run_without_training_and_the_record_knows(tmp_path):
    model = converted(tiny("llama"), active=1, gates="rank")
    far = (logits(model, {"input_ids": DATA}) - logits(tiny("llama"), {"input_ids": DATA})).abs().max()
    set_active(model, 4)
    torch.testing.assert_close(logits(model, {"input_ids": DATA}), logits(tiny("llama"), {"input_ids": DATA}))
    assert far > 1e-2
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.model.layers[0].mlp.active == 4
    for wrong in (0, 5):
        with pytest.raises(TransectError, match="between 1 and 4 experts"):
            set_active(model, wrong)
    with pytest.raises(TransectError, match="no MLP of experts"):
        set_active(tiny("llama"), 2)


def test_generation_keeps_each_groups_own_positions():
    model = converted(tiny("llama"), groups=2)
    found = model(input_ids=DATA[:1], use_cache=True).past_key_values
    state = found.layers[0].state
    kept = [state[f"k{number}"].shape[2] for number in range(2) if f"k{number}" in state]
    assert sum(kept) == 16  # each position in one group


def test_training_brings_the_loss_down_again():
    found = transect.convert(tiny("llama"), "uoe", DATA, active=1, epochs=5, batch_size=4, lr=1e-2, held_out=0.25)
    stage = found.outcome["stages"][0]
    assert found.outcome["told"] == {} and stage["best"] < stage["before"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 5}, "48 neurons cannot be shared out evenly among 5 experts: choose experts such as 2, 3, 4, 6"),
        ({"active": 5}, "active=5 of 4 experts"), ({"groups": 3}, "2 heads of keys and values cannot"),
        ({"groups": 2, "active_groups": 3}, "3 of 2 groups of heads cannot be run"), ({"layers": "7"}, "blocks 0 to 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_any_change(options, message):
    model = tiny("llama")
    with pytest.raises(TransectError, match=message):
        converted(model, **options)
    assert_same_tensors(model, tiny("llama"))


def test_other_mlps_are_refused():
    small = transect.compress(tiny("llama"), "svd", keep=0.7)
    twice = converted(tiny("llama"))
    odd, mixture = tiny("llama"), tiny("mixtral")
    odd.model.layers[1].mlp.act_fn = torch.nn.PReLU()
    more = copy.deepcopy(tiny("llama"))
    more.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    for model, message in (
        (small, "convert first, and compress what comes out"), (twice, "a part stands there"),
        (odd, "PReLU, is none of silu"), (mixture, "no MLP in one module"), (more, "is more than its matrices"),
        (tiny("bert"), "no MLP in one module"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=message):
            transect.convert(model, "uoe", None)
    with pytest.raises(TransectError, match="pass data="):
        transect.convert(tiny("llama"), "uoe")
    transect.convert(tiny("llama"), "uoe", partition="order", router="random")  # which look at no text


def test_images_may_be_read_by_experts_that_choose():
    for selection in ("expert", "sequence"):
        model = transect.convert(
            tiny("vit"), "uoe", inputs("vit", batch=4), steps=0, selection=selection, active=1
        ).model
        assert model.vit.layers[0].mlp.selection == selection
        assert logits(model, inputs("vit")).isfinite().all()


def test_by_expert_sorts_choices():
    sent = by_expert(torch.tensor([[2, 0], [0, 1], [2, 1]]), torch.arange(6.0).view(3, 2), 4)
    assert sent.positions.tolist() == [0, 1, 1, 2, 0, 2] and sent.sizes == [2, 2, 2, 0]
    assert sent.weights.tolist() == [1, 2, 3, 5, 0, 4]
