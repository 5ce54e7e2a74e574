"""What a Hugging Face user may hold as data: each container is read for what it is, or refused by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

from tests.models import VOCABULARY, tiny
from tests.test_data import flat, word_tokenizer, words
from transect import Anatomy, compare, inspect
from transect.claims.registry import claims
from transect.data import Batches, load, load_choices, load_facts, load_passages
from transect.data.concepts import load_concepts
from transect.errors import BadData, TransectError
from transect.evaluation import Speed
from transect.forward.objective import predictions

TEXTS = [words(5), words(4, start=20), words(3, start=30)]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def bert() -> Any:
    return tiny("bert")


@pytest.fixture(scope="module")
def classifier() -> Any:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    return BertForSequenceClassification(config)


class MapStyle(torch.utils.data.Dataset):
    """A data set with a length and items alone, as torch asks for; behind its end it does not raise IndexError."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number % len(self.items)]


def tokenised(**options: Any) -> Any:
    return word_tokenizer()(TEXTS, **options)


def hub(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


# Texts and rows with texts

TEXT_CONTAINERS: dict[str, Any] = {
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "map-style data set": lambda: MapStyle(TEXTS),
    "array": lambda: np.array(TEXTS),
    "array of objects": lambda: np.array(TEXTS, dtype=object),
    "series": lambda: pd.Series(TEXTS, index=[5, 3, 1]),
    "data frame": lambda: pd.DataFrame({"number": [1, 2, 3], "text": TEXTS}),
    "dict of columns": lambda: {"text": TEXTS, "label": [0, 1, 0]},
    "dict of array columns": lambda: {"text": np.array(TEXTS), "label": np.array([0, 1, 0])},
    "rows": lambda: [{"text": text, "label": 1} for text in TEXTS],
    "hub data set": lambda: hub([{"text": text, "label": 1} for text in TEXTS]),
    "column of a hub data set": lambda: hub([{"text": text} for text in TEXTS])["text"],
    "iterable hub data set": lambda: hub([{"text": text} for text in TEXTS]).to_iterable_dataset(),
    "hub data set as pandas": lambda: hub([{"text": text} for text in TEXTS]).with_format("pandas"),
    "loader of texts": lambda: DataLoader(MapStyle(TEXTS), batch_size=2),
    "loader of rows": lambda: DataLoader(MapStyle([{"text": text, "label": 1} for text in TEXTS]), batch_size=2),
    "Arrow table": lambda: pytest.importorskip("pyarrow").table({"text": TEXTS}),
}


@pytest.mark.parametrize("kind", TEXT_CONTAINERS)
def test_texts_of_every_container_are_the_same_text(llama, kind):
    data = TEXT_CONTAINERS[kind]()
    assert flat(load(data, llama, word_tokenizer(), sequence_length=4)) == [
        7, 8, 9, 10, 11, 2, 27, 28, 29, 30, 2, 37, 38, 39
    ]  # fmt: skip


def test_paths_are_read_and_names_of_files_are_no_texts(llama, tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    paths = sorted(tmp_path.iterdir())
    assert flat(load(paths, llama, word_tokenizer(), sequence_length=4)) == flat(
        load(TEXTS, llama, word_tokenizer(), sequence_length=4)
    )
    with pytest.raises(BadData, match=r"item 0 of the data is the name of a file, .*2\.txt"):
        load([str(paths[2])], llama, word_tokenizer())


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows,
        hub,
        pd.DataFrame,
        lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
        lambda rows: DataLoader(MapStyle(rows), batch_size=2),
    ],
)
def test_labels_of_texts_are_kept(classifier, make):
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, [1, 0, 1], strict=True)]
    batches = load(make(rows), classifier, word_tokenizer(wrap=True), batch_size=2)
    assert [batch["labels"].tolist() for batch in batches] == [[1, 0], [1]]
    assert [batch["attention_mask"].sum().item() for batch in batches] == [7 + 6, 5]


# Token ids

IDS = torch.arange(7, 37).view(3, 10)
ID_CONTAINERS: dict[str, Any] = {
    "list of lists": IDS.tolist,
    "list of tuples": lambda: [tuple(row) for row in IDS.tolist()],
    "list of tensors": lambda: list(IDS),
    "list of 1 x T tensors": lambda: list(IDS[:, None]),
    "array": IDS.numpy,
    "16-bit array": lambda: IDS.numpy().astype(np.uint16),
    "list of arrays": lambda: list(IDS.numpy()),
    "rows of lists": lambda: [{"input_ids": row} for row in IDS.tolist()],
    "rows of tensors": lambda: [{"input_ids": row, "name": "x"} for row in IDS],
    "dict of lists": lambda: {"input_ids": IDS.tolist()},
    "dict of tensors in a list": lambda: {"input_ids": list(IDS)},
    "batch": lambda: {"input_ids": IDS},
    "batch of arrays": lambda: BatchEncoding({"input_ids": IDS.numpy()}),
    "hub data set": lambda: hub([{"text": "x", "input_ids": row} for row in IDS.tolist()]),
    "hub data set of tensors": lambda: hub([{"input_ids": row} for row in IDS.tolist()]).with_format("torch"),
    "series": lambda: pd.Series(IDS.tolist()),
    "data frame": lambda: pd.DataFrame({"input_ids": IDS.tolist(), "note": ["x", "y", "z"]}),
    "tensor data set": lambda: TensorDataset(IDS),
    "loader": lambda: DataLoader(TensorDataset(IDS), batch_size=2),
    "loader of rows": lambda: DataLoader(MapStyle([{"input_ids": row} for row in IDS]), batch_size=2),
    "generator of batches": lambda: ({"input_ids": part} for part in IDS.split(2)),
    "token groups": lambda: iter([IDS[:2].tolist(), IDS[2:].tolist()]),
}


@pytest.mark.parametrize("kind", ID_CONTAINERS)
def test_token_ids_of_every_container_are_the_same_ids(llama, kind):
    batches = load(ID_CONTAINERS[kind](), llama)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), IDS)
    assert all(batch["input_ids"].dtype == torch.long for batch in batches)


def test_what_a_tokenizer_returns_is_its_texts(llama):
    """A padded `BatchEncoding` is one batch; the key names of it, tokenised as text, are what it was taken for."""
    encoded = tokenised(padding=True, return_tensors="pt", return_special_tokens_mask=True)
    (batch,) = load(encoded, llama, word_tokenizer(), sequence_length=4)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(batch["input_ids"], encoded["input_ids"])
    assert torch.equal(batch["attention_mask"], encoded["attention_mask"])
    assert len(predictions(llama, batch)[1]) == 4 + 3 + 2
    for other in (tokenised(), dict(tokenised()), tokenised().encodings, iter(tokenised().encodings)):
        batches = load(other, llama, word_tokenizer())
        assert [batch["input_ids"][0].tolist() for batch in batches] == tokenised()["input_ids"]
        assert batches.tokens == 12
    (batch,) = load(word_tokenizer()(TEXTS[0]), llama)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10, 11]]
    (batch,) = load(word_tokenizer()(TEXTS[0]).encodings[0], llama)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows,
        hub,
        lambda rows: hub(rows).with_format("torch"),
        lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
        lambda rows: [{name: torch.tensor(value)[None] for name, value in row.items()} for row in rows],
        lambda rows: DataLoader(MapStyle([{k: torch.tensor(v) for k, v in row.items()} for row in rows])),
    ],
)
def test_masks_and_labels_of_token_ids_are_kept(llama, make):
    rows = [
        {"input_ids": [9, 10, 11, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 10, 11, -100]},
        {"input_ids": [12, 13, 14, 15], "attention_mask": [1, 1, 1, 1], "labels": [-100, -100, 14, -100]},
    ]
    batches = load(make(rows), llama)
    for name in rows[0]:
        assert torch.cat([batch[name] for batch in batches]).tolist() == [row[name] for row in rows]
    assert batches.tokens == 7
    assert sum(len(predictions(llama, batch)[1]) for batch in batches) == 3


def test_tokenised_rows_of_a_file(llama, tmp_path):
    hub([{"input_ids": row, "text_id": 1} for row in IDS.tolist()]).to_parquet(tmp_path / "ids.parquet")
    assert torch.equal(load(tmp_path / "ids.parquet", llama, batch_size=3).batches[0]["input_ids"], IDS)


def test_tokenised_rows_of_a_classifier(classifier):
    rows = hub([{"input_ids": row[:4], "label": 1} for row in IDS.tolist()])
    (batch,) = load(rows, classifier)
    assert torch.equal(batch["input_ids"], IDS[:, :4]) and batch["labels"].tolist() == [1, 1, 1]
    with pytest.raises(BadData, match="have no labels"):
        load([{"input_ids": [8, 9]}], classifier)
    with pytest.raises(BadData, match="item 0 of the data has labels"):
        load([{"input_ids": [8, 9], "labels": 1}], tiny("llama"))


def test_a_masked_language_model_is_given_something_to_predict(bert):
    tokenizer = word_tokenizer(wrap=True)
    long = [words(40, start=i) for i in range(8)]
    encoded = tokenizer([*long, words(10)], padding=True, return_tensors="pt")
    (batch,) = load(encoded, bert, tokenizer)
    chosen = batch["labels"] != -100
    assert 0 < chosen.sum() < chosen.numel() / 4
    assert torch.equal(torch.where(chosen, batch["labels"], batch["input_ids"]), encoded["input_ids"])
    assert not (chosen & (encoded["attention_mask"] == 0)).any()
    rows = [{"input_ids": row[:8].tolist(), "attention_mask": [1, 1, 1, 1, 1, 0, 0, 0]} for row in IDS] * 20
    (batch,) = load(rows, bert, word_tokenizer(), batch_size=100)
    chosen = batch["labels"] != -100
    assert chosen[:, :5].any() and not chosen[:, 5:].any()
    (batch,) = load([{"input_ids": [7, 8, 9], "labels": [-100, 8, -100]}], bert, tokenizer)
    assert batch["labels"].tolist() == [[-100, 8, -100]]


def test_images_of_a_data_set(tmp_path):
    vit, pixels = tiny("vit"), torch.randn(3, 3, 32, 32)
    rows = [{"pixel_values": image, "label": number} for number, image in enumerate(pixels)]
    for data in (rows, MapStyle(rows), {"pixel_values": pixels, "labels": torch.arange(3)}):
        (batch,) = load(data, vit)
        assert torch.equal(batch["pixel_values"], pixels) and batch["labels"].tolist() == [0, 1, 2]
    image = pytest.importorskip("PIL.Image")
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    pictures = [image.new("RGB", (40, 50), (70 * i, 10, 200)) for i in range(3)]
    (batch,) = load([{"image": one, "label": 1} for one in pictures], vit, processor=processor)
    assert torch.equal(batch["pixel_values"], processor(images=pictures, return_tensors="pt")["pixel_values"])


# What is refused, by its name

MASKED = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "the data is None"),
        (TEXTS[0].encode(), "the data is bytes; decode"),
        ([TEXTS[0].encode()], "item 0 of the data is bytes"),
        ([TEXTS[0], None], "item 1 of the data is None"),
        (set(TEXTS), "the data is a set, which has no order"),
        (7, "cannot be read from a int"),
        (object(), "cannot be read from a object"),
        ([7, 8, 9], "item 0 of the data is a number: one sequence of token ids is given in a list"),
        (torch.arange(9), r"the shape of the data is \(9,\)"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"the shape of the data is \(2, 3, 4\)"),
        ([[[[7, 8]]]], "nested too deeply"),
        (torch.rand(2, 3), "a torch.float32 tensor .*pixel_values"),
        (torch.ones(2, 3, dtype=torch.bool), "a torch.bool tensor"),
        (np.random.rand(2, 3), "a torch.float64 tensor"),
        ([torch.rand(3)], "item 0 of the data is a torch.float32 tensor"),
        ([TEXTS[0].split()], "a list of 5 strings: give each text as one string"),
        (TensorDataset(IDS, IDS), "a tuple of 2 tensors that have no names: give dicts"),
        (MASKED.values(), "item 1 of the data has an attention mask"),
        ((MASKED["input_ids"], MASKED["attention_mask"].numpy()), "item 1 of the data has an attention mask"),
        ({"a": [[7, 8], [9]], "b": [[1, 1], [1]]}.values(), "item 1 of the data has an attention mask"),
        (zip([[7, 8], [9]], [[1, 1], [1]], strict=True), "item 0 of the data has an attention mask"),
        ([list(MASKED.values())], "item 0 of the data"),
        ({}, "the dict is empty"),
        ({"text": TEXTS, "label": [1]}, "one entry an example, but their lengths are"),
        ({"train": Batches([{"input_ids": IDS}])}, r"a dict of data sets \('train'\); give one .* as data\['train'\]"),
        ([{"input_ids": [7, 8]}, {"text": "w1"}], "item 1 of the data has no `input_ids`"),
        ([{"input_ids": [7, 8]}, {"input_ids": [7, 8], "labels": [7, 8]}], "item 1 .* but the first has 'input_ids'"),
        ([{"input_ids": ["w1", "w2"]}], "`input_ids` should hold numbers, not a list of str"),
        ({"input_ids": torch.rand(2, 3)}, "should hold integer token ids, and are torch.float32"),
        ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, "differ in shape"),
        ({"input_ids": IDS, "labels": IDS + 60}, "the label 67 is no token"),
        ([{"role": "user", "content": "w1"}], "a conversation is given in a list"),
    ],
)  # fmt: skip
def test_refused_by_name(llama, data, message):
    with pytest.raises(BadData, match=message):
        load(data, llama, word_tokenizer())


def test_open_files_and_splits_are_refused(llama, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text(TEXTS[0])
    with (tmp_path / "a.txt").open() as file, pytest.raises(BadData, match="is an open file; give its path"):
        load(file, llama, word_tokenizer())
    splits = datasets.DatasetDict(train=hub([{"text": "w1"}]), test=hub([{"text": "w2"}]))
    for data in (splits, datasets.IterableDatasetDict(train=splits["train"].to_iterable_dataset())):
        with pytest.raises(BadData, match=r"a dict of data sets \('train'.*data\['train'\]"):
            load(data, llama, word_tokenizer())


# Padding that the embedding does not know


def test_padding_beyond_the_embedding_is_not_read(llama):
    tokenizer = word_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCABULARY
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids = encoded["input_ids"].clone()
    (batch,) = load(encoded, llama, tokenizer)
    assert torch.equal(encoded["input_ids"], ids)  # what the user holds is not changed
    real = encoded["attention_mask"] == 1
    assert torch.equal(batch["input_ids"][real], ids[real]) and (batch["input_ids"][~real] == 0).all()
    (scored,) = load({**encoded, "labels": ids}, llama, tokenizer)
    assert (scored["labels"][~real] == -100).all() and torch.equal(scored["labels"][real], ids[real])
    assert len(predictions(llama, batch)[1]) == len(predictions(llama, scored)[1]) == 4 + 3 + 2
    with pytest.raises(BadData, match="go from 7 to 64, but the model's embedding has 64 rows"):
        load({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, llama)
    with pytest.raises(BadData, match="embedding has 64 rows"):
        load({"input_ids": ids}, llama)


def test_hidden_tokens_are_not_replaced_by_tokens_beyond_the_embedding(bert):
    tokenizer = word_tokenizer(wrap=True)
    tokenizer.add_tokens([f"more{i}" for i in range(200)])
    batches = load([words(4000)], bert, tokenizer, sequence_length=64)
    assert max(flat(batches)) < VOCABULARY


# Questions


FACT = {"prompt": "{} lives in", "subject": "Ada", "answer": "London"}
QUESTION = {"question": "Who", "options": ["one", "two"], "answer": 1}


def test_questions_of_every_container():
    wanted = load_facts([FACT, FACT])
    for data in (pd.DataFrame([FACT, FACT]), hub([FACT, FACT]), {key: [value] * 2 for key, value in FACT.items()}):
        assert load_facts(data) == wanted
    assert load_facts(FACT) == wanted[:1]
    mixed = [FACT, FACT | {"new_answer": "Paris", "paraphrases": ["Ada is in"]}]
    missing = {"new_answer": None, "paraphrases": None}
    for data in (pd.DataFrame(mixed), hub([FACT | missing, mixed[1]])):  # NaN and None where a column is missing
        assert load_facts(data) == load_facts(mixed)
    passage = {"prompt": "a", "answer": "b"}
    assert load_passages(pd.DataFrame([passage])) == load_passages([passage])
    asked = load_choices([QUESTION])
    for data in (pd.DataFrame([QUESTION]), hub([QUESTION]), hub([QUESTION]).to_pandas()):
        assert load_choices(data) == asked
    concept = {"prompt": "a", "target": "english", "words": {"english": "dog", "german": ["Hund", "Dogge"]}}
    assert load_concepts(concept) == load_concepts([concept])
    assert load_concepts([concept | {"words": concept["words"] | {"french": None}}]) == load_concepts([concept])


def test_one_string_is_not_taken_for_its_letters():
    assert load_facts([FACT | {"paraphrases": "Ada is in"}])[0].paraphrases == ("Ada is in",)
    with pytest.raises(BadData, match="not the one string 'AB'"):
        load_choices([QUESTION | {"options": "AB"}])
    model = tiny("llama")
    assert [matrix.path for matrix in Anatomy(model).matrices("down")] == [
        matrix.path for matrix in Anatomy(model).matrices(["down"])
    ]
    with pytest.raises(TransectError, match=r"unknown matrix roles \['qk'\]"):
        Anatomy(model).matrices("qk")
    assert claims("svd-llm") == claims(["svd-llm"])
    assert inspect(model, "spectra").keys() == {"spectra"}


def test_one_method_and_one_size_are_compared(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("transect.evaluation.measure_speed", lambda model: Speed(1.0, 1.0))
    frame = compare(llama, "svd", 0.5, IDS, IDS, tmp_path / "run")
    assert list(frame["method"]) == ["dense", "svd"]


def test_options_by_their_letters():
    assert load_choices([QUESTION | {"options": {"A": "one", "B": "two"}}]) == load_choices([QUESTION])
    for options in ({"text": ["one", "two"], "label": ["A", "B"]}, {"B": "one", "A": "two"}):
        with pytest.raises(BadData, match="options in a dict go by their letters, A, B"):
            load_choices([QUESTION | {"options": options}])
    for answer in ("C", 2, -1, 1.5, None):
        with pytest.raises(BadData, match="none of the 2 options"):
            load_choices([QUESTION | {"answer": answer}])


@pytest.mark.parametrize("loader", [load_facts, load_choices, load_passages, load_concepts])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "is None"),
        (b"facts.json", "is bytes"),
        ({"a", "b"}, "is a set"),
        (7, "cannot be read from a int"),
        (["facts"], "entry 0 of the .* cannot be used: a dict is expected, not a str"),
    ],
)
def test_questions_refused_by_name(loader, data, message):
    with pytest.raises(BadData, match=message):
        loader(data)
