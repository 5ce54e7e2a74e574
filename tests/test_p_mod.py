"""p-MoD: which of the first tokens are processed, how they are weighed, and what the schedule says."""

import itertools
import math

import pytest
import torch
from transformers import DynamicCache

import transect
from transect.anatomy import Anatomy
from transect.conversion.catalog.p_mod import shares
from transect.conversion.routed import loss_behind, parts_around
from transect.errors import TransectError
from transect.forward import predictions, summed_loss
from transect.parts import Inside, insert
from transect.parts.catalog.p_mod import PMoD

from .models import assert_same_tensors, tiny

TOKENS = torch.randint(3, 64, (3, 14), generator=torch.Generator().manual_seed(3))
KEPT = {"keep": 0.55, "targets": 8}  # trunc(4.4) = 4


def routed(name="llama", layers=(1,), seed=None, **settings):
    model = tiny(name)
    insert(model, "block", "p-mod", layers=list(layers), settings={**KEPT, **settings})
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in parts_around(Anatomy(model), PMoD).values():
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator))
    return model


def test_the_schedule_is_the_paper_s():
    found = shares(32, "cosine", 0.5)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert found[:8] == [1.0] * 8 and found[8] == pytest.approx(0.844, abs=1e-3)
    assert found[23] == pytest.approx(0.156, abs=1e-3) and found[24:] == [0.15] * 8
    assert sum(found) / 32 == pytest.approx(0.5375, abs=1e-3)
    assert found[10] == pytest.approx(math.cos(math.pi * 10 / 31) / 2 + 0.5)
    assert shares(4, "linear", 0.5) == pytest.approx([1.0, 2 / 3, 1 / 3, 0.15])
    assert shares(4, "alternate", 0.3) == [1.0, 0.3, 1.0, 0.3] and shares(2, "constant", 0.3) == [0.3, 0.3]


@torch.no_grad()
def test_at_the_start_it_is_the_block_on_the_first_that_are_kept_and_the_others_stay():
    model, dense = routed(), tiny("llama")
    states = model(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(states[2][:, 4:8], states[1][:, 4:8])  # bit for bit; the first win where all are equal
    block, rotary = dense.model.layers[1], dense.model.rotary_emb
    place = torch.tensor([0, 1, 2, 3, *range(8, 14)])
    angles = rotary(states[1], position_ids=place[None])
    among = torch.full((10, 10), torch.finfo(torch.float32).min).triu(1)[None, None]
    alone = block(states[1][:, place], attention_mask=among, position_embeddings=angles)
    torch.testing.assert_close(states[2][:, place], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_skipped_tokens_do_not_reach_the_others():
    model = routed()
    x = torch.randn(1, 14, 32)
    angles = model.model.rotary_emb(x, position_ids=torch.arange(14)[None])
    other = x.clone()
    other[:, 4:8] = x[:, [7, 5, 4, 6]]
    y, z = (model.model.layers[1](one, position_embeddings=angles) for one in (x, other))
    kept = [0, 1, 2, 3, *range(8, 14)]
    assert torch.equal(y[:, kept], z[:, kept]) and not torch.equal(y, z)


@torch.no_grad()
def test_as_many_are_processed_and_cached_as_it_says_and_decoding_is_recomputing():
    model = routed(layers=(0, 1, 2), seed=0)
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 0
    mask[2, :7] = 0  # seven real ones: too few for eight targets
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    first = model(TOKENS, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for layer in cache.layers:
        assert (layer.places >= 0).sum(1).tolist() == [4 + 6, 4 + 3, 7]
    more = torch.tensor([[5, 9], [8, 7], [6, 4]])
    longer = torch.cat([mask, torch.ones_like(more)], dim=1)
    later = model(more, attention_mask=longer, position_ids=positions[:, -1:] + torch.tensor([[1, 2]]),
                  past_key_values=cache).logits  # fmt: skip
    together = torch.cat([TOKENS, more], dim=1)
    whole = model(together[:2], attention_mask=longer[:2], position_ids=(longer[:2].cumsum(1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(later[:2], whole[:, 14:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first[2, 7:], tiny("llama")(TOKENS[2:, 7:]).logits[0], atol=1e-4, rtol=1e-4)


def test_g_stays_within_its_bounds_and_reaches_them():
    part = PMoD(4)
    r = torch.tensor([[-1e30, -50.0, 0.0, 50.0, 1e30]])
    for dtype in (torch.float32, torch.bfloat16):
        g = part._gain(r.to(dtype), torch.ones(1, 5, dtype=torch.bool))
        assert g.float().min() == pytest.approx(0.8, abs=5e-3) and g.float().max() == pytest.approx(1.2, abs=5e-3)
        assert g[0, 2] == 1


@torch.no_grad()
def test_targets_whose_weights_are_alike_still_go_by_their_logits():
    """60 before 50 before 40, of which tanh makes the same 1."""
    part = PMoD(2, targets=4, keep=0.5).to(torch.bfloat16)
    part.weight.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(1, 5, 2, dtype=torch.bfloat16)
    x[0, :4, 0] = torch.tensor([40.0, 60.0, -50.0, 50.0])
    seen = {}

    def on(x, kept, g=None):
        seen.update(kept=kept, g=g)
        return x

    inside = Inside(lambda x: x, None, None, [], lambda: None, lambda x, real: x, on)
    part(x, inside)
    assert len(set(seen["g"][0, [0, 1, 3]].tolist())) == 1
    assert seen["kept"][0].tolist() == [False, True, False, True, True]


def test_skipped_targets_teach_the_router_only_where_they_are_weighed_too():
    found = {}
    for symmetric in (True, False):
        model = routed(layers=(0,), symmetric=symmetric)
        part = parts_around(Anatomy(model), PMoD)[0]
        gains = []
        own = part._gain

        def gain(r, target, own=own, gains=gains):
            g = own(r, target)
            g.retain_grad()
            gains.append(g)
            return g

        part._gain = gain
        loss_behind(8)(model, None, {"input_ids": TOKENS})[0].backward()
        found[symmetric] = gains[0].grad[:, 4:8].abs().max(), gains[0].grad[:, :4].abs().max()
    assert found[True][0] > 0 and found[True][1] > 0
    assert found[False][0] == 0 and found[False][1] > 0


@torch.no_grad()
def test_the_loss_is_of_what_is_behind_the_targets():
    model = tiny("llama")
    batch = {"input_ids": TOKENS}
    logits, labels = predictions(model, batch)
    summed, count = loss_behind(8)(model, None, batch)
    keep = torch.tensor([number >= 8 for _ in range(3) for number in range(13)])
    assert count == 15 and summed.item() == pytest.approx(summed_loss(logits[keep], labels[keep]).item(), rel=1e-5)
    assert loss_behind(0)(model, None, batch)[1] == 39


def test_what_a_change_costs_is_said_before_it():
    model = tiny("llama")
    with pytest.raises(TransectError, match="longest sequence has 14: choose a smaller targets"):
        transect.convert(model, "p-mod", TOKENS, steps=0)
    with pytest.raises(TransectError, match="no block is converted"):
        transect.convert(tiny("llama"), "p-mod", TOKENS, steps=0, targets=8, decay="alternate", mean=1.0)
    for nothing in ({"decay": "constant", "mean": 0.0}, {"layers": "2", "targets": 3}, {"mean": 0.0, "targets": 1}):
        with pytest.raises(TransectError, match="processes any of the targets"):
            transect.convert(model, "p-mod", TOKENS, steps=0, **{"targets": 8, **nothing})
    assert_same_tensors(model, tiny("llama"))
    found = transect.convert(tiny("llama"), "p-mod", TOKENS, steps=0, targets=3)  # trunc(0.15 * 3) = 0 in the last
    assert found.outcome["told"] == {"blocks that process none of the targets": 1.0}
    counts = {number: part.count for number, part in parts_around(Anatomy(found.model), PMoD).items()}
    assert counts == {1: 1, 2: 0}


@torch.no_grad()
def test_of_the_gates_only_tanh_starts_at_the_model():
    dense = tiny("llama")(TOKENS).logits
    torch.testing.assert_close(routed(keep=1.0).forward(TOKENS).logits, dense, atol=1e-5, rtol=1e-5)
    for gate in ("sigmoid", "softmax"):
        assert not torch.allclose(routed(keep=1.0, gate=gate)(TOKENS).logits, dense, atol=1e-2)
