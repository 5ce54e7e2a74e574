"""The delta rule as a mixer: what its memory does, and its gate and convolution."""

import pytest
import torch

from transect.errors import TransectError
from transect.parts import Around, part_named
from transect.parts.recurrence import decayed_recurrence, delta_recurrence


def mixer(**settings):
    torch.manual_seed(0)
    entry = part_named("mixer", "delta-rule")
    return entry.function(16, 2, 8, True, **entry.settings(settings)).double().eval()


def test_orthogonal_keys_make_it_linear_attention_and_a_known_key_is_given_its_new_value():
    draw = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    one, k = torch.ones(1, 1, 8, 1, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[None, None]
    for found, expected in zip(delta_recurrence(q, k, v, one), decayed_recurrence(q, k, v), strict=True):
        torch.testing.assert_close(found, expected)
    same = k[:, :, :1].expand(-1, -1, 8, -1)  # the same key eight times: the last value is what is remembered
    y, _ = delta_recurrence(same, same, v, one)
    torch.testing.assert_close(y, v)


@pytest.mark.parametrize("taps", [1, 3])
@torch.no_grad()
def test_gated_it_goes_on_position_by_position_and_does_not_read_padding(taps):
    part, x = mixer(gated=True, taps=taps), torch.randn(2, 11, 16, dtype=torch.float64)
    y, state = part(x, Around()), {}
    steps = [part(x[:, a:b], Around(state=state)) for a, b in ((0, 2), (2, 3), (3, 9), (9, 11))]
    torch.testing.assert_close(torch.cat(steps, dim=1), y)
    real = torch.ones(2, 15, dtype=torch.bool)
    real[:, :4] = False
    padded = torch.cat([7 * torch.ones(2, 4, 16, dtype=torch.float64), x], dim=1)
    torch.testing.assert_close(part(padded, Around(real))[:, 4:], y)


def test_a_convolution_whose_last_tap_alone_is_one_is_none_and_flops_count_it():
    plain, part = mixer(taps=1), mixer(taps=4)
    part.load_state_dict({**part.state_dict(), **plain.state_dict()})
    with torch.no_grad():
        part.convolution.zero_()[-1] = 1
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(part(x, Around()), plain(x, Around()))
    assert part.flops - plain.flops == 2 * 4 * 3 * 16
    with pytest.raises(TransectError, match="cannot be bidirectional"):
        part_named("mixer", "delta-rule").function(16, 2, 8, False)
