"""MatFormer: slices of MLPs as MLPs of their own, their training, and what is cut out."""

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.conversion import conversion_named
from transect.conversion.catalog.matformer import narrowed
from transect.conversion.catalog.matformer.cut import noted_widths
from transect.conversion.catalog.matformer.order import importances
from transect.conversion.catalog.matformer.widths import mixture, neurons_of, shares_of
from transect.conversion.repair import repair
from transect.data import load
from transect.data.split import split
from transect.errors import TransectError
from transect.forward import at_rest
from transect.training import Machine, Run, Schedule, State

from .models import CAUSAL, VOCABULARY, assert_alike, assert_same_tensors, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(5))
ALL = shares_of("1/8,1/4,1/2,1", whole=True)


def own_loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("name", [*CAUSAL, "bert", "vit"])
def test_a_narrowed_model_is_the_one_that_is_cut_and_the_whole_is_untouched(name):
    """Biases included, that of down whole; bit for bit at full width, and as before behind the `with`."""
    model, batch = tiny(name), inputs(name)
    anatomy, whole = Anatomy(model), logits(model, batch)
    with narrowed(anatomy, neurons_of(anatomy, Fraction(1))):
        assert torch.equal(logits(model, batch), whole)
    for share in ALL[:-1]:
        widths = neurons_of(anatomy, share)
        with narrowed(anatomy, widths):
            inside = logits(model, batch)
        smaller = tiny(name)
        for block, width in zip(Anatomy(smaller).blocks, widths, strict=True):
            block.mlp.keep(range(width))
        torch.testing.assert_close(inside, logits(smaller, batch), atol=1e-6 * float(whole.abs().max()), rtol=1e-5)
    assert torch.equal(logits(model, batch), whole)
    assert_same_tensors(model, tiny(name))


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_a_slice_is_the_formula(name):
    """W_out[:, :m] act(W_in[:m] x + b_in[:m]) + b_out, and with a gate its first m rows."""
    model = tiny(name)
    anatomy, x = Anatomy(model), torch.randn(2, 5, 32)
    mlp = anatomy.blocks[1].mlp
    m = mlp.neurons // 4

    def first(matrix):
        return functional.linear(x, matrix.weight[:m], None if matrix.bias is None else matrix.bias[:m])

    hidden = first(mlp.up) if mlp.gate is None else first(mlp.gate)
    hidden = mlp.activation(hidden) * (1 if mlp.gate is None else first(mlp.up))
    expected = functional.linear(hidden, mlp.down.weight[:, :m], mlp.down.bias)
    with narrowed(anatomy, neurons_of(anatomy, Fraction(1, 4))), torch.no_grad():
        torch.testing.assert_close(anatomy.blocks[1].module.mlp(x), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_what_is_left_out_is_neither_read_nor_trained(name):
    """Also the joint gradient of a neuron is the sum of those of the widths that have it."""
    model = tiny(name)
    anatomy = Anatomy(model)
    widths = [neurons_of(anatomy, share) for share in ALL]

    def gradients(chosen):
        model.zero_grad()
        for one in chosen:
            with narrowed(anatomy, one):
                loss = own_loss(model, DATA)
            loss.backward()
        mlp = anatomy.blocks[1].mlp
        found = {}
        for role in ("gate", "up", "down"):
            matrix = getattr(mlp, role)
            if matrix is not None:
                kept, module = matrix.module.weight.data, matrix.module
                module.weight.data = module.weight.grad  # to read it as the matrix is read
                found[role] = matrix.weight.clone()
                module.weight.data = kept
        return found

    m = widths[1][1]
    small = gradients([widths[1]])
    for role, gradient in small.items():
        rows = gradient if role != "down" else gradient.T
        assert not rows[m:].any() and rows[:m].any(dim=1).all()
    joint, alone = gradients(widths), [gradients([one]) for one in widths]
    for role, gradient in joint.items():
        torch.testing.assert_close(gradient, sum(one[role] for one in alone), atol=1e-6, rtol=1e-4)
    with narrowed(anatomy, widths[1]):
        before = logits(model, {"input_ids": DATA})
        for block in anatomy.blocks:
            for role in small:
                matrix = getattr(block.mlp, role)
                weight, bias = matrix.weight.clone(), None if matrix.bias is None else matrix.bias.clone()
                (weight if role != "down" else weight.T)[m:] = 7.0
                if bias is not None and role != "down":
                    bias[m:] = 7.0
                matrix.write(weight, bias)
        assert torch.equal(logits(model, {"input_ids": DATA}), before)


@pytest.mark.parametrize(
    ("name", "neurons", "numbers"), [("llama", 48, 3 * 32), ("gpt2", 128, 2 * 32 + 1)]
)  # fmt: skip
def test_it_multiplies_slices_and_the_formula_counts_them(name, neurons, numbers):
    """numbers: of a neuron, with a gate and without; a bias is not multiplied."""
    model = tiny(name)
    anatomy = Anatomy(model)

    def flops(widths):
        with narrowed(anatomy, widths), FlopCounterMode(display=False) as counted, torch.no_grad():
            model(DATA[:1])
        return counted.get_total_flops()

    widths = [neurons // 8, neurons // 4, neurons]
    less = 3 * neurons - sum(widths)
    whole, mixed = flops([neurons] * 3), flops(widths)
    assert whole - mixed == 2 * 16 * (numbers // 32 * 32) * less
    cut = transect.convert(copy.deepcopy(model), "matformer-cut", width="1/8,1/4,1", untrained=True).model
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        cut(DATA[:1])
    assert counted.get_total_flops() == mixed
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in cut.parameters()) == numbers * less


def test_the_context_is_of_one_model_ends_after_an_error_and_nests():
    one, other = Anatomy(tiny("gpt2")), Anatomy(tiny("gpt2"))
    batch = {"input_ids": DATA}
    whole = logits(one.model, batch)
    small, large = neurons_of(one, Fraction(1, 8)), neurons_of(one, Fraction(1, 2))
    with pytest.raises(RuntimeError, match="broken"), narrowed(one, small):
        assert not torch.equal(logits(one.model, batch), whole) and torch.equal(logits(other.model, batch), whole)
        raise RuntimeError("broken")
    assert torch.equal(logits(one.model, batch), whole)
    with narrowed(one, large):
        expected = logits(one.model, batch)
        with narrowed(one, small), narrowed(one, [128] * 3):
            assert torch.equal(logits(one.model, batch), whole)
        assert torch.equal(logits(one.model, batch), expected)
    with pytest.raises(TransectError, match="each from 1 to the block's neurons"), narrowed(one, [0, 1, 1]):
        pass
    assert not any("forward" in module.__dict__ for module in one.model.modules())


def test_neurons_stand_in_order_of_what_they_add():
    model = transect.convert(tiny("gpt2"), "matformer", DATA, steps=0).model
    assert_alike(logits(model, {"input_ids": DATA}), logits(tiny("gpt2"), {"input_ids": DATA}))
    for found in importances(Anatomy(model), load(DATA, model)):
        assert (found[:-8] >= found[8:] * 0.9).all() and found[0] > 1.2 * found[-1]


@pytest.mark.parametrize("way", ["sampled", "joint"])
def test_training_makes_the_small_widths_better_and_leaves_a_plain_model(way, tmp_path):
    made = transect.convert(tiny("llama"), "matformer", DATA, way=way, epochs=12, lr=1e-2, batch_size=2)
    model, plain = made.model, transect.convert(tiny("llama"), "matformer", DATA, steps=0).model

    def loss(one, share):
        anatomy = Anatomy(one)
        with narrowed(anatomy, neurons_of(anatomy, share)), torch.no_grad():
            return float(own_loss(one, DATA))

    for share in ALL:
        assert loss(model, share) < loss(plain, share)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert noted_widths(Anatomy(model)) == ALL
    model.save_pretrained(tmp_path / "nested")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nested")
    assert again.config.to_dict().get("intermediate_size") == 48 and noted_widths(Anatomy(again)) == ALL
    cut = transect.convert(again, "matformer-cut", width="1/4").model
    with torch.no_grad():
        assert float(own_loss(cut, DATA)) == pytest.approx(loss(model, Fraction(1, 4)), abs=1e-5)
    cut.save_pretrained(tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert again.config.intermediate_size == 12
    assert_alike(logits(again, {"input_ids": DATA}), logits(cut, {"input_ids": DATA}))
    with pytest.raises(TransectError, match="does not note that its MLPs are nested"):
        transect.convert(again, "matformer-cut", width="1/2")


def staged(model, given, steps, schedule=None, **changes):
    """The model after the conversion's own stage, with these changes of it, in place; the last state is kept."""
    (stage,) = conversion_named("matformer").training(
        {"widths": "1/8,1/4,1/2,1", "way": "sampled", "odds": "", **given}
    )
    training, held_out = split(load(DATA, model), 0.1, 2, 0)
    run = Run(schedule or Schedule(lr=1e-3, epochs=steps, steps=steps), Machine(), State(None))
    with at_rest(model, frozen=True):
        repair(Anatomy(model), None, [replace(stage, keeps="last", **changes)], run, training, held_out)
    return model


@pytest.mark.parametrize("given", [{"widths": "1"}, {"odds": "0,0,0,1"}])
def test_with_one_width_or_no_odds_for_the_others_it_is_ordinary_training(given):
    """Bit for bit that of the same stage without contexts."""
    nested = staged(tiny("gpt2"), given, 3)
    assert_same_tensors(nested, staged(tiny("gpt2"), {}, 3, within=None))
    assert furthest(nested, staged(tiny("gpt2"), {}, 3)) > 1e-4


def furthest(one, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_joint_step_goes_along_the_sum_of_the_gradients_of_all_widths():
    model, by_hand = tiny("llama"), tiny("llama")
    plain = Schedule(
        lr=0.5, steps=1, warm_up=0.0, shape="constant", optimizer="sgd", options={"momentum": 0.0}, shuffle=False
    )  # fmt: skip
    staged(model, {"way": "joint"}, 1, plain, clip=None)
    anatomy = Anatomy(by_hand)
    first = next(iter(split(load(DATA, by_hand), 0.1, 2, 0)[0]))["input_ids"]
    for share in ALL:
        with narrowed(anatomy, neurons_of(anatomy, share)):
            own_loss(by_hand, first).backward()
    with torch.no_grad():
        for parameter in anatomy.block_list.parameters():
            parameter -= 0.5 * parameter.grad
    assert furthest(model, by_hand) < 1e-6 < 1e-3 < furthest(model, tiny("llama"))


def test_mixtures_rise_with_depth_within_the_budget_and_equal_ones_are_the_trained_widths():
    anatomy = Anatomy(tiny("llama"))
    for budget in (0.125, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0):
        shares = mixture(anatomy, ALL, budget)
        assert shares == sorted(shares) and sum(shares) <= Fraction(str(budget)) * 3 and len(set(shares)) <= 2
        if len(set(shares)) == 2 or shares[0] < 1:  # one more block of the wider one would be too much
            place, wider = shares.count(shares[0]) - 1, ALL[ALL.index(shares[0]) + 1]
            assert sum(shares) - shares[place] + wider > Fraction(str(budget)) * 3
    model = tiny("llama")
    for share in ("1/8", "1/2"):
        fixed = transect.convert(copy.deepcopy(model), "matformer-cut", width=share, untrained=True).model
        mixed = transect.convert(
            copy.deepcopy(model), "matformer-cut", width=",".join([share] * 3), untrained=True
        ).model
        budgeted = transect.convert(
            copy.deepcopy(model), "matformer-cut", budget=float(Fraction(share)), untrained=True
        ).model
        assert_same_tensors(mixed, fixed)
        assert_same_tensors(budgeted, fixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": "1/2"}, "the last be 1"), ({"widths": "1/2,1/4,1"}, "should rise"),
        ({"widths": "a"}, "written like"),
        ({"widths": "1/7,1"}, "no whole number"), ({"odds": "1,2"}, "4 numbers of at least 0"),
        ({"widths": "0,1"}, "above 0"), ({"train": "lora", "data": DATA}, "low-rank updates do not have"),
        ({"data": None}, "runs the model on text"),
        ({"method": "matformer-cut"}, "does not note that its MLPs are nested"),
        ({"method": "matformer-cut", "untrained": True, "width": "1/2,1/4"}, "one share, or 3"),
        ({"method": "matformer-cut", "untrained": True, "budget": 0.1}, "less than the smallest"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_change(options, message):
    model = tiny("llama")
    chosen = {"method": "matformer", "data": DATA, **options}
    with pytest.raises(TransectError, match=message):
        transect.convert(model, chosen.pop("method"), **chosen)
    assert_same_tensors(model, tiny("llama"))


def test_widths_that_were_not_trained_and_mlps_that_are_none_are_refused():
    model = transect.convert(tiny("llama"), "matformer", DATA, steps=0, widths="1/4,1").model
    with pytest.raises(TransectError, match="1/2 was not trained, those are 1/4, 1"):
        transect.convert(model, "matformer-cut", width="1/2")
    with pytest.raises(TransectError, match="a mixture of experts"):
        transect.convert(tiny("mixtral"), "matformer", DATA)
    small = transect.compress(tiny("llama"), "svd", keep=0.7)
    with pytest.raises(TransectError, match="nest the dense model"):
        transect.convert(small, "matformer", DATA)
