"""Similarities along the residual stream and heads' contributions, against brute force on every architecture."""

import copy

import pytest
import torch

from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.forward import run_body
from transect.statistics import (
    BlockSimilarity,
    FeatureNorm,
    FisherDiagonal,
    HeadContribution,
    InputCovariance,
    InputMean,
    OutputGradientCovariance,
    SequenceMagnitude,
    SublayerSimilarity,
    Trace,
    collect,
    key_of,
)
from transect.statistics.kinds import clip_norms

from .models import CONFIGS, VOCABULARY, inputs, tiny

BLOCK, SUBLAYER, HEAD, NEURON = BlockSimilarity(), SublayerSimilarity(), HeadContribution(), SequenceMagnitude()
ALL = [BLOCK, SUBLAYER, HEAD, NEURON]
POST_NORM = ["bert", "roberta"]
PRE_NORM = [name for name in CONFIGS if name not in POST_NORM]


def batches(name, count=2):
    return [inputs(name, batch=2, seed=seed, dtype=torch.float64) for seed in range(count)]


def stream(model, index, data):
    """The residual stream before and after a block (positions x d), over all batches."""
    seen = []

    def listen(module, args, kwargs, output):
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen.append((before, output[0] if isinstance(output, tuple) else output))

    handle = Anatomy(model).blocks[index].module.register_forward_hook(listen, with_kwargs=True)
    with torch.no_grad():
        for batch in data:
            run_body(model, batch)
    handle.remove()
    return tuple(torch.cat([pair[i].flatten(0, 1) for pair in seen]) for i in (0, 1))


def cosine(x, y):
    return ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()


def serial_neox():
    """GPT-NeoX's blocks one sublayer after the other, by its config."""
    model = tiny("gpt_neox", dtype=torch.float64)
    model.config.use_parallel_residual = False
    for block in Anatomy(model).blocks:
        block.module.use_parallel_residual = False
    return model


@pytest.mark.parametrize("name", [*PRE_NORM, "serial gpt_neox"])
def test_similarities_equal_those_of_the_model_with_a_sublayer_taken_out(name):
    model = serial_neox() if name.startswith("serial") else tiny(name, dtype=torch.float64)
    data = batches(name.removeprefix("serial "))
    store, parallel = collect(Anatomy(model), data, ALL), Anatomy(model).blocks[0].parallel
    assert not any(module._forward_hooks for module in model.modules())
    for index in range(3):
        without = {}
        for unit in ("attention", "mlp"):
            reduced = copy.deepcopy(model)
            getattr(Anatomy(reduced).blocks[index], unit).drop()
            without[unit] = stream(reduced, index, data)[1]
        before, after = stream(model, index, data)
        attention = cosine(before, without["mlp"])
        # A parallel block's MLP starts from the block's input, a serial one's from what attention has added to it.
        mlp = cosine(before, without["attention"]) if parallel else cosine(without["mlp"], after)
        key = f"blocks.{index}"
        torch.testing.assert_close(store.value(key, SUBLAYER), torch.stack([attention, mlp]), rtol=0, atol=1e-10)
        torch.testing.assert_close(store.value(key, BLOCK), cosine(before, after), rtol=0, atol=1e-10)
        assert float(store.value(key, SUBLAYER).abs().max()) <= 1


@pytest.mark.parametrize("name", POST_NORM)
def test_norms_after_the_residual_sum_leave_only_the_similarity_of_blocks(name):
    model, data = tiny(name, dtype=torch.float64), batches(name)
    store = collect(Anatomy(model), data, ALL)
    torch.testing.assert_close(store.value("blocks.1", BLOCK), cosine(*stream(model, 1, data)), rtol=0, atol=1e-10)
    with pytest.raises(TransectError, match="not collected"):
        store.value("blocks.1", SUBLAYER)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_head_contributions_equal_the_output_matrix_run_on_one_head_at_a_time(name):
    model, data = tiny(name, dtype=torch.float64), batches(name)
    anatomy = Anatomy(model)
    store = collect(anatomy, data, ALL)
    for block in anatomy.blocks:
        o, size = block.attention.o, block.attention.head_size
        means, seen = [], []
        handle = o.host.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
        with torch.no_grad():
            for batch in data:
                run_body(model, batch)
            handle.remove()
            for x, whole in seen:
                x, whole = x.reshape(2, -1, x.shape[-1]), whole.reshape(2, -1, whole.shape[-1])
                added = []
                for head in range(block.attention.heads):
                    alone = torch.zeros_like(x)
                    alone[..., head * size : (head + 1) * size] = x[..., head * size : (head + 1) * size]
                    added.append(o.host(alone) - (0 if o.bias is None else o.bias))
                total = sum(added) + (0 if o.bias is None else o.bias)
                torch.testing.assert_close(total, whole)
                means += torch.stack([part.abs().sum(-1).mean(1) for part in added], -1)  # (heads) of each sequence
        got = store.value(key_of(o, HEAD), HEAD)
        torch.testing.assert_close(got, torch.stack(means).mean(0).repeat_interleave(size), rtol=1e-9, atol=1e-12)
        assert (block.attention.q.name, HEAD) not in store and (got > 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "gemma3", "olmo2", "bert"])
def test_padding_does_not_count(name):
    model = tiny(name, dtype=torch.float64)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    padded = collect(Anatomy(model), [{"input_ids": ids, "attention_mask": mask}], ALL).state()
    apart = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :7]}]
    apart = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in apart]
    expected = collect(Anatomy(model), apart, ALL).state()
    assert padded.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(padded[key], value, rtol=1e-8, atol=1e-10)


def test_every_sequence_counts_alike_however_long_it_is():
    """Neuron scores are means over sequences of means over positions; padding alone is no sequence."""
    model = tiny("llama", dtype=torch.float64)
    down = Anatomy(model).blocks[1].mlp.down
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 3:], mask[2] = 0, 0
    seen = []
    handle = down.module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    expected = torch.stack([seen[0][0].abs().mean(0), seen[0][1, :3].abs().mean(0)]).mean(0)
    store = collect(Anatomy(model), [{"input_ids": ids, "attention_mask": mask}], [NEURON])
    torch.testing.assert_close(store.value(key_of(down, NEURON), NEURON), expected)


def test_neither_the_order_nor_the_split_into_batches_matters():
    model = tiny("llama", dtype=torch.float64)
    ids = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(3))
    whole = collect(Anatomy(model), [{"input_ids": ids}], ALL)
    parts = [{"input_ids": ids[[4, 1, 0]]}, {"input_ids": ids[[2]]}, {"input_ids": ids[[5, 3]]}]
    merged = collect(Anatomy(model), parts[:1], ALL).merge(collect(Anatomy(model), parts[1:], ALL))
    for store in (collect(Anatomy(model), parts, ALL), merged):
        for key, value in whole.state().items():
            torch.testing.assert_close(store.state()[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PRE_NORM)
def test_what_adds_nothing_has_similarity_1(name):
    """Dropped, or with a zero output matrix; in float32 and never above 1."""
    model = tiny(name)
    blocks = Anatomy(model).blocks
    blocks[0].attention.drop()
    blocks[1].mlp.drop()
    for block, matrix in ((1, blocks[1].attention.o), (2, blocks[2].mlp.down)):
        assert matrix.block.index == block
        matrix.write(torch.zeros(matrix.shape), None if matrix.bias is None else torch.zeros(matrix.shape[0]))
    data = [inputs(name)]
    store = collect(Anatomy(model), data, ALL)
    values = torch.stack([store.value(f"blocks.{index}", SUBLAYER) for index in range(3)])
    still = torch.tensor([[True, False], [True, True], [False, True]])
    torch.testing.assert_close(values[still], torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (values <= 1).all() and (values[~still] < 1 - 1e-4).all()
    torch.testing.assert_close(store.value("blocks.1", BLOCK), torch.tensor(1.0).double(), rtol=0, atol=1e-6)


def test_half_precision_neither_overflows_nor_changes_the_order_of_magnitude():
    model = tiny("llama")
    exact = collect(Anatomy(model), [inputs("llama")], ALL)
    half = collect(Anatomy(tiny("llama", dtype=torch.bfloat16)), [inputs("llama")], ALL)
    for statistic, key in ((BLOCK, "blocks.1"), (SUBLAYER, "blocks.1"), (HEAD, "blocks.1.attention.o")):
        torch.testing.assert_close(half.value(key, statistic), exact.value(key, statistic), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_are_taken_in_a_wider_type(dtype):
    """Activations of 807, whose square float16 cannot hold, and gradients whose products with them it cannot either."""
    generator = torch.Generator().manual_seed(0)
    x = (807 * torch.randn(2, 64, 8, generator=generator).sign()).to(dtype)
    g = (30 * torch.randn(2, 64, 6, generator=generator)).to(dtype)
    g[0, 0] = 3e4
    weight = (200 * torch.randn(6, 8, generator=generator)).to(dtype)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :20] = False
    x[1, :20], g[1, :20] = torch.nan, torch.inf  # what padding holds does not matter at all
    trace = Trace(x, 40 * x, 39 * x, 40 * x, False)
    updates = {
        InputCovariance(): (x, mask), InputMean(): (x, mask), FeatureNorm(1): (x, mask), FeatureNorm(2): (x, mask),
        FeatureNorm(4): (x, mask), OutputGradientCovariance(): (g, mask, True),
        OutputGradientCovariance(0.125, (0.1, 10)): (g, mask, True), FisherDiagonal(): (x, g, mask),
        BLOCK: (trace, mask), SUBLAYER: (trace, mask), HEAD: (x, mask, weight, 4),
    }  # fmt: skip

    def wide(value):
        if isinstance(value, Trace):
            return Trace(*(getattr(value, part).double() for part in ("before", "after", "attention", "mlp")), False)
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    for statistic, given in updates.items():
        sums, expected = (statistic.zeros(6, 8, torch.float64, torch.device("cpu")) for _ in range(2))
        statistic.update(sums, *given)
        statistic.update(expected, *map(wide, given))
        got, exact = statistic.value(sums), statistic.value(expected)
        assert torch.isfinite(got).all() and exact.abs().max() > 0, statistic
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()), msg=str(statistic))


def test_positions_without_a_gradient_do_not_count_in_the_mean_that_clips():
    g = torch.zeros(2, 8, 3)
    g[0, :3, 0] = torch.tensor([1.0, 2.0, 300.0])  # the mean of the three is 101: one and two rise to 10.1
    g[1, 5, 1] = 4.0
    clipped = clip_norms(g, None, 0.1, 2)
    torch.testing.assert_close(clipped[0, :, 0], torch.tensor([10.1, 10.1, 202, 0, 0, 0, 0, 0]))
    assert torch.equal(clipped[1], g[1])


def test_ends_are_trimmed_from_each_sequence_and_not_from_the_row():
    statistic = OutputGradientCovariance(trim=0.25)
    g = torch.arange(1.0, 9)[None, :, None].expand(2, -1, 2)
    mask = torch.tensor([[1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]).bool()
    sums = statistic.zeros(2, 2, torch.float64, torch.device("cpu"))
    statistic.update(sums, g, mask, True)
    assert float(sums["count"]) == 4 + 2
    assert float(sums["gram.0"][0, 0]) == 3**2 + 4**2 + 5**2 + 6**2 + 6**2 + 7**2
