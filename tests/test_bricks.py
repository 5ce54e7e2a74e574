"""Bricks: scores against scikit-learn, masking and its limits, sets, experts, labelled texts, and bad input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transect.anatomy import Anatomy
from transect.data import Batches, Specimen
from transect.errors import BadData, TransectError
from transect.evaluation import evaluate_loss
from transect.forward import changed, watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.bricks.experts import by_chance, enrichment, groups_of, threshold
from transect.probes.catalog.bricks.functions import Instance, load_functions
from transect.probes.catalog.bricks.pruning import chosen, overlaps, ranked
from transect.probes.catalog.bricks.scores import average_precisions, mean_sizes, tokenised
from transect.probes.catalog.bricks.sparsity import LEVELS, MASKED, Sizes, changes, masked_losses, without_smallest
from transect.probes.neurons import output_norms

from .models import VOCABULARY, inputs, logits, tiny

NAME = "bricks"


def tokenizer():
    """w2 to w63, each one token."""
    names = ["<unk>", "<pad>", *(f"w{number}" for number in range(2, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def specimen(name="llama", dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (6, 16), generator=generator)
    return Specimen(Anatomy(tiny(name, dtype=dtype)), tokenizer(), Batches([{"input_ids": ids}]))


def labelled(kinds=("low", "high"), each=40):
    """Texts whose words are of one part of the vocabulary for each kind."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for place, kind in enumerate(kinds):
        for _ in range(each):
            words = torch.randint(2 + 20 * place, 20 + 20 * place, (6,), generator=generator).tolist()
            found.append({"text": " ".join(f"w{word}" for word in words), "label": kind})
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000), st.booleans())
def test_scores_are_scikit_learns_average_precision(count, seed, ties):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (count, 7)).astype(float) if ties else random.normal(size=(count, 7))
    labels = np.concatenate([[0, 1], random.integers(0, 2, count - 2)])
    positives = torch.from_numpy(np.stack([labels, 1 - labels], 1))
    found = average_precisions(torch.from_numpy(scores), positives)
    for kind in range(2):
        for neuron in range(7):
            expected = metrics.average_precision_score(positives[:, kind].numpy(), scores[:, neuron])
            assert float(found[kind, neuron]) == pytest.approx(expected, abs=1e-9)
    monotone = average_precisions(torch.from_numpy(np.exp(scores) * 3), positives)
    torch.testing.assert_close(monotone, found)


def test_the_limits_of_a_score():
    positives = torch.tensor([1, 1, 0, 0, 0, 0])[:, None]
    perfect = positives[:, 0].double()
    found = average_precisions(torch.stack([perfect, -perfect, torch.zeros(6)], 1), positives)[0]
    assert float(found[0]) == 1 and float(found[1]) == pytest.approx(1 / 3) and float(found[2]) == pytest.approx(1 / 3)
    reverse = average_precisions(torch.tensor([0.0, 1, 2, 3, 4, 5])[:, None], positives)
    assert 0 < float(reverse) < 1 / 3  # below the base rate


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_neurons_sum_to_the_mlp_and_masking_has_its_limits(name):
    one = specimen(name, torch.float64)
    batch, blocks = inputs(name), one.anatomy.blocks
    with torch.no_grad(), watch(one.anatomy, ["neurons", "down"]) as seen:
        logits(one.model, batch)
    for block in blocks:
        down = block.matrix("down")
        bias = 0 if down.bias is None else down.bias
        a = seen.neurons[block.index]
        total = (a[..., None, :] * down.weight).sum(-1) + bias
        torch.testing.assert_close(total.flatten(0, -2), seen.down[block.index].flatten(0, -2), atol=1e-10, rtol=1e-8)
    losses = masked_losses(one, blocks, 2)
    text = one.text.take(2)
    assert losses[0, 0] == pytest.approx(evaluate_loss(one.model, text).loss, abs=1e-9)
    assert bool((losses[:, 0] == losses[0, 0]).all())
    with changed(one.anatomy, {("neurons", block.index): torch.zeros_like for block in blocks}):
        bare = evaluate_loss(one.model, text).loss
    assert losses[0, -1] == pytest.approx(bare, abs=1e-9) and MASKED[-1] == 1


def test_the_smallest_of_each_token_go_and_scales_of_the_matrices_matter_to_one_indicator_alone():
    a = torch.randn(3, 5, 8)
    cut = without_smallest(a, a.abs(), 3)
    assert bool(((cut == 0).sum(-1) == 3).all()) and torch.equal(without_smallest(a, a.abs(), 0), a)
    assert torch.equal(cut.abs().amax(-1), a.abs().amax(-1)) and not without_smallest(a, a.abs(), 8).any()
    one = specimen("opt", torch.float64)  # ReLU: rows by s and columns by 1/s change nothing
    other = specimen("opt", torch.float64)
    scale = torch.logspace(-2, 2, 48, dtype=torch.float64)
    for block in other.anatomy.blocks:
        up, down = block.matrix("up"), block.matrix("down")
        assert up.bias is not None
        up.write(up.weight * scale[:, None], up.bias * scale)
        down.write(down.weight / scale)
    torch.testing.assert_close(logits(one.model, inputs("opt")), logits(other.model, inputs("opt")))
    ours, theirs = (masked_losses(part, part.anatomy.blocks, 2) for part in (one, other))
    torch.testing.assert_close(ours[1], theirs[1])
    assert not torch.allclose(ours[0], theirs[0], atol=1e-6)
    norms = {0: output_norms(one.anatomy.blocks[0])}
    assert set(changes(norms, 1, 0.5, 0)) == {("neurons", 0)}


def test_sizes_count_every_neuron_of_every_token():
    block = specimen().anatomy.blocks[0]
    sizes, a = Sizes(block), torch.randn(10, 48)
    sizes.add(a[:4])
    sizes.add(a[4:])
    relative = a.abs() / a.abs().amax(1, keepdim=True)
    for place, level in enumerate(LEVELS.tolist()):
        assert float(sizes.shares[0, place]) == pytest.approx(
            float((relative <= level + 1e-7).double().mean()), abs=0.01
        )
    assert float(sizes.shares[0, -1]) == float(sizes.shares[1, -1]) == 1
    silent = Sizes(block)
    silent.add(torch.zeros(2, 48))
    assert float(silent.shares[0, 0]) == 1


def test_sets_overlaps_and_margins():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 4000, generator=generator)
    sets = chosen(values, [1000, 3000], 0.05, False)
    assert sets.sum(1).tolist() == [200] * 3
    layered = chosen(values, [1000, 3000], 0.05, True)
    assert layered[:, :1000].sum(1).tolist() == [50] * 3 and layered[:, 1000:].sum(1).tolist() == [150] * 3
    table = overlaps(sets)
    assert table.diagonal().tolist() == [1, 1, 1] and float(table[0, 1]) == pytest.approx(0.05, abs=0.05)
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.1], [0.2, 0.6]])
    torch.testing.assert_close(ranked(scores, "margin")[0], torch.tensor([0.1, -0.1]))
    assert ranked(scores, "score") is scores


def test_permuted_neurons_permute_scores_and_padding_changes_none():
    one, other = specimen(dtype=torch.float64), specimen(dtype=torch.float64)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for role in ("gate", "up"):
        matrix = other.anatomy.blocks[1].matrix(role)
        matrix.write(matrix.weight[order].clone())
    down = other.anatomy.blocks[1].matrix("down")
    down.write(down.weight[:, order].clone())
    short = [Instance("w5 w6", "a"), Instance("w7 w8 w9 w10", "b")]
    sizes, means = [], []
    for part in (one, other):
        table, mean = mean_sizes(part, part.anatomy.blocks, tokenised(part, short, 16))
        sizes.append(table)
        means.append(mean)
    torch.testing.assert_close(sizes[0][:, 48:96][:, order], sizes[1][:, 48:96])
    torch.testing.assert_close(means[0][48:96][order], means[1][48:96])
    alone, _ = mean_sizes(one, one.anatomy.blocks, tokenised(one, short[:1], 16))
    torch.testing.assert_close(alone[0], sizes[0][0])


def test_experts_follow_the_hypergeometric_law():
    for neurons, groups, top in ((1536, 48, 15), (3200, 100, 32)):
        limit = threshold(neurons, groups, top)
        law = hypergeom(neurons, neurons // groups, top)
        assert law.sf(limit) <= 0.001 < law.sf(limit - 1)
    group = torch.arange(1600) // 32
    scores = torch.rand(2, 1600, generator=torch.Generator().manual_seed(0))
    scores[0, 64:80] = 2  # the best hundredth of the first kind lies in one group
    shares, mean = enrichment(group, scores)
    assert float(shares[0]) == pytest.approx(1 / 50) and float(mean[0]) == pytest.approx(50)
    assert by_chance(group, 16, torch.Generator().manual_seed(0)) < 0.002
    made = groups_of(specimen().anatomy.blocks[0], torch.Generator().manual_seed(0))
    assert made is not None and len(set(made.bincount().tolist())) == 1 and int(made.max()) >= 1


@pytest.mark.parametrize("fill", ["zero", "mean"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_probe_through_the_frame(name, fill, tmp_path):
    path = tmp_path / "functions.json"
    path.write_text(json.dumps(labelled()))
    one = specimen(name)
    given = {"functions": str(path), "sequences": 2, "fill": fill, "per_layer": fill == "mean", "rank": "margin"}
    result = run_probes(one, {NAME: given})[NAME]
    assert result["base"].tolist() == [0.5, 0.5] and result["rise"].shape == (2, 2)
    assert float(result["best"].max()) > float(result["best by chance"].max())  # tokens tell the kinds apart
    assert len(drawings(result)) == 6 and len(result.findings) >= 4
    without = run_probes(one, {NAME: {"sequences": 2}})[NAME]
    assert "best" not in without.quantities and len(drawings(without)) == 2


def test_the_built_in_sets_are_there_and_texts_are_of_one_kind():
    for name, kinds in (("organism", 10), ("python", 4)):
        found = load_functions(name)
        counts = {kind: sum(one.function == kind for one in found) for kind in {one.function for one in found}}
        assert len(counts) == kinds and min(counts.values()) >= 100
        assert len({one.text for one in found}) == len(found)
    assert load_functions([Instance("a b", "x"), {"text": "c", "label": 1}])[1] == Instance("c", "1")


def test_bad_input_is_refused_before_any_work(tmp_path):
    def refused(entries, match):
        path = tmp_path / "wrong.json"
        path.write_text(json.dumps(entries))
        with pytest.raises(TransectError, match=match):
            run_probes(specimen(), {NAME: {"functions": str(path)}})

    refused(labelled(("low",)), "all are 'low'")
    refused([], "there are none")
    refused([{"text": "w3 w4"}, {"text": "w3", "label": "b"}], "entry 0 .*'label' is missing")
    refused([{"text": " ", "label": "a"}, {"text": "w3", "label": "b"}], "its text is empty")
    refused([{"text": "w3 w4", "label": None}], "should be a name or a number")
    refused(labelled(each=39), "'low' has 39, 'high' has 39")
    refused([*labelled(), {"text": "w3 w4", "label": "rare"}], "'rare' has 1")
    refused([*labelled()[:-1], {"text": "w3", "label": "high"}], "too few")
    with pytest.raises(BadData, match="not there"):
        load_functions(tmp_path / "nowhere.json")
    with pytest.raises(TransectError):
        run_probes(specimen(), {NAME: {"share": 1}})
    nameless = Specimen(specimen().anatomy, None, specimen().data)
    assert "tokenizer" in run_probes(nameless, {NAME: {"functions": "python"}}).refused[NAME]
    assert "next token" in run_probes(Specimen(Anatomy(tiny("bert"))), {NAME: {}}).refused[NAME]
