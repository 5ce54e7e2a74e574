"""The K-FAC edit: its algebra against brute force, what it does to memorised labels, and every architecture."""

from __future__ import annotations

import heapq
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import CAUSAL, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.checkpoint import open_model
from transect.data import Batches, Specimen, load, load_passages
from transect.editing import edit_specimen
from transect.editing.catalog.kfac_edit.kfac_edit import keep_share, papers_layers
from transect.editing.catalog.kfac_edit.recitation import levenshtein, recitation
from transect.errors import NotApplicable, TransectError
from transect.probes.curvature import Curvature, eigenpairs, kept_pairs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def curvature_of(a: Tensor, g: Tensor) -> Curvature:
    return Curvature(*eigenpairs(g), *eigenpairs(a), positions=1000)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """W (7 x 5), A (5 x 5), G (7 x 7)."""
    x, g = random(40, 5, seed=1) * torch.linspace(0.1, 3, 5), random(40, 7, seed=2) * torch.linspace(0.2, 2, 7)
    return random(7, 5), x.T @ x / 40, g.T @ g / 40


def specimen_of(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> Specimen:
    model = tiny(name, dtype=dtype)
    batches = [inputs(name, batch=4, length=16, seed=seed, dtype=dtype) for seed in range(3)]
    return Specimen(Anatomy(model), data=Batches(batches), **more)


def hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


# The algebra


def test_all_of_the_mass_returns_the_matrix():
    weight, a, g = problem()
    edited, kept = keep_share(weight, curvature_of(a, g), 1.0)
    assert kept.all()
    torch.testing.assert_close(edited, weight, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rho", [0.5, 0.8, 0.95])
def test_the_damage_is_the_curvature_of_what_went(rho):
    weight, a, g = problem()
    bent = curvature_of(a, g)
    edited, kept = keep_share(weight, bent, rho)
    change = edited - weight
    coefficients = bent.vectors_out.T @ weight @ bent.vectors_in
    outside = (bent.values_out[:, None] * bent.values_in * coefficients.square())[~kept].sum()
    assert float(outside) > 0
    torch.testing.assert_close((g @ change @ a @ change.T).trace(), outside, rtol=1e-12, atol=1e-12)
    assert edited.norm() < weight.norm()
    again, _ = keep_share(edited, bent, rho)
    torch.testing.assert_close(again, edited, rtol=0, atol=1e-12)


def test_the_pairs_are_those_that_a_heap_would_take():
    _, a, g = problem()
    bent = curvature_of(a, g)
    total, before = float(bent.products.sum()), None
    for rho in (0.3, 0.6, 0.9, 0.99):
        heap = [(-float(bent.products[0, 0]), 0, 0)]
        taken: list[tuple[int, int]] = []
        mass, last = 0.0, 0.0
        while mass < rho * total:
            value, i, j = heapq.heappop(heap)
            if (i, j) in taken:
                continue
            taken.append((i, j))
            last, mass = -value, mass - value
            for k, m in ((i + 1, j), (i, j + 1)):
                if k < 7 and m < 5:
                    heapq.heappush(heap, (-float(bent.products[k, m]), k, m))
        kept = kept_pairs(bent.values_out, bent.values_in, rho)
        assert {tuple(pair) for pair in kept.nonzero().tolist()} == set(taken)
        held = float(bent.products[kept].sum())
        assert held >= rho * total * (1 - 1e-12) and held - last < rho * total
        assert before is None or bool((kept | ~before).all())
        before = kept


def test_the_scale_of_the_factors_and_the_basis_mean_nothing():
    weight, a, g = problem()
    edited, _ = keep_share(weight, curvature_of(a, g), 0.8)
    scaled, _ = keep_share(weight, curvature_of(7 * a, 0.01 * g), 0.8)
    torch.testing.assert_close(scaled, edited, rtol=0, atol=1e-12)
    q, r = torch.linalg.qr(random(7, 7, seed=3))[0], torch.linalg.qr(random(5, 5, seed=4))[0]
    turned, _ = keep_share(q @ weight @ r.T, curvature_of(r @ a @ r.T, q @ g @ q.T), 0.8)
    torch.testing.assert_close(turned, q @ edited @ r.T, rtol=0, atol=1e-11)


# Recitation


def brute_force(first: list[int], second: list[int]) -> int:
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        new = [i]
        for j, other in enumerate(second, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (one != other)))
        row = new
    return row[-1]


def test_the_distance_is_levenshteins():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 6, 11):
        first = torch.randint(0, 4, (50, 9), generator=generator)
        second = torch.randint(0, 4, (50, length), generator=generator)
        expected = [brute_force(*pair) for pair in zip(first.tolist(), second.tolist(), strict=True)]
        assert levenshtein(first, second).tolist() == expected


@pytest.fixture(scope="module")
def bundled() -> Specimen:
    opened = open_model("organism", dtype="float32")
    text = load("organism:calibration", opened.model, opened.tokenizer, sequences=16, full_only=True)
    passages = tuple(load_passages("organism:passages"))[:30]
    return Specimen(Anatomy(opened.model), opened.tokenizer, text, known_passages=passages)


def test_passages_are_forgotten_and_come_back(bundled):
    assert recitation(bundled, bundled.passages) == (1.0, 1.0, 1.0)
    edited = edit_specimen(bundled, "kfac-edit", {"layers": "0", "roles": "down", "rho": 0.95})
    before, after = edited.card["recited word for word, share of 30 passages"]
    assert before == 1.0 and after < 0.25
    before, after = edited.card["loss on the text that the edit was given, nats"]
    assert before < after < 1.1 * before
    assert [row["matrix"] for row in edited.card.changes] == ["blocks.0.mlp.down"]
    assert 0 < recitation(bundled, bundled.passages).likeness < 0.9
    edited.undo()
    assert recitation(bundled, bundled.passages) == (1.0, 1.0, 1.0)


# Memorised labels: the card's experiment with scikit-learn's digits


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


@pytest.fixture(scope="module")
def noisy() -> dict[str, Any]:
    """A classifier that has fitted 10 % of wrong labels, and the curvature of its middle matrix."""
    digits: Any = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(digits.target))
    x, true = torch.tensor(digits.data / 16.0).float()[order], torch.tensor(digits.target)[order]
    train, labels = x[:1300], true[:1300].clone()
    wrong = torch.arange(1300) < 130
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (130,))) % 10
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(60):
        for part in torch.randperm(1300).split(65):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(train[part]), labels[part]).backward()
            optimizer.step()
    hidden = net[1](net[0](train)).detach()
    out = net[2](hidden).detach().requires_grad_()
    scores = net[4](net[3](out))
    drawn = torch.multinomial(scores.detach().softmax(-1), 1)[:, 0]
    nn.functional.cross_entropy(scores, drawn, reduction="sum").backward()
    assert out.grad is not None
    bent = curvature_of((hidden.double().T @ hidden.double()), (out.grad.double().T @ out.grad.double()))
    return {"net": net, "train": train, "labels": labels, "wrong": wrong, "true": true, "x": x, "bent": bent}


@torch.no_grad()
def scores(noisy: dict[str, Any], weight: Tensor) -> dict[str, float]:
    net = noisy["net"]
    hidden = torch.relu(net[0](noisy["x"]))
    given = net[4](torch.relu(hidden @ weight.float().T + net[2].bias)).argmax(-1)
    wrong, train = noisy["wrong"], given[:1300]

    def share(right: Tensor) -> float:
        return float(right.double().mean())

    return {
        "fitted": share((train == noisy["labels"])[wrong]), "true": share((train == noisy["true"][:1300])[wrong]),
        "clean": share((train == noisy["labels"])[~wrong]), "validation": share((given == noisy["true"])[1300:]),
    }  # fmt: skip


def test_memorised_labels_go_and_the_truth_comes(noisy):
    weight = noisy["net"][2].weight.detach().double()
    before = scores(noisy, weight)
    after = scores(noisy, keep_share(weight, noisy["bent"], 0.9)[0])
    assert before["fitted"] > 0.9
    assert after["fitted"] < before["fitted"] - 0.3 and after["true"] > before["true"] + 0.3
    assert after["clean"] > before["clean"] - 0.05 and after["validation"] > before["validation"] - 0.03


def test_it_beats_svd_at_equal_validation_accuracy(noisy):
    weight = noisy["net"][2].weight.detach().double()
    after = scores(noisy, keep_share(weight, noisy["bent"], 0.9)[0])
    u, s, v = torch.linalg.svd(weight)
    truncated = [scores(noisy, (u[:, :rank] * s[:rank]) @ v[:rank]) for rank in range(1, 64)]
    as_good = [one for one in truncated if one["validation"] >= after["validation"] - 0.005]
    assert as_good and after["fitted"] < min(one["fitted"] for one in as_good)


# Every architecture


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture(name):
    specimen = specimen_of(name)
    model, batch = specimen.model, inputs(name)
    before, count = logits(model, batch), hooks(model)
    kept_whole = edit_specimen(specimen, "kfac-edit", {"layers": "all", "roles": "q,o,gate,up,down", "rho": 1})
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-9)
    kept_whole.undo()
    edited = edit_specimen(specimen, "kfac-edit", {"layers": "1", "rho": 0.7})
    assert {row["matrix"].rpartition(".")[0] for row in edited.card.changes} == {"blocks.1.mlp"}
    assert not torch.equal(logits(model, batch), before) and hooks(model) == count
    edited.undo()
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_image_classifiers(name):
    specimen = specimen_of(name)
    before = logits(specimen.model, inputs(name, dtype=torch.float64))
    edited = edit_specimen(specimen, "kfac-edit", {"layers": "0", "roles": "up,down", "rho": 0.75})
    assert {row["matrix"] for row in edited.card.changes} == {"blocks.0.mlp.up", "blocks.0.mlp.down"}
    assert not torch.equal(logits(specimen.model, inputs(name, dtype=torch.float64)), before)


def test_a_masked_model_without_labels_is_refused_and_unchanged():
    specimen = specimen_of("bert")
    specimen = Specimen(specimen.anatomy, data=specimen.data)
    before = {name: tensor.clone() for name, tensor in specimen.model.state_dict().items()}
    with pytest.raises(TransectError, match="labels"):
        edit_specimen(specimen, "kfac-edit", {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in specimen.model.state_dict().items())
    assert hooks(specimen.model) == 0


def test_half_precision_keeps_its_dtype():
    specimen = specimen_of("llama", torch.bfloat16)
    edit_specimen(specimen, "kfac-edit", {"layers": "1", "rho": 0.7})
    assert {parameter.dtype for parameter in specimen.model.parameters()} == {torch.bfloat16}


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0}, "rho must be above 0"),
        ({"rho": 1.5}, "from 0 to 1"),
        ({"layers": "9"}, "blocks 0 to 2"),
        ({"layers": "2-1"}, "do not exist"),
        ({"layers": "late"}, "numbers and ranges"),
        ({"roles": "up,mlp"}, "should name some of"),
        ({"roles": ""}, "should name some of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(TransectError, match=message):
        edit_specimen(specimen_of("llama"), "kfac-edit", settings)


def test_roles_that_the_model_does_not_have():
    with pytest.raises(TransectError, match="have no gate"):
        edit_specimen(specimen_of("gpt2"), "kfac-edit", {"roles": "gate"})


def test_without_text():
    with pytest.raises(NotApplicable, match="needs text"):
        edit_specimen(Specimen(Anatomy(tiny("llama"))), "kfac-edit", {})


def test_the_papers_layers_at_other_depths():
    assert papers_layers(32) == [23, 24, 25]
    assert papers_layers(4) == [3] and papers_layers(1) == [0]


def test_few_tokens_are_said_to_be_few():
    notes = edit_specimen(specimen_of("llama"), "kfac-edit", {"layers": "1"}).card.notes
    assert notes["tokens for the curvature"] == 3 * 4 * 15 and "warning" not in notes
    small = Specimen(Anatomy(tiny("llama")), data=Batches([inputs("llama", length=5)]))
    assert "blocks.1.mlp.up" in edit_specimen(small, "kfac-edit", {"layers": "1"}).card.notes["warning"]
