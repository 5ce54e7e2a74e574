"""Evaluation: exact accounting of what is scored, sizes counted by hand, and speed that is at least a number."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import CAUSAL, CONFIGS, inputs, tiny
from tests.test_data import WORDS, word_tokenizer, words
from transect.anatomy import Anatomy
from transect.data import Batches, load
from transect.errors import BadCheckpoint, BadData, TransectError
from transect.evaluation import (
    checkpoint_bytes,
    evaluate,
    evaluate_loss,
    matrix_bytes,
    measure_speed,
    model_bytes,
    parameters,
    peak_memory,
    run_lm_eval,
    standard_error,
)
from transect.operators.low_rank import LowRank

SHARED = Path(__file__).parents[2] / "shared"


# Loss


def test_loss_of_a_text_is_the_models_own():
    model = tiny("llama", dtype=torch.float64)
    batches = load([words(100)], model, word_tokenizer(), sequence_length=16, batch_size=4)
    result = evaluate_loss(model, batches)
    assert result.tokens == batches.tokens - batches.examples == 100 - 7
    with torch.no_grad():
        rows = [row[None] for batch in batches for row in batch["input_ids"]]
        own = sum(float(model(row, labels=row).loss) * (row.shape[1] - 1) for row in rows) / result.tokens
        hits = sum(int((model(row).logits[:, :-1].argmax(-1) == row[:, 1:]).sum()) for row in rows)
    assert result.loss == pytest.approx(own, rel=1e-5)  # transformers computes its loss in float32
    assert result.perplexity == pytest.approx(math.exp(own), rel=1e-5)
    assert result.accuracy == hits / result.tokens
    assert result.seconds > 0


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_loss_of_other_heads_is_the_models_own(name):
    model = tiny(name)
    if name == "bert":
        batches = load([words(180)], model, word_tokenizer(wrap=True), sequence_length=20, batch_size=10)
    else:
        batches = Batches([inputs(name, batch=6)])
    (batch,) = batches
    result = evaluate_loss(model, batches)
    assert result.tokens == int((batch["labels"] != -100).sum())
    with torch.no_grad():
        assert result.loss == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_padding_is_not_scored():
    model = tiny("llama")
    ids = torch.tensor([[7, 8, 9, 10, 0, 0], [11, 12, 13, 14, 15, 16]])
    padded = evaluate_loss(model, [{"input_ids": ids, "attention_mask": (ids != 0).long()}])
    plain = evaluate_loss(model, load([[7, 8, 9, 10], [11, 12, 13, 14, 15, 16]], model))
    assert padded.tokens == plain.tokens == 8
    assert padded.loss == pytest.approx(plain.loss, rel=1e-5)


def test_a_single_token_has_nothing_to_score():
    model = tiny("llama")
    with pytest.raises(BadData, match="nothing to be predicted"):
        evaluate_loss(model, load([[7]], model))
    assert evaluate_loss(model, load([[7, 8], [9]], model)).tokens == 1


def test_progress_and_mode():
    model = tiny("llama").train()
    seen = []
    evaluate_loss(
        model, load(torch.full((5, 4), 9), model, batch_size=2), lambda items, label: seen.append(label) or items
    )
    assert seen == ["evaluation"]
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_module_that_is_not_finite_is_named(value):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = value
    message = r"the first module whose output is not finite is model\.layers\.1\.mlp\.down_proj$"
    with pytest.raises(TransectError, match=message):
        evaluate_loss(model, [inputs("llama")])


_LARGE = """
import torch, transformers
from transect import Anatomy
from transect.evaluation import evaluate_loss
from transect.statistics import OutputGradientCovariance, collect
rows, length = 1 << 18, 512
model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
    vocab_size=rows, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=length)).eval()
def kfac(ids, fisher):
    collect(Anatomy(model), [{"input_ids": ids}], [OutputGradientCovariance()], fisher=fisher)
def now(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
ids = torch.randint(rows, (1, length))
for run in (
    lambda ids: evaluate_loss(model, [{"input_ids": ids}]), lambda ids: kfac(ids, "empirical"),
    lambda ids: kfac(ids, "sampled"),
):
    run(ids[:, :2])
    before = now("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    run(ids)
    print((now("VmHWM") - before) / (length * rows * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_a_large_vocabulary_does_not_multiply_memory(forks):
    """Peak rise of evaluation and K-FAC in units of the float32 logits, of which there were 2 and 3 at once."""
    rises = [float(line) for line in forks.python(_LARGE).split()]
    assert len(rises) == 3 and max(rises) < 1.5, rises


# Size


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_bytes(name, tmp_path):
    model = tiny(name)
    unique = {tensor.data_ptr(): tensor.numel() for tensor in model.parameters()}
    assert parameters(model) == sum(unique.values())
    model.save_pretrained(tmp_path)
    overhead = checkpoint_bytes(tmp_path) - model_bytes(model)
    assert 0 < overhead < 20_000  # the header
    assert model_bytes(tiny(name, dtype=torch.float16)) <= model_bytes(model) // 2 + 100_000


@pytest.mark.parametrize("name", CONFIGS)
def test_matrix_bytes_of_a_dense_model(name):
    anatomy = Anatomy(tiny(name))
    assert matrix_bytes(anatomy) == 4 * sum(d_out * d_in for d_out, d_in in (m.shape for m in anatomy.matrices()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_matrix_bytes_follow_replacements(name):
    anatomy = Anatomy(tiny(name))
    before = matrix_bytes(anatomy)
    matrix = anatomy.blocks[1].matrix("k")
    d_out, d_in = matrix.shape
    matrix.replace(LowRank.from_factors(torch.randn(d_out, 2), torch.randn(2, d_in), matrix.bias))
    assert matrix_bytes(anatomy) == before - 4 * d_out * d_in + 4 * 2 * (d_out + d_in)


def test_checkpoint_bytes_needs_a_checkpoint(tmp_path):
    with pytest.raises(BadCheckpoint, match="holds no"):
        checkpoint_bytes(tmp_path)


def test_peak_memory_is_in_bytes():
    assert 5e7 < peak_memory() < 1e13  # python with torch takes more than 50 MB


# Speed, and the whole row


@pytest.mark.parametrize("name", CONFIGS)
def test_speed(name):
    speed = measure_speed(tiny(name), batch_size=2, new_tokens=3, repeats=2)
    assert speed.prefill_tokens_per_second > 0
    if name in CAUSAL:
        assert speed.decode_tokens_per_second is not None and speed.decode_tokens_per_second > 0
    else:
        assert speed.decode_tokens_per_second is None


def test_speed_with_dropped_sublayers():
    model = tiny("llama")
    Anatomy(model).blocks[0].attention.drop()
    Anatomy(model).blocks[2].mlp.drop()
    assert measure_speed(model, prompt_tokens=8, new_tokens=3, repeats=1).decode_tokens_per_second


def test_speed_of_a_slow_model_is_the_warm_up(monkeypatch):
    model, calls = tiny("llama"), []
    monkeypatch.setattr("transect.evaluation.speed.BUDGET", 0.0)
    model.register_forward_hook(lambda *_: calls.append(1))
    assert measure_speed(model, new_tokens=50).decode_tokens_per_second
    assert len(calls) == 2  # one prompt, one step


def test_a_row():
    model = tiny("llama")
    row = evaluate(model, load([words(100)], model, word_tokenizer(), sequence_length=16))
    assert list(row) == [
        "loss", "standard_error", "examples", "perplexity", "accuracy", "tokens", "parameters", "bytes",
        "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory", "seconds", "kernels",
    ]  # fmt: skip
    assert json.loads(json.dumps(row)) == row


def test_examples_and_standard_errors():
    model = tiny("llama")
    batches = load([words(100)], model, word_tokenizer(), sequence_length=16, batch_size=4)
    found = evaluate_loss(model, batches)
    alone = [evaluate_loss(model, [{"input_ids": row[None]}]) for batch in batches for row in batch["input_ids"]]
    assert [count for _, count in found.examples] == [one.tokens for one in alone]
    assert [nats for nats, _ in found.examples] == pytest.approx([one.loss * one.tokens for one in alone], rel=1e-5)
    assert sum(nats for nats, _ in found.examples) / found.tokens == pytest.approx(found.loss)
    # of equal lengths it is the textbook's; a pair that differs by a constant has none
    nats = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    examples = [(4 * float(each), 4) for each in nats]
    assert standard_error(examples) == pytest.approx(float(nats.std()) / 3)
    assert standard_error(examples, [(each + 2.0, 4) for each, _ in examples]) == pytest.approx(0, abs=1e-9)
    assert standard_error(examples[:1]) is None
    with pytest.raises(ValueError, match="same examples"):
        standard_error(examples, examples[1:])


# lm-evaluation-harness


def _task(folder: Path) -> None:
    """A multiple-choice task: which word follows."""
    rows = [{"question": words(4, start=i), "choices": [WORDS[i], WORDS[i + 4]], "answer": 1} for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "next_word.yaml").write_text(
        "task: next_word\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )


def _accuracy(model: Any) -> float:
    """The same task scored here: the choice whose token is more likely after the question."""
    tokenizer, hits = word_tokenizer(), 0
    for i in range(6):
        question = torch.tensor([tokenizer(words(4, start=i))["input_ids"]])
        with torch.no_grad():
            scores = model(question).logits[0, -1]
        hits += int(scores[7 + i + 4] > scores[7 + i])
    return hits / 6


def test_lm_eval_on_a_local_task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    _task(tmp_path)
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    results = run_lm_eval(tmp_path / "model", ["next_word"], include_path=tmp_path, batch_size=2)
    assert results["next_word"]["acc,none"] == pytest.approx(_accuracy(model))
    limited = run_lm_eval(model, ["next_word"], word_tokenizer(), include_path=tmp_path, limit=3)
    assert limited["next_word"]["sample_len"] == 3


def test_lm_eval_errors(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    with pytest.raises(TransectError, match="without its tokenizer"):
        run_lm_eval(tiny("llama"), ["next_word"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TransectError, match=r"transect\[lm-eval\]"):
        run_lm_eval(tiny("llama"), ["next_word"], word_tokenizer())


# A model of natural language


def test_novel_llama_has_the_loss_that_its_training_reports():
    folder = SHARED / "models" / "novel-llama"
    if not folder.exists():
        pytest.skip("the shared model is not here")
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = SHARED / "data" / "novels.valid.txt"
    batches = load(text, model, AutoTokenizer.from_pretrained(folder), sequence_length=256, sequences=48)
    stated = json.loads((folder / "training.json").read_text())["held_out_loss_nats_per_token_on_novels.valid.txt"]
    result = evaluate_loss(model, batches)
    assert result.tokens == 48 * 255
    assert result.loss == pytest.approx(stated, abs=0.08)  # over all 566 sequences the difference is 0.0004
