"""CRATE: rates and their gradient, steps that lower or raise them, ISTA, and the network of the paper."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import linear, normalize

import transect.parts.catalog.crate as crate
from transect.errors import TransectError
from transect.parts import Around, build_model, part_named

D, HEADS, SIZE, COUNT, PRECISION = 32, 4, 8, 64, 0.5
GAMMA = SIZE / (COUNT * PRECISION**2)


def problem(seed=0):
    """Tokens (N x d) and the bases of the subspaces (K x d x p), which are orthonormal together."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(COUNT, D, dtype=torch.float64, generator=draw)
    turned = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=draw))[0]
    return tokens, turned.unflatten(1, (HEADS, SIZE)).transpose(0, 1)


def compressed(tokens, bases, precision=PRECISION):
    """R^c: of the tokens' projections on each subspace, together."""
    return crate.coding_rate(tokens @ bases, precision).sum()


def mixer(bases, **settings):
    """MSSA with these bases, and γ times their transposes as output."""
    part = crate.SubspaceAttention(D, HEADS, SIZE, False, **settings).double()
    with torch.no_grad():
        part.proj.weight.copy_(bases.transpose(1, 2).flatten(0, 1))
        part.o_proj.weight.copy_(part.proj.weight.T * GAMMA)
        part.o_proj.bias.zero_()
    return part


def test_rates_are_invariant_and_their_gradient_is_the_formula():
    tokens, bases = problem()
    turn_tokens = torch.linalg.qr(torch.randn(COUNT, COUNT, dtype=torch.float64))[0]
    turn_stream = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    rate, whole = compressed(tokens, bases), crate.coding_rate(tokens, PRECISION)
    assert rate > 0 and whole > 0
    torch.testing.assert_close(compressed(turn_tokens @ tokens, bases), rate)
    for turned in (turn_tokens @ tokens, tokens @ turn_stream):
        torch.testing.assert_close(crate.coding_rate(turned, PRECISION), whole)
    for some in (tokens, tokens[:20]):  # more tokens than channels, and fewer: the other determinant
        scale = D / (len(some) * PRECISION**2)
        expected = torch.logdet(torch.eye(len(some), dtype=torch.float64) + scale * some @ some.T) / 2
        torch.testing.assert_close(crate.coding_rate(some, PRECISION), expected)
    tokens.requires_grad_()
    (found,) = torch.autograd.grad(compressed(tokens, bases), tokens)
    expected = torch.zeros_like(found)
    for basis in bases:
        inside = tokens @ basis
        gram = torch.eye(COUNT, dtype=torch.float64) + GAMMA * inside @ inside.T
        expected += GAMMA * torch.linalg.solve(gram, inside) @ basis.T
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_damped_step_lowers_the_rate_and_the_plain_sum_raises_it_unless_tokens_are_normed():
    tokens, bases = problem()
    tokens, kappa = normalize(tokens, dim=-1), 0.1
    before = compressed(tokens, bases)
    with torch.enable_grad():
        free = tokens.clone().requires_grad_()
        (slope,) = torch.autograd.grad(compressed(free, bases), free)
    assert compressed(tokens - kappa * slope, bases) < before
    derived = mixer(bases, strength=kappa * GAMMA, damping=kappa * GAMMA)
    sqrt = SIZE**0.25  # the formula's softmax has no 1/sqrt(p): inputs and outputs are scaled for that

    def moved(part, tokens):
        return tokens + part(tokens[None] * sqrt, Around())[0] / sqrt

    assert compressed(moved(derived, tokens), bases) < before
    plain = moved(mixer(bases), tokens)
    assert compressed(plain, bases) > before
    assert compressed(normalize(plain, dim=-1), bases) < before


def test_one_projection_is_query_key_and_value():
    tokens, bases = problem()
    part = mixer(bases)
    w = tokens @ bases  # K x N x p
    logits = w @ w.mT / SIZE**0.5
    torch.testing.assert_close(logits, logits.mT)
    expected = (logits.softmax(-1) @ w).transpose(0, 1).flatten(1) @ part.o_proj.weight.T
    torch.testing.assert_close(part(tokens[None], Around())[0], expected)
    tied = part_named("mixer", "softmax").function(D, HEADS, HEADS, SIZE, False, bias=True).double()
    with torch.no_grad():
        for one in (tied.q_proj, tied.k_proj, tied.v_proj):
            one.weight.copy_(part.proj.weight)
            one.bias.zero_()
        tied.o_proj.load_state_dict(part.o_proj.state_dict())
    turns = torch.randn(1, COUNT, SIZE // 2, dtype=torch.float64).repeat(1, 1, 2)
    around = Around(rotary=(turns.cos(), turns.sin()))
    torch.testing.assert_close(part(tokens[None], around), tied(tokens[None], around))
    whole = crate.SubspaceAttention(D, 1, D, True)
    assert isinstance(whole.o_proj, torch.nn.Identity) and whole.roles == {"v": "proj"}


@torch.no_grad()
def test_ista_descends_is_sparser_the_larger_its_penalty_and_is_plain_where_the_dictionary_is_orthogonal():
    tokens, _ = problem()
    part = crate.ISTA(D).double()
    norm = torch.linalg.matrix_norm(part.dictionary, 2) ** 2
    part.step, target = float(1 / norm), tokens[0]
    z, objectives = torch.zeros_like(target), []
    for _ in range(30):
        left = target - part.dictionary @ z
        objectives.append(float(left.square().sum() / 2 + part.penalty * z.sum()))
        z = torch.relu(z + part.step * part.dictionary.T @ left - part.step * part.penalty)
    assert all(later < earlier for earlier, later in pairwise(objectives))
    # The part is that step begun at its own input.
    first = target + part.step * part.dictionary.T @ (target - part.dictionary @ target)
    torch.testing.assert_close(part(target), torch.relu(first - part.step * part.penalty))
    shares = []
    for penalty in (0.0, 2.0, 20.0):
        part.penalty = penalty
        y = part(tokens)
        assert float(y.min()) >= 0
        shares.append(float((y == 0).double().mean()))
    assert 0 < shares[0] < shares[1] < shares[2]
    part = crate.ISTA(D, step=0.1, penalty=0.1).double()
    part.dictionary.copy_(torch.linalg.qr(part.dictionary)[0])
    torch.testing.assert_close(
        part(tokens), torch.relu(tokens + 0.1 * (linear(tokens, part.dictionary.T) - tokens) - 0.01)
    )


@pytest.mark.parametrize(
    "width, layers, heads, count",
    [(384, 12, 6, 6.09), (576, 12, 12, 13.12), (768, 12, 12, 22.80), (1024, 24, 16, 77.64)],
)
def test_the_networks_have_the_published_sizes(width, layers, heads, count):
    with torch.device("meta"):
        parts = crate.SubspaceAttention(width, heads, width // heads, False), crate.ISTA(width)
    block = sum(p.numel() for part in parts for p in part.parameters()) + 4 * width  # two layer norms
    assert block == 3 * width**2 + 5 * width
    pixels, tokens = 3 * 16**2, (224 // 16) ** 2 + 1
    shell = 2 * pixels + (pixels + 1) * width + 2 * width + width + tokens * width + 2 * width + 1000 * (width + 1)
    assert round((layers * block + shell) / 1e6, 2) == count


@torch.no_grad()
def test_the_stream_behind_every_block_of_the_network_is_its_sparse_code():
    sizes = dict(hidden=32, blocks=2, heads=4, vocabulary=64, length=16)
    parts = {"mixer": "crate", "mlp": "crate", "block": "crate"}
    settings = {"crate": {"damping": 0.5, "penalty": 0.2}}  # of the mixer, and of the MLP
    model = build_model("gpt2", **sizes, parts=parts, settings=settings)
    layer = model.transformer.h[0]
    assert layer.attn.part.damping == 0.5 and layer.mlp.penalty == 0.2
    found = model(torch.arange(12)[None], output_hidden_states=True).hidden_states[1]
    assert float(found.min()) == 0 and 0.2 < float((found == 0).double().mean()) < 0.9
    with pytest.raises(TransectError, match="no parameter magic"):
        build_model("gpt2", **sizes, parts=parts, settings={"crate": {"magic": 1}})
