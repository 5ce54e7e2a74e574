"""Growth of the residual stream: against a loop, with padding, on every kind of model."""

import pytest
import torch

from transect.anatomy import Anatomy
from transect.data import Batches, Specimen
from transect.forward import predictions, summed_loss, watch
from transect.parts import insert
from transect.probes import drawings, run_probes
from transect.probes.catalog.stream_growth import fit

from .models import inputs, tiny

NAME = "stream-growth"


def inspected(model, *batches, **settings):
    return run_probes(Specimen(Anatomy(model), data=Batches(list(batches))), {NAME: settings})[NAME]


def test_figures_are_those_of_a_loop_and_the_model_is_as_before():
    model, batch = tiny("llama", dtype=torch.float64), inputs("llama")
    kept = model.model.layers[0].mlp.up_proj.weight
    kept.grad = torch.ones_like(kept)
    model.lm_head.weight.requires_grad_(False)
    result = inspected(model, batch)
    assert torch.equal(kept.grad, torch.ones_like(kept)) and not model.lm_head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    with torch.no_grad(), watch(Anatomy(model), ["residual", "mlp"]) as seen:
        model(**batch)
    for layer in range(4):
        rows = [row for text in seen.residual[layer] for row in text]
        variance = sum(float(((row - row.mean()) ** 2).mean()) for row in rows) / len(rows)
        assert float(result["variance"][layer]) == pytest.approx(variance)
        assert float(result["largest"][layer]) == pytest.approx(max(float(row.abs().max()) for row in rows))
    assert float(result["mlp"][1]) == pytest.approx(float(seen.mlp[1].square().mean().sqrt()))
    kept.grad = None
    logits, labels = predictions(model, batch)
    (summed_loss(logits, labels) / len(labels)).backward()
    for number, block in enumerate(model.model.layers):
        length = sum(float(p.grad.square().sum()) for p in block.parameters() if p.dim() > 1) ** 0.5
        assert float(result["gradient"][number]) == pytest.approx(length)


def test_padding_is_left_out():
    model, batch = tiny("llama"), inputs("llama")
    wide = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (3, 0), value=5),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (3, 0)),
    }
    for name, values in inspected(model, batch).quantities.items():
        torch.testing.assert_close(inspected(model, wide)[name], values.values, atol=1e-5, rtol=1e-4)


def test_every_kind_of_model_has_what_it_can_have():
    for name in ("gpt2", "bert", "vit"):
        result = inspected(tiny(name), inputs(name))
        assert ("attention" in result.quantities) == (name != "bert")
        assert ("gradient" in result.quantities) == (name != "bert")  # a masked model without labels
        assert len(drawings(result)) == 2 + 2 * (name != "bert") and result.findings and result.caveats
    model = tiny("llama")
    insert(model, "norm", "peri-ln", settings={"norm": "layer"})
    result = inspected(model, inputs("llama"), gradients=False)
    torch.testing.assert_close(result["mlp"], torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0)
    assert "gradient" not in result.quantities and len(result.caveats) == 1
    insert(behind := tiny("llama"), "norm", "post-ln")
    assert "mlp" not in inspected(behind, inputs("llama")).quantities


def test_the_better_fit_is_named():
    depth = torch.arange(9.0)
    straight, factor = fit(1 + 2 * depth)
    assert straight == pytest.approx(1) and factor < 0.95
    straight, factor = fit(torch.exp(depth))
    assert factor == pytest.approx(1) and straight < 0.8
    assert fit(torch.ones(4)) == (1.0, 1.0)
