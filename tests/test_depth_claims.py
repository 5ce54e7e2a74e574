"""depth-efficiency: maps between models of two depths, and the claims."""

import itertools
import random
import re

import pytest
import torch
import transformers
from scipy.stats import linregress

from tests.depth import silence, specimen
from tests.models import inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.claims import Context, Verdict, claims, run_claims
from transect.claims.catalog.depth_efficiency.depth_efficiency import share_as_near
from transect.claims.catalog.depth_efficiency.hops import HOPS, line, question
from transect.claims.catalog.depth_efficiency.shallower import text_of, train, untrained
from transect.data import Batches
from transect.errors import BadData, NotApplicable, TransectError
from transect.probes.catalog.depth_efficiency.convergence import late_share
from transect.probes.catalog.depth_efficiency.depth_maps import cross_model_maps, offsets, solve


def test_maps_between_models():
    long = dict(length=48, sequences=24)
    deep, shallow = specimen("llama", **long), specimen("gpt2", **long)
    same = cross_model_maps(deep, deep, ridge=0.0)
    assert same["error"].diagonal().max() < 1e-6
    assert same["best"].tolist() == [0, 1, 2, 3]
    crossed = cross_model_maps(deep, shallow, deep_layers=[1, 3], shallow_layers=[0, 2])
    assert crossed["error"].shape == (2, 2)
    assert crossed["error"].min() > 0
    with pytest.raises(BadData, match="at least 640"):
        cross_model_maps(specimen("llama"), specimen("gpt2"))
    with pytest.raises(TransectError, match="0 to 3"):
        cross_model_maps(deep, deep, deep_layers=[4])
    with pytest.raises(NotApplicable):
        cross_model_maps(deep, specimen("bert", **long))


def test_maps_do_not_depend_on_the_basis_of_the_source():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, d, generator=generator, dtype=torch.float64) for d in (6, 4))
    change = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    ones = torch.ones(300, 1, dtype=torch.float64)

    def predicted(x, y):
        x = torch.cat([x, ones], 1)
        return x @ solve(x.T @ x, (x.T @ y)[None], 0.0)[0]

    plain = predicted(x, y)
    design = torch.cat([x, ones], 1)
    torch.testing.assert_close(plain, design @ torch.linalg.lstsq(design, y).solution)
    torch.testing.assert_close(predicted(x @ change, y), plain)
    torch.testing.assert_close((predicted(x, y @ rotation) - y @ rotation).norm(dim=1), (plain - y).norm(dim=1))


def test_a_random_path_is_as_near_as_often_as_counting_says():
    for deep, shallow, best in ((4, 2, [0, 1, 2, 1, 2]), (5, 2, [2, 0, 0, 1, 1, 2]), (4, 2, [0, 2, 0, 0, 0])):
        away = [[abs(m * deep - state * shallow) for m in range(shallow + 1)] for state in range(1, deep + 1)]
        own = sum(row[m] for row, m in zip(away, best[1:], strict=True))
        paths = list(itertools.product(*away))
        share = sum(sum(path) <= own for path in paths) / len(paths)
        assert share_as_near(deep, shallow, torch.tensor(best)) == pytest.approx(share)
    assert offsets([0, 2, 4], [0, 1, 2], 4, 2).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def test_the_share_of_the_approach_that_comes_late():
    assert late_share(torch.tensor([4.0, 3.0, 1.0, 0.5, 0.0])) == 0.25
    assert (
        late_share(torch.tensor([4.0, 3.0, 1.0, 0.0])) == 0.75
    )  # the middle one of three layers is in the second half
    assert late_share(torch.zeros(3)) != late_share(torch.zeros(3))


def four_layers():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**tiny("llama").config.to_dict(), "num_hidden_layers": 4})
    return transformers.LlamaForCausalLM(config).eval()


def checked(name, model, *text):
    """The outcome of one claim, as the user's call gives it."""
    calibration, evaluation = text * 2 if len(text) == 1 else text
    return run_claims(model, calibration, evaluation, [name])[0].result


def test_the_claim_on_the_lens_follows_where_the_work_is_done():
    text = Batches([inputs("llama", batch=4, length=20)])
    early, late = four_layers(), four_layers()
    for layer in (0, 1):
        silence(early, layer + 2)
        silence(late, layer)
    held = checked("depth-efficiency/lens", late, text)
    assert held.verdict == Verdict.HOLDS
    assert [row["KL, nats"] for row in held.numbers][2:] != [0.0] * 3
    found = checked("depth-efficiency/lens", early, text)
    assert found.verdict == Verdict.DOES_NOT_HOLD
    assert [row["KL, nats"] for row in found.numbers][2:] == pytest.approx([0.0] * 3, abs=1e-6)
    assert checked("depth-efficiency/lens", tiny("llama"), text).verdict == Verdict.NOT_APPLICABLE


def test_the_claim_on_two_models_trains_the_shallower_one(monkeypatch):
    monkeypatch.setattr("transect.claims.catalog.depth_efficiency.shallower.STEPS", 3)
    monkeypatch.setattr("transect.claims.catalog.depth_efficiency.shallower.TOKENS", 320)
    text = Batches([inputs("llama", batch=24, length=40)])
    model = four_layers()
    before, state = logits(model, inputs("llama")), torch.random.get_rng_state()
    result = checked("depth-efficiency/cross-model", model, text)
    assert result.verdict in (Verdict.HOLDS, Verdict.DOES_NOT_HOLD)
    assert [row["in proportion"] for row in result.numbers] == [0, 0.5, 1, 1.5, 2]
    for row in result.numbers:
        errors = [row[f"error from state {m}"] for m in range(3)]
        assert min(errors) == errors[row["best"]]
    assert torch.equal(logits(model, inputs("llama")), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert checked("depth-efficiency/cross-model", model, text) == result  # seeds are fixed


def test_what_the_claim_on_two_models_refuses(monkeypatch):
    enough, little = (Batches([inputs("llama", batch=count, length=40)]) for count in (24, 4))
    monkeypatch.setattr(
        "transect.claims.catalog.depth_efficiency.depth_efficiency.train", None
    )  # all of this before any training
    for model, data, why in (
        (tiny("llama"), (enough, enough), "4 layers"),
        (four_layers(), (little, enough), "at least 640 tokens; there are 160"),
        (four_layers(), (enough, little), "held-out text is too little"),
    ):
        result = checked("depth-efficiency/cross-model", model, *data)
        assert result.verdict == Verdict.NOT_APPLICABLE
        assert why in result.explanation
    monkeypatch.setattr("transect.claims.catalog.depth_efficiency.shallower.LARGEST", 1000)
    assert "more than the 1,000" in checked("depth-efficiency/cross-model", four_layers(), enough).explanation


def test_training_lowers_the_loss(monkeypatch):
    monkeypatch.setattr("transect.claims.catalog.depth_efficiency.shallower.STEPS", 30)
    monkeypatch.setattr("transect.claims.catalog.depth_efficiency.shallower.TOKENS", 160)
    text = Batches([inputs("gpt2", batch=24, length=40)])
    context = Context(tiny("gpt2"), text, text)
    model = untrained(context, 1)
    assert len(Anatomy(model).blocks) == 1
    before = context.evaluate(model, 1.0).loss
    rows, source = text_of(context)
    assert (len(rows), source) == (24, "960 tokens of the calibration text")
    train(model, rows)
    assert context.evaluate(model, 1.0).loss < before
    assert not model.training


def test_the_claim_also_leaves_out_the_layers_that_decide_it_by_construction():
    text = Batches([inputs("llama", batch=4, length=20)])
    with pytest.raises(NotApplicable, match="at least 4 layers"):
        claims(["depth-efficiency/halves"])[0].function(Context(tiny("llama"), text, text))
    model = four_layers()
    silence(model, 1)  # then what the first half does is layer 0 alone
    result = claims(["depth-efficiency/halves"])[0].function(Context(model, text, text))
    added, later = (
        [row[key] for row in result.numbers] for key in ("length added / stream", "skipped: change at later tokens")
    )
    assert added[1] == later[1] == later[3] == 0 < min(added[0], later[0], later[2])
    assert result.verdict == Verdict.DOES_NOT_HOLD


@pytest.mark.parametrize("steps", HOPS)
def test_the_right_name_is_as_many_friends_away_as_the_question_asks(steps):
    prompt, names = question(random.Random(steps), steps)
    friends = dict(re.findall(r"(\w+)'s friend is (\w+)\.", prompt))
    asked, person = re.search(r"((?:[Tt]he friend of )+)(\w+) is$", prompt).groups()
    assert asked.count("friend") == steps
    for _ in range(steps):
        person = friends[person]
    assert person == names[0] and len(set(names)) == len(names) == len(friends) + 1


def test_the_slope_and_its_error_are_those_of_least_squares():
    x = torch.tensor([1.0, 1, 2, 2, 3, 4, 4], dtype=torch.float64)
    y = torch.tensor([0.3, 0.1, 0.9, 0.2, 1.1, 1.0, 1.7], dtype=torch.float64)
    expected = linregress(x, y)
    assert line(x, y) == pytest.approx((expected.slope, expected.stderr), rel=1e-12)
