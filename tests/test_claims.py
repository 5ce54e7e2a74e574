"""Claims: the registry, the verdicts on made-up numbers, and every claim on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import transect
from tests.models import VOCABULARY, inputs, logits, tiny
from tests.test_data import word_tokenizer, words
from transect.anatomy import Anatomy
from transect.checkpoint import save
from transect.claims import Context, Measured, Verdict, claims, registry, run_claims
from transect.claims.catalog.kfac_svd import RELEASED, as_released
from transect.claims.catalog.svd_llm import mean_squared_outputs
from transect.claims.context import Variant
from transect.claims.ordering import Comparison, judge
from transect.claims.probing import probed_once
from transect.cli import main_group
from transect.compression import calibrate, method
from transect.compression.weighted_svd import shrink
from transect.data import Batches, load
from transect.errors import BadData, TransectError
from transect.evaluation import evaluate_loss


def ids(sequences: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (sequences, length), generator=generator)


def random_data(model: Any) -> tuple[Batches, Batches]:
    return load(ids(8, 24, 0), model), load(ids(5, 24, 1), model)


def context(name: str = "llama", uses: tuple[str, ...] = ("svd", "fwsvd", "svd-llm", "kfac-svd")) -> Context:
    model = tiny(name)
    return Context(model, *random_data(model), uses)


# Registry


FACTORIZATIONS = {"fwsvd", "svd-llm", "kfac-svd"}


def test_claims_are_chosen_by_their_own_name_and_by_method():
    everything = claims()
    assert {claim.method for claim in everything} > FACTORIZATIONS
    assert all(claim.name.startswith(claim.method + "/") for claim in everything)
    assert [claim.name for claim in claims(["svd-llm/refit"])] == ["svd-llm/refit"]
    assert {claim.method for claim in claims(["fwsvd"])} == {"fwsvd"}
    assert claims(["fwsvd", "fwsvd/below-svd"]) == claims(["fwsvd"])


def test_every_claim_says_what_it_uses():
    for claim in claims():
        assert claim.statement.endswith(".") and claim.paper and claim.method
        for used in claim.uses:
            method(used)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(TransectError, match=r"'gptq'.*fwsvd.*svd-llm/refit"):
        claims(["fwsvd", "gptq"])


# Verdicts


def comparison(difference: float, error: float = 0.01, keep: float = 0.8) -> Comparison:
    return Comparison(keep, "a", "b", keep, keep, 3 + difference, 3.0, difference, error)


def test_a_claim_holds_only_if_every_difference_has_its_sign():
    assert judge([comparison(-0.1), comparison(-0.2, keep=0.6)]).verdict == Verdict.HOLDS
    failed = judge([comparison(-0.1), comparison(0.05, keep=0.6), comparison(-0.1, keep=0.4)])
    assert failed.verdict == Verdict.DOES_NOT_HOLD == "does not hold"
    assert "2 of 3" in failed.explanation and "a against b at 0.6" in failed.explanation
    assert [row["difference"] for row in failed.numbers] == [-0.1, 0.05, -0.1]


def test_differences_within_the_noise_are_named_but_do_not_decide():
    held = judge([comparison(-0.1), comparison(-0.01, keep=0.6), comparison(-0.011, keep=0.3)])
    assert held.verdict == Verdict.HOLDS
    assert "Within 2 standard errors of 0: a against b at 0.6, 0.3" in held.explanation
    assert [row["clear"] for row in held.numbers] == [True, False, False]
    assert judge([comparison(0.001)]).verdict == Verdict.DOES_NOT_HOLD


def test_no_difference_is_enough_only_for_no_more_than():
    assert judge([comparison(0.0, 0.0)], or_equal=True).verdict == Verdict.HOLDS
    assert judge([comparison(0.0, 0.0)]).verdict == Verdict.DOES_NOT_HOLD


def test_the_standard_error_is_the_paired_one():
    nats, ones = torch.tensor([1.0, 2.0, 6.0]).double(), torch.ones(3).double()
    shifted = Measured(nats + torch.tensor([0.1, 0.2, 0.3]), ones, 1.0)
    difference, error = shifted.minus(Measured(nats, ones, 1.0))
    assert difference == pytest.approx(0.2) and error == pytest.approx(0.1 / math.sqrt(3))
    same = Measured(nats + 0.5 * ones, ones, 1.0)
    assert same.minus(Measured(nats, ones, 1.0)) == pytest.approx((0.5, 0.0))


def test_sequences_weigh_as_much_as_they_have_predictions():
    counts = torch.tensor([1.0, 9.0]).double()
    measured, zero = Measured(torch.tensor([5.0, 9.0]).double(), counts, 1.0), torch.zeros(2).double()
    assert measured.loss == pytest.approx(1.4)
    assert measured.minus(Measured(zero, counts, 1.0))[0] == pytest.approx(1.4)


# Measurements


def test_the_loss_by_sequence_is_the_loss():
    model = tiny("llama")
    held_out = load([row.tolist() for row in ids(3, 24, 1)] + [[5] * 7, [9]], model)  # one id predicts nothing
    dense = Context(model, None, held_out).dense
    assert dense.loss == pytest.approx(evaluate_loss(model, list(held_out)).loss, rel=1e-6)
    assert dense.predictions.tolist() == [23, 23, 23, 6]


def test_results_are_remembered_and_the_model_is_left_as_it_was(monkeypatch):
    measuring = context(uses=("svd",))
    batch = inputs("llama")
    before, variant = logits(measuring.model, batch), Variant(method("svd"))
    first = measuring.compressed(variant, 0.5)
    assert first.loss != measuring.dense.loss and first.kept <= 0.5
    torch.testing.assert_close(logits(measuring.model, batch), before, rtol=0, atol=0)
    assert not measuring.anatomy.record.modules
    monkeypatch.setattr(Context, "evaluate", None)
    assert measuring.compressed(Variant(method("svd")), 0.5) is first


def test_claims_of_a_run_share_what_a_probe_finds_under_the_same_settings(monkeypatch):
    one, asked = context(), []
    monkeypatch.setattr(
        "transect.claims.probing.probed", lambda specimen, name, **given: asked.append(given) or object()
    )
    first = probed_once(one, "hftp", shuffles=10)
    assert probed_once(one, "hftp", shuffles=10) is first
    assert probed_once(one, "hftp", shuffles=20) is not first and asked == [{"shuffles": 10}, {"shuffles": 20}]


def test_refitting_leaves_the_factors_as_they_were():
    measuring = context(uses=("svd-llm",))
    plain = measuring.compressed(Variant(method("svd-llm")), 0.5)
    refitted = measuring.compressed(Variant(method("svd-llm"), refit=True), 0.5)
    measuring._measured.clear()
    again = measuring.compressed(Variant(method("svd-llm")), 0.5)
    assert refitted.loss != plain.loss == again.loss


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_mean_squared_outputs_are_those_of_the_covariance(name):
    measuring = context(name, uses=("svd-llm",))
    chosen = measuring.matrices[:8]
    maps = {matrix.name: torch.randn(matrix.shape, dtype=torch.float64) for matrix in measuring.matrices}
    measured = mean_squared_outputs(measuring, maps)
    (statistic,) = method("svd-llm").needs
    for matrix in chosen:
        covariance = measuring.statistics.value(matrix.source, statistic)
        expected = (maps[matrix.name] @ covariance * maps[matrix.name]).sum()
        assert measured[matrix.name] == pytest.approx(float(expected), rel=1e-5)


def test_the_released_orientation_minimises_the_norm_of_the_wrong_product():
    generator = torch.Generator().manual_seed(0)
    weight, x, g = (torch.randn(*shape, generator=generator).double() for shape in ((6, 9), (30, 9), (30, 6)))
    made = as_released(weight, x.T @ x, g.T @ g)
    root, other = (torch.linalg.cholesky(shrink(m, alpha)) for m, alpha in ((g.T @ g, 0.3), (x.T @ x, 0.1)))
    u, s, vh = torch.linalg.svd(root @ weight @ other, full_matrices=False)
    left, right = made.truncate(3)
    expected = torch.linalg.solve(root, (u[:, :3] * s[:3]) @ vh[:3]) @ torch.linalg.inv(other)
    torch.testing.assert_close(left @ right, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(made.singular_values, s, rtol=1e-6, atol=1e-8)
    assert RELEASED.needs == method("kfac-svd").needs


# Whole runs


def finite(numbers: list[dict[str, Any]]) -> bool:
    return all(math.isfinite(value) for row in numbers for value in row.values() if isinstance(value, (int, float)))


def test_the_claims_of_all_factorizations_on_a_tiny_model_with_one_statistics_pass(monkeypatch):
    model = tiny("llama")
    Anatomy(model).drop_block(2)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return collect(*args, **kwargs)

    collect = calibrate.collect
    monkeypatch.setattr(calibrate, "collect", counted)
    chosen = sorted(FACTORIZATIONS)
    outcomes = run_claims(model, *random_data(model), chosen)
    assert [outcome.claim for outcome in outcomes] == claims(chosen)
    assert len(calls) == 1
    for outcome in outcomes:
        assert outcome.result.verdict in (Verdict.HOLDS, Verdict.DOES_NOT_HOLD)
        assert outcome.result.numbers and finite(outcome.result.numbers), outcome.claim.name
    json.dumps([outcome.to_dict() for outcome in outcomes], allow_nan=False)
    identity = next(outcome for outcome in outcomes if outcome.claim.name == "svd-llm/output-error")
    assert identity.result.verdict == Verdict.HOLDS


def test_without_calibration_data_only_what_needs_it_is_left_out():
    model = tiny("llama")
    (outcome,) = run_claims(model, None, random_data(model)[1], ["fwsvd/below-svd"])
    assert outcome.result.verdict == Verdict.NOT_APPLICABLE and "calibration" in outcome.result.explanation


def test_a_claim_that_fails_does_not_end_the_others(monkeypatch):
    whole = registry._claims["fwsvd/below-svd"]
    broken = dataclasses.replace(whole, function=lambda context: {}["no such matrix"])
    monkeypatch.setitem(registry._claims, whole.name, broken)
    model = tiny("llama")
    outcomes = run_claims(model, *random_data(model), ["fwsvd/below-svd", "svd-llm/below-svd"])
    first, second = (outcome.result for outcome in outcomes)
    assert first.verdict == Verdict.FAILED and first.explanation == "KeyError: 'no such matrix'"
    assert second.verdict in (Verdict.HOLDS, Verdict.DOES_NOT_HOLD)


def test_claims_about_language_models_do_not_apply_to_a_classifier():
    model = tiny("vit")
    calibration, held_out = (Batches([inputs("vit", batch=3, seed=seed)]) for seed in (1, 2))
    found = run_claims(model, calibration, held_out, ["fwsvd", "svd-llm"])
    outcomes = {outcome.claim.name: outcome.result for outcome in found}
    assert outcomes["svd-llm/below-svd"].verdict == Verdict.NOT_APPLICABLE
    assert "ViTForImageClassification" in outcomes["svd-llm/below-svd"].explanation
    assert outcomes["fwsvd/below-svd"].verdict != Verdict.NOT_APPLICABLE
    assert finite(outcomes["fwsvd/below-svd"].numbers)


def test_claims_do_not_apply_where_the_matrices_are_too_small(monkeypatch):
    monkeypatch.setattr("transect.claims.ordering.KEEPS", (0.8, 0.01))
    model = tiny("llama")
    (outcome,) = run_claims(model, *random_data(model), ["fwsvd/below-svd"])
    assert outcome.result.verdict == Verdict.NOT_APPLICABLE and "too small" in outcome.result.explanation


def test_one_held_out_sequence_is_refused():
    model = tiny("llama")
    with pytest.raises(BadData, match="fewer than two"):
        run_claims(model, None, load(ids(1, 8, 0), model))


# Command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    path = tmp_path_factory.mktemp("claims")
    save(tiny("llama"), path / "model", word_tokenizer())
    (path / "calibration.txt").write_text(words(200))
    (path / "held_out.txt").write_text(words(120, start=17))
    return path


def command(folder: Any, *arguments: str) -> list[str]:
    data = ["--data", str(folder / "calibration.txt"), "--eval", str(folder / "held_out.txt")]
    return ["claims", *arguments, "--model", str(folder / "model"), *data, "--sequence-length", "16"]


def test_the_command_prints_json(folder):
    result = CliRunner().invoke(main_group, command(folder, "fwsvd/below-svd", "svd-llm/output-error", "--json"))
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)
    assert [entry["name"] for entry in described] == ["fwsvd/below-svd", "svd-llm/output-error"]
    assert set(described[0]) == {"name", "method", "paper", "statement", "verdict", "explanation", "numbers"}
    assert described[0]["verdict"] in set(Verdict) and len(described[0]["numbers"]) == 4


def test_the_command_prints_sentence_numbers_and_verdict(folder):
    result = CliRunner().invoke(main_group, command(folder, "fwsvd/weight-error"))
    assert result.exit_code == 0, result.output
    assert "arXiv:2207.00112" in result.output and "farther" in result.output
    assert "hold" in result.output and "0.6" in result.output


def test_the_command_refuses_what_it_does_not_know(folder):
    unknown = CliRunner().invoke(main_group, ["claims", "gptq"])
    assert isinstance(unknown.exception, TransectError) and "fwsvd/below-svd" in str(unknown.exception)
    without_data = CliRunner().invoke(main_group, ["claims", "--model", str(folder / "model")])
    assert isinstance(without_data.exception, TransectError) and "--data" in str(without_data.exception)


def test_compressed_models_are_compared_at_the_budgets_that_are_asked_for(tmp_path):
    model = tiny("llama")
    found = run_claims(model, *random_data(model), ["fwsvd", "dsformer/weight-error", "amp/order"], keeps=(0.7,))
    for outcome in found:
        assert {row["keep"] for row in outcome.result.numbers} == {0.7}
        assert outcome.result.explanation.endswith("Asked at 0.7 alone.")
    ordered = next(one.result for one in found if one.claim.name == "fwsvd/below-svd")
    usual = run_claims(model, *random_data(model), ["fwsvd/below-svd"])[0].result
    assert [row["keep"] for row in usual.numbers] == [0.8, 0.6, 0.4, 0.3] and "Asked" not in usual.explanation
    assert len(ordered.numbers) == 1
    with pytest.raises(TransectError, match="keep must be a list"):
        transect.check_claims(["fwsvd"], keep=[1.5])


def test_verdicts_are_recorded_and_not_measured_again(tmp_path, monkeypatch):
    import transect
    from transect.claims.records import records_in

    runs, one = [], claims(["fwsvd/below-svd"])[0]

    def function(context):
        runs.append(context)
        return registry.Result(Verdict.HOLDS, "It does.", [{"loss": 1.5, "keep": 0.5}])

    monkeypatch.setitem(registry._claims, one.name, dataclasses.replace(one, function=function))
    options = dict(model=tiny("llama"), data=ids(8, 24, 0), eval_data=ids(5, 24, 1), record=tmp_path / "recorded")
    first = transect.check_claims([one.name], **options)
    (record,) = records_in(tmp_path / "recorded")
    assert record.result == first[0].result == transect.check_claims([one.name], **options)[0].result
    assert len(runs) == 1 and record.model == "LlamaForCausalLM" and record.version == transect.__version__
    assert record.statement == one.statement and record.settings["seed"] == 0 and record.date and record.machine
    assert transect.check_claims([one.name], **{**options, "seed": 1})[0].result == first[0].result
    assert len(runs) == 2  # with other settings it is measured again
    file = tmp_path / "recorded" / record.file
    file.write_text("{}")
    with pytest.raises(BadData, match="is no recorded claim"):
        records_in(tmp_path / "recorded")
    transect.check_claims([one.name], **options)  # damaged: measured again
    assert len(runs) == 3 and records_in(tmp_path / "recorded")[0].verdict == "holds"
