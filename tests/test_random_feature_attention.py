"""Random heads: features and their kernel, the fit in closed form, and the mixer against a loop over positions."""

import pytest
import torch
from torch.nn import functional

from transect.errors import TransectError
from transect.parts import Around, build_model
from transect.parts.catalog.random_feature_attention import (
    RandomHeadsAttention,
    RandomHeadsRegression,
    attention_features,
    attention_kernel,
    mlp_features,
    random_heads,
    random_units,
    ridge,
)
from transect.parts.catalog.random_feature_attention import layer as mixer


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def examples(n, keys=5, size=4, seed=0):
    x = functional.normalize(drawn(n, keys + 1, size, seed=seed), dim=-1)
    return x[:, 0], x[:, 1:]


def extended(x):
    return torch.cat([x, torch.ones(1, dtype=x.dtype)])


def test_features_are_the_sum_over_keys_and_know_no_order_of_them():
    query, keys = examples(6)
    heads = random_heads(4, 7, bias=1.5, seed=3)
    found = attention_features(query, keys, heads)
    for n, m in ((0, 0), (5, 6)):
        q = extended(query[n])
        expected = sum((q @ heads[m] @ extended(x)).relu() * extended(x) for x in keys[n]) / 5
        torch.testing.assert_close(found[n, m], expected)
    torch.testing.assert_close(attention_features(query, keys[:, [3, 0, 4, 1, 2]], heads), found)
    torch.testing.assert_close(attention_features(query, keys.repeat(1, 3, 1), heads), found)
    torch.testing.assert_close(attention_features(query, keys, 2.5 * heads), 2.5 * found)
    swapped = attention_features(keys[:, 0], torch.cat([query[:, None], keys[:, 1:]], 1), heads)
    assert not torch.allclose(swapped, found, atol=1e-2)
    centre = random_heads(4, 7, bias=1.5, seed=3) - random_heads(4, 7, seed=3)
    torch.testing.assert_close(centre[0], torch.diag(extended(torch.full((4,), 1.5))) - torch.diag(extended(0 * q[1:])))


def test_the_gram_matrix_of_many_heads_nears_the_kernel():
    (query, keys), errors = examples(12), {}
    kernel = attention_kernel(query, keys, query, keys)
    for heads in (125, 2000):
        features = attention_features(query, keys, random_heads(4, heads, seed=1)).flatten(1)
        errors[heads] = float((features @ features.T / heads - kernel).norm() / kernel.norm())
    assert errors[2000] < 0.1 and errors[2000] < errors[125] / 2  # at rate M^-1/2 a quarter
    other = attention_kernel(query[:3], keys[:3], query[3:], keys[3:])
    torch.testing.assert_close(other, kernel[:3, 3:])


@pytest.mark.parametrize("size", [8, 40])
def test_the_ridge_solves_its_normal_equations_in_both_forms(size):
    features, targets = drawn(20, size), drawn(20, 2, seed=1)
    for strength, values in zip((1e-3, 1.0), ridge(features, targets, (1e-3, 1.0)), strict=True):
        added = strength * (features @ features.T).diagonal().mean()
        left = features.T @ (features @ values) + added * values
        torch.testing.assert_close(left, features.T @ targets)


def test_random_heads_learn_an_average_over_keys_that_a_random_network_does_not():
    direction = functional.normalize(drawn(8, seed=9), dim=0)

    def problem(seed):
        query, keys = examples(400, keys=8, size=8, seed=seed)
        return query, keys, (keys @ direction).square().mean(1)

    (query, keys, targets), (new_query, new_keys, asked) = problem(0), problem(1)
    model = RandomHeadsRegression(100).fit(query, keys, targets)
    error = (model.predict(new_query, new_keys) - asked).square().mean() / asked.var()
    units = random_units(9 * 8, 900)
    (values,) = ridge(mlp_features(query, keys, units), (targets - targets.mean())[:, None], [1e-2])
    plain = (mlp_features(new_query, new_keys, units) @ values[:, 0] + targets.mean() - asked).square().mean()
    assert error < 0.3 < 0.8 < plain / asked.var()


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_the_mixer_is_the_mean_over_what_is_seen(causal, monkeypatch):
    torch.manual_seed(0)
    part, x = RandomHeadsAttention(8, 2, 4, causal, 1, bias=2.0).double(), drawn(2, 19, 8)
    real = torch.ones(2, 19, dtype=torch.bool)
    real[0, :2] = False
    for scores in (2**20, 0):  # in one piece, and in several
        monkeypatch.setattr(mixer, "_SCORES", scores)
        y = part(x, Around(real))
        for b, t in ((0, 4), (1, 0), (1, 18)):
            seen = [s for s in range(19) if real[b, s] and (s <= t or not causal)]
            heads = []
            for m in range(2):
                q, k = part.queries.unflatten(0, (2, 4))[m], part.keys.unflatten(0, (2, 4))[m]
                w = q.T @ k + 2.0 * torch.diag(torch.tensor([1.0] * 8 + [0.0]))
                unit = functional.normalize(x[b], dim=-1)
                scores = [(extended(unit[t]) @ w @ extended(unit[s])).relu() for s in seen]
                values = [part.v_proj(x[b, s]).unflatten(0, (2, 4))[m] for s in seen]
                heads.append(sum(a * v for a, v in zip(scores, values, strict=True)) / len(seen))
            torch.testing.assert_close(y[b, t], part.o_proj(torch.cat(heads)))


def test_the_mixer_trains_values_alone_and_every_block_has_heads_of_its_own():
    model = build_model(
        "gpt2", hidden=32, blocks=2, heads=4, vocabulary=64, parts={"mixer": "random-feature-attention"}
    )
    first, second = (block.attn.part for block in model.transformer.h)
    assert {name for name, _ in first.named_parameters()} == {"v_proj.weight", "v_proj.bias", "o_proj.weight"}
    assert not torch.equal(first.queries, second.queries)
    w = torch.einsum("hrd,hre->hde", *(one.double().unflatten(0, (4, 8)) for one in (first.queries, first.keys)))
    assert float(w.var()) == pytest.approx(0.25, rel=0.2)


def test_what_cannot_be_fitted_is_refused():
    query, keys = examples(4)
    model = RandomHeadsRegression(3)
    for call, said in (
        (lambda: attention_features(query, keys[:, :0], random_heads(4, 3)), "at least one key"),
        (lambda: attention_features(query, keys * torch.nan, random_heads(4, 3)), "finite"),
        (lambda: model.fit(query[:1], keys[:1], torch.zeros(1)), "at least two"),
        (lambda: model.fit(query, keys, torch.zeros(3)), "at least two"),
        (lambda: model.predict(query, keys), "call fit first"),
    ):
        with pytest.raises(TransectError, match=said):
            call()
