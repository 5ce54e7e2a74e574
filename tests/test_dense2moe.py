"""Dense2MoE: a shared expert and many small ones out of a dense MLP, and the two stages that train them."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.conversion import Plan, convert_anatomy
from transect.conversion.catalog.dense2moe import neuron_importance
from transect.conversion.catalog.dense2moe.follow import follow
from transect.conversion.experts import cuttable_mlp
from transect.conversion.registry import Calibration, conversion_named
from transect.data import load
from transect.errors import TransectError
from transect.forward import summed_loss
from transect.parts.catalog.dense2moe import Dense2MoE
from transect.parts.experts import balance, set_active

from .models import VOCABULARY, assert_same_tensors, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
IDS = {"input_ids": DATA}
WIDTH, NEURONS = 12, 32


def converted(model, **settings):
    """Without training."""
    return transect.convert(model, "dense2moe", DATA, steps=0, **settings).model


def stream(*shape, seed=0):
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(**chosen):
    torch.manual_seed(0)
    part = Dense2MoE(WIDTH, NEURONS, **{"experts": 6, "out_bias": True, "bias": True, **chosen}).double().eval()
    if part.out_bias is not None:
        torch.nn.init.normal_(part.out_bias)
    return part


@settings(max_examples=20, deadline=None)
@given(
    st.booleans(), st.booleans(), st.integers(0, 6), st.sampled_from(["silu", "gelu", "relu"]),
    st.sampled_from(["scaled", "softmax", "one"]), st.booleans(),
)  # fmt: skip
@torch.no_grad()
def test_it_is_the_shared_expert_and_the_chosen_ones_with_their_gates(gated, bias, active, function, gates, training):
    part = made(gated=gated, bias=bias, active=active, function=function, gates=gates).train(training)
    x = stream(2, 7)
    flat = x.flatten(0, 1)
    g = part.router(flat).softmax(-1)
    kept = g >= g.sort(dim=-1, descending=True).values[:, active - 1 : active] if active else torch.zeros_like(g) > 0
    weight = {"scaled": 6 * g, "softmax": g, "one": torch.ones_like(g)}[gates] * kept
    each = torch.stack([part.split.one(number, flat) for number in range(6)], dim=1)
    expected = part.shared.one(0, flat) + (weight[..., None] * each).sum(1) + part.out_bias
    torch.testing.assert_close(part(x), expected.view(x.shape), atol=1e-10, rtol=1e-8)
    assert (part.auxiliary is not None) == (training and active > 0)


def test_balance_is_1_where_all_are_used_alike_and_n_where_one_is():
    even = torch.full((6, 3), 1 / 3)
    assert float(balance(even, torch.arange(6)[:, None] % 3)) == pytest.approx(1)
    assert float(balance(torch.eye(3)[[1] * 6], torch.ones(6, 1, dtype=torch.long))) == pytest.approx(3)
    scores = torch.randn(50, 4, requires_grad=True)
    balance(scores.softmax(-1), scores.topk(2).indices).backward()
    assert float(scores.grad.abs().max()) > 0


@torch.no_grad()
def test_only_what_is_chosen_is_computed():
    x = stream(96)
    for active in (0, 2):
        part = made(active=active, bias=False, out_bias=False)
        with FlopCounterMode(display=False) as counter:
            part(x)
        units, router = 8 + active * 4, 2 * WIDTH * 6 * bool(active)
        assert part.flops == 6 * WIDTH * units + router
        assert 96 * part.flops <= counter.get_total_flops() <= 96 * (part.flops + 0.25 * 6 * WIDTH * active * 4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_every_neuron_is_somewhere_once_and_nothing_is_stored_but_gates(name):
    model = tiny(name)
    before = sum(p.numel() for p in model.parameters())
    mlp = cuttable_mlp(Anatomy(model).blocks[1])
    rows = {tuple(row.tolist()) for row in mlp.up}
    columns = {tuple(row.tolist()) for row in mlp.down.T}
    converted(model)
    part = Anatomy(model).blocks[1].part("mlp")
    shared = mlp.neurons // 4
    assert part.shared.up.shape[:2] == (1, shared)
    assert part.split.up.shape[:2] == (12, (mlp.neurons - shared) // 12)
    for role, stored in (("up", rows), ("down", columns)):
        held = torch.cat([getattr(one, role).flatten(0, 1) for one in (part.shared, part.split)])
        assert len(held) == mlp.neurons and {tuple(row.tolist()) for row in held} == stored
    width = held.shape[1]
    assert sum(p.numel() for p in model.parameters()) == before + 3 * 12 * width


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_importance_is_gradient_times_weight_of_rows_and_column(name):
    """Against gradients taken by hand on the matrices, and a neuron whose column is zero has none."""
    model = tiny(name)
    mlp = Anatomy(model).blocks[1].mlp
    down = mlp.down.weight.clone()
    down[:, 3] = 0
    mlp.down.write(down)
    mlp.up.module.weight.requires_grad_(False)
    batches = [{"input_ids": part} for part in DATA.split(4)]
    before = copy.deepcopy(model.state_dict())
    found = neuron_importance(Anatomy(model), [1], batches)[1]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not mlp.up.module.weight.requires_grad
    model.requires_grad_(True)
    sum(summed_loss(model(b).logits[:, :-1].flatten(0, 1), b[:, 1:].flatten()) for b in DATA.split(4)).backward()
    conv1d = name == "gpt2"
    expected = torch.zeros(mlp.neurons)
    for matrix in (one for one in (mlp.gate, mlp.up, mlp.down) if one is not None):
        rows, gradient = matrix.rows(), matrix.module.weight.grad
        gradient = gradient.T if conv1d else gradient
        product = matrix.weight * (gradient if rows is None else gradient[rows])
        expected += product.abs().sum(0 if matrix.role == "down" else 1)
    torch.testing.assert_close(found, expected)
    assert float(found[3]) == 0 < float(found[:3].min())


@torch.no_grad()
def test_error_falls_with_the_number_of_experts_and_the_most_important_neurons_are_shared():
    model = tiny("llama")
    dense = cuttable_mlp(Anatomy(model).blocks[0])
    importance = neuron_importance(Anatomy(model), [0], [IDS])[0]
    model = converted(model, gates="one", active=1)
    part = Anatomy(model).blocks[0].part("mlp")
    shared = importance.topk(12).indices
    assert {tuple(row.tolist()) for row in part.shared.up[0]} == {tuple(row.tolist()) for row in dense.up[shared]}
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    errors = []
    for active in range(13):
        part.active = active
        errors.append(float((part(x) - dense(x)).square().sum()))
    assert errors[-1] < 1e-8 * errors[0]
    assert all(more < fewer for fewer, more in pairwise(errors))


@torch.no_grad()
def test_what_is_not_shared_is_dealt_out_from_the_most_to_the_least_important():
    model = tiny("llama")
    dense = cuttable_mlp(Anatomy(model).blocks[0])
    order = neuron_importance(Anatomy(model), [0], [IDS])[0].argsort(descending=True)[12:]  # of 48
    entry = conversion_named("dense2moe")
    entry.function(Anatomy(model), Calibration(load(DATA, model)), **entry.settings({"experts": 4, "layers": "0"}))
    part = Anatomy(model).blocks[0].part("mlp")
    for number in range(4):  # each gets one of every four
        assert torch.equal(part.split.up[number], dense.up[order[number::4]])
        assert torch.equal(part.split.down[number], dense.down[:, order[number::4]].T)


@torch.no_grad()
def test_what_is_followed_is_the_predictions_and_the_stream_behind_each_block():
    """KL(T || S) over predictions, and Σ_l ||T_l - S_l||² / mean ||T_l||², by hand; of real positions alone."""
    teacher, student = tiny("llama"), converted(tiny("llama"))
    mask = torch.ones_like(DATA)
    mask[:3, 12:] = 0
    seen = {}
    for key, model in (("teacher", teacher), ("student", student)):
        streams = seen.setdefault(key, [])
        hooks = [
            layer.register_forward_hook(lambda _, given, y, kept=streams: kept.append(y[0] if type(y) is tuple else y))
            for layer in model.model.layers
        ]
        streams.insert(0, model(DATA, attention_mask=mask).logits.log_softmax(-1))
        for hook in hooks:
            hook.remove()
    (theirs, *their_streams), (ours, *our_streams) = seen["teacher"], seen["student"]
    predicts = (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)[:, :-1][predicts].sum()
    apart, real = 0.0, mask > 0
    for target, found in zip(their_streams, our_streams, strict=True):
        squares = (target - found).square().sum(-1)[real]
        apart += float(squares.mean() / target.square().sum(-1)[real].mean())
    loss, count = follow(student, teacher, {"input_ids": DATA, "attention_mask": mask})
    assert count == int(predicts.sum()) and apart > 1e-3
    assert float(loss) == pytest.approx(float(divergence) + count * apart, rel=1e-4)


def test_the_shared_expert_is_trained_first_and_then_stays_as_it_is():
    model = tiny("llama")
    seen: dict = {}

    def note(check):
        active = {block.part("mlp").active for block in Anatomy(model).blocks}
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        seen.setdefault(tuple(active), []).append(state)

    options = dict(steps=6, every=1, lr=1e-2, batch_size=4, held_out=0.25)
    transect.convert(model, "dense2moe", DATA, on_check=note, **options)
    assert list(seen) == [(0,), (2,)]  # alone, and then with two experts
    kept = transect.convert(tiny("llama"), "dense2moe", DATA, **{**options, "steps": 0}).model.state_dict()
    first, last = seen[0,][-1], model.state_dict()
    trained = [key for key in last if ".mlp." in key]
    assert trained
    for key in last:
        shared, routed = ".mlp.shared." in key, ".mlp.split." in key or ".mlp.router." in key
        if not shared and not routed:
            assert torch.equal(last[key], kept[key]), key
        if routed:
            assert all(torch.equal(one[key], kept[key]) for one in seen[0,]), key
    moved = [key for key in trained if ".shared." in key and not torch.equal(first[key], kept[key])]
    assert moved
    second = seen[2,]
    for key in (key for key in trained if ".shared." in key):
        assert all(torch.equal(one[key], last[key]) for one in second), key
    assert any(not torch.equal(second[-1][key], kept[key]) for key in trained if ".split." in key)
    assert any(not torch.equal(second[-1][key], kept[key]) for key in trained if ".router." in key)


def test_after_an_interruption_as_many_experts_run_as_the_record_says():
    model = tiny("llama")

    def interrupt(check):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transect.convert(model, "dense2moe", DATA, on_check=interrupt, steps=4, every=1, batch_size=4)
    assert {block.part("mlp").active for block in Anatomy(model).blocks} == {2}


def test_the_stages_lower_what_is_left_of_the_stream_and_the_predictions():
    checks = []
    transect.convert(
        tiny("llama"), "dense2moe", DATA, epochs=6, every=1, batch_size=4, lr=1e-2, held_out=0.25,
        on_check=checks.append,
    )  # fmt: skip
    for name in ("shared", "experts"):
        losses = [check.loss for check in checks if check.name == name and check.step]
        assert len(losses) > 3 and losses[-1] < 0.95 * losses[0]


def test_other_numbers_of_experts_are_chosen_afterwards(tmp_path):
    model = converted(tiny("llama"), gates="one")
    set_active(model, 12)
    torch.testing.assert_close(logits(model, IDS), logits(tiny("llama"), IDS))
    set_active(model, 0)
    assert logits(model, IDS).isfinite().all()
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.model.layers[2].mlp.active == 0
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS))


def test_models_of_images_are_converted_too():
    model, outcome = convert_anatomy(
        Anatomy(tiny("vit")), Plan("dense2moe", {"active": 12, "gates": "one"}, steps=0),
        load(inputs("vit", batch=8), tiny("vit"), batch_size=4),
    )  # fmt: skip
    torch.testing.assert_close(logits(model, inputs("vit")), logits(tiny("vit"), inputs("vit")), atol=1e-5, rtol=1e-4)
    assert outcome["generates"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 7}, "36 of 48 neurons, less 12 shared, cannot be shared out evenly among 7 experts"),
        ({"active": 13}, "active=13 of 12 experts cannot be run"), ({"shared": 1.0}, "leaves none to the experts"),
        ({"shared": 0.0}, "shared=0"), ({"gates": "two"}, "gates"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_any_change(options, message):
    model = tiny("llama")
    with pytest.raises(TransectError, match=message):
        converted(model, **options)
    assert_same_tensors(model, tiny("llama"))


def test_a_part_that_leaves_nothing_to_its_experts_is_refused():
    with pytest.raises(TransectError, match="leave some to the experts"):
        made(shared=32)
