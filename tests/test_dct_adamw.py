"""DCT-AdamW: its basis, what it picks, what it keeps, and the steps it takes; against torch's AdamW where they meet."""

import copy
import importlib
import itertools
from pathlib import Path

import pytest
import torch

from transect.errors import TransectError
from transect.training import Schedule, Stepper, optimizer_named
from transect.training.optimizers import dct_adamw
from transect.training.optimizers.dct_adamw import (
    FFT_FROM,
    PLAIN_FROM,
    Basis,
    DCTAdamW,
    cosine_products,
    cosines,
    moved,
    quantised,
    random_basis,
    strongest,
    turns,
)  # fmt: skip

NEVER = 10**9  # steps between two choices: only the first step chooses


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(steps, *shape, dtype=torch.float64):
    return [normal(*shape, seed=100 + step, dtype=dtype) for step in range(steps)]


def walk(parameters, grads, make, each=lambda optimizer: None):
    """Optimize copies of the parameters along given gradients, [step][parameter]; the optimizer and the copies."""
    copies = [torch.nn.Parameter(p.clone()) for p in parameters]
    optimizer = make(copies)
    for step in grads:
        for parameter, gradient in zip(copies, step, strict=True):
            parameter.grad = gradient.clone().to(parameter)
        optimizer.step()
        each(optimizer)
    return optimizer, [p.detach() for p in copies]


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# The basis


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 129, 1000])
@pytest.mark.parametrize("make", [cosines, random_basis])
def test_basis_is_orthonormal(make, size):
    rows = make(size)
    close(rows @ rows.T, torch.eye(size, dtype=torch.float64), 1e-13)
    single = rows.float().double()
    close(single @ single.T, torch.eye(size, dtype=torch.float64), 1e-6)


def test_large_cosines_lose_no_digits():
    size, some = 4096, torch.tensor([0, 1, 2047, 4095])
    rows = cosines(size)
    expected = torch.zeros(4, size, dtype=torch.float64)
    expected[range(4), some] = 1
    close(rows[some] @ rows.T, expected, 1e-14)
    single = rows[some].float().double()
    close(single @ single.T, torch.eye(4, dtype=torch.float64), 1e-6)


def test_cosines_are_the_transform_of_scipy():
    fft = pytest.importorskip("scipy.fft")
    matrix = normal(5, 12)
    close(matrix @ cosines(12).T, torch.from_numpy(fft.dct(matrix.numpy(), norm="ortho")))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 64, 97, 300])
def test_fourier_route_agrees_with_the_matrix(size):
    matrix = normal(6, size)
    close(cosine_products(matrix, turns(size)), matrix @ cosines(size).T)
    single = cosine_products(matrix.float(), turns(size).to(torch.complex64))
    assert single.dtype == torch.float32
    close(single.double(), matrix @ cosines(size).T, 1e-5)


def test_each_size_takes_its_route():
    for size in (FFT_FROM - 1, FFT_FROM):
        matrix = normal(3, size)
        basis = Basis.of("dct", matrix)
        assert (basis.turns is not None) == (size >= FFT_FROM)
        close(basis.products(matrix), matrix @ cosines(size).T)
    assert Basis.of("random", matrix).turns is None


# What is picked


def test_no_other_vectors_reconstruct_better_than_those_by_l2():
    matrix, basis, rank = normal(20, 16), cosines(16), 3
    products = matrix @ basis.T

    def error(indices):
        rows = basis[torch.as_tensor(indices)]
        return (matrix - matrix @ rows.T @ rows).square().sum()

    errors = [error(indices).item() for indices in itertools.combinations(range(16), rank)]
    best, by_l1 = strongest(products, rank, "l2"), strongest(products, rank, "l1")
    found = error(best).item()
    assert found == pytest.approx(min(errors), rel=1e-12)
    assert found == pytest.approx((matrix.square().sum() - products[:, best].square().sum()).item(), rel=1e-12)
    assert found <= (1 - rank / 16) * matrix.square().sum()
    assert found <= error(by_l1) < sorted(errors)[len(errors) // 10]  # close, if not the best
    assert by_l1.tolist() == sorted(products.abs().sum(0).topk(rank).indices.tolist())


def test_no_better_than_the_svd_and_equal_where_it_uses_the_basis():
    rank, basis = 3, cosines(10)

    def errors(matrix):
        rows = basis[strongest(matrix @ basis.T, rank, "l2")]
        left = (matrix - matrix @ rows.T @ rows).square().sum().item()
        return left, torch.linalg.svdvals(matrix)[rank:].square().sum().item()

    found, least = errors(normal(14, 10))
    assert found > least * (1 + 1e-6)
    left = torch.linalg.qr(normal(14, 10)).Q
    found, least = errors(left * torch.arange(10, 0, -1) @ basis[torch.randperm(10)])
    assert found == pytest.approx(least, rel=1e-9)


def test_ties_go_to_the_lowest_indices():
    assert strongest(torch.zeros(3, 8), 3, "l1").tolist() == [0, 1, 2]
    assert strongest(torch.tensor([[1.0, -2, 0, 2, 1, 1]]), 4, "l2").tolist() == [0, 1, 3, 4]


def test_moments_move_as_the_product_of_the_bases_says():
    basis, moment = cosines(9), normal(5, 4)
    old, new = torch.tensor([0, 2, 5, 8]), torch.tensor([1, 2, 3, 5])
    turned = basis[old] @ basis[new].T
    close(moved(moment, old, new, 9), moment @ turned)
    close(moved(moment.square(), old, new, 9), (moment.square() @ turned).abs())
    assert (moved(moment.square(), old, new, 9) >= 0).all()
    assert torch.equal(moved(moment, old, old, 9), moment)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_rotation_keeps_each_moment_with_its_vector(shape):
    """Against moments for all vectors, of which those that are not picked are emptied at every step."""
    rank, first, second, basis = 3, 0.9, 0.99, cosines(8)
    full = torch.zeros(2, 12, 8, dtype=torch.float64)
    changes, chosen = [], None
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = DCTAdamW([parameter], 0.1, betas=(first, second), rank=rank)
    for step, gradient in enumerate(gradients(6, 12, 8), 1):
        products = gradient @ basis.T
        before, chosen = chosen, strongest(products, rank, "l1").tolist()
        full[:, :, [j for j in range(8) if j not in chosen]] = 0
        full[0][:, chosen] = first * full[0][:, chosen] + (1 - first) * products[:, chosen]
        full[1][:, chosen] = second * full[1][:, chosen] + (1 - second) * products[:, chosen] ** 2
        means = full[0] / (1 - first**step) / ((full[1] / (1 - second**step)).sqrt() + 1e-8)
        start = parameter.detach().clone()
        parameter.grad = gradient if shape == (12, 8) else gradient.T
        optimizer.step()
        expected = -0.1 * means @ basis
        close(parameter.detach() - start, expected if shape == (12, 8) else expected.T)
        state = optimizer.state[parameter]
        assert state["indices"].tolist() == chosen and (state["exp_avg_sq"] >= 0).all()
        changes.append(len(set(chosen) - set(before or chosen)))
    assert max(changes) > 0 and min(changes[1:]) < rank  # some moments moved, and some were dropped


def test_without_rotation_moments_stay_in_their_slots():
    grads = [[g] for g in gradients(4, 12, 8)]
    start = [normal(12, 8)]
    turned, fixed = (walk(start, grads, lambda p, r=r: DCTAdamW(p, 0.1, rank=3, rotate=r)) for r in (True, False))
    small = torch.zeros(12, 3, dtype=torch.float64)
    for (gradient,) in grads:
        products = gradient @ cosines(8).T
        small.lerp_(products[:, strongest(products, 3, "l1")], 0.1)
    close(fixed[0].state[fixed[0].param_groups[0]["params"][0]]["exp_avg"], small)
    assert (turned[1][0] - fixed[1][0]).abs().max() > 1e-3


# What is kept


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_feedback_loses_nothing(shape, every):
    """The sum of all that was used and of what is left is the sum of the gradients."""
    used = torch.zeros(12, 8, dtype=torch.float64)
    left = []

    def add(optimizer):
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]  # with beta1 = 0, M is what was used
        used.add_(state["exp_avg"] @ cosines(8)[state["indices"].long()])
        left.append(state["residual"])

    grads = gradients(8, *shape)
    walk(
        [normal(*shape)], [[g] for g in grads],
        lambda p: DCTAdamW(p, 0.1, betas=(0, 0.9), rank=2, every=every, feedback="float32"), add,
    )  # fmt: skip
    total = sum(grads)
    close(used + left[-1], total if shape == (12, 8) else total.T)
    assert left[-1].square().sum() > 0.1 * left[0].square().sum()


def test_feedback_brings_what_few_vectors_leave_out():
    """A constant gradient over all basis vectors: with feedback every vector has its turn."""
    gradient = cosines(8)[:1] * 2 + cosines(8).sum(0)
    seen = {}
    for feedback in ("none", "float32", "int8"):
        picked = set()
        each = lambda o, picked=picked: picked.update(  # noqa: E731
            o.state[o.param_groups[0]["params"][0]]["indices"].tolist()
        )
        walk(
            [normal(9, 8)], [[gradient.expand(9, 8)]] * 20,
            lambda p, feedback=feedback: DCTAdamW(p, 0.01, rank=1, feedback=feedback), each,
        )  # fmt: skip
        seen[feedback] = picked
    assert seen == {"none": {0}, "float32": set(range(8)), "int8": set(range(8))}


def test_eight_bits_are_right_to_half_a_step_of_each_row():
    matrix = normal(6, 50) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    matrix[2] = 0
    codes, scale = quantised(matrix)
    assert (
        codes.dtype == torch.int8
        and scale.shape == (6, 1)
        and codes.abs().amax(1).tolist() == [127] * 2 + [0] + [127] * 3
    )
    assert ((codes * scale - matrix).abs() <= scale * (0.5 + 1e-9)).all() and not (codes * scale)[2].any()


def test_eight_bits_of_feedback_stay_close_to_all():
    start, grads = [normal(40, 16)], [[g] for g in gradients(10, 40, 16)]
    exact, rough, none = (
        walk(start, grads, lambda p, f=f: DCTAdamW(p, 0.01, rank=4, feedback=f))[1][0]
        for f in ("float32", "int8", "none")
    )
    assert 0 < (rough - exact).norm() < 0.3 * (none - exact).norm()


def test_size_of_the_state():
    shapes, rank = [(40, 16), (16, 40), (16, 16), (7,), (8, 2, 3, 3)], 4
    start = [normal(*shape, dtype=torch.float32) for shape in shapes]
    grads = [[normal(*shape, seed=5, dtype=torch.float32) for shape in shapes]]
    for feedback, extra in (("none", [0] * 5), ("float32", [4 * 640, 4 * 640, 4 * 256, 0, 4 * 144]),
                            ("int8", [640 + 160, 640 + 160, 256 + 64, 0, 144 + 4 * 18])):  # fmt: skip
        optimizer, _ = walk(start, grads, lambda p, f=feedback: DCTAdamW(p, 0.1, rank=rank, feedback=f))
        sizes = [
            sum(v.numel() * v.element_size() for k, v in optimizer.state[p].items() if k != "step")
            for p in optimizer.param_groups[0]["params"]
        ]
        plain = [2 * 4 * n * rank + 4 * rank for n in (40, 40, 16)] + [2 * 4 * 7, 2 * 4 * 18 * rank + 4 * rank]
        assert sizes == [a + b for a, b in zip(plain, extra, strict=True)]
        assert optimizer.basis_bytes == 4 * (16 * 16 + 8 * 8)  # one for each short side, not for each matrix


# Steps


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("feedback", ["none", "float32"])
def test_full_rank_is_adamw_in_the_basis(shape, feedback):
    start, grads, basis = normal(*shape), gradients(5, *shape), cosines(8)
    turn = (lambda m: m @ basis.T) if shape == (12, 8) else (lambda m: basis @ m)
    back = (lambda m: m @ basis) if shape == (12, 8) else (lambda m: basis.T @ m)
    made, (found,) = walk(
        [start], [[g] for g in grads], lambda p: DCTAdamW(p, 0.1, weight_decay=0.1, rank=8, feedback=feedback)
    )
    plain = lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)  # noqa: E731
    close(found, back(walk([turn(start)], [[turn(g)] for g in grads], plain)[1][0]))
    assert (found - walk([start], [[g] for g in grads], plain)[1][0]).abs().max() > 1e-2  # and not AdamW itself
    if feedback != "none":
        close(made.state[made.param_groups[0]["params"][0]]["residual"], torch.zeros(12, 8, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_vectors_and_matrices_with_a_large_side_are_those_of_adamw(dtype):
    shapes = [(5,), (), (PLAIN_FROM, 2), (2, PLAIN_FROM)]
    start = [normal(*shape, dtype=dtype) for shape in shapes]
    grads = [[normal(*shape, seed=9 + n, dtype=dtype) for shape in shapes] for n in range(3)]
    settings = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    found = walk(start, grads, lambda p: DCTAdamW(p, rank=1, **settings))
    expected = walk(start, grads, lambda p: torch.optim.AdamW(p, foreach=False, **settings))
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.equal(ours, theirs)
    below, like = normal(PLAIN_FROM - 1, 2, dtype=torch.float32), normal(PLAIN_FROM - 1, 2, seed=3, dtype=torch.float32)
    optimizer, _ = walk([below], [[like]], lambda p: DCTAdamW(p, rank=1, **settings))
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].shape == (PLAIN_FROM - 1, 1)


@pytest.mark.parametrize("feedback", ["none", "float32", "int8"])
@pytest.mark.parametrize("basis", ["dct", "random"])
def test_transposing_transposes_every_step(feedback, basis):
    start, grads = normal(13, 8), gradients(5, 13, 8)
    make = lambda p: DCTAdamW(p, 0.1, weight_decay=0.1, rank=3, feedback=feedback, basis=basis)  # noqa: E731
    _, (upright,) = walk([start], [[g] for g in grads], make)
    _, (lying,) = walk([start.T.contiguous()], [[g.T] for g in grads], make)
    assert torch.equal(upright, lying.T)


def test_one_choice_is_as_good_as_many_within_one_subspace():
    basis, among = cosines(8), torch.tensor([1, 4, 6])
    grads = [[normal(12, 3, seed=n) @ basis[among]] for n in range(6)]
    start = [normal(12, 8)]
    each, once, random = (
        walk(start, grads, lambda p, s=settings: DCTAdamW(p, 0.1, rank=3, **s))[1][0]
        for settings in ({"every": 1}, {"every": NEVER}, {"basis": "random"})
    )
    close(each, once)
    close(
        (each - start[0]) @ basis.T @ torch.diag(torch.ones(8).index_fill(0, among, 0).double()),
        torch.zeros(12, 8).double(),
    )
    assert (each - random).abs().max() > 1e-3


def test_vectors_are_chosen_at_the_first_step_and_every_so_many():
    chosen = []
    each = lambda o: chosen.append(o.state[o.param_groups[0]["params"][0]]["indices"].tolist())  # noqa: E731
    grads = gradients(7, 12, 16)
    walk([normal(12, 16)], [[g] for g in grads], lambda p: DCTAdamW(p, 0.1, rank=3, every=3), each)
    picked = [strongest(g.T @ cosines(12).T, 3, "l1").tolist() for g in grads]
    assert chosen == [picked[0]] * 2 + [picked[2]] * 3 + [picked[5]] * 2
    assert picked[0] != picked[2] != picked[5]


def test_large_matrices_by_fft_step_as_by_the_matrix(monkeypatch):
    start, grads = [normal(20, 30)], [[g] for g in gradients(4, 20, 30)]
    make = lambda p: DCTAdamW(p, 0.1, rank=5, feedback="float32")  # noqa: E731
    _, (by_matrix,) = walk(start, grads, make)
    monkeypatch.setattr(dct_adamw, "FFT_FROM", 2)
    optimizer, (by_fft,) = walk(start, grads, make)
    assert all(basis.turns is not None for basis in optimizer._bases.values())
    close(by_fft, by_matrix, 1e-10)


def test_a_convolution_is_a_matrix_of_its_filters():
    start, grads = normal(8, 2, 3, 3), gradients(3, 8, 2, 3, 3)
    make = lambda p: DCTAdamW(p, 0.1, rank=3)  # noqa: E731
    _, (found,) = walk([start.to(memory_format=torch.channels_last)], [[g] for g in grads], make)
    _, (flat,) = walk([start.flatten(1)], [[g.flatten(1)] for g in grads], make)
    close(found, flat.view_as(found), 0)


def test_half_precision_steps_in_float32():
    start, grads = normal(12, 8, dtype=torch.bfloat16), gradients(3, 12, 8, dtype=torch.bfloat16)
    make = lambda p: DCTAdamW(p, 0.1, rank=3, feedback="float32")  # noqa: E731
    optimizer, (found,) = walk([start], [[g] for g in grads], make)
    _, (wide,) = walk([start.float()], [[g] for g in grads], make)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert found.dtype == torch.bfloat16 and state["exp_avg"].dtype == state["residual"].dtype == torch.float32
    close(found.float(), wide, 0.05)


def test_gradients_are_left_as_they_are():
    parameter = torch.nn.Parameter(normal(12, 8))
    optimizer = DCTAdamW([parameter], 0.1, rank=3, feedback="int8", weight_decay=0.1)
    for gradient in gradients(3, 12, 8):
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)


def test_a_parameter_without_gradient_waits_and_zero_gradients_do_nothing():
    still, moving = (torch.nn.Parameter(normal(12, 8)) for _ in range(2))
    optimizer = DCTAdamW([still, moving], 0.1, rank=3)
    moving.grad = torch.zeros(12, 8, dtype=torch.float64)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert still not in optimizer.state and torch.equal(moving.detach(), normal(12, 8))
    assert optimizer.state[moving]["indices"].tolist() == [0, 1, 2]


# Going on


@pytest.mark.parametrize("feedback", ["none", "float32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(feedback, dtype, tmp_path):
    start = [normal(12, 8, dtype=dtype), normal(8, 300, dtype=dtype), normal(5, dtype=dtype)]
    grads = [[normal(*p.shape, seed=n, dtype=dtype) for p in start] for n in range(6)]
    make = lambda p: DCTAdamW(p, 0.1, rank=3, feedback=feedback, every=2)  # noqa: E731
    _, expected = walk(start, grads, make)
    optimizer, middle = walk(start, grads[:3], make)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)

    def restored(parameters):
        made = DCTAdamW(parameters, 0.9)
        made.load_state_dict(copy.deepcopy(saved))
        assert len(saved["state"]) == len(start)
        for number, before in saved["state"].items():
            after = made.state_dict()["state"][number]
            assert after.keys() == before.keys()
            for key, value in before.items():
                assert after[key].dtype == value.dtype and torch.equal(after[key], value)
        return made

    _, found = walk(middle, grads[3:], restored)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_copied_optimizer_steps_alike():
    parameter = torch.nn.Parameter(normal(12, 8))
    optimizer = DCTAdamW([parameter], 0.1, rank=3)
    parameter.grad = normal(12, 8, seed=1)
    optimizer.step()
    other, twin = copy.deepcopy([optimizer, parameter])
    assert other.param_groups[0]["params"][0] is twin
    for one, its in ((optimizer, parameter), (other, twin)):
        its.grad = normal(12, 8, seed=2)
        one.step()
    assert torch.equal(parameter, twin)


def test_groups_have_settings_of_their_own_and_schedules_reach_them():
    first, second = (torch.nn.Parameter(normal(12, 8)) for _ in range(2))
    optimizer = DCTAdamW([{"params": [first], "rank": 1.0, "lr": 0.2}, {"params": [second]}], 0.1, rank=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    for _ in range(2):
        before = first.detach().clone(), second.detach().clone()
        first.grad = second.grad = normal(12, 8, seed=1)
        optimizer.step()
        schedule.step()
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])  # the rate was 0
    assert [optimizer.state[p]["exp_avg"].shape[1] for p in (first, second)] == [8, 2]


def test_it_is_registered_with_its_settings():
    registered = optimizer_named("dct-adamw")
    named = [("a", torch.nn.Parameter(normal(12, 8))), ("b", torch.nn.Parameter(normal(6)))]
    made = registered.build([{"params": named}], 0.1, {"share": "0.5", "feedback": "int8", "beta1": 0.8})
    group = made.param_groups[0]
    assert isinstance(made, DCTAdamW) and group["betas"] == (0.8, 0.999) and group["feedback"] == "int8"
    assert group["rank"] == 0.5 and group["lr"] == 0.1 and all(p.help for p in registered.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_training_loop_goes_on_bit_for_bit(dtype):
    names, shapes = ("a", "b"), ((12, 8), (6,))
    schedule = Schedule(lr=0.1, optimizer="dct-adamw", options={"feedback": "int8", "every": 2})

    def stepper():
        parameters = {
            name: torch.nn.Parameter(normal(*shape, dtype=dtype)) for name, shape in zip(names, shapes, strict=True)
        }
        return Stepper(parameters, schedule, 6)

    def go(one, steps):
        for step in steps:
            one.step(step, {name: normal(*s, seed=step, dtype=dtype) for name, s in zip(names, shapes, strict=True)})
        return one

    whole, first, second = go(stepper(), range(6)), go(stepper(), range(3)), stepper()
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    go(second, range(3, 6))
    for name, tensor in whole.state().items():
        assert torch.equal(second.state()[name], tensor) and second.state()[name].dtype == tensor.dtype
    for name in names:
        assert torch.equal(second.parameters[name], whole.parameters[name])
    assert whole.state_bytes == 2 * 4 * 12 * 2 + 4 * 2 + 12 * 8 + 4 * 12 + 2 * 4 * 6 + 2 * 4


# Bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -0.1}, "lr must be a number at least 0, got -0.1"),
        ({"lr": float("nan")}, "lr must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -1}, "weight_decay must be"),
        ({"rank": 0}, "rank, .* at least 1, got 0"),
        ({"rank": 1.5}, "rank, .* at most 1, got 1.5"),
        ({"rank": 9}, r"rank 9 is above the short side of a parameter, \(12, 8\). Give at most 8"),
        ({"every": 0}, "every must be"),
        ({"feedback": "int4"}, "feedback must be 'none', 'float32' or 'int8', got 'int4'"),
        ({"basis": "hadamard"}, "basis must be"),
        ({"norm": "l3"}, "norm must be"),
        ({"rotate": "no"}, "rotate must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(TransectError, match=said):
        DCTAdamW([torch.nn.Parameter(normal(12, 8))], **settings)


def test_a_refused_group_is_not_added():
    optimizer = DCTAdamW([torch.nn.Parameter(normal(12, 8))], 0.1, rank=8)
    with pytest.raises(TransectError, match=r"rank 8 is above .* \(4, 9\)"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(normal(4, 9))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TransectError, match=r"rank 9 is above the short side of its\.name"):
        DCTAdamW([("its.name", torch.nn.Parameter(normal(12, 8)))], 0.1, rank=9)
    with pytest.raises(TransectError, match=r"real numbers, got one of torch\.complex64"):
        DCTAdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))], 0.1)


def test_a_sparse_gradient_is_refused_before_anything_moves():
    dense, table = torch.nn.Parameter(normal(12, 8)), torch.nn.Embedding(9, 4, sparse=True)
    optimizer = DCTAdamW([dense, table.weight], 0.1, rank=2)
    dense.grad = normal(12, 8)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TransectError, match=r"a gradient is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense.detach(), normal(12, 8)) and not optimizer.state


# The benchmark


def test_the_benchmark_trains_every_optimizer(monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("transect.organism.stream"), "CHUNK", 200)  # documents
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    rows = importlib.import_module("optimizers").main(["--quick"])
    printed = capsys.readouterr().out
    assert printed.startswith("2 steps of 96 tokens") and printed.count("met") == 3
    state = {row["matrices by"]: row["state, kB"] for row in rows}
    matrices = {(128, 128): 8, (64, 128): 8, (384, 128): 12}
    numbers = sum(n * c * count for (n, c), count in matrices.items())
    shapes = [(max(s), min(s), count) for s, count in matrices.items()]
    low = sum(count * (2 * 4 * n * (c // 4) + 4 * (c // 4)) for n, c, count in shapes)
    steps = 4 * 28  # a count of each matrix
    assert 1000 * state["AdamW"] == 8 * numbers + steps
    assert 1000 * state["DCT-AdamW"] == 1000 * state["random basis"] == pytest.approx(low + steps)
    assert 1000 * state["DCT-AdamW, feedback"] == pytest.approx(low + steps + 4 * numbers)
    assert 1000 * state["DCT-AdamW, feedback in 8 bits"] == pytest.approx(
        low + steps + numbers + sum(4 * n * count for n, _, count in shapes)
    )
    assert len({row["loss"] for row in rows}) == len(rows) and all(0 < row["loss"] < 20 for row in rows)
