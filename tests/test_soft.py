"""SOFT: the kernel and its Nyström form, the inverse, landmarks and scales, and the mixer by brute force."""

import itertools

import pytest
import torch
from torch.nn import functional

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.soft import Soft, SymmetricInverse, gaussian_kernel, segment_weights


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(**settings):
    torch.manual_seed(0)
    return Soft(8, 2, 4, 0, False, **settings).double()


def shuffled(count, seed=0):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def nystrom(tokens, landmarks):
    p = gaussian_kernel(landmarks, tokens)
    return p.T @ torch.linalg.pinv(gaussian_kernel(landmarks, landmarks), hermitian=True) @ p


def test_the_kernel_and_its_approximation_by_some_of_the_tokens():
    tokens = drawn(20, 4)
    s = gaussian_kernel(tokens, tokens)
    torch.testing.assert_close(s, (-torch.cdist(tokens, tokens).square() / 2).exp())
    torch.testing.assert_close(gaussian_kernel(tokens + 3, tokens + 3), s)
    assert float(s.min()) >= 0 and float(s.max()) <= 1 and float(torch.linalg.eigvalsh(s).min()) > -1e-10
    torch.testing.assert_close(nystrom(tokens, tokens), s, atol=1e-6, rtol=0)
    near = nystrom(tokens, tokens[::4])
    values = torch.linalg.eigvalsh(near)
    assert int((values.abs() > 1e-9).sum()) == 5 and float(values.min()) > -1e-10
    assert float(torch.linalg.eigvalsh(s - near).min()) > -1e-10


def test_means_of_segments_are_better_landmarks_than_random_tokens_and_more_are_better():
    steps = torch.linspace(0, 6, 96, dtype=torch.float64)
    tokens = torch.stack([(steps * k / 3).sin() for k in range(1, 7)], dim=1) + 0.3 * drawn(96, 6)
    s, real = gaussian_kernel(tokens, tokens), torch.ones(1, 96, dtype=torch.bool)

    def error(landmarks):
        return float((s - nystrom(tokens, landmarks)).norm())

    means = [error(segment_weights(real, m, torch.float64)[0] @ tokens) for m in (6, 12, 24)]
    random = [sum(error(tokens[shuffled(96, seed)[:m]]) for seed in range(5)) / 5 for m in (6, 12, 24)]
    assert means[0] > means[1] > means[2]
    assert all(a < b for a, b in zip(means[:2], random[:2], strict=True))


def test_newtons_inverse_converges_step_by_step_and_has_the_inverses_gradient():
    tokens = torch.cat([drawn(10, 3), drawn(10, 3) + 0.15 * drawn(10, 3, seed=1)])
    a = gaussian_kernel(tokens, tokens) + 0.02 * torch.eye(20, dtype=torch.float64)
    assert 100 < float(torch.linalg.cond(a)) < 500
    found = [SymmetricInverse.apply(a, steps) for steps in range(21)]
    left = [float((a @ z @ a - a).norm() / a.norm()) for z in found]
    assert all(new < old for old, new in itertools.pairwise(left[:17])) and left[20] < 1e-6
    torch.testing.assert_close(found[20], found[20].T)
    small = gaussian_kernel(drawn(2, 4, 3), drawn(2, 4, 3)) + 0.1 * torch.eye(4, dtype=torch.float64)
    grads = []
    for invert in (lambda x: SymmetricInverse.apply(x, 25), torch.linalg.inv):
        x = small.clone().requires_grad_()
        (invert(x) * drawn(2, 4, 4, seed=2)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_the_mixers_gradients():
    part = made(landmarks=3, iterations=40)
    assert torch.autograd.gradcheck(lambda x: part(x, Around()), drawn(1, 6, 8).requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("scale", ["none", "degrees", "mean"])
@torch.no_grad()
def test_the_mixer_is_the_explicit_matrix_over_the_real_positions(scale):
    part, x = made(landmarks=4, scale=scale, iterations=60), drawn(2, 12, 8)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 9:] = False
    y = part(x, Around(real))
    for b, count in ((0, 9), (1, 12)):
        own, heads = x[b, :count], []
        for h in range(2):
            q = part.q_proj(own).unflatten(-1, (2, 4))[:, h] / 2**0.5
            v = part.v_proj(own).unflatten(-1, (2, 4))[:, h]
            near = torch.stack([q[(torch.arange(count) * 4 // count) == j].mean(0) for j in range(4)])
            a = gaussian_kernel(near, near)
            inverse, d = torch.linalg.inv(a + 0.01 * torch.eye(4, dtype=a.dtype)), torch.diag(a.sum(1) ** -0.5)
            if scale != "none":
                inverse = d @ inverse @ d * (4 / count if scale == "mean" else 1)
            p = gaussian_kernel(near, q)
            padded = functional.pad(v, (0, 0, 1, 1))
            beside = sum(part.kernel[h, 0, j] * padded[j : j + count] for j in range(3))
            heads.append(p.T @ inverse @ p @ v + beside)
        torch.testing.assert_close(y[b, :count], part.o_proj(torch.cat(heads, dim=1)))


@torch.no_grad()
def test_with_every_position_a_landmark_it_is_the_whole_kernel():
    part, x = made(landmarks=12, scale="none", local=0, ridge=0.0, iterations=60), drawn(1, 12, 8)
    q, v = (one(x).unflatten(-1, (2, 4)).transpose(1, 2) for one in (part.q_proj, part.v_proj))
    q = 4 * q  # tokens far apart, whose kernel can be inverted
    part.q_proj.weight.mul_(4)
    s = (-torch.cdist(q, q).square() / (2 * 4**0.5)).exp()
    torch.testing.assert_close(part(x, Around()), part.o_proj((s @ v).transpose(1, 2).flatten(2)), atol=1e-6, rtol=0)
    order = shuffled(12)
    torch.testing.assert_close(part(x[:, order], Around()), part(x, Around())[:, order], atol=1e-6, rtol=0)


@torch.no_grad()
def test_degrees_bound_what_similar_tokens_add_up_to_and_the_mean_takes_the_length_away():
    sums = {}
    for scale in ("none", "degrees", "mean"):
        part = made(landmarks=8, scale=scale, local=0)
        part.q_proj.weight.mul_(0.3)
        part.v_proj.weight.zero_()
        part.v_proj.weight[0, 0] = 1.0
        for count in (16, 256):
            x = drawn(1, count, 8)
            x[..., 0] = 1.0  # so that the first channel of the values is 1 everywhere, and its mixture the row sum
            part.o_proj.weight.copy_(torch.eye(8))
            sums[scale, count] = float(part(x, Around())[..., 0].mean())
    assert sums["none", 256] == pytest.approx(256, rel=0.1)  # every row sums to about N
    assert sums["degrees", 16] == pytest.approx(2, rel=0.15) and sums["degrees", 256] == pytest.approx(32, rel=0.15)
    assert sums["mean", 16] == pytest.approx(1, rel=0.15) and sums["mean", 256] == pytest.approx(1, rel=0.15)


@torch.no_grad()
def test_a_map_is_pooled_in_squares_and_its_class_position_is_in_none():
    part, x = made(landmarks=4, positions="map"), drawn(1, 17, 8)
    q = part.q_proj(x)[:, 1:].unflatten(-1, (2, 4)).transpose(1, 2)
    near, _ = part._means_of_squares(part.q_proj(x).unflatten(-1, (2, 4)).transpose(1, 2), 4)
    squares = q.unflatten(2, (4, 4))
    torch.testing.assert_close(near[0, 1, 2], squares[0, 1, 2:, :2].mean((0, 1)))
    v = drawn(1, 2, 17, 4)
    beside, on = part._beside(v, 4), v[0, 1, 1:].unflatten(0, (4, 4))
    padded = functional.pad(on.permute(2, 0, 1), (1, 1, 1, 1)).permute(1, 2, 0)
    expected = (part.kernel[1, 0][..., None] * padded[2:5, 0:3]).sum((0, 1))  # around row 2, column 0
    torch.testing.assert_close(beside[0, 1, 1 + 2 * 4], expected)
    assert not beside[:, :, 0].any() and part(x, Around()).shape == x.shape


def test_what_does_not_fit_is_refused():
    for call, said in (
        (lambda: Soft(8, 2, 4, 0, True), "cannot be causal"),
        (lambda: made(landmarks=5, positions="map"), "square number"),
        (lambda: made(local=2), "odd side"),
        (lambda: made(landmarks=9, positions="map")(drawn(1, 16, 8), Around()), "9 landmarks"),
        (lambda: made(landmarks=4, positions="map")(drawn(1, 15, 8), Around()), "there are 15"),
        (lambda: made(landmarks=4, positions="map")(drawn(1, 4, 8), Around(torch.tensor([[True] * 3 + [False]]))),
         "no padding in a map"),
        (lambda: Soft(8, 2, 4, 17, False, landmarks=9, positions="map"), "there are 17"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=said):
            call()
    assert made()(drawn(1, 5, 8), Around(torch.zeros(1, 5, dtype=torch.bool))).isfinite().all()
