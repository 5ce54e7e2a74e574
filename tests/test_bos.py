"""What a sequence begins with: what the tokenizer by itself puts before a text, and what a chat template writes."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

import transect
from tests.models import VOCABULARY, tiny
from tests.test_data import SPECIAL, WORDS, flat, word_tokenizer, words
from transect import Anatomy
from transect.checkpoint import open_model
from transect.cli import main_group
from transect.data import Specimen, load, load_choices
from transect.data.text import cut, specials_of
from transect.editing.catalog.anchored_bias.letters import items_of
from transect.errors import BadCheckpoint, BadData, NotApplicable

BOS, EOS = 1, 2
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}w50"


def bos_tokenizer(after: str = "", **options: Any) -> Any:
    """A token a word, and <bos> before every text."""
    tokenizer = word_tokenizer(**options)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A {after}".strip(), special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


def pieces(*args: Any, **options: Any) -> list[list[int]]:
    return [row.tolist() for batch in load(*args, **options) for row in batch["input_ids"]]


# Text


def test_every_sequence_begins_as_the_tokenizers_texts_do(llama):
    tokenizer = bos_tokenizer()
    assert tokenizer("w0 w1")["input_ids"] == [BOS, 7, 8]
    assert pieces([words(9)], llama, tokenizer, sequence_length=4) == [
        [BOS, 7, 8, 9], [BOS, 10, 11, 12], [BOS, 13, 14, 15]
    ]  # fmt: skip
    assert pieces([words(7)], llama, tokenizer, sequence_length=4)[-1] == [BOS, 13]  # nothing is lost
    assert pieces([words(5)], llama, tokenizer) == [[BOS, 7, 8, 9, 10, 11]]  # a short text is one sequence
    assert pieces([words(1)], llama, tokenizer) == [[BOS, 7]]
    with pytest.raises(BadData, match="has 5 tokens, but one sequence needs 7"):
        load([words(5)], llama, tokenizer, sequence_length=8)


def test_documents_are_joined_by_the_end_token_alone(llama):
    texts = [words(3), words(2, start=20)]
    assert pieces(texts, llama, bos_tokenizer()) == [[BOS, 7, 8, 9, EOS, 27, 28]]
    assert pieces(texts, llama, bos_tokenizer(eos=False)) == [[BOS, 7, 8, 9, BOS, 27, 28]]  # nothing else divides them


def test_what_the_tokenizer_does_not_add_is_not_added(llama):
    assert word_tokenizer().bos_token_id == BOS
    assert pieces([words(4)], llama, word_tokenizer()) == [[7, 8, 9, 10]]
    assert pieces([words(4)], llama, bos_tokenizer(), special_tokens="none") == [[7, 8, 9, 10]]
    bert = tiny("bert")
    (batch,) = load([words(4)], bert, word_tokenizer(wrap=True), special_tokens="none")
    assert batch["input_ids"].shape == (1, 4)
    with pytest.raises(BadData, match="`auto` or `none`, got 'always'"):
        load([words(4)], llama, bos_tokenizer(), special_tokens="always")


def test_an_end_that_the_tokenizer_adds_is_no_end_of_a_cut_sequence(llama):
    tokenizer = bos_tokenizer(after="<eos>")
    assert specials_of(tokenizer) == ([BOS], [EOS])
    assert pieces([words(6)], llama, tokenizer, sequence_length=4) == [[BOS, 7, 8, 9], [BOS, 10, 11, 12]]


def test_special_tokens_are_found_where_a_is_no_token():
    tokenizer = byte_tokenizer(bos=True)
    assert tokenizer("a1.", add_special_tokens=False)["input_ids"] == []
    assert specials_of(tokenizer) == ([BOS], [])
    assert specials_of(byte_tokenizer(bos=False)) == ([], [])


def test_a_stream_is_cut_without_loss_and_without_doubling():
    stream = torch.tensor([BOS, *range(7, 16), BOS, 17, 18, 19, 20], dtype=torch.int32)
    assert [row.tolist() for row in cut(stream, 5, None, False, [BOS])] == [
        [BOS, 7, 8, 9, 10], [BOS, 11, 12, 13, 14], [BOS, 15, BOS, 17, 18], [BOS, 19, 20]
    ]  # fmt: skip
    assert len(cut(stream, 5, None, True, [BOS])) == 3


def test_statistics_are_of_other_tokens(llama):
    with_bos, without = (load([words(40)], llama, bos_tokenizer(), special_tokens=it) for it in ("auto", "none"))
    assert with_bos.fingerprint != without.fingerprint
    assert without.fingerprint == load([words(40)], llama, word_tokenizer()).fingerprint


def test_it_is_said(llama, caplog):
    with caplog.at_level(logging.INFO, "transect"):
        load([words(4)], llama, bos_tokenizer())
        load([words(4)], llama, bos_tokenizer(), special_tokens="none")
        load([words(4)], llama, word_tokenizer())  # nothing to say
    assert caplog.messages == [
        "sequences begin with <bos>, as this tokenizer's texts do",
        "sequences begin with no special token, as was chosen",
    ]


def folder_with(tmp_path: Any, tokenizer: Any) -> str:
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_commands_say_it_once_and_pass_the_option_on(tmp_path):
    model = folder_with(tmp_path, bos_tokenizer())
    (tmp_path / "a.txt").write_text(words(400))
    data = ["--data", str(tmp_path / "a.txt"), "--sequence-length", "16"]
    runs = {
        "eval": ["eval", model, *data],
        "compress": ["compress", model, "--method", "asvd", "--keep", "0.9", *data, "--out", str(tmp_path / "small")],
        "inspect": ["inspect", model, "--probes", "nuclear-norm", *data, "--out", str(tmp_path / "report")],
    }
    for run in runs.values():
        said = CliRunner().invoke(main_group, run)
        assert said.exit_code == 0, said.output
        assert said.stderr.count("sequences begin with <bos>, as this tokenizer's texts do") == 1
    said = CliRunner().invoke(main_group, [*runs["eval"], "--special-tokens", "none", "--json"])
    assert "sequences begin with no special token, as was chosen" in said.stderr
    assert json.loads(said.stdout)["tokens"] == 400 - 25  # 25 sequences of 16 tokens; else 26 of 15 and one of 10
    assert transect.evaluate(model, str(tmp_path / "a.txt"), sequence_length=16)["tokens"] == 400


# Conversations


def test_conversations_are_written_by_the_template(llama, tmp_path):
    tokenizer = chat_tokenizer()
    chats = [
        [{"role": "w1", "content": "w2"}, {"role": "w3", "content": "w4 w5"}],
        [{"role": "w6", "content": "w7"}],
    ]
    ids = [BOS, 8, 9, 10, 11, 12, 57, BOS, 13, 14, 57]  # no end token between them, and one <bos> each
    assert [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats] == [ids[:7], ids[7:]]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"id": "x", "messages": chat}) for chat in chats))
    for data in (path, [{"messages": chat} for chat in chats], {"messages": chats}, chats):
        assert pieces(data, llama, tokenizer) == [ids]
    assert pieces(chats, llama, tokenizer, sequence_length=6) == [
        [BOS, 8, 9, 10, 11, 12], [BOS, 57, BOS, 13, 14, 57]
    ]  # fmt: skip
    shared = [{"conversations": [{"from": "human", "value": "w2"}, {"from": "gpt", "value": "w4"}]}]
    same = [[{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w4"}]]
    assert pieces(shared, llama, tokenizer) == pieces(same, llama, tokenizer)


def test_a_template_without_a_beginning_is_given_one(llama):
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    chats = [[{"role": "user", "content": "w0 w1 w2"}]]
    assert pieces(chats, llama, tokenizer) == [[BOS, 7, 8, 9]]
    assert pieces(chats, llama, tokenizer, special_tokens="none") == [[7, 8, 9]]


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": [{"role": "user", "content": "w1"}]}, None, "no chat template"),
        ({"messages": []}, TEMPLATE, "row 1: .* a list of messages is expected"),
        ({"messages": "w1"}, TEMPLATE, "a list of messages is expected, got str"),
        ({"messages": ["w1"]}, TEMPLATE, "a message is a dict with `role` and `content`, not a str"),
        ({"messages": [{"speaker": "w1"}]}, TEMPLATE, r"and not \['speaker'\]"),
        ({"conversations": [{"from": "cat", "value": "w1"}]}, TEMPLATE, "the speaker 'cat' is none of human"),
        ({"messages": [{"role": "user", "content": None}]}, TEMPLATE, "cannot be written by the chat template"),
        (
            {"messages": [{"role": "user", "content": "w1"}]},
            "{{ raise_exception('roles must alternate') }}",
            "row 1: the conversation cannot be written by the chat template: roles must alternate",
        ),
    ],
)
def test_conversations_that_cannot_be_written(llama, row, template, message):
    with pytest.raises(BadData, match=message):
        load([row], llama, chat_tokenizer(template))


# Prompts and letters


def sentence_tokenizer(bos: bool, *more: tuple[str, str]) -> Any:
    """As SentencePiece writes: a space is ▁, and one stands before every text, so that " A" alone is ▁ and ▁A."""
    merges = [*(("▁", letter) for letter in "ABQxyz"), *more]
    pieces = [*SPECIAL, "▁", *"ABQxyz:,", *map("".join, merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore
    if bos:
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def byte_tokenizer(bos: bool) -> Any:
    """As GPT-2 writes: a space belongs to the word behind it, and nothing stands before a text."""
    letters = ["A", "B", "Q", "x", "y", "z", ":", ",", "Ġ"]
    pieces = [*SPECIAL, *letters, *(f"Ġ{letter}" for letter in "ABQxyz")]
    merges = [("Ġ", letter) for letter in "ABQxyz"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    if bos:
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


CHOICES = [{"question": "Q", "options": ["x", "y"], "answer": 0, "template": "{question}: {options}:"}] * 2


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("make", [sentence_tokenizer, byte_tokenizer])
def test_letters_as_the_tokenizer_writes_them_in_context(llama, make, bos):
    tokenizer = make(bos)
    specimen, choices = Specimen(Anatomy(llama), tokenizer), load_choices(CHOICES)
    items = items_of(specimen, choices)
    mark = "▁" if make is sentence_tokenizer else "Ġ"
    assert tokenizer.convert_ids_to_tokens(items.tokens.tolist()) == [f"{mark}A", f"{mark}B"]
    prompt = items.prompts[0][0]
    whole = tokenizer(f"{choices[0].prompt} A")["input_ids"]
    assert torch.cat([prompt, items.tokens[:1]]).tolist() == whole  # what the model reads if the answer is A
    assert (int(prompt[0]) == BOS) == bos
    assert specimen.continuation("x:", "A y").tolist() == tokenizer("x: A y")["input_ids"][-2:]


def test_a_letter_of_several_tokens_is_refused(llama):
    specimen = Specimen(Anatomy(llama), byte_tokenizer(True))
    with pytest.raises(NotApplicable, match="'AB' is 2 tokens"):
        specimen.single_token("x:", "AB")


def test_an_answer_that_changes_the_prompts_last_token_is_written_as_behind_a_colon(llama):
    tokenizer = sentence_tokenizer(True, (",", "▁A"))
    assert tokenizer.tokenize("x, A") == ["▁x", ",▁A"] and tokenizer.tokenize("x,") == ["▁x", ","]
    specimen = Specimen(Anatomy(llama), tokenizer)
    assert tokenizer.convert_ids_to_tokens(specimen.continuation("x,", "A").tolist()) == ["▁A"]


def test_a_prompt_does_not_end_as_a_text_does(llama):
    specimen = Specimen(Anatomy(llama), bos_tokenizer(after="<eos>"))
    assert specimen.encode("w0 w1").tolist() == [BOS, 7, 8]
    assert specimen.continuation("w0 w1", "w2").tolist() == [9]


def test_an_unused_pad_token_is_no_reason_to_refuse(tmp_path, llama):
    tokenizer = bos_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    opened = open_model(folder_with(tmp_path, tokenizer))
    assert opened.tokenizer.pad_token_id == VOCABULARY
    assert flat(load([words(4)], opened.model, opened.tokenizer)) == [BOS, 7, 8, 9, 10]
    with pytest.raises(BadData, match="go from 1 to 64"):
        load(["w0 [PAD] w1"], opened.model, opened.tokenizer)
    with pytest.raises(BadData, match="has the token 64, but the model's embedding has 64 rows"):
        Specimen(Anatomy(opened.model), opened.tokenizer).encode("w0 [PAD]")
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(BadCheckpoint, match="ids up to 65"):
        open_model(tmp_path / "model")
    assert len(WORDS) + len(SPECIAL) == VOCABULARY


@pytest.mark.parametrize("pad", ["<pad>", "[PAD]"])  # another token than the model's padding, or beyond its embedding
def test_padding_of_a_classifier_is_the_models_own(pad):
    """The classifier of a decoder reads the last token that is not its config's padding."""
    config = tiny("llama").config
    config.num_labels, config.pad_token_id = 2, 50
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    tokenizer = bos_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": pad})
    rows = [{"text": words(3), "label": 0}, {"text": words(6), "label": 1}]
    (batch,) = load(rows, model, tokenizer)
    alone = [load([row], model, tokenizer).batches[0] for row in rows]
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        single = torch.cat([model(input_ids=one["input_ids"]).logits for one in alone])
    torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-5)
