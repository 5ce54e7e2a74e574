"""Files of texts and questions that are damaged, or are no files: one BadData each, which names the file."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import socket

import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save_file

from tests.models import tiny
from tests.test_data import word_tokenizer, words
from transect.data import load, load_choices, load_facts, load_passages, load_preferences
from transect.data.concepts import load_concepts
from transect.errors import BadData

DEEP, DIGITS = "[" * 100_000 + "]" * 100_000, "9" * 10_000
FACT = {"prompt": "{} lives in", "subject": "Ann", "answer": "Rome"}
CHOICE = {"question": "which", "options": ["a", "b"], "answer": 0}
PASSAGE = {"prompt": "once", "answer": "upon"}
PREFERENCE = {"prompt": "once", "better": "upon", "worse": "never"}
CONCEPT = {"prompt": "say", "target": "x", "words": {"x": "a", "y": "b"}}
READERS = {
    "facts": (load_facts, FACT), "choices": (load_choices, CHOICE), "passages": (load_passages, PASSAGE),
    "concepts": (load_concepts, CONCEPT), "preferences": (load_preferences, PREFERENCE),
}  # fmt: skip
# What a file may hold that is no JSON, or no text.
CONTENTS = {
    "empty": b"", "cut": b'[{"prompt": "{} li', "deep": DEEP.encode(), "digits": f"[{DIGITS}]".encode(),
    "nul": b'[{"prompt": "a\0b"}]', "utf-16": "[1]".encode("utf-16"), "latin-1": '[{"prompt": "é"}]'.encode("latin-1"),
    "word": b"hello", "garbage": bytes(range(1, 256)), "surrogate": b'[{"prompt": "{} \\ud83d", "subject": "a", '
    b'"answer": "b", "question": "\\ud83d", "options": ["a", "b"], "target": "x", "words": {"x": "a", "y": "b"}}]',
}  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return tiny("llama"), word_tokenizer()


def read(path, llama):
    return load(path, *llama, sequence_length=8)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("kind", READERS)
def test_questions_in_damaged_files(kind, suffix, content, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(BadData) as raised:
        READERS[kind][0](tmp_path / f"a{suffix}")
    assert kind in str(raised.value) or f"a{suffix}" in str(raised.value)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".safetensors"])
def test_texts_in_damaged_files(suffix, content, llama, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(content)
    for path in (tmp_path / f"a{suffix}", tmp_path):
        with pytest.raises(BadData):
            read(path, llama)


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_folder_that_one_is_in(name, llama, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(words(40))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadData, match="is empty"):
        read(name, llama)


@pytest.mark.parametrize("kind", READERS)
def test_a_mark_of_the_byte_order_is_no_text(kind, tmp_path):
    reader, entry = READERS[kind]
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + json.dumps([entry]).encode())
    (tmp_path / "a.jsonl").write_bytes(
        codecs.BOM_UTF8 + json.dumps(entry).encode() + b"\r\n\n" + json.dumps(entry).encode()
    )
    assert reader(tmp_path / "a.json") * 2 == reader(tmp_path / "a.jsonl") == reader([entry, entry])


@pytest.mark.parametrize("kind", [*READERS, "texts"])
def test_the_line_that_is_broken_is_named(kind, llama, tmp_path):
    reader, entry = READERS.get(kind, (lambda path: read(path, llama), {"text": words(9)}))
    for broken in ("{", DEEP, DIGITS, "\ufeff\ufeff{}", "nul\0"):
        (tmp_path / "a.jsonl").write_text(f"{json.dumps(entry)}\n\n{json.dumps(entry)}\n{broken}\n", encoding="utf-8")
        with pytest.raises(BadData, match=r"a\.jsonl, line 4,"):
            reader(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.safetensors", "a.json"])
def test_what_is_no_file_is_not_waited_for(name, llama, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "loop.txt").symlink_to(tmp_path / "folder")  # which holds itself
    os.mkfifo(tmp_path / name)
    (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / name).symlink_to(tmp_path / "gone.txt")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).mkdir()
    readers = [reader for reader, _ in READERS.values()]
    for path in (name, f"link-{name}", "circle.jsonl", "folder", "nothing", "in", f"in/{name}", f"nothing/{name}", ""):
        for reader in [*readers, lambda path: read(path, llama)]:
            with pytest.raises(BadData):
                reader(tmp_path / path)


def test_a_socket_and_names_that_no_file_has(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("a.jsonl")
        for name in (
            "a.jsonl",
            "x" * 5000 + ".jsonl",
            "a\0.jsonl",
            "~nobody-of-this-name/a.jsonl",
            "\udcff.jsonl",
            "/",
        ):
            for reader in [reader for reader, _ in READERS.values()]:
                with pytest.raises(BadData):
                    reader(name)
            with pytest.raises(BadData):
                read(name, llama)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_a_table_with_anything_changed_in_it_is_read_or_refused(drawn, llama, tmp_path):
    rows = [{"text": words(9), "more": i} for i in range(4)]
    kind = drawn.draw(st.sampled_from([".jsonl", ".parquet", ".safetensors"]))
    path = tmp_path / f"a{kind}"
    if kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        save_file({"input_ids": torch.full((4, 8), 9)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(drawn.draw(st.integers(1, 3))):
        content[drawn.draw(st.integers(0, len(content) - 1))] = drawn.draw(st.integers(0, 255))
    path.write_bytes(content[: drawn.draw(st.integers(0, len(content)))])
    with contextlib.suppress(BadData):
        assert len(read(path, llama))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["{}", "A"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(READERS)), st.data())
def test_entries_of_the_wrong_type_are_named(kind, data):
    """A text is a text or a number, and never what Python writes for None or a list."""
    reader, entry = READERS[kind]
    name = data.draw(st.sampled_from(sorted(entry)))
    value = data.draw(JSON)
    try:
        (made,) = reader([{**entry, name: value}])
    except BadData as error:
        assert f"entry 0 of the {kind} cannot be used" in str(error)
    else:
        absent = re.sub("(new_answer|end|aspect)=None", "", repr(made))
        assert value is not None and "None" not in absent


@pytest.mark.parametrize("row", [
    {"text": 3}, {"text": None}, {"text": ["a"]}, {"text": "half \ud83d of it"}, {"a": "x", "b": "y"}, {}, [], 3, None,
    {"input_ids": 3}, {"input_ids": ["x"]}, {"input_ids": [1.5]}, {"input_ids": [[1]]}, {"input_ids": [2**70]},
    {"input_ids": []}, {"input_ids": [10**6]}, {"input_ids": [-1]}, {"input_ids": {"a": 1}}, {"messages": 3},
    {"messages": [3]}, {"input_ids": [7, 8], "attention_mask": [1]}, {"input_ids": [7, 8], "labels": "x"},
], ids=lambda row: str(row)[:30].encode("ascii", "replace").decode())  # fmt: skip
def test_rows_with_fields_of_the_wrong_type(row, llama, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadData):
        read(tmp_path / "a.jsonl", llama)


@pytest.mark.parametrize("label", [None, 1.5, float("nan"), [1], {"a": 1}, "x", 10**30, -1, float("inf")])
def test_labels_that_are_no_class(label):
    picture = torch.zeros(3, 32, 32).tolist()
    with pytest.raises(BadData, match="label"):
        load([{"pixel_values": picture, "label": label}], tiny("vit"))


@pytest.mark.parametrize("pictures", [["x"], [3], [[[[0.0]]], [[[0.0, 0.0]]]], [None]])
def test_pictures_that_are_none(pictures):
    with pytest.raises(BadData, match="pixel_values"):
        load([{"pixel_values": picture, "label": 0} for picture in pictures], tiny("vit"))
