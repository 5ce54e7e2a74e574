from itertools import pairwise

import pytest
import torch

from tests.models import CAUSAL, VOCABULARY, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.claims import Context, Verdict, claims
from transect.data import Batches, Specimen
from transect.errors import TransectError
from transect.forward import changed, watch
from transect.probes import drawings, run_probes
from transect.probes.catalog.lac.phases import ended, generated, halves_difference
from transect.probes.catalog.lac.void_losses import as_many
from transect.probes.catalog.lac.voids import Skipping, activity, last_active, norms_of, threshold

SMALL = {"lac": {"prompts": 6, "length": 12, "generate": 6}}


def specimen(name, dtype=torch.float64, length=24):
    return Specimen(Anatomy(tiny(name, dtype=dtype)), data=Batches([inputs(name, batch=6, length=length)]))


def tokens(sequences=3, length=20, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (sequences, length), generator=generator)


def states(one, ids):
    with torch.no_grad(), watch(one.anatomy, ["residual"]) as seen:
        out = one.model(ids, use_cache=False).logits
    return dict(seen.residual), out


def norms(layers=12, tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layers + 1, tokens, generator=generator, dtype=torch.float64).mul(5) + 1


def by_hand(lengths, alpha):
    """One token's activity, written out."""
    active, changes = [], []
    for before, after in pairwise(lengths):
        theta = alpha * (max(changes) - min(changes)) if changes else 0
        active.append(not after - before < theta)
        changes.append(after - before)
    return active


@pytest.mark.parametrize("name", CAUSAL)
def test_it_runs_on_every_architecture_and_leaves_no_trace(name):
    one = specimen(name, torch.float32)
    before = logits(one.model, inputs(name))
    inspection = run_probes(one, SMALL)
    assert not inspection.refused
    found = inspection["lac"]
    assert len(drawings(found)) == 4
    assert found.findings
    assert found["activity"].shape == (3, 3)
    assert bool(((found["agreement"] >= 0) & (found["agreement"] <= 1)).all())
    assert torch.equal(logits(one.model, inputs(name)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders_are_refused(name):
    assert "predict" in run_probes(specimen(name, torch.float32), SMALL).refused["lac"]


def test_bad_settings_and_too_little_text_are_refused():
    for bad in ({"alpha": -0.1}, {"spread": "wide"}):
        with pytest.raises(TransectError, match=next(iter(bad))):
            run_probes(specimen("llama"), {"lac": bad})
    assert "8 tokens" in run_probes(specimen("llama", length=6), SMALL).refused["lac"]
    few = Specimen(Anatomy(tiny("llama")), data=Batches([inputs("llama", batch=2, length=24)]))
    assert "4 sequences" in run_probes(few, SMALL).refused["lac"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.5])
def test_activity_is_the_rule_written_out(alpha):
    lengths = norms()
    expected = [by_hand(column.tolist(), alpha) for column in lengths.T]
    assert activity(lengths, alpha).T.tolist() == expected


def test_rules_of_activity():
    lengths = norms()
    voids = [~activity(lengths, alpha) for alpha in (0.0, 0.2, 0.5, 0.8, 2.0)]
    assert torch.equal(voids[0], lengths.diff(dim=0) < 0)
    for fewer, more in pairwise(voids):
        assert bool((more | ~fewer).all())  # what is void stays void for a larger alpha
        assert torch.equal(more[:2], voids[0][:2])  # the first two layers are compared with 0
        assert int(more.sum()) > int(fewer.sum())
    for spread in ("range", "middle"):
        assert torch.equal(activity(4 * lengths, 0.5, spread), activity(lengths, 0.5, spread))
    still = torch.tensor([[1.0], [3.0], [4.0], [4.0]])  # the third layer is the identity
    assert activity(still, 0.1).flatten().tolist() == [True, True, False]
    assert activity(still, 0.0).flatten().tolist() == [True, True, True]
    changes = torch.tensor([[100.0], [1.0], [2.0], [1.5], [1.2], [1.1], [1.4], [1.3], [1.6], [1.7], [1.8]])
    assert threshold(changes, 1.0, "middle") < 2 < 98 < threshold(changes, 1.0, "range")


def test_at_alpha_0_only_shrinking_states_are_void_and_growing_ones_exit_at_the_end():
    lengths = norms()
    assert torch.equal(activity(lengths, 0.0), lengths.diff(dim=0) >= 0)
    one = specimen("gpt2")
    for block in one.anatomy.blocks:  # every layer adds the same long vector, and nothing else
        for matrix in (block.attention.o, block.mlp.down):
            matrix.write(torch.zeros_like(matrix.weight), torch.zeros_like(matrix.bias))
        block.mlp.down.module.bias.data[:] = 100 * torch.linspace(-1, 1, len(block.mlp.down.bias))
    found = run_probes(one, {"lac": {**SMALL["lac"], "alpha": 0.0}})["lac"]
    at = found.labels["alpha"].index("0")
    assert bool((found["active_share"][:, at] == 1).all())
    plain, exit_ = found["loss"][:2, at]
    assert float(exit_) == pytest.approx(float(plain), rel=1e-9)


def test_exit_reads_the_last_active_state():
    one, ids = specimen("llama"), tokens()
    seen, out = states(one, ids)
    active = torch.rand(3, *ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    state = last_active(seen, active)
    for row in range(3):
        for place in range(20):
            on = [layer + 1 for layer in range(3) if active[layer, row, place]]
            assert torch.equal(state[row, place], seen[max(on, default=0)][row, place])
    active[2] = True
    with torch.no_grad():
        torch.testing.assert_close(one.lens(last_active(seen, active)), out, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_skipping_written_out(name):
    """Block by block: a token's void layer gives back what it read, and the next block reads that."""
    one, ids = specimen(name), tokens()
    skipping = Skipping(3, 2.0)
    with changed(one.anatomy, skipping.changes):
        after, _ = states(one, ids)
    active = torch.stack(skipping.active)
    assert active.shape == (3, *ids.shape)
    assert not bool(active.all())
    for layer in range(3):
        kept = (after[layer + 1] == after[layer]).all(-1)
        assert torch.equal(kept, ~active[layer])
    fixed = Skipping(3, fixed=active)
    with changed(one.anatomy, fixed.changes):
        again, _ = states(one, ids)
    assert torch.equal(again[3], after[3])
    assert torch.equal(torch.stack(fixed.active), active)


def test_nothing_void_is_the_plain_model():
    one, ids = specimen("llama"), tokens()
    _, out = states(one, ids)
    everything = torch.ones(3, *ids.shape, dtype=torch.bool)
    with changed(one.anatomy, Skipping(3, fixed=everything).changes):
        torch.testing.assert_close(states(one, ids)[1], out, rtol=0, atol=0)


def test_skipping_does_not_depend_on_the_rest_of_the_batch():
    one, ids = specimen("llama"), tokens()
    whole, alone = Skipping(3, 0.5), Skipping(3, 0.5)
    with changed(one.anatomy, whole.changes):
        together = states(one, ids)[1]
    with changed(one.anatomy, alone.changes):
        single = states(one, ids[1:2])[1]
    torch.testing.assert_close(together[1:2], single, rtol=0, atol=1e-9)
    assert torch.equal(torch.stack(whole.active)[:, 1:2], torch.stack(alone.active))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generation_through_the_cache_sees_what_one_pass_sees(name):
    one, ids = specimen(name), tokens()
    written, lengths, counted = generated(one, ids[:, :12], 8)
    seen, out = states(one, torch.cat([ids[:, :12], written], 1))
    torch.testing.assert_close(lengths, norms_of(seen), rtol=1e-9, atol=1e-9)
    assert torch.equal(out[:, 11:-1].argmax(-1), written)
    assert counted.shape == written.shape


def test_nothing_counts_after_the_end_of_a_text():
    one = specimen("llama")
    end = one.model.config.eos_token_id
    row = torch.tensor([[5, 6, end, 7, 8], [5, 6, 7, 8, 9], [end, 5, end, 6, 7]])
    assert ended(one, row).tolist() == [[False, False, True, True, True], [False] * 5, [True] * 5]


def test_controls_skip_as_many_layers_of_each_token():
    active = torch.rand(6, 4, 9) < 0.6
    score = torch.rand(6, 4, 9)
    chosen = as_many(active, score)
    assert torch.equal((~chosen).sum(0), (~active).sum(0))
    lowest_void = score.masked_fill(chosen, 2).amin(0)
    highest_kept = score.masked_fill(~chosen, -1).amax(0)
    assert bool((lowest_void > highest_kept).all())


def test_halves_of_equal_texts_do_not_differ_and_of_different_ones_do():
    counts = torch.ones(8, 5, dtype=torch.bool)
    same = torch.ones(3, 8, 5, dtype=torch.bool)
    different = same.clone()
    different[:, :4] = False
    generator = torch.Generator().manual_seed(0)
    assert halves_difference(same, counts, generator) == 0
    assert 0.25 < halves_difference(different, counts, generator) <= 1


def test_numbers_of_the_probe():
    one = specimen("llama")
    found = run_probes(one, SMALL)["lac"]
    ids = next(iter(one.data))["input_ids"][:, :18]
    seen, out = states(one, ids)
    step = norms_of(seen).diff(dim=0)
    on = (step >= 0)[..., 1:].float()
    executed = Skipping(3, 0.8)
    with changed(one.anatomy, executed.changes):
        states(one, ids)
    at = found.labels["alpha"].index("0.8")
    assert found["executed"][at].item() == pytest.approx(torch.stack(executed.active)[..., 1:].float().mean().item())
    loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert found["loss"][0].tolist() == pytest.approx([loss] * 4)
    assert found["loss"][1, 3] != pytest.approx(loss)
    text = activity(norms_of(seen), 0.0)[..., 12:].float().mean()
    assert found["active_share"][2, 0].item() == pytest.approx(text.item())
    assert found["active_share"][0, 0].item() == pytest.approx(on[..., :11].mean().item())


def test_the_claim_compares_phases_with_halves():
    model = tiny("llama")
    text = Batches([inputs("llama", batch=8, length=40)])
    result = claims(["lac/phases"])[0].function(Context(model, text, text))
    row = next(row for row in result.numbers if row["alpha"] == 0.8)
    clear = row["prompt and generated"] > max(row["halves of prompts"], row["halves of generated"])
    assert result.verdict == (Verdict.of(clear))
    assert [row["alpha"] for row in result.numbers] == [0.0, 0.2, 0.5, 0.8]
