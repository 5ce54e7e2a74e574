"""What a comparison is said to need beforehand, against what it then takes."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import LlamaForCausalLM

import transect
from transect.cli import main_group
from transect.comparison.estimate import Estimate

from .models import VOCABULARY, tiny

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
METHODS = ("kfac-svd", "svd-llm", "modegpt", "fwsvd", "gptq")


def compare(model, out, methods=METHODS, **options):
    return transect.compare(model, methods, (0.7, 0.4), DATA, DATA[:6], out, batch_size=4, **options)


def stored(file):
    """Bytes of the tensors in a file."""
    with safe_open(file, "pt") as tensors:
        found = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def test_the_disk_is_what_is_written_then(tmp_path):
    said = compare(tiny("llama"), tmp_path / "run", dry_run=True)
    assert isinstance(said, Estimate) and not (tmp_path / "run").exists()
    compare(tiny("llama"), tmp_path / "run")
    files = [tmp_path / "run" / "statistics.safetensors", *(tmp_path / "run" / "factors").iterdir()]
    assert len(files) == 4
    assert said.disk == pytest.approx(sum(map(stored, files)), rel=0.01)
    assert said.seconds > 0 and said.memory > 1e8 and said.unknown == ()


def test_streamed_memory_does_not_grow_with_the_blocks(tmp_path):
    said = []
    for blocks in (2, 8):
        config = copy.deepcopy(tiny("llama").config)
        config.num_hidden_layers = blocks
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(blocks))
        said.append(compare(tmp_path / str(blocks), tmp_path / "run", stream=True, dry_run=True))
    assert said[1].memory < 1.02 * said[0].memory + 5e6 and said[1].disk > 2 * said[0].disk


def test_a_note_says_it_beforehand(tmp_path, caplog):
    caplog.set_level("INFO", "transect")
    compare(tiny("llama"), tmp_path / "run", methods=("svd",))
    assert "this comparison needs at least about" in caplog.text and "of disk" in caplog.text
    caplog.clear()
    compare(tiny("llama"), tmp_path / "run", methods=("svd",))  # nothing is left to do
    assert "this comparison needs" not in caplog.text


def test_the_command_line_only_says_it(tmp_path):
    line = (
        "compare organism --methods svd,mixed --keep 0.6 --data organism:calibration --sequences 4 "
        f"--eval organism:heldout --eval-sequences 4 --dry-run --out {tmp_path / 'run'}"
    )
    said = CliRunner().invoke(main_group, line.split(), catch_exceptions=False)
    assert said.exit_code == 0 and "of memory" in said.output and "without what mixed will take" in said.output
    found = CliRunner().invoke(main_group, [*line.split(), "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["unknown"] == ["mixed"] and not (tmp_path / "run").exists()


def test_a_model_whose_first_block_is_empty(tmp_path):
    model = tiny("llama")
    block = transect.Anatomy(model).blocks[0]
    block.attention.drop()
    block.mlp.drop()
    assert compare(model, tmp_path / "run", methods=("svd", "gptq"), dry_run=True).seconds > 0
    assert len(compare(model, tmp_path / "run", methods=("svd", "gptq"))) == 5


def test_text():
    assert str(Estimate(3 * 10**9, 5 * 10**7, 100.0, ("mixed",))) == (
        "at least about 3.0 GB of memory and 50 MB of disk, and 2 minutes as this machine is now, without what mixed "
        "will take, which cannot be told from one block"
    )
