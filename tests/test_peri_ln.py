"""Where norms stand: each placement by hand, and what Peri-LN bounds."""

import pytest
import torch
from torch import nn

from tests.models import assert_alike, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.errors import TransectError
from transect.forward import watch
from transect.parts import add_output_norms, build_model, insert, parts
from transect.parts.catalog.standard_norms import RMS

F64 = dict(dtype=torch.float64)
PLACEMENTS = [entry.name for entry in parts("block") if entry.function.places_norms]


def by_hand(placement, x, branch, norm, behind):
    return {
        "pre-ln": lambda: x + branch(norm(x)), "post-ln": lambda: norm(x + branch(x)),
        "output-ln": lambda: x + norm(branch(x)), "peri-ln": lambda: x + behind(branch(norm(x))),
    }[placement]()  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_each_placement_is_what_it_says(name, placement):
    model, batch = tiny(name), inputs(name)
    insert(model, "norm", placement)
    anatomy = Anatomy(model)
    block = anatomy.blocks[1]
    part = block.module.around.part
    for norm in block.norms.values():
        norm.weight.normal_(1, 0.3, generator=torch.Generator().manual_seed(3))
    own = [block.module.get_submodule(path) for path in block.module.around.norms]
    behind = [getattr(part, f"{unit}_output", None) for unit in ("attention", "mlp")]
    points = ["residual"] if placement == "post-ln" else ["residual", "attention", "mlp"]
    raw = {}
    hooks = [
        block.model.get_submodule(str(block.slot_path(unit))).register_forward_hook(
            lambda _, given, out, unit=unit: raw.update({unit: out[0] if isinstance(out, tuple) else out})
        )
        for unit in ("attention", "mlp")
    ]
    with watch(anatomy, points) as seen:
        logits(model, batch)
    for hook in hooks:
        hook.remove()
    x = seen.residual[1]
    for number, unit in enumerate(("attention", "mlp")):
        after = by_hand(placement, x, lambda _, unit=unit: raw[unit], own[number], behind[number])
        if placement != "post-ln":  # what the points say that the sublayer adds
            torch.testing.assert_close(x + getattr(seen, unit)[1], after)
        x = after
    torch.testing.assert_close(seen.residual[2], x)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "qwen3"])
def test_pre_ln_is_the_model_itself(name):
    model, batch = tiny(name), inputs(name)
    insert(model, "norm", "pre-ln")
    assert_alike(logits(model, batch), logits(tiny(name), batch))


def test_it_generates_with_its_cache_as_without():
    model, given = tiny("llama"), dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    insert(model, "norm", "peri-ln", settings={"norm": "layer"})
    tokens = inputs("llama")["input_ids"]
    assert torch.equal(*(model.generate(tokens, use_cache=use, **given) for use in (True, False)))


def sublayer(gain=1.0):
    """A Peri-LN sublayer by itself: W₂ (16 x 24), an RMSNorm behind it, and a loss of what comes out."""
    draw = torch.Generator().manual_seed(0)
    weight, h, slope = (torch.randn(*shape, generator=draw, **F64) for shape in ((16, 24), (24,), (16,)))
    norm = RMS(16, 0.0).double()
    nn.init.constant_(norm.weight, gain)
    return weight, h, slope, norm


def gradient(weight, h, slope, norm):
    weight = weight.clone().requires_grad_()
    out = weight @ h if norm is None else norm(weight @ h)
    return torch.autograd.grad(out @ slope, weight)[0]


def test_the_output_norm_takes_the_scale_of_the_last_weight_out_and_bounds_its_gradient():
    weight, h, slope, norm = sublayer(gain=1.5)
    torch.testing.assert_close(norm(7 * weight @ h), norm(weight @ h))
    whole = gradient(weight, h, slope, norm)
    torch.testing.assert_close(gradient(7 * weight, h, slope, norm), whole / 7)
    assert abs(float((weight * whole).sum())) < 1e-12
    for factor in (1, 50):
        bound = 1.5 * 16**0.5 * (factor * h).norm() * slope.norm() / (weight @ (factor * h)).norm()
        assert 0.3 * bound < gradient(weight, factor * h, slope, norm).norm() <= bound
        torch.testing.assert_close(gradient(weight, factor * h, slope, norm), whole)
        assert float(gradient(weight, factor * h, slope, None).norm()) == pytest.approx(
            float(factor * h.norm() * slope.norm())
        )
    assert torch.equal(RMS(16, 1e-6)(torch.zeros(16)), torch.zeros(16))


def built(placement, blocks=24, width=32):
    return build_model(
        "llama", parts={"norm": placement}, hidden=width, blocks=blocks, heads=4, neurons=64, vocabulary=64, length=16
    ).double()


@torch.no_grad()
def test_the_stream_grows_in_proportion_to_depth_whatever_the_weights():
    """48 sublayers: variance 1 + l under Peri-LN, 1 under Post-LN; under Pre-LN it goes with the weights' scale."""
    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    growth = {}
    for placement in ("pre-ln", "post-ln", "peri-ln"):
        model = built(placement)
        anatomy = Anatomy(model)
        draw = torch.Generator().manual_seed(2)
        anatomy.embedding.weight.copy_(torch.randn(anatomy.embedding.weight.shape, generator=draw))
        for matrix in anatomy.matrices():
            matrix.write(torch.randn(*matrix.shape, generator=draw, **F64) * matrix.shape[1] ** -0.5)
        for scale in (1, 4):
            for matrix in anatomy.matrices() if scale > 1 else ():
                matrix.write(scale * matrix.weight)
            with watch(anatomy, ["residual"]) as seen:
                model(tokens)
            growth[placement, scale] = [float(seen.residual[layer].square().mean()) for layer in (0, 12, 24)]
            if placement == "peri-ln":
                lengths = [seen.residual[layer].norm(dim=-1) for layer in (0, 24)]
                assert (lengths[1] <= lengths[0] + 48 * 32**0.5).all()
    for scale in (1, 4):
        start, middle, end = growth["peri-ln", scale]
        assert (middle - start) / 24 == pytest.approx(1, abs=0.3) and (end - start) / 48 == pytest.approx(1, abs=0.3)
        assert growth["post-ln", scale][2] == pytest.approx(1, abs=1e-3)
    assert growth["pre-ln", 1][2] < 0.8 * end and growth["pre-ln", 4][2] > 20 * end


def test_it_adds_two_norms_a_block_and_with_gains_of_0_nothing_to_the_stream():
    plain = build_model("llama", hidden=32, blocks=3, heads=4, neurons=64, vocabulary=64, length=16)
    model = built("peri-ln", blocks=3).float()
    count = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, plain)]
    assert count[0] - count[1] == 3 * 2 * 32
    anatomy = Anatomy(model)
    assert list(anatomy.blocks[0].norms) == ["attention_input", "mlp_input", "attention_output", "mlp_output"]
    with torch.no_grad():
        for block in anatomy.blocks:
            block.norms["attention_output"].weight.zero_()
            block.norms["mlp_output"].weight.zero_()
    with torch.no_grad(), watch(anatomy, ["residual"]) as seen:
        model(torch.arange(10)[None])
    assert torch.equal(seen.residual[3], seen.residual[0])


@torch.no_grad()
def test_a_trained_model_gets_output_norms_whose_gains_are_least_squares():
    model, batch = tiny("llama", dtype=torch.float64), inputs("llama")
    with watch(Anatomy(model), ["mlp"]) as seen:
        before = logits(model, batch)
    a = seen.mlp[0].flatten(0, 1)
    add_output_norms(model, [{key: tensor[row : row + 1] for key, tensor in batch.items()} for row in range(2)])
    norm = Anatomy(model).blocks[0].norms["mlp_output"]
    unit = a / (a.square().mean(1, keepdim=True) + norm.eps).sqrt()
    fitted = [torch.linalg.lstsq(unit[:, j : j + 1], a[:, j : j + 1]).solution.item() for j in range(32)]
    torch.testing.assert_close(norm.weight, torch.tensor(fitted, **F64))
    off = (logits(model, batch) - before).norm()
    insert(other := tiny("llama", dtype=torch.float64), "norm", "peri-ln")
    assert off < 0.8 * (logits(other, batch) - before).norm()
    with pytest.raises(TransectError, match="at least one batch"):
        add_output_norms(tiny("llama"), [])
    with pytest.raises(TransectError, match="has the norms"):
        add_output_norms(tiny("gemma2"), [batch])


def test_blocks_that_are_something_else_are_refused_before_any_change():
    for name, said in (
        ("bert", "behind the residual sum"), ("cohere", "side by side"), ("granite", "multiplies"),
        ("gemma2", "has the norms"), ("opt", "no MLP in one module"), ("bloom", "adds the stream"),
    ):  # fmt: skip
        model = tiny(name)
        with pytest.raises(TransectError, match=said):
            insert(model, "norm", "peri-ln")
        assert not Anatomy(model).record
    model = tiny("llama")
    insert(model, "block", "peri-ln")
    with pytest.raises(TransectError, match="stands around block 0 already"):
        insert(model, "norm", "post-ln")
    assert not Anatomy(model).blocks[0].post_norm
    insert(fresh := tiny("llama"), "norm", "post-ln")
    assert Anatomy(fresh).blocks[0].post_norm
