"""Liger: gates out of keys, three memories against loops, and what one of its conversions must hold."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import transect
from transect.errors import TransectError
from transect.evaluation.size import parameters
from transect.parts import Around
from transect.parts.catalog.liger import Liger

from .models import VOCABULARY, assert_alike, inputs, logits, tiny

GATES = ["gla", "hgrn2", "gsa"]
WIDTH, HEADS, KEYS, SIZE = 16, 4, 2, 4


def made(**settings):
    torch.manual_seed(0)
    return Liger(WIDTH, HEADS, KEYS, SIZE, True, **settings).double()


def drawn(count=70):
    return torch.randn(2, count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def projected(part, x):
    """q, k and v by heads (B x heads of their own x N x head size)."""
    return [part.by_heads(one(x)) for one in (part.q_proj, part.k_proj, part.v_proj)]


def remembered(part, q, k, v, real=None):
    """The memory alone, position by position, straight from the equations."""
    k, v = (one.repeat_interleave(HEADS // KEYS, dim=1) for one in (k, v))
    pooled = k.unflatten(-1, (part.gates, -1)).mean(-1)
    slots = part.gate == "gsa"
    rows = part.gates if slots else part.head_size
    keys, values = (q.new_zeros(2, HEADS, rows, part.head_size) for _ in range(2))
    outputs = []
    for t in range(q.shape[2]):
        gate = torch.sigmoid(pooled[:, :, t])
        gate = gate if slots else gate.repeat_interleave(part.head_size // part.gates, dim=-1)
        decay = gate if part.gate == "hgrn2" else gate ** (1 / 16)
        written = k[:, :, t].softmax(-1) if part.gate == "gla" else 1 - decay
        if real is not None:
            written = written * real[:, t, None, None]
        keys = decay[..., None] * keys + written[..., None] * k[:, :, t, None]
        values = decay[..., None] * values + written[..., None] * v[:, :, t, None]
        score = (keys * q[:, :, t, None]).sum(-1) if slots else q[:, :, t]
        outputs.append((score.softmax(-1)[..., None] * values).sum(-2))
    return torch.stack(outputs, dim=2)


def looped(part, x, real=None):
    return part.put_out(remembered(part, *projected(part, x), real), x)


@pytest.mark.parametrize("gates", [0, 1, 2])
@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_the_memory_is_its_loop_also_with_padding_and_in_pieces(gate, gates):
    part, x = made(gate=gate, gates=gates, alpha=1.0, beta=0.0), drawn()
    assert part.gates == (gates or {"gsa": 2}.get(gate, 4))
    torch.testing.assert_close(part(x, Around()), looped(part, x), atol=1e-12, rtol=1e-12)
    real = torch.ones(2, 70, dtype=torch.bool)
    real[0, :9] = False
    torch.testing.assert_close(part(x, Around(real))[real], looped(part, x, real)[real], atol=1e-12, rtol=1e-12)
    single = part.float()(x.float(), Around())
    torch.testing.assert_close(single, looped(part.double(), x).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_positions_do_not_turn_what_the_memory_reads(gate):
    part, x, angles = made(gate=gate, alpha=1.0, beta=0.0), drawn(), torch.randn(1, 70, SIZE, dtype=torch.float64)
    rotary = angles.cos(), angles.sin()
    assert torch.equal(part(x, Around(rotary=rotary)), part(x, Around()))
    near = made(gate=gate, alpha=0.0, beta=1.0)
    assert not torch.allclose(near(x, Around(rotary=rotary)), near(x, Around()), rtol=1e-2)


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_in_half_precision_the_memory_is_computed_in_float32(gate):
    part, x = made(gate=gate).bfloat16(), drawn().bfloat16()
    q, k, v = projected(part, x)
    found = part._memory(x, q, k, v, Around())
    assert found.dtype == torch.float32
    assert_alike(found, remembered(part, q.double(), k.double(), v.double()).float())


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_where_the_model_norms_queries_and_keys_memory_and_gate_read_the_normed_ones(gate):
    model, longer = (tiny("qwen3", dtype=torch.float64) for _ in range(2))
    attention, other = (one.model.layers[0].self_attn for one in (model, longer))
    for projection in (other.q_proj, other.k_proj):
        projection.weight.mul_(1e3)  # which the model does not see
    x = torch.randn(2, 70, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (one(x).unflatten(-1, (-1, 8)) for one in (attention.q_proj, attention.k_proj, attention.v_proj))
    normed = [one.transpose(1, 2) for one in (attention.q_norm(q), attention.k_norm(k), v)]
    for one in (model, longer):
        transect.convert(one, "liger", gate=gate, alpha=1.0, beta=0.0, layers="0")
        part = one.model.layers[0].self_attn.part
        expected = part.put_out(remembered(part, *normed), x)
        torch.testing.assert_close(part(x, Around()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_token_by_token_is_the_whole_and_the_state_does_not_grow(gate):
    part, x = made(gate=gate, window=5), drawn(23)
    expected = part(x, Around())
    state, sizes, found = {}, [], []
    for t in range(23):
        found.append(part(x[:, t : t + 1], Around(state=state, past=t)))
        sizes.append(sum(tensor.numel() for tensor in state.values()))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-12, rtol=1e-12)
    assert len(set(sizes[4:])) == 1
    later = x.clone()
    later[:, 11:] = 3.0
    torch.testing.assert_close(part(later, Around())[:, :11], expected[:, :11])


def test_the_decay_is_a_sixteenth_root_between_none_and_all():
    part = made()
    k = torch.zeros(1, KEYS, 1, SIZE, dtype=torch.float64)
    torch.testing.assert_close(part.decay_of(k, k).exp(), torch.full_like(k, 0.9576), atol=1e-4, rtol=0)
    decay = part.decay_of(k, k + torch.linspace(-30, 30, SIZE)).exp()
    assert float(decay.min()) > 0 and float(decay.max()) < 1


def test_keys_get_a_gradient_as_keys_and_as_gates(monkeypatch):
    def gradient():
        part = made(alpha=1.0, beta=0.0)
        part(drawn(), Around()).square().sum().backward()
        return part.k_proj.weight.grad

    both, of_gates = gradient(), Liger.decay_of
    monkeypatch.setattr(Liger, "decay_of", lambda self, x, k: of_gates(self, x, k.detach()))
    as_keys = gradient()
    assert float(as_keys.norm()) > 0 and float((both - as_keys).norm()) > 1e-3 * float(both.norm())


@pytest.mark.parametrize("gate", GATES)
def test_nothing_is_added_and_names_and_shapes_stay(gate):
    before = tiny("llama")
    model = transect.convert(tiny("llama"), "liger", gate=gate).model
    assert parameters(model) == parameters(before)
    named = {name.replace("self_attn.part.", "self_attn."): p for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in named.items()} == {name: p.shape for name, p in before.named_parameters()}
    assert all(torch.equal(named[name], p) for name, p in before.named_parameters())


@pytest.mark.parametrize("gate", GATES)
def test_a_window_of_all_alone_is_the_model_as_it_was(gate):
    model = transect.convert(tiny("qwen2"), "liger", gate=gate, alpha=0.0, beta=1.0).model
    batch = inputs("qwen2")
    torch.testing.assert_close(logits(model, batch), logits(tiny("qwen2"), batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_operations_grow_with_the_length_and_the_cache_does_not(gate):
    data = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(5))
    found = transect.convert(tiny("llama"), "liger", data, steps=0, gate=gate, window=8, lengths=[16, 64])
    before, after = found.outcome["quality"]
    assert after[0]["cache_bytes"] == after[1]["cache_bytes"] and before[0]["cache_bytes"] < before[1]["cache_bytes"]
    part = made(gate=gate, window=8)
    for length in (256, 512):  # what is said is what is computed
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            part(drawn(length)[:1], Around())
        assert counted.get_total_flops() == length * part.flops + part.mixing_flops(length)
    assert part.mixing_flops(512) == 2 * part.mixing_flops(256)


def test_hybrids_keep_every_so_manieth_block_and_other_weights_or_too_many_gates_are_refused():
    model = transect.convert(tiny("llama"), "liger", keep_every=3).model
    assert [type(block.self_attn).__name__ for block in model.model.layers][2] == "LlamaAttention"
    with pytest.raises(TransectError, match="gates=99 are means of the 8 channels"):
        transect.convert(tiny("llama"), "liger", gate="gsa", gates=99)
    for settings, said in (({"alpha": 0.9}, "not 0.9 \\+ 0.5"), ({"gates": 5}, "gates=5 are means of the 4 channels")):
        with pytest.raises(TransectError, match=said):
            made(**settings)
