"""The curvature of the loss in a matrix (K-FAC): factors, eigenbases, pairs, and how inputs load on the bands."""

import math

import pytest
import torch

from transect.anatomy import Anatomy
from transect.claims import Verdict, run_claims
from transect.data import Batches, Specimen
from transect.errors import NotApplicable, TransectError
from transect.probes import drawings, run_probes
from transect.probes.catalog.kfac_spectrum import band_loads
from transect.probes.curvature import counted_positions, curvature, eigenpairs, kept_pairs

from .models import CAUSAL, CONFIGS, inputs, logits, tiny


def specimen_of(name, count=3, length=12):
    model = tiny(name, dtype=torch.float64)
    batches = [inputs(name, batch=2, length=length, seed=seed, dtype=torch.float64) for seed in range(count)]
    return Specimen(Anatomy(model), data=Batches(batches))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(size, seed):
    """A covariance whose eigenvalues fall off fast."""
    basis = torch.linalg.qr(random(size, size, seed=seed)).Q
    return basis * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3) @ basis.T


def test_factors_against_gradients_position_by_position():
    """In the last block's down projection no position reaches another, so each has a gradient of its own."""
    specimen = specimen_of("llama", count=2)
    matrix = specimen.anatomy.blocks[-1].matrix("down")
    found = curvature(specimen, [matrix])[matrix.name]
    generator = torch.Generator().manual_seed(specimen.seed)
    a, g, count = torch.zeros(48, 48, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64), 0
    for batch in specimen.text:
        kept = {}
        handle = matrix.module.register_forward_hook(lambda m, x, y, kept=kept: kept.update(x=x[0], y=y))
        logit = specimen.model(**batch).logits[:, :-1]
        handle.remove()
        flat = logit.reshape(-1, logit.shape[-1])
        drawn = torch.multinomial(flat.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(flat, drawn, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept["y"])
        for x, dy in zip(kept["x"].detach()[:, :-1].flatten(0, 1), gradient[:, :-1].flatten(0, 1), strict=True):
            a += torch.outer(x, x)
            g += torch.outer(dy, dy)
            count += 1
    assert found.positions == count == 2 * 2 * 11
    torch.testing.assert_close(found.vectors_in * found.values_in @ found.vectors_in.T, a / count)
    # Absent positions would only scale G; its scale is the mean over those that predict.
    torch.testing.assert_close(found.vectors_out * found.values_out @ found.vectors_out.T, g / count)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_architecture(name):
    specimen = specimen_of(name)
    before = logits(specimen.model, next(iter(specimen.text)))
    result = run_probes(specimen, {"kfac-spectrum": {"part": "all"}})["kfac-spectrum"]
    matrices = specimen.anatomy.matrices()
    assert result.labels["matrix"] == [matrix.name for matrix in matrices]
    assert torch.equal(logits(specimen.model, next(iter(specimen.text))), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in specimen.model.modules())
    assert (result["mass"].diff(dim=1) >= -1e-12).all()
    torch.testing.assert_close(result["mass"][:, -1], torch.ones(len(matrices), dtype=torch.float64))
    assert (result["pairs"].diff(dim=1) >= 0).all() and (result["pairs"] > 0).all()
    for number, matrix in enumerate(matrices):
        d_out, d_in = matrix.shape
        assert int(result["values_in"][number].isfinite().sum()) == d_in
        assert int(result["values_out"][number].isfinite().sum()) == d_out
    assert "activation_ratio" not in result.quantities and len(drawings(result)) == 3


def test_padding_and_the_last_position_do_not_count():
    specimen = specimen_of("llama")
    ids = inputs("llama", batch=2, length=10)["input_ids"]
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    counted = counted_positions(specimen.anatomy, {"input_ids": ids, "attention_mask": mask})
    assert counted is not None and counted.sum(1).tolist() == [9, 5]
    left = counted_positions(specimen.anatomy, {"input_ids": ids, "attention_mask": mask.flip(1)})
    assert left is not None and left[1].tolist() == [False] * 4 + [True] * 5 + [False]
    matrices = specimen.anatomy.matrices(["up"])
    padded = curvature(specimen, matrices, [{"input_ids": ids, "attention_mask": mask}])
    apart = curvature(specimen, matrices, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :6]}])
    for matrix in matrices:
        torch.testing.assert_close(padded[matrix.name].values_in, apart[matrix.name].values_in)
        assert padded[matrix.name].positions == 14


def test_the_bases_rebuild_the_matrix():
    specimen = specimen_of("gpt2")
    for matrix in specimen.anatomy.matrices():
        found = curvature(specimen, [matrix])[matrix.name]
        torch.testing.assert_close(found.matrix(found.coefficients(matrix.weight)), matrix.weight)
        for values, vectors in ((found.values_in, found.vectors_in), (found.values_out, found.vectors_out)):
            assert (values.diff() <= 0).all() and (values >= 0).all()
            torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64))
        if matrix.block.index:
            break


def test_the_fewest_pairs_that_hold_the_share():
    values_out, values_in = (eigenpairs(factor(size, size))[0] for size in (7, 11))
    products = values_out[:, None] * values_in
    total, previous = products.sum(), None
    for share in (0.05, 0.3, 0.6, 0.9, 0.99, 1.0):
        kept = kept_pairs(values_out, values_in, share)
        mass = products[kept].sum()
        assert mass >= share * total * (1 - 1e-12)
        assert share == 1 or mass - products[kept].min() < share * total
        if share < 1:
            assert products[kept].min() >= products[~kept].max()
        assert previous is None or (kept | ~previous).all()  # nested
        previous = kept
    assert previous is not None and previous.all()
    assert torch.equal(kept_pairs(9 * values_out, 0.01 * values_in, 0.6), kept_pairs(values_out, values_in, 0.6))


def test_damage_is_the_mass_that_was_cut():
    """tr(G D A Dᵀ) = Σ λ_i μ_j C_ij² of the pairs that go; W shrinks, twice is once, bases carry over."""
    g, a, w = factor(6, 1), factor(9, 2), random(6, 9)

    def cut(w, g, a):
        (lam, u), (mu, v) = eigenpairs(g), eigenpairs(a)
        coefficients, kept = u.T @ w @ v, kept_pairs(lam, mu, 0.7)
        lost = (lam[:, None] * mu * coefficients.square())[~kept].sum()
        return u @ (coefficients * kept) @ v.T, lost

    new, lost = cut(w, g, a)
    difference = new - w
    assert torch.trace(g @ difference @ a @ difference.T).item() == pytest.approx(lost.item(), rel=1e-10)
    assert new.norm() <= w.norm()
    torch.testing.assert_close(cut(new, g, a)[0], new)
    q, r = (torch.linalg.qr(random(size, size, seed=7)).Q for size in (6, 9))
    torch.testing.assert_close(cut(q @ w @ r.T, q @ g @ q.T, r @ a @ r.T)[0], q @ new @ r.T)
    torch.testing.assert_close(cut(w, 5 * g, 0.1 * a)[0], new)


def test_bad_pairs_and_factors():
    one = torch.ones(3)
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(TransectError, match="share of curvature mass"):
            kept_pairs(one, one, share)
    for bad in (torch.zeros(3), -one, torch.tensor([1.0, math.nan, 1.0])):
        with pytest.raises(TransectError, match="eigenvalues"):
            kept_pairs(one, bad, 0.5)
    with pytest.raises(TransectError, match="zero or not finite"):
        eigenpairs(torch.zeros(3, 3))


def test_bands_share_out_the_inputs():
    specimen = specimen_of("opt")  # whose MLP sees batch and positions as one
    inputs_ = {matrix.source: matrix for matrix in specimen.anatomy.matrices()}
    bases = {source: torch.linalg.qr(random(m.shape[1], m.shape[1])).Q for source, m in inputs_.items()}
    lengths, squares = band_loads(specimen, inputs_, bases, list(specimen.text))
    torch.testing.assert_close(squares.sum(1), torch.ones(len(inputs_), dtype=torch.float64))
    matrix = specimen.anatomy.blocks[1].matrix("up")
    kept = []
    handle = matrix.module.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    for batch in specimen.text:
        logits(specimen.model, batch)
    handle.remove()
    x = torch.cat([rows.reshape(2, 12, 32)[:, :-1].flatten(0, 1) for rows in kept]) @ bases[matrix.source]
    row = list(inputs_).index(matrix.source)
    ends = (0, 3, 8, 16, 32)
    for band in range(4):
        part = x[:, ends[band] : ends[band + 1]]
        assert float(lengths[row, band]) == pytest.approx(float(part.norm(dim=1).mean()))
        assert float(squares[row, band]) == pytest.approx(float(part.square().sum() / x.square().sum()))


def test_passages_are_compared_with_sequences_that_the_bases_have_not_seen():
    from transect.checkpoint import open_model
    from transect.data import load, load_passages

    opened = open_model("organism", dtype="float32")
    text = load("organism:heldout", opened.model, opened.tokenizer, sequences=8, sequence_length=32)
    passages = load_passages("organism:passages")[:4]
    specimen = Specimen(Anatomy(opened.model), opened.tokenizer, text, known_passages=passages)
    result = run_probes(specimen, {"kfac-spectrum": {}})["kfac-spectrum"]
    assert result["activation_ratio"].shape == (8, 4) and (result["activation_ratio"] > 0).all()
    torch.testing.assert_close(result["load_text"].sum(1), torch.ones(8, dtype=torch.float64))
    assert result.labels["input"][0] == "blocks.0.mlp.input" and len(drawings(result)) == 4
    assert any("bottom 50 %" in finding for finding in result.findings)
    # The bases come from the even sequences alone.
    even = [{"input_ids": ids[None]} for batch in text for ids in batch["input_ids"]][::2]
    down = specimen.anatomy.blocks[0].matrix("down")
    alone = curvature(specimen, [down], even)[down.name]
    number = result.labels["matrix"].index(down.name)
    torch.testing.assert_close(
        result["values_in"][number][: len(alone.values_in)], alone.values_in, rtol=1e-4, atol=1e-5
    )
    single = Specimen(Anatomy(opened.model), opened.tokenizer, Batches([even[0]]), known_passages=passages)
    result = run_probes(single, {"kfac-spectrum": {}})["kfac-spectrum"]
    assert "activation_ratio" not in result.quantities
    assert any("one sequence" in caveat for caveat in result.caveats)
    assert any("fewer than" in caveat for caveat in result.caveats)


def test_the_claim_needs_passages_and_text_to_compare_them_with():
    model = tiny("llama")
    text = Batches([inputs("llama", batch=4)])
    (outcome,) = run_claims(model, text, text, ["kfac-spectrum"])
    assert outcome.result.verdict is Verdict.NOT_APPLICABLE and "passages" in outcome.result.explanation


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CAUSAL])
def test_encoders_need_labels(name):
    specimen = specimen_of(name)
    if "labels" not in next(iter(specimen.text)):
        assert "labels" in run_probes(specimen, {"kfac-spectrum": {}}).refused["kfac-spectrum"]
        batches = [batch | {"labels": batch["input_ids"]} for batch in specimen.text]
        specimen = Specimen(specimen.anatomy, data=Batches(batches))
    result = run_probes(specimen, {"kfac-spectrum": {}})["kfac-spectrum"]
    assert (result["pairs"] > 0).all()


def test_nothing_to_learn_from():
    specimen = specimen_of("llama")
    assert "text" in run_probes(Specimen(specimen.anatomy), {"kfac-spectrum": {}}).refused["kfac-spectrum"]
    up = specimen.anatomy.matrices(["up"])
    with pytest.raises(TransectError, match="at least two tokens"):
        curvature(specimen, up, [{"input_ids": torch.tensor([[4]])}])
    with pytest.raises(NotApplicable, match="labels"):
        curvature(specimen_of("bert"), up)
    with torch.no_grad():
        up[0].module.weight.fill_(torch.inf)
    with pytest.raises(TransectError, match="not finite"):
        curvature(specimen, up)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in specimen.model.modules())
