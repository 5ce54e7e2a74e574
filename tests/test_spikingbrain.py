"""SpikingBrain: its attention against loops, experts as copies, and codes of spikes that lose nothing."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.evaluation.size import parameters
from transect.operators.spiking import Spiking, spike_counts
from transect.parts import Around
from transect.parts.catalog.spikingbrain import (
    Counted,
    SpikingBrain,
    binary_spikes,
    bitwise_planes,
    complement_planes,
    from_complement,
    from_planes,
    planes_needed,
    ternary_spikes,
)

from .models import CONFIGS, VOCABULARY, assert_alike, inputs, logits, tiny

WIDTH, HEADS, KEYS, SIZE = 16, 4, 2, 4
DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))


def made(**settings):
    torch.manual_seed(0)
    return SpikingBrain(WIDTH, HEADS, KEYS, SIZE, True, **settings).double()


def drawn(count=70):
    return torch.randn(2, count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def other_llama(**more):
    """Its entry in the models' table, with other sizes."""
    config, auto = CONFIGS["llama"]
    return type(config)(**{**config.to_dict(), **more}), auto


def heads_of(part, x):
    return [one(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for one in (part.q_proj, part.k_proj, part.v_proj)]


@pytest.mark.parametrize("rank", [16, 0])
@torch.no_grad()
def test_linear_attention_is_the_masked_sum_and_its_loop(rank):
    part, x = made(gate_rank=rank), drawn()
    q, k, v = heads_of(part, x)
    if rank:
        q, k = q.relu(), k.relu()
        gate = torch.sigmoid(part.decay(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)) ** (1 / 16)
    else:
        q, k = q.sigmoid(), k.sigmoid()
        gate = 1 - k
    k, v, gate = (one.repeat_interleave(HEADS // KEYS, dim=1) for one in (k, v, gate))
    since = gate.log().cumsum(2)
    weights = torch.einsum("bhic,bhjc,bhijc->bhij", q, k, (since[:, :, :, None] - since[:, :, None]).exp()).tril()
    summed = weights @ v / SIZE**0.5
    state, looped = torch.zeros(2, HEADS, SIZE, SIZE, dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = gate[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        looped.append((q[:, :, t, None] @ state).squeeze(-2) / SIZE**0.5)
    torch.testing.assert_close(torch.stack(looped, dim=2), summed)
    normed = functional.rms_norm(summed, (SIZE,), eps=1e-6)
    torch.testing.assert_close(part(x, Around()), part.o_proj(normed.transpose(1, 2).flatten(2)))
    assert_alike(part.float()(x.float(), Around()), part.double()(x, Around()).float())


@torch.no_grad()
def test_positions_do_not_turn_what_linear_attention_reads():
    x, angles = drawn(), torch.randn(1, 70, SIZE, dtype=torch.float64)
    rotary = angles.cos(), angles.sin()
    for rank in (16, 0):
        part = made(gate_rank=rank)
        assert torch.equal(part(x, Around(rotary=rotary)), part(x, Around()))
    near = made(branches="window")
    assert not torch.allclose(near(x, Around(rotary=rotary)), near(x, Around()), rtol=1e-2)


@torch.no_grad()
def test_with_open_gates_it_is_plain_linear_attention_before_the_norm():
    part, x = made(), drawn()
    part.decay[1].weight.zero_()
    part.decay[1].bias.fill_(1e9)
    q, k, v = heads_of(part, x)
    expected = (q.relu() @ k.relu().repeat_interleave(2, 1).mT).tril() @ v.repeat_interleave(2, 1) / SIZE**0.5
    torch.testing.assert_close(part.linear(x, q, k, v, Around()), expected)


@pytest.mark.parametrize("branches", ["linear", "window", "both"])
@torch.no_grad()
def test_token_by_token_is_the_whole_and_the_state_is_bounded(branches):
    part, x = made(branches=branches, window=5), drawn(23)
    expected = part(x, Around())
    state: dict = {}
    sizes, found = [], [part(x[:, :9], Around(state=state))]
    for t in range(9, 23):
        found.append(part(x[:, t : t + 1], Around(state=state, past=t)))
        sizes.append(sum(tensor.numel() for tensor in state.values()))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("branches", ["linear", "window", "both"])
@torch.no_grad()
def test_operations_are_those_that_are_said_and_double_with_the_length(branches):
    part = made(branches=branches, window=8)
    for length in (256, 512):
        with FlopCounterMode(display=False) as counted:
            part(drawn(length)[:1], Around())
        assert counted.get_total_flops() == length * part.flops + part.mixing_flops(length)
    assert part.mixing_flops(512) == 2 * part.mixing_flops(256)


def test_new_numbers_are_those_of_gates_and_norms_and_layers_take_turns():
    before = parameters(tiny("llama"))
    model = transect.convert(tiny("llama"), "spikingbrain", gate_rank=5).model
    kinds = [block.self_attn.part.branches for block in model.model.layers]
    assert kinds == ["linear", "window", "linear"]
    assert parameters(model) - before == 2 * (5 * 32 + 5 * 2 * 8 + 2 * 8 + 8)
    assert not model.model.layers[0].self_attn.part.decay[1].bias.any()
    inside = transect.convert(tiny("llama"), "spikingbrain", within=True, window=4).model
    assert {block.self_attn.part.branches for block in inside.model.layers} == {"both"}
    assert parameters(inside) - before == 3 * 2 * 8


def test_both_side_by_side_see_all_positions_in_every_seventh_block(monkeypatch):
    monkeypatch.setitem(CONFIGS, "llama", other_llama(num_hidden_layers=8))
    model = transect.convert(tiny("llama"), "spikingbrain", within=True, window=4).model
    parts = [block.self_attn.part for block in model.model.layers]
    assert [part.window for part in parts] == [4] * 6 + [2**20, 4]
    assert {(part.branches, part.feature) for part in parts} == {("both", "sigmoid")}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_experts_are_the_mlp_where_only_down_is_scaled_and_near_it_otherwise(name):
    batch, dense = inputs(name), tiny(name)
    expected = logits(dense, batch)
    settings = dict(experts=4, active=1, spread=0.0)
    assert_alike(logits(transect.convert(tiny(name), "spikingbrain-experts", scaled="down", **settings).model, batch),
                 expected)  # fmt: skip
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    apart = {}
    for experts in (4, 16):
        near = transect.convert(tiny(name), "spikingbrain-experts", scaled="all", **{**settings, "experts": experts})
        parts = [Anatomy(model).model.get_submodule(Anatomy(dense).blocks[0].slot_path("mlp")) for model in
                 (near.model, dense)]  # fmt: skip
        ours, theirs = (part(x) for part in parts)
        apart[experts] = float((ours - theirs).norm() / theirs.norm())
        split = parts[0].split
        alpha = (1 / (1 + 1 / experts)) ** (1 / (2 if split.gate is None else 3))
        weight = Anatomy(dense).blocks[0].mlp.up.weight
        torch.testing.assert_close(split.up, (alpha * weight).expand(experts, *weight.shape))
    assert 0 < apart[16] < apart[4] < 0.05


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("active", "shared"), [(2, 1), (2, 2), (4, 1), (0, 2)])
def test_experts_of_even_scores_are_the_mlp_however_many_run(active, shared, scores):
    settings = dict(experts=4, active=active, shared=shared, scores=scores, spread=0.0, scaled="down")
    model = transect.convert(tiny("llama"), "spikingbrain-experts", **settings).model
    assert_alike(logits(model, inputs("llama")), logits(tiny("llama"), inputs("llama")))


def test_without_active_experts_the_shared_ones_are_run_alone_and_trained():
    model = tiny("llama")
    found = transect.convert(model, "spikingbrain-experts", DATA, steps=2, active=0, experts=4, scaled="down", lr=1e-3)
    part = found.model.model.layers[0].mlp
    copies, x = part.split.up, torch.randn(5, 32)
    assert torch.equal(copies, tiny("llama").model.layers[0].mlp.up_proj.weight.expand_as(copies))
    assert not torch.equal(part.shared.up[0], copies[0])
    torch.testing.assert_close(part(x), part.shared.one(0, x))


@torch.no_grad()
def test_scaling_every_matrix_is_off_by_what_was_measured(monkeypatch):
    """Where gate and up are of variance 1: 2.5 % with 4 experts, and 0.7 % with 16."""
    monkeypatch.setitem(CONFIGS, "llama", other_llama(num_hidden_layers=1, hidden_size=128, intermediate_size=512))
    dense, draw = tiny("llama"), torch.Generator().manual_seed(0)
    mlp, x = dense.model.layers[0].mlp, torch.randn(500, 128, generator=draw)
    for matrix in (mlp.gate_proj, mlp.up_proj):
        matrix.weight.copy_(torch.randn(512, 128, generator=draw) / 128**0.5)
    for experts, error in ((4, 0.025), (16, 0.007)):
        near = transect.convert(copy.deepcopy(dense), "spikingbrain-experts", experts=experts, spread=0.0)
        ours, expected = near.model.model.layers[0].mlp(x), mlp(x)
        assert float((ours - expected).norm() / expected.norm()) == pytest.approx(error, abs=6e-4)


def test_only_chosen_experts_are_run_and_a_router_learns_to_balance():
    model = transect.convert(tiny("llama"), "spikingbrain-experts", experts=4, active=2, spread=1.0).model
    part = model.model.layers[0].mlp.train()
    x = torch.randn(3, 5, 32)
    flat = x.flatten(0, 1)
    p, chosen = part.router(flat).softmax(-1).topk(2)
    expected = part.shared.one(0, flat)
    for row, (weights, numbers) in enumerate(zip(p, chosen, strict=True)):
        for weight, number in zip(weights, numbers, strict=True):
            expected = expected.index_add(0, torch.tensor([row]), weight * part.split.one(int(number), flat[row][None]))
    assert_alike(part(x), expected.view(x.shape))
    assert part.auxiliary.requires_grad and float(part.auxiliary.detach()) >= 0.9
    with pytest.raises(TransectError, match="active=5 of 4 experts"):
        transect.convert(tiny("llama"), "spikingbrain-experts", experts=4, active=5)


def counts():
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    return spike_counts(3 * x, 3.0)[0]


def test_codes_lose_nothing_and_planes_multiply_as_counts_do():
    s, weight = counts(), torch.randn(7, 40)
    assert torch.equal(ternary_spikes(s).sum(0), s) and set(ternary_spikes(s).unique().tolist()) == {-1, 0, 1}
    assert torch.equal(binary_spikes(s.abs()).sum(0), s.abs()) and len(binary_spikes(s.abs())) == int(s.abs().max())
    assert torch.equal(from_planes(bitwise_planes(s)), s)
    assert torch.equal(from_complement(complement_planes(s)), s)
    assert set(complement_planes(s).unique().tolist()) == {0, 1}
    assert len(complement_planes(s)) == len(bitwise_planes(s)) + 1
    assert_alike(from_planes(bitwise_planes(s) @ weight.T), s @ weight.T)
    assert planes_needed(torch.tensor([256.0])) == 9 and planes_needed(torch.tensor([-255.0])) == 8
    assert planes_needed(torch.zeros(3)) == 1
    with pytest.raises(TransectError, match="not negative"):
        binary_spikes(s)


def test_counts_are_within_half_a_threshold_and_know_no_scale():
    x = torch.randn(50, 64, dtype=torch.float64)
    s, threshold = spike_counts(x, 3.0)
    assert bool(((s * threshold - x).abs() <= threshold / 2 * (1 + 1e-9)).all())
    scaled, of_scaled = spike_counts(7.3 * x, 3.0)
    assert torch.equal(scaled, s)
    torch.testing.assert_close(scaled * of_scaled, 7.3 * (s * threshold))
    zeros, least = spike_counts(torch.zeros(2, 8), 3.0)
    assert not zeros.any() and bool(least.isfinite().all())


def test_a_larger_k_is_finer_and_less_sparse_as_measured():
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    found = []
    for k in (2.0, 3.0, 4.0):
        s, threshold = spike_counts(x, k)
        counted = Counted()
        counted.add(s)
        told = list(counted.told().values())
        found.append((*told[:3], float((s * threshold - x).square().mean() / x.square().mean())))
    expected = [(0.158, 0.997, 1.08, 0.0133), (0.106, 0.954, 1.30, 0.0059), (0.079, 0.865, 1.46, 0.0033)]
    for column, tolerance in enumerate((2e-3, 2e-3, 6e-3, 1e-4)):
        ours, theirs = ([row[column] for row in rows] for rows in (found, expected))
        assert ours == pytest.approx(theirs, abs=tolerance)
        falls = column != 2  # spikes grow
        assert all((coarse > fine) == falls for coarse, fine in itertools.pairwise(ours))


def test_what_is_told_of_counts_is_as_by_hand():
    counted = Counted()
    counted.add(torch.tensor([0.0, 1.0, -3.0]))
    counted.add(torch.tensor([[7.0, 8.0], [-12.0, 0.0], [0.0, -2.0]]))  # bits in all: 1 + 2, 3 + 1 + 2 + 1
    assert counted.told() == pytest.approx({
        "share of inputs without a spike": 3 / 9,
        "share of counts of at most 7": 7 / 9,
        "spikes of an input (set bits)": 10 / 9,
        "sparsity of three planes": 1 - 7 / (3 * 7),
        "idealized pJ of an input": 0.03 * 10 / 9,
        "idealized share of float16's energy": 0.02 * 10 / 9,
        "idealized share of int8's energy": 0.03 / 0.23 * 10 / 9,
    })  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_counts_and_stays_so_behind_a_matrix(bad):
    x = torch.randn(3, 8)
    x[1, 2] = bad
    s, _ = spike_counts(x, 3.0)
    for code in (ternary_spikes, bitwise_planes, complement_planes, Counted().add):
        with pytest.raises(TransectError, match="not finite"):
            code(s)
    spiking = Spiking(torch.nn.Linear(8, 5))
    y = spiking(x)
    assert not y[1].isfinite().any() and torch.equal(y[::2], spiking(x[::2]))


@pytest.mark.parametrize("name", ["gpt2", "vit", "bert"])
def test_every_matrix_reads_spikes_and_comes_back_from_a_folder(name, tmp_path):
    model = tiny(name)
    matrices = len(Anatomy(model).matrices())
    model = transect.convert(model, "spikingbrain-spikes", group=10).model
    found = [module for module in model.modules() if isinstance(module, Spiking)]
    assert len(found) == matrices and all(float(one.k) == 3 for one in found)
    model.save_pretrained(tmp_path / "model")
    again = type(tiny(name)).from_pretrained(tmp_path / "model")
    batch = inputs(name)
    assert_alike(logits(again, batch), logits(model, batch))


@torch.no_grad()
def test_a_spiking_matrix_is_what_its_equation_says_and_lets_gradients_through():
    model = tiny("qwen2")
    weight, bias = (getattr(Anatomy(model).blocks[0].attention.q, name).clone() for name in ("weight", "bias"))
    model = transect.convert(model, "spikingbrain-spikes", k=2.0, group=8).model
    spiking = model.model.layers[0].self_attn.q_proj
    scale = weight.unflatten(1, (-1, 8)).abs().amax(-1, keepdim=True) / 127
    rounded = ((weight.unflatten(1, (-1, 8)) / scale).round() * scale).flatten(1)
    x = torch.randn(5, 32)
    s, threshold = spike_counts(x, 2.0)
    torch.testing.assert_close(spiking(x), threshold * (s @ rounded.T) + bias)
    x.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(spiking(x).sum(), x)
    torch.testing.assert_close(gradient, rounded.sum(0).expand_as(x))


def test_without_rounded_weights_a_large_k_is_nearly_the_model():
    batch = inputs("llama")
    expected = logits(tiny("llama"), batch)
    found = [
        float((logits(transect.convert(tiny("llama"), "spikingbrain-spikes", k=k, int8=False).model, batch) - expected)
              .norm() / expected.norm())
        for k in (2.0, 20.0, 1e4)
    ]  # fmt: skip
    assert found[0] > 3 * found[1] > 0 and found[2] < 1e-3


def test_what_is_told_and_what_is_refused():
    found = transect.convert(tiny("llama"), "spikingbrain-spikes", DATA, steps=0)
    told = found.outcome["told"]
    assert 0 < told["share of inputs without a spike"] < 0.3 and 0 < told["idealized share of int8's energy"] < 1
    scales = sum(matrix.module.inner.scale.numel() for matrix in Anatomy(found.model).matrices())
    before, after = found.outcome["parameters"]
    assert after == before + scales  # the matrices count once, though in 8 bits inside another operator
    with pytest.raises(TransectError, match="is stored as Spiking"):
        transect.convert(found.model, "spikingbrain-spikes")
    with pytest.raises(TransectError, match="prescribes no training"):
        transect.convert(tiny("llama"), "spikingbrain-spikes", DATA, steps=3)
    with pytest.raises(TransectError, match="k=0"):
        transect.convert(tiny("llama"), "spikingbrain-spikes", k=0.0)


def test_spikes_generate_as_they_read(tmp_path):
    model = transect.convert(tiny("gpt2"), "spikingbrain-spikes").model
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    batched = model.generate(DATA[:2, :12], attention_mask=mask, **asked)[0, 12:]
    assert torch.equal(batched, model.generate(DATA[:1, 4:12], **asked)[0, 8:])
    model.save_pretrained(tmp_path / "model")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "model").transformer.h[0].mlp.c_fc, Spiking)
