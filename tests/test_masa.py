"""Shared atoms: the operator, matrix PCA and the conversion, layers to train, and banks that move and are stored."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import transect
from transect.anatomy import Anatomy
from transect.claims import Verdict, run_claims
from transect.compression import method
from transect.compression.catalog.masa import balanced, best_split, families_of, matrix_pca, splits
from transect.compression.frame import temporarily
from transect.errors import OutOfReach, TransectError
from transect.evaluation import matrix_bytes, parameters
from transect.layers import share_attention, store_coefficients
from transect.operators import Bank, LowRank, build
from transect.operators.atoms import Atoms, EmbeddedAtoms

from .models import (
    CAUSAL,
    CONFIGS,
    TOLERANCE,
    assert_alike,
    assert_same_model,
    assert_same_tensors,
    inputs,
    logits,
    tiny,
)
from .test_claims import random_data
from .test_compress import DATA, data_for


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(count=3, atoms=2, d_out=5, d_in=7, rank=0):
    """Operators of `count` layers that share `atoms` atoms; the first owns them."""
    bank = Bank(randn(atoms, d_out, d_in))
    return [
        Atoms.from_numbers(
            "q.0", bank, layer == 0, randn(atoms, seed=layer + 1),
            (randn(d_out, rank, seed=layer), randn(rank, d_in, seed=layer)) if rank else None, randn(d_out, seed=layer),
        )
        for layer in range(count)
    ]  # fmt: skip


def converted(name, keep=None, **settings):
    """A tiny model with attention at about three quarters."""
    model = tiny(name)
    keep = keep or keep_of_attention(model, 0.75, settings.get("projections", "qkv"))
    return transect.compress(model, "masa", keep, data_for(name), **settings)


def keep_of_attention(model, share, projections="qkv"):
    anatomy = Anatomy(model)
    return 1 - (1 - share) * anatomy.matrix_bytes(list(projections)) / anatomy.matrix_bytes()


# The operator


@pytest.mark.parametrize("rank", [0, 2])
def test_the_operator_is_its_mixture(rank):
    for operator in layers(rank=rank):
        expected = sum(c * atom for c, atom in zip(operator.coefficients, operator.bank.weight, strict=True))
        if rank:
            expected = expected + operator.left @ operator.right
        torch.testing.assert_close(operator.to_dense(), expected)
        for batch in ((), (3,), (2, 4)):
            x = randn(*batch, 7, seed=9)
            torch.testing.assert_close(operator(x), linear(x, expected, operator.bias))
            with torch.no_grad():
                torch.testing.assert_close(operator(x), linear(x, expected, operator.bias))
        assert operator.flops == 2 * 5 * 7
        twin = build(operator.describe()).double()
        if not operator.owns_bank:
            twin.use_bank(operator.bank)
        twin.load_state_dict(operator.state_dict())
        assert_alike(twin(x), operator(x))
        assert twin.describe() == operator.describe()


def test_limits_one_matrix_for_all_and_one_for_each():
    one = Bank(randn(1, 5, 7))
    alike = [Atoms.from_numbers("q.0", one, layer == 0, torch.ones(1).double()) for layer in range(3)]
    assert torch.equal(alike[0].to_dense(), alike[2].to_dense())
    each = Bank(randn(3, 5, 7))
    for layer in range(3):
        operator = Atoms.from_numbers("q.0", each, layer == 0, torch.eye(3).double()[layer])
        assert torch.equal(operator.to_dense(), each.weight[layer])


def test_mixing_the_atoms_and_unmixing_the_coefficients_changes_nothing():
    operators, mix = layers(), randn(2, 2, seed=8)
    mixed = Bank(torch.einsum("sij,st->tij", operators[0].bank.weight.detach(), mix))  # D M
    for operator in operators:
        twin = Atoms.from_numbers("q.0", mixed, False, torch.linalg.solve(mix, operator.coefficients.detach()))
        torch.testing.assert_close(twin.to_dense(), operator.to_dense())


def test_gradients_of_atoms_and_coefficients_are_those_of_the_card():
    operators, x = layers(rank=2), randn(6, 7, seed=9)
    per_layer = []
    for operator in operators:
        weight = operator.to_dense().detach().requires_grad_()
        linear(x, weight, operator.bias.detach()).pow(3).sum().backward()
        per_layer.append(weight.grad)
        operator(x).pow(3).sum().backward()
    atoms = operators[0].bank.weight
    expected = sum(
        operator.coefficients[:, None, None] * gradient for operator, gradient in zip(operators, per_layer, strict=True)
    )
    torch.testing.assert_close(atoms.grad, expected.detach())
    for operator, gradient in zip(operators, per_layer, strict=True):
        torch.testing.assert_close(operator.coefficients.grad, (atoms * gradient).sum((1, 2)).detach())


def change_bank(operators):
    operators[0].bank.weight.mul_(2)


def change_coefficient(operators):
    operators[1].coefficients[0] += 1


def change_correction(operators):
    operators[1].right.zero_()


def load_another(operators):
    operators[0].load_state_dict({name: tensor + 1 for name, tensor in operators[0].state_dict().items()})


def swap_parameter(operators):
    operators[0].bank.weight = torch.nn.Parameter(operators[0].bank.weight + 1)


def write_through_data(operators):
    operators[0].bank.weight.data.mul_(2)
    operators[1].eval()


def cast(operators):
    for operator in operators:
        operator.bfloat16().double()


def one_step(operators):
    weight = operators[0].bank.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize(
    "change",
    [
        change_bank,
        change_coefficient,
        change_correction,
        load_another,
        swap_parameter,
        write_through_data,
        cast,
        one_step,
    ],
)
def test_what_was_built_is_kept_until_something_changes(change):
    operators, x = layers(rank=2), randn(3, 7, seed=9)
    with torch.no_grad():
        before = operators[1](x)
        built = operators[1]._matrix("cpu")
        assert operators[1]._matrix("cpu") is built  # kept
        change(operators)
        now = operators[1](x)
        torch.testing.assert_close(now, linear(x, operators[1].to_dense(), operators[1].bias))
        assert not torch.equal(now, before)


def test_what_was_built_is_neither_stored_nor_copied():
    operators = layers()
    names = set(operators[1].state_dict())
    with torch.no_grad():
        operators[1](randn(3, 7))
    assert set(operators[1].state_dict()) == names == {"weight", "coefficients", "bias"}
    for twin in (copy.deepcopy(operators[1]), pickle.loads(pickle.dumps(operators[1]))):
        assert "_remade" not in vars(twin)
        assert_alike(twin.to_dense(), operators[1].to_dense())
    with torch.inference_mode():
        inside = Atoms.from_numbers("q.0", Bank(randn(2, 5, 7)), True, randn(2))
        assert inside(randn(3, 7)).shape == (3, 5)


def test_it_works_under_autocast_and_compile():
    operator = layers(rank=2)[0].float()
    x = torch.randn(3, 7)
    with torch.no_grad():
        plain = operator(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert operator(x).dtype == torch.bfloat16
        assert torch.equal(operator(x), plain)
        compiled = torch.compile(operator, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), plain)


# Matrix PCA and the split


def test_matrix_pca_is_the_svd_of_the_stacked_matrices():
    weights = randn(4, 5, 7) + randn(5, 7, seed=1)
    atoms, coefficients = matrix_pca(weights)
    flat = atoms.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(4).double())
    torch.testing.assert_close(torch.einsum("ls,sij->lij", coefficients, atoms), weights, rtol=0, atol=1e-12)
    sigma = torch.linalg.svdvals(weights.flatten(1))
    for count in (1, 2, 3):
        error = weights - torch.einsum("ls,sij->lij", coefficients[:, :count], atoms[:count])
        assert error.square().sum().item() == pytest.approx(sigma[count:].square().sum().item(), rel=1e-9)
    scaled, balance = balanced(atoms[:2], coefficients[:, :2])
    mixed = torch.einsum("ls,sij->lij", coefficients[:, :2], atoms[:2])
    torch.testing.assert_close(torch.einsum("ls,sij->lij", balance, scaled), mixed)
    torch.testing.assert_close(balance.square().mean(0), torch.ones(2).double())


def test_matrix_pca_of_repeated_and_of_empty_layers():
    weights = torch.cat([randn(2, 5, 7), randn(1, 5, 7), torch.zeros(1, 5, 7)])
    weights[1] = weights[0]
    for given in (weights, torch.zeros(3, 5, 7).double()):
        atoms, coefficients = matrix_pca(given)
        atoms, coefficients = balanced(atoms[:2], coefficients[:, :2])
        assert torch.isfinite(atoms).all() and torch.isfinite(coefficients).all()
        torch.testing.assert_close(torch.einsum("ls,sij->lij", coefficients, atoms), given, rtol=0, atol=1e-7)


def test_splits_spend_the_budget_and_the_best_one_is_found():
    weights = randn(4, 6, 8) + 2 * randn(6, 8, seed=1)
    metrics = [(x := randn(20, 8, seed=layer)).T @ x for layer in range(4)]
    share, whole = 0.8, 4 * 6 * 8
    atoms, coefficients = matrix_pca(weights)
    errors = {}
    for count, rank in splits(4, 6, 8, share):
        used = count * 48 + 4 * count + 4 * rank * 14
        assert used <= share * whole < used + 4 * 14
        missing = weights - torch.einsum("ls,sij->lij", coefficients[:, :count], atoms[:count])
        total = 0
        for layer, metric in enumerate(metrics):
            root = torch.linalg.cholesky(metric)
            tail = torch.linalg.svdvals(missing[layer] @ root)[rank:].square().sum()
            total += tail / (weights[layer] @ root).square().sum()
        errors[count, rank] = float(total)
    assert set(errors) == {(1, 1), (2, 0)}
    assert best_split(weights, atoms, coefficients, metrics, share) == min(errors, key=lambda key: errors[key])
    assert list(splits(4, 6, 8, 0.25)) == [] and list(splits(4, 6, 8, 0.25 + 4 / whole)) == [(1, 0)]


# The conversion


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_is_converted_saved_and_loaded(name, tmp_path):
    dense, batch = tiny(name), inputs(name)
    keep = keep_of_attention(dense, 0.75, "qkvo")
    model = transect.compress(copy.deepcopy(dense), "masa", keep, data_for(name), projections="qkvo")
    whole = matrix_bytes(Anatomy(dense))
    assert (keep - 0.03) * whole < matrix_bytes(Anatomy(model)) <= keep * whole
    shared = [matrix for matrix in Anatomy(model).matrices() if isinstance(matrix.module, Atoms)]
    assert {matrix.role for matrix in shared} == {"q", "k", "v", "o"} and len(shared) == 12
    model.save_pretrained(tmp_path / "small")
    again = CONFIGS[name][1].from_pretrained(tmp_path / "small")
    assert_same_model(again, model, batch)
    assert matrix_bytes(Anatomy(again)) == matrix_bytes(Anatomy(model))
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert sum("bank" in key for key in stored) == 4  # one bank a projection
    if name in CAUSAL:
        chosen = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        ids = batch["input_ids"]
        assert torch.equal(again.generate(ids, **chosen), model.generate(ids, **chosen, use_cache=False))


def test_a_larger_budget_loses_less_and_everything_loses_nothing():
    model, batch = tiny("llama", dtype=torch.float64), inputs("llama")
    anatomy = Anatomy(model)
    weights = {matrix.name: matrix.weight.clone() for matrix in anatomy.matrices("q")}
    errors = []
    for share in (0.4, 0.6, 0.8, 0.95):
        small = Anatomy(transect.compress(copy.deepcopy(model), "masa", keep_of_attention(model, share), DATA))
        errors.append(sum((m.weight - weights[m.name]).square().sum().item() for m in small.matrices("q")))
    assert errors == sorted(errors, reverse=True)
    expected = logits(model, batch)
    assert torch.equal(logits(transect.compress(model, "masa", 1.0, DATA), batch), expected)


def test_layers_that_are_mixtures_already_are_found_exactly():
    """Three layers of two atoms: S = 2 fits in 0.75, and nothing is lost."""
    model, batch = tiny("llama", dtype=torch.float64), inputs("llama")
    blocks = Anatomy(model).blocks
    for role in "qkv":
        first, second, third = (block.matrix(role) for block in blocks)
        third.write(0.5 * first.weight - 2 * second.weight)
    expected = logits(model, batch)
    transect.compress(model, "masa", keep_of_attention(model, 0.75), DATA)
    assert len(Anatomy(model).blocks[0].matrix("q").module.coefficients) == 2
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-7)


def test_groups_are_neighbours_of_one_shape():
    model = tiny("gpt2")
    anatomy = Anatomy(model)
    assert [[m.name for m in family] for family in families_of(anatomy, "q", 2)] == [
        ["blocks.1.attention.q", "blocks.2.attention.q"]
    ]
    anatomy.blocks[0].attention.keep([0, 1])
    assert [len(family) for family in families_of(anatomy, "qkv", 0)] == [2, 2, 2]
    transect.compress(model, "masa", keep_of_attention(model, 0.9), DATA)
    assert [isinstance(matrix.module, Atoms) for matrix in Anatomy(model).matrices("q")] == [False, True, True]
    model = tiny("gpt2")
    Anatomy(model).blocks[1].attention.drop()
    assert [len(family) for family in families_of(Anatomy(model), "qkv", 0)] == [2, 2, 2]


def test_what_cannot_be_done_is_refused_before_any_work():
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        OutOfReach, match=r"the matrices q, k, v only, which are .*the smallest keep here is 0\.\d+"
    ) as found:
        transect.compress(model, "masa", 0.5, DATA)
    smallest = float(str(found.value).rpartition(" ")[2])
    with pytest.raises(OutOfReach):
        transect.compress(model, "masa", smallest - 2e-4, DATA)
    for change, message in (
        ({"keep": 0.9, "data": None}, "needs calibration"), ({"keep": 0.9, "roles": ["q"]}, "whole sublayers"),
        ({"keep": 0.9, "projections": "mlp"}, "one of"), ({"keep": 0.9, "group_size": 1}, "two neighbouring blocks"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=message):
            transect.compress(model, "masa", **{"data": DATA, **change})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    transect.compress(model, "masa", smallest, DATA)
    assert matrix_bytes(Anatomy(model)) <= smallest * matrix_bytes(Anatomy(tiny("llama")))
    with pytest.raises(TransectError, match=r"blocks.0.attention.q is stored as Atoms"):
        transect.compress(model, "masa", 0.9, DATA)


# Banks: moved, copied, dropped, replaced


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_dropping_the_block_that_owns_a_bank_hands_it_over(name, tmp_path):
    model = converted(name)
    expected = {m.name: m.weight.clone() for block in Anatomy(model).blocks[1:] for m in block.matrices()}
    Anatomy(model).drop_block(0)
    anatomy = Anatomy(model)
    for matrix in anatomy.matrices():
        torch.testing.assert_close(
            matrix.weight, expected[matrix.name.replace(f".{matrix.block.index}.", f".{matrix.block.index + 1}.")]
        )
    assert [m.module.owns_bank for m in anatomy.matrices("q")] == [True, False]
    model.save_pretrained(tmp_path / "dropped")
    again = CONFIGS[name][1].from_pretrained(tmp_path / "dropped")
    assert_same_model(again, model, inputs(name))
    Anatomy(again).blocks[0].attention.drop()  # and once more, after loading
    again.save_pretrained(tmp_path / "once_more")
    last = CONFIGS[name][1].from_pretrained(tmp_path / "once_more")
    assert_same_model(last, again, inputs(name))


def test_replacing_the_matrix_that_owns_a_bank_hands_it_over(tmp_path):
    model = converted("llama")
    matrix = Anatomy(model).blocks[0].matrix("q")
    matrix.replace(LowRank.from_factors(torch.randn(32, 3), torch.randn(3, 32)))
    assert [getattr(m.module, "owns_bank", None) for m in Anatomy(model).matrices("q")] == [None, True, False]
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same_model(again, model, inputs("llama"))


def test_what_is_replaced_for_a_while_gets_its_bank_back(tmp_path):
    model = converted("llama")
    anatomy, before, names = Anatomy(model), logits(model, inputs("llama")), set(model.state_dict())
    with temporarily(anatomy, anatomy.matrices()):
        for matrix in anatomy.matrices("q"):
            matrix.replace(LowRank.from_factors(torch.randn(32, 3), torch.randn(3, 32)))
    assert set(model.state_dict()) == names and torch.equal(logits(model, inputs("llama")), before)
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same_model(again, model, inputs("llama"))


def test_copies_casts_and_optimizers_see_every_atom_once():
    model, batch = converted("llama"), inputs("llama")
    before = logits(model, batch)
    twin = copy.deepcopy(model)
    assert_same_model(twin, model, batch)
    banks = {id(matrix.module.bank) for matrix in Anatomy(twin).matrices(list("qkv"))}
    assert len(banks) == 3 and not banks & {id(matrix.module.bank) for matrix in Anatomy(model).matrices(list("qkv"))}
    with torch.no_grad():
        Anatomy(twin).blocks[0].matrix("v").module.bank.weight.zero_()
    assert not torch.equal(logits(twin, batch), before) and torch.equal(logits(model, batch), before)
    listed = [id(parameter) for parameter in model.parameters()]
    assert len(listed) == len(set(listed))
    atoms = {id(matrix.module.bank.weight) for matrix in Anatomy(model).matrices(list("qkv"))}
    assert atoms <= set(listed)
    torch.testing.assert_close(logits(copy.deepcopy(model).double(), batch).float(), before, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(model).bfloat16()
    assert logits(half, batch).dtype == torch.bfloat16
    torch.testing.assert_close(logits(half, batch).float(), before, rtol=0.1, atol=0.5)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if id(parameter) in atoms)


CHILD = """
import sys, json, torch
from pathlib import Path
root, mode = Path(sys.argv[1]), sys.argv[2]
from transformers import AutoModelForCausalLM
if mode == "trust":
    sys.modules["transect"] = None
else:
    import transect
from tests.models import apart
found = {}
for folder in sorted(root.glob("m-*/")):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=mode == "trust")
    ids, expected = torch.load(root / (folder.name + ".pt"), weights_only=True)
    with torch.no_grad():
        found[folder.name] = apart(model(input_ids=ids).logits, expected)
print("RESULTS" + json.dumps(found))
"""


@pytest.mark.parametrize("mode", ["with", "trust"])
def test_fresh_processes_load_converted_and_trained_models(mode, tmp_path, elsewhere):
    trained = share_attention(tiny("llama"), 2)
    models = {"llama-converted": converted("llama"), "gpt2-converted": converted("gpt2"), "llama-trained": trained}
    for name, model in models.items():
        model.save_pretrained(tmp_path / f"m-{name}")
        batch = inputs(name.split("-")[0])
        torch.save((batch["input_ids"], logits(model, batch)), tmp_path / f"m-{name}.pt")
    found = json.loads(elsewhere.python(CHILD, tmp_path, mode).rpartition("RESULTS")[2])
    assert found.keys() == {f"m-{name}" for name in models}
    assert max(found.values()) <= TOLERANCE[torch.float32]


# The layers to train


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("projections", ["qkv", "qkvo"])
def test_attention_has_the_cards_number_of_parameters(name, projections):
    dense = tiny(name)
    whole = Anatomy(dense).matrix_bytes(list(projections)) / 4
    model = store_coefficients(share_attention(copy.deepcopy(dense), 1, projections))
    assert Anatomy(model).matrix_bytes(list(projections)) / 4 == whole / 3 + 3 * len(projections)  # S/L of it, and L S
    assert parameters(dense) - parameters(model) == whole * 2 / 3 - 3 * len(projections)


def test_training_reaches_every_atom_and_storing_the_coefficients_changes_nothing(tmp_path):
    model, batch = share_attention(tiny("llama"), 2, "qkvo"), inputs("llama")
    listed = [id(parameter) for parameter in model.parameters()]
    assert len(listed) == len(set(listed))
    matrices = Anatomy(model).matrices(list("qkvo"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        for matrix in matrices:
            assert (matrix.module.bank.weight.grad.flatten(1).norm(dim=1) > 1e-4).all(), matrix.name
            assert matrix.module.embedding.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    trained = logits(model, batch)
    model.save_pretrained(tmp_path / "half_way")
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "half_way")
    assert_same_model(resumed, model, batch)
    assert isinstance(Anatomy(resumed).blocks[1].matrix("k").module, EmbeddedAtoms)
    store_coefficients(resumed)
    assert all(isinstance(matrix.module, Atoms) for matrix in Anatomy(resumed).matrices(list("qkvo")))
    assert_alike(logits(resumed, batch), trained)
    resumed.save_pretrained(tmp_path / "done")
    done = AutoModelForCausalLM.from_pretrained(tmp_path / "done")
    assert_same_model(done, resumed, batch)
    assert not any("network" in key or "embedding" in key for key in Anatomy(done).block_list.state_dict())


def test_the_initial_matrices_have_the_dense_initialisations_size():
    model = share_attention(tiny("llama"), 2, seed=3)
    spread = model.config.initializer_range
    for role in "qkv":
        weights = torch.stack([matrix.weight for matrix in Anatomy(model).matrices(role)])
        assert weights.std().item() == pytest.approx(spread, rel=0.15)
        coefficients = torch.stack([matrix.module.coefficients for matrix in Anatomy(model).matrices(role)])
        assert coefficients.square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    assert_same_tensors(share_attention(tiny("llama"), 2, seed=3), model)


def test_sharing_that_cannot_be_is_refused_before_any_change():
    model = tiny("llama")
    before = logits(model, inputs("llama"))
    for arguments, message in (((0,), "from 1 to"), ((4,), "from 1 to"), ((2, "mlp"), "must be 'qkv' or 'qkvo'")):
        with pytest.raises(TransectError, match=message):
            share_attention(model, *arguments)
    assert torch.equal(logits(model, inputs("llama")), before) and not Anatomy(model).record
    Anatomy(model).blocks[0].attention.keep([0, 1])
    with pytest.raises(TransectError, match="one shape"):
        share_attention(model, 2)
    Anatomy(model).blocks[0].attention.drop()
    with pytest.raises(TransectError, match="no attention"):
        share_attention(model, 2)
    with pytest.raises(TransectError, match="already"):
        share_attention(share_attention(tiny("llama"), 2), 2)


def test_the_method_says_what_it_is():
    chosen = method("masa")
    assert [parameter.name for parameter in chosen.parameters] == ["projections", "group_size"]
    assert all(parameter.help for parameter in chosen.parameters) and chosen.summary.endswith(".")


def test_the_claim_compares_the_same_matrices_at_the_same_size():
    model = tiny("llama")
    (outcome,) = run_claims(model, *random_data(model), ["masa"])
    assert outcome.result.verdict in (Verdict.HOLDS, Verdict.DOES_NOT_HOLD) and len(outcome.result.numbers) == 2
    for row, projections in zip(outcome.result.numbers, ("qkv", "qkvo"), strict=True):
        keep = keep_of_attention(model, 0.8, projections)
        assert row["keep"] == pytest.approx(keep)
        for kept in (row["better_kept"], row["worse_kept"]):
            assert keep - 0.03 < kept <= keep
    Anatomy(model).blocks[1].attention.drop()
    Anatomy(model).blocks[0].attention.keep([0, 1])
    (outcome,) = run_claims(model, *random_data(model), ["masa"])
    assert outcome.result.verdict == Verdict.NOT_APPLICABLE and "neighbouring" in outcome.result.explanation
