"""Phases of a training recipe: each measurement against what is known of it, and the map with recipes of its own."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from transect.errors import Diverged, TransectError
from transect.probes import Result
from transect.store import Folder
from transect.studies import KIND, run_study, study_named
from transect.studies.catalog.model_zoo_phases import (
    Cell,
    Measures,
    Recipe,
    cell_of,
    measured,
    phase_map,
    phase_of,
    recipes,
    zoo,
)
from transect.training import Schedule, optimizer_named

from .networks import cross_entropy, examples, network, wrong

NAME = "model-zoo-phases"
SMALL = {"widths": "4", "temperatures": "512,1024", "epochs": 2, "products": 3, "curve_epochs": 1}


@pytest.mark.parametrize(
    ("loss", "connectivity", "similarity", "phase"),
    [
        (1.0, -0.5, 0.9, "I"), (1.0, 0.5, 0.1, "II"), (1.0, 0.0, 0.9, "II"), (0.1, -0.5, 0.9, "III"),
        (0.1, -0.05, 0.5, "IV-A"), (0.1, -0.05, 0.9, "IV-B"), (0.1, 0.3, 0.9, "IV-B"), (0.2, 0.0, math.nan, "IV"),
        (math.nan, 0.0, 0.9, "diverged"), (0.2, math.nan, 0.9, "diverged"),
    ],
)  # fmt: skip
def test_phases(loss, connectivity, similarity, phase):
    placed = phase_of(Cell(2.0, loss, connectivity, similarity, 12.5), 0.5)
    assert placed.phase == phase and placed.limits == {"loss": 0.2, "connectivity": 0.1, "similarity": 0.5}
    assert placed.meaning in str(placed) and "sharpness 12.5" in str(placed)  # the raw numbers, always
    if phase in ("IV-A", "IV-B"):
        assert phase_of(placed.cell).phase == "IV"


def test_thresholds_can_be_chosen():
    cell = Cell(2.0, 0.5, -0.3, 0.9)
    assert phase_of(cell, 0.5).phase == "I"
    assert phase_of(cell, 0.5, high=0.3).phase == "III" and phase_of(cell, 0.95, high=0.3, near=0.2).phase == "IV-A"
    with pytest.raises(TransectError, match="initial loss"):
        phase_of(Cell(0.0, 0.5, 0.0, 0.9))


def recipe_of(trained, diverges=()):
    """A recipe of one's own: loads are widths; what is trained is noted."""
    batches = [examples(32, dtype=torch.float32)]

    def train(model, load, temperature, seed):
        trained.append((load, temperature, seed))
        if (load, temperature) in diverges:
            raise Diverged("too hot")
        with torch.no_grad():
            for one in model.parameters():
                one.mul_(temperature)

    measures = Measures(cross_entropy, wrong, lambda model, batch: model(batch[0]), batches, batches, products=5)
    return Recipe(lambda load, seed: network(seed, load, torch.float32), train, measures)


def test_a_map_of_a_recipe_of_ones_own_goes_on_where_it_was(monkeypatch):
    trained, kept = [], {}

    def once(name, make):
        if name not in kept:
            kept[name] = make()
        return kept[name]

    def stop(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "bezier_connectivity", stop)
        with pytest.raises(KeyboardInterrupt):
            phase_map(recipe_of(trained), [2, 4], [0.5, 2.0], [0, 1], once=once)
    assert trained == [(2, 0.5, 0), (2, 0.5, 1)]
    made = phase_map(recipe_of(trained, diverges=[(4, 2.0)]), [2, 4], [0.5, 2.0], [0, 1], once=once)
    assert len(trained) == 8 == len(set(trained))
    assert [one.phase for one in made.placed()[1]][1] == "diverged"
    assert made.figures["training_loss"].isnan().tolist() == [[False, False], [False, True]]
    assert made.figures["initial_loss"].isfinite().all() and made.figures["curve"].shape == (2, 2, 21)
    assert "matched_connectivity" not in made.figures
    models = [recipe_of([]).build(2, seed) for seed in (0, 1)]
    for model in models:
        recipe_of([]).train(model, 2, 0.5, 0)
    found = measured(models, recipe_of([]).measures)
    for name, value in found.items():
        torch.testing.assert_close(made.figures[name][0, 0], value)
    cell = cell_of({**found, "initial_loss": made.figures["initial_loss"][0, 0]})
    assert phase_of(cell, made.similar) == made.placed()[0][0]


def test_a_map_needs_seeds_and_places():
    recipe = recipe_of([])
    for seeds in ([0], [], [1, 1]):
        with pytest.raises(TransectError, match="two seeds"):
            phase_map(recipe, [2], [1.0], seeds)
    with pytest.raises(TransectError, match="load"):
        phase_map(recipe, [], [1.0], [0, 1])
    with pytest.raises(TransectError, match="temperature"):
        phase_map(recipe, [2], [1.0, 1.0], [0, 1])
    made = phase_map(recipe_of([], diverges=[(2, 1.0)]), [2], [1.0], [0, 1])
    assert made.placed()[0][0].phase == "diverged"


def test_the_study(tmp_path, monkeypatch):
    folder = Folder(tmp_path / "study", KIND)
    folder.take()
    found = run_study(study_named(NAME), SMALL, folder=folder)
    assert found["training_loss"].shape == (1, 2) and found["line"].shape == (1, 2, 21)
    assert found.labels["temperature"] == ["1024", "512"]  # from cold to hot
    assert {*found.labels["phase"]} > {"I", "II", "III", "IV-A", "IV-B"}
    assert all(found[name].isfinite().all() for name in found.quantities)
    assert any("Phase" in one for one in found.findings) and found.caveats
    assert len(study_named(NAME).draw(found)) == 12
    for path in (tmp_path / "study" / "data").iterdir():
        path.unlink()  # as if it had been killed before the end

    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(recipes, "train", never)
    again = run_study(study_named(NAME), SMALL, folder=folder)
    assert torch.equal(again["curve"], found["curve"]) and again.findings == found.findings


def test_the_study_of_a_learning_rate_and_of_text(monkeypatch):
    monkeypatch.setattr(recipes, "PIECES", 16)
    settings = {
        "task": "text",
        "widths": "4",
        "temperature": "learning-rate",
        "temperatures": "0.003",
        "epochs": 1,
        "products": 2,
    }
    found = run_study(study_named(NAME), {**settings, "batch_size": 16})
    assert isinstance(found, Result) and found["similarity"].isfinite().all()
    assert "matched_connectivity" not in found.quantities and study_named(NAME).draw(found)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"seeds": 1}, "seeds"), ({"temperatures": "8,4096"}, "4096 examples is not to be had: there are 1437"),
        ({"temperature": "learning-rate", "batch_size": 2000}, "2000 examples"), ({"widths": "4,x"}, "whole numbers"),
        ({"widths": "0,4"}, "whole numbers of"), ({"temperatures": "8,nan"}, "whole numbers"),
        ({"temperature": "learning-rate", "temperatures": "nan"}, "is numbers of"), ({"widths": ""}, "whole numbers"),
        ({"task": "text", "widths": "6"}, "multiple of 4"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_any_training(settings, why, monkeypatch):
    monkeypatch.setattr(recipes, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(TransectError, match=why):
        run_study(study_named(NAME), settings)


def test_labels_that_are_wrong():
    labels = torch.randint(10, (400,))
    noisy = recipes.relabelled(labels, 10, 0.1, seed=0)
    assert int((noisy != labels).sum()) == 40 and int(noisy.min()) >= 0 and int(noisy.max()) < 10
    assert torch.equal(recipes.relabelled(labels, 10, 0.0, seed=0), labels)
    assert torch.equal(recipes.digits(0.1, 3).held_out["labels"], recipes.digits(0.0, 0).held_out["labels"])


def test_a_cell_is_trained_as_by_hand():
    """Width 3 for two epochs, against torch's SGD over the same orders with the same rates."""
    material = recipes.digits(0.1, 0)
    made = recipes.recipe(material, "batch-size", 1, 0.1, 2, 100, 1, "cpu")
    model, other = material.build(3, 5), material.build(3, 5)
    made.train(model, 3, 500, 5)
    schedule = Schedule(0.1, warm_up=0.3)
    stepper = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for step in range(6):
        draw = torch.Generator().manual_seed(5 * 1_000_003 + step // 3)
        chosen = torch.randperm(1437, generator=draw)[step % 3 * 500 : (step % 3 + 1) * 500]
        stepper.param_groups[0]["lr"] = schedule.rate(step, 6)
        stepper.zero_grad()
        x, y = material.training["pixel_values"][chosen], material.training["labels"][chosen]
        functional.cross_entropy(other(x), y).backward()
        stepper.step()
    for one, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6)


def test_sgd_is_by_the_formula():
    x = nn.Parameter(torch.tensor([2.0, -1.0]))
    stepper = optimizer_named("sgd").build([{"params": [("x", x)]}], 0.1, {"momentum": 0.5, "weight_decay": 0.2})
    expected, run = x.detach().clone(), torch.zeros(2)
    for step in range(3):
        x.grad = torch.tensor([1.0, float(step)])
        run = 0.5 * run + x.grad + 0.2 * expected
        expected = expected - 0.1 * run
        stepper.step()
        torch.testing.assert_close(x.detach(), expected)
    with pytest.raises(TransectError, match="momentum"):
        optimizer_named("sgd").build([{"params": [("x", x)]}], 0.1, {"momentum": 1.0})
