"""Headers and indexes of safetensors: taken only if safetensors would take them, and each tensor once."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transect.checkpoint import check_folder, open_model
from transect.checkpoint.header import read_stored
from transect.errors import BadCheckpoint

from .damage import changed, write_header


def header(**entries):
    return json.dumps(entries).encode()


def entry(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


BAD_HEADERS = {
    "a gap": header(a=entry(0, 2), b=entry(3, 4)), "an overlap": header(a=entry(0, 3), b=entry(2, 4)),
    "the same bytes": header(a=entry(0, 4), b=entry(0, 4)), "not from 0": header(a=entry(1, 4)),
    "backwards": header(a={"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}), "negative": header(a=entry(-4, 0)),
    "a negative size": header(a=entry(0, 4, shape=[-2, -2])), "bool": header(a=entry(0, 4, shape=[True, 4])),
    "a fraction": header(a=entry(0, 4, shape=[4.0])), "a text": header(a=entry(0, 4, shape="4")),
    "three offsets": header(a={"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}),
    "an unknown type": header(a=entry(0, 4, "X32")), "no type": header(a={"shape": [4], "data_offsets": [0, 4]}),
    "twice": b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), "a list": b"[]", "a number": b"4",
    "nothing": b"", "space first": b" " + header(a=entry(0, 4)), "NaN": b'{"__metadata__": {"x": NaN}}',
    "metadata": header(__metadata__={"x": 1}, a=entry(0, 4)), "a surrogate": header(**{"\ud800": entry(0, 4)}),
    "no UTF-8": b'{"\xff": 1}', "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000, "digits": b'{"a": 1%s}' % (b"0" * 10000),
    "too large": header(a=entry(0, 4, shape=[2**62, 2**62, 4])), "too long": header(a=entry(0, 2)),
    "too short": header(a=entry(0, 8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_headers_that_safetensors_would_not_take(tmp_path, kind):
    write_header(tmp_path / "x.safetensors", BAD_HEADERS[kind], b"1234")
    with pytest.raises(BadCheckpoint):
        read_stored(tmp_path / "x.safetensors")


@settings(max_examples=150, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_what_is_taken_is_taken_by_safetensors_too(tmp_path_factory, random):
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    value = {"a": entry(0, 4, "F32", [1]), "b": entry(4, 12, "F16", [2, 2]), "c": entry(12, 12, "U8", [0])}
    changed(value, random)
    write_header(file, json.dumps(value).encode() + b" " * random.randrange(3), bytes(12))
    try:
        stored = read_stored(file)
    except BadCheckpoint:
        return
    with safe_open(file, "pt") as other:
        assert {name: tuple(other.get_slice(name).get_shape()) for name in other.keys()} == {  # noqa: SIM118
            name: tensor.shape for name, tensor in stored.items()
        }


def test_a_header_beyond_the_limit_of_safetensors(tmp_path):
    with (tmp_path / "x.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001) + b"{}")
        stream.truncate(100_000_009)
    with pytest.raises(BadCheckpoint, match="allows 100000000"):
        read_stored(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", [
    "../m/model-00001-of-00004.safetensors", "/etc/passwd", "a\0b.safetensors", "", ".", 7, None, ["x"], "x.bin",
    "sub/x.safetensors", "..\\x.safetensors",
])  # fmt: skip
def test_shards_are_files_of_the_folder(folder, name):
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][next(iter(table["weight_map"]))] = name
    index.write_text(json.dumps(table))
    for opening in (check_folder, open_model):
        with pytest.raises(BadCheckpoint, match="names the shard"):
            opening(folder)


def test_a_tensor_in_two_shards(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(first))
    save_file({**second, name: first[name] + 1}, shards[1], metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="another shard"):
        check_folder(folder)
