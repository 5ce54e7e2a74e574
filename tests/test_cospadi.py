"""CoSpaDi: sparse coding, dictionary updates, the operators that store the result, and whole models."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.compression import dictionary_learning as learning
from transect.compression import method, weighted_svd
from transect.compression.dictionary_learning import dictionary_size, learn, nominal_kept
from transect.compression.two_four import two_four
from transect.errors import OutOfReach, TransectError
from transect.evaluation import matrix_bytes
from transect.forward import computing_wide
from transect.layers import sparse_coding
from transect.operators import Bank, build, stored_bytes
from transect.operators.dictionary import SharedSparseDictionary, SparseDictionary, fit_on_support
from transect.statistics import InputCovariance, collect, key_of

from .models import CONFIGS, VOCABULARY, assert_alike, assert_same_model, inputs, logits, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
SHAPES = [(40, 16), (16, 40)]
QUICK = {"iterations": 2}


def problem(d_out, d_in, seed=0):
    """W, inputs x with correlated features, and C = E[x xᵀ]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    mixing = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d_in).double()
    x = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64) @ mixing.T
    return weight, x, x.T @ x / len(x)


def output_error(x, weight, made):
    return ((x @ (weight - made.to_dense()).T) ** 2).sum().item() / len(x)


def signals_and_atoms(n=60, d=12, atoms=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signals, others = torch.randn(2, max(n, atoms), d, generator=generator, dtype=torch.float64)
    return signals[:n].clone(), sparse_coding.drawn_atoms(others, atoms, seed)


def operator(d_out=10, d_in=7, atoms=11, nonzeros=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(atoms, generator=generator)[:nonzeros] for _ in range(d_out)])
    values = torch.randn(d_out, nonzeros, generator=generator, dtype=dtype)
    dictionary = torch.randn(atoms, d_in, generator=generator, dtype=dtype)
    made = SparseDictionary.from_factors(dictionary, values, indices)
    made.set_bias(torch.randn(d_out, generator=generator, dtype=dtype))
    dense = torch.zeros(d_out, atoms, dtype=dtype).scatter(1, indices, values) @ dictionary
    return made, dense


# Learning


@pytest.mark.parametrize("nonzeros", [1, 5, 11])
def test_sparse_coding_is_orthogonal_matching_pursuit(nonzeros):
    signals, atoms = signals_and_atoms()
    values, indices = sparse_coding.orthogonal_matching_pursuit(signals, atoms, nonzeros)
    for row, signal in enumerate(signals):
        chosen, left = [], signal
        for _ in range(nonzeros):
            scores = (atoms @ left).abs()
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            fit = torch.linalg.lstsq(atoms[chosen].T, signal[:, None]).solution[:, 0]
            left = signal - fit @ atoms[chosen]
        assert indices[row].tolist() == sorted(chosen)
        found = signal - values[row] @ atoms[indices[row]]
        torch.testing.assert_close(found, left, rtol=0, atol=1e-3)  # the ridge


def test_sparse_coding_does_not_depend_on_its_chunks(monkeypatch):
    signals, atoms = signals_and_atoms()
    whole = sparse_coding.orthogonal_matching_pursuit(signals, atoms, 5)
    monkeypatch.setattr(sparse_coding, "_CHUNK", 7 * 5 * len(atoms))
    for one, other in zip(whole, sparse_coding.orthogonal_matching_pursuit(signals, atoms, 5), strict=True):
        torch.testing.assert_close(one, other)


def test_sparse_coding_survives_signals_of_nothing_and_equal_atoms():
    signals, atoms = signals_and_atoms(n=6)
    signals[2] = 0
    atoms[5:] = atoms[4]
    values, indices = sparse_coding.orthogonal_matching_pursuit(signals, atoms, 9)
    assert torch.isfinite(values).all() and all(len(set(row.tolist())) == 9 for row in indices)
    assert (values[2] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_never_raises_the_error_and_keeps_unit_atoms(seed):
    signals, atoms = signals_and_atoms(seed=seed)
    values, indices = sparse_coding.orthogonal_matching_pursuit(signals, atoms, 5)
    error = (signals - sparse_coding.scatter(values, indices, len(atoms)) @ atoms).square().sum()
    for _ in range(4):
        values = learning.update_atoms(signals, atoms, values, indices)
        after = (signals - sparse_coding.scatter(values, indices, len(atoms)) @ atoms).square().sum()
        assert after < error
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(len(atoms)).double())
        error = after


def test_power_iterations_find_the_best_rank_1_fit_of_an_atom():
    """One atom that all signals use, beside one that none does: its update is the residual's leading singular pair."""
    generator = torch.Generator().manual_seed(0)
    signals = torch.randn(50, 12, generator=generator).double() * torch.logspace(0, -0.7, 12).double()
    atoms = torch.nn.functional.normalize(torch.randn(1, 12, generator=generator).double(), dim=1)
    values = learning.update_atoms(signals, atoms, signals @ atoms.T, torch.zeros(50, 1, dtype=torch.long))
    best = torch.linalg.svdvals(signals).square()[1:].sum()
    assert best <= (signals - values @ atoms).square().sum() <= best * 1.01


def test_an_atom_that_nothing_uses_becomes_the_worst_fitted_signal():
    signals, atoms = signals_and_atoms(n=30, atoms=6)
    indices = torch.tensor([[0, 1], [1, 3], [3, 4]]).repeat(10, 1)  # 2 and 5 are unused
    values = learning.update_atoms(signals, atoms, torch.ones(30, 2).double(), indices)
    errors = (signals - sparse_coding.scatter(values, indices, 6) @ atoms).norm(dim=1)
    for atom, row in zip((2, 5), errors.argsort(descending=True), strict=False):
        torch.testing.assert_close(atoms[atom], signals[row] / signals[row].norm())


def test_more_rounds_never_end_worse_and_the_tolerance_stops_early(monkeypatch):
    signals, atoms = signals_and_atoms()
    errors = [learning.alternate(signals, atoms, 5, rounds, 0).error for rounds in (1, 2, 4, 8, 16)]
    assert all(later <= earlier for earlier, later in pairwise(errors)) and errors[-1] < errors[0]
    rounds, sweep = [], learning.update_atoms
    monkeypatch.setattr(learning, "update_atoms", lambda *arguments: (rounds.append(1), sweep(*arguments))[1])
    learning.alternate(signals, atoms, 5, 60, 0.9)
    assert len(rounds) == 6  # the first at which five rounds lie behind


def test_permuting_output_units_permutes_the_coefficients_and_nothing_else():
    signals, atoms = signals_and_atoms()
    order = torch.randperm(len(signals), generator=torch.Generator().manual_seed(1))
    plain, permuted = (learning.alternate(rows, atoms, 4, 3, 0) for rows in (signals, signals[order]))
    torch.testing.assert_close(permuted.dictionary, plain.dictionary)
    torch.testing.assert_close(permuted.values, plain.values[order])
    assert torch.equal(permuted.indices, plain.indices[order])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", ["svd", "columns"])
def test_the_factors_have_their_shapes_and_their_non_zeros(shape, start):
    weight, _, covariance = problem(*shape)
    made = learn(weight, covariance, 12, 6, start=start, iterations=3)
    assert made.dictionary.shape == (12, shape[1]) and made.values.shape == made.indices.shape == (shape[0], 6)
    assert (made.indices.diff(dim=1) > 0).all()
    again = learn(weight, covariance, 12, 6, start=start, iterations=3)
    assert torch.equal(made.to_dense(), again.to_dense())
    # unit norm where they were learned: an atom's response to the inputs has unit mean square
    responses = torch.einsum("ki,ij,kj->k", made.dictionary, covariance, made.dictionary)
    torch.testing.assert_close(responses, torch.ones_like(responses), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_every_atom_in_use_it_is_the_truncated_svd(shape):
    weight, x, covariance = problem(*shape)
    expected = weighted_svd(weight, input_metric=covariance)
    for rank in (3, 9):
        made = learn(weight, covariance, rank, rank, shrinkage=0, iterations=4)
        left, right = expected.truncate(rank)
        assert output_error(x, weight, made) == pytest.approx(expected.losses()[rank].item(), rel=1e-5)
        torch.testing.assert_close(made.to_dense(), left @ right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", ["svd", "columns"])
def test_as_many_atoms_as_inputs_all_in_use_are_exact(shape, start):
    weight, _, covariance = problem(*shape)
    made = learn(weight, covariance, shape[1], shape[1], start=start, iterations=2)
    torch.testing.assert_close(made.to_dense(), weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_it_minimises_is_the_output_error_on_the_calibration_data(shape):
    weight, x, covariance = problem(*shape)
    made = learn(weight, covariance, 10, 5, iterations=3, shrinkage=0)
    root = learning.covariance_root(covariance, 0)
    whitened = ((weight - made.to_dense()) @ root).square().sum().item()
    assert output_error(x, weight, made) == pytest.approx(whitened, rel=1e-4)
    # in its own objective it beats the data-free variant of the same size, and that beats it in the other
    free = learn(weight, None, 10, 5, iterations=3)
    assert output_error(x, weight, made) < output_error(x, weight, free)
    assert (weight - free.to_dense()).norm() < (weight - made.to_dense()).norm()


@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_without_data_it_beats_the_truncated_svd_of_the_same_bytes(keep):
    weight, _, _ = problem(96, 64)
    made = learn(weight, None, **dictionary_size((96, 64), 4, keep, 2.0).chosen)
    rank = math.floor(keep * 96 * 64 / (96 + 64))
    assert (weight - made.to_dense()).square().sum() < 0.95 * weighted_svd(weight).losses()[rank]


def test_learning_survives_dead_rows_few_samples_and_dead_inputs():
    weight, x, _ = problem(30, 16)
    weight[4] = 0
    few = x[:3].T @ x[:3] / 3
    for covariance in (few, torch.zeros(16, 16).double()):
        for start in ("svd", "columns"):
            made = learn(weight, covariance, 8, 4, start=start, iterations=3, shrinkage=0)
            assert torch.isfinite(made.to_dense()).all() and made.to_dense()[4].abs().max() < 1e-6
    made = learn(weight, few, 8, 4, iterations=3)
    assert output_error(x[:3], weight, made) < 1e-3 * (x[:3] @ weight.T).square().sum() / 3
    learn(torch.zeros(6, 5), None, 4, 2, iterations=2)


def test_fitting_on_a_support_is_least_squares():
    made, _ = operator(d_out=6, d_in=30, dtype=torch.float64)
    dictionary, indices = made.dictionary.weight.detach(), made.coefficients.indices()
    target = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).double()
    values = fit_on_support(dictionary @ dictionary.T, target @ dictionary.T, indices, torch.zeros(6, 4))
    for row in range(6):
        expected = torch.linalg.lstsq(dictionary[indices[row]].T, target[row][:, None]).solution[:, 0]
        torch.testing.assert_close(values[row], expected, rtol=1e-6, atol=1e-6)


# Size


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_size_is_the_largest_that_fits_and_is_what_is_stored(ratio, itemsize):
    for shape, keep in (((96, 64), 0.6), ((64, 96), 0.31), ((40, 40), 0.8)):
        size = dictionary_size(shape, itemsize, keep, ratio)
        atoms, nonzeros = size.chosen["atoms"], size.chosen["nonzeros"]
        assert atoms == math.floor(ratio * nonzeros) >= nonzeros >= 1
        dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        made, _ = operator(*shape, atoms, nonzeros, dtype)
        made.set_bias(None)
        assert stored_bytes(made) == size.bytes <= keep * shape[0] * shape[1] * itemsize
        atoms, nonzeros = math.floor(ratio * (nonzeros + 1)), nonzeros + 1
        larger = (atoms * shape[1] + nonzeros * shape[0]) * itemsize + shape[0] * math.ceil(atoms / 8)
        assert larger > keep * shape[0] * shape[1] * itemsize


def test_the_papers_count_leaves_the_support_out():
    d_out, d_in, keep = 512, 256, 0.8
    size = dictionary_size((d_out, d_in), 2, keep, 2.0)
    atoms, nonzeros = size.chosen["atoms"], size.chosen["nonzeros"]
    # γ_mask has ρ s d_out / 16 values more than γ; rows of whole bytes add up to 7 bits each
    padding = size.bytes / (2 * d_out * d_in) - nominal_kept((d_out, d_in), atoms, nonzeros) - atoms / 16 / d_in
    assert 0 <= padding < 7 / 16 / d_in
    # where the support is free, the paper's closed form for s at this budget is larger
    assert nonzeros < math.floor(keep * d_in * d_out / (2 * d_in + d_out))


def test_what_does_not_fit_or_make_sense_is_refused():
    with pytest.raises(OutOfReach, match="leaves no atom"):
        dictionary_size((20, 20), 4, 0.1, 2.0)
    with pytest.raises(TransectError, match=r"ratio=0\.5"):
        method("cospadi").settings({"ratio": 0.5})
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("cospadi", "cospadi-shared"):
        for keep, settings, message in (
            (0.01, {}, "leaves no atom"), (0.5, {"ratio": 0}, "from 1 to 16"), (0.5, {"iterations": 0}, "from 1 to"),
            (0.5, {"start": "zero"}, "one of"), (0.5, {"tolerance": -1}, "from 0 to 1"),
        ):  # fmt: skip
            with pytest.raises(TransectError, match=message):
                transect.compress(model, name, keep, DATA, **settings)
    with pytest.raises(TransectError, match="from 2 to"):
        transect.compress(model, "cospadi-shared", 0.5, DATA, layers=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The operators


@pytest.mark.parametrize(("atoms", "nonzeros"), [(11, 4), (16, 16), (1, 1), (8, 3)])
def test_the_operator_is_its_dense_form(atoms, nonzeros):
    made, dense = operator(atoms=atoms, nonzeros=nonzeros, dtype=torch.float64)
    torch.testing.assert_close(made.to_dense(), dense)
    x = torch.randn(2, 3, 7).double()
    torch.testing.assert_close(made(x), x @ dense.T + made.bias)
    twin = build(made.describe()).double()
    twin.load_state_dict(made.state_dict())
    assert_alike(twin(x), made(x))
    assert made.flops == 2 * atoms * (7 + 10)
    assert stored_bytes(made) == 8 * (atoms * 7 + 10 * nonzeros + 10) + 10 * math.ceil(atoms / 8)


def test_gradients_are_those_of_the_dense_form():
    made, _ = operator(dtype=torch.float64)
    x = torch.randn(5, 7).double()
    rows = torch.zeros(10, 11).double().scatter(1, made.coefficients.indices(), made.coefficients.values.detach())
    rows.requires_grad_()
    made(x).square().sum().backward()
    (x @ (rows @ made.dictionary.weight.detach()).T + made.bias.detach()).square().sum().backward()
    expected = rows.grad.gather(1, made.coefficients.indices())
    torch.testing.assert_close(made.coefficients.values.grad, expected)


def test_the_dense_coefficients_follow_every_change():
    made, _ = operator()
    x = torch.randn(3, 7)

    def check(module):
        with torch.no_grad():
            weight = module.to_dense()
            values, indices = module.coefficients.values, module.coefficients.indices()
            rows = torch.zeros(10, 11, dtype=values.dtype).scatter(1, indices, values)
            assert torch.equal(module.coefficients.dense(), rows)
            torch.testing.assert_close(module(x.to(values)), x.to(values) @ weight.T + module.bias)

    check(made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.001)
    made(x).square().sum().backward()
    optimizer.step()
    check(made)
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.coefficients.values.mul_(2)
    check(twin)
    check(made)
    assert not torch.equal(twin.to_dense(), made.to_dense())
    made.load_state_dict(twin.state_dict())
    check(made)
    check(made.double())
    check(made.bfloat16().float())
    kept = stored_bytes(made)
    check(made)
    assert stored_bytes(made) == kept and len(made.state_dict()) == 5


def test_what_is_kept_follows_wide_arithmetic_and_back():
    """Evaluation holds numbers of 16 bits as float32 for a while, in the same parameters."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for made, d_in in ((operator(dtype=torch.bfloat16)[0], 7), (two_four(weight, weight.float().abs()), 8)):
        x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad():
            before = made(x)
            with computing_wide(made):
                torch.testing.assert_close(made(x.float()), before.float(), rtol=0.1, atol=0.2)
            assert torch.equal(made(x), before)


def test_it_works_frozen_under_inference_mode_autocast_and_compile():
    made, dense = operator()
    made.requires_grad_(False)
    x = torch.randn(3, 7)
    with torch.inference_mode():
        first = made(x)
    x.requires_grad_()
    made(x).sum().backward()  # what inference mode has kept serves training of what lies below
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 7))
    torch.testing.assert_close(first, made(x).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    compiled = torch.compile(made, backend="eager")
    torch.testing.assert_close(compiled(x), made(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x))


def test_rows_and_columns_are_selected():
    made, dense = operator()
    rows, columns = torch.tensor([7, 0, 3]), torch.tensor([6, 1])
    chosen = made.select(rows, columns)
    torch.testing.assert_close(chosen.to_dense(), dense[rows][:, columns])
    assert (chosen.out_features, chosen.in_features) == (3, 2) and torch.equal(chosen.bias, made.bias[rows])
    assert build(chosen.describe()).state_dict().keys() == chosen.state_dict().keys()
    torch.testing.assert_close(made.select(None, columns).to_dense(), dense[:, columns])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_refit_is_least_squares_on_the_support_and_never_raises_the_error(dtype):
    weight, x, covariance = problem(10, 7)
    made, _ = operator(dtype=dtype)
    previous = math.inf
    for _ in range(3):
        made.refit(weight, covariance)
        error = ((x @ (weight - made.to_dense().double()).T) ** 2).sum().item()
        assert error <= previous * (1 + (1e-9 if dtype == torch.float64 else 1e-2))
        previous = error
    if dtype == torch.float64:
        dictionary, indices = made.dictionary.weight.detach(), made.coefficients.indices()
        for row in range(10):
            design, wanted = x @ dictionary[indices[row]].T, x @ weight[row]
            best = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
            torch.testing.assert_close(x @ made.to_dense()[row].detach(), design @ best, rtol=1e-5, atol=1e-5)


def test_a_shared_dictionary_is_stored_once():
    single, dense = operator()
    bank = Bank(single.dictionary.weight)
    values, indices = single.coefficients.values, single.coefficients.indices()
    both = [SharedSparseDictionary.from_factors(bank, values, indices, "g", owns) for owns in (True, False)]
    for made in both:
        torch.testing.assert_close(made.to_dense(), dense)
        x = torch.randn(2, 7)
        torch.testing.assert_close(made(x), x @ dense.T)
        assert made.flops == single.flops
    assert stored_bytes(both[0]) - stored_bytes(both[1]) == 4 * 11 * 7
    with pytest.raises(TransectError, match="cannot lose rows or columns"):
        both[0].select(torch.tensor([0]), None)


# Whole models


@pytest.mark.parametrize(
    ("name", "chosen"),
    [*((name, "cospadi") for name in CONFIGS), *((name, "cospadi-shared") for name in ("gpt2", "gpt_neox", "llama"))],
)
def test_every_architecture_is_compressed_within_its_budget_and_loads_again(name, chosen, tmp_path):
    model, batch, auto = tiny(name), inputs(name), CONFIGS[name][1]
    whole = matrix_bytes(Anatomy(model))
    data = DATA if auto is AutoModelForCausalLM else [inputs(name, batch=4, seed=seed) for seed in range(2)]
    transect.compress(model, chosen, 0.6, data, iterations=1)
    assert 0.5 * whole < matrix_bytes(Anatomy(model)) <= 0.6 * whole
    kind = SparseDictionary if chosen == "cospadi" else SharedSparseDictionary
    made = [isinstance(matrix.module, kind) for matrix in Anatomy(model).matrices()]
    assert sum(made) > 0.8 * len(made)  # the frame leaves single matrices dense where sizes leave bytes over
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert_same_model(again, model, batch)


def test_the_frames_refit_lowers_the_output_error():
    """In the first block's q, k and v, whose input no refit before them changes."""
    dense = Anatomy(tiny("llama"))
    settings = {"iterations": 2, "sequences": 12, "batch_size": 12}
    plain, refitted = (
        Anatomy(transect.compress(tiny("llama"), "cospadi", 0.5, DATA, refit=refit, **settings))
        for refit in (False, True)
    )
    seen = InputCovariance()
    statistics = collect(dense, [{"input_ids": DATA}], [seen])
    errors = [0.0, 0.0]
    for role in ("q", "k", "v"):
        weight = dense.blocks[0].matrix(role).weight.double()
        covariance = statistics.value(key_of(dense.blocks[0].matrix(role), seen), seen)
        for index, anatomy in enumerate((plain, refitted)):
            left = weight - anatomy.blocks[0].matrix(role).weight.double()
            errors[index] += ((left @ covariance) * left).sum().item()
    assert errors[1] <= errors[0] * (1 + 1e-4)
    after = [logits(anatomy.model, inputs("llama")) for anatomy in (plain, refitted)]
    assert not torch.equal(*after)


def test_a_shared_dictionary_serves_consecutive_layers_of_one_role():
    model = transect.compress(tiny("llama"), "cospadi-shared", 0.6, DATA, layers=2, **QUICK)
    blocks = Anatomy(model).blocks
    for role in ("q", "down"):
        first, second, third = (block.matrix(role).module for block in blocks)
        assert first.bank is second.bank and third.bank is not first.bank
        assert first.owns_bank and not second.owns_bank and third.owns_bank
    alone = transect.compress(tiny("llama"), "cospadi-shared", 0.6, DATA, layers=3, **QUICK)
    assert len({id(block.matrix("q").module.bank) for block in Anatomy(alone).blocks}) == 1


def test_the_dictionary_outlives_the_layer_that_owns_it(tmp_path):
    model = transect.compress(tiny("llama"), "cospadi-shared", 0.6, DATA, layers=3, **QUICK)
    Anatomy(model).drop_block(0)
    batch = inputs("llama")
    model.save_pretrained(tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert_same_model(again, model, batch)


def test_sharing_minimises_the_error_over_the_layers_together():
    """Two layers with the same weights and inputs need one set of atoms: sharing then buys larger factors."""
    weight, x, covariance = problem(24, 32)
    single, double = (dictionary_size(((n * 24), 32), 4, 0.5, 2.0).chosen for n in (1, 2))
    assert double["atoms"] > single["atoms"]
    alone = learn(weight, covariance, **single)
    shared = learn(torch.cat([weight, weight]), covariance, **double)
    assert ((x @ (weight - shared.to_dense()[:24]).T) ** 2).sum() < ((x @ (weight - alone.to_dense()).T) ** 2).sum()


@pytest.mark.parametrize("chosen", ["cospadi", "cospadi-shared"])
def test_keeping_everything_changes_nothing(chosen):
    model, batch = tiny("llama"), inputs("llama")
    before = logits(model, batch)
    transect.compress(model, chosen, 1.0, DATA)
    assert torch.equal(logits(model, batch), before) and not Anatomy(model).record
