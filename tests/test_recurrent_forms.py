"""Parts that keep a recurrence against naive loops over positions: all at once, in pieces, and token by token.

The loops are written out from the equations, in float64, with a state of their own; in float32 a part is as near to
them as 1e-5 of the largest output.
"""

import itertools

import pytest
import torch
from torch.nn import functional

from transect.parts import Around, part_named

from .models import assert_alike

WIDTH, HEADS, SIZE, COUNT = 16, 4, 4, 70  # more than one chunk of 64
ENDS = {"all at once": [COUNT], "in pieces": [2, 67, 68, COUNT], "token by token": range(1, COUNT + 1)}


def made(name, **settings):
    """The part with all its numbers moved, so that no norm is plain and no bias 0."""
    torch.manual_seed(0)
    entry = part_named("mixer", name)
    sizes = {"width": WIDTH, "heads": HEADS, "key_value_heads": 2, "head_size": SIZE, "causal": True, "layer": 0}
    part = entry.function(**{name: sizes[name] for name in entry.sizes}, **entry.settings(settings)).eval()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return part


def angles(count=COUNT):
    return torch.arange(count, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)


def turned(x):
    """Channels i and i + size / 2 of each head as a complex number, turned by its position's angle."""
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles()), angles())
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def split(x, heads=HEADS):
    """By heads (B x HEADS x N x size); heads of keys for each of the queries that read them."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).repeat_interleave(HEADS // heads, dim=1)


def joined(y):
    return y.transpose(1, 2).flatten(2)


def normed(y, norm):
    return y * (y.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def memory(q, k, v, decay=None, of_values=False):
    """S_t = diag(a_t) S_{t-1} + k_t v_tᵀ, or S_{t-1} diag(a_t) + k_t v_tᵀ; y_t = S_tᵀ q_t."""
    state, outputs = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=k.dtype), []
    for t in range(COUNT):
        if decay is not None:
            state = state * (decay[:, :, t, None] if of_values else decay[:, :, t, :, None])
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        outputs.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=2)


def window(part, q, k, v):
    """Softmax of each position over the last ones, itself included."""
    q, k, outputs = turned(q), turned(k), []
    for t in range(COUNT):
        seen = slice(max(0, t + 1 - part.window), t + 1)
        weights = (q[:, :, t, None] @ k[:, :, seen].mT / SIZE**0.5).softmax(-1)
        outputs.append((weights @ v[:, :, seen]).squeeze(2))
    return torch.stack(outputs, dim=2)


def gated_linear(part, x):
    q, k, v = (split(one(x)) for one in (part.q_proj, part.k_proj, part.v_proj))
    y = memory(q / SIZE**0.5, k, v, split(part.decay(x)).sigmoid() ** (1 / 16))
    return part.o_proj(joined(normed(y, part.norm)) * functional.silu(part.g_proj(x)))


def delta_rule(part, x):
    maps = torch.cat([one(x) for one in (part.q_proj, part.k_proj, part.v_proj)], dim=-1)
    taps = [[part.convolution[-1 - lag] * maps[:, t - lag] for lag in range(part.taps) if lag <= t]
            for t in range(COUNT)]  # fmt: skip
    q, k, v = (split(one) for one in functional.silu(torch.stack([sum(one) for one in taps], 1)).chunk(3, dim=-1))
    q, k = q / q.norm(dim=-1, keepdim=True) / SIZE**0.5, k / k.norm(dim=-1, keepdim=True)
    beta, state, outputs = part.beta(x).sigmoid(), x.new_zeros(len(x), HEADS, SIZE, SIZE), []
    for t in range(COUNT):
        if part.decay is not None:
            kept = (-part.rate.exp() * (1 + part.decay(x[:, t]).exp()).log()).exp()
            state = kept[..., None, None] * state
        key, rate = k[:, :, t, :, None], beta[:, t, :, None, None]
        state = state - rate * key @ (key.mT @ state) + rate * key * v[:, :, t, None]
        outputs.append((q[:, :, t, None] @ state).squeeze(2))
    return part.o_proj(joined(normed(torch.stack(outputs, dim=2), part.norm)))


def kernel(part, x):
    q, k, v = (split(one(x)) for one in (part.q_proj, part.k_proj, part.v_proj))
    q, k = turned(q), turned(k)
    if part.kind == "mixer.linear":
        q, k = (torch.where(one > 0, one + 1, one.exp()) for one in (q, k))
    else:  # the largest exponent of a query is in numerator and denominator
        q, k = ((one @ part.directions.mT / SIZE**0.25 - one.square().sum(-1, keepdim=True) / 2 / SIZE**0.5).exp()
                for one in (q, k))  # fmt: skip
    return part.o_proj(joined(memory(q, k, v) / memory(q, k, torch.ones_like(v[..., :1]))))


def liger(part, x):
    q, k, v = split(part.q_proj(x)), split(part.k_proj(x), 2), split(part.v_proj(x), 2)
    if part.gate == "gsa":
        gate = k.unflatten(-1, (part.gates, -1)).mean(-1).sigmoid() ** (1 / 16)
        q_far, written = memory(q, k, 1 - gate, gate, of_values=True).softmax(-1), 1 - gate
    else:
        gate = k.sigmoid() if part.gate == "hgrn2" else k.sigmoid() ** (1 / 16)
        q_far, written = q.softmax(-1), 1 - gate if part.gate == "hgrn2" else k.softmax(-1)
    far = memory(q_far, written, v, gate)
    return part.o_proj(joined(part.alpha * far + part.beta * window(part, q, k, v)))


def spikingbrain(part, x):
    q, k, v = split(part.q_proj(x)), split(part.k_proj(x), 2), split(part.v_proj(x), 2)
    if part.decay is None:
        far = memory(q.sigmoid() / SIZE**0.5, k.sigmoid(), v, 1 - k.sigmoid())
    else:
        far = memory(q.relu() / SIZE**0.5, k.relu(), v, split(part.decay(x), 2).sigmoid() ** (1 / 16))
    y = normed(far, part.norm)
    if part.branches == "both":
        y = y + normed(window(part, q, k, v), part.near_norm)
    return part.o_proj(joined(y))


def ecoformer(part, x):
    z, v = turned(split(part.qk_proj(x))), split(part.v_proj(x))
    z = z / z.norm(dim=-1, keepdim=True)
    apart = (z[..., :, None, :] - part.anchors[:, None]).square().sum(-1)
    scores = ((-apart / 2 / part.spread[:, None, None]).exp() - part.mean[:, None]) @ part.projection.mT
    codes, outputs = torch.where(scores < 0, -1.0, 1.0).to(x.dtype), []
    context, values, sums = torch.zeros(len(x), HEADS, codes.shape[-1], SIZE, dtype=x.dtype), 0, 0
    for t in range(COUNT):
        code = codes[:, :, t, None]  # B x HEADS x 1 x bits
        context, values, sums = context + code.mT @ v[:, :, t, None], values + v[:, :, t, None], sums + code
        read = code @ context + part.constant * values
        outputs.append((read / (code @ sums.mT + part.constant * (t + 1))).squeeze(2))
    return part.o_proj(joined(torch.stack(outputs, dim=2)))


def layered(sums, norm):
    centred = sums - sums.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight + norm.bias


def rnn(part, x):
    h, outputs = x.new_zeros(len(x), WIDTH), []
    for t in range(COUNT):
        h = layered(part.from_h(h) + part.from_x(x[:, t]), part.norm).tanh()
        outputs.append(h)
    return part.o_proj(torch.stack(outputs, dim=1))


def lstm(part, x):
    h, c, outputs = *x.new_zeros(2, len(x), WIDTH), []
    for t in range(COUNT):
        sums = layered(part.from_h(h), part.norm_h) + layered(part.from_x(x[:, t]), part.norm_x) + part.bias.flatten()
        i, f, o, new = sums.chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * new.tanh()
        h = o.sigmoid() * layered(c, part.norm_c).tanh()
        outputs.append(h)
    return part.o_proj(torch.stack(outputs, dim=1))


def gru(part, x):
    h, outputs = x.new_zeros(len(x), WIDTH), []
    for t in range(COUNT):
        of_x, of_h = part.from_x(x[:, t]), part.from_h(h)
        gates = layered(of_x[:, : 2 * WIDTH], part.norm_x[0]) + layered(of_h[:, : 2 * WIDTH], part.norm_h[0])
        r, u = gates.sigmoid().chunk(2, dim=-1)
        new = layered(of_x[:, 2 * WIDTH :], part.norm_x[1]) + r * layered(of_h[:, 2 * WIDTH :], part.norm_h[1])
        h = u * h + (1 - u) * new.tanh()
        outputs.append(h)
    return part.o_proj(torch.stack(outputs, dim=1))


FORMS = {
    "gated-linear": (gated_linear, "gated-linear", {}),
    "delta-rule": (delta_rule, "delta-rule", {}),
    "delta-rule, gated": (delta_rule, "delta-rule", {"gated": True}),
    "linear": (kernel, "linear", {}),
    "performer": (kernel, "performer", {"features": 9}),
    "liger, gla": (liger, "liger", {"window": 5}),
    "liger, hgrn2": (liger, "liger", {"window": 5, "gate": "hgrn2"}),
    "liger, gsa": (liger, "liger", {"window": 5, "gate": "gsa"}),
    "spikingbrain": (spikingbrain, "spikingbrain", {}),
    "spikingbrain, both, tied": (spikingbrain, "spikingbrain", {"branches": "both", "gate_rank": 0, "window": 5}),
    "ecoformer": (ecoformer, "ecoformer", {}),
    "ln-rnn": (rnn, "ln-rnn", {}),
    "ln-lstm": (lstm, "ln-lstm", {}),
    "ln-gru": (gru, "ln-gru", {}),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_part_is_its_loop_all_at_once_in_pieces_and_token_by_token(form):
    loop, name, settings = FORMS[form]
    part, x = made(name, **settings), torch.randn(2, COUNT, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = loop(part.double(), x.double())
    cos, sin = (one.repeat(1, 2)[None] for one in (angles().cos(), angles().sin()))
    assert_alike(part(x.double(), Around(rotary=(cos, sin))), expected)
    part.float()
    for ends in ENDS.values():
        found, state = [], {}
        for start, end in itertools.pairwise([0, *ends]):
            rotary = cos[:, start:end].float(), sin[:, start:end].float()
            found.append(part(x[:, start:end], Around(rotary=rotary, past=start, state=state)))
        assert_alike(torch.cat(found, dim=1), expected.float())
