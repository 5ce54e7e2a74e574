"""Text models without a head: judged by how far their last hidden states are from the dense model's."""

from __future__ import annotations

import copy
import math

import pandas as pd
import pytest
import torch
from torch.func import functional_call, jacrev

import transect
from tests.test_headless import batch, headless, states
from transect import Anatomy
from transect.compression.divergence import Divergence
from transect.errors import TransectError
from transect.evaluation import evaluate_loss
from transect.forward import predictions, task_of, with_states_of
from transect.forward.objective import losses_of
from transect.report import markdown_table
from transect.statistics import InputCovariance, OutputGradientCovariance, collect

TEXTS = ["bert", "roberta", "gpt2", "llama"]


def changed(name: str, by: float = 0.3):
    """Another form of the model: one matrix is scaled."""
    model = headless(name)
    matrix = Anatomy(model).blocks[0].matrix("down")
    with torch.no_grad():
        matrix.module.weight.mul_(1 + by)
    return model


@pytest.mark.parametrize("name", TEXTS)
def test_the_loss_is_the_relative_squared_error(name):
    dense, other = headless(name), changed(name)
    assert task_of(dense) == "embedding"
    (judged,) = with_states_of(dense, [batch(name)])
    mask = batch(name).get("attention_mask", torch.ones_like(batch(name)["input_ids"])).bool()
    ours, theirs = states(dense, name)[mask], states(other, name)[mask]
    expected = ((theirs - ours).square().sum(-1) / ours.square().sum(-1)).mean()
    found = evaluate_loss(other, [judged])
    assert found.loss == pytest.approx(float(expected), rel=1e-4) and found.loss > 1e-6
    assert found.perplexity is None and found.tokens == int(mask.sum())
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
    assert found.accuracy == pytest.approx(float(cosine), rel=1e-4)
    itself = evaluate_loss(dense, [judged])
    assert itself.loss == 0 and itself.accuracy == pytest.approx(1)


def test_padding_does_not_count():
    model, other = headless("bert"), changed("bert")
    ids = batch("bert")["input_ids"][:1]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros_like(ids[:, :3])], dim=1),
        "attention_mask": torch.tensor([[1] * ids.shape[1] + [0] * 3]),
    }
    alone = evaluate_loss(other, with_states_of(model, [{"input_ids": ids}]))
    with_padding = evaluate_loss(other, with_states_of(model, [padded]))
    assert with_padding.tokens == alone.tokens == ids.shape[1]
    assert with_padding.loss == pytest.approx(alone.loss, rel=1e-4)


def test_other_models_and_labels_stay():
    given = [{**batch("bert"), "labels": torch.zeros(2, 3, 4)}]
    assert with_states_of(headless("bert"), given)[0]["labels"] is given[0]["labels"]
    assert with_states_of(headless("vit"), [batch("vit")])[0].keys() == batch("vit").keys()


def test_drawn_states_give_the_curvature_of_the_error():
    """The gradients' second moments at a matrix are the Gauss-Newton curvature of the error, which is computed here."""
    model, sequences = headless("bert").double(), 3000
    one = {name: tensor[:1, :3] for name, tensor in batch("bert").items()}
    anatomy = Anatomy(model)
    matrix = anatomy.blocks[-1].matrix("down")
    many = {name: tensor.repeat(sequences, 1) for name, tensor in one.items()}
    found = collect(anatomy, [many], [OutputGradientCovariance(), InputCovariance()], [matrix])
    bias = matrix.module.bias.detach()

    def put_out(shift):  # of the matrix's output, alike at all positions: exact for the last block, up to its norm
        name = next(name for name, value in model.named_parameters() if value is matrix.module.bias)
        return functional_call(model, {name: bias + shift}, kwargs=one).last_hidden_state[0]

    jacobian = jacrev(put_out)(torch.zeros_like(bias))  # T x d x d_out; positions do not mix behind the last MLP
    weights = 2 / states_of(model, one).square().sum(-1)
    expected = torch.einsum("t,tdi,tdj->ij", weights, jacobian, jacobian) / len(weights)
    value = found.value(matrix.name, OutputGradientCovariance())
    assert (value - expected).norm() < 0.1 * expected.norm()


def states_of(model, one):
    with torch.no_grad():
        return model(**one).last_hidden_state[0]


def test_states_are_in_the_empirical_and_the_sampled_statistics_alike():
    anatomy = Anatomy(headless("bert"))
    found = [
        collect(anatomy, [batch("bert")], [OutputGradientCovariance()], fisher=fisher).value(
            anatomy.matrices()[0].name, OutputGradientCovariance()
        )
        for fisher in ("empirical", "sampled")
    ]
    torch.testing.assert_close(*found)
    assert float(found[0].trace()) > 0


def test_divergence_is_the_same_error():
    dense, other = headless("bert"), changed("bert")
    measured = Divergence(Anatomy(dense), [], {}, [batch("bert")]).of(other)
    assert measured == pytest.approx(evaluate_loss(other, with_states_of(dense, [batch("bert")])).loss, rel=1e-4)


def test_losses_of_states_of_nothing_are_finite():
    assert losses_of(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compare(name, tmp_path):
    model = headless(name)
    data = [{key: tensor.clone() for key, tensor in batch(name).items()} for _ in range(3)]
    frame = transect.compare(
        model, ["svd", "kfac-svd", "rtn"], [0.9, 0.5], data, data, tmp_path / "run", also={"again": data},
        settings={"rtn": {"group": 8}}, allocations=None,
    )  # fmt: skip
    rows = frame.set_index(["method", "keep"])
    assert rows.loc[("dense", 1.0), "loss"] == 0 and rows["perplexity"].isna().all()
    assert 0 < rows.loc[("kfac-svd", 0.9), "loss"] < rows.loc[("kfac-svd", 0.5), "loss"]
    pd.testing.assert_series_equal(rows["loss"], rows["loss, again"], check_names=False)
    table = markdown_table(frame)
    assert "cosine" in table and "hidden states" in table and "perplexity" not in table
    assert (tmp_path / "run" / "pareto.png").stat().st_size > 0
    text = (tmp_path / "run" / "table.csv").read_text()
    again = transect.compare(
        headless(name), ["svd", "kfac-svd", "rtn"], [0.9, 0.5], data, data, tmp_path / "run", also={"again": data},
        settings={"rtn": {"group": 8}},
    )  # fmt: skip
    assert (tmp_path / "run" / "table.csv").read_text() == text and len(again) == len(frame)


def test_compress_and_recover_towards_the_dense_model():
    dense = headless("bert")
    with torch.no_grad():
        for matrix in Anatomy(dense).matrices():
            matrix.module.weight.mul_(20)  # as small as they are drawn, the blocks hardly add to the stream
    data = [{key: tensor.clone() for key, tensor in batch("bert").items()} for _ in range(6)]
    small = transect.compress(copy.deepcopy(dense), "kfac-svd", 0.6, data)
    before = evaluate_loss(small, with_states_of(dense, data)).loss
    repaired = transect.recover(small, data, "distill", teacher=dense, lr=1e-4, train="full")
    after = evaluate_loss(repaired, with_states_of(dense, data)).loss
    noted = Anatomy(repaired).record.history[-1]
    assert noted["loss_after"] < noted["loss_before"] and after < before and math.isfinite(after)


def test_bad_input(tmp_path):
    model, data = headless("bert"), [batch("bert")]
    with pytest.raises(TransectError, match="no head: its loss is how far its last hidden states are"):
        predictions(model, data[0])
    with pytest.raises(TransectError, match="repair it towards that"):
        transect.recover(model, data * 4, "full")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(TransectError, match="never has in memory"):
        transect.compare(tmp_path / "dense", ["svd"], [0.5], data, data, tmp_path / "run", stream=True)
