"""Gamma-MoD: the rank of attention maps, which tokens are processed, and the one router of all blocks."""

import copy

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.conversion.routed import loss_behind, parts_around
from transect.data import Batches, Specimen
from transect.errors import TransectError
from transect.forward.attention_rank import attention_ranks, maps_below, ranks_of
from transect.parts import insert
from transect.parts.catalog.gamma_mod import GammaMoD
from transect.probes import drawings, run_probes

from .models import assert_same_tensors, inputs, tiny

TOKENS = torch.randint(3, 64, (3, 15), generator=torch.Generator().manual_seed(3))


def routed(name="llama", layers=(0, 1), **settings):
    model = tiny(name)
    given = {"routable": 10, "start": 0.0, **settings}
    insert(model, "block", "gamma-mod", layers=list(layers), settings=given)
    return model, parts_around(Anatomy(model), GammaMoD)


def trained(parts):
    for part in parts.values():
        part.train()


def test_ranks_of_known_maps():
    causal = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    first = torch.zeros(6, 6)
    first[:, 0] = 1
    maps = torch.stack([causal, first, torch.eye(6)])
    ranks, effective = ranks_of(maps_below(maps[:, None]))
    assert ranks.tolist() == [5, 1, 0] and effective[1:].tolist() == [pytest.approx(1), 0]
    whole, turned = (ranks_of(maps_below(some[None]))[0].item() for some in (maps, maps[[2, 0, 1]]))
    assert whole == pytest.approx(2) == turned
    padded = torch.zeros(9, 9)
    padded[3:, 3:] = causal
    padded[:3, :3] = torch.rand(3, 3)  # what padding looks at does not count
    real = torch.arange(9) >= 3
    assert ranks_of(maps_below(padded[None, None], real[None]))[0].item() == 5


def test_of_long_texts_the_beginning_of_some_is_looked_at(monkeypatch):
    rows = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr("transect.forward.attention_rank.LENGTH", 7)
    for module in ("transect.forward.attention_rank", "transect.probes.catalog.arank"):
        monkeypatch.setattr(f"{module}.SEQUENCES", 3)
    expected = attention_ranks(Anatomy(tiny("llama")), [{"input_ids": rows[:3, :7]}]).tolist()
    batches = [{"input_ids": part} for part in rows.split(2)]
    assert attention_ranks(Anatomy(tiny("llama")), batches).tolist() == pytest.approx(expected)
    one = Specimen(Anatomy(tiny("llama")), data=Batches(batches))
    found = run_probes(one, {"arank": {}})["arank"]
    assert found["rank"].tolist() == pytest.approx(expected) and "of at most 6" in found.findings[0]


def test_the_probe_and_the_conversion_see_the_same_ranks():
    model, batch = tiny("llama"), inputs("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions
    expected = [torch.linalg.matrix_rank(one.float().tril(-1)).float().mean().item() for one in maps]
    one = Specimen(Anatomy(tiny("llama")), data=Batches([batch]))
    result = run_probes(one, {"arank": {}})["arank"]
    assert result["rank"].tolist() == pytest.approx(expected)
    assert (result["effective"] > 0).all() and (result["effective"] <= result["rank"] + 1e-4).all()
    assert result.findings and result.caveats and len(drawings(result)) == 1
    rows = [{"input_ids": row[None]} for row in batch["input_ids"]]
    assert attention_ranks(one.anatomy, rows).tolist() == pytest.approx(expected)
    found = transect.convert(
        tiny("llama"), "gamma-mod", batch["input_ids"].repeat(4, 1), steps=0, routable=6, lowest=1, layers="0-2"
    )
    assert list(parts_around(Anatomy(found.model), GammaMoD)) == [int(torch.tensor(expected).argmin())]


@torch.no_grad()
def test_with_nothing_left_out_the_mlp_is_multiplied_by_p():
    model, parts = routed(skip=0.0)
    dense = tiny("llama")
    router = parts[0].bank
    for number in (0, 1):
        block, held = dense.model.layers[number], {}
        block.register_forward_pre_hook(lambda _, given, held=held, block=block: held.update(
            p=torch.softmax(router(block.input_layernorm(given[0])), -1)[..., 1:]))  # fmt: skip
        block.mlp.register_forward_hook(lambda _, __, out, held=held: out * held["p"])
    expected = dense(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    trained(parts)
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    sure, parts = routed(skip=0.0, start=100.0)
    trained(parts)
    torch.testing.assert_close(sure(TOKENS).logits, tiny("llama")(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("routable", "skip", "kept"), [(10, 0.5, 5), (10, 0.3, 7), (7, 0.5, 4), (10, 0.1, 9), (10, 0.9, 1)]
)
@torch.no_grad()
def test_whole_numbers_are_kept_the_others_stay_and_protected_ones_always_go(routable, skip, kept):
    model, parts = routed(routable=routable, skip=skip)
    for seed in range(3):
        parts[0].bank.weight.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)) * 3)
        trained(parts)
        states = model(TOKENS, output_hidden_states=True).hidden_states
        for number in (0, 1):
            same = (states[number] == states[number + 1]).all(-1)
            assert (~same[:, :routable]).sum(1).tolist() == [kept] * 3 and not same[:, routable:].any()


def test_one_router_gathers_the_gradients_of_all_blocks_and_of_both_losses(tmp_path):
    model, parts = routed()
    router = parts[0].bank
    assert parts[1].bank is router and sum(p.numel() for part in parts.values() for p in part.parameters()) == 2 * 33
    trained(parts)
    summed, count = loss_behind(10)(model, None, {"input_ids": TOKENS})
    assert count == 12
    own = torch.autograd.grad(summed, router.weight, retain_graph=True)[0]
    assert own.norm() > 0
    each = [
        torch.autograd.grad(part.__dict__["auxiliary"], router.weight, retain_graph=True)[0] for part in parts.values()
    ]
    both = torch.autograd.grad(sum(part.__dict__["auxiliary"] for part in parts.values()), router.weight)[0]
    assert each[0].norm() > 0 and each[1].norm() > 0
    torch.testing.assert_close(both, each[0] + each[1])
    apart, others = routed()  # the same numbers, but a router for each block: what one router gets is their sum
    others[0].bank.load_state_dict(router.state_dict())
    others[1].__dict__["bank"] = copy.deepcopy(others[0].bank)
    trained(others)
    alone, _ = loss_behind(10)(apart, None, {"input_ids": TOKENS})
    parted = torch.autograd.grad(alone, [part.bank.weight for part in others.values()])
    assert others[0].bank is not others[1].bank and all(one.norm() > 0 for one in parted)
    torch.testing.assert_close(own, parted[0] + parted[1])
    model.eval()
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = parts_around(Anatomy(again), GammaMoD)
    assert found[0].bank is found[1].bank and torch.equal(found[1].bank.weight, router.weight)
    Anatomy(again).drop_block(0)
    left = parts_around(Anatomy(again), GammaMoD)
    assert list(left) == [0] and left[0].owns_bank and torch.equal(left[0].bank.weight, router.weight)


def test_the_router_s_loss_is_none_where_it_tells_them_apart():
    kept = torch.tensor([1, 0, 1])
    apart = torch.stack([torch.where(kept == 1, -30.0, 30.0), torch.where(kept == 1, 30.0, -30.0)], dim=1)
    assert functional.cross_entropy(apart, kept).item() < 1e-6
    model, parts = routed(layers=(1,), skip=0.0)
    trained(parts)
    with torch.no_grad():
        parts[1].bank.bias.copy_(torch.tensor([-50.0, 50.0]))  # everything is kept, and it is sure of that
    model(TOKENS)
    assert parts[1].__dict__["auxiliary"].item() < 1e-6


@torch.no_grad()
def test_the_part_s_own_loss_is_none_where_its_router_tells_kept_from_left_out():
    tokens = torch.arange(3, 18)[None]  # different ones, so that some router takes any five of the ten
    model, parts = routed(layers=(0,), skip=0.5)
    trained(parts)
    block, router = model.model.layers[0], parts[0].bank
    h = block.input_layernorm(model.model.embed_tokens(tokens))[0]
    wanted = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1])
    states = model(tokens, output_hidden_states=True).hidden_states
    assert parts[0].__dict__["auxiliary"] > 0.1
    router.bias.zero_()
    router.weight[0] = 0
    router.weight[1] = torch.linalg.lstsq(h, 60.0 * wanted - 30).solution
    states = model(tokens, output_hidden_states=True).hidden_states
    assert ((states[0] != states[1]).any(-1)[0] == wanted.bool()).all()
    assert parts[0].__dict__["auxiliary"] < 1e-6


@torch.no_grad()
def test_linear_operations_go_with_the_tokens_kept_exactly():
    def linear(model):
        with FlopCounterMode(display=False, depth=None) as counted:
            model(TOKENS)
        return sum(
            sum(found.values()) for name, found in counted.get_flop_counts().items()
            if name.endswith((".layers.1.mlp", ".layers.1.self_attn.q_proj", ".layers.1.self_attn.o_proj"))
        )  # fmt: skip

    model, parts = routed(layers=(1,))
    trained(parts)
    assert linear(model) * 15 == linear(tiny("llama")) * (15 - 5)


@pytest.mark.parametrize("choose", ["threshold", "top"])
@torch.no_grad()
def test_after_training_tokens_go_by_threshold_or_by_rank_also_token_by_token(choose):
    model, parts = routed(choose=choose, threshold=0.5)
    parts[0].bank.weight.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)) * 3)
    states = model(TOKENS, output_hidden_states=True).hidden_states
    left = (states[0] == states[1]).all(-1)
    assert left.any() and not left[:, 10:].any()
    if choose == "top":
        assert left.sum(1).tolist() == [5, 5, 5]
    whole = model(TOKENS, use_cache=False).logits
    first = model(TOKENS[:, :11])
    later = model(TOKENS[:, 11:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, later], dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"threshold": 0.5}, {"threshold": 0.5, "later": 0.5}, {"choose": "top"}], ids=["all", "later", "top"]
)
@torch.no_grad()
def test_generation_that_leaves_tokens_out_is_the_same_with_padding_and_any_cache(settings):
    model, parts = routed(**settings)
    parts[0].bank.weight.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)) * 3)
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = mask[2, :1] = 0
    asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    dynamic, static, without = (
        model.generate(TOKENS, attention_mask=mask, **asked, **way)
        for way in ({}, {"cache_implementation": "static"}, {"use_cache": False})
    )
    assert torch.equal(dynamic, without) and torch.equal(static, without)
    left = []
    for row in range(3):
        real = int(mask[row].sum())
        assert torch.equal(model.generate(TOKENS[row : row + 1, 15 - real :], **asked)[0, -6:], dynamic[row, -6:])
        states = model(dynamic[row : row + 1, 15 - real :], output_hidden_states=True).hidden_states
        left.append((states[0] == states[1]).all(-1)[0])
    assert all(one[:10].any() and not one.all() for one in left)
    assert any(bool(one[-7:-1].any()) for one in left) == ("later" in settings)  # those that were generated, and read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "1", "routable": 6, "skip": 1.0}, "leaves out all 6 routable"),
        ({"layers": "1", "routable": 6, "threshold": 1.0}, "above threshold=1"),
        ({}, "no block is converted"), ({"layers": "1", "lowest": 2, "routable": 6}, "lowest=2 of 1 blocks"),
        ({"layers": "1", "routable": 15}, "longest sequence has 15"),
        ({"layers": "1", "skip": 1.5}, "skip=1.5 must be"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_any_change(settings, message):
    model = tiny("llama")
    with pytest.raises(TransectError, match=message):
        transect.convert(model, "gamma-mod", TOKENS, steps=0, **settings)
    assert_same_tensors(model, tiny("llama"))


def test_a_part_that_keeps_no_routable_token_is_refused():
    for settings in ({"skip": 1.0}, {"threshold": 1.0}):
        with pytest.raises(TransectError, match="gamma-mod: "):
            routed(**settings)
    routed(choose="top", threshold=1.0)  # by rank, the threshold is not asked
