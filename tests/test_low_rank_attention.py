"""Linformer and Nyström attention: their limits, forms, padding, and what they refuse."""

import pytest
import torch

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.linformer import Linformer
from transect.parts.catalog.nystrom import Nystrom, pseudoinverse
from transect.parts.catalog.softmax import Softmax

X = torch.randn(2, 21, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REAL = torch.ones(2, 21, dtype=torch.bool)
REAL[1, :5] = False


def pair(kind, *sizes, **settings):
    """The part, and softmax attention of the same matrices."""
    torch.manual_seed(0)
    one, dense = kind(16, 4, 4, *sizes, causal=False, **settings).double(), Softmax(16, 4, 4, 4, False).double()
    dense.load_state_dict({key: one.state_dict()[key] for key in dense.state_dict()})
    return one, dense


def test_with_all_positions_both_are_softmax_attention():
    linformer, dense = pair(Linformer, 21, rank=21)
    for one in (linformer.key_map, linformer.value_map):
        one.data = torch.eye(21, dtype=torch.float64)
    torch.testing.assert_close(linformer(X, Around()), dense(X, Around()))
    for settings in (dict(iterations=0), dict(iterations=20)):
        nystrom, dense = pair(Nystrom, landmarks=30, **settings)
        expected = dense(X, Around(REAL))
        torch.testing.assert_close(nystrom(X, Around()), dense(X, Around()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(nystrom(X, Around(REAL))[REAL], expected[REAL], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_landmarks_are_means_of_what_is_real_and_more_of_them_come_nearer():
    one, dense = pair(Nystrom, landmarks=5, iterations=0)
    q, k, v = one.project(X, Around())
    near_q, near_k = (
        torch.stack([part.mean(2) for part in x.split(5, dim=2)], dim=2) for x in (q, k)
    )  # 21 positions: segments of 5, the last one of 1
    a, middle, b = (
        (one @ other.mT / 2).softmax(-1) for one, other in ((q, near_k), (near_q, near_k), (near_q, k))
    )  # fmt: skip
    expected = one.o_proj((a @ torch.linalg.pinv(middle) @ (b @ v)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(one(X, Around()), expected)
    short = X[1:, 5:]  # 16 real positions in front of padding that makes them 21
    padded = torch.cat([short, torch.full_like(X[1:, :5], 7)], dim=1)
    real = torch.arange(21)[None] < 16
    alone = one(torch.cat([short, 0 * padded[:, 16:]], dim=1), Around(real))
    torch.testing.assert_close(one(padded, Around(real))[:, :16], alone[:, :16])
    errors = []
    for landmarks in (2, 6, 12, 21):
        one, dense = pair(Nystrom, landmarks=landmarks, iterations=0)
        errors.append(float((one(X, Around()) - dense(X, Around())).norm()))
    assert errors == sorted(errors, reverse=True)


def test_the_iteration_finds_the_pseudoinverse_also_of_a_singular_matrix():
    a = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    a[0, 4:], a[0, :, 4:] = 0, 0
    torch.testing.assert_close(pseudoinverse(a, 30), torch.linalg.pinv(a))


def test_linformer_is_its_formula_and_does_not_read_padding():
    one, _ = pair(Linformer, 32, rank=6)
    q, k, v = one.project(X, Around())
    k, v = (x * REAL[:, None, :, None] for x in (k, v))
    scores = q @ (one.key_map[:, :21] @ k).mT / 2
    y = scores.softmax(-1) @ (one.value_map[:, :21] @ v)
    torch.testing.assert_close(one(X, Around(REAL)), one.o_proj(y.transpose(1, 2).flatten(2)))


def test_what_does_not_fit_is_refused():
    for call, said in (
        (lambda: Linformer(16, 4, 4, 8, False, rank=9), "a rank of 9 is more than the 8 positions"),
        (lambda: Linformer(16, 4, 4, 0, False), "a fixed number of positions"),
        (lambda: Linformer(16, 4, 4, 8, True, rank=4), "cannot be causal"),
        (lambda: Nystrom(16, 4, 4, True), "cannot be causal"),
        (lambda: Linformer(16, 4, 4, 8, False, rank=4).double()(X, Around()), "maps 8 positions at most"),
    ):
        with pytest.raises(TransectError, match=said):
            call()
    nothing = torch.zeros(2, 21, dtype=torch.bool)
    for one in (pair(Linformer, 21, rank=4)[0], pair(Nystrom, landmarks=4)[0]):
        assert one(X, Around(nothing)).isfinite().all()
