"""Relaxed Recursive Transformers: what is shared, what corrections give back, and how it is stored."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy, record_of
from transect.conversion import Calibration, conversion_named
from transect.conversion.catalog.relaxed_recursive import correction, exit_loss, groups, source
from transect.errors import TransectError
from transect.evaluation import parameters
from transect.forward.early import early_predictions
from transect.operators import build, stored_bytes
from transect.operators.relaxed import Relaxed

from .models import assert_alike, assert_same_tensors, inputs, logits, saved_and_loaded, tiny

TOKENS = inputs("llama")["input_ids"]
OF_BLOCKS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def model_of(blocks=3, name="llama", seed=0):
    """A tiny model of so many different blocks."""
    model = tiny(name, seed)
    Anatomy(model).arrange([n % 3 for n in range(blocks)], tied=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in Anatomy(model).block_list.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def converted(blocks=6, name="llama", **settings):
    chosen, anatomy = conversion_named("relaxed-recursive"), Anatomy(model_of(blocks, name))
    chosen.function(anatomy, Calibration(), **settings)
    return anatomy.model


def weights(model, path):
    """The dense form of a matrix at every depth, in float64."""
    modules = [block.module.get_submodule(path) for block in Anatomy(model).blocks]
    return [(m.to_dense() if isinstance(m, Relaxed) else m.weight).detach().double() for m in modules]


def test_which_blocks_are_one_and_what_they_begin_as():
    assert groups(6, 2) == [[0, 3], [1, 4], [2, 5]] and groups(6, 3) == [[0, 2, 4], [1, 3, 5]]
    assert [source(i, 6, 2, "stepwise") for i in range(3)] == [0, 2, 5]  # the paper's layers 1, 3, 6
    assert [source(i, 6, 2, "lower") for i in range(3)] == [0, 1, 2]
    assert source(0, 6, 6, "stepwise") == 0


@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_at_full_rank_it_is_the_model_as_it_was(name, init):
    expected = logits(model_of(6, name), inputs(name))
    model = converted(name=name, init=init, rank=64)
    torch.testing.assert_close(logits(model, inputs(name)), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_shared_norms_keep_that_only_where_they_were_equal():
    equal = model_of(6)
    for block in equal.model.layers[3:]:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            index = block.self_attn.layer_idx - 3
            block.get_submodule(norm).weight.data = equal.model.layers[index].get_submodule(norm).weight.data.clone()
    expected = logits(equal, inputs("llama"))
    transect.convert(equal, "relaxed-recursive", rank=64, norms="shared")
    torch.testing.assert_close(logits(equal, inputs("llama")), expected, atol=1e-4, rtol=1e-4)
    other = logits(converted(rank=64, norms="shared"), inputs("llama"))
    assert not torch.allclose(other, logits(model_of(6), inputs("llama")), atol=1e-2)


def test_rank_zero_is_the_model_in_loops():
    """As many parameters as a model of the shared blocks, which it is, gone through twice."""
    model = converted(rank=0, init="lower", norms="shared")
    small = model_of(6)
    Anatomy(small).arrange([0, 1, 2])
    assert parameters(model) == parameters(small)
    Anatomy(small).arrange([0, 1, 2, 0, 1, 2])
    assert_alike(logits(model, inputs("llama")), logits(small, inputs("llama")))
    assert len({id(p) for p in model.model.layers.parameters()}) == len(list(small.model.layers.parameters()))


@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
def test_what_is_lost_is_what_the_singular_values_say(init):
    dense = model_of(6)
    shared = converted(rank=0, init=init)
    for path in OF_BLOCKS:
        before, base = weights(dense, path), weights(shared, path)
        residuals = [one - other for one, other in zip(before, base, strict=True)]
        if init == "average":
            for first in range(3):
                torch.testing.assert_close(residuals[first], -residuals[first + 3], atol=1e-6, rtol=1e-5)
        else:
            kept = [source(first, 6, 2, init) for first in range(3)]
            assert all(not residuals[number].any() for number in kept if number % 3 == kept.index(number))
        lost = []
        for rank in (1, 4, 8):
            after = weights(converted(rank=rank, init=init), path)
            for one, other, residual in zip(before, after, residuals, strict=True):
                values = torch.linalg.svdvals(residual)[rank:]
                torch.testing.assert_close((one - other).square().sum(), values.square().sum(), atol=1e-5, rtol=1e-4)
            lost.append(sum(float((one - other).square().sum()) for one, other in zip(before, after, strict=True)))
        assert lost[0] > lost[1] > lost[2]


def test_no_shared_matrix_is_nearer_than_the_mean():
    dense = model_of(6)
    for path in OF_BLOCKS:
        before = weights(dense, path)
        far = {
            init: sum(
                float((a - b).square().sum())
                for a, b in zip(before, weights(converted(rank=0, init=init), path), strict=True)
            )
            for init in ("average", "stepwise", "lower")
        }
        assert far["average"] < min(far["stepwise"], far["lower"])


def test_a_correction_of_nothing_begins_as_lora_does():
    draw = torch.Generator().manual_seed(0)
    for start, residual in (("svd", torch.zeros(5, 7)), ("zero", torch.randn(5, 7))):
        left, right = correction(residual, 3, start, draw)
        assert left.shape == (5, 3) and right.shape == (3, 7) and not left.any() and right.all()
    left, right = correction(torch.randn(5, 7), 99, "svd", draw)
    assert left.shape == (5, 5)  # no more than its smaller side


def test_the_cost_is_what_the_paper_says():
    width, neurons, rank = 32, 48, 2
    model, small = converted(rank=rank, norms="shared"), model_of(3)
    sides = [(width, width), (16, width), (16, width), (width, width), *[(width, neurons)] * 3]
    assert parameters(model) - parameters(small) == sum(6 * rank * (a + b) for a, b in sides)
    # Every matrix counts once, and each depth's correction.
    assert Anatomy(model).matrix_bytes() == 4 * sum(3 * a * b + 6 * rank * (a + b) for a, b in sides)
    operator = Anatomy(model).blocks[0].matrix("q").module
    assert operator.flops == 2 * (width * width + 2 * width * rank)
    assert stored_bytes(operator) == 4 * (width * width + 2 * width * rank)


def test_one_loop_changes_nothing():
    model = transect.convert(tiny("llama"), "relaxed-recursive", loops=1).model
    assert_same_tensors(model, tiny("llama"))
    assert not record_of(model)


def test_the_optimizer_sees_one_tensor_and_its_gradient_is_the_sum():
    model, copies = converted(rank=2), converted(rank=2)
    Anatomy(copies).untie()
    for one in (model, copies):
        one(TOKENS, labels=TOKENS).loss.backward()
    for path in ("self_attn.q_proj.matrix", "mlp.up_proj.matrix"):
        grads = [copies.model.layers[depth].get_submodule(path).weight.grad for depth in (1, 4)]
        torch.testing.assert_close(model.model.layers[1].get_submodule(path).weight.grad, sum(grads))
    # Seven matrices once for each of three blocks, and again for the six of the copies; at each of the six depths two
    # factors of each matrix and two norms; embedding, final norm and head.
    depths = 6 * (7 * 2 + 2) + 3
    assert [len(list(one.parameters())) for one in (model, copies)] == [3 * 7 + depths, 6 * 7 + depths]


@pytest.mark.parametrize("norms", ["shared", "own"])
def test_it_comes_back_with_a_cache_for_every_depth(norms, tmp_path):
    model = converted(rank=3, norms=norms)
    again = saved_and_loaded(model, "llama", tmp_path)
    assert len({id(p) for p in again.parameters()}) == len({id(p) for p in model.parameters()})
    assert len(again(TOKENS, use_cache=True).past_key_values.layers) == 6
    assert [norms == "own"] == list({"layernorm" not in "".join(record_of(again).tied)})


def test_training_goes_towards_the_model_as_it_was():
    found = transect.convert(
        model_of(6), "relaxed-recursive", inputs("llama", batch=8)["input_ids"], rank=4, steps=20, lr=3e-3,
        held_out=0.25, batch_size=2,
    )  # fmt: skip
    assert found.outcome["loss_after"] < found.outcome["loss_converted"]
    one, other = (Anatomy(found.model).blocks[depth].matrix("q").module for depth in (0, 3))
    assert one.matrix.weight is other.matrix.weight and one.correction.left.weight is not other.correction.left.weight


def test_the_operator_is_rebuilt_and_cut():
    operator = Anatomy(converted(rank=3)).blocks[0].matrix("up").module
    twin = build(operator.describe())
    twin.load_state_dict(operator.state_dict())
    x = torch.randn(3, 32)
    assert_alike(twin(x), operator(x))
    assert_alike(operator(x), x @ operator.to_dense().T)
    rows, columns = torch.tensor([4, 0, 7]), torch.tensor([1, 6])
    assert_alike(operator.select(rows, columns).to_dense(), operator.to_dense()[rows][:, columns])


def test_an_encoder_too():
    model = transect.convert(tiny("vit"), "relaxed-recursive", loops=3, rank=64, norms="own").model
    assert_alike(logits(model, inputs("vit")), logits(tiny("vit"), inputs("vit")))


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (lambda: tiny("llama"), {"loops": 2}, "3 blocks are not 2 equal loops; loops can be 1, 3"),
        (lambda: tiny("mixtral"), {"loops": 3}, "mixture of experts"),
        (lambda: transect.compress(tiny("llama"), "svd", keep=0.7), {"loops": 3}, "convert first"),
        (lambda: converted(rank=0), {"loops": 2}, "share parameters already"),
        (lambda: converted(rank=2), {"init": "mean"}, "average"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_change(made, options, message):
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TransectError, match=message):
        transect.convert(model, "relaxed-recursive", **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shared_weights_are_not_compressed(tmp_path):
    with pytest.raises(TransectError, match="holds the same tensor as"):
        transect.compress(converted(rank=2), "svd", keep=0.5)
    model = converted(rank=2)
    model.save_pretrained(tmp_path)
    assert_alike(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path), inputs("llama")), logits(model, inputs("llama"))
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_what_a_loop_says_already_is_read_by_the_same_head(name):
    model, batch = converted(name=name, rank=2), inputs(name)
    (early,), final, labels = early_predictions(Anatomy(model), batch, [2])
    assert_alike(final, logits(model, batch)[:, :-1].flatten(0, 1))
    half = converted(name=name, rank=2)
    Anatomy(half).arrange([0, 1, 2])
    assert_alike(early, logits(half, batch)[:, :-1].flatten(0, 1))
    assert torch.equal(labels, batch["input_ids"][:, 1:].flatten())


def apart(model, data):
    """KL(p_last || p_first) of a model of two loops, summed over the positions."""
    (early,), final, _ = early_predictions(Anatomy(model), {"input_ids": data}, [2])
    return (final.softmax(-1) * (final.log_softmax(-1) - early.log_softmax(-1))).sum()


def test_loops_learn_to_say_what_the_last_one_says():
    """By the loss of the second stage: with a weight they come nearer than without, the target itself stands still."""
    data, found = inputs("llama", batch=4)["input_ids"], {}
    for weight in (0.0, 1.0):
        model = converted(rank=4)
        lowered = exit_loss(2, weight)
        value, count = lowered(model, None, {"input_ids": data})
        own = model(data, labels=data).loss * count
        torch.testing.assert_close(value, own + weight * apart(model, data), atol=1e-3, rtol=1e-4)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            (lowered(model, None, {"input_ids": data})[0] / count).backward()
            optimizer.step()
        found[weight] = float(apart(model, data))
    assert found[1.0] < found[0.0]


def test_exits_are_trained_in_a_second_stage_of_models_with_a_head():
    found = transect.convert(
        model_of(6), "relaxed-recursive", inputs("llama", batch=8)["input_ids"], rank=4, steps=4, held_out=0.25,
        batch_size=2, early_exit=0.1,
    )  # fmt: skip
    assert [(one["name"], one["steps"]) for one in found.outcome["stages"]] == [("uptraining", 2), ("early-exit", 2)]
    with pytest.raises(TransectError, match="next token"):
        transect.convert(tiny("vit"), "relaxed-recursive", loops=3, early_exit=0.1)


def test_what_the_exits_learned_is_kept_though_the_last_loop_alone_gets_worse():
    data = inputs("llama", batch=8)["input_ids"]
    options = dict(rank=4, lr=1e-2, epochs=6, held_out=0.25, batch_size=2, every=8)
    before = transect.convert(model_of(6), "relaxed-recursive", data, steps=8, **options).model
    found = transect.convert(model_of(6), "relaxed-recursive", data, steps=16, early_exit=10.0, **options)
    after = dict(found.model.named_parameters())
    blocks = {name: p for name, p in before.named_parameters() if ".layers." in name}
    assert all(not torch.equal(parameter, after[name]) for name, parameter in blocks.items())
    held_out = data[-2:]
    with torch.no_grad():
        assert 2 * apart(found.model, held_out) < apart(before, held_out)
        assert found.model(held_out, labels=held_out).loss > before(held_out, labels=held_out).loss
    course = found.outcome["stages"][1]
    assert course["best"] < course["before"]  # of the loss with exits
