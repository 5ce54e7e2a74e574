"""LLaVA-MoLE: experts by token, the choice that an MLP's projections share, the balance, PEFT and the Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from tests.models import assert_alike, inputs, logits, tiny
from transect.adaptation import adapter_named
from transect.adaptation.catalog.mole import MoleConfig, MoleLayer
from transect.adaptation.catalog.mole.layer import all_by_probability, one_of_each
from transect.adaptation.catalog.mole.routing import Choice, Mlp, Sums, balance
from transect.errors import OutOfReach, TransectError

TARGETS = {
    "llama": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "bert": ["query", "intermediate.dense", "output.dense"],
}
MLP = {"llama": TARGETS["llama"][2:], "gpt2": TARGETS["gpt2"][1:]}


def adapted(
    name: str = "llama", dtype: torch.dtype = torch.float64, targets: Any = None, started: bool = True, **settings: Any
) -> Any:
    """A model with the adapter; with `started`, its B matrices and routers are as if it had been trained a while."""
    model = tiny(name, dtype=dtype)
    config = MoleConfig(target_modules=targets or TARGETS[name], **{"rank": 2, "dropout": 0.0, **settings})
    made = get_peft_model(model, config)
    return stirred(made) if started else made


def stirred(model: Any, scale: float = 0.3) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mole_B" in name or "mole_router" in name:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def layers(model: Any) -> dict[str, MoleLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, MoleLayer)}


def mlps(model: Any) -> list[Mlp]:
    return list(dict.fromkeys(layer.place.mlp for layer in layers(model).values() if layer.place))


def routers(model: Any) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "mole_router" in name]


def loss_of(model: Any, name: str = "llama", **more: Any) -> torch.Tensor:
    batch = inputs(name) | more
    return model(**batch, labels=batch["input_ids"]).loss


def choice_of(experts: list[int], probabilities: torch.Tensor) -> Choice:
    return Choice(probabilities, torch.tensor(experts), lambda: None, set())  # type: ignore[arg-type]


# What the experts compute


def problem(tokens: int = 11, experts: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Choice]:
    torch.manual_seed(0)
    shapes = [(tokens, 6), (experts, 2, 6), (experts, 5, 2), (tokens, experts)]
    x, down, up, scores = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, down, up, choice_of(scores.argmax(-1).tolist(), scores.softmax(-1))


def by_force(x, down, up, weights):
    """Every expert of every token, weighed: (n, E) -> (n, d_out)."""
    return torch.einsum("ne,eor,eri,ni->no", weights, up, down, x)


@pytest.mark.parametrize("experts", [2, 3, 30])
def test_gathered_tokens_give_what_all_experts_and_a_one_hot_choice_give(experts):
    x, down, up, choice = problem(experts=experts)
    expected = by_force(x, down, up, functional.one_hot(choice.experts, experts).to(x))
    found = one_of_each(x, down, up, choice)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    pull = torch.randn_like(found)
    for one, other in zip(
        *(torch.autograd.grad((y * pull).sum(), (x, down, up)) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_soft_mixture_is_the_weighed_sum():
    x, down, up, choice = problem()
    torch.testing.assert_close(
        all_by_probability(x, down, up, choice), by_force(x, down, up, choice.probabilities), rtol=0, atol=1e-12
    )  # fmt: skip


def test_an_expert_without_tokens_gets_no_gradient():
    x, down, up, _ = problem()
    choice = choice_of([0, 2] * 5 + [2], torch.ones(11, 3) / 3)
    one_of_each(x, down, up, choice).square().sum().backward()
    for factor in (down, up):
        assert factor.grad[1].count_nonzero() == 0 and all(factor.grad[e].count_nonzero() for e in (0, 2))


def test_no_tokens_and_any_leading_shape():
    layer = layers(adapted())["base_model.model.model.layers.0.mlp.gate_proj"]
    up, down = (layers_of for layers_of in layer.place.mlp.layers[1:])
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 32, dtype=torch.float64)

    def mlp(given):
        return down(functional.silu(layer(given)) * up(given))

    whole = mlp(x)
    assert whole.shape == x.shape and mlp(x[:0]).shape == (0, 3, 4, 32)
    torch.testing.assert_close(mlp(x.view(-1, 32)), whole.view(-1, 32))
    torch.testing.assert_close(mlp(x[1, 2, 3]), whole[1, 2, 3])
    mlp(x)
    torch.testing.assert_close(mlp(x), whole)  # the very same tensor again


# The model


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("settings", [{}, {"soft": True}, {"gate_scale": True}])
def test_at_the_start_nothing_is_changed_whatever_the_router(name, settings):
    model = adapted(name, torch.float32, started=False, **settings)
    with torch.no_grad():
        for router in routers(model):
            router.normal_()
    assert torch.equal(logits(model, inputs(name)), logits(tiny(name), inputs(name)))
    assert len({int(e) for mlp in mlps(model) for e in mlp.sums("default").chosen.sum(0).nonzero()}) > 1
    with torch.no_grad():
        stirred(model)
    assert not torch.allclose(logits(model, inputs(name)), logits(tiny(name), inputs(name)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_expert_is_lora(name):
    """The same A and steps of the same optimizer."""
    ours = adapted(name, experts=1, alpha=6, started=False)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", lora_dropout=0.0
    )  # fmt: skip
    lora = get_peft_model(tiny(name, dtype=torch.float64), config)
    theirs = dict(lora.named_modules())
    with torch.no_grad():
        for path, layer in layers(ours).items():
            theirs[path].lora_A["default"].weight.copy_(layer.mole_A["default"][0])
    for model in (ours, lora):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(4):
            loss_of(model, name).backward()
            optimizer.step()
            optimizer.zero_grad()
    found, expected = logits(ours, inputs(name)), logits(lora, inputs(name))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected - logits(tiny(name, dtype=torch.float64), inputs(name))).abs().max() > 0.01
    assert MoleLayer.penalty_of(ours) is None


def test_attention_has_one_update_of_the_same_rank():
    model = adapted()
    for path, layer in layers(model).items():
        assert layer.mole_A["default"].shape[:2] == ((3, 2) if ".mlp." in path else (1, 2))


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_projections_of_an_mlp_share_one_choice_that_its_input_decides(name, monkeypatch):
    model, taken, read = adapted(name), [], []
    take, choose = Mlp.take, Mlp.choose

    def noted(self, adapter, layer):
        choice = take(self, adapter, layer)
        taken.append((self, layer, choice.experts))
        return choice

    monkeypatch.setattr(Mlp, "take", noted)
    monkeypatch.setattr(Mlp, "choose", lambda self, adapter, x: read.append((self, x)) or choose(self, adapter, x))
    logits(model, inputs(name))
    projections = 3 if name == "llama" else 2
    assert len(read) == 3 and len(taken) == 3 * projections  # three MLPs
    for (mlp, x), *uses in zip(read, *(taken[number::projections] for number in range(projections)), strict=True):
        owner = mlp.owner("default")
        scores = x @ owner.mole_router_weight["default"].T + owner.mole_router_bias["default"]
        assert {use[0] for use in uses} == {mlp} and len({use[1] for use in uses}) == projections
        for _, _, experts in uses:
            assert torch.equal(experts, scores.argmax(-1).flatten())
    assert not any(mlp.choices for mlp in mlps(model))  # and nothing is kept


def test_with_equal_scores_the_first_expert_is_taken():
    model = adapted()
    with torch.no_grad():
        for router in routers(model):
            router.zero_()
    logits(model, inputs("llama"))
    assert all(shares.tolist() == [1, 0, 0] for shares in MoleLayer.shares_of(model).values())


# What trains the router


@pytest.mark.parametrize(("settings", "learns"), [({}, False), ({"soft": True}, True), ({"gate_scale": True}, True)])
def test_whether_the_loss_trains_the_router(settings, learns):
    model = adapted(**settings)
    loss_of(model).backward()
    moved = [router.grad is not None and bool(router.grad.count_nonzero()) for router in routers(model)]
    assert len(moved) == 6 and all(one is learns for one in moved)
    model.zero_grad()
    loss_of(model)
    MoleLayer.penalty_of(model).backward()
    assert all(router.grad.count_nonzero() for router in routers(model))


def test_gate_scale_multiplies_the_update_by_the_probability_of_the_chosen_expert():
    plain, scaled = (
        layers(adapted(gate_scale=scale))["base_model.model.model.layers.0.mlp.gate_proj"] for scale in (False, True)
    )
    x = torch.randn(7, 32, dtype=torch.float64)
    scores = functional.linear(x, plain.mole_router_weight["default"], plain.mole_router_bias["default"])
    base = plain.base_layer(x)
    expected = base + (plain(x) - base) * scores.softmax(-1).max(-1, keepdim=True).values
    torch.testing.assert_close(scaled(x), expected)


def use(probabilities: list[list[float]], chosen: list[list[float]], tokens: list[int]) -> Sums:
    return Sums(torch.tensor(probabilities, requires_grad=True), torch.tensor(chosen), torch.tensor(tokens))


@pytest.mark.parametrize("pooled", [False, True])
def test_the_balance_of_known_uses(pooled):
    uniform = use([[2.0] * 4, [1.0] * 4], [[2.0] * 4, [1.0] * 4], [8, 4])
    assert balance([uniform, uniform], pooled).item() == pytest.approx(1 / 4)
    collapsed = use([[5.0, 0], [3.0, 0]], [[5.0, 0], [3.0, 0]], [5, 3])
    assert balance([collapsed], pooled).item() == pytest.approx(1)
    other = use([[0, 5.0], [0, 3.0]], [[0, 5.0], [0, 3.0]], [5, 3])
    assert balance([collapsed, other], pooled).item() == pytest.approx(0.5 if pooled else 1)


def test_the_balance_is_of_a_layer_or_of_a_sequence():
    """Two sequences that take different experts are even together and uneven one by one; padding is no sequence."""
    apart = use([[4.0, 0], [0, 4.0], [0, 0]], [[4.0, 0], [0, 4.0], [0, 0]], [4, 4, 0])
    assert balance([apart]).item() == pytest.approx(0.5) and balance([apart], pooled=True).item() == pytest.approx(1)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_penalty_is_the_weight_times_the_balance_of_the_tokens(pooled):
    model, batch = adapted(balance=0.5, pooled=pooled), inputs("llama")
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 7:] = 0
    seen: dict[Mlp, torch.Tensor] = {}
    for layer in layers(model).values():
        if layer.mole_router_weight:
            layer.register_forward_pre_hook(lambda layer, x: seen.__setitem__(layer.place.mlp, x[0].detach()))
    model(**batch, attention_mask=mask)
    shares, means = [], []
    for mlp, x in seen.items():
        owner = mlp.owner("default")
        scores = functional.linear(x, owner.mole_router_weight["default"], owner.mole_router_bias["default"])
        shares.append(functional.one_hot(scores.argmax(-1), 3).double()), means.append(scores.softmax(-1))
    if pooled:
        rows = [[torch.cat([one[row, :stop] for one in every]).mean(0) for every in (shares, means)]
                for row, stop in ((0, 12), (1, 7))]  # fmt: skip
    else:
        rows = [[one[mask == 1].mean(0) for one in both] for both in zip(shares, means, strict=True)]
    expected = 0.5 * sum((c * p).sum() for c, p in rows) / len(rows)
    penalty = MoleLayer.penalty_of(model)
    assert penalty.ndim == 0
    torch.testing.assert_close(penalty, expected)
    for path, found in MoleLayer.shares_of(model).items():
        (x,) = (x for mlp, x in seen.items() if mlp.path == path)
        assert x.shape[0] == 2 and found.sum().item() == pytest.approx(1)
    penalty.backward()
    assert all(router.grad.count_nonzero() for router in routers(model))


@pytest.mark.parametrize("positional", [False, True])
def test_padding_changes_neither_the_penalty_nor_other_tokens(positional):
    model, batch = adapted(), inputs("llama", batch=1)
    ids = batch["input_ids"]
    expected, penalty = model(input_ids=ids).logits, MoleLayer.penalty_of(model)
    padded, mask = torch.cat([ids, ids[:, :5]], 1), torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :5])], 1)
    found = (
        model.base_model.model(padded, mask) if positional else model(input_ids=padded, attention_mask=mask)
    ).logits
    torch.testing.assert_close(found[:, :12], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(MoleLayer.penalty_of(model), penalty, rtol=0, atol=1e-12)
    model(input_ids=padded)
    assert abs(MoleLayer.penalty_of(model) - penalty) > 1e-8


def test_without_a_weight_or_a_forward_pass():
    assert MoleLayer.penalty_of(adapted(balance=0)) is None
    model = adapted()
    with pytest.raises(TransectError, match="forward pass of the whole model"):
        MoleLayer.penalty_of(model)
    logits(model, inputs("llama"))
    with pytest.raises(TransectError, match="kept no gradient"):
        MoleLayer.penalty_of(model)
    with torch.no_grad():
        assert MoleLayer.penalty_of(model) > 0
    with model.disable_adapter():
        assert MoleLayer.penalty_of(model) is None


# Gradient checkpointing, generation, failure


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    (loss_of(model) + MoleLayer.penalty_of(model)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing_and_keeps_nothing():
    expected = gradients(adapted())
    model = adapted()
    model.gradient_checkpointing_enable()
    for _ in range(2):
        found = gradients(model)
        assert found.keys() == expected.keys() and len(found) > 20
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)
        assert not any(mlp.choices for mlp in mlps(model))
        model.zero_grad()


def test_the_older_checkpointing_cannot_have_a_penalty():
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TransectError, match="use_reentrant"):
        gradients(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache(name):
    model, batch = adapted(name), inputs(name)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached, anew = (model.generate(**batch, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.shape == (2, 18) and torch.equal(cached, anew)
    assert not torch.equal(cached, tiny(name, dtype=torch.float64).generate(**batch, **options))


def test_a_pass_that_fails_leaves_nothing_behind():
    model, batch, other = adapted(), inputs("llama"), inputs("llama", seed=5)
    expected = logits(adapted(), other)
    up = dict(layers(model))["base_model.model.model.layers.1.mlp.up_proj"]
    hook = up.base_layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, batch)
    hook.remove()
    assert torch.equal(logits(model, other), expected)
    assert not mlps(model)[0].watch.running


def test_a_copy_after_a_forward_pass_stands_by_itself():
    model = adapted()
    loss_of(model)
    other = copy.deepcopy(model)
    assert set(mlps(other)).isdisjoint(mlps(model)) and mlps(other)[0].watch is not mlps(model)[0].watch
    with torch.no_grad():
        for router in routers(other):
            router.mul_(-1)
    expected = logits(adapted(), inputs("llama"))
    assert not torch.allclose(logits(other, inputs("llama")), expected)
    assert torch.equal(logits(model, inputs("llama")), expected)
    assert other.base_model.unload()._forward_pre_hooks == {} and len(model.base_model.model._forward_pre_hooks) == 1


# PEFT


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_and_loaded(tmp_path, name, lean):
    model = adapted(name, torch.float32, gate_scale=True, alpha=3.0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(name), tmp_path, low_cpu_mem_usage=lean)
    assert torch.equal(logits(again, inputs(name)), logits(model, inputs(name)))
    assert again.peft_config["default"].gate_scale and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("lean", [False, True])
def test_in_bfloat16_the_router_keeps_32_bits(tmp_path, lean):
    model = adapted(dtype=torch.bfloat16)
    loss_of(model)
    assert MoleLayer.penalty_of(model).dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama", dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=lean)
    for one, other in zip(routers(again), routers(model), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
    config = MoleConfig(target_modules=TARGETS["llama"], rank=2)
    plain = get_peft_model(tiny("llama", dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {router.dtype for router in routers(plain)} == {torch.float32}
    assert layers(plain).popitem()[1].mole_A["default"].dtype == torch.bfloat16


def test_autocast_does_not_reach_the_router():
    model, batch = adapted(dtype=torch.float32), inputs("llama")
    first = mlps(model)[0]
    x = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first.choose("default", x).probabilities, adapted_choice(x))
        assert torch.isfinite(loss_of(model, attention_mask=torch.ones_like(batch["input_ids"])))
        assert MoleLayer.penalty_of(model).dtype == torch.float32


def adapted_choice(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return mlps(adapted(dtype=torch.float32))[0].choose("default", x).probabilities


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mixture_refuses_to_be_merged_before_anything_is_changed(name):
    model, batch = adapted(name), inputs(name)
    before = logits(model, batch)
    layer = next(layer for layer in layers(model).values() if layer.place)
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge, layer.get_delta_weight):
        with pytest.raises(TransectError, match="3 experts cannot be merged"):
            merge("default") if merge == layer.get_delta_weight else merge()
    assert torch.equal(logits(model, batch), before) and not any(one.merged for one in layers(model).values())
    assert_alike(logits(model.unload(), batch), logits(tiny(name, dtype=torch.float64), batch))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_expert_can_be_merged_and_taken_back(name):
    model, batch = adapted(name, experts=1), inputs(name)
    expected = logits(model, batch)
    model.merge_adapter()
    assert_alike(logits(model, batch), expected)
    model.unmerge_adapter()
    assert_alike(logits(model, batch), expected)
    assert_alike(logits(model.merge_and_unload(), batch), expected)


def test_several_adapters():
    batch = inputs("llama")
    one, other = adapted(), adapted(experts=2, targets=["up_proj", "down_proj", "o_proj"])
    expected = [logits(one, batch), logits(other, batch)]
    one.add_adapter("b", MoleConfig(target_modules=["up_proj", "down_proj", "o_proj"], experts=2, rank=2, dropout=0.0))
    assert torch.equal(logits(one, batch), expected[0])
    held, given = one.state_dict(), other.state_dict()
    with torch.no_grad():
        for key, value in given.items():
            if key.endswith(".default"):
                held[key.removesuffix("default") + "b"].copy_(value)
    one.set_adapter("b")
    torch.testing.assert_close(logits(one, batch), expected[1])
    loss_of(one), loss_of(other)
    torch.testing.assert_close(MoleLayer.penalty_of(one, "b"), MoleLayer.penalty_of(other))
    assert MoleLayer.penalty_of(one, "default") is None  # not at work
    assert len(one.base_model.model._forward_pre_hooks) == 1
    with one.disable_adapter():
        assert torch.equal(logits(one, batch), logits(tiny("llama", dtype=torch.float64), batch))
    one.base_model.set_adapter(["default", "b"])
    both = logits(one, batch)
    assert not torch.allclose(both, expected[0]) and not torch.allclose(both, expected[1])
    one.delete_adapter("default")
    torch.testing.assert_close(logits(one, batch), expected[1])


def test_two_steps_of_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Balanced(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            penalty = MoleLayer.penalty_of(model)
            assert penalty is not None
            loss = loss + penalty / self.args.gradient_accumulation_steps
            return (loss, outputs) if return_outputs else loss

    model = adapted(dtype=torch.float32, balance=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in inputs("llama", batch=4)["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    Balanced(model, arguments, train_dataset=rows).train()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is not ("mole_" in name), name


# How many numbers, and what is refused


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize(("experts", "rank"), [(1, 4), (2, 1), (3, 5)])
def test_the_number_of_trained_numbers(name, experts, rank):
    model = tiny(name)
    paths = [path for path, _ in model.named_modules() if path.endswith(tuple(f".{one}" for one in TARGETS[name]))]
    found = adapter_named("mole").trained_in(model, paths, {"experts": experts, "rank": rank})
    made = get_peft_model(model, adapter_named("mole").config(paths, {"experts": experts, "rank": rank}))
    assert found == sum(p.numel() for p in made.parameters() if p.requires_grad)
    if name == "llama":  # D = 32, f = 48, and k and v of 16
        attention = rank * (32 + 32 + 32 + 16)
        routers = experts * (32 + 1) if experts > 1 else 0
        assert found == 3 * (experts * rank * (3 * 32 + 3 * 48) + routers + attention)


def test_the_rank_for_a_number_of_trained_numbers():
    model, mole, lora = tiny("llama"), adapter_named("mole"), adapter_named("lora")
    paths = [path for path, _ in model.named_modules() if path.endswith("_proj")]
    rank = mole.size_in(model, paths, 20_000, {"experts": 2})
    counts = [mole.trained_in(model, paths, {"experts": 2, "rank": one}) for one in (rank, rank + 1)]
    assert counts[0] <= 20_000 < counts[1]
    assert mole.trained_in(model, paths, {"rank": 17}) is None  # v has 16 rows
    with pytest.raises(OutOfReach, match="at the least"):
        mole.size_in(model, paths, 100, {})
    assert lora.size_in(model, paths, 20_000, {}) == lora.size_for(
        [(32, 32)] * 6 + [(16, 32)] * 6 + [(48, 32)] * 9, 20_000
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"experts": 0}, "experts must be at least 1, got 0"), ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"), ({"dropout": 1.0}, "dropout must be"),
        ({"balance": -1.0}, "balance must be"), ({"soft": True, "gate_scale": True}, "leave gate_scale out"),
        ({"reads": ["up_proj"]}, "go together"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(settings, said):
    with pytest.raises(TransectError, match=said):
        MoleConfig(target_modules=["up_proj"], **settings)


@pytest.mark.parametrize(
    ("targets", "settings", "said"),
    [
        (["q_proj"], {}, "plain LoRA"), (["down_proj"], {}, "target those, too"),
        (["v_proj", "up_proj"], {"rank": 17}, "rank 17 is above what a 16 x 32 weight"),
        (["up_proj", "down_proj"], {"reads": ["fc1"], "writes": ["fc2"]}, "no MLP whose projections are known"),
    ],
)  # fmt: skip
def test_targets_that_do_not_go(targets, settings, said):
    model = tiny("llama")
    with pytest.raises(TransectError, match=said):
        get_peft_model(model, MoleConfig(target_modules=targets, **{"rank": 2, **settings}))
    assert not layers(model) and not model._forward_pre_hooks  # it is as it was


class Block(nn.Module):
    """A model that no architecture description is of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.second(self.first(x).relu()))


def test_projections_that_are_named():
    with pytest.raises(TransectError, match="reads="):
        get_peft_model(Block(), MoleConfig(target_modules=["first", "second"], rank=2))
    config = MoleConfig(target_modules=["first", "second", "head"], rank=2, reads=["first"], writes=["second"])
    model = stirred(get_peft_model(Block(), config))
    x = torch.randn(5, 6)
    y = model(x)
    assert len(mlps(model)) == 1 and layers(model)["base_model.model.head"].place is None
    assert MoleLayer.penalty_of(model).requires_grad and y.shape == (5, 4)
    config = MoleConfig(target_modules=["first", "second"], rank=2, reads=["second"], writes=["first"])
    with pytest.raises(TransectError, match="is called before"):
        get_peft_model(Block(), config)(x)
