import math
from itertools import pairwise, permutations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY, logits, tiny
from transect.anatomy import Anatomy
from transect.data import Specimen
from transect.errors import BadData, TransectError
from transect.forward import watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.hftp.rhythm import SLOTS, Stimuli, broken, fitted, orders, own_sentences, sentences_of
from transect.probes.catalog.hftp.tagging import (
    Recorded,
    by_unit,
    contrast_p,
    discoveries,
    exceedance,
    peaks_of,
    record,
    spectrum,
    standard_scores,
    tag,
)

T, SENTENCE, PHRASE = 80, 20, 40  # samples, bins of 1 and 2 Hz
BINS = [SENTENCE, PHRASE]


def words(names):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


TOKENIZER = words(["<unk>", "<pad>", *(f"w{i}" for i in range(2, VOCABULARY))])


def specimen(name="llama", tokenizer=TOKENIZER, **more):
    return Specimen(Anatomy(tiny(name, **more)), tokenizer)


def stimuli(count=20, skip=0, size=4):
    return Stimuli([(3 + (7 * i + i * i // 5) % 50,) for i in range(size * count)], size, skip)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def waves():
    """Planted signals: a sentence, a phrase, nothing, and an impulse once a sentence (T x 4)."""
    t = torch.arange(T, dtype=torch.float64)
    return torch.stack(
        [torch.cos(math.pi * t / 2), torch.cos(math.pi * t), torch.full((T,), 3.0), (t % 4 == 1) * 1.0], 1
    )


def recorded(signals, noise=0.0):
    """As `record` makes it of ten groups."""
    groups = torch.stack([signals + noise * random(*signals.shape, seed=seed + 1) for seed in range(10)])
    return Recorded([0], [groups.mean(0)], [spectrum(groups)[:, BINS]], torch.zeros(1, T // 2 + 1))


def test_planted_rhythms_in_the_spectrum():
    found = spectrum(waves())[BINS]
    torch.testing.assert_close(found[:, 0], torch.tensor([T / 2, 0.0]).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(found[:, 1], torch.tensor([0.0, T]).double(), atol=1e-9, rtol=0)
    assert float(found[:, 2].max()) < 1e-9  # the mean is no rhythm
    assert float(found[0, 3]) == pytest.approx(float(found[1, 3]))  # harmonics
    x = random(T, 5)
    torch.testing.assert_close(spectrum(x.flip(0)), spectrum(x))


def test_planted_rhythms_get_their_names():
    found = tag(recorded(waves(), 0.01), recorded(0 * waves(), 0.01), BINS, 500, 0)
    assert found.corrected[0].tolist() == [1, 2, 0, 3]
    assert found.passed[:, 0].tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    assert found.counts(corrected=True).tolist() == [[1, 1, 1]]
    assert float(found.peaks[0, 0, 0]) > 50 and float(found.peaks[1, 0, 1]) > 50


def test_kinds_by_z_are_disjoint_and_exchange_finds_the_opposite():
    signals = torch.cat([waves(), torch.zeros(T, 200, dtype=torch.float64)], 1)
    experiment, control = recorded(signals, 0.1), recorded(0 * signals, 0.1)
    found = tag(experiment, control, BINS, 200, 0)
    assert found.kinds[0, :4].tolist() == [1, 2, 0, 3]
    assert int(found.counts().sum()) == int((found.kinds > 0).sum())
    swapped = tag(control, experiment, BINS, 200, 0)
    assert swapped.values[0, 0, [0, 3]].tolist() == [0, 0] == swapped.values[1, 0, [1, 3]].tolist()


def test_constants_never_pass():
    x = torch.full((T, 3), 1e4) + 1e-3 * torch.tensor([0.0, 0.0, 1.0])
    assert (exceedance(x, BINS, 100, 0) == 1).all()


def test_five_percent_of_white_noise_pass():
    share = exceedance(random(T, 4000), BINS, 400, 0)
    assert (share < 0.05).double().mean(1).tolist() == pytest.approx([0.05, 0.05], abs=0.012)


def test_size_and_offset_do_not_matter_and_permutations_are_those_of_brute_force():
    x = random(T, 6)
    share = exceedance(x, BINS, 60, 3)
    torch.testing.assert_close(exceedance(-40 * x + 7, BINS, 60, 3), share)
    generator = torch.Generator().manual_seed(3)
    shuffled = [torch.randperm(T, generator=generator).argsort() for _ in range(60)]
    null = torch.stack([spectrum(x[order])[BINS] for order in shuffled])
    torch.testing.assert_close(share, (null >= spectrum(x)[BINS]).double().mean(0))


def test_p_values_of_groups_are_uniform_without_a_difference_and_false_discoveries_are_few():
    p = contrast_p(random(10, 1, 4000), random(10, 1, 4000, seed=1))
    assert float((p < 0.1).double().mean()) == pytest.approx(0.1, abs=0.02)
    assert int(discoveries(p).sum()) <= 2
    p[0, :50] = 1e-8
    p[0, 60] = torch.nan
    assert discoveries(p)[0, :50].all() and not discoveries(p)[0, 60]


def test_scores_and_peaks():
    values = torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.0, torch.nan]])
    assert standard_scores(values)[0, 2] == pytest.approx((4 - 0.8) / 1.6)
    assert (standard_scores(torch.zeros(2, 3)) == 0).all()
    flat = torch.ones(41, 1)
    flat[SENTENCE] = 6
    assert peaks_of(flat, BINS)[:, 0].tolist() == [6, 1]


def test_control_keeps_no_neighbours():
    generator = torch.Generator().manual_seed(0)
    found = {tuple(broken(4, generator).tolist()) for _ in range(600)}
    expected = {one for one in permutations(range(4)) if all(b != a + 1 for a, b in pairwise(one))}
    assert found == expected and len(expected) == 11


def test_orders_keep_what_they_should():
    one, generator = stimuli(12), torch.Generator().manual_seed(0)
    for kind in ("experiment", "words", "classes", "phrases"):
        made = orders(one, kind, 3, generator)
        assert all(sorted(order.tolist()) == list(range(48)) for order in made)
        sentences = torch.stack(made).view(3, 12, 4)
        if kind == "words":
            assert (sentences // 4 == torch.arange(12)[:, None]).all()
        elif kind == "phrases":
            pairs = sentences.view(3, 24, 2)
            assert (pairs[..., 1] == pairs[..., 0] + 1).all() and (pairs[..., 0] % 2 == 0).all()
        else:
            assert (sentences // 4 == sentences[..., :1] // 4).all()
            assert (sentences % 4 == sentences[:1, :1] % 4).all()  # kinds of words keep their rhythm
            assert ((sentences % 4).diff() == 1).all() == (kind == "experiment")


def test_rates():
    one = stimuli(20)
    assert one.rates == {"sentence": 1.0, "phrase of 2": 2.0} and one.bins == [20, 40] and one.exact
    eight = stimuli(10, size=8)
    assert list(eight.rates.values()) == pytest.approx([0.5, 4 / 7, 4 / 6, 0.8, 1, 4 / 3, 2])
    assert eight.bins[0] == 10 and eight.bins[-1] == 40 and not eight.exact


def test_several_tokens_of_a_word_are_averaged():
    x = random(5, 3)
    assert by_unit(x, torch.arange(5), 5) is x
    found = by_unit(x, torch.tensor([0, 1, 1, 1, 2]), 3)
    torch.testing.assert_close(found, torch.stack([x[0], x[1:4].mean(0), x[4]]))
    ids, owners = Stimuli([(5,), (6, 7), (8,), (9,)], 4, 0).read(torch.tensor([1, 0, 3, 2]))
    assert ids.tolist() == [6, 7, 5, 9, 8] and owners.tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_recorded_means_by_hand(name):
    one, made = specimen(name, dtype=torch.float64), stimuli(10, skip=2)
    found = record(one, made, "experiment", 10, 4)
    assert found.layers == [0, 1, 2] and found.means[0].shape == (32, 48 if name != "gpt2" else 128)
    generator, means, amplitudes = torch.Generator().manual_seed(4), [], []
    for _ in range(10):
        ids, _ = made.read(orders(made, "experiment", 1, generator)[0])
        with torch.no_grad(), watch(one.anatomy, ["neurons"]) as seen:
            one.model(input_ids=ids[None])
        means.append(seen.neurons[1].reshape(40, -1)[8:])
        amplitudes.append(spectrum(means[-1])[made.bins])
    torch.testing.assert_close(found.means[1], torch.stack(means).mean(0))
    torch.testing.assert_close(found.amplitudes[1], torch.stack(amplitudes))
    total = found.power.sum(1)
    assert (total < 1 + 1e-9).all() and (name == "opt" or (total > 1 - 1e-9).all())  # its dead neurons have none


def test_a_model_with_a_rhythm_of_its_own(tmp_path):
    """Words of each place have embeddings of their own: neurons follow, and less with the words permuted."""
    one = specimen()
    lines = [" ".join(f"w{3 + 12 * place + (number * (place + 2)) % 12}" for place in range(4)) for number in range(16)]
    (tmp_path / "own.txt").write_text("\n".join(lines))
    table = one.model.get_input_embeddings().weight
    with torch.no_grad():
        for place in range(4):
            table[3 + 12 * place : 15 + 12 * place] += 0.5 * torch.randn(
                32, generator=torch.Generator().manual_seed(place)
            )
    before = logits(one.model, {"input_ids": torch.arange(3, 20)[None]})
    settings = {"sentences": str(tmp_path / "own.txt"), "shuffles": 20, "permutations": 200, "skip": 1}
    found = run_probes(one, {"hftp": settings})["hftp"]
    assert found["passed"].min() > 0.5 and found["corrected count"].sum() > 70
    assert found["count"].sum() > found["swapped count"].sum()
    assert len(drawings(found)) == 4 and len(found.findings) == 3
    power = found["power"].mean(1)[:, found["frequency"] == 1]
    assert power[0] > 3 * power[1]
    assert torch.equal(logits(one.model, {"input_ids": torch.arange(3, 20)[None]}), before)
    classes = run_probes(one, {"hftp": {**settings, "control": "classes"}})["hftp"]
    kept = classes["power"].mean(1)[:, classes["frequency"] == 1]
    assert kept[1] > 0.5 * kept[0]  # kinds of words have the rhythm there too
    phrases = run_probes(one, {"hftp": {**settings, "control": "phrases"}})["hftp"]
    broken_up = phrases["power"].mean(1)
    assert broken_up[1, phrases["frequency"] == 1] < 0.3 * broken_up[0, phrases["frequency"] == 1]


def test_own_sentences_are_of_single_tokens():
    known = [word for kind in SLOTS.values() for word in kind.split()[:8]]
    one = Specimen(Anatomy(tiny("llama")), words(["<unk>", "<pad>", *known]))
    made = own_sentences(one, 20, 0)
    assert len(made) == 20 and all(len(sentence) == 4 and all(len(unit) == 1 for unit in sentence) for sentence in made)
    assert len({sentence[0] for sentence in made[:8]}) == 8  # each word once before one comes again
    assert made == own_sentences(one, 20, 0) != own_sentences(one, 20, 1)
    assert "has 0 as one token" in run_probes(specimen(), {"hftp": {}}).refused["hftp"]
    assert "tokenizer" in run_probes(Specimen(Anatomy(tiny("llama"))), {"hftp": {}}).refused["hftp"]


def test_sentences_of_a_file(tmp_path):
    one, file = specimen(), tmp_path / "s.txt"
    file.write_text("w3 w4, w5 w6.\n\nw7 w8 w9 w10!\n")
    assert sentences_of(one, str(file)) == [[(3,), (4,), (5,), (6,)], [(7,), (8,), (9,), (10,)]]
    for text, said in (
        ("w3 w4 w5 w6\nw3 w4 w5", "sentence 2 .* has 3 units"), ("w3 w4", "from 4 to 16"),
        ("w3 w4 w5 nothing", "not in the tokenizer's vocabulary, such as nothing"), ("?\n", "no sentence"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(BadData, match=said):
            sentences_of(one, str(file))
    with pytest.raises(BadData, match=r"\.txt file"):
        sentences_of(one, "s.csv")
    with pytest.raises(BadData, match="is no file"):
        sentences_of(one, str(tmp_path / "none.txt"))


def test_too_few_units_and_bad_settings(tmp_path):
    one, file = specimen(), tmp_path / "s.txt"
    with pytest.raises(TransectError, match="needs 16 units"):
        fitted(one, [[(3,)] * 4] * 4, 1)
    assert fitted(one, [[(3,)] * 4] * 40, 1).samples == 60  # what the context of 64 takes
    assert fitted(one, [[(3, 4)] * 4] * 40, 1).samples == 28
    file.write_text("w3 w4 w5 w6 w7\n" * 10)
    with pytest.raises(TransectError, match="10 groups"):
        run_probes(one, {"hftp": {"shuffles": 15, "sentences": str(file)}})
    found = run_probes(one, {"hftp": {"shuffles": 10, "sentences": str(file), "control": "phrases"}})
    assert "not made of phrases of two" in found.refused["hftp"]


def test_blocks_without_neurons():
    one = specimen()
    one.anatomy.blocks[1].mlp.drop()
    assert record(one, stimuli(10), "words", 10, 0).layers == [0, 2]
    for block in one.anatomy.blocks:
        if block.mlp is not None:
            block.mlp.drop()
    with pytest.raises(TransectError, match="no block of this model has MLP neurons"):
        record(one, stimuli(10), "words", 10, 0)
