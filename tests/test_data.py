"""Data: exact accounting from files to batches, and one clear message for everything that can be wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, ViTImageProcessorPil

from tests.models import VOCABULARY, tiny
from transect.data import Batches, load
from transect.data.text import cut, specials_of, token_stream
from transect.errors import BadData, TransectError

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<cls>", "<sep>"]
WORDS = [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]


def word_tokenizer(wrap: bool = False, eos: bool = True, pad: bool = True) -> Any:
    """A token a word; w0 is token 7."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if wrap:
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<cls> $A <sep>", special_tokens=[("<cls>", 5), ("<sep>", 6)]
        )
    names = {
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "cls_token": "<cls>",
        "sep_token": "<sep>",
    }
    names |= {"eos_token": "<eos>"} if eos else {}
    names |= {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


def flat(batches: Batches) -> list[int]:
    return [int(token) for batch in batches for row in batch["input_ids"] for token in row]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def bert() -> Any:
    return tiny("bert")


@pytest.fixture(scope="module")
def vit() -> Any:
    return tiny("vit")


@pytest.fixture(scope="module")
def classifier() -> Any:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    return BertForSequenceClassification(config)


# Text: nothing is lost


def test_a_text_file_is_one_document_cut_without_loss(llama, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(50))
    batches = load(path, llama, word_tokenizer(), sequence_length=8, batch_size=4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 8), (2, 8), (1, 2)]
    assert (batches.tokens, batches.examples, len(batches)) == (50, 7, 3)
    assert flat(batches) == [7 + i for i in range(50)]
    full = load(path, llama, word_tokenizer(), sequence_length=8, full_only=True)
    assert (full.tokens, full.examples) == (48, 6)
    assert next(iter(batches))["input_ids"] is next(iter(batches))["input_ids"]  # re-iterable


def test_documents_are_joined_by_the_end_token(llama):
    texts = [words(5), "", words(4, start=20)]
    assert flat(load(texts, llama, word_tokenizer(), sequence_length=4)) == [7, 8, 9, 10, 11, 2, 27, 28, 29, 30]
    assert flat(load(texts, llama, word_tokenizer(eos=False), sequence_length=4)) == [7, 8, 9, 10, 11, 27, 28, 29, 30]


def test_grouping_documents_changes_nothing(monkeypatch):
    texts, tokenizer = [words(7, start=i) for i in range(30)], word_tokenizer()
    whole = token_stream(texts, tokenizer)
    monkeypatch.setattr("transect.data.text._GROUP", 50)
    assert torch.equal(token_stream(iter(texts), tokenizer), whole)
    assert len(whole) == 30 * 7 + 29


def test_every_kind_of_file_gives_the_same_text(llama, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [words(9, start=3 * i) for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "url": "x"}) for text in texts) + "\n\n")
    pq.write_table(pa.table({"number": [1] * 6, "content": texts}), tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    (folder / "README.md").write_text("not data")
    wanted = flat(load(texts, llama, word_tokenizer(), sequence_length=8))
    for path in (tmp_path / "a.jsonl", str(tmp_path / "a.parquet"), folder):
        assert flat(load(path, llama, word_tokenizer(), sequence_length=8)) == wanted


def test_sequences_are_spaced_evenly_over_the_text():
    stream = torch.arange(103)
    starts = [int(piece[0]) for piece in cut(stream, 10, sequences=5, full_only=False)]
    assert starts == [0, 20, 40, 60, 80]
    assert len(cut(stream, 10, sequences=10, full_only=False)) == 10  # full ones are preferred to the rest
    assert len(cut(stream, 10, sequences=50, full_only=False)) == 11  # all there is
    assert len(cut(stream, 10, sequences=50, full_only=True)) == 10


def test_default_length_is_what_model_and_tokenizer_allow(llama):
    tokenizer = word_tokenizer()
    assert next(iter(load([words(100)], llama, tokenizer)))["input_ids"].shape == (1, 64)
    assert next(iter(load([words(100)], llama, tokenizer, longest=20)))["input_ids"].shape == (5, 20)
    assert next(iter(load([words(100)], llama, tokenizer, longest=20, sequence_length=50)))["input_ids"].shape[1] == 50
    tokenizer.model_max_length = 16
    assert next(iter(load([words(100)], llama, tokenizer)))["input_ids"].shape == (6, 16)
    roberta = tiny("roberta")  # of its 64 positions the first is the padding's
    length = next(iter(load([words(100)], roberta, word_tokenizer(wrap=True))))["input_ids"].shape[1]
    assert length == 63
    assert roberta(torch.full((1, length), 9)).logits.shape[1] == length


def test_bundled_world(llama):
    corpus = pytest.importorskip("transect.organism.corpus").corpus
    texts = corpus(split="heldout", n_tokens=41)
    batches = load("organism:heldout", llama, word_tokenizer(), sequence_length=10, sequences=4)
    assert batches.examples == 4
    assert batches.fingerprint != load("organism:calibration", llama, word_tokenizer(), sequence_length=10).fingerprint
    assert torch.equal(torch.tensor(flat(batches)[:10]), token_stream(texts, word_tokenizer())[:10].long())


def test_hub_name(llama, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": [words(5), words(4, start=20)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("someone/novels", "novels:small", "novels::test"):
        assert load(name, llama, word_tokenizer(), sequence_length=5).tokens == 10
    assert [(args, kwargs["split"]) for args, kwargs in asked] == [
        (("someone/novels", None), "train"), (("novels", "small"), "train"), (("novels", None), "test"),
    ]  # fmt: skip


# Token ids and ready batches


def test_token_ids_are_used_as_they_are(llama):
    tensor = torch.randint(0, VOCABULARY, (5, 12))
    batches = load(tensor, llama, batch_size=2)
    assert flat(batches) == tensor.flatten().tolist()
    ragged = [[7, 8, 9], torch.tensor([10, 11, 12]), [13, 14]]
    assert [tuple(batch["input_ids"].shape) for batch in load(ragged, llama)] == [(2, 3), (1, 2)]
    assert load(tensor, llama, sequences=2).fingerprint == load(tensor[[0, 2]], llama).fingerprint


def test_ready_batches_pass_through(llama):
    ready = [{"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 0]])}]
    batches = load((batch for batch in ready), llama)
    assert next(iter(batches))["input_ids"] is ready[0]["input_ids"]
    assert (batches.tokens, batches.examples) == (2, 1)
    assert load(batches, llama) is batches


def test_shards_and_take(llama):
    batches = load(torch.randint(0, VOCABULARY, (11, 4)), llama, batch_size=2)
    shards = [batches.shard(rank, 3) for rank in range(3)]
    assert sum(shard.tokens for shard in shards) == batches.tokens
    assert {id(batch) for shard in shards for batch in shard} == {id(batch) for batch in batches}
    assert flat(batches.take(5)) == flat(batches)[:20]
    assert [batches.take(n).examples for n in (0, 3, 11, 50)] == [0, 3, 11, 11]


def test_fingerprint_is_of_the_content_and_the_same_in_every_process(llama):
    ids = torch.arange(7, 31).view(3, 8)
    fingerprint = load(ids, llama).fingerprint
    changed = ids.clone()
    changed[1, 1] += 1
    assert load(changed, llama).fingerprint != fingerprint
    assert Batches([{"input_ids": ids, "labels": ids}]).fingerprint != fingerprint
    assert fingerprint == "e274d5696e2095f28e40bde877d7f9cf"  # as any other process finds it


# Masked language models


def test_masking(bert):
    tokenizer = word_tokenizer(wrap=True)
    batches = load([words(40_000)], bert, tokenizer, sequence_length=42, batch_size=16)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert ids.shape == (1000, 42) and (ids[:, 0] == 5).all() and (ids[:, -1] == 6).all()
    assert (labels[:, [0, -1]] == -100).all()
    chosen = labels != -100
    original = torch.tensor([7 + i % len(WORDS) for i in range(40_000)]).view(1000, 40)
    assert torch.equal(torch.where(chosen, labels, ids)[:, 1:-1], original)  # nothing is lost
    assert chosen.sum() / 40_000 == pytest.approx(0.15, abs=0.01)  # 5 standard deviations
    masked, kept = (ids == 4) & chosen, (ids == labels) & chosen
    assert masked.sum() / chosen.sum() == pytest.approx(0.8, abs=0.03)
    assert kept.sum() / chosen.sum() == pytest.approx(0.1 + 0.1 / len(WORDS), abs=0.03)
    assert (ids[chosen & ~masked] >= len(SPECIAL)).all()  # a random token is never a special one
    again = load([words(40_000)], bert, tokenizer, sequence_length=42, batch_size=7)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in again]), ids)
    assert load([words(40_000)], bert, tokenizer, sequence_length=42, seed=1).fingerprint != batches.fingerprint


def test_special_tokens_of_a_tokenizer():
    assert specials_of(word_tokenizer(wrap=True)) == ([5], [6])
    assert specials_of(word_tokenizer()) == ([], [])


# Classification


def test_texts_with_classes(classifier, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": words(3), "label": 1}, {"text": words(5), "label": "bad"}, {"text": words(30), "label": "good"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    batches = load(path, classifier, word_tokenizer(wrap=True), batch_size=2)
    first, second = batches
    assert first["attention_mask"].sum(1).tolist() == [5, 7] and first["labels"].tolist() == [1, 0]
    assert second["input_ids"].shape == (1, 16)  # cut off at the model's context
    assert batches.tokens == 5 + 7 + 16
    assert classifier(**first).logits.shape == (2, 2)


def test_images_from_safetensors(vit, tmp_path):
    from safetensors.torch import save_file

    pixels, labels = torch.randn(7, 3, 32, 32), torch.arange(7) % 5
    save_file({"pixel_values": pixels, "labels": labels}, tmp_path / "a.safetensors")
    batches = load(tmp_path / "a.safetensors", vit, batch_size=4)
    assert (batches.examples, batches.tokens) == (7, 0)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), pixels)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == labels.tolist()
    assert load(tmp_path, vit, sequences=2).batches[0]["labels"].tolist() == [0, 3]


def test_images_from_parquet(vit, tmp_path):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    pictures = [image.new("RGB", (40 + i, 50), (40 * i, 10, 200)) for i in range(5)]
    table = datasets.Dataset.from_dict({"image": pictures, "label": list(range(5))})
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    batches = load(tmp_path / "a.parquet", vit, processor=processor, batch_size=4)
    wanted = processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), wanted)
    with pytest.raises(BadData, match="processor"):
        load(tmp_path / "a.parquet", vit)


# What can be wrong


def _file(name: str, content: bytes) -> Any:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda _: "missing.txt", {}, "no file or folder 'missing.txt'"),
        (lambda folder: folder / "missing", {}, "no file or folder"),
        (lambda _: words(2000), {}, "a text itself is given in a list"),
        (lambda folder: folder, {}, "holds no .txt, .jsonl"),
        (_file("a.csv", b"a"), {}, "not in '.csv'"),
        (_file("a.txt", b""), {}, "a.txt is empty"),
        (_file("a.txt", b"a\0b"), {}, "NUL bytes"),
        (_file("a.txt", b"\xff\xfe\xfa"), {}, "not UTF-8 text: byte 0"),
        (_file("a.txt", words(5).encode()), {}, "has 5 tokens, but one sequence needs 8"),
        (_file("a.jsonl", b'{"text": "w1"}\n{"text": \n'), {}, "line 2, is not JSON"),
        (_file("a.jsonl", b'["w1"]\n'), {}, "entry 1: a JSON object is expected, got list"),
        (_file("a.jsonl", b'{"text": "w1"}\n{"text": 3}\n'), {}, "row 2: column 'text' should hold a text, not int"),
        (_file("a.jsonl", b'{"a": "w1", "b": "w2", "c": 1}\n'), {}, "columns are 'a', 'b', 'c'"),
        (_file("a.parquet", b"not parquet"), {}, "not a readable parquet file"),
        (_file("a.safetensors", b"not safetensors"), {}, "not a readable safetensors file"),
        (lambda _: [], {}, "the data is empty"),
        (lambda _: [words(20)], {"tokenizer": None}, "need its tokenizer"),
        (lambda _: [words(20)], {"sequence_length": 65}, "sequence_length 65 is above the model's context of 64"),
        (lambda _: [words(20)], {"sequence_length": 1}, "sequence_length must be at least 2"),
        (lambda _: [words(20)], {"batch_size": 0}, "batch_size must be at least 1"),
        (lambda _: [words(20)], {"sequences": 0}, "sequences must be at least 1"),
        (lambda _: torch.tensor([[1, 64]]), {}, "go from 1 to 64, but the model's embedding has 64 rows"),
        (lambda _: [[-1, 3]], {}, "go from -1 to 3"),
        (lambda _: torch.zeros(2, 70, dtype=torch.long), {"sequence_length": None}, "70 tokens, more than 64"),
        (lambda _: torch.zeros(3, dtype=torch.long), {}, r"shape of the data is \(3,\)"),
        (lambda _: [[0.5, 1.0]], {}, "integer token ids"),
        (lambda _: [object()], {}, "item 0 of the data is a object"),
        (lambda _: [{"input_ids": torch.ones(1, 2, dtype=torch.long), "text": ["a"]}], {}, "of batch 0 'text' is not"),
        (lambda _: "organism:train", {}, "there are organism:calibration and organism:heldout"),
    ],
)  # fmt: skip
def test_errors(llama, tmp_path, data, options, message):
    settings = {"tokenizer": word_tokenizer(), "sequence_length": 8} | options
    with pytest.raises(BadData, match=message):
        load(data(tmp_path), llama, **settings)


def test_a_short_text_is_one_sequence_unless_a_length_or_full_sequences_are_asked_for(llama, bert):
    (batch,) = load([words(5)], llama, word_tokenizer())
    assert batch["input_ids"].shape == (1, 5)
    (batch,) = load([words(5)], bert, word_tokenizer(wrap=True))
    assert batch["input_ids"].shape == (1, 7)
    for options in ({"sequence_length": 64}, {"full_only": True}):
        with pytest.raises(BadData, match="has 5 tokens, but one sequence needs 64"):
            load([words(5)], llama, word_tokenizer(), **options)
    with pytest.raises(BadData, match="has 1 tokens, but one sequence needs 2"):
        load([words(1)], llama, word_tokenizer())


def test_errors_of_other_heads(bert, vit, classifier, tmp_path):
    ids = torch.full((1, 8), 9)
    with pytest.raises(BadData, match="mask token"):
        load(ids, bert)
    with pytest.raises(BadData, match="leaves no room beside 2 special tokens"):
        load([words(20)], bert, word_tokenizer(wrap=True), sequence_length=2)
    with pytest.raises(BadData, match="token ids have no labels"):
        load(ids, classifier, word_tokenizer())
    with pytest.raises(BadData, match="need padding: set"):
        load(_file("a.jsonl", b'{"text": "w1", "label": 1}')(tmp_path), classifier, word_tokenizer(pad=False))
    with pytest.raises(BadData, match="column `label`; the columns are 'text'"):
        load([words(3)], classifier, word_tokenizer())
    for label in (b'"ugly"', b"2", b"-1"):
        path = _file("b.jsonl", b'{"text": "w1", "label": ' + label + b"}")(tmp_path)
        with pytest.raises(BadData, match="none of the model's 2 classes"):
            load(path, classifier, word_tokenizer())
    with pytest.raises(BadData, match="`pixel_values` or `image`; the columns are 'label'"):
        load(_file("c.jsonl", b'{"label": 1}')(tmp_path), vit)


def test_missing_extras_are_named(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TransectError, match=r"transect\[hub\]"):
        load("someone/novels", llama, word_tokenizer())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TransectError, match=r"transect\[parquet\]"):
        load(_file("a.parquet", b"x")(tmp_path), llama, word_tokenizer())


def test_unknown_hub_name(llama, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise FileNotFoundError("not on the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BadData, match=r"'someone/novels' is no file or folder.*not on the hub"):
        load("someone/novels", llama, word_tokenizer())


def test_the_language_reference_is_there_on_every_machine():
    from pydoc_data.topics import topics

    from transect.data.sources import SPLITS, rows_of

    calibration, held_out = ([row["text"] for row in rows_of(f"pydoc:{split}", 0)] for split in SPLITS)
    assert set(calibration) < set(topics.values()) and len(calibration) == (len(topics) + 1) // 2
    paragraphs, others = ({part for text in texts for part in text.split("\n\n")} for texts in (calibration, held_out))
    assert not paragraphs & others
    assert paragraphs | others == {part for text in topics.values() for part in text.split("\n\n")}
    with pytest.raises(BadData, match="pydoc:test does not exist; there are pydoc:calibration and pydoc:heldout"):
        list(rows_of("pydoc:test", 0))
