"""FiRST: what routers decide, from what, and what is then neither computed nor cached nor trained."""

import pytest
import torch
from transformers import DynamicCache

import transect
from transect.anatomy import Anatomy
from transect.claims.catalog.first import fix_routers
from transect.conversion.catalog.first import decisions, set_thresholds
from transect.conversion.routed import parts_around
from transect.data import load
from transect.errors import TransectError
from transect.parts import insert
from transect.parts.catalog.first import First

from .models import assert_same_tensors, tiny

TOKENS = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(3))


def routed(name="llama", seed=0, layers=(1, 2), **settings):
    """A tiny model whose routers let some sequences pass and others not."""
    model = tiny(name)
    insert(model, "block", "first", layers=list(layers), settings={"prompt": 5, "start": 0.0, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in parts_around(Anatomy(model), First).values():
            part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * 5)
        set_thresholds(Anatomy(model), load(TOKENS, model), len(layers) / 6, True)
    return model


def rho_of(model, tokens):
    return torch.stack(decisions(Anatomy(model), load(tokens, model)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_with_probability_one_it_is_the_model_as_it_was(name):
    dense = tiny(name)(TOKENS).logits
    model = routed(name, start=100.0)
    for part in parts_around(Anatomy(model), First).values():
        part.weight.zero_()
        part.threshold.fill_(0.5)
    torch.testing.assert_close(model(TOKENS).logits, dense)
    for part in parts_around(Anatomy(model), First).values():
        part.train()
        part.gate = "soft"
    torch.testing.assert_close(model(TOKENS).logits, dense, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_first_positions_decide_alone_and_each_sequence_for_itself():
    model = routed()
    found = rho_of(model, TOKENS)
    runs = found > torch.stack([part.threshold for part in parts_around(Anatomy(model), First).values()])
    assert runs.any() and not runs.all() and (runs[:, :1] != runs).any()
    other = TOKENS.clone()
    other[:, 5:] = 7
    torch.testing.assert_close(rho_of(model, other), found)
    assert rho_of(model, TOKENS[:, :5]).shape[1] == 0  # too short to decide
    torch.testing.assert_close(model(TOKENS[:, :5]).logits, tiny("llama")(TOKENS[:, :5]).logits)
    together = model(TOKENS).logits
    for row in range(8):
        torch.testing.assert_close(model(TOKENS[row : row + 1]).logits[0], together[row], atol=1e-4, rtol=1e-4)
    padded = torch.cat([torch.zeros(8, 3, dtype=torch.long), TOKENS], dim=1)
    mask = (torch.arange(19) >= 3).long().expand(8, -1)
    positions = (torch.arange(19) - 3).clamp_min(0).expand(8, -1)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [2, 5, 9])
@torch.no_grad()
def test_token_by_token_is_all_at_once_and_only_what_runs_is_cached(first):
    model = routed()
    cache, whole = DynamicCache(config=model.config), model(TOKENS, use_cache=False).logits
    pieces = [model(piece, past_key_values=cache).logits for piece in TOKENS.split([first, 1, 4, 1, 10 - first], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
    parts = parts_around(Anatomy(model), First)
    for rho, (number, part) in zip(rho_of(model, TOKENS), parts.items(), strict=True):
        layer, runs = cache.layers[number], rho > part.threshold
        assert ((layer.places >= 0).sum(1) == 16 * runs).all() and not runs.all()
    skipping = DynamicCache(config=model.config)
    row = int((rho_of(model, TOKENS)[0] <= parts[1].threshold).nonzero()[0])
    model(TOKENS[row : row + 1], past_key_values=skipping)
    assert skipping.layers[1].keys.numel() == 0 and skipping.layers[1].get_seq_length() == 16


@pytest.mark.parametrize("gate", ["soft", "straight-through"])
def test_the_loss_reaches_the_routers_and_straight_through_computes_what_runs_later(gate):
    model = routed(gate=gate)
    expected = model(TOKENS).logits
    parts = list(parts_around(Anatomy(model), First).values())
    for part in parts:
        part.train()
    output = model(TOKENS, labels=TOKENS)
    if gate == "straight-through":
        torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    else:
        assert not torch.allclose(output.logits, expected, atol=1e-2)
    output.loss.backward()
    for part in parts:
        assert part.weight.grad.norm() > 1e-6 and part.bias.grad.norm() > 1e-7
        assert 0 < part.__dict__["auxiliary"].item() < 1


def test_routers_are_trained_then_low_rank_updates_and_a_share_is_skipped():
    model, before = tiny("llama"), tiny("llama").state_dict()
    at = {}

    def on_check(check):
        at[check.name] = {k: t.clone() for k, t in model.state_dict().items()}  # in the end, that of the last step

    options = dict(epochs=4, held_out=0.25, batch_size=2, on_check=on_check, lr=1e-2)
    made = transect.convert(model, "first", TOKENS, prompt=5, skip=1 / 6, **options)
    parts = parts_around(Anatomy(model), First)
    told = (rho_of(model, TOKENS[:6])[0] <= parts[1].threshold).double().mean()  # of what it was trained on
    assert made.outcome["told"] == {"share of the blocks with routers that the text skips": float(told)}
    assert list(parts) == [1]
    router, after = "model.layers.1.around.part.", model.state_dict()
    assert set(at["routers"]) - set(before) == {f"{router}{name}" for name in ("weight", "bias", "threshold")}
    for name, tensor in before.items():
        assert torch.equal(at["routers"][name], tensor), name
        matrix = ".layers." in name and tensor.ndim == 2
        assert torch.equal(after[name], tensor) != matrix, name
    for name in ("weight", "bias"):
        assert torch.equal(after[router + name], at["routers"][router + name])
    assert after[f"{router}weight"].norm() > 0 and parts[1].threshold != 0.5


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_without_a_penalty_the_routers_leave_the_loss_no_worse(penalty):
    model, found = tiny("llama"), {}
    texts = model.generate(TOKENS[:, :4], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)

    def on_check(check):
        found[check.name] = {k: t.clone() for k, t in model.state_dict().items()}

    options = dict(prompt=5, held_out=0.25, batch_size=2)
    transect.convert(model, "first", texts, penalty=penalty, epochs=3, lr=0.5, on_check=on_check, **options)
    routers = transect.convert(tiny("llama"), "first", texts, steps=0, **options).model
    routers.load_state_dict(found["routers"])
    with torch.no_grad():  # of what the model wrote itself, so that it needs its blocks
        base, loss = (one(texts, labels=texts).loss.item() for one in (tiny("llama"), routers))
    assert loss > base + 0.01 if penalty else loss <= base + 1e-6


@torch.no_grad()
def test_generation_that_skips_blocks_is_the_same_with_padding_and_any_cache():
    model = routed()
    prompts = TOKENS[:4, :12].clone()
    mask = torch.ones_like(prompts)
    mask[1, :3] = mask[2, :1] = 0
    asked = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    dynamic, static, without = (
        model.generate(prompts, attention_mask=mask, **asked, **way)
        for way in ({}, {"cache_implementation": "static"}, {"use_cache": False})
    )
    assert torch.equal(dynamic, without) and torch.equal(static, without)
    parts, skipped = list(parts_around(Anatomy(model), First).values()), []
    for row in range(4):
        alone = prompts[row : row + 1, 12 - int(mask[row].sum()) :]
        assert torch.equal(model.generate(alone, **asked)[0, -5:], dynamic[row, -5:])
        rho = rho_of(model, dynamic[row : row + 1, 12 - int(mask[row].sum()) :])[:, 0]
        skipped.append([bool(one <= part.threshold) for one, part in zip(rho, parts, strict=True)])
    assert any(map(any, skipped)) and not all(map(all, skipped))


@pytest.mark.parametrize("skipped", [(), (1,), (2,), (1, 2)])
@torch.no_grad()
def test_fixed_masks_of_the_claims_skip_each_of_their_blocks_and_no_other(skipped):
    model = routed()
    fix_routers(model, skipped)
    expected = [0.0 if number in skipped else 1.0 for number in (1, 2)]
    assert rho_of(model, TOKENS).round().mean(1).tolist() == expected


@pytest.mark.parametrize("each", [True, False])
@torch.no_grad()
def test_thresholds_skip_the_share_that_is_asked_for(each):
    model = routed(layers=[1])
    set_thresholds(Anatomy(model), load(TOKENS, model), 0.25, each)  # of three blocks: 6 of 8 sequences at the router
    part = parts_around(Anatomy(model), First)[1]
    assert int((rho_of(model, TOKENS)[0] <= part.threshold).sum()) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "0"}, "never skipped; layers are 1 to 1"), ({"layers": "1-2"}, "never skipped"),
        ({"skip": 0.5}, "more than the 1 that have routers"), ({"prompt": 16}, "longest sequence has 16"),
        ({"prompt": 0}, "prompt=0 must be"), ({"skip": 1 / 3}, "every text skips all 1 blocks"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_any_change(settings, message):
    model = tiny("llama")
    with pytest.raises(TransectError, match=message):
        transect.convert(model, "first", TOKENS, steps=0, **settings)
    assert_same_tensors(model, tiny("llama"))
