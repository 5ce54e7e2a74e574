"""Damaged and ill-meant model folders and GGUF files: the right model, or one error that a user can read."""

import os
import struct
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transect
from transect.checkpoint import open_model
from transect.errors import BadCheckpoint, TransectError

from ..models import assert_same_tensors, tiny
from ..test_checkpoint import change
from .damage import attempt, copied, damage
from .faults import digest


@settings(max_examples=60, deadline=None)
@given(random=st.randoms(use_true_random=False), which=st.integers(0, 2))
def test_any_damage_gives_a_model_or_an_error(good, tmp_path_factory, random, which):
    place = tmp_path_factory.mktemp("damaged")
    folder = copied(good[which], place / "m")
    before = digest(good[0].parent)
    damage(folder, random)
    attempt(folder)
    assert digest(good[0].parent) == before and os.listdir(place) == ["m"]


def test_the_same_damage_every_time(good, tmp_path):
    """A fixed part of what `fuzz_loader` goes on with."""
    errors = []
    for number in range(40):
        folder = copied(good[number % 2], tmp_path / "m")
        damage(folder, Random(number))
        errors.append(attempt(folder))
    assert sum(error is None for error in errors) < 20  # most damage matters


def test_an_undamaged_folder_is_the_model(good):
    assert_same_tensors(open_model(good[1]).model, change(tiny("llama")))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "other"]
)
def test_a_pipe_is_not_waited_for(plain, name):
    (plain / name).unlink(missing_ok=True)
    os.mkfifo(plain / name)
    for opening in (open_model, lambda path: transect.compress(path, "svd", 0.5, stream_to=path.parent / "out")):
        with pytest.raises(BadCheckpoint, match="ordinary file"):
            opening(plain)


def test_places_that_are_no_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("pipe", "pipe.gguf", "loop", "dangling", "a\0b", "x" * 5000):
        with pytest.raises(TransectError):
            open_model(tmp_path / name)
    with pytest.raises(TransectError):
        open_model("~nobody-of-this-name/m")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"x":' * 100_000, '{"x": 1%s}' % ("0" * 10_000), "", "[]", "1", '"x"', "null"]
)
def test_json_that_is_none_or_no_object(plain, text):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        place = copied(plain, plain.parent / "c")
        (place / name).write_text(text)
        assert name in (attempt(place) or "")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The bytes of a GGUF file."""
    from ..test_opening import write_gguf

    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny("llama")).read_bytes()


@settings(max_examples=40, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_damaged_gguf_files(gguf, tmp_path_factory, random):
    place, content = tmp_path_factory.mktemp("gguf"), bytearray(gguf)
    at = random.choice([random.randrange(len(content)), random.randrange(2000)])
    how = random.randrange(3)
    content[at : at + 8 * (how == 0)] = random.choice([bytes(8), b"\xff" * 8, random.randbytes(8)]) if how < 2 else b""
    (place / "m.gguf").write_bytes(content[:at] if how == 2 else content)
    attempt(place / "m.gguf")


def test_a_gguf_file_of_many_layers_and_one_beside_an_adapter(gguf, tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf)
    at = gguf.index(b"llama.block_count") + len(b"llama.block_count") + 4
    (tmp_path / "many.gguf").write_bytes(gguf[:at] + struct.pack("<I", 10**9) + gguf[at + 4 :])
    assert "block_count" in (attempt(tmp_path / "many.gguf", most=2**28) or "")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="adapter"):
        open_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("text", [
    "[1]", "[" * 100_000, '{"model_type": 5}', '{"model_type": "llama", "hidden_size": "x"}', "{}", "", None,
])  # fmt: skip
def test_a_config_to_build_from(tmp_path, text):
    """Not waited for where it is a pipe."""
    file = tmp_path / "config.json"
    if text is None:
        os.mkfifo(file)
    else:
        file.write_text(text)
    for base in (file, tmp_path):
        with pytest.raises(TransectError):
            transect.build(str(base), hidden=16, heads=2, blocks=1)
