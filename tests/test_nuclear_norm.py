"""Matrix nuclear norm, its exact value, and matrix entropy."""

import math

import pytest
import torch

from transect.anatomy import Anatomy
from transect.claims import Verdict, run_claims
from transect.data import Batches, Specimen
from transect.errors import TransectError
from transect.probes import drawings, run_probes
from transect.probes.catalog.nuclear_norm import figures, matrix_nuclear_norm, normalised

from .models import CONFIGS, inputs, tiny

NAMES = ("mnn", "mnn_share", "nuclear", "nuclear_share", "entropy", "effective_rank")


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(rows):
    return dict(zip(NAMES, figures(rows).tolist(), strict=True))


def reference(rows):
    """The definition in three lines."""
    rows = rows - rows.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return float(rows.norm(dim=0).sort(descending=True).values[: min(rows.shape)].sum() / len(rows))


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (30, 30), (2, 5)])
def test_against_the_definitions(shape):
    rows = 3 + states(*shape)
    spread = normalised(rows)
    assert float(spread.norm() ** 2) == pytest.approx(shape[0], rel=1e-12)
    assert spread.norm(dim=1).tolist() == pytest.approx([1] * shape[0])
    found, values = of(rows), torch.linalg.svdvals(spread)
    assert found["mnn"] == pytest.approx(reference(rows), rel=1e-12)
    assert found["nuclear"] == pytest.approx(float(values.sum()) / shape[0], rel=1e-6)
    p = values.square() / shape[0]
    entropy = float(-torch.xlogy(p, p).sum())
    assert found["entropy"] == pytest.approx(entropy / math.log(shape[1]), rel=1e-8)
    assert found["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-8)
    ceiling = math.sqrt(min(shape) / shape[0])
    for name in ("mnn", "nuclear"):
        assert found[name + "_share"] == pytest.approx(found[name] / ceiling)
        assert found[name] <= ceiling * (1 + 1e-12)
    assert float(values.sum()) >= float(spread.norm()) - 1e-9


def test_columns_are_centred_before_the_rows_are_scaled():
    rows = states(40, 8)
    directions = normalised(rows) * (rows - rows.mean(0)).norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions.mean(0), torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_bound_for_long_texts_and_equal_for_orthogonal_columns():
    for seed in range(20):
        found = of(states(40, 12, seed=seed) @ states(12, 12, seed=seed + 50))
        assert found["mnn"] >= found["nuclear"] - 1e-12
    # Rows ±e_j: centred, of equal length, and with orthogonal columns.
    rows = torch.cat([torch.eye(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64)])
    found = of(5 * rows)
    assert found["mnn"] == pytest.approx(found["nuclear"], rel=1e-12) and found["mnn_share"] == pytest.approx(1)
    assert found["effective_rank"] == pytest.approx(6) and found["entropy"] == pytest.approx(1)


def test_what_it_does_not_depend_on_and_what_it_does():
    rows = states(60, 10) * torch.arange(1.0, 11, dtype=torch.float64)  # coordinates of unequal weight
    plain = of(rows)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    columns = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(5)
    for same in (rows[order], 7 * rows, rows + states(1, 10, seed=2), rows[:, columns] * signs):
        assert of(same) == pytest.approx(plain, rel=1e-9)
    turned = of(rows @ torch.linalg.qr(states(10, 10, seed=3)).Q)
    for name in ("nuclear", "entropy", "effective_rank"):
        assert turned[name] == pytest.approx(plain[name], rel=1e-8)
    assert abs(turned["mnn"] - plain["mnn"]) > 0.02  # the axes matter to the estimate alone


def test_tokens_on_a_line():
    u = torch.nn.functional.normalize(states(1, 8), dim=1)
    rows = states(31, 1, seed=4) * u
    found = of(rows)
    assert found["nuclear"] * 31 == pytest.approx(math.sqrt(31), rel=1e-6)
    assert found["mnn"] == pytest.approx(float(u.abs().sum()) / math.sqrt(31), rel=1e-9)
    assert found["effective_rank"] == pytest.approx(1, rel=1e-6)


def test_the_estimate_hardly_sees_rank():
    full, thin = of(states(50, 20)), of(states(50, 3) @ states(3, 20, seed=1))
    assert thin["nuclear"] < 0.6 * full["nuclear"]
    assert thin["mnn"] > 0.85 * full["mnn"]


def test_degenerate_texts():
    same = figures(torch.full((5, 4), 0.1))
    assert same.isnan().all()
    assert figures(torch.full((5, 4), 0.1, dtype=torch.bfloat16)).isnan().all()
    for bad in (states(1, 4), states(4)):
        with pytest.raises(TransectError, match="at least two tokens"):
            normalised(bad)
    assert torch.isfinite(figures(states(20, 6).bfloat16())).all()
    spread = normalised(states(6, 20))
    assert matrix_nuclear_norm(spread) <= 1 + 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name):
    model = tiny(name, dtype=torch.float64)
    batch = inputs(name, batch=3, dtype=torch.float64)
    result = run_probes(Specimen(Anatomy(model), data=Batches([batch])), {"nuclear-norm": {}})["nuclear-norm"]
    with torch.no_grad():
        last = model.base_model(**{key: value for key, value in batch.items() if key != "labels"}).last_hidden_state
    assert result["mnn"].tolist() == pytest.approx([reference(rows) for rows in last], rel=1e-9)
    assert len(drawings(result)) == 2 and result.findings


def test_padding_batches_and_how_many_texts():
    model = tiny("llama", dtype=torch.float64)
    ids = inputs("llama", batch=4, length=16)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    mask[2, 1:] = 0  # a single token
    padded = Specimen(Anatomy(model), data=Batches([{"input_ids": ids, "attention_mask": mask}]))
    result = run_probes(padded, {"nuclear-norm": {}})["nuclear-norm"]
    assert result["length"].tolist() == [16, 10, 16]
    assert any("single token" in caveat for caveat in result.caveats)
    apart = Specimen(Anatomy(model), data=Batches([{"input_ids": ids[:1]}, {"input_ids": ids[1:2, :10]}]))
    alone = run_probes(apart, {"nuclear-norm": {}})["nuclear-norm"]
    assert result["mnn"][:2].tolist() == pytest.approx(alone["mnn"].tolist(), rel=1e-9)
    one = run_probes(apart, {"nuclear-norm": {"texts": 1}})["nuclear-norm"]
    assert one["mnn"].tolist() == pytest.approx(alone["mnn"][:1].tolist(), rel=1e-9)


def test_refused_without_text_or_with_single_tokens():
    model = tiny("llama")
    refused = run_probes(Specimen(Anatomy(model)), {"nuclear-norm": {}}).refused
    assert "text" in refused["nuclear-norm"]
    short = Specimen(Anatomy(model), data=Batches([{"input_ids": torch.tensor([[5]])}]))
    assert "one token" in run_probes(short, {"nuclear-norm": {}}).refused["nuclear-norm"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_claims_say_what_the_numbers_say():
    model = tiny("llama")
    text = Batches([inputs("llama", batch=12, length=40)])
    before = [parameter.clone() for parameter in model.parameters()]
    lower, ranked = (one.result for one in run_claims(model, text, text, ["nuclear-norm"]))
    row = next(row for row in lower.numbers if row["figure"] == "mnn")
    if lower.verdict is Verdict.HOLDS:
        assert row["trained"] < row["random"]
    assert len(ranked.numbers) == 2 and "Rank correlation" in ranked.explanation
    assert all(map(torch.equal, before, model.parameters()))
    few = Batches([inputs("llama", batch=3)])
    assert run_claims(model, few, few, ["nuclear-norm/ranks-as-exact"])[0].result.verdict is Verdict.NOT_APPLICABLE
