"""EcoFormer: codes and their gradient, hash learning bit by bit, the linear form by brute force, work and energy."""

import itertools

import pytest
import torch
from torch.nn import functional

from transect.errors import TransectError
from transect.parts import Around
from transect.parts.catalog.ecoformer import (
    EcoFormer,
    Hash,
    anchor_kernel,
    binary_codes,
    codes_of,
    ecoformer_work,
    hard_losses,
    learned_hash,
    learned_projection,
    random_hash,
    similarity_labels,
    softmax_work,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(causal=False, **settings):
    torch.manual_seed(0)
    return EcoFormer(8, 2, 4, causal, 0, **settings).double()


def tokens(seed, sequences=2, count=48):
    """Unit vectors (sequences x 2 heads x count x 16) of eight directions that are not alike, with noise."""
    strong = torch.linspace(2, 0.3, 8, dtype=torch.float64)[:, None] * drawn(2, 8, 16, seed=7)
    z = drawn(sequences, 2, count, 8, seed=seed) @ strong + 0.1 * drawn(sequences, 2, count, 16, seed=seed + 100)
    return functional.normalize(z, dim=-1)


def test_products_of_codes_count_bits_and_the_gradient_goes_straight_through_small_scores():
    scores = torch.tensor([0.0, -0.5, 0.99, 1.0, -1.0, 3.0], dtype=torch.float64, requires_grad=True)
    codes = binary_codes(scores)
    assert codes.tolist() == [1, -1, 1, 1, -1, 1]
    (gradient,) = torch.autograd.grad((codes * torch.arange(1, 7)).sum(), scores)
    assert gradient.tolist() == [1, 2, 3, 0, 0, 0]
    bits = codes_of(tokens(0), Hash(*(one.double() for one in vars(random_hash(2, 16, 25, 9)).values())))
    apart = (bits[..., :, None, :] != bits[..., None, :, :]).sum(-1)
    assert torch.equal(bits @ bits.mT, 9.0 - 2 * apart)


def test_each_bit_is_taken_only_if_signs_fit_better_and_the_labels_are_neared():
    z, bits = tokens(0), 8
    anchors = z[0, :, :25]
    kernel = anchor_kernel(z, anchors, torch.ones(2, dtype=z.dtype))
    torch.testing.assert_close(kernel[1, 0, 3, 4], (-(z[1, 0, 3] - anchors[0, 4]).square().sum() / 2).exp())
    centred, labels, start = kernel - kernel.mean((0, 2))[:, None], similarity_labels(z, 10), drawn(2, bits, 25, seed=3)
    found = learned_projection(centred, labels, start, rate=2e-2)
    assert not torch.equal(found, start)
    residual, left = bits * labels, []
    for bit in range(bits):
        new, old = (hard_losses(centred, residual, rows[:, bit], bits) for rows in (found, start))
        changed = (found[:, bit] != start[:, bit]).any(-1)
        assert bool((new <= old).all()) and torch.equal(new < old, changed)
        y = binary_codes(centred @ found[:, bit, :, None])
        residual = residual - y @ y.mT
        left.append(float(residual[labels.abs() == 1].norm()))
    assert all(after < before for before, after in itertools.pairwise(left))


def test_learned_codes_tell_similar_tokens_from_others_also_among_new_ones():
    seen, new = tokens(0), tokens(1)
    margins = {}
    for name, steps in (("random", 0), ("learned", 50)):
        codes = codes_of(new, learned_hash(seen, bits=16, steps=steps, rate=2e-2))
        alike, shared = new @ new.mT, codes @ codes.mT / 16
        near, far = (alike.topk(10, -1, largest=largest).indices for largest in (True, False))
        margins[name] = float(shared.gather(-1, near).mean() - shared.gather(-1, far).mean())
    assert margins["learned"] > margins["random"] + 0.05 and margins["random"] > 0.8


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_the_mixer_is_the_explicit_mean_of_values(causal):
    part, x = made(causal, bits=6, anchors=5, offset=2.0), drawn(2, 9, 8)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :2] = False
    codes = part.codes(x, Around(real))
    weights = (codes @ codes.mT + 8.0) * real[:, None, None]
    weights = weights.tril() if causal else weights
    assert float(weights[1][weights[1] > 0].min()) >= 2
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    v = part.v_proj(x).unflatten(-1, (2, 4)).transpose(1, 2)
    y = part.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(part(x, Around(real))[real], y[real])
    part.qk_proj.weight.mul_(7.5)
    torch.testing.assert_close(part(x, Around(real))[real], y[real])


@torch.no_grad()
def test_equal_codes_and_a_large_constant_give_the_mean():
    x = drawn(2, 9, 8)
    for part in (made(), made(offset=1e6)):
        if part.constant < 100:
            part.qk_proj.weight.zero_()
        mean = part.o_proj(part.v_proj(x).mean(1, keepdim=True)).expand_as(x)
        torch.testing.assert_close(part(x, Around()), mean, atol=1e-4, rtol=0)


def test_the_part_learns_its_hash_from_its_inputs_and_the_task_trains_the_projection_alone():
    part, x = made(), drawn(3, 30, 8)
    before = part.projection.clone()
    part.learn(x, similar=5, steps=10, rate=2e-2)
    assert not torch.equal(part.projection, before)
    z = functional.normalize(part.qk_proj(x).unflatten(-1, (2, 4)).transpose(1, 2), dim=-1)
    assert all(bool((z[:, h, :, None] == part.anchors[h]).all(-1).any((0, 1)).all()) for h in range(2))
    part(x, Around()).square().sum().backward()
    assert {name for name, _ in part.named_parameters()} == {"qk_proj.weight", "v_proj.weight", "o_proj.weight"}
    assert part.qk_proj.weight.grad.abs().sum() > 0 and not part.projection.requires_grad


def test_multiplications_and_energy_fall_and_are_linear_in_the_length():
    soft, codes = softmax_work(784, 32), ecoformer_work(784, 32, 25, 16)
    assert soft.multiplications == 2 * 784**2 * 32 + 784**2
    assert codes.multiplications == 784 * (2 * 25 + 25 * 16 + 1 + 32)
    assert codes.multiplications < 0.3 * soft.multiplications and codes.picojoules < 0.3 * soft.picojoules
    assert ecoformer_work(2 * 784, 32, 25, 16).picojoules == pytest.approx(2 * codes.picojoules)


def test_too_few_tokens_to_learn_from_are_refused():
    for call, said in (
        (lambda: similarity_labels(drawn(1, 2, 20, 4), 10), "more than 20 tokens"),
        (lambda: learned_hash(drawn(1, 2, 24, 4)), "25 anchors"),
    ):
        with pytest.raises(TransectError, match=said):
            call()
