"""Combiner's patterns: against a loop over positions and their regions, as a distribution, in its limits."""

import pytest
import torch

from transect.errors import TransectError
from transect.parts import Around, build_model
from transect.parts.catalog.combiner import Combiner, combined
from transect.parts.catalog.softmax import Softmax

N, D, SPAN = 14, 5, 4
PATTERNS = ["fixed", "logsparse", "vertical", "horizontal", "mixture"]
ALL = torch.ones(1, N, dtype=torch.bool)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


Q, K = drawn(1, 2, N, D), drawn(1, 2, N, D, seed=1)


def matrix(pattern, q=Q, k=K, real=ALL, span=SPAN, causal=True):
    values = torch.eye(q.shape[2], dtype=torch.float64).expand(1, 2, -1, -1)
    return combined(q, k, values, real, pattern, span, causal)[0]


def regions_of(pattern, i, causal=True):
    """What position i sees directly, and its regions, by the text of the paper."""
    row, column = divmod(i, SPAN)
    if pattern == "logsparse":
        return [i], [
            list(range((i >> level + 1) << level + 1, ((i >> level + 1) << level + 1) + (1 << level)))
            for level in range(N.bit_length()) if i >> level & 1
        ]  # fmt: skip
    own = [j for j in range(N) if j // SPAN == row and (j <= i or not causal)]
    if pattern == "fixed":
        spans = [[j for j in range(N) if j // SPAN == r] for r in range(-(-N // SPAN)) if r < row or not causal]
        return own, [span for span in spans if i not in span]
    above = [j for j in range(i) if j // SPAN < row]
    regions = []
    if pattern in ("vertical", "mixture"):
        regions += [[j for j in above if j % SPAN == c] for c in range(SPAN) if c != column]
    if pattern in ("horizontal", "mixture"):
        for r in range(row):
            regions += [[j for j in above if j // SPAN == r and j % SPAN < column]]
            regions += [[j for j in above if j // SPAN == r and j % SPAN > column]]
    return own + [j for j in above if j % SPAN == column], regions


def by_loops(pattern, real, causal=True):
    rows = torch.zeros(2, N, N, dtype=torch.float64)
    for head in range(2):
        q, k = Q[0, head] / D**0.5, K[0, head]
        for i in range(N):
            direct, regions = regions_of(pattern, i, causal)
            direct = [j for j in direct if real[0, j] or j == i]
            regions = [kept for region in regions if (kept := [j for j in region if real[0, j]])]
            logits = [q[i] @ k[j] for j in direct] + [q[i] @ k[r].amax(0) for r in regions]
            weights = torch.stack(logits).softmax(0)
            for weight, j in zip(weights, direct, strict=False):
                rows[head, i, j] += weight
            for weight, region in zip(weights[len(direct) :], regions, strict=True):
                rows[head, i, region] += weight * (k[region] @ q[region].amax(0)).softmax(0)
    return rows


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_row_is_a_distribution_over_all_that_it_may_see_and_the_one_of_its_regions(pattern):
    found = matrix(pattern)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, N, dtype=torch.float64))
    assert bool((found.tril() == found).all()) and bool((found + torch.ones(N, N).triu(1) > 0).all())
    torch.testing.assert_close(found, by_loops(pattern, ALL))
    real = ALL.clone()
    real[0, [0, 1, 2, 3, 4, 9]] = False  # a whole span among them
    torch.testing.assert_close(matrix(pattern, real=real), by_loops(pattern, real))


def test_both_ways_every_other_span_is_a_region():
    torch.testing.assert_close(matrix("fixed", causal=False), by_loops("fixed", ALL, causal=False))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("span", [1, N, 99])
def test_one_span_and_spans_of_one_are_softmax_attention(span, causal):
    logits = Q @ K.mT / D**0.5
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1) & causal
    dense = logits.masked_fill(hidden, float("-inf")).softmax(-1)[0]
    torch.testing.assert_close(matrix("fixed", span=span, causal=causal), dense, atol=2e-16, rtol=1e-14)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_comes_later_changes_no_bit(pattern):
    q, k = Q.clone(), K.clone()
    q[:, :, 9:] += 3
    k[:, :, 9:] -= 2
    assert torch.equal(matrix(pattern, q, k)[:, :9], matrix(pattern)[:, :9])


def test_a_past_span_has_rank_one_and_no_order():
    found = matrix("fixed")
    block, own = found[0, 8:, 4:8], found[0, 4:8, 4:8]
    assert torch.linalg.matrix_rank(block) == 1 and torch.linalg.matrix_rank(own) == 4
    order = torch.arange(N)
    order[4:8] = torch.tensor([6, 4, 7, 5])
    values = drawn(1, 2, N, 3, seed=2)
    y, other = (combined(q, k, v, ALL, "fixed", SPAN, True) for q, k, v in (
        (Q, K, values), (Q[:, :, order], K[:, :, order], values[:, :, order]),
    ))  # fmt: skip
    torch.testing.assert_close(other[:, :, 8:], y[:, :, 8:])


def test_with_equal_keys_a_region_counts_as_one_position():
    found = matrix("fixed", k=torch.ones(1, 2, N, D, dtype=torch.float64))
    share = 1 / (2 + 2)  # position 9 sees 8 and itself, and two spans
    torch.testing.assert_close(found[0, 9, :10], torch.tensor([share / 4] * 8 + [share] * 2, dtype=torch.float64))


def test_it_has_the_weights_of_softmax_attention_and_no_more():
    sizes = dict(width=16, heads=4, key_value_heads=2, head_size=4, causal=True)
    ours, dense = Combiner(**sizes, length=16, span=64).double(), Softmax(**sizes).double()
    ours.load_state_dict(dense.state_dict())
    x = drawn(2, 10, 16)
    torch.testing.assert_close(ours(x, Around()), dense(x, Around()))
    costs = [Combiner(**sizes, length=n).mixing_flops(n) for n in (1024, 4096)]
    assert costs[1] == pytest.approx(8 * costs[0], rel=0.02)  # N√N


def test_an_axial_pattern_of_a_bidirectional_model_is_refused():
    sizes = dict(hidden=16, blocks=1, heads=2, image=8, patch=2, channels=1)
    with pytest.raises(TransectError, match="pattern vertical is causal"):
        build_model("vit", **sizes, parts={"mixer": "combiner"}, settings={"combiner": {"pattern": "vertical"}})
