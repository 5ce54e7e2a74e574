"""EcoFormer: codes and their gradient, hash learning bit by bit, the linear form by brute force, work and energy."""

import itertools

import pytest
import torch
from torch.nn import functional

import transect
from transect.anatomy import Anatomy
from transect.conversion.attention import trained_projections
from transect.conversion.catalog.ecoformer import nearest, shared_projection
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

from .models import VOCABULARY, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
SMALL = {"anchors": 9, "bits": 8, "similar": 3, "hash_steps": 3}


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


def test_each_bit_descends_as_the_gradient_of_its_loss_with_tanh_says():
    z, bits, rate, steps = tokens(0, count=32), 3, 0.3, 4
    anchors = z[0, :, :9]
    kernel = anchor_kernel(z, anchors, torch.ones(2, dtype=z.dtype))
    centred, labels = kernel - kernel.mean((0, 2))[:, None], similarity_labels(z, 5)
    start = drawn(2, bits, 9, seed=3)
    residual, taken = bits * labels, 0
    found = learned_projection(centred, labels, start, steps, rate)
    for bit in range(bits):
        row = start[:, bit].clone().requires_grad_()
        descent = torch.optim.SGD([row], lr=rate, momentum=0.9, nesterov=True)
        for _ in range(steps):
            descent.zero_grad()
            y = torch.tanh(centred @ row[:, :, None] / 2)
            (-(y.mT @ residual @ y).mean() / (32 * bits)).backward()
            descent.step()
        changed = (found[:, bit] != start[:, bit]).any(-1)
        taken += int(changed.sum())
        torch.testing.assert_close(found[changed, bit], row.detach()[changed], atol=1e-12, rtol=1e-12)
        y = binary_codes(centred @ found[:, bit, :, None])
        residual = residual - y @ y.mT
    assert taken >= 3


def test_of_long_sequences_some_tokens_are_drawn_to_learn_from(monkeypatch):
    seen, new, sizes = tokens(0, count=600), tokens(1), []

    def watched(z, similar):
        sizes.append(z.shape[-2])
        return similarity_labels(z, similar)

    monkeypatch.setattr("transect.parts.catalog.ecoformer.hashing.similarity_labels", watched)
    labels, errors = similarity_labels(new, 6), []
    for steps in (0, 15):
        hashed = learned_hash(seen, bits=4, similar=64, steps=steps, rate=2e-2)
        codes = codes_of(new, hashed)
        errors.append(float((labels - codes @ codes.mT / 4).square().sum()))
    assert errors[1] < 0.9 * errors[0]
    kernel = anchor_kernel(seen, hashed.anchors, hashed.spread)
    torch.testing.assert_close(hashed.mean, kernel.mean((0, 2)))  # of all of them
    learned_hash(seen, bits=1, similar=140, steps=0)  # as many as so many similar ones need
    learned_hash(new, steps=0)
    assert sizes == [512, 512, 560, 48]


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


@pytest.mark.parametrize("complex_", [False, True])
def test_the_merge_is_the_nearest_product_of_a_projection_with_itself(complex_):
    q, k = (torch.complex(drawn(3, 7, seed=i), drawn(3, 7, seed=i + 9)) if complex_ else drawn(3, 7, seed=i) for i in
            (0, 1))  # fmt: skip
    z = nearest(q, k)
    values, vectors = torch.linalg.eigh((q.mH @ k + k.mH @ q) / 2)
    best = vectors[:, -3:] * values[-3:].clamp(min=0) @ vectors[:, -3:].mH
    torch.testing.assert_close(z.mH @ z, best)
    torch.testing.assert_close(nearest(q, q).mH @ nearest(q, q), q.mH @ q)  # nothing is lost of what is shared already


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gptj"])
@torch.no_grad()
def test_a_model_with_shared_queries_and_keys_is_merged_without_loss(name):
    """Positions turn pairs of channels, wherever the architecture has them; a bias is one of the columns."""
    model = tiny(name)
    block = Anatomy(model).blocks[1]
    attention = block.attention
    groups = attention.heads // attention.key_value_heads
    keys = attention.k.weight.view(attention.key_value_heads, 1, block.head_size, -1)
    bias = attention.k.bias
    attention.q.write(
        keys.expand(-1, groups, -1, -1).reshape(attention.q.shape), None if bias is None else bias.repeat(groups)
    )
    weight, shift = shared_projection(block, trained_projections(block))
    x = torch.randn(5, weight.shape[1])
    trained = trained_projections(block).repeated
    size, width = block.head_size, block.rotary_width

    def scores(q, k, angle):
        q, k = (one.view(5, -1, size).transpose(0, 1) for one in (q, k))
        turn = torch.polar(torch.ones(width // 2), angle * torch.arange(1.0, width // 2 + 1))
        q_pairs, k_pairs = (torch.complex(one[..., : width // 2], one[..., width // 2 : width]) for one in (q, k))
        return (q_pairs.conj() @ (k_pairs * turn).mT).real + q[..., width:] @ k[..., width:].mT

    z = functional.linear(x, weight, shift)
    for angle in (0.0, 0.7):
        expected = scores(trained["q"](x), trained["k"](x), angle)
        torch.testing.assert_close(scores(z, z, angle), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_training_has_two_stages_the_first_of_which_is_softmax_and_codes_are_learned_anew():
    model, seen = tiny("llama"), []

    def watch(check):
        seen.append({module.soft for module in model.modules() if isinstance(module, EcoFormer)})

    found = transect.convert(
        model,
        "ecoformer",
        DATA,
        settings={"ecoformer": SMALL},
        epochs=4,
        batch_size=2,
        lr=1e-2,
        every=1,
        on_check=watch,
    )
    stages = found.outcome["stages"]
    assert [stage["name"] for stage in stages] == ["shared", "codes"]
    assert stages[0]["steps"] > 2 * stages[1]["steps"] > 0
    assert seen == sorted(seen, key=lambda soft: soft == {False}) and {True} in seen and {False} in seen
    parts = [module for module in found.model.modules() if isinstance(module, EcoFormer)]
    assert len(parts) == 3 and not any(part.soft for part in parts)
    untrained = transect.convert(tiny("llama"), "ecoformer", DATA, steps=0, settings={"ecoformer": SMALL}).model
    before = [module for module in untrained.modules() if isinstance(module, EcoFormer)]
    assert all(not torch.equal(new.anchors, old.anchors) for new, old in zip(parts, before, strict=True))


@torch.no_grad()
def test_anchors_are_tokens_of_the_text_and_a_soft_part_is_softmax_attention():
    model = transect.convert(tiny("gpt2"), "ecoformer", DATA, steps=0, settings={"ecoformer": SMALL}).model
    part, x = Anatomy(model).blocks[0].part("attention"), torch.randn(2, 9, 32)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :2] = False
    part.soft = True
    z, v = (one(x).unflatten(-1, (4, -1)).transpose(1, 2) for one in (part.qk_proj, part.v_proj))
    mask = real[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    weights = (z @ z.mT / 8**0.5).masked_fill(~mask, -1e30).softmax(-1)
    expected = part.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(part(x, Around(real))[real], expected[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part.anchors.norm(dim=-1), torch.ones(4, 9))
    assert logits(model, inputs("gpt2")).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"similar": 8}, "more than 16 tokens"), ({"similar": 3, "anchors": 999}, "from 999 tokens in all")],
)
def test_text_that_is_too_short_for_codes_is_refused_before_any_change(settings, said):
    model = tiny("llama")
    with pytest.raises(TransectError, match=said):
        transect.convert(model, "ecoformer", DATA, steps=0, settings={"ecoformer": settings})
    assert not any(isinstance(module, EcoFormer) for module in model.modules())
    with pytest.raises(TransectError, match="pass data="):
        transect.convert(model, "ecoformer")
