"""Transformer programs: the model's exactness, the program against the model, the tasks against brute force."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare

import transect
from transect.errors import Diverged, TransectError
from transect.forward.objective import IGNORED
from transect.studies.catalog.transformer_programs import fitting
from transect.studies.catalog.transformer_programs.branches import by_limit, by_value, chain
from transect.studies.catalog.transformer_programs.fitting import fit, sampled, sequence_losses
from transect.studies.catalog.transformer_programs.model import (
    UNIT,
    ProgramModel,
    Sizes,
    agreement,
    hardened,
    nearest,
    predicted,
    relative_bias,
)
from transect.studies.catalog.transformer_programs.reading import read
from transect.studies.catalog.transformer_programs.sampling import gumbel, largest, temperature
from transect.studies.catalog.transformer_programs.study import ran
from transect.studies.catalog.transformer_programs.tasks import TASKS, Labelled, drawn, prefix_labels, split
from transect.studies.catalog.transformer_programs.writing import decompiled, runner

SIZES = Sizes(vocabulary=6, labels=5, length=7, values=8, layers=2, heads=3, numerical_heads=2, mlps=2, hidden=9)
SMALL = {
    "samples": 60, "layers": 1, "heads": 1, "numerical_heads": 1, "mlps": 1, "numerical_mlps": 1, "hidden": 4,
    "epochs": 2, "seeds": 2,
}  # fmt: skip


def random_model(sizes: Sizes, seed: int) -> ProgramModel:
    """Hardened, of random numbers; biases too, which begin at 0."""
    model = ProgramModel(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "bias" in name:
                one.copy_(torch.randn(one.shape, generator=generator))
    return hardened(model)


def rows(count: int, sizes: Sizes, seed: int = 0) -> torch.Tensor:
    """Words with padding behind; one row is all padding, one all words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, sizes.vocabulary, (count, sizes.length), generator=generator)
    lengths = torch.randint(1, sizes.length + 1, (count, 1), generator=generator)
    lengths[0], lengths[1] = 0, sizes.length
    return ids.masked_fill(torch.arange(sizes.length) >= lengths, 0)


def labelled(sizes: Sizes, inputs: torch.Tensor) -> Labelled:
    words = ["<pad>", "it's", 'a "word"', "new\nline", "\\", "é", *(f"w{i}" for i in range(sizes.vocabulary - 6))]
    return Labelled(words, [f"label {i}" for i in range(sizes.labels)], inputs, torch.full_like(inputs, IGNORED))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "shape",
    [
        {}, {"heads": 0}, {"numerical_heads": 0}, {"mlps": 0, "numerical_mlps": 0}, {"layers": 3, "length": 5},
        {"values": 11},
    ],
)  # fmt: skip
def test_the_program_of_a_random_model_gives_its_label_at_every_word(shape, seed, causal):
    sizes = replace(SIZES, causal=causal, **shape)
    model = random_model(sizes, seed)
    data = labelled(sizes, rows(60, sizes, seed))
    program = decompiled(model, data.words, data.labels)
    predictions, real = predicted(model, data.inputs), data.inputs != 0
    assert torch.equal(ran(program, data)[real], predictions[real])
    assert len(predictions[real].unique()) > 1
    run = runner(program)
    assert run(data.said()[1] + ["<pad>"] * 3) == run(data.said()[1]) and run(["<pad>"]) == run([]) == []
    for wrong in (["unheard"], [data.words[1]] * (sizes.length + 1), ["<pad>", data.words[1]]):
        with pytest.raises(ValueError, match=f"at most {sizes.length} tokens, each one of"):
            run(wrong)
    assert not {line.split()[1] for line in program.splitlines() if line.startswith(("import", "from"))} - {"sys"}


@pytest.mark.parametrize("task", TASKS)
def test_on_every_task_the_program_of_a_random_model_is_the_model(task):
    data = drawn(task, 80, 3)
    length = data.inputs.shape[1]
    sizes = Sizes(len(data.words), len(data.labels), length, max(len(data.words), length), causal=TASKS[task].causal)
    model = random_model(sizes, 1)
    real = data.inputs != 0
    program = decompiled(model, data.words, data.labels)
    assert torch.equal(ran(program, data)[real], predicted(model, data.inputs)[real])
    read_of = read(model, data.words)
    names = [one.name for one in (*read_of.categorical, *read_of.numerical)]
    assert len(set(names)) == sizes.categorical + sizes.numerical == len(read_of.weights)


def test_equal_labels_and_unreadable_weights_are_decided_alike():
    model = random_model(SIZES, 0)
    with torch.no_grad():
        for weights in (model.classifier, model.numerical_classifier):
            weights.div_(20_000).round_()  # so small that many sums are equal
    data = labelled(SIZES, rows(80, SIZES))
    real = data.inputs != 0
    logits = model(data.inputs)
    assert (logits == logits.amax(-1, keepdim=True)).sum(-1)[real].gt(1).any()
    assert torch.equal(ran(decompiled(model, data.words, data.labels), data)[real], predicted(model, data.inputs)[real])


def test_everything_is_one_hot_once_hardened_and_counts_are_whole():
    model, ids = random_model(SIZES, 2), rows(40, SIZES)
    categorical, numerical = model.stream(ids)
    assert categorical.shape == (SIZES.categorical, 40, 7, 8) and numerical.shape == (SIZES.numerical, 40, 7)
    assert SIZES.categorical == 1 + 1 + 2 * (3 + 2 + 2) and SIZES.numerical == 1 + 2 * 2
    assert torch.equal(categorical.sum(-1), torch.ones_like(categorical[..., 0]))
    assert set(categorical.unique().tolist()) == {0, 1}
    assert torch.equal(numerical, numerical.round()) and (numerical[0] == 1).all() and numerical.max() > 1
    block = model.blocks[1]
    for logits in (block.reads, block.predicates, block.counted, block.mlps.reads, block.numerical_mlps.reads):
        chosen = largest(logits)
        assert torch.equal(chosen.sum(-1), torch.ones_like(chosen[..., 0])) and set(chosen.unique().tolist()) == {0, 1}


def test_variables_are_added_and_never_change():
    model, ids = random_model(SIZES, 3), rows(20, SIZES)
    first = ProgramModel(replace(SIZES, layers=1)).double()
    first.blocks[0].load_state_dict(model.blocks[0].state_dict())
    for early, late in zip(first.stream(ids), model.stream(ids), strict=True):
        assert torch.equal(early, late[: len(early)])


def by_hand(matches: list[int], query: int) -> int:
    """The place of the nearest match, itself last; 0 where there is none."""
    return min(matches, key=lambda j: (j == query, abs(j - query), j), default=0)


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_attention_is_the_nearest_match_for_every_pattern(length):
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * length).view(-1, length)
    matches = patterns[None, :, None].expand(1, -1, length, -1).double()
    visible = torch.ones(len(patterns), length, length, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        chosen = nearest(matches.to(dtype), visible, relative_bias(length).to(dtype)).argmax(-1)[0]
        for pattern, places in zip(patterns, chosen, strict=True):
            found = pattern.nonzero()[:, 0].tolist()
            assert places.tolist() == [by_hand(found, query) for query in range(length)]


def test_the_bias_is_the_released_one():
    bias = relative_bias(6)
    torch.testing.assert_close(bias[0], torch.tensor([-2, 0, -0.25, -0.5, -0.75, -1], dtype=torch.float64))
    torch.testing.assert_close(bias[5], torch.tensor([-0.8, -0.6, -0.4, -0.2, 0, -2], dtype=torch.float64))


def test_who_sees_nothing_takes_position_0_and_stays_finite():
    visible = torch.zeros(1, 4, 4, dtype=torch.bool)
    logits = nearest(torch.ones(2, 1, 4, 4), visible, relative_bias(4).float())
    assert (largest(logits)[..., 0] == 1).all() and gumbel(0.01)(logits).isfinite().all()
    model = ProgramModel(SIZES, 0)
    for sample in (largest, gumbel(0.01)):
        assert model(torch.zeros(2, 7, dtype=torch.long), sample).isfinite().all()


def test_padding_changes_nothing():
    model, ids = random_model(SIZES, 4), rows(30, SIZES)
    for row in ids:
        short = row[row != 0]
        if len(short):
            assert torch.equal(model(short[None])[0], model(row[None])[0, : len(short)])


def test_a_causal_model_sees_nothing_behind():
    ids = rows(2, SIZES)[1:].repeat(5, 1)
    other = ids.clone()
    other[:, 4:] = torch.randint(1, 6, (5, 3), generator=torch.Generator().manual_seed(0))
    causal, free = (random_model(replace(SIZES, causal=one), 5) for one in (True, False))
    assert torch.equal(causal(ids)[:, :4], causal(other)[:, :4])
    assert not torch.equal(free(ids)[:, :4], free(other)[:, :4])


def test_samples_follow_the_softmax():
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.8])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        many = gumbel(0.5)(logits.expand(20_000, 5))
    torch.testing.assert_close(many.sum(-1), torch.ones(20_000))
    counts = many.argmax(-1).bincount(minlength=5)
    assert chisquare(counts.numpy(), (logits.double().softmax(0) * 20_000).numpy()).pvalue > 1e-3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert gumbel(0.01)(logits.expand(2, 3, 5)).shape == (2, 3, 5)


def test_the_temperature_gets_to_its_end():
    course = [temperature(step, 4, 5, 3.0, 0.01) for step in range(20)]
    assert course[0] == 3 and course[16:] == pytest.approx([0.01] * 4)
    assert course[3] == pytest.approx(course[4]) and course[4] == pytest.approx(3 * (0.01 / 3) ** 0.25)
    assert all(a >= b for a, b in pairwise(course))
    assert temperature(0, 1, 1, 3.0, 0.01) == 3


def test_hardening_rounds_the_classifier_and_nothing_else():
    model = ProgramModel(SIZES, 6)
    hard, ids = hardened(model), rows(30, SIZES)
    torch.testing.assert_close(hard(ids), model.double()(ids), rtol=0, atol=60 * 0.5 / UNIT)
    assert torch.equal(hardened(hard).classifier, hard.classifier)
    assert torch.equal(ProgramModel.of(hard.float().state_dict())(ids), hard(ids))


def test_losses_are_means_over_what_is_asked():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[IGNORED, 1, 2, IGNORED], [0, 0, 0, 0], [IGNORED] * 4])
    each = -logits.log_softmax(-1)
    expected = [(each[0, 1, 1] + each[0, 2, 2]) / 2, each[1, :, 0].mean(), torch.tensor(0.0)]
    torch.testing.assert_close(sequence_losses(logits, targets), torch.stack(expected))


def test_labels_against_brute_force():
    def pairs(task):
        data = drawn(task, 200, 1)
        for said, targets in zip(data.said(), data.targets.tolist(), strict=True):
            yield said, [None if one == IGNORED else data.labels[one] for one in targets[: len(said)]]

    for said, asked in pairs("reverse"):
        assert asked == [None, *said[-2:0:-1], None] and said[0] == "<s>" and said[-1] == "</s>"
    for said, asked in pairs("sort"):
        assert asked[1:-1] == sorted(said[1:-1]) and asked[0] is asked[-1] is None
    for said, asked in pairs("hist"):
        assert asked[1:] == [str(said.count(one)) for one in said[1:]]
    for said, asked in pairs("double_hist"):
        alike = [{other for other in said[1:] if said.count(other) == said.count(one)} for one in said[1:]]
        assert asked[1:] == [str(len(one)) for one in alike]
    for said, asked in pairs("most_freq"):
        ranked = sorted(set(said[1:]), key=lambda one: (-said.count(one), said.index(one)))
        assert asked[1:] == ranked + ["<s>"] * (len(said) - 1 - len(ranked))
    ends = Counter()
    for said, asked in pairs("induction"):
        ends[said[-1].isalpha()] += 1
        for i, one in enumerate(said):
            before = said[:i]
            expected = said[before.index(one) + 1] if one in before else "<unk>"
            assert asked[i] == (expected if one.isalpha() else None)
    assert min(ends.values()) > 50


def test_prefixes_of_brackets():
    def brute(said):
        text = "".join(said)
        while "()" in text or "{}" in text:
            text = text.replace("()", "").replace("{}", "")
        return "T" if not text else "P" if not set(text) & set(")}") else "F"

    seen = Counter()
    for task in ("dyck-1", "dyck-2"):
        for said in drawn(task, 150, 0).said():
            labels = prefix_labels(said[1:])
            assert labels == [brute(said[1 : end + 2]) for end in range(len(said) - 1)]
            seen.update(labels)
    assert min(seen[one] for one in "PTF") > 100


def test_sequences_differ_and_are_shared_out():
    data = drawn("hist", 500, 2)
    said = {tuple(one) for one in data.said()}
    assert len(said) == 500 and data.inputs.shape == (500, 8)
    sizes = [len(part.inputs) for part in split(data)]
    assert sizes == [405, 45, 50]
    kept = {tuple(one) for part in split(data) for one in part.said()}
    assert kept == said
    assert torch.equal(drawn("hist", 500, 2).inputs, data.inputs) and not torch.equal(
        drawn("hist", 500, 3).inputs, data.inputs
    )
    assert len(drawn("dyck-1", 5000, 0, length=7).inputs) <= 64


def test_chains_say_what_the_tables_say():
    table = {"a": 1, "b": 2, "c": 1, 'd"': 3}
    lines = ["def f(x):", *(f"    {line}" for line in chain(by_value("x", table), lambda one: [f"return {one}"]))]
    numbers = [
        "def g(x):",
        *(f"    {line}" for line in chain(by_limit("x", range(5), [7, 7, 1, 7, 7]), lambda one: [f"return {one}"])),
    ]
    namespace: dict = {}
    exec("\n".join([*lines, *numbers]), namespace)
    assert {value: namespace["f"](value) for value in table} == table
    assert [namespace["g"](value) for value in range(5)] == [7, 7, 1, 7, 7]
    assert chain(by_value("x", {"a": 1, "b": 1}), lambda one: [f"return {one}"]) == ["return 1"]


def test_training_lowers_the_loss_and_the_study_goes_on_from_what_it_kept(tmp_path):
    data = drawn("hist", 200, 0)
    sizes = Sizes(len(data.words), len(data.labels), 8, 8, layers=1, heads=1, numerical_heads=2, hidden=8)
    found = fit(sizes, data, epochs=30, batch=100, rate=0.05, seed=0)
    again = fit(sizes, data, epochs=30, batch=100, rate=0.05, seed=0)
    assert all(torch.equal(found[name], again[name]) for name in found)
    losses = found["training_loss"]
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]
    model = ProgramModel.of(found)
    assert torch.equal(sampled(model, data.inputs, 1), sampled(model, data.inputs, 1))
    assert 0 < agreement(sampled(model, data.inputs, 1), data.targets, data.targets != IGNORED) <= 1

    out = tmp_path / "out"
    first = transect.study("transformer-programs", out=out, task="hist", **SMALL)
    assert first["measures"].shape == (2, 6) and (first["measures"][:, 4:] == 1).all()
    program = (out / "program.py").read_text()
    assert program.splitlines() == list(first.labels["line"])
    best = int(first["measures"][:, 1].argmax())
    tensors = load_file(out / f"made/seed-{best}.safetensors")
    data = drawn("hist", SMALL["samples"], 0)
    assert decompiled(hardened(ProgramModel.of(tensors)), data.words, data.labels) == program
    assert (first["reads"] >= -1).all() and "program.py" in (out / "index.html").read_text()


def test_a_seed_that_diverges_is_reported_and_the_others_are_kept(monkeypatch):
    calls = []

    def losses(logits, targets):
        calls.append(1)
        return sequence_losses(logits, targets) * (1 if len(calls) <= 2 else torch.nan)  # one step an epoch, two epochs

    monkeypatch.setattr(fitting, "sequence_losses", losses)
    result = transect.study("transformer-programs", task="hist", **SMALL)
    assert result["loss"].isnan().any(1).tolist() == result["measures"].isnan().all(1).tolist() == [False, True]
    assert (
        "hist: seed 0, the best of 2" in result.findings[0] and "of seed 1 stopped being finite" in result.findings[-1]
    )
    with pytest.raises(Diverged, match="in every seed: lower the rate"):
        transect.study("transformer-programs", task="hist", **SMALL)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "magic"}, "task='magic' must be one of"),
        ({"values": 7}, "a variable of 7 values cannot hold each of 8 words and 8 positions: values must be 8 or more"),
        ({"task": "dyck-1", "vocabulary": 8}, "dyck-1 always has 4 words, and vocabulary=8"),
        ({"task": "induction", "length": 9}, "should be even"),
        ({"length": 3}, "a sequence has more than 3 words"),
        ({"vocabulary": 4}, "fewer than two are symbols"),
        ({"task": "dyck-1", "length": 4}, "different sequences of at most 4 words"),
        ({"layers": 5}, "can count to 32,768"),
        ({"rate": 0}, "rate=0 must be"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(settings, said, tmp_path):
    with pytest.raises(TransectError, match=said):
        transect.study("transformer-programs", out=tmp_path / "out", **settings)
    with pytest.raises(TransectError, match="unknown task 'magic'; known: reverse"):
        drawn("magic", 50, 0)
    with pytest.raises(TransectError, match="has 9 words, and this model has 7 positions"):
        ProgramModel(SIZES)(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(TransectError, match="only a hardened model"):
        decompiled(ProgramModel(SIZES), ["<pad>"] * 6, ["a"] * 5)
    with pytest.raises(TransectError, match="of no transformer program: x"):
        ProgramModel.of({"x": torch.ones(1)})
