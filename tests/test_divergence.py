"""The search's measure: one matrix changed, from its own block on, is the whole model with that matrix changed."""

import pytest
import torch
from transformers import AutoModelForMaskedLM

from transect.anatomy import Anatomy
from transect.compression import divergence
from transect.compression import method as registered
from transect.compression.divergence import Divergence
from transect.compression.frame import factorize

from .models import CONFIGS, entry, inputs, tiny


def data(name, count=2):
    made = [inputs(name, seed=seed) for seed in range(1, count + 1)]
    for batch in made:
        if entry(name)[1] is AutoModelForMaskedLM:
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, ::2] = -100
    return made


@pytest.mark.parametrize("name", [*CONFIGS, "qwen2_moe", "xglm"])
def test_one_matrix_alone_is_measured_as_in_the_whole_model(name, monkeypatch):
    monkeypatch.setattr(divergence, "_AT_ONCE", 24)  # two sequences: some candidates go together, one is left over
    anatomy = Anatomy(tiny(name))
    matrices = anatomy.matrices(["k", "o", "down"])
    ranks = {matrix.name: 2 for matrix in matrices}
    measure = Divergence(anatomy, matrices, factorize(matrices, registered("svd"), {}, None), data(name))
    before = {key: tensor.clone() for key, tensor in anatomy.model.state_dict().items()}
    alone = measure.of_each(ranks)
    after = anatomy.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert not anatomy.record.modules
    expected = {key: measure({key: rank}) for key, rank in ranks.items()}
    assert max(expected.values()) > 1e-4
    assert alone == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_single_matrices_are_measured_on_the_first_sequences_that_have_enough_predictions():
    """As many as are asked for, in whole sequences; another number is another measurement."""
    anatomy, batches = Anatomy(tiny("llama")), data("llama")
    matrices = anatomy.matrices(["down"])
    ranks, factors = {matrix.name: 2 for matrix in matrices}, factorize(matrices, registered("svd"), {}, None)
    measure = Divergence(anatomy, matrices, factors, batches)
    each = len(measure._dense[0]) // 2
    whole = measure.of_each(ranks)
    for predictions, sequences in ((1, 1), (each, 1), (each + 1, 2), (2 * each, 2)):
        first = [{"input_ids": batches[0]["input_ids"][:sequences]}]
        expected = Divergence(anatomy, matrices, factors, first).of_each(ranks)
        assert measure.of_each(ranks, predictions) == pytest.approx(expected, rel=1e-3) != whole
    assert measure.of_each(ranks) == whole
