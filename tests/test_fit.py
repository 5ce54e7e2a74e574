"""FIT: groups alone, what reaches what through latents, against a loop over groups, cost."""

import math

import pytest
import torch

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.fit import FIT
from transect.parts.catalog.softmax import Softmax

SIZES = dict(width=16, heads=4, head_size=4, eps=1e-6)
N, GROUP = 12, 4


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(causal, length=N, group=GROUP, latents=2):
    torch.manual_seed(0)
    part = FIT(**SIZES, length=length, causal=causal, group=group, latents=latents).double()
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return part


X = drawn(1, N, 16)


def reached(part, at):
    """Which positions change when the one at `at` does."""
    other = X.clone()
    other[:, at] += 1
    return [i for i in range(N) if not torch.equal(part(other, Around())[0, i], part(X, Around())[0, i])]


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_one_group_without_latents_is_softmax_attention(causal):
    part = made(causal, group=N, latents=0)
    dense = Softmax(width=16, heads=4, key_value_heads=4, head_size=4, causal=causal).double()
    dense.load_state_dict(part.state_dict())
    torch.testing.assert_close(part(X, Around()), dense(X, Around()))


@torch.no_grad()
def test_what_a_position_reaches():
    assert reached(made(False, latents=0), 5) == [4, 5, 6, 7]
    assert reached(made(False), 5) == list(range(N))
    for latents in (1, 3):
        assert reached(made(True, latents=latents), 5) == list(range(5, N))
        assert reached(made(True, latents=latents), 3) == list(range(3, N))  # the last of a group


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_it_is_the_loop_over_groups(causal):
    part, x = made(causal), X[0]

    def reading(one, to, of):
        of = one.from_norm(of)
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(0, 1) for y in (
            one.q_proj(one.to_norm(to)), one.k_proj(of), one.v_proj(of),
        ))  # fmt: skip
        return one.o_proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).flatten(1))

    local = made(causal, group=N, latents=0)
    local.load_state_dict({key: w for key, w in part.state_dict().items() if key in local.state_dict()})
    alone = [local(group[None], Around())[0] for group in x.split(GROUP)]
    groups = [group + y for group, y in zip(x.split(GROUP), alone, strict=True)]
    read = [slots + reading(part.read, slots, group) for slots, group in zip(part.slots, groups, strict=True)]
    latents = [
        one + reading(part.between, one, torch.cat(read[: number + 1] if causal else read))
        for number, one in enumerate(read)
    ]
    if causal:
        latents = [torch.zeros_like(latents[0]), *latents[:-1]]
    told = [reading(part.write, group, one) for group, one in zip(groups, latents, strict=True)]
    expected = torch.cat([y + more for y, more in zip(alone, told, strict=True)])
    torch.testing.assert_close(part(X, Around())[0], expected)


@torch.no_grad()
def test_groups_with_their_slots_can_change_places():
    part, order = made(False), torch.tensor([2, 0, 1])
    y = part(X, Around()).unflatten(1, (3, GROUP))[:, order].flatten(1, 2)
    part.slots.copy_(part.slots[order])
    torch.testing.assert_close(part(X.unflatten(1, (3, GROUP))[:, order].flatten(1, 2), Around()), y)


def test_its_cost_grows_by_the_four_thirds_power_and_its_length_is_fixed():
    costs = []
    for length in (2**12, 2**15):
        with torch.device("meta"):
            costs.append(FIT(**SIZES, length=length, causal=True).mixing_flops(length))
    assert math.log(costs[1] / costs[0], 8) == pytest.approx(4 / 3, abs=0.15)
    with pytest.raises(TransectError, match="for 8 positions at most, and there are 12"):
        made(True, length=8)(X, Around())
    with pytest.raises(TransectError, match="fixed number of positions"):
        made(True, length=0)
