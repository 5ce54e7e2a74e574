"""Entangled sizes: the algebra of slices, the super-network against cut models, the search and its command."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

import transect
from transect.anatomy import Anatomy
from transect.cli import main_group
from transect.data import Batches
from transect.errors import OutOfReach, TransectError
from transect.sizing import SuperNetwork, space_of
from transect.sizing.catalog.tanglenas.samplers import SAMPLERS, concentration, pull, sparsemax
from transect.sizing.cut import cut
from transect.sizing.entangle import factors, levels_of, mixed
from transect.sizing.order import sort_units
from transect.training import own_loss

from .models import VOCABULARY, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (24, 12), generator=torch.Generator().manual_seed(5))
SIZES = {"neurons": (12, 24, 48), "heads": (1, 2), "depth": (1, 3)}
WIDTH = {"hidden": (16, 24, 32)}


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def one_hot(index, count):
    return functional.one_hot(torch.tensor(index), count).double()


def masks(weight, choices):
    found = []
    for rows, columns in choices:
        mask = torch.zeros_like(weight)
        mask[:rows, :columns] = 1
        found.append(mask)
    return found


def test_a_mixed_weight_is_the_sum_of_its_slices():
    weight, x, beta = random(6, 8).requires_grad_(), random(5, 8), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    out, into = (2, 3, 6), (4, 8)
    gamma = torch.tensor([0.9, 0.1]).double().requires_grad_()
    beta.requires_grad_()
    axes = [(beta, {0: levels_of(6, out)}), (gamma, {1: levels_of(8, into)})]
    mixture = mixed(weight, axes)
    every = [(b * g, o, i) for b, o in zip(beta, out, strict=True) for g, i in zip(gamma, into, strict=True)]
    outputs = sum(share * functional.linear(x, weight * masks(weight, [(o, i)])[0]) for share, o, i in every)
    torch.testing.assert_close(functional.linear(x, mixture), outputs, rtol=0, atol=1e-14)
    expected = torch.tensor([1, 1, 0.8, 0.3, 0.3, 0.3, 0, 0]).double()
    torch.testing.assert_close(factors(beta.detach(), levels_of(8, out)), expected)
    # dy / dβ_c is the output of choice c
    (gradient,) = torch.autograd.grad(functional.linear(x, mixture).sum(), beta)
    for c, rows in enumerate(out):
        alone = sum(
            g * functional.linear(x, weight * masks(weight, [(rows, i)])[0]) for g, i in zip(gamma, into, strict=True)
        ).sum()
        torch.testing.assert_close(gradient[c], alone)
    # one choice is the slice, and nothing outside it has a gradient
    hot = mixed(weight, [(one_hot(1, 3), axes[0][1]), (one_hot(0, 2), axes[1][1])])
    assert torch.equal(hot, weight * masks(weight, [(3, 4)])[0])
    (gradient,) = torch.autograd.grad((hot * random(6, 8)).sum(), weight)
    assert not gradient[3:].any() and not gradient[:, 4:].any() and gradient[:3, :4].all()


def test_embeddings_and_kernels_are_sliced_alike():
    table, ids = random(10, 6), torch.tensor([[1, 4, 7]])
    hot = mixed(table, [(one_hot(0, 2), {1: levels_of(6, (4, 6))})])
    assert torch.equal(functional.embedding(ids, hot), functional.pad(functional.embedding(ids, table[:, :4]), (0, 2)))
    kernel, image = random(3, 2, 7, 7), random(1, 2, 9, 9)
    levels = levels_of(7, (3, 5, 7), centred=True)
    for c, size in enumerate((3, 5, 7)):
        hot, edge = mixed(kernel, [(one_hot(c, 3), {2: levels, 3: levels})]), (7 - size) // 2
        alone = functional.conv2d(image, kernel[..., edge : edge + size, edge : edge + size], padding=size // 2)
        torch.testing.assert_close(functional.conv2d(image, hot, padding=3), alone, rtol=0, atol=1e-12)
    beta = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)  # both sides are one axis: no product of sums
    spread = mixed(torch.ones(7, 7).double(), [(beta, {0: levels, 1: levels})])
    assert spread[0, 3] == 0.3 and spread[1, 1] == 0.8 and spread[3, 3] == 1


def test_draws_sum_to_one_and_pass_gradients():
    alpha = torch.tensor([0.3, -1.0, 0.1, -30.0], requires_grad=True)
    assert (concentration(alpha) > 0).all() and pull(torch.zeros(3)) == 0 and pull(alpha.detach()) > 0
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for name, sampler in SAMPLERS.items():
        draws = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            draws.append(sampler.draw(alpha, 1.0))
        assert torch.equal(draws[0], draws[1]), name
        assert torch.equal(draws[0], draws[2]) == (name == "darts")
        for beta in (*draws, sampler.mean(alpha)):
            torch.testing.assert_close(beta.sum(), torch.tensor(1.0))
            assert (beta >= 0).all()
        assert (draws[0] > 0).all() == (name == "drnas")
        (gradient,) = torch.autograd.grad((draws[0] * weight).sum(), alpha)
        assert gradient.any(), name
    order = torch.tensor([2, 0, 1])
    z = torch.tensor([0.5, 0.2, -1.0], dtype=torch.float64, requires_grad=True)
    means = [SAMPLERS[name].mean for name in SAMPLERS]
    for mean in means:  # permuting choices permutes gradients
        (gradient,) = torch.autograd.grad((mean(z) * weight[:3]).sum(), z)
        moved = z.detach()[order].requires_grad_()
        (other,) = torch.autograd.grad((mean(moved) * weight[:3][order]).sum(), moved)
        torch.testing.assert_close(other, gradient[order])
    torch.testing.assert_close(sparsemax(z), torch.tensor([0.65, 0.35, 0.0]).double())
    assert torch.autograd.gradcheck(sparsemax, (z,))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("mixing", ["weights", "outputs"])
def test_one_choice_is_the_network_that_is_cut_out(kind, mixing):
    model = tiny(kind).double().eval()
    sizes = {**SIZES, "heads": (1, 2)} if kind != "gpt2" else {k: v for k, v in SIZES.items()}
    sizes |= WIDTH if kind == "llama" else {}
    if not Anatomy(model).can_drop_blocks:
        sizes.pop("depth")
    space = space_of(Anatomy(model), sizes)
    network, ids = SuperNetwork(space, mixing=mixing), {"input_ids": DATA[:4]}
    picked = {name: i % len(axis.choices) for i, (name, axis) in enumerate(space.axes.items())}
    if "depth" in picked:
        picked["depth"] = 0
    hot = {name: beta.double() for name, beta in space.one_hot(picked).items()}
    loss, _ = network.loss(hot, ids)
    loss.backward()
    expected, whole = space.size(picked), space.whole
    outside = {
        name: [p.grad.transpose(0, s.dim)[s.levels > picked[s.axis]] for s in space.spans[name] if s.role != "norm"]
        for name, p in model.named_parameters() if name in space.spans and p.grad is not None
    }  # fmt: skip
    assert outside and not any(part.any() for parts in outside.values() for part in parts)
    smaller = cut(space, picked)
    torch.testing.assert_close(own_loss(smaller, ids)[0], loss, rtol=1e-9, atol=1e-9)
    assert sum(a * b for a, b in (m.shape for m in Anatomy(smaller).matrices())) == expected < whole


def test_heads_and_depth_mix_outputs_and_the_expected_size_is_a_mean():
    model = tiny("llama").double().eval()
    space = space_of(Anatomy(model), {"heads": (1, 2), "depth": (1, 2, 3), "neurons": (16, 48)}, shared=True)
    assert set(space.axes) == {"heads", "depth", "neurons"}
    betas = {"heads": [0.3, 0.7], "depth": [0.2, 0.5, 0.3], "neurons": [0.6, 0.4]}
    weights = {name: torch.tensor(beta, dtype=torch.float64) for name, beta in betas.items()}
    every = [
        ({"heads": h, "depth": d, "neurons": n}, weights["heads"][h] * weights["depth"][d] * weights["neurons"][n])
        for h in range(2) for d in range(3) for n in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(space.numbers(weights), sum(share * space.size(picked) for picked, share in every))
    assert all(round(space.numbers(space.one_hot(picked)).item()) == space.size(picked) for picked, _ in every)
    # the first block alone: its attention's output is the mean of the outputs of each number of heads
    block, seen = model.model.layers[0], {}
    handle = block.self_attn.register_forward_hook(lambda module, args, output: seen.update(now=output[0]))
    network, ids = SuperNetwork(space, mixing="outputs"), {"input_ids": DATA[:2]}
    found = {}
    for name, beta in (("mix", weights["heads"]), (0, one_hot(0, 2)), (1, one_hot(1, 2))):
        network.loss({**weights, "heads": beta}, ids)
        found[name] = seen["now"]
    handle.remove()
    torch.testing.assert_close(found["mix"], 0.3 * found[0] + 0.7 * found[1], rtol=0, atol=1e-12)


def test_memory_and_numbers_do_not_grow_with_the_choices():
    model, kept = tiny("llama"), []
    for choices in ((24, 48), tuple(range(6, 49, 6))):
        network = SuperNetwork(space_of(Anatomy(model), {"neurons": choices}))
        weights = {name: torch.full((len(choices),), 1 / len(choices), requires_grad=True)
                   for name in network.space.axes}  # fmt: skip
        held = []
        keep = lambda tensor, held=held: held.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network.loss(weights, {"input_ids": DATA[:4]})
        kept.append((len(held), sum(held)))
    assert kept[0][0] == kept[1][0]
    assert kept[1][1] - kept[0][1] < 3 * 8 * 10  # less than a few weights of the choices


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sorting_puts_the_best_first_and_changes_nothing(kind):
    model = tiny(kind).eval()
    anatomy = Anatomy(model)
    before = logits(model, inputs(kind))
    for block in anatomy.blocks:
        down = block.mlp.down.weight.clone()
        down[:, : block.mlp.neurons // 2] = 0  # the first half adds nothing
        block.mlp.down.write(down)
    before = logits(model, inputs(kind))
    sizes = {"neurons": (24,), "heads": (1, 2)} | (WIDTH if kind == "llama" else {})
    sort_units(space_of(anatomy, sizes), Batches([{"input_ids": DATA}]))
    torch.testing.assert_close(logits(model, inputs(kind)), before, rtol=1e-4, atol=1e-5)
    half = anatomy.blocks[0].mlp.neurons // 2
    assert not anatomy.blocks[1].mlp.down.weight[:, half:].any() and anatomy.blocks[1].mlp.down.weight[:, :half].any()


FAST = dict(lr=1e-2, batch_size=4, epochs=2, device="cpu")


def priced(**more):
    return transect.search(
        tiny("llama"), DATA, penalty=30.0, shared=True, neurons=[12, 24, 48], heads=[1, 2], depth=[1, 2, 3],
        hidden=[16, 32], every=2, size_rate=0.2, **{**FAST, **more},
    )  # fmt: skip


SMALLEST = {"neurons": 12, "heads": 1, "depth": 1, "hidden": 16}


@pytest.mark.parametrize("options", [{"sampler": "drnas"}, {"sampler": "darts", "norm": "full"}])
def test_a_price_makes_it_smaller(options):
    outcome = priced(**options).outcome
    assert outcome["sizes"] == SMALLEST
    choices = 3 + 2 + 3 + 2  # all that the super-network has beside the largest network's numbers
    assert outcome["trained"] == sum(parameter.numel() for parameter in tiny("llama").parameters()) + choices


def test_an_interrupted_search_goes_on_bit_for_bit(tmp_path):
    whole = priced(sampler="gdas")
    assert whole.outcome["sizes"] == SMALLEST
    stopped = []

    def stop(check):
        stopped.append(check.step)
        if check.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        priced(sampler="gdas", checkpoint=tmp_path / "state", on_check=stop)
    again = priced(sampler="gdas", checkpoint=tmp_path / "state", on_check=stop)
    assert stopped[:2] == [2, 4]
    assert again.outcome["weights"] == whole.outcome["weights"]
    for (name, ours), theirs in zip(again.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_keep_is_kept_and_the_weights_stay_at_rate_0():
    model = tiny("gpt2")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in ("tanglenas", "spos"):
        options = {"candidates": 6} if method == "spos" else {}
        found = transect.search(model, DATA, method, keep=0.6, **{**FAST, "lr": 0.0}, **options)
        anatomy = Anatomy(found.model)
        numbers = sum(a * b for a, b in (matrix.shape for matrix in anatomy.matrices()))
        assert found.outcome["numbers"][1] == numbers <= 0.6 * found.outcome["numbers"][0]
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in dense.items())
        assert torch.equal(found.model.transformer.wte.weight, model.transformer.wte.weight)
        assert found.outcome["loss_after"] == pytest.approx(transect.evaluate(found.model, DATA[-2:])["loss"], abs=1e-5)
    assert found.outcome["trained"] == 0 and found.outcome["measured"] <= 6 and not found.outcome["weights"]


def test_by_command_the_result_is_an_ordinary_model(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in DATA.tolist()))
    result = CliRunner().invoke(
        main_group,
        ["search", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out"),
         "--keep", "0.5", "--neurons", "12,24,48", "--depth", "2,3", "--shared", "--steps", "2", "--batch-size", "4",
         "--tanglenas.sampler", "gdas", "--device", "cpu", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output[-400:]
    outcome = json.loads(result.stdout.strip().splitlines()[-1])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == outcome["sizes"]["neurons"]
    assert config["num_hidden_layers"] == outcome["sizes"]["depth"]
    again = type(tiny("llama")).from_pretrained(tmp_path / "out").eval()
    assert transect.evaluate(again, DATA[-2:])["loss"] == pytest.approx(outcome["loss_after"], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("llama", dict(keep=0.5, neurons=[24, 64]), "from 1 to 48"),
        ("llama", dict(keep=0.5, neurons=[]), "neurons"),
        ("llama", dict(keep=0.5, hidden=[18, 32]), "no multiples of the 4 heads"),
        ("llama", dict(keep=0.5, neurons=[24, 24]), "different"),
        ("gpt2", dict(keep=0.5, hidden=[16, 32]), "cannot be made narrower"),
        ("gemma2", dict(keep=0.9, hidden=[16, 32]), "computes something else"),
        ("olmo2", dict(keep=0.5, heads=[1, 2]), "normalises the queries"),
        ("llama", dict(penalty=0), "largest sizes always win"),
        ("llama", dict(keep=0.5, method="nothing"), "unknown search method"),
        ("qwen3_moe", dict(keep=0.5, neurons=[8]), "mixture of experts"),
    ],
)
def test_what_cannot_be_searched_is_said_before_any_work(kind, given, message):
    with pytest.raises(TransectError, match=message):
        transect.search(tiny(kind), DATA, **{"device": "cpu", **given})


def test_a_space_without_a_network_that_small_is_refused():
    with pytest.raises(OutOfReach, match="smallest network"):
        transect.search(tiny("llama"), DATA, keep=0.1, neurons=[24, 48], device="cpu")
    model = tiny("llama")
    transect.compress(model, "svd", keep=0.5)
    with pytest.raises(TransectError, match="begin with the dense model"):
        transect.search(model, DATA, keep=0.5, neurons=[24], device="cpu")
