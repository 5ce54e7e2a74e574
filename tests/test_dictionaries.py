"""Sparse dictionaries: their algebra, training, files, and what is put in the place of activations."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import CAUSAL, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.data import Batches
from transect.dictionaries import (
    Activations,
    Dictionary,
    Principal,
    Settings,
    counted,
    layer_of,
    pinned,
    read_dictionary,
    recovered,
    spliced_losses,
    train_dictionary,
    write_dictionary,
)
from transect.dictionaries import train as training
from transect.dictionaries.resample import Firing, resample
from transect.errors import BadCheckpoint, BadData, Diverged, TransectError
from transect.evaluation import evaluate_loss
from transect.forward import changed, watch
from transect.training import State

SHORT = Settings(expansion=2, tokens=1024, batch=32, l1=0.5)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(name="llama", count=4, **more):
    return Batches([inputs(name, seed=seed, **more) for seed in range(count)])


class Vectors(Activations):
    """Batches of given vectors, in place of a model's."""

    def __init__(self, vectors, count, batch):
        self.lengths, self.tokens, self.buffer = torch.tensor([len(vectors)]), len(vectors), len(vectors)
        self.total, self.batch, self.seed, self._filled, self._held = count, batch, 0, 0, vectors

    def _fill(self, number):
        pass


def made(width=6, features=15, seed=0):
    """A dictionary in float64 in which no number is left at its start."""
    dictionary = Dictionary(width, features, seed, torch.float64)
    with torch.no_grad():
        dictionary.encoder_bias.copy_(random(features, seed=7) / 3)
        dictionary.decoder_bias.copy_(random(width, seed=8))
    return dictionary.requires_grad_(False)


def test_it_computes_what_it_says_and_keeps_it_when_folded_or_scaled():
    dictionary, x = made(), random(40, 6, seed=1)
    for f, row in enumerate(dictionary.encoder):
        expected = (row @ (x - dictionary.decoder_bias).T + dictionary.encoder_bias[f]).clamp_min(0)
        torch.testing.assert_close(dictionary.encode(x)[:, f], expected)
    a = dictionary.encode(x)
    assert bool((a >= 0).all()) and bool((a > 0).any(0).any())
    rebuilt = sum(a[:, f, None] * dictionary.decoder[:, f] for f in range(15)) + dictionary.decoder_bias
    torch.testing.assert_close(dictionary(x), rebuilt)
    torch.testing.assert_close(dictionary.decoder.norm(dim=0), torch.ones(15, dtype=torch.float64))
    before = dictionary(x)
    dictionary.decoder.mul_(torch.linspace(0.5, 3, 15, dtype=torch.float64))
    dictionary.encoder.div_(torch.linspace(0.5, 3, 15, dtype=torch.float64)[:, None])
    dictionary.encoder_bias.div_(torch.linspace(0.5, 3, 15, dtype=torch.float64))
    torch.testing.assert_close(dictionary(x), before)
    dictionary.fold()
    torch.testing.assert_close(dictionary(x), before)
    torch.testing.assert_close(dictionary.encode(x), a)
    scaled = dictionary(3 * x) / 3
    dictionary.of_scaled(3.0)
    torch.testing.assert_close(dictionary(x), scaled)


def planted(directions=20, width=16, count=6000, active=2):
    """Sums of few of known directions, and the directions (width x directions)."""
    truth = torch.nn.functional.normalize(random(width, directions, seed=3), dim=0)
    generator = torch.Generator().manual_seed(4)
    which = torch.rand(count, directions, generator=generator).argsort(1)[:, :active]
    size = 1 + torch.rand(count, active, generator=generator, dtype=torch.float64)
    return torch.zeros(count, directions, dtype=torch.float64).scatter_(1, which, size) @ truth.T, truth


def test_planted_directions_are_found():
    vectors, truth = planted()
    settings = Settings(expansion=3, tokens=128 * 700, batch=128, l1=1.0, lr=5e-3)
    found, course = train_dictionary(Vectors(vectors, settings.steps, 128), settings)
    assert course.steps == 700 and course.tokens == 128 * 700
    assert float((truth.T @ found.decoder).amax(1).mean()) >= 0.9
    l0 = (found.encode(vectors) > 0).double().sum(1).mean()
    assert float(l0) < 12 and float((found(vectors) - vectors).square().sum() / vectors.square().sum()) < 0.1
    torch.testing.assert_close(found.decoder.norm(dim=0), torch.ones(48, dtype=torch.float64), rtol=0, atol=1e-6)


def test_more_weight_of_the_sum_makes_fewer_active_and_a_worse_reconstruction():
    vectors, _ = planted()
    counts, errors = [], []
    for l1 in (0.0, 0.3, 1.0, 3.0):
        settings = Settings(expansion=2, tokens=128 * 100, batch=128, l1=l1, lr=5e-3, resamplings=0)
        found, _ = train_dictionary(Vectors(vectors, settings.steps, 128), settings)
        counts.append(float((found.encode(vectors) > 0).double().sum(1).mean()))
        errors.append(float((found(vectors) - vectors).square().sum()))
    assert counts == sorted(counts, reverse=True) and errors == sorted(errors)


def test_columns_have_length_1_after_every_step_and_the_gradient_no_part_along_them(monkeypatch):
    vectors, _ = planted(count=500)
    lengths, along = [], []
    step, tangent = training._Job.after_step, training._Job.tangent

    def watched(self, number, optimizer):
        step(self, number, optimizer)
        lengths.append(self.dictionary.decoder.detach().norm(dim=0))

    def seen(self, gradient):
        found = tangent(self, gradient)
        along.append((found * self.dictionary.decoder.detach()).sum(0).abs().max() / gradient.abs().max())
        return found

    monkeypatch.setattr(training._Job, "after_step", watched)
    monkeypatch.setattr(training._Job, "tangent", seen)
    train_dictionary(Vectors(vectors, 32, 32), replace(SHORT, normalise=False, bias="zero"))
    assert len(lengths) == len(along) == 32
    assert float((torch.stack(lengths) - 1).abs().max()) <= 1e-6 and float(max(along)) < 1e-12


def test_rates_rise_from_a_tenth_and_again_behind_a_resampling():
    vectors, _ = planted(count=500)
    job = training._Job(made(16, 32), Vectors(vectors, 1000, 32), replace(SHORT, tokens=32_000, resamplings=3), 1.0)
    job.problem = training.Problem("x", {"a": torch.nn.Parameter(torch.zeros(1))}, [], lambda b: (b, 1), None, int)
    rates = []
    for step in range(60):
        job.firing.steps.fill_(step)
        job.restarted = 30 * (step >= 30)
        rates.append(job.rates()["a"])
    assert rates[0] == rates[30] == pytest.approx(0.1) and rates[10] == rates[29] == rates[45] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])


def test_resampling_leaves_living_features_and_their_moments_as_they_are():
    dictionary, vectors = made(), random(200, 6, seed=2)
    parameters = dict(dictionary.requires_grad_(True).named_parameters())
    optimizer = torch.optim.Adam(parameters.values())
    dictionary(vectors).square().sum().backward()
    optimizer.step()
    dictionary.requires_grad_(False).normalise()
    dead = torch.zeros(15, dtype=torch.bool)
    dead[[2, 11]] = True
    before = {name: value.clone() for name, value in parameters.items()}
    state = {n: {k: optimizer.state[p][k].clone() for k in ("exp_avg", "exp_avg_sq")} for n, p in parameters.items()}
    assert resample(dictionary, dead, vectors, optimizer, 5)
    for name, parameter in parameters.items():
        turned = (lambda tensor: tensor.T) if name == "decoder" else (lambda tensor: tensor)
        per_feature = name != "decoder_bias"
        living = ~dead if per_feature else slice(None)
        assert torch.equal(turned(parameter)[living], turned(before[name])[living])
        for moment, kept in state[name].items():
            now = turned(optimizer.state[parameter][moment])
            assert torch.equal(now[living], turned(kept)[living]) and (not per_feature or not now[dead].any())
    length = before["encoder"][~dead].norm(dim=1).mean()
    torch.testing.assert_close(dictionary.encoder[dead].norm(dim=1), (0.2 * length).expand(2))
    torch.testing.assert_close(dictionary.encoder[dead] / (0.2 * length), dictionary.decoder[:, dead].T)
    assert not dictionary.encoder_bias[dead].any()
    directions = torch.nn.functional.normalize(vectors - dictionary.decoder_bias, dim=1)
    assert float((directions @ dictionary.decoder[:, dead]).amax(0).min()) == pytest.approx(1)
    dictionary.encoder_bias.fill_(-100)  # so that b_dec is all it puts out
    assert not resample(dictionary, dead, dictionary.decoder_bias.expand(3, 6), optimizer, 0)


def test_dead_features_come_back_to_life():
    vectors, _ = planted(count=2000)
    settings = Settings(expansion=4, tokens=64 * 120, batch=64, l1=2.0, lr=3e-3)
    shares = []
    for resamplings in (0, 4):
        found, _ = train_dictionary(
            Vectors(vectors, settings.steps, 64), replace(settings, resamplings=resamplings, seed=1)
        )
        firing = Firing(found)
        firing.add(found.encode(vectors))
        shares.append(float(firing.dead().double().mean()))
    assert shares[1] <= shares[0]


def test_the_geometric_median():
    vectors = random(50, 4)
    median = training.geometric_median(vectors)

    def distances(point):
        return float((vectors - point).norm(dim=1).sum())

    for step in random(50, 4, seed=9) * 1e-2:
        assert distances(median) <= distances(median + step) + 1e-9
    assert torch.equal(training.geometric_median(vectors[:1].expand(5, 4)), vectors[0])


@pytest.mark.parametrize("buffer", [64, 10_000])
def test_batches_are_the_texts_activations_each_once_a_round_and_follow_from_their_number(buffer):
    anatomy, data = Anatomy(tiny("llama", dtype=torch.float64)), text(count=8, length=17)
    with torch.no_grad(), watch(anatomy, ["heads"]) as seen:
        rows = [(anatomy.model(**batch), seen.heads[1])[1][:, 1:].flatten(0, 1) for batch in data]
    whole = torch.cat(rows)
    assert len(whole) == 256
    more = {"count": 16, "batch": 32, "buffer": buffer, "seed": 3}
    one = Activations(anatomy, data, "heads", 1, **more)
    assert one.tokens == 256
    batches = [one[number].clone() for number in range(16)]
    for turn in range(2):
        found = torch.cat(batches[8 * turn : 8 * turn + 8])
        order, wanted = (t[t[:, 0].argsort()] for t in (found, whole))
        torch.testing.assert_close(order, wanted, rtol=0, atol=1e-9)
    assert not torch.equal(torch.cat(batches[:8]), torch.cat(batches[8:]))
    again = Activations(anatomy, data, "heads", 1, **more)
    for number in (11, 3, 15):
        assert torch.equal(again[number], batches[number])
    assert max(len(again.held(10**6)), len(one.held(10**6))) <= max(64, min(buffer, 256))
    with pytest.raises(IndexError):
        one[16]


def test_padding_is_never_taken():
    anatomy = Anatomy(tiny("llama"))
    ids = inputs("llama", batch=2, length=8)["input_ids"]
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    assert counted(batch, False).sum(1).tolist() == [7, 4] and counted(batch, True).sum(1).tolist() == [8, 5]
    found = Activations(anatomy, Batches([batch]), "heads", 0, count=1, batch=11, buffer=64)
    alone = Activations(anatomy, Batches([{"input_ids": ids[1:, 3:]}]), "heads", 0, count=1, batch=4, buffer=64)
    apart = torch.cdist(alone[0], found[0]).amin(1)
    assert found.tokens == 11 and float(apart.max()) < 1e-4


def test_training_goes_on_bit_for_bit(tmp_path):
    anatomy, data = Anatomy(tiny("llama")), text(count=6, length=16)

    def vectors():
        return Activations(anatomy, data, "heads", 1, count=SHORT.steps, batch=32, buffer=96)

    whole, _ = train_dictionary(vectors(), SHORT)
    calls = itertools.count()

    def interrupt(check):
        if next(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dictionary(vectors(), SHORT, state=State(tmp_path / "s"), note={"model": 1}, on_check=interrupt)
    seen = []
    resumed, course = train_dictionary(
        vectors(), SHORT, state=State(tmp_path / "s"), note={"model": 1}, on_check=lambda check: seen.append(check.step)
    )
    assert course.steps == 32 and min(seen) > 20
    for name, value in whole.named_parameters():
        assert torch.equal(value, dict(resumed.named_parameters())[name])


def test_files_are_saelens_layout_and_read_back(tmp_path):
    dictionary = made().float()
    write_dictionary(tmp_path / "d", dictionary, "heads", 3, {"model_name": "me"})
    said = json.loads((tmp_path / "d" / "cfg.json").read_text())
    assert said["architecture"] == "standard" and (said["d_in"], said["d_sae"]) == (6, 15)
    stored = load_file(tmp_path / "d" / "sae_weights.safetensors")
    assert {name: tuple(one.shape) for name, one in stored.items()} == {
        "W_enc": (6, 15), "b_enc": (15,), "W_dec": (15, 6), "b_dec": (6,)
    }  # fmt: skip
    x = random(9, 6).float()
    again, config = read_dictionary(tmp_path / "d")
    assert torch.equal(again(x), dictionary(x)) and layer_of(config, "heads") == 3
    theirs = torch.relu((x - stored["b_dec"]) @ stored["W_enc"] + stored["b_enc"]) @ stored["W_dec"] + stored["b_dec"]
    torch.testing.assert_close(again(x), theirs)
    write_dictionary(tmp_path / "d", made(seed=4).float(), "heads", 3, {"model_name": "me"})  # ours may be replaced
    assert not torch.equal(read_dictionary(tmp_path / "d")[0](x), dictionary(x))


def foreign(folder, tensors=None, **more):
    """A folder as SAELens writes it: no marks, columns of any length."""
    folder.mkdir(exist_ok=True)
    own = {"W_enc": random(6, 15), "b_enc": random(15), "W_dec": 2 * random(15, 6, seed=1), "b_dec": random(6, seed=2)}
    own = {name: tensor.float() for name, tensor in own.items()}
    save_file({**own, **(tensors or {})}, folder / "sae_weights.safetensors")
    said = {"d_in": 6, "d_sae": 15, "architecture": "standard", "metadata": {"hook_name": "blocks.1.attn.hook_z"}}
    (folder / "cfg.json").write_text(json.dumps({**said, **more}))
    return own


@pytest.mark.parametrize("apply", [True, False])
def test_dictionaries_of_others_compute_the_same(apply, tmp_path):
    own, x = foreign(tmp_path / "d", apply_b_dec_to_input=apply), random(9, 6).float()
    found, said = read_dictionary(tmp_path / "d")
    a = torch.relu((x - own["b_dec"] * apply) @ own["W_enc"] + own["b_enc"])
    torch.testing.assert_close(found(x), a @ own["W_dec"] + own["b_dec"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.decoder.norm(dim=0), torch.ones(15))
    old = {"hook_point": "blocks.4.attn.hook_z", "activation_fn_str": "relu", "d_in": 6, "d_sae": 15}
    (tmp_path / "d" / "cfg.json").write_text(json.dumps(old))
    assert layer_of(read_dictionary(tmp_path / "d")[1], "heads") == 4 and layer_of(said, "heads") == 1


@pytest.mark.parametrize(
    ("tensors", "more", "match"),
    [
        ({}, {"architecture": "jumprelu"}, "architecture 'jumprelu' cannot be read"),
        ({}, {"activation_fn": "topk"}, "activation_fn 'topk'"),
        ({}, {"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({}, {"d_sae": 16}, r"W_enc is \(6, 15\), and by cfg.json it should be \(6, 16\)"),
        ({}, {"d_in": "six"}, "should say how many numbers d_in are"),
        ({"b_dec": torch.full((6,), torch.nan)}, {}, "b_dec holds NaN"),
        ({"b_enc": torch.zeros(15, dtype=torch.long)}, {}, "as plain numbers"),
        ({"scaling_factor": torch.full((15,), 2.0)}, {}, "scaling factors"),
    ],
)
def test_what_is_of_another_kind_is_refused(tensors, more, match, tmp_path):
    foreign(tmp_path / "d", tensors, **more)
    with pytest.raises(BadCheckpoint, match=match):
        read_dictionary(tmp_path / "d")


def test_damage_is_seen(tmp_path):
    write_dictionary(tmp_path / "d", made().float(), "heads", 3, {})
    weights, config = tmp_path / "d" / "sae_weights.safetensors", tmp_path / "d" / "cfg.json"
    whole, said = weights.read_bytes(), config.read_text()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole + b"x"):
        weights.write_bytes(damaged)
        with pytest.raises(BadCheckpoint, match=r"sae_weights\.safetensors"):
            read_dictionary(tmp_path / "d")
    weights.write_bytes(whole)
    for damaged in ("", "[1]", said.replace("blocks.3", "blocks.2")):
        config.write_text(damaged)
        with pytest.raises(BadCheckpoint, match=r"cfg\.json"):
            read_dictionary(tmp_path / "d")
    config.unlink()
    with pytest.raises(BadCheckpoint, match=r"no file cfg\.json"):
        read_dictionary(tmp_path / "d")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(TransectError, match="not a sparse dictionary"):
        write_dictionary(tmp_path / "other", made().float(), "heads", 3, {})


@pytest.mark.parametrize("name", CAUSAL)
def test_with_what_is_not_explained_kept_nothing_changes(name):
    """And a feature that is not active can be taken out."""
    anatomy = Anatomy(tiny(name))
    width = anatomy.blocks[1].find("o").shape[1]
    dictionary = Dictionary(width, 2 * width).requires_grad_(False)
    plain = logits(anatomy.model, inputs(name))
    with torch.no_grad(), watch(anatomy, ["heads"], [1]) as seen:
        anatomy.model(**inputs(name))
    a = dictionary.encode(seen.heads[1])
    silent = (a.flatten(0, -2) == 0).all(0).nonzero()[:, 0].tolist()

    def error_kept(x):
        return dictionary(x) + (x - dictionary(x))

    for change in (error_kept, pinned(dictionary, [], []), pinned(dictionary, silent, [0.0] * len(silent))):
        with changed(anatomy, {("heads", 1): change}):
            torch.testing.assert_close(logits(anatomy.model, inputs(name)), plain, rtol=1e-5, atol=1e-5)


def test_pinned_moves_along_the_feature_alone():
    dictionary, x = made(), random(20, 6, seed=5)
    moved = pinned(dictionary, [3], [2.5])(x) - x
    expected = (2.5 - dictionary.encode(x)[:, 3])[:, None] * dictionary.decoder[:, 3]
    torch.testing.assert_close(moved, expected)


def test_losses_recovered_is_1_for_what_is_and_0_for_zeros():
    anatomy, data = Anatomy(tiny("llama")), text()
    replacements = {"same": lambda x: x, "zeros": torch.zeros_like, "noise": lambda x: 10 * torch.randn_like(x)}
    for first in (False, True):
        losses = spliced_losses(anatomy, data, "heads", 1, replacements, first)
        assert losses["same"] == pytest.approx(evaluate_loss(anatomy.model, data).loss, rel=1e-5)
        with changed(anatomy, {("heads", 1): torch.zeros_like}):
            zero = evaluate_loss(anatomy.model, data).loss
        assert (losses["zeros"] == pytest.approx(zero, rel=1e-5)) == first
        assert recovered(losses["same"], losses["same"], losses["zeros"]) == 1
        assert recovered(losses["same"], losses["zeros"], losses["zeros"]) == 0
    assert recovered(1.0, 3.0, 2.0) < 0 and recovered(1.0, 1.0, 1.0) != recovered(1.0, 1.0, 1.0)


def test_principal_directions_are_the_best_of_their_number():
    x = random(300, 6) @ random(6, 6, seed=1) + 5
    principal = Principal(6)
    for part in x.split(70):
        principal.add(part)
    torch.testing.assert_close(principal.replacement(6)(x), x)
    left, values, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    for count in (1, 3):
        expected = left[:, :count] * values[:count] @ right[:count] + x.mean(0)
        torch.testing.assert_close(principal.replacement(count)(x), expected)


def test_bad_input():
    anatomy, data = Anatomy(tiny("llama")), text(count=1)
    more = {"count": 1, "batch": 4, "buffer": 8}
    with pytest.raises(TransectError, match="heads 9 does not exist"):
        Activations(anatomy, data, "heads", 9, **more)
    with pytest.raises(BadData, match="no token to train a dictionary on"):
        Activations(anatomy, Batches([]), "heads", 1, **more)
    with pytest.raises(BadData, match="first token of a sequence is left out"):
        Activations(anatomy, text(count=2, length=1), "heads", 1, **more)
    with pytest.raises(BadData, match="no token ids"):
        Activations(anatomy, Batches([{"pixel_values": torch.zeros(1, 3, 4, 4)}]), "heads", 1, **more)
    with pytest.raises(TransectError, match="a dictionary: expansion must be a whole number from 1"):
        replace(SHORT, expansion=0).checked()
    broken = Anatomy(tiny("llama"))
    broken.blocks[1].matrix("v").write(torch.full_like(broken.blocks[1].matrix("v").weight, torch.inf))
    with pytest.raises(TransectError, match="heads 1 of the model holds NaN or infinite"):
        Activations(broken, data, "heads", 1, **more)[0]
    huge = replace(SHORT, lr=1e30)
    with pytest.raises(Diverged, match="dictionary: the loss is not finite"):
        train_dictionary(Activations(anatomy, text(), "heads", 1, count=32, batch=32, buffer=64), huge)
