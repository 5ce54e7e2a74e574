"""Channels between heads: scores against dense matrices, planted channels, and what can be done to a component."""

import math
from dataclasses import replace

import pytest
import torch

from tests.models import CAUSAL, inputs, logits, tiny
from transect import Anatomy
from transect.data import Specimen
from transect.errors import NotApplicable
from transect.forward import changed
from transect.forward.lens import norm_gain
from transect.probes import drawings, run_probes
from transect.probes.catalog.talking_heads.channels import composition, heads_of, scaled_component, set_component


def dense(anatomy, block, head):
    """W_OV and W_QK (d x d) of a head, by the definitions."""
    attention, size = block.attention, block.head_size
    shared = attention.heads // attention.key_value_heads
    mine = slice(head * size, (head + 1) * size)
    theirs = slice(head // shared * size, (head // shared + 1) * size)
    norm = block.norms.get("attention_input")
    fold = torch.diag(norm_gain(norm).double()) if norm is not None else torch.eye(attention.q.shape[1])
    centre = torch.eye(len(fold), dtype=torch.float64)
    if isinstance(norm, torch.nn.LayerNorm):
        centre -= 1 / len(fold)
    q, k, v = (matrix.weight.double() @ fold @ centre for matrix in (attention.q, attention.k, attention.v))
    o = centre @ attention.o.weight.double()
    return o[:, mine] @ v[theirs], q[mine].T @ k[theirs]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mistral"])
def test_factored_scores_are_the_dense_ones(name):
    anatomy = Anatomy(tiny(name, dtype=torch.float64))
    early, late = anatomy.blocks[0], anatomy.blocks[2]
    writer, reader = heads_of(anatomy, early), heads_of(anatomy, late)
    whole, components = composition(writer, reader)
    assert whole.shape == (3, 4, 4) and components.shape == (3, 4, 8, 4)
    for a in range(4):
        w_ov, _ = dense(anatomy, early, a)
        left, sizes, _ = torch.linalg.svd(w_ov)
        torch.testing.assert_close(writer.sizes[a], sizes[:8])
        for b in range(4):
            later_ov, later_qk = dense(anatomy, late, b)
            for kind, m in enumerate((later_qk.T, later_qk, later_ov)):
                expected = (m @ w_ov).norm() / (m.norm() * w_ov.norm())
                torch.testing.assert_close(whole[kind, a, b], expected, rtol=1e-7, atol=1e-9)
                torch.testing.assert_close(
                    components[kind, a, :, b], (m @ left[:, :8]).norm(dim=0) / m.norm(), rtol=1e-6, atol=1e-8
                )
    assert (components >= 0).all() and (components <= 1 + 1e-12).all()
    weights = writer.sizes.square() / writer.sizes.square().sum(-1, keepdim=True)
    summed = (components.square() * weights[None, :, :, None]).sum(2).sqrt()
    torch.testing.assert_close(summed, whole)  # the Pythagorean identity


def test_scores_know_no_scale_no_basis_inside_a_head_and_no_sign():
    anatomy = Anatomy(tiny("gpt2", dtype=torch.float64))
    early, late = anatomy.blocks[0], anatomy.blocks[1]
    before = composition(heads_of(anatomy, early), heads_of(anatomy, late))
    size, turn = 8, torch.randn(8, 8, dtype=torch.float64)
    v, o = early.attention.v.weight.clone(), early.attention.o.weight.clone()
    v[:size], o[:, :size] = turn @ v[:size], o[:, :size] @ torch.linalg.inv(turn)
    early.attention.v.write(-3 * v)
    early.attention.o.write(o)
    late.attention.q.write(0.1 * late.attention.q.weight)
    after = composition(heads_of(anatomy, early), heads_of(anatomy, late))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_scores_know_no_basis_of_the_stream_of_queries_and_keys_and_no_signs():
    anatomy = Anatomy(tiny("llama", dtype=torch.float64))
    early, late = anatomy.blocks[0], anatomy.blocks[1]
    for block in (early, late):
        torch.nn.init.ones_(block.norms["attention_input"].weight)
    writer, reader = heads_of(anatomy, early), heads_of(anatomy, late)
    before = composition(writer, reader)
    flipped = replace(writer, directions=-writer.directions, mix=-writer.mix)
    for one, other in zip(before, composition(flipped, reader), strict=True):
        assert torch.equal(one, other)
    z = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(
        scaled_component(flipped, 1, 2, 0.5)(z), scaled_component(writer, 1, 2, 0.5)(z), rtol=1e-9, atol=1e-12
    )
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    inside = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    for block in (early, late):
        attention = block.attention
        for matrix in (attention.q, attention.k, attention.v):
            matrix.write(matrix.weight @ turn.T)
        attention.o.write(turn @ attention.o.weight)
    q, k = late.attention.q.weight.clone(), late.attention.k.weight.clone()
    q[:16] = (inside @ q[:16].unflatten(0, (2, 8))).flatten(0, 1)  # the two heads that share the first keys
    k[:8] = torch.linalg.inv(inside).T @ k[:8]
    late.attention.q.write(q)
    late.attention.k.write(k)
    for one, other in zip(before, composition(heads_of(anatomy, early), heads_of(anatomy, late)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_all_its_components_a_head_writes_nothing_and_its_own_value_changes_nothing(name):
    anatomy = Anatomy(tiny(name, dtype=torch.float64))
    block = anatomy.blocks[1]
    made, o = heads_of(anatomy, block), block.attention.o
    before = o.bias.clone() if o.bias is not None else None
    z = torch.randn(1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest = z
    for component in range(8):
        rest = scaled_component(made, 2, component, 0.0)(rest)
    torch.testing.assert_close(rest[:, 16:24], torch.zeros(1, 8, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.equal(rest[:, :16], z[:, :16]) and torch.equal(rest[:, 24:], z[:, 24:])
    assert before is None or torch.equal(o.bias, before)
    written = o.weight[:, 16:24] @ z[0, 16:24]
    if name == "gpt2":
        written = written - written.mean()  # LayerNorm reads the stream without its mean
    own = float(made.directions[2][:, 3] @ written)
    torch.testing.assert_close(set_component(made, 2, 3, own)(z), z, rtol=1e-9, atol=1e-9)


def test_random_heads_score_as_chance_does():
    torch.manual_seed(0)
    anatomy = Anatomy(tiny("llama", dtype=torch.float64))
    for block in anatomy.blocks:
        for matrix in (block.attention.q, block.attention.k, block.attention.v, block.attention.o):
            matrix.write(torch.randn(matrix.shape, dtype=torch.float64))
    scores = [
        composition(heads_of(anatomy, anatomy.blocks[a]), heads_of(anatomy, anatomy.blocks[b]))[1]
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert torch.stack(scores).mean().item() == pytest.approx(1 / math.sqrt(32), rel=0.1)


def test_a_planted_channel_is_found_and_only_later_heads_read():
    model = tiny("llama", dtype=torch.float64)
    anatomy = Anatomy(model)
    writer, reader = anatomy.blocks[0].attention, anatomy.blocks[2].attention
    u = torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)
    o, q = writer.o.weight.clone(), reader.q.weight.clone()
    o[:, 8:16] = torch.outer(u, o[:, 8:16].norm(dim=0)) + 1e-3 * o[:, 8:16]
    gain = norm_gain(anatomy.blocks[2].norms["attention_input"]).double()
    q[24:32] = torch.outer(q[24:32].norm(dim=1), u / gain) + 1e-3 * q[24:32]
    writer.o.write(o)
    reader.q.write(q)
    result = run_probes(Specimen(anatomy), {"talking-heads": {"tested": 0}})["talking-heads"]
    assert result.labels["channel"][0] == "0.1 [0] -> 2.3 (query)"
    heads = result["heads"]
    assert int(heads.flatten().argmax()) == 0 * 144 + 1 * 12 + 11
    assert not heads[:, 4:, :4].any() and not heads[:, :4, :4].any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_removing_scaling_and_setting_a_component(name):
    model = tiny(name, dtype=torch.float64)
    anatomy, batch = Anatomy(model), inputs(name)
    made, before = heads_of(anatomy, anatomy.blocks[1]), logits(model, batch)

    def after(change):
        with changed(anatomy, {("heads", 1): change}):
            return logits(model, batch)

    torch.testing.assert_close(after(scaled_component(made, 2, 3, 1.0)), before)
    removed = after(scaled_component(made, 2, 3, 0.0))
    assert not torch.allclose(removed, before)
    torch.testing.assert_close(after(set_component(made, 2, 3, 0.0)), removed)
    o, u = anatomy.blocks[1].attention.o, made.directions[2][:, 3]
    weight = o.weight.clone()
    mine = slice(16, 24)
    if name == "llama":  # with LayerNorm, u is a direction of the centred weights
        edited = weight.clone()
        edited[:, mine] -= torch.outer(u, u @ weight[:, mine])
        o.write(edited)
        torch.testing.assert_close(logits(model, batch), removed)
        o.write(weight)
    heads = torch.randn(2, 5, weight.shape[1], dtype=torch.float64)
    changed_heads = set_component(made, 2, 3, 1.5)(heads)
    written = (changed_heads - heads)[..., mine] @ weight[:, mine].T
    if name == "llama":
        torch.testing.assert_close(changed_heads[..., mine] @ weight[:, mine].T @ u, torch.full((2, 5), 1.5).double())
        torch.testing.assert_close(written - (written @ u)[..., None] * u, torch.zeros_like(written), atol=1e-9, rtol=0)
    assert torch.equal(changed_heads[..., 24:], heads[..., 24:])


@pytest.mark.parametrize("name", [*CAUSAL, "vit", "deit"])
def test_it_runs_everywhere(name):
    model = tiny(name)
    result = run_probes(Specimen(Anatomy(model)), {"talking-heads": {"tested": 2, "channels": 5}})["talking-heads"]
    assert len(result.labels["channel"]) == 5 and drawings(result)
    assert ("removed" in result.quantities) == (name in CAUSAL)


def test_post_norm_and_single_layers_are_refused():
    refused = run_probes(Specimen(Anatomy(tiny("bert"))), {"talking-heads": {}}).refused
    assert "normalises after" in refused["talking-heads"]
    anatomy = Anatomy(tiny("llama"))
    anatomy.drop_block(0)
    anatomy.drop_block(0)
    with pytest.raises(NotApplicable, match="fewer than two blocks"):
        from transect.probes.catalog.talking_heads.talking_heads import talking_heads

        talking_heads(Specimen(anatomy))
