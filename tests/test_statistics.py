import sys

import pytest
import torch

from transect.anatomy import Anatomy
from transect.errors import BadData, TransectError
from transect.forward import predictions, summed_loss
from transect.statistics import (
    BlockSimilarity,
    FeatureNorm,
    FisherDiagonal,
    InputCovariance,
    InputMean,
    OutputGradientCovariance,
    Statistics,
    collect,
    key_of,
)
from transect.statistics.collect import parts_for_gradients
from transect.statistics.gram import add_gram_, gram_zeros, symmetric

from .models import CONFIGS, MOE_CONFIGS, inputs, tiny

EVERYTHING = [
    InputCovariance(), InputMean(), FeatureNorm(1), FeatureNorm(2), OutputGradientCovariance(), FisherDiagonal(),
    BlockSimilarity(),
]  # fmt: skip


def batches(name, count=3, **kwargs):
    made = [inputs(name, batch=2, seed=seed, dtype=torch.float64, **kwargs) for seed in range(count)]
    if CONFIGS[name][1].__name__ == "AutoModelForMaskedLM":
        for batch in made:
            batch["labels"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.5, batch["input_ids"], -100)
            batch["labels"][:, 0] = batch["input_ids"][:, 0]
    return made


def gradients_by_example(model, matrix, batch):
    """Per-example weight gradients (d_out x d_in) by plain autograd, one example at a time."""
    found = []
    for i in range(2):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        model.zero_grad()
        summed_loss(*predictions(model, one)).backward()
        gradient = matrix.module.weight.grad
        if type(matrix.module).__name__ == "Conv1D":
            gradient = gradient.T
        rows = matrix.rows()
        found.append(gradient if rows is None else gradient[rows])
    return torch.stack(found)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_all_statistics_against_brute_force(name):
    """Every architecture: hooks on plain modules, per-example autograd, and one pass collecting everything agree."""
    model, data = tiny(name, dtype=torch.float64), batches(name)
    anatomy = Anatomy(model)
    store = collect(anatomy, data, EVERYTHING)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    rounding = 1e-4 if name == "gptj" else 1e-8  # its attention computes in float32
    for matrix in anatomy.blocks[1].matrices():
        seen = []

        def listen(module, args, output, seen=seen, matrix=matrix):
            rows = matrix.rows()
            part = output if rows is None else output[..., rows]
            part.retain_grad()
            seen.append((args[0].detach().reshape(-1, args[0].shape[-1]), part))
            if rows is None:
                return None
            whole = output.clone()
            whole[..., rows] = part
            return whole

        handle = matrix.module.register_forward_hook(listen)
        for batch in data:
            summed_loss(*predictions(model, batch)).backward()
        handle.remove()
        x = torch.cat([x for x, _ in seen])
        g = torch.cat([part.grad.reshape(-1, part.shape[-1]) for _, part in seen])
        fisher = torch.cat([gradients_by_example(model, matrix, batch) for batch in data]).square().mean(0)
        expected = {
            InputCovariance(): x.T @ x / len(x), InputMean(): x.mean(0), FeatureNorm(1): x.abs().mean(0),
            FeatureNorm(2): x.square().mean(0).sqrt(), OutputGradientCovariance(): g.T @ g / len(g),
            FisherDiagonal(): fisher,
        }  # fmt: skip
        for statistic, value in expected.items():
            got = store.value(key_of(matrix, statistic), statistic)
            atol = rounding * 1e-2 * float(value.abs().max())
            torch.testing.assert_close(got, value, rtol=rounding, atol=atol, msg=f"{matrix.name} {statistic}")
    assert -1 <= store.value("blocks.0", BlockSimilarity()) <= 1


@pytest.mark.parametrize("name", [*CONFIGS, *MOE_CONFIGS])
def test_a_pass_stops_behind_the_last_block_that_anything_is_wanted_of(name):
    """Bit for bit the same sums, with the blocks behind and the head untouched."""
    model = tiny(name)
    anatomy = Anatomy(model)
    data, wanted = [inputs(name, seed=seed) for seed in (1, 2)], [InputCovariance(), InputMean()]
    ran = []
    for index, block in enumerate(anatomy.block_list):
        block.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    model.register_forward_hook(lambda module, args, output: ran.append("the model with its head"))
    whole = collect(anatomy, data, wanted).state()
    assert ran == [0, 1, 2, 0, 1, 2]
    ran.clear()
    matrices = [matrix for block in anatomy.blocks[:2] for matrix in block.matrices()]
    part = collect(anatomy, data, wanted, matrices).state()
    assert ran == [0, 1, 0, 1]
    assert part and all(torch.equal(tensor, whole[key]) for key, tensor in part.items())
    ran.clear()
    collect(anatomy, data, [BlockSimilarity()], ())
    assert ran == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_parts_equals_collecting_at_once(dtype):
    anatomy, data = Anatomy(tiny("llama")), batches("llama", 5)
    whole = collect(anatomy, data, EVERYTHING, accumulate=dtype).state()
    parts = collect(anatomy, data[:2], EVERYTHING, accumulate=dtype)
    merged = parts.merge(collect(anatomy, data[2:], EVERYTHING, accumulate=dtype)).state()
    assert whole.keys() == merged.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
        assert tensor.dtype in (dtype, torch.float64)


def test_shared_inputs_are_stored_once():
    store = collect(Anatomy(tiny("llama")), batches("llama", 1), [InputCovariance()])
    assert sorted(name.split("|")[0] for name in store.state() if name.endswith("gram.0")) == sorted(
        f"blocks.{b}.{source}"
        for b in range(3)
        for source in ("attention.input", "attention.heads", "mlp.input", "mlp.neurons")
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_padding_does_not_count(name):
    """A padded batch gives the statistics of the unpadded sequences."""
    anatomy = Anatomy(tiny(name, dtype=torch.float64))
    ids = inputs(name, batch=2, length=10)["input_ids"]
    short = ids[1:, :6]
    padded = torch.cat([ids[:1], torch.nn.functional.pad(short, (0, 4), value=0)])
    mask = torch.ones_like(padded)
    mask[1, 6:] = 0
    labels = {} if name != "bert" else {"labels": torch.where(mask.bool(), padded, -100)}
    extra = [{}, {}] if name != "bert" else [{"labels": ids[:1]}, {"labels": short}]
    wanted = [InputCovariance(), OutputGradientCovariance(), FisherDiagonal(), BlockSimilarity()]
    apart = collect(anatomy, [{"input_ids": ids[:1], **extra[0]}, {"input_ids": short, **extra[1]}], wanted).state()
    together = collect(anatomy, [{"input_ids": padded, "attention_mask": mask, **labels}], wanted).state()
    for key, tensor in apart.items():
        torch.testing.assert_close(together[key], tensor, rtol=1e-6, atol=1e-9, msg=key)


def test_trimming_and_sampled_fisher():
    anatomy, data = Anatomy(tiny("llama", dtype=torch.float64)), batches("llama", 2, length=16)
    trimmed = OutputGradientCovariance(trim=0.125)
    store = collect(anatomy, data, [trimmed, OutputGradientCovariance()])
    count = {label: float(sums["count"]) for (_, label), sums in store._sums.items()}
    assert count[trimmed.label] == 2 * 2 * 12 and count[OutputGradientCovariance().label] == 2 * 2 * 16
    sampled = [collect(anatomy, data, [trimmed], fisher="sampled", seed=s).state() for s in (0, 0, 1)]
    key = next(name for name in sampled[0] if name.endswith("gram.0"))
    assert torch.equal(sampled[0][key], sampled[1][key]) and not torch.equal(sampled[0][key], sampled[2][key])


def test_the_sampled_fisher_is_the_expectation_over_the_model(n=400):
    """Last block's down matrix of a tiny model: the mean over many samplings approaches the exact expectation."""
    model, batch = tiny("llama", dtype=torch.float64), batches("llama", 1, length=3)[0]
    anatomy = Anatomy(model)
    matrix = anatomy.blocks[-1].matrix("down")
    outputs = []
    handle = matrix.module.register_forward_hook(lambda m, a, o: outputs.append(o.requires_grad_(True)))
    logits, labels = predictions(model, batch)
    handle.remove()
    probabilities = logits.softmax(-1)
    exact = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for position in range(len(labels)):  # positions' losses are independent draws with mean-zero gradients
        for label in range(logits.shape[1]):
            (g,) = torch.autograd.grad(-logits[position].log_softmax(-1)[label], outputs[0], retain_graph=True)
            g = g.reshape(-1, g.shape[-1])
            exact += probabilities[position, label].item() * g.T @ g
    statistic = OutputGradientCovariance()
    total = Statistics()
    for seed in range(n):
        total.merge(collect(anatomy, [batch], [statistic], [matrix], fisher="sampled", seed=seed))
    got = total.value(matrix.name, statistic) * 6  # 6 positions
    assert (got - exact).norm() / exact.norm() < 0.15


def test_the_half_gram_is_the_gram():
    for rows, n in ((5, 3), (40, 300), (7, 1030)):
        x = torch.randn(rows, n)
        for dtype in (torch.float32, torch.float64):
            total = gram_zeros(n, dtype, torch.device("cpu"))
            assert n < 1000 or sum(panel.numel() for panel in total.values()) < 0.57 * n * n
            add_gram_(total, x)
            add_gram_(total, x)
            full = symmetric(total)
            assert torch.equal(full, full.T) and full.dtype == dtype
            torch.testing.assert_close(full.float(), 2 * x.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_a_large_batch_goes_through_in_parts(name, monkeypatch):
    anatomy = Anatomy(tiny(name, dtype=torch.float64))
    data = batches(name, 2, length=8)
    data[1]["attention_mask"] = torch.ones_like(data[1]["input_ids"])
    data[1]["attention_mask"][1, 5:] = 0
    whole = collect(anatomy, data, EVERYTHING).state()
    monkeypatch.setattr(sys.modules[collect.__module__], "_BEHIND", 1)
    assert [len(part["input_ids"]) for part in parts_for_gradients(anatomy, data[1])] == [1, 1]
    parts = collect(anatomy, data, EVERYTHING).state()
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-9, atol=1e-12)


def test_statistics_are_cached_on_disk(tmp_path):
    anatomy, data = Anatomy(tiny("llama")), batches("llama", 2)
    store = collect(anatomy, data, EVERYTHING)
    path = tmp_path / "statistics.safetensors"
    store.save(path, "model a", ["input covariance"])
    found = Statistics.load(path, "model a")
    assert found is not None
    again, collected = found
    assert collected == {"input covariance"}
    assert again.dtype == torch.float64 and all(torch.equal(again.state()[k], v) for k, v in store.state().items())
    assert Statistics.load(path, "model b") is None and Statistics.load(tmp_path / "none", "model a") is None
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_bad_input():
    anatomy = Anatomy(tiny("llama"))
    with pytest.raises(BadData, match="no calibration data"):
        collect(anatomy, [], EVERYTHING)
    with pytest.raises(TransectError, match="was not collected"):
        collect(anatomy, batches("llama", 1), [InputMean()]).value("blocks.0.mlp.input", InputCovariance())
    with torch.no_grad():
        anatomy.blocks[1].mlp.down.weight[0, 0] = float("inf")
    with pytest.raises(TransectError, match=r"NaN or infinite activations .* blocks\.2"):
        collect(anatomy, batches("llama", 1), [InputCovariance()])


_DISTRIBUTED = """
import os, torch, torch.distributed as dist
from pathlib import Path
from tests.test_statistics import EVERYTHING, batches
from transect.anatomy import Anatomy
from transect.statistics import collect
other = os.fork()
rank, meet, out = int(other == 0), *sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
store = collect(Anatomy(tiny("llama")), batches("llama", 5), EVERYTHING)
if rank == 0:
    store.save(Path(out), "two", [])
dist.destroy_process_group()
if rank == 1:
    os._exit(0)
assert os.waitpid(other, 0)[1] == 0
"""


def test_two_processes_give_the_result_of_one(tmp_path, forks):
    out = tmp_path / "sums.safetensors"
    forks.python(_DISTRIBUTED, tmp_path / "meet", out)
    two = Statistics.load(out, "two")[0].state()
    one = collect(Anatomy(tiny("llama")), batches("llama", 5), EVERYTHING).state()
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # of the largest number: the other processes may have another attention kernel
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))


def test_what_follows_from_the_sums_is_made_once_until_they_change():
    anatomy, made = Anatomy(tiny("llama")), []
    store = collect(anatomy, batches("llama", 1), [InputMean()])

    def make():
        made.append(store.value("blocks.0.mlp.input", InputMean()))
        return made[-1]

    assert store.derived("mean", make) is store.derived("mean", make) and len(made) == 1
    store.merge(collect(anatomy, batches("llama", 2)[1:], [InputMean()]))
    assert not torch.equal(store.derived("mean", make), made[0]) and len(made) == 2
