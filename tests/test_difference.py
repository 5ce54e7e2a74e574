"""What differs between two checkpoints: identities, changes that were made on purpose, and every kind of change."""

import copy
import json

import pytest
import torch

import transect
from transect.anatomy import Anatomy
from transect.data import Specimen, load
from transect.difference import comparison, comparisons, pair_of
from transect.difference.pair import standing_for
from transect.errors import TransectError
from transect.evaluation import evaluate_loss

from .models import VOCABULARY, assert_same_tensors, tiny

DATA = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(5))


def differing(other, model=None, **options):
    return transect.diff(model or tiny("llama"), other, DATA, **options)


def test_a_model_does_not_differ_from_itself():
    found = differing(tiny("llama"))
    assert not found.failed and set(found.refused) == {"knowledge"}
    assert not found["weights"]["changed"].any() and not found["weights"]["others"].any()
    assert found["text"]["agreement"] == 1 and abs(float(found["text"]["divergence"])) < 1e-12
    assert not found["text"]["distance"].any() and not len(found["text"]["worse"])
    assert not found["loss"]["measured"].any() and not found["loss"]["predicted"].any()
    assert "correlation" not in found["loss"].quantities


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "bloom", "gemma3"])
def test_an_edit_of_rank_one_is_found_where_it_was_made(name):
    other = tiny(name)
    block = Anatomy(other).blocks[1]
    down = block.mlp.down
    left, right = torch.randn(down.shape[0], 1), torch.randn(1, down.shape[1])
    change = 0.5 * left @ right
    share = float(change.norm() / down.weight.norm())
    down.write(down.weight + change)
    found = differing(other, tiny(name))
    assert not found.failed
    changed, rank = found["weights"]["changed"], found["weights"]["rank"]
    assert (changed.nan_to_num() > 0).nonzero().tolist() == [[1, 6]]
    assert float(changed[1, 6]) == pytest.approx(share, rel=1e-4) and float(rank[1, 6]) == pytest.approx(1, abs=1e-3)
    distance = found["text"]["distance"]
    assert float(distance[1]) < 1e-6 and float(distance[2]) > 1e-3  # from behind block 1 on
    measured = found["loss"]["measured"]
    both = [evaluate_loss(one, load(DATA, one)).loss for one in (tiny(name), other)]
    expected = torch.tensor([0.0, both[1] - both[0], 0.0], dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-6)
    batch = next(iter(load(DATA, other)))
    with torch.no_grad():
        before, after = (one(**batch).logits[:, :-1].log_softmax(-1) for one in (tiny(name).eval(), other.eval()))
    apart = found["loss"]["divergence"]
    assert float(apart[1]) == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3, abs=1e-7)
    assert not apart[[0, 2]].any()
    assert (found["loss"]["predicted"] > 0).tolist() == [False, True, False]
    assert f"({both[1] - both[0]:+.4f})" in found["text"].findings[0]


def test_the_prediction_is_the_increase_to_second_order():
    """For a small random change the curvature gives its size; it is a mean over tokens, whose labels were drawn."""
    other = tiny("llama")
    torch.manual_seed(0)
    for matrix in Anatomy(other).matrices():
        scale = 10.0 ** -(2 + matrix.block.index)
        matrix.write(matrix.weight + scale * torch.randn(matrix.shape))
    found = differing(other)
    predicted = found["loss"]["predicted"]
    ratios = predicted[:-1] / predicted[1:]
    assert ((ratios > 20) & (ratios < 500)).all()  # a tenth of the change, a hundredth of the loss
    assert float(found["loss"]["correlation of divergence"]) == pytest.approx(1)
    # A standard error of the mean of 128 squares is an eighth of it.
    torch.testing.assert_close(predicted[1:], found["loss"]["divergence"][1:], rtol=0.5, atol=0)


def test_removed_neurons_heads_and_blocks_are_told():
    narrow = tiny("llama")
    anatomy = Anatomy(narrow)
    anatomy.blocks[0].mlp.keep(range(5, 40))
    anatomy.blocks[1].attention.keep([2, 3])
    found = differing(narrow)
    assert not found.failed and "lost rows or columns" in found["weights"].findings[0]
    changed = found["weights"]["changed"]
    assert changed.isfinite().all() and (changed[2] == 0).all()
    gone = [*range(5), *range(40, 48)]
    up = Anatomy(tiny("llama")).blocks[0].mlp.up.weight
    assert float(changed[0, 5]) == pytest.approx(float(up[gone].norm() / up.norm()), rel=1e-4)
    assert found["loss"]["measured"].isfinite().all()
    shallow = tiny("llama")
    Anatomy(shallow).drop_block(1)
    found = differing(shallow)
    assert not found["weights"]["changed"][[0, 2]].any() and found["weights"]["changed"][1].isnan().all()
    assert "Blocks 1 of the first are not in the second" in " ".join(found["weights"].findings)
    assert len(found["text"]["distance"]) == 3


@pytest.mark.parametrize("method", ["svd", "rtn", "monarch", "amp", "llm-drop", "sparsegpt"])
def test_every_kind_of_compressed_model_is_compared(method):
    small = transect.compress(tiny("llama"), method, 0.6, DATA)
    before = copy.deepcopy(small.state_dict())
    model = tiny("llama")
    found = differing(small, model)
    assert not found.failed
    assert_same_tensors(model, tiny("llama"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert (found["weights"]["changed"].nan_to_num(1) > 0).any()  # dropped ones are not there to be compared


def test_converted_and_part_models_are_compared():
    other = transect.convert(tiny("llama"), "liger").model
    found = differing(other)
    assert not found.failed and not found["weights"]["changed"].nan_to_num().any()  # the same matrices
    assert float(found["text"]["distance"][-1]) > 0 and (found["loss"]["measured"] != 0).any()


def test_it_is_written_continued_and_refused(tmp_path, monkeypatch):
    other = transect.compress(tiny("llama"), "svd", 0.7)
    found = differing(other, out=tmp_path / "out")
    assert set(found) == {"weights", "text", "loss"}
    assert all(comparison(name).draw(result) for name, result in found.items())
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count('<script type="application/json" data-plot=') >= len(found)
    assert "What each block" in page and "What differs between this model and" in page
    told = json.loads((tmp_path / "out" / "data" / "weights.json").read_text())
    assert told["findings"] == list(found["weights"].findings)
    monkeypatch.setattr("transect.difference.catalog.weights.stable_rank", lambda matrix: 1 / 0)
    again = differing(other, out=tmp_path / "out")  # nothing is computed
    assert again["weights"].findings == found["weights"].findings and not again.failed
    for model, message in [(tiny("gpt2"), None), (tiny("bert"), "the task causal, the second"), ("absent", "absent")]:
        if message:
            with pytest.raises(TransectError, match=message):
                differing(model)
    with pytest.raises(TransectError, match="unknown comparison 'wights'; known: weights, text"):
        differing(other, what=["wights"])
    fewer = tiny("llama")
    Anatomy(fewer).drop_block(0)
    with pytest.raises(TransectError, match="the second model has 3 blocks and the first 2"):
        differing(tiny("llama"), fewer)


def test_rows_that_were_taken_out_are_found_or_nothing_is_said():
    whole = torch.randn(6, 4)
    assert torch.equal(standing_for(whole, whole[[0, 3, 4]], 0), whole * torch.tensor([1, 0, 0, 1, 1, 0.0])[:, None])
    assert standing_for(whole, torch.randn(3, 4) * 5, 0) is None
    assert standing_for(whole, whole[[1, 1]], 0) is None and standing_for(whole, whole[:, :2], 0) is None
    assert torch.equal(standing_for(whole, whole[:, [1, 3]], 1), whole * torch.tensor([0, 1, 0, 1.0]))


def test_facts_that_are_lost_are_counted():
    from transect.checkpoint import open_model
    from transect.data import load_facts

    opened = open_model("organism")
    facts = load_facts("organism:facts")[:8]
    other = copy.deepcopy(opened.model)
    for block in Anatomy(other).blocks:
        block.mlp.down.write(torch.zeros_like(block.mlp.down.weight))
    pair = pair_of(
        Specimen(Anatomy(opened.model), opened.tokenizer, known_facts=facts), Specimen(Anatomy(other), opened.tokenizer)
    )
    from transect.difference.catalog.knowledge import knowledge

    found = knowledge(pair)
    assert found["facts"][:, 0].all() and not found["facts"][:, 1].all()
    assert "lost, 0 gained" in found.findings[0]
    assert comparisons() == ["weights", "text", "knowledge", "loss"]
