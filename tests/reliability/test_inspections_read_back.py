"""What an inspection reads back is of this very model, text and setting; anything else is computed anew."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import transect
from transect.data import Specimen
from transect.probes import KIND, Quantity, Result, probing, run_probes
from transect.probes import registry as registered
from transect.store import Folder, keep

from ..models import tiny
from ..test_checkpoint import tokenizer
from .runs import DAMAGE, inspect, noted

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_is_damaged_in_an_inspection_is_computed_anew(tmp_path, seen, damage, caplog):
    folder = tmp_path / "seen"
    shutil.copytree(seen, folder)
    arrays = sorted((folder / "data").glob("*.safetensors"))
    for path in [*arrays, *(folder / "data").glob("*.json"), folder / "index.html"]:
        damage(path)
    with caplog.at_level(logging.INFO, "transect"):
        found = inspect(folder)
    assert len(arrays) == 2 and all(noted(caplog, path) for path in arrays)
    for path in (seen / "data").glob("*.json"):
        assert (folder / "data" / path.name).read_text() == path.read_text()
        for name, values in load_file(path.with_suffix(".safetensors")).items():
            torch.testing.assert_close(found[path.stem][name], values, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (folder / "index.html").read_bytes() == (seen / "index.html").read_bytes()


@pytest.fixture
def counting():
    """A probe that says how often it was computed, with a setting that may be a file."""
    before, runs = dict(registered._probes), []

    @probing("counting", title="", paper="ours")
    def count(specimen, *, words: str = ""):
        """Count.

        words: a file.
        """
        runs.append(words)
        return Result({"runs": Quantity(torch.tensor(len(runs)), (), "", "runs")})

    yield runs
    registered._probes.clear()
    registered._probes.update(before)


def test_a_result_is_of_its_model_text_tokenizer_and_the_files_that_its_settings_name(tmp_path, counting):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    out, words = tmp_path / "out", tmp_path / "words.json"
    words.write_text("[1]")
    tokens = tokenizer()
    vocabulary = {token: (number + 1) % len(tokens) for token, number in tokens.get_vocab().items()}
    turned = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))

    def look(model=None, tokenizer=tokens, **given):
        given = {"words": str(words)} | given
        transect.inspect(model or tiny("llama"), ["counting"], out=out, tokenizer=tokenizer,
                         settings={"counting": given})  # fmt: skip
        return len(counting)

    assert [look(), look()] == [1, 1]
    turns = tiny("llama")
    turns.config.rope_parameters = {**turns.config.rope_parameters, "rope_theta": 77.0}
    assert look(model=turns) == 2
    assert look(tokenizer=turned) == 3
    words.write_text("[2]")
    assert [look(tokenizer=turned), look(tokenizer=turned)] == [4, 4]
    assert look(tokenizer=turned, words="x" * 5000) == 5  # no name that a file can have


def test_a_result_that_was_kept_as_something_else_is_computed_anew(tmp_path, counting, caplog):
    """Arrays without our marks, as an earlier version wrote them, and whole results under another probe's name."""
    folder = Folder(tmp_path, KIND)
    folder.take()
    specimen = Specimen(transect.Anatomy(tiny("llama")))
    save_file({"runs": torch.tensor(9)}, folder.file("data/counting.safetensors"))
    assert run_probes(specimen, {"counting": {}}, folder, "k")["counting"]["runs"] == 1
    keep(folder.file("data/counting.safetensors"), {"runs": torch.tensor(9)}, "another", {})
    assert run_probes(specimen, {"counting": {}}, folder, "k")["counting"]["runs"] == 2
    assert run_probes(specimen, {"counting": {}}, folder, "k")["counting"]["runs"] == 2
