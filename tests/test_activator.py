"""Activator: what its unit computes, that its released mode mixes nothing, and its mode that does."""

import pytest
import torch
from torch import nn

from transect.errors import TransectError
from transect.parts import Around, build_model, part_named


def mixer(width=8, length=6, causal=False, **settings):
    torch.manual_seed(0)
    entry = part_named("mixer", "activator")
    return entry.function(width, length, causal, **entry.settings(settings)).double()


@torch.no_grad()
def test_the_released_mode_reads_no_other_position_and_the_other_reads_all():
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    order, changed = torch.tensor([3, 0, 5, 1, 4, 2]), x.clone()
    changed[:, 2] += 1
    channel, token = mixer(), mixer(mode="token")
    assert torch.equal(channel(x[:, order], Around()), channel(x, Around())[:, order])
    others = [0, 1, 3, 4, 5]
    assert torch.equal(channel(changed, Around())[:, others], channel(x, Around())[:, others])
    assert ((token(changed, Around()) - token(x, Around())).abs().amin(dim=(0, 2)) > 0).all()
    for part in (channel, token):
        assert part(x[:, :1], Around()).shape == (2, 1, 8)
        part.out.weight.zero_(), part.out.bias.zero_()
        assert not part(x, Around()).any()  # the block adds nothing
    padded, real = x.clone(), torch.tensor([[True] * 4 + [False] * 2] * 2)
    padded[:, 4:] = 7
    token = mixer(mode="token")
    torch.testing.assert_close(token(padded, Around(real))[:, :4], token(x[:, :4], Around()))


@torch.no_grad()
def test_without_norm_and_function_it_is_a_bilinear_form_and_gelu_is_the_exact_one():
    part, x = mixer(), torch.randn(2, 6, 8, dtype=torch.float64)
    first, second = part.first(x), part.second(x)
    expected = part.out(part.norm(first * torch.special.ndtr(first)) * part.norm(second))
    torch.testing.assert_close(part(x, Around()), expected)
    part.norm, part.gate = nn.Identity(), "relu"
    part.first.bias.fill_(100.0)  # where relu is the identity
    torch.testing.assert_close(part(x, Around()), part.out((part.first(x)) * second), atol=1e-6, rtol=0)


def test_its_sizes_are_the_published_ones():
    with torch.device("meta"):
        unit = sum(p.numel() for p in mixer(256).parameters())
        assert unit + 2 * 256 == 396_032  # with the block's norm
        feed_forward = 2 * 256 * 512 + 512 + 256
        assert unit + 2 * 256 + feed_forward == 658_944
        assert sum(p.numel() for p in mixer(256, shared_norm=False).parameters()) == unit + 2 * 512


def test_mixing_along_positions_is_refused_where_it_cannot_be():
    sizes = dict(hidden=32, blocks=1, heads=4, vocabulary=64, length=16)
    with pytest.raises(TransectError, match="sees what is behind a position"):
        build_model("llama", **sizes, parts={"mixer": "activator"}, settings={"activator": {"mode": "token"}})
    with pytest.raises(TransectError, match="needs a fixed number of positions"):
        mixer(length=0, mode="token")
    with pytest.raises(TransectError, match="6 positions at most, and there are 7"):
        mixer(mode="token")(torch.randn(1, 7, 8, dtype=torch.float64), Around())
