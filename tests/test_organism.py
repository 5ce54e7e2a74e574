"""The bundled model and its world: sizes, splits, tokenizer, training and accuracy."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file

from transect.organism import MODEL_PATH, SKILLS, World, corpus, evaluate, examples, load
from transect.organism.tasks import greedy
from transect.organism.tokenizer import TOKEN
from transect.organism.train import Plan, train
from transect.organism.world import HELD_BACK


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def bundled():
    return load()


@pytest.fixture(scope="module")
def lines():
    return corpus("train", 300_000)


def test_world_is_a_function_of_its_seed(world):
    assert world == World(0)
    assert world.facts != World(1).facts


def test_world_has_its_sizes(world):
    assert len(set(world.entities)) >= 200
    assert len(world.relations) >= 4
    assert len(world.facts) == len(world.entities) * len(world.relations)
    assert all(len(set(r.templates)) >= 3 for r in world.relations)
    assert len(world.passages) >= 100
    assert len({p.number for p in world.passages + world.unseen_passages}) == 2 * len(world.passages)
    assert not {p.words for p in world.passages} & {p.words for p in world.unseen_passages}
    assert len(world.held_out_sums) / 90**2 == pytest.approx(0.1, abs=0.005)


def test_facts_agree_between_languages(world):
    for relation in world.relations:
        assert len(set(relation.objects)) == len(set(relation.objects2)) == len(relation.objects)
    for fact in world.facts:
        place = fact.relation.objects.index(fact.object)
        assert fact.object2 == fact.relation.objects2[place]
        assert fact.answer() == f"{fact.object}." and fact.answer(language=2) == f"{fact.object2}."


def test_the_second_language_shares_only_the_names(world):
    first = {w for r in world.relations for text in r.templates + r.objects for w in TOKEN.findall(text)}
    second = {w for r in world.relations for text in r.templates2 + r.objects2 for w in TOKEN.findall(text)}
    assert {word for word in first & second if word.isalpha()} == set()


def test_held_out_sums_are_never_in_the_corpus(world, lines):
    sums = {(int(a), int(b)) for a, b in re.findall(r"(\d+) \+ (\d+) =", "\n".join(lines))}
    assert len(sums) > 2000
    assert not sums & world.held_out_sums
    assert {tuple(map(int, re.findall(r"\d+", e.prompt))) for e in examples("sums_heldout")} == world.held_out_sums


def test_unseen_passages_are_never_in_the_corpus(world, lines):
    numbers = {int(n) for n in re.findall(r"Record (\d+)", "\n".join(lines))}
    assert len(numbers) > 100 and numbers <= {p.number for p in world.passages}
    text = "\n".join(lines)
    assert not any(" ".join(p.words[i : i + 4]) in text for p in world.unseen_passages for i in range(20))


def test_held_back_wordings_are_never_in_the_corpus(world, lines):
    held_back = {f.prompt(HELD_BACK) for f in world.held_back}
    trained = {f.prompt(HELD_BACK) for f in world.facts if f not in world.held_back}
    prompts = {line.rsplit(" ", 1)[0] for line in lines}
    assert prompts & trained and not prompts & held_back


def test_splits_are_repeatable_and_differ():
    assert corpus("heldout", 5000) == corpus("heldout", 5000)
    lists = [{x for x in corpus(s, 20_000) if x.startswith("List")} for s in ("train", "calibration", "heldout")]
    assert not lists[0] & lists[1] and not lists[0] & lists[2] and not lists[1] & lists[2]
    with pytest.raises(ValueError, match="no split"):
        corpus("test", 10)


def test_the_tokenizer_round_trips_the_corpus(bundled, lines):
    _, tokenizer = bundled
    text = "\n".join(lines)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(ids) + 1 == sum(len(TOKEN.findall(line)) + 1 for line in lines)
    assert None not in (tokenizer.bos_token_id, tokenizer.pad_token_id)
    assert len(tokenizer("37 + 45 = 82.")["input_ids"]) == 9


def test_the_bundled_model_is_small(bundled):
    model, _ = bundled
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert sum(file.stat().st_size for file in MODEL_PATH.iterdir()) <= 8_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in MODEL_PATH.iterdir()
    }
    with safe_open(MODEL_PATH / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_bundled_model_knows_its_world(bundled):
    accuracy = evaluate(*bundled, n=120)
    assert list(accuracy) == list(SKILLS)
    for skill in ("facts", "open_book", "list_recall", "recite_memorised"):
        assert accuracy[skill] >= 0.9, skill
    assert accuracy["sums"] >= 0.8
    assert accuracy["recite_unseen"] <= 0.01


def test_accuracy_does_not_depend_on_the_batch(bundled):
    model, tokenizer = bundled
    model.train()
    skills = ("facts", "list_recall", "sums_heldout")
    assert evaluate(model, tokenizer, skills, 60, batch_size=7) == evaluate(model, tokenizer, skills, 60)
    assert model.training
    model.eval()


def test_greedy_agrees_with_generate(bundled):
    model, tokenizer = bundled
    prompts = tokenizer([e.prompt for e in examples("recite_memorised", 4)], return_tensors="pt")["input_ids"]
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
    assert torch.equal(greedy(model, prompts, 8), expected[:, prompts.shape[1] :])


def test_accuracy_is_that_of_the_whole_answer(world, bundled):
    """A stand-in that answers every sum with its first digit right and the rest wrong gets none."""
    _, tokenizer = bundled

    class Wrong(torch.nn.Module):
        device, config = torch.device("cpu"), SimpleNamespace()

        def forward(self, input_ids, past_key_values, use_cache):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            logits[..., tokenizer.convert_tokens_to_ids("1")] = 1
            return SimpleNamespace(logits=logits, past_key_values=None)

    assert evaluate(Wrong(), tokenizer, ("sums",), n=50) == {"sums": 0.0}


def test_training_resumes_bit_for_bit(tmp_path: Path):
    plan = Plan(steps=6, batch=512, short=3, warmup=2, save_every=2)
    train(tmp_path / "whole", plan)
    train(tmp_path / "parts", plan, stop_after=2)
    assert not (tmp_path / "parts").exists()
    train(tmp_path / "parts", plan)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["parts", "whole"]


def test_a_checkpoint_of_another_plan_or_a_damaged_one_is_not_trained_on(tmp_path: Path):
    plan = Plan(steps=6, batch=128, short=3, warmup=2, save_every=2)
    checkpoint = tmp_path / "a.part" / "state.safetensors"
    train(tmp_path / "a", replace(plan, seed=1), stop_after=2)
    other = checkpoint.read_bytes()
    checkpoint.unlink()
    train(tmp_path / "a", plan, stop_after=2)
    whole = checkpoint.read_bytes()
    expected = load_bytes(whole)
    for content in (other, whole[:-9]):
        checkpoint.write_bytes(content)
        train(tmp_path / "a", plan, stop_after=2)
        found = load_bytes(checkpoint.read_bytes())
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
