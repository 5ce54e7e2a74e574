import pytest
import torch

from tests.models import CAUSAL, CONFIGS, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.claims import Context, Verdict, claims, run_claims
from transect.claims.catalog.lazy_neuron import lazy_training as study
from transect.claims.catalog.lazy_neuron import relu_classifier as own
from transect.data import Batches, Specimen
from transect.errors import TransectError
from transect.evaluation import evaluate_loss
from transect.forward import changed, watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.lazy_neuron.activity import mass_counts, rectifies
from transect.probes.catalog.lazy_neuron.topk import gathered, largest, top_k

WANTED = {"lazy-neuron": {}}


def batches(name, count=2, **more):
    made = [inputs(name, seed=seed, **more) for seed in range(count)]
    if CONFIGS[name][1].__name__.endswith("MaskedLM"):
        made = [batch | {"labels": batch["input_ids"]} for batch in made]
    return Batches(made)


def specimen(name, dtype=torch.float32, **more):
    return Specimen(Anatomy(tiny(name, dtype=dtype)), data=batches(name, **more))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", [*CAUSAL, "bert", "vit"])
def test_it_runs_on_every_architecture_and_leaves_no_trace(name):
    one = specimen(name)
    before = logits(one.model, inputs(name))
    inspection = run_probes(one, WANTED)
    assert not inspection.refused
    found = inspection["lazy-neuron"]
    assert len(drawings(found)) == 4
    assert len(found.findings) == (3 if name == "opt" else 4)
    assert bool(found["sharp"]) == (name == "opt")
    assert found["loss"][0].item() == pytest.approx(evaluate_loss(one.model, one.data).loss, rel=1e-6)
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


def test_density_rates_and_places_by_direct_count():
    one = specimen("opt", torch.float64, count=3)
    found = run_probes(one, WANTED)["lazy-neuron"]
    active = []
    for batch in one.data:
        with torch.no_grad(), watch(one.anatomy, ["up"]) as seen:
            one.model(**batch)
        active.append(torch.stack([seen.up[layer].reshape(2, 12, -1) > 0 for layer in range(3)]))
    whole = torch.cat(active, 1).double()  # L x sequences x T x n
    torch.testing.assert_close(found["density"][0], whole.mean((1, 2, 3)).float())
    torch.testing.assert_close(found["rate"], whole.mean((1, 2)))
    torch.testing.assert_close(found["dead"], (whole.sum((1, 2)) == 0).float().mean(1))
    places = whole.mean((1, 3))
    expected = [places[:, 0], places[:, 1], places[:, 2:4].mean(1), places[:, 4:8].mean(1), places[:, 8:].mean(1)]
    torch.testing.assert_close(found["by_place"], torch.stack(expected, 1).float())
    counts = whole.sum(-1).flatten(1).sort(1).values
    assert found["natural"].tolist() == counts[:, -1].long().tolist()  # of 72 tokens, 99 % are all
    assert found.label("place", 5) == ["0", "1", "2-3", "4-7", "8-15"]


def test_density_does_not_depend_on_the_batches():
    one = specimen("llama", torch.float64, count=1, batch=4)
    rows = next(iter(one.data))["input_ids"]
    split = Specimen(one.anatomy, data=Batches([{"input_ids": rows[:1]}, {"input_ids": rows[1:]}]))
    whole, parts = (run_probes(each, WANTED)["lazy-neuron"] for each in (one, split))
    for name in ("density", "rate", "by_place", "dead"):
        torch.testing.assert_close(whole[name], parts[name])


def test_padding_does_not_count():
    one = specimen("llama", torch.float64, count=1, batch=2)
    ids = next(iter(one.data))["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    padded = Specimen(one.anatomy, data=Batches([{"input_ids": ids, "attention_mask": mask}]))
    cut = Specimen(one.anatomy, data=Batches([{"input_ids": ids[:, :8]}]))
    first, second = (run_probes(each, WANTED)["lazy-neuron"] for each in (padded, cut))
    for name in ("density", "rate", "by_place", "natural"):
        torch.testing.assert_close(first[name], second[name])


def test_half_of_the_units_fire_at_a_random_start():
    weight, x = random(512, 64), random(400, 64, seed=1)
    assert (torch.relu(x @ weight.T) > 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    model = tiny("opt", dtype=torch.float64)
    for block in Anatomy(model).blocks:
        block.mlp.up.write(random(*block.mlp.up.shape, seed=block.index), torch.zeros(block.mlp.neurons))
    one = Specimen(Anatomy(model), data=batches("opt", batch=64, length=32))
    assert run_probes(one, WANTED)["lazy-neuron"]["density"][0].mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_planted_dead_neuron_is_found():
    one = specimen("opt")
    up = one.anatomy.blocks[1].mlp.up
    bias = up.bias.clone()
    bias[7] = -1e4
    up.write(up.weight.clone(), bias)
    found = run_probes(one, WANTED)["lazy-neuron"]
    assert found["rate"][1, 7] == 0
    assert found["dead"][1] >= 1 / 48


def test_which_activation_functions_give_exact_zeros():
    anatomy = Anatomy(tiny("opt"))
    assert rectifies(anatomy.blocks[0])
    assert not rectifies(Anatomy(tiny("gpt2")).blocks[0])
    assert not rectifies(Anatomy(tiny("llama")).blocks[0])


def test_mass_counts():
    sizes = torch.tensor([[94.0, 4.0, 1.0, 1.0], [25.0, 25.0, 25.0, 25.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    assert mass_counts(sizes).tolist() == [2, 4, 0, 1]


def test_a_dropped_mlp_is_left_out():
    one = specimen("llama")
    one.anatomy.blocks[1].mlp.drop()
    found = run_probes(one, WANTED)["lazy-neuron"]
    assert found.labels["layer"] == ["0", "2"]
    for block in one.anatomy.blocks:
        if block.mlp is not None:
            block.mlp.drop()
    assert "dropped" in run_probes(one, WANTED).refused["lazy-neuron"]


def test_bad_settings():
    with pytest.raises(TransectError, match="share"):
        run_probes(specimen("llama"), {"lazy-neuron": {"share": 2}})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_top_k_keeps_the_largest(dtype):
    a = torch.relu(random(5, 7, 40)).to(dtype)
    assert torch.equal(top_k(a, 40), a)
    assert torch.equal(top_k(a, 100), a)
    enough = int((a > 0).sum(-1).max())
    assert enough < 40
    assert torch.equal(top_k(a, enough), a)
    for k in (1, 3, 10):
        kept = top_k(a, k)
        assert int((kept != 0).sum(-1).max()) <= k
        assert torch.equal(top_k(kept, k), kept)
        assert torch.equal(top_k(4 * a, k), 4 * kept)
        left = a.masked_fill(kept != 0, 0)
        assert bool((kept.sort(-1).values[..., -k:].amin(-1) >= left.amax(-1)).all())
    with pytest.raises(TransectError, match="k=0"):
        top_k(a, 0)


def test_top_k_goes_with_a_permutation_and_breaks_ties():
    a, order = torch.relu(random(30, 40)), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_k(a[:, order], 6), top_k(a, 6)[:, order])
    assert (top_k(torch.ones(3, 9, dtype=torch.bfloat16), 4) != 0).sum(-1).tolist() == [4, 4, 4]


def test_top_k_by_magnitude():
    a = torch.tensor([[-3.0, 1.0, 2.0, -0.5]])
    assert top_k(a, 2).tolist() == [[0, 1, 2, 0]]
    assert top_k(a, 2, magnitude=True).tolist() == [[-3, 0, 2, 0]]
    positive = torch.relu(random(6, 20))
    assert torch.equal(top_k(positive, 5), top_k(positive, 5, magnitude=True))


def test_gradients_reach_the_kept_entries_alone():
    a, upstream = random(6, 20), random(6, 20, seed=1)
    sparse, dense = a.clone().requires_grad_(True), a.clone().requires_grad_(True)
    (top_k(sparse, 4) * upstream).sum().backward()
    (dense * upstream).sum().backward()
    kept = top_k(a, 4) != 0
    assert torch.equal(sparse.grad[kept], dense.grad[kept])
    assert sparse.grad[~kept].abs().max() == 0


def test_the_sparse_product_is_the_dense_one():
    weight, a = random(9, 40), random(2, 5, 40, seed=1)
    torch.testing.assert_close(gathered(weight, *largest(a, 8)), top_k(a, 8) @ weight.T, rtol=0, atol=1e-12)


def test_a_change_to_the_largest_reaches_the_model():
    one = specimen("opt", torch.float64)
    batch = next(iter(one.data))
    changes = {("neurons", layer): lambda a: top_k(a, 2, magnitude=True) for layer in range(3)}
    with torch.no_grad(), changed(one.anatomy, changes), watch(one.anatomy, ["neurons"]) as seen:
        one.model(**batch)
    assert all(int((a != 0).sum(-1).max()) == 2 for a in seen.neurons.values())


@pytest.mark.parametrize(("squared", "sign"), [(False, 1), (True, 1), (False, -1)])
def test_the_first_gradients_lower_active_units_whatever_the_labels(squared, sign):
    """Why sparsity emerges: at a random start the mean gradient on active units is positive."""
    means = []
    for draw in range(40):
        a = torch.relu(random(64, 256, seed=draw)).requires_grad_(True)
        logits = top_k(a, 256) @ random(10, 256, seed=1000 + draw).T / 16
        labels = torch.randint(0, 10, (64,), generator=torch.Generator().manual_seed(draw))
        if squared:
            loss = (logits - torch.nn.functional.one_hot(labels, 10)).square().sum()
        else:
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (sign * loss).backward()
        means.append(a.grad[a > 0].mean().item())
    assert sign * sum(means) / len(means) > 0
    assert sum(sign * mean > 0 for mean in means) >= 38


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_claims_compare_with_an_untrained_model(name):
    model = tiny(name)
    text = batches(name, batch=8, length=32)
    context = Context(model, text, text)
    result, alive = (one.function(context) for one in claims(["lazy-neuron/training", "lazy-neuron/alive"]))
    fewer = all(row["active"] < min(0.5, row["active before training"]) for row in result.numbers)
    mass = all(row["95 % of the sum"] < row["95 % of the sum before training"] for row in result.numbers)
    fewer &= name == "opt" or mass
    assert result.verdict == (Verdict.of(fewer))
    assert ("extension" in result.explanation) == (name == "llama")
    healthy = all(row["never active"] < 0.05 and row["median share of tokens"] < 0.5 for row in alive.numbers)
    assert alive.verdict == (Verdict.of(healthy))


def test_a_classifier_with_all_of_its_neurons_is_an_ordinary_one():
    training, test = own.mixture(0)
    dense, whole, few = (own.untrained(24, 0, k) for k in (None, 24, 3))
    assert torch.equal(dense(test.inputs), whole(test.inputs))
    found = few.traced(test.inputs)[1]
    assert max(int((activations > 0).sum(-1).max()) for activations in found) == 3
    first = torch.relu(dense.ups[0](dense.norms[0](dense.read(test.inputs))))
    assert torch.equal(found[0], top_k(first, 3))
    share = own.densities(dense, test)
    assert float(share[0]) == pytest.approx(float((first > 0).double().mean()))
    assert float(share.mean()) == pytest.approx(0.5, abs=0.15)
    assert torch.equal(own.mixture(0)[0].inputs, training.inputs)


def test_label_noise_changes_the_share_it_should_and_nothing_else():
    clean, test = own.mixture(0)
    noisy, again = own.mixture(0, 0.4)
    assert torch.equal(clean.inputs, noisy.inputs) and torch.equal(test.labels, again.labels)
    changed_share = float((clean.labels != noisy.labels).double().mean())
    assert changed_share == pytest.approx(0.4 * 0.9, abs=0.03)  # a tenth is drawn as it was
    assert float((own.mixture(0, 1.0)[0].labels == clean.labels).double().mean()) == pytest.approx(0.1, abs=0.03)


def test_calibration_error_by_hand():
    confidence, right = torch.tensor([0.95, 0.97, 0.55, 0.56, 1.0]), torch.tensor([True, False, True, True, True])
    last = abs((0.95 + 0.97 + 1.0) - 2)  # 0.933 to 1 is one bin, 0.533 to 0.6 another
    assert own.binned_error(confidence, right) == pytest.approx((last + abs(0.55 + 0.56 - 2)) / 5, rel=1e-6)


def test_training_is_repeatable_and_learns(monkeypatch):
    monkeypatch.setattr(own, "STEPS", 60)
    training, _ = own.mixture(0)
    state = torch.random.get_rng_state()
    one, again = (own.trained(32, 0, training, k=8) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state) and not one.training
    assert torch.equal(one.head.weight, again.head.weight)
    assert own.accuracy(one, training) > own.accuracy(own.untrained(32, 0, k=8), training) + 0.2


def test_claims_about_training_say_what_their_numbers_say(monkeypatch):
    monkeypatch.setattr(own, "STEPS", 5)
    for name, value in {"SEEDS": (0,), "WIDTHS": (16, 32), "NEURONS": 32}.items():
        monkeypatch.setattr(study, name, value)
    text = batches("llama")
    names = ["lazy-neuron/width", "lazy-neuron/labels", "lazy-neuron/top-k"]
    width, labels, sparse = (one.result for one in run_claims(tiny("llama"), None, text, names))
    narrow, wide = width.numbers
    judged = wide["active"] < narrow["active"] and wide["active neurons"] > narrow["active neurons"]
    assert width.verdict == (Verdict.of(judged))
    drawn = [row for row in labels.numbers if row["labels"] == "random"]
    judged = all(row["active"] < min(0.5, row["active before training"]) for row in drawn)
    assert len(drawn) == 2 and labels.verdict == (Verdict.of(judged))
    dense, few, dense_noisy, few_noisy = sparse.numbers
    assert [row["label noise"] for row in sparse.numbers] == [0, 0, 0.4, 0.4] and few["neurons"] != dense["neurons"]
    judged = few["accuracy"] >= dense["accuracy"] - 0.01 and few_noisy["accuracy"] > dense_noisy["accuracy"]
    judged &= few["ECE"] <= dense["ECE"]
    assert sparse.verdict == (Verdict.of(judged))
    assert all("not about the model under study" in one.explanation for one in (width, labels, sparse))
