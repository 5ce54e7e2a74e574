import numpy as np
import pytest
import torch

from tests.models import logits, tiny
from tests.test_hftp import TOKENIZER, random
from transect.anatomy import Anatomy
from transect.data import Specimen, load
from transect.errors import BadData, TransectError
from transect.forward import watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.brain_alignment.banded import (
    PENALTIES,
    apart,
    blocks,
    candidates_for,
    centred,
    contributions,
    correlations,
    fit,
)
from transect.probes.catalog.brain_alignment.brain_alignment import split
from transect.probes.catalog.brain_alignment.ceiling import from_repeats, from_subjects
from transect.probes.catalog.brain_alignment.features import delayed, features_of, kernel_of, windows
from transect.probes.catalog.brain_alignment.recordings import Recording, load_recording
from transect.probes.catalog.brain_alignment.significance import BLOCK, block_p, false_discovery

N = 90
TRAINING, HELD_OUT = torch.arange(60), torch.arange(65, N)
ONE = candidates_for(1, 0, 0)
EACH = torch.tensor([[0.3, 0.7]], dtype=torch.float64)


def specimen(name="llama", **more):
    return Specimen(Anatomy(tiny(name, **more)), TOKENIZER)


def gram(*spaces):
    return torch.stack([x @ x.T for x in spaces])


def ridge(x, y, penalties):
    """Predictions by the primal solution, each column with its own penalty."""
    mean, offset = x[TRAINING].mean(0), y[TRAINING].mean(0)
    a = x[TRAINING] - mean
    inverse = torch.linalg.inv(a.T @ a + torch.diag(penalties))
    return (x[HELD_OUT] - mean) @ inverse @ a.T @ (y[TRAINING] - offset)


def fitted(kernels, y, candidates=ONE, penalties=PENALTIES, **more):
    return fit(kernels, y, TRAINING, HELD_OUT, candidates=candidates, penalties=penalties, **more)


def recording(words=None, samples=N, channels=3, repeats=1, runs=None):
    words = words or [[f"w{3 + (7 * n + n * n // 5) % 50}", f"w{3 + (11 * n) % 50}"] for n in range(samples)]
    runs = torch.zeros(samples).long() if runs is None else runs
    return Recording(random(repeats, samples, channels), words, runs)


def test_dual_is_primal_and_bands_are_scaled_penalties():
    a, b, y = random(N, 7), random(N, 90, seed=1), random(N, 4, seed=2)
    penalty = torch.tensor([2.5], dtype=torch.float64)
    found = fitted(gram(a, b), y, EACH, penalty)
    scales = torch.cat([torch.full((7,), 2.5 / 0.3), torch.full((90,), 2.5 / 0.7)]).double()
    torch.testing.assert_close(found.predicted, ridge(torch.cat([a, b], 1), y, scales), rtol=1e-6, atol=1e-9)
    u, s, v = torch.linalg.svd(a[TRAINING] - a[TRAINING].mean(0), full_matrices=False)
    by_svd = (
        (a[HELD_OUT] - a[TRAINING].mean(0))
        @ v.T
        @ torch.diag(s / (s**2 + 2.5))
        @ u.T
        @ (y - y[TRAINING].mean(0))[TRAINING]
    )
    torch.testing.assert_close(fitted(gram(a), y, ONE, penalty).predicted, by_svd, rtol=1e-6, atol=1e-9)


def test_limits_of_the_penalty():
    x, b = random(N, 5), random(5, 2, seed=1)
    small, large = (fitted(gram(x), x @ b + 4, ONE, torch.tensor([p]).double()) for p in (1e-9, 1e15))
    assert (correlations(small.predicted, (x @ b)[HELD_OUT]) > 1 - 1e-9).all()
    torch.testing.assert_close(small.predicted, (x @ b)[HELD_OUT] - (x @ b)[TRAINING].mean(0), rtol=0, atol=1e-4)
    assert large.predicted.abs().max() < 1e-9
    assert correlations(torch.zeros(9, 2), random(9, 2)).tolist() == [0, 0]


def test_equal_bands_are_plain_ridge_and_one_without_weight_is_dropped():
    a, b, y = random(N, 4), random(N, 6, seed=1), random(N, 3, seed=2)
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    equal = fitted(gram(a, b), y, half, torch.tensor([3.0]).double())
    plain = fitted(gram(torch.cat([a, b], 1)), y, ONE, torch.tensor([6.0]).double())
    torch.testing.assert_close(equal.predicted, plain.predicted)
    dropped = fitted(gram(a, b), y, torch.tensor([[1.0, 0.0]]).double())
    torch.testing.assert_close(dropped.predicted, fitted(gram(a), y).predicted)
    assert (dropped.parts[1] == 0).all()


def test_order_rotation_and_other_channels_change_nothing():
    a, b, y = random(N, 4), random(N, 6, seed=1), random(N, 5, seed=2)
    y[:, :2] += a @ random(4, 2, seed=3)
    choices = candidates_for(2, 6, 0)
    found = fitted(gram(a, b), y, choices)
    turned = b @ torch.linalg.qr(random(6, 6, seed=4)).Q
    torch.testing.assert_close(fitted(gram(a, turned), y, choices).predicted, found.predicted)
    torch.testing.assert_close(fitted(gram(b, a), y, choices.flip(1)).parts.flip(0), found.parts)
    for channel in range(5):
        alone = fitted(gram(a, b), y[:, [channel]], choices)
        torch.testing.assert_close(alone.predicted[:, 0], found.predicted[:, channel])
    assert found.weights.shape == (5, 2) and found.penalties.shape == (5,)


def test_contributions_sum_to_explained_variance():
    a, b, y = random(N, 4), random(N, 6, seed=1), random(N, 3, seed=2)
    y += 2 * a[:, :1]
    found = fitted(gram(a, b), y, EACH)
    observed = y[HELD_OUT] - y[HELD_OUT].mean(0)
    predicted = found.predicted - found.predicted.mean(0)
    explained = 1 - (observed - predicted).square().sum(0) / observed.square().sum(0)
    parts = contributions(found.parts, y[HELD_OUT])
    torch.testing.assert_close(parts.sum(0), explained)
    assert (parts[0] > parts[1]).all()


def test_choices_never_see_what_is_held_out():
    a, b, y = random(N, 4), random(N, 6, seed=1), random(N, 3, seed=2)
    choices = candidates_for(2, 10, 0)
    found = fitted(gram(a, b), y, choices)
    other = y.clone()
    other[60:] = 100 * random(N - 60, 3, seed=5)
    again = fitted(gram(a, b), other, choices)
    assert torch.equal(found.weights, again.weights) and torch.equal(found.penalties, again.penalties)
    torch.testing.assert_close(found.predicted, again.predicted)


def test_blocks_are_contiguous_and_apart():
    made = blocks(torch.arange(20), 4, 2)
    assert [block.tolist() for _, block in made] == [[*range(5 * n, 5 * n + 5)] for n in range(4)]
    assert made[1][0].tolist() == [0, 1, 2, 12, 13, 14, 15, 16, 17, 18, 19]
    assert apart(torch.arange(6), torch.tensor([3]), 0).tolist() == [0, 1, 2, 4, 5]
    kernel, across = centred(gram(random(N, 3))[0], TRAINING, HELD_OUT)
    assert kernel.sum(0).abs().max() < 1e-9 and across.sum(1).abs().max() < 1e-9


def test_candidates():
    assert candidates_for(1, 9, 0).tolist() == [[1.0]]
    made = candidates_for(3, 10, 0)
    assert made.shape == (14, 3) and torch.equal(made[:3], torch.eye(3).double())
    torch.testing.assert_close(made.sum(1), torch.ones(14).double())


def test_delays_reach_so_far_and_not_into_another_run():
    x, runs = random(12, 3), torch.tensor([0] * 7 + [1] * 5)
    found = delayed(x @ x.T, runs, range(1, 4))
    columns = []
    for delay in range(1, 4):
        late = torch.zeros_like(x)
        for n in range(12):
            if n >= delay and runs[n - delay] == runs[n]:
                late[n] = x[n - delay]
        columns.append(late)
    whole = torch.cat(columns, 1)
    torch.testing.assert_close(found, whole @ whole.T)
    impulse = torch.zeros(12, 1).double()
    impulse[2] = 1
    assert (
        delayed(impulse @ impulse.T, torch.zeros(12).long(), range(1, 6)).diagonal().tolist()
        == [0] * 3 + [1] * 5 + [0] * 4
    )


def test_a_planted_lag_needs_its_delay():
    x = random(N, 4)
    y = torch.cat([torch.zeros(3, 2), (x @ random(4, 2, seed=1))[:-3]])
    known, runs = torch.ones(N, dtype=torch.bool), torch.zeros(N).long()
    r = {}
    for delays in (range(3, 4), range(1, 6), range(0, 1), range(1, 3)):
        kernel = kernel_of(x, known, runs, TRAINING, delays)
        assert float(kernel.diagonal()[TRAINING].mean()) == pytest.approx(1)
        r[delays] = float(correlations(fitted(kernel[None], y).predicted, y[HELD_OUT]).mean())
    assert r[range(3, 4)] > 0.99 and r[range(1, 6)] > 0.95
    assert max(r[range(0, 1)], r[range(1, 3)]) < 0.4


def test_signal_to_noise_gives_r_and_the_ceiling():
    samples, channels, ratio = 1500, 40, 0.5
    signal = random(samples, channels)
    repeats = torch.stack([signal + random(samples, channels, seed=n) / ratio**0.5 for n in range(1, 5)])
    one = correlations(signal, repeats[0])
    assert float(one.mean()) == pytest.approx((ratio / (1 + ratio)) ** 0.5, abs=0.01)
    known = correlations(signal, repeats.mean(0))
    ceiling = from_repeats(repeats)
    assert float(ceiling.mean()) == pytest.approx((4 * ratio / (1 + 4 * ratio)) ** 0.5, abs=0.01)
    assert float((known / ceiling).median()) == pytest.approx(1, abs=0.02)
    assert float(from_repeats(random(4, samples, channels)).mean()) < 0.2
    torch.testing.assert_close(from_repeats(signal.expand(3, -1, -1)), torch.ones(channels).double())


def test_ceiling_from_other_subjects():
    samples, channels = 160, 6
    shared = random(samples, 3)
    subjects = torch.stack([
        shared @ random(3, channels, seed=10 + n) + 0.7 * random(samples, channels, seed=20 + n) for n in range(4)
    ])  # fmt: skip
    training, held_out = torch.arange(120), torch.arange(120, samples)
    found = from_subjects(subjects, training, held_out, 0, 0)
    noisy = subjects.clone()
    noisy[:, :, 0] = random(4, samples, seed=5)
    none = from_subjects(noisy, training, held_out, 0, 0)
    assert found.shape == (4, channels) and (found <= 1).all()
    own = torch.stack([correlations(s - e, s) for s, e in zip(
        subjects[:, held_out], (0.7 * random(samples, channels, seed=20 + n)[held_out] for n in range(4)), strict=True
    )])  # fmt: skip
    assert (found - own).abs().mean() < 0.1
    assert float(none[:, 0].mean()) < 0.2 < float(none[:, 1:].mean())


def test_p_of_noise_is_uniform_and_of_signal_small():
    m = 12 * BLOCK
    p = block_p(random(m, 800), random(m, 800, seed=1), 200, 0)
    assert p.mean().item() == pytest.approx(0.5, abs=0.04) and (p < 0.1).double().mean().item() == pytest.approx(
        0.1, abs=0.03
    )
    y = random(m, 3)
    assert (block_p(y + random(m, 3, seed=2), y, 200, 0) == 1 / 201).all()
    assert block_p(torch.zeros(m, 1), random(m, 1), 50, 0).item() == 1
    assert false_discovery(torch.tensor([0.001, 0.9, 0.5])).tolist() == pytest.approx([0.003, 0.9, 0.75])


def test_features_are_means_over_the_words_of_a_sample():
    words = [["w3", "w4"], [], ["w5"], ["w6", "w7", "w8"], ["w9"], ["w10"]]
    one = specimen(dtype=torch.float64)
    read = recording(words, 6, runs=torch.tensor([0, 0, 0, 0, 1, 1]))
    found = features_of(one, read, 256)
    for ids, samples in (([3, 4, 5, 6, 7, 8], [0, 0, 2, 3, 3, 3]), ([9, 10], [4, 5])):
        with torch.no_grad(), watch(one.anatomy, ["residual"]) as seen:
            one.model(input_ids=torch.tensor([ids]))
        for state in range(4):
            for sample in set(samples):
                rows = [n for n, other in enumerate(samples) if other == sample]
                torch.testing.assert_close(found[state, sample], seen.residual[state][0, rows].mean(0))
    assert found.shape == (4, 6, 32) and (found[:, 1] == 0).all()


def test_windows_overlap_by_half_and_count_each_token_once():
    pairs = [(n, n // 2) for n in range(23)]
    made = windows(pairs, 8)
    assert [token for ids, _, old in made for token in ids[old:].tolist()] == list(range(23))
    assert all(len(ids) == 8 for ids, _, _ in made) and all(old >= 4 for _, _, old in made[1:])
    assert len(windows(pairs, 100)) == 1 and len(windows([], 8)) == 0


def test_samples_held_out():
    training, held_out = split(torch.zeros(50).long(), 0.2, 5)
    assert training.tolist() == list(range(35)) and held_out.tolist() == list(range(40, 50))
    training, held_out = split(torch.tensor([0] * 20 + [1] * 20 + [2] * 4), 0.2, 5)
    assert training.tolist() == list(range(20)) and held_out.tolist() == list(range(20, 44))


def written(tmp_path, responses, words, name="r.csv", extra=()):
    """A CSV file, a row a sample."""
    head = ["words", *(column for column, _ in extra), *(f"v{n}" for n in range(responses.shape[1]))]
    rows = [
        [" ".join(said), *(str(values[n]) for _, values in extra), *(f"{x:.8g}" for x in row)]
        for n, (said, row) in enumerate(zip(words, responses.tolist(), strict=True))
    ]
    (tmp_path / name).write_text("\n".join(",".join(row) for row in [head, *rows]))
    return str(tmp_path / name)


def test_both_formats_say_the_same(tmp_path):
    words = [["w3", "w4"], [], ["w5"], ["w6"]]
    responses = random(2, 4, 3)
    path = written(
        tmp_path, responses.flatten(0, 1), words * 2, extra=[("repeat", [1] * 4 + [2] * 4), ("run", list("aabb") * 2)]
    )  # fmt: skip
    file = tmp_path / "r.npz"
    parts = {
        "responses": responses.numpy(),
        "words": ["w3", "w4", "w5", "w6"],
        "onsets": [0, 1.9, 4.1, 7.9],
        "interval": 2.0,
    }
    np.savez(file, **parts, runs=[0, 0, 1, 1], names=["v0", "v1", "v2"])
    for read in (load_recording(path), load_recording(file)):
        torch.testing.assert_close(read.responses, responses, rtol=1e-6, atol=1e-6)
        assert (
            list(map(list, read.words)) == words
            and read.runs.tolist() == [0, 0, 1, 1]
            and list(read.names) == ["v0", "v1", "v2"]
        )
    for change, said in (
        ({"onsets": [0, 1.9, 4.1, 8.1]}, "go on until 8.1 s, but 4 samples of 2 s end at 8 s"),
        ({"onsets": [0, 1.9, 4.1]}, "4 words, but 3 onsets"), ({"onsets": [0, 5, 4.1, 6]}, "in the order of the words"),
        ({"interval": 0.0}, "above 0"), ({"responses": random(4).numpy()}, "in 2 or 3 dimensions"),
        ({"runs": [0, 0, 1]}, "has 4 samples, but 3 samples in runs"), ({"names": ["a"]}, "3 names, but 1"),
        ({"runs": [1, 1, 0, 0]}, "numbered upwards"), ({"words": np.array(["a", None], object)}, "without pickled"),
    ):  # fmt: skip
        np.savez(file, **{**parts, **change})
        with pytest.raises(BadData, match=said):
            load_recording(file)
    np.savez(file, responses=parts["responses"])
    with pytest.raises(BadData, match="has no words, onsets, interval"):
        load_recording(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BadData, match="cannot be read as"):
        load_recording(file)


def test_bad_recordings_are_refused(tmp_path):
    words = [["w3"], ["w4"], ["w5"], ["w6"]]
    gap = random(4, 3)
    gap[2, 1] = torch.nan
    still = random(4, 3)
    still[:, 0] = 7
    for values, said, extra in (
        (gap, "'v1' of the recording has gaps .* at sample 2", ()),
        (still, "'v0' of the recording never changes; leave it out", ()),
        (random(4, 2), "repeat '2' .* has 1 samples", [("repeat", [1, 1, 1, 2])]),
    ):  # fmt: skip
        with pytest.raises(BadData, match=said):
            load_recording(written(tmp_path, values, words, extra=extra))
    for text, said in (
        ("words,v\nw3,1\nw4,high", "should hold numbers: .*high"), ("a,b\n1,2", "Expected: .npz"),
        ("words,v\nw3,1\nw4,", "has gaps"), ("words,v", "is empty"), ("words,v\n,1\n,2", "no words"),
    ):  # fmt: skip
        (tmp_path / "r.csv").write_text(text)
        with pytest.raises(BadData, match=said):
            load_recording(tmp_path / "r.csv")
    with pytest.raises(BadData, match="a file of this kind"):
        load_recording("r.mat")
    with pytest.raises(BadData, match="not there"):
        load_recording(tmp_path / "none.csv")


def test_the_probe_finds_the_layer_that_a_recording_was_made_of(tmp_path):
    one = specimen()
    words = recording(samples=220).words
    read = recording(words, 220)
    made = features_of(one, read, 48)[2].double()
    made = (made - made.mean(0)) / made.std(0)
    late = torch.cat([torch.zeros(2, 32), made[:-2]]).double()
    signal = late @ random(32, 5) / 32**0.5
    before = logits(one.model, {"input_ids": torch.arange(3, 20)[None]})
    rows = torch.cat([signal + 0.3 * random(220, 5, seed=n + 1) for n in range(4)])
    path = written(tmp_path, rows, list(words) * 4, extra=[("repeat", [n for n in range(4) for _ in range(220)])])
    settings = {"recording": path, "context": 48, "permutations": 200, "last_delay": 2, "candidates": 4, "bands": 2}
    found = run_probes(one, {"brain-alignment": settings})["brain-alignment"]
    assert found["r"].mean() > 0.8 and found["q"].max() < 0.05
    assert (found["r best"] >= 0.9 * found["ceiling"]).all() and found["normalised"].median() > 0.9
    assert found["r alone"].mean(1).argmax() in (1, 2, 3) and found["r pace"].mean() < 0.3
    assert found.labels["band"] == ["words and letters", "states 0-1", "states 2-3"]
    assert len(drawings(found)) == 5 and len(found.findings) == 4
    assert torch.equal(logits(one.model, {"input_ids": torch.arange(3, 20)[None]}), before)
    people = run_probes(one, {"brain-alignment": {**settings, "ceiling": "subjects"}})["brain-alignment"]
    assert people["r"].shape == (20,) and people["ceiling"].min() > 0.8
    single = run_probes(one, {"brain-alignment": {**settings, "recording": written(tmp_path, rows[:220], words)}})
    assert (
        "ceiling" not in single["brain-alignment"].quantities and "no repeats" in single["brain-alignment"].caveats[-1]
    )


def test_what_cannot_be_done_is_said(tmp_path):
    one, words = specimen(), recording(samples=60).words
    assert "pass --brain-alignment.recording" in run_probes(one, {"brain-alignment": {}}).refused["brain-alignment"]
    short = written(tmp_path, random(20, 2), words[:20], "short.csv")
    fine = written(tmp_path, random(60, 2), words, "fine.csv")
    odd = written(tmp_path, random(60, 2), [*words[:59], ["never"]], "odd.csv")
    late = random(60, 2)
    late[48:, 1] = 2
    for settings, said in (
        ({"recording": short}, "has 20 samples, of which 11 are to train on and 4 held out"),
        ({"recording": odd}, "1 words of the recording are not in the tokenizer's vocabulary, such as 'never'"),
        ({"recording": fine, "ceiling": "subjects"}, "three subjects at least, and the recording has 1"),
        ({"recording": fine, "first_delay": 3, "last_delay": 1}, "the last delay, 1, is before the first, 3"),
        ({"recording": written(tmp_path, late, words, "late.csv")}, "'v1' .* never changes in the samples"),
    ):  # fmt: skip
        with pytest.raises(TransectError, match=said):
            run_probes(one, {"brain-alignment": settings})
    without = Specimen(one.anatomy, data=load(torch.arange(3, 40)[None], one.model))
    assert "tokenizer" in run_probes(without, {"brain-alignment": {"recording": fine}}).refused["brain-alignment"]
