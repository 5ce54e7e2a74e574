"""The tasks: answers against brute force, what is drawn by a seed, bad input."""

import pytest
import torch

from transect.errors import TransectError
from transect.forward.objective import IGNORED
from transect.tasks import task_named, tasks
from transect.tasks.listops import value_of
from transect.tasks.regression import representation

NAMES = [one.name for one in tasks()]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_depends_on_the_seed_alone(name):
    one = task_named(name)
    drawn, again, other = (one.draw(6, seed) for seed in (2, 2, 4))
    assert torch.equal(drawn.inputs, again.inputs)
    torch.testing.assert_close(drawn.answers, again.answers, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(drawn.inputs, other.inputs) and len(drawn.inputs) == 6
    if not drawn.images:
        assert drawn.asked.any(1).all() and drawn.asked.shape == drawn.inputs.shape[:2] and not drawn.asked[:, 0].any()
        assert drawn.over is None or drawn.over.shape == drawn.asked.shape
    if not drawn.images and not drawn.vectors:
        assert drawn.inputs.min() >= 0 and drawn.inputs.max() < drawn.vocabulary
    batches = list(drawn.batches(4))
    assert [len(batch["labels"]) for batch in batches] == [4, 2]
    with pytest.raises(TransectError, match="at least one"):
        one.draw(0, 0)


def test_in_recall_the_answer_is_what_stood_behind_the_key():
    drawn = task_named("recall").draw(50, 1, {"keys": 5, "length": 40, "vocabulary": 32})
    for row, where in zip(drawn.inputs.tolist(), drawn.answers, strict=True):
        pairs = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5 and all(1 <= key < 16 <= value < 32 for key, value in pairs.items())
        asked = where.nonzero()[:, 0].tolist()
        assert len(asked) == 5 and {row[at - 1] for at in asked} == set(pairs)
        assert all(row[at] == pairs[row[at - 1]] for at in asked)
        rest = set(range(10, 40)) - set(asked) - {at - 1 for at in asked}
        assert not any(row[at] for at in rest)
    labels = next(iter(drawn.batches(50)))["labels"]
    assert int((labels != IGNORED).sum()) == 250
    near = task_named("recall").draw(400, 1, {"keys": 1, "length": 64}).answers.nonzero()[:, 1].float()
    assert near.median() < 20  # half of 62 if it were uniform


def test_of_several_counts_of_keys_each_is_drawn_equally_often():
    drawn = task_named("recall").draw(9, 1, {"keys": "2,5,3", "length": 20, "vocabulary": 16})
    assert drawn.answers.sum(1).tolist() == [2, 5, 3] * 3 == drawn.over[:, 0].tolist()
    assert task_named("recall").draw(1, 0, {"keys": 4}).over is None


def test_text_is_cut_from_its_own_part_of_the_data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 900 + "b" * 50 + "c" * 50)
    given = {"data": str(path), "length": 8}
    seen = [set(task_named("text").draw(50, seed, given).inputs.unique().tolist()) for seed in (0, 1, 3)]
    assert seen == [{ord("a")}, {ord("b")}, {ord("c")}]
    other = tmp_path / "held_out.txt"
    other.write_text("d" * 20 + "é" * 20)
    given["eval_data"] = str(other)
    assert task_named("text").draw(50, 1, given).inputs.max() == "é".encode()[0]
    before = task_named("text").source(tokenizer="bytes", **given)
    other.write_text("e" * 60)
    assert task_named("text").source(tokenizer="bytes", **given) != before
    assert set(task_named("text").draw(5, 3, given).inputs.unique().tolist()) == {ord("e")}
    with pytest.raises(TransectError, match="is too short: 30 tokens"):
        task_named("text").draw(1, 0, {**given, "length": 40})
    assert task_named("text").draw(2, 0, {"tokenizer": "organism"}).vocabulary > 256
    with pytest.raises(TransectError, match="has no tokenizer that can be loaded"):
        task_named("text").draw(1, 0, {"tokenizer": str(tmp_path)})


def test_rows_of_the_world_begin_with_documents_of_its_entities():
    from transect.organism import World
    from transect.tasks.text import tokenizer_of

    drawn = task_named("world").draw(20, 3, {"entities": 3, "length": 32})
    names = {entity for entity in World().entities}
    said = tokenizer_of("organism").batch_decode(drawn.inputs)
    assert {word for text in said for word in text.split() if word in names} <= set(World().entities[:3])
    firsts = {text.split()[0] for text in said}
    assert len(firsts) > 3 and not firsts & {".", ",", ":"}


def test_copies_and_inductions():
    drawn = task_named("copying").draw(20, 3, {"length": 12, "vocabulary": 9})
    assert torch.equal(drawn.inputs[:, 6:11], drawn.inputs[:, :5]) and (drawn.inputs[:, 5] == 0).all()
    assert drawn.answers.sum(1).tolist() == [5] * 20 and drawn.answers[:, 6:11].all()
    drawn = task_named("induction").draw(50, 3, {"length": 10, "vocabulary": 9})
    for row in drawn.inputs.tolist():
        first = row.index(0)
        assert row[-2] == 0 and row.count(0) == 2 and row[-1] == row[first + 1]


def test_listops_are_evaluated_as_a_reader_would():
    names = {10: "max", 11: "min", 12: "median", 13: "sum"}

    def read(tokens):
        token = tokens.pop(0)
        if token < 10:
            return token
        values = []
        while tokens[0] != 14:
            values.append(read(tokens))
        tokens.pop(0)
        assert 2 <= len(values) <= 5
        return value_of(names[token], values)

    drawn = task_named("listops").draw(60, 1, {"length": 40, "depth": 4})
    longest = 0
    for row in drawn.inputs.tolist():
        said = [token for token in row if token != 16]
        longest = max(longest, len(said))
        *expression, equals, value = said
        assert equals == 15 and row[-1] == value and read(expression) == value and not expression
    assert longest > 25
    assert value_of("median", [5, 1, 9, 2]) == 2 and value_of("sum", [9, 8]) == 7


def scored(one, drawn, given):
    """The squared errors of the baselines."""
    assert one.baselines is not None
    return one.baselines(drawn, **one.settings(given))


@pytest.mark.parametrize("features", [0, 5])
def test_a_sequence_goes_on_by_its_own_rule(features):
    given = {"order": 3, "points": 24, "noise": 0.0, "features": features}
    one = task_named("icl-autoregression")
    drawn = one.draw(20, 1, given)
    numbers, width = drawn.inputs[..., 0].double(), features or 3
    assert drawn.inputs.shape == (20, 24, 1) and torch.equal(drawn.answers[:, 3:], drawn.inputs[:, 3:, 0])
    for row in numbers[:4]:
        windows = torch.stack([row[at - 3 : at] for at in range(3, 24)])
        seen = representation(windows / windows.square().mean(-1, keepdim=True).sqrt(), features)
        rule = torch.linalg.lstsq(seen[:width], row[3 : 3 + width]).solution  # as many examples as unknowns
        torch.testing.assert_close(seen @ rule, row[3:], atol=1e-3, rtol=0)
    assert 0.1 < float(drawn.answers.nan_to_num().square().mean()) < 3
    assert drawn.over is not None and drawn.over[0, 2:5].tolist() == [0, 1, 2]
    scores = scored(one, drawn, given)
    asked = drawn.over
    assert (
        float(scores["least squares"][asked > width].max()) < 1e-3 < float(scores["least squares"][asked == 2].mean())
    )
    assert torch.equal(scores["ridge"].nan_to_num(), scores["least squares"].nan_to_num())
    torch.testing.assert_close(scores["nothing"], drawn.answers.square(), equal_nan=True)
    noisy = one.draw(400, 1, {**given, "noise": 0.5})
    found = scored(one, noisy, {**given, "noise": 0.5})
    assert found["ridge"].nanmean() < found["least squares"].nanmean() and found["ridge"].nanmean() > 0.25


def test_a_chain_is_a_network_of_its_own_step_by_step():
    given = {"dimensions": 3, "points": 8, "steps": 2, "hidden": 4}
    one = task_named("icl-chain")
    drawn = one.draw(30, 1, given)
    chains = drawn.inputs.double().unflatten(1, (8, 9))
    x, first, second = chains[:, :, 0], chains[:, :, 1:5, 0], chains[:, :, 5:, 0]
    assert not chains[:, :, 1:, 1:].any()
    assert drawn.over is not None and drawn.over[0, [0, 8, 9, 71]].tolist() == [1, 1, 2, 8]
    for before, behind, width in ((x, first, 3), (first, second, 4)):
        linear = torch.where(behind > 0, behind, 5 * behind)  # what stood before the function, but for one factor
        weight = torch.linalg.lstsq(before[:, :width], linear[:, :width]).solution
        torch.testing.assert_close(before @ weight, linear, atol=2e-2, rtol=1e-3)
    assert drawn.asked.unflatten(1, (8, 9)).all(1).all(0).tolist() == [False, *[True] * 8]
    assert float(first.square().mean()) == pytest.approx(1, abs=0.2)
    scores = scored(one, drawn, given)
    torch.testing.assert_close(scores["nothing"][drawn.asked], drawn.answers[drawn.asked].square())
    last = scores["least squares"][:, 45:][drawn.asked[:, 45:]]  # of the sixth chain on, behind five
    assert float(last.median()) < 1e-6 < float(scores["least squares"][:, 1:9].mean())


def test_digits_held_out_are_never_trained_on():
    one = task_named("digits")
    train, held = (one.draw(4000, seed).inputs.flatten(1) for seed in (2, 3))
    seen = {row.numpy().tobytes() for row in train}
    assert not any(row.numpy().tobytes() in seen for row in held)
    assert train.min() >= -1 and train.max() <= 1


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("recall", {"keys": 8, "length": 30}, "even length of 32"),
        ("recall", {"keys": 40, "length": 400, "vocabulary": 64}, "have 31 keys"),
        ("recall", {"keys": "4,x"}, "keys='4,x' should be whole numbers from 1"),
        ("recall", {"keys": "0"}, "should be whole numbers from 1"),
        ("text", {"data": "no-such-file.txt"}, "there is no file or folder"),
        ("icl-boolean", {"family": "conjunction-teaching", "points": 10}, "points must be more, not 10"),
        ("icl-boolean", {"family": "sparse-disjunction", "bits": 3}, "bits must be 4 or more"),
        ("icl-boolean", {"family": "xor"}, "must be one of"),
        ("icl-regression", {"noise": -1}, "noise"),
        ("icl-autoregression", {"order": 9, "points": 10}, "order . 2 = 11"),
        ("copying", {"length": 13}, "should be even"),
        ("listops", {"length": 8}, "need a length of 9"),
        ("recall", {"depth": 3}, "no parameter depth"),
    ],
)
def test_what_cannot_be_drawn_is_said(name, given, said):
    with pytest.raises(TransectError, match=said):
        task_named(name).draw(3, 0, given)
    with pytest.raises(TransectError, match="unknown task 'magic'; known: copying"):
        task_named("magic")
