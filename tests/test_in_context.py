"""Tasks of functions that are learned in context: their labels, teaching sequences, exact learners and baselines."""

import itertools
from math import sqrt

import pytest
import torch

from transect.contest.parts import built
from transect.contest.parts.judging import loss_on, scores_of
from transect.forward.objective import IGNORED, inputs_of
from transect.tasks import task_named
from transect.tasks.boolean.families import FAMILIES, drawn_from
from transect.tasks.boolean.learners import averaging, elimination, nearest, parities

ALL = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive(family, w, x):
    """The function's value, from literals and counts."""
    clauses = [[wj == xj for wj, xj in zip(clause, x, strict=False) if wj] for clause in w]
    score = sum(wj * xj for wj, xj in zip(w[0], x, strict=False))
    ones = sum(bool(wj) and xj > 0 for wj, xj in zip(w[0], x, strict=False))
    return {
        "conjunction": all(clauses[0]), "monotone-teaching": all(clauses[0]), "conjunction-teaching": all(clauses[0]),
        "disjunction": any(clauses[0]), "sparse-disjunction": any(clauses[0]),
        "dnf": any(map(all, clauses)), "dnf-teaching": any(map(all, clauses)), "cnf": all(map(any, clauses)),
        "majority": score > 0.5, "integer-halfspace": score > 0.5, "threshold": score > w[0][-1],
        "parity": ones % 2 == 1, "sparse-parity": ones % 2 == 1,
    }[family]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_the_logic_on_every_input(family):
    one = FAMILIES[family]
    w = one.weights(12, 5, generator())
    found = one.value(w[:, None], ALL[None, :, None])
    assert found.tolist() == [[naive(family, each.tolist(), x.tolist()) for x in ALL] for each in w]
    if family.startswith("sparse"):
        assert w.sum(-1).unique().tolist() == [4 if family == "sparse-disjunction" else 2]
    assert found.float().mean() not in (0, 1)


def test_examples_and_labels_stand_by_turns_and_only_labels_are_asked():
    drawn = task_named("icl-boolean").draw(300, 2, {"bits": 5, "points": 9})
    assert drawn.inputs.shape == (300, 18, 5) and drawn.inputs[:, ::2].abs().eq(1).all()
    labels = drawn.inputs[:, 1::2]
    assert labels[..., 0].abs().eq(1).all() and not labels[..., 1:].any()
    assert torch.equal(drawn.answers[:, 1::2], (labels[..., 0] > 0).long()) and (drawn.answers[:, ::2] == IGNORED).all()
    positive = float((labels[..., 0] > 0).float().mean())
    assert positive == pytest.approx(0.3 + 0.7 * 0.85**5, abs=0.06)  # forced ones, and by chance


def test_a_prediction_depends_on_what_stands_before_it_alone():
    drawn = task_named("icl-boolean").draw(2, 0, {"bits": 5, "points": 6})
    model = built("llama", {}, {}, {"hidden": 16, "blocks": 1, "heads": 2, "vocabulary": 2, "length": 12}, 5)
    batch = next(iter(drawn.batches(2)))
    changed = {**batch, "inputs_embeds": batch["inputs_embeds"].clone()}
    changed["inputs_embeds"][:, 7:] *= -1  # y_4 and all behind it
    with torch.no_grad():
        first, second = (model(**inputs_of(model, one)).logits for one in (batch, changed))
    torch.testing.assert_close(first[:, :7], second[:, :7])
    assert (first[:, 8:] - second[:, 8:]).abs().max() > 1e-3
    loss, count = loss_on(model, drawn)(batch)
    loss.backward()
    assert count == 12 and model.read_in.weight.grad.abs().max() > 0


@pytest.mark.parametrize("monotone", [True, False])
def test_one_conjunction_alone_agrees_with_a_teaching_sequence(monotone):
    family = "monotone-teaching" if monotone else "conjunction-teaching"
    x, labels = drawn_from(family, 40, 20, 4, generator(1))
    literals = list(itertools.product((0, 1) if monotone else (-1, 0, 1), repeat=4))
    values = torch.stack(
        [FAMILIES["conjunction"].value(torch.tensor(w)[None, None, None], x[:, :, None]) for w in literals]
    )
    agrees = (values == (labels > 0)).long().cumprod(dim=-1).sum(dim=0)  # of how many after each example
    taught = [row.index(1) + 1 for row in agrees.tolist()]
    sizes = [
        len([w for w, fits in zip(literals, column, strict=True) if fits])
        for column in (values == (labels > 0)).all(-1).T
    ]
    assert set(sizes) == {1} and max(taught) <= (5 if monotone else 6)
    said = elimination(x, labels, monotone)
    for row, end in enumerate(taught):
        assert torch.equal(said[row, end:], labels[row, end:])


def test_a_teaching_sequence_of_clauses_follows_the_function():
    x, labels = drawn_from("dnf-teaching", 30, 30, 5, generator(2))
    assert (labels[:, :2] > 0).all()  # the first clause's literals are true in both
    assert x.shape == (30, 30, 5) and x.abs().eq(1).all()


def test_elimination_is_never_wrong_where_it_says_yes_and_gets_better():
    x, labels = drawn_from("conjunction", 2000, 24, 8, generator(3))
    said = elimination(x, labels)
    assert (labels[said > 0] > 0).all() and (said > 0).any()
    right = (said == labels).float().mean(dim=0)
    near = (nearest(x, labels, 1) == labels).float().mean(dim=0)
    at = [3, 7, 11, 15, 23]  # as measured with the paper's code, of 8 bits
    assert right[at].tolist() == pytest.approx([0.59, 0.82, 0.91, 0.97, 0.99], abs=0.04)
    assert near[at].tolist() == pytest.approx([0.65, 0.75, 0.82, 0.80, 0.83], abs=0.06)
    x, labels = drawn_from("disjunction", 100, 24, 8, generator(3))
    opposite = -elimination(x, -labels)
    assert (labels[opposite < 0] < 0).all() and (opposite == labels)[:, -6:].float().mean() > 0.95


def test_gaussian_elimination_is_right_where_all_parities_that_agree_are():
    x, labels = drawn_from("parity", 30, 8, 4, generator(4))
    said = parities(x, labels)
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))
    values = 2.0 * FAMILIES["parity"].value(masks[:, None, None, None], x[None, :, :, None]).float() - 1
    agrees = torch.ones(len(masks), 30, dtype=torch.bool)
    certain = 0
    for i in range(8):
        for row in range(30):
            says = set(values[agrees[:, row], row, i].tolist())
            assert float(said[row, i]) in says
            certain += len(says) == 1
        agrees &= values[:, :, i] == labels[:, i]
    assert certain > 30


def test_neighbours_and_averages_are_those_of_a_loop():
    x, labels = drawn_from("majority", 6, 7, 5, generator(5))
    for row in range(6):
        for i in range(7):
            order = sorted(range(i), key=lambda j: (-float(x[row, i] @ x[row, j]), j))
            for count in (1, 3):
                expected = sum(labels[row, j] for j in order[:count])
                assert nearest(x, labels, count)[row, i] == torch.as_tensor(expected, dtype=torch.float32).sign()
            mean = sum(labels[row, j] * x[row, j] for j in range(i)) @ x[row, i] if i else torch.zeros(())
            assert averaging(x, labels)[row, i] == mean.sign()


def test_of_the_task_of_neighbours_the_neighbour_is_right():
    one = task_named("icl-boolean")
    given = {"family": "nearest-neighbour", "bits": 3, "points": 16}
    drawn = one.draw(30, 1, given)
    assert drawn.asked.sum(1).tolist() == [8] * 30 and not drawn.asked[:, :16].any()
    scores = one.baselines(drawn, **given)
    assert scores["1 neighbour"][drawn.asked].mean() == 1 > scores["3 neighbours"][drawn.asked].mean()
    for row in drawn.inputs:
        labels = {}
        for x, y in zip(row[::2].tolist(), row[1::2, 0].tolist(), strict=True):
            assert labels.setdefault(tuple(x), y) == y  # a repeated input keeps its label


def test_regressions_are_what_a_solver_makes_of_the_examples_before():
    one, given = task_named("icl-regression"), {"dimensions": 3, "points": 7, "noise": 0.5}
    drawn = one.draw(200, 1, given)
    scores = one.baselines(drawn, **given)
    x, y = drawn.inputs[:, ::2].double(), drawn.inputs[:, 1::2, 0].double()
    assert torch.equal(drawn.answers[:, 1::2], drawn.inputs[:, 1::2, 0]) and not drawn.inputs[:, 1::2, 1:].any()
    for row, i in ((0, 0), (1, 2), (2, 5)):
        w = torch.linalg.lstsq(x[row, :i], y[row, :i], driver="gelsd").solution if i else torch.zeros(3).double()
        expected = (w @ x[row, i] - y[row, i]) ** 2
        assert float(scores["least squares"][row, 2 * i + 1]) == pytest.approx(float(expected), rel=1e-4)
        augmented = torch.cat([x[row, :i], 0.5 * sqrt(3) * torch.eye(3).double()])  # the penalty as examples of 0
        w = torch.linalg.lstsq(augmented, torch.cat([y[row, :i], torch.zeros(3).double()])).solution
        expected = (w @ x[row, i] - y[row, i]) ** 2
        assert float(scores["ridge"][row, 2 * i + 1]) == pytest.approx(float(expected), rel=1e-4)
    means = {name: float(score[drawn.asked].mean()) for name, score in scores.items()}
    assert means["ridge"] < min(means["least squares"], means["averaging"], means["nothing"])
    plain = {**given, "noise": 0.0}
    drawn = one.draw(20, 1, plain)
    solved = one.baselines(drawn, **plain)["least squares"]
    assert solved[:, 7::2].max() < 1e-6 < solved[:, 1].mean()  # exact from the fourth of three dimensions on


def test_squared_errors_of_a_model_count_where_a_number_is_asked():
    drawn = task_named("icl-regression").draw(3, 0, {"dimensions": 4, "points": 5})
    sizes = {"hidden": 16, "blocks": 1, "heads": 2, "vocabulary": 1, "length": 10}
    model = built("gpt2", {}, {}, sizes, 4)
    batch = next(iter(drawn.batches(3)))
    loss, count = loss_on(model, drawn)(batch)
    loss.backward()
    assert count == 15 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    said = model(**inputs_of(model, batch)).logits[:, ::2, 0]
    errors = scores_of(model, drawn, 2)
    torch.testing.assert_close(errors[:, 1::2], (said - drawn.inputs[:, 1::2, 0]).square().detach())
    assert errors[:, ::2].isnan().all()
