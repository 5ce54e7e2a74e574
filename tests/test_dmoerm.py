"""Rewards from preferences (DMoERM): loss and accuracy, the three phases, routing, the folder, best of n."""

import copy
import itertools
import json
import math
import random
from dataclasses import asdict

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY, tiny
from transect.cli import main_group
from transect.data import Preference, load_preferences
from transect.data.encoded import padded, pair_batches
from transect.errors import BadCheckpoint, BadData, TransectError
from transect.preference import (
    RewardModel,
    Settings,
    best_of_n,
    curve,
    judged,
    last_states,
    pair_accuracy,
    pairwise_loss,
    phases,
    sampler,
    train_reward_model,
)  # fmt: skip
from transect.preference.arranged import arranged
from transect.preference.scorer import Scorer, adapter_of, states_of
from transect.training import Machine, State

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
QUICK = Settings(rank=4, alpha=4, batch_size=4, lr=1e-3, router_lr=3e-3, aspect_lr=3e-3, steps=2, every=1)


def words():
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, "w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def text(generator, count, low=10):
    return "".join(f" w{generator.randrange(low, VOCABULARY)}" for _ in range(count))


def preferences(prompts=8):
    """Two categories, each with its own first word, of two and of no aspects."""
    generator, made = random.Random(0), []
    for category, aspects in (("a", (None, "x", "y.z")), ("b", (None,))):
        for aspect, _ in itertools.product(aspects, range(prompts)):
            prompt = f"w{4 if category == 'a' else 5}" + text(generator, 2)
            answers = text(generator, 3), text(generator, 5)
            made.append(Preference(prompt, *answers, category, aspect))
    return made


def batch(rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return padded([torch.randint(3, VOCABULARY, (4 + row % 3,), generator=generator) for row in range(rows)])


def scorer(name="llama", aspects=("x", "y"), roles=("q", "v")):
    torch.manual_seed(0)
    made = Scorer(tiny(name)).eval()
    made.add_aspects(aspects, roles, LORA)
    made.add_aggregator()
    return made


def moved(module_parameters):
    """The same parameters, no longer where they began: a LoRA's B is zero there."""
    with torch.no_grad():
        for parameter in module_parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def test_loss_of_a_pair():
    better, worse = torch.randn(2, 9, dtype=torch.float64).unbind()
    better.requires_grad_(True)
    loss = pairwise_loss(better, worse)
    torch.testing.assert_close(pairwise_loss(better + 7, worse + 7), loss)
    torch.testing.assert_close(pairwise_loss(worse, better), -(1 - (better - worse).sigmoid()).log())
    (slope,) = torch.autograd.grad(loss.sum(), better)
    torch.testing.assert_close(slope, -(1 - (better - worse).sigmoid()))
    assert pairwise_loss(worse, worse).tolist() == [pytest.approx(math.log(2))] * 9
    assert pairwise_loss(torch.tensor(-2000.0), torch.tensor(0.0)).item() == 2000  # where σ is 0


def test_a_tie_is_wrong_and_the_reversed_order_makes_a_into_1_minus_a():
    better, worse = torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([0.0, 4.0, 1.0, 2.0])
    assert pair_accuracy(better, worse) == 0.75 and pair_accuracy(worse, better) == 0.25
    assert pair_accuracy(better, better) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_padding_changes_no_state(name):
    model = tiny(name)
    rows = [torch.randint(3, VOCABULARY, (length,)) for length in (3, 5)]
    alone = torch.cat([states_of(model, {"input_ids": row[None]}) for row in rows])
    for left, right in ((0, 0), (0, 4), (3, 0), (2, 1)):
        plain = padded(rows)
        if left:  # all padding of a row on its left
            plain = {name: torch.stack([row.roll(5 - int(mask.sum())) for row, mask in
                                        zip(tensor, plain["attention_mask"], strict=True)])
                     for name, tensor in plain.items()}  # fmt: skip
        wide = {name: functional.pad(tensor, (left, right)) for name, tensor in plain.items()}
        torch.testing.assert_close(states_of(model, wide), alone, rtol=1e-4, atol=1e-5)
    hidden = torch.arange(12.0).view(2, 3, 2)
    assert last_states(hidden, torch.tensor([[0, 1, 0], [1, 1, 1]])).tolist() == [[2, 3], [10, 11]]
    assert torch.equal(last_states(hidden, None), hidden[:, 2])


def test_phase_2_starts_at_phase_1_and_one_aspect_is_plain_lora():
    made, given = scorer(), batch()
    base = made.base_rewards(given)
    assert base.shape == (6,)
    assert all(torch.equal(made.aspect_rewards(given, number), base) for number in range(2))
    torch.manual_seed(3)
    moved(made.aspect_parameters(1).values())
    assert torch.equal(made.base_rewards(given), base) and torch.equal(made.aspect_rewards(given, 0), base)

    plain = tiny("llama")
    paths = [path for path, _ in plain.named_modules() if path.endswith(("q_proj", "v_proj"))]
    wrapped = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=paths))
    state = {name.replace(f".{adapter_of(1)}.", ".default."): tensor for name, tensor in made.peft.state_dict().items()
             if adapter_of(0) not in name}  # fmt: skip
    wrapped.load_state_dict(state)
    expected = made.aspect_heads[1](states_of(plain.eval(), given)).squeeze(-1)
    torch.testing.assert_close(made.aspect_rewards(given, 1), expected)
    assert not torch.allclose(expected, base)


def test_each_phase_asks_its_own_numbers_for_gradients_and_no_other():
    made, machine = scorer(aspects=("x", "y", "z")), Machine("cpu")
    width, count = made.head.in_features, 3
    batches = pair_batches([pair for pair in preferences() if pair.aspect is None][:4], words(), made.backbone, 16, 2)
    problems = {
        "aspect": phases.aspect(made, 1, (batches, batches), machine, "aspect"),
        "aggregator": phases.aggregator(made, (batches, batches), machine, "aggregator"),
        "base": phases.base(made, (batches, batches), machine, "base"),
    }
    numbers = {name: sum(p.numel() for p in one.parameters.values()) for name, one in problems.items()}
    body = sum(p.numel() for n, p in made.backbone.base_model.named_parameters() if "lora_" not in n)
    assert numbers["base"] == body + width + 1
    assert numbers["aspect"] == 3 * 4 * ((32 + 32) + (32 + 16)) + width + 1  # blocks x rank x (q and v), and the head
    assert numbers["aggregator"] == count * width * width + width + 1 + width + 1
    for name, problem in problems.items():
        made.zero_grad(set_to_none=True)
        made.requires_grad_(False)
        problem.set_mode()
        problem.loss(problem.batches[0])[0].backward()
        with_gradient = {id(p) for p in made.parameters() if p.grad is not None}
        assert with_gradient == {id(p) for p in problem.parameters.values()}, name


@pytest.fixture(scope="module")
def trained():
    """Trained once, and to be left as it is."""
    return train_reward_model(tiny("llama"), words(), preferences(), QUICK, machine=Machine("cpu"))


def test_trained_saved_and_loaded_whole(trained, tmp_path):
    reward, pairs, courses = trained, preferences(), trained.training["phases"]
    assert list(courses) == ["a, base", "a, x", "a, y.z", "a, aggregator", "b, base", "router"]
    assert all(course["loss_after"] <= course["loss_before"] for course in courses.values())
    assert reward.scorers[0].aspects == ("x", "y.z") and reward.scorers[1].aggregator is None

    prompts, answers = [pair.prompt for pair in pairs], [pair.better for pair in pairs]
    scores = reward.score(prompts, answers)
    singly = torch.cat([reward.score([p], [a], batch_size=1) for p, a in zip(prompts[::9], answers[::9], strict=True)])
    torch.testing.assert_close(scores[::9], singly, rtol=1e-4, atol=1e-5)
    reward.save(tmp_path / "reward")
    again = RewardModel.load(tmp_path / "reward")
    torch.testing.assert_close(again.score(prompts, answers), scores)
    assert again.route(prompts) == reward.route(prompts) and again.categories == ("a", "b")
    for number in range(2):
        torch.testing.assert_close(
            again.scorers[0].aspect_rewards(batch(), number), reward.scorers[0].aspect_rewards(batch(), number)
        )
    assert (tmp_path / "reward" / "category-0" / "aspect-1" / "adapter_config.json").is_file()
    with pytest.raises(TransectError, match="not empty"):
        reward.save(tmp_path / "reward")
    (tmp_path / "reward" / "category-0" / "heads.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"heads\.safetensors cannot be read"):
        RewardModel.load(tmp_path / "reward")
    with pytest.raises(BadCheckpoint, match="no reward model"):
        RewardModel.load(tmp_path)


def test_only_the_routed_category_is_evaluated(trained):
    pairs, reward = preferences(), copy.deepcopy(trained)
    torch.nn.init.zeros_(reward.router.head.weight)
    reward.router.head.bias.data = torch.tensor([0.0, 1.0])  # everything is of the category b
    prompts, answers = [pair.prompt for pair in pairs], [pair.worse for pair in pairs]
    scores = reward.score(prompts, answers)
    moved(reward.scorers[0].parameters())
    assert torch.equal(reward.score(prompts, answers), scores)
    moved(reward.scorers[1].head.parameters())
    assert not torch.equal(reward.score(prompts, answers), scores)
    calls = []
    reward.scorers[0].forward = lambda batch: calls.append(batch)
    reward.score(prompts, answers)
    assert not calls
    with pytest.raises(TransectError, match="category 'c' is unknown; this reward model has 'a', 'b'"):
        reward.score(["w4"], ["w5"], categories=["c"])
    with pytest.raises(TransectError, match="1 prompts and 2 categories"):
        reward.score(["w4"], ["w5"], categories=["a", "b"])
    with pytest.raises(BadData, match="no prompts and answers"):
        reward.score([], [])


def test_the_order_is_learned_and_the_split_is_the_named_one(tmp_path):
    """An answer that ends in w6 is better: learned from 60 prompts, it holds on others."""
    generator = random.Random(1)
    pairs = [
        Preference(text(generator, 2), text(generator, 2) + " w6", text(generator, 2) + " w7") for _ in range(80)
    ]  # fmt: skip
    parts = arranged(pairs[:60], Settings(held_out=0.2))["all"].base
    assert len(parts[0]) == 48 and len(parts[1]) == 12
    assert not {pair.prompt for pair in parts[0]} & {pair.prompt for pair in parts[1]}
    settings = Settings(lr=3e-3, batch_size=8, epochs=3, held_out=0.2, every=6)
    reward = train_reward_model(tiny("llama"), words(), pairs[:60], settings, machine=Machine("cpu"))
    assert reward.training["phases"]["all, base"]["steps"] == 18 and reward.router is None
    assert reward.accuracy(pairs[60:])["all"] > 0.9
    swapped = [Preference(pair.prompt, pair.worse, pair.better) for pair in pairs[60:]]
    assert reward.accuracy(swapped)["all"] == 1 - reward.accuracy(pairs[60:])["all"]


def test_an_interrupted_training_goes_on_and_the_model_stays_as_it_was(trained, tmp_path):
    model, tokenizer = tiny("llama"), words()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run(state, on_check):
        return train_reward_model(
            model, tokenizer, preferences(), QUICK, machine=Machine("cpu"), state=state, on_check=on_check
        )

    def stop(check):
        if check.name == "a, y.z" and check.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(State(tmp_path / "state"), stop)
    seen = []
    resumed = run(State(tmp_path / "state"), lambda check: seen.append((check.name, check.step)))
    assert seen[0] == ("a, y.z", 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    prompts, answers = ["w4 w11", "w5 w12"], [" w13", " w14 w15"]
    for category in "ab":
        assert torch.equal(
            resumed.score(prompts, answers, categories=[category] * 2),
            trained.score(prompts, answers, categories=[category] * 2),
        )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": "p", "better": "x"}, "entry 1 .* no 'worse': a pair needs a winner"),
        ({"prompt": "p", "better": "x", "worse": "x"}, "it has no winner"),
        ({"prompt": "p", "answers": ["x", "y"], "scores": [1, 1]}, "no winner: all of its answers have the score 1"),
        ({"prompt": "p", "answers": [], "scores": []}, "it has 0 answers"),
        ({"prompt": "p", "better": "x", "worse": " "}, "one of its answers is empty"),
        ({"better": "x", "worse": "y"}, "'prompt' is missing"),
        ({"prompt": "p", "better": "x", "worse": "y", "category": "c"}, "category 'c' is unknown; expected 'a', 'b'"),
        ({"prompt": "p", "better": "x", "worse": "y", "category": "a", "aspect": "z"}, "aspect 'z' is unknown"),
    ],
)  # fmt: skip
def test_entries_that_are_refused(entry, message):
    good = {"prompt": "p", "better": "x", "worse": "y", "category": "a"}
    with pytest.raises(BadData, match=message):
        load_preferences([good, entry], categories=["a", "b"], aspects=["x"])


def test_preferences_that_are_read_and_sets_that_are_refused(tmp_path):
    file = tmp_path / "pairs.jsonl"
    ranked = {"prompt": "p", "answers": ["bad", "good", "fair", "also fair"], "scores": [0, 3, 1, 1]}
    lines = [ranked, {"prompt": "q", "chosen": "x", "rejected": "y"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = load_preferences(file)
    assert [(pair.better, pair.worse) for pair in pairs] == [
        ("good", "bad"), ("good", "fair"), ("good", "also fair"), ("fair", "bad"), ("also fair", "bad"), ("x", "y"),
    ]  # fmt: skip
    assert [pair.weight for pair in pairs] == [0.2] * 5 + [1.0]
    for entries, message in [
        ([], "there are no preferences"),
        ([{"prompt": "p", "better": "x", "worse": "y", "category": "a"}, {"prompt": "p", "better": "x", "worse": "y"}],
         "entry 1 of the preferences has no `category`"),
    ]:  # fmt: skip
        with pytest.raises(BadData, match=message):
            load_preferences(entries)
    pairs = preferences()
    for chosen, message in [
        (dict(categories=["a", "b", "c"]), "category 'c' has no data"),
        (dict(aspects=["x", "y.z"]), "aspect 'x' has no data in the category 'b'"),
    ]:
        with pytest.raises(BadData, match=message):
            arranged(pairs, Settings(), **chosen)
    with pytest.raises(TransectError, match=r"rank=17 is above 16, the largest for .*v_proj"):
        train_reward_model(tiny("llama"), words(), pairs, Settings(rank=17), on_check=pytest.fail)
    with pytest.raises(BadData, match="b: 1 prompt is left where two are needed"):
        arranged([pair for pair in pairs if pair.category == "a" or pair == pairs[-1]], Settings())


def test_a_judge_that_goes_by_the_order_is_not_heard():
    asked = [("p", "aa", "b"), ("p", "c", "dd"), ("p", "e", "f")]
    found, share = judged(asked, lambda prompt, one, two: len(one) > len(two), category="a", aspect="length")
    assert [(pair.better, pair.worse) for pair in found] == [("aa", "b"), ("dd", "c")] and share == pytest.approx(2 / 3)
    assert judged(asked, lambda prompt, one, two: True, category="a") == ([], 0)


def test_best_of_n_and_its_curve():
    generator = torch.Generator().manual_seed(0)
    proxy, true = torch.randn(2, 3, 6, generator=generator).unbind()
    points = curve(proxy, true, [1, 2, 4, 6])
    for point in points:
        picked = [
            (row[list(places)].max(), real[places[int(row[list(places)].argmax())]])
            for row, real in zip(proxy, true, strict=True)
            for places in itertools.combinations(range(6), point.n)
        ]
        assert point.proxy == pytest.approx(sum(p.item() for p, _ in picked) / len(picked))
        assert point.true == pytest.approx(sum(t.item() for _, t in picked) / len(picked))
        assert point.kl == pytest.approx(math.log(point.n) - 1 + 1 / point.n)
    with pytest.raises(TransectError, match="best of 7 cannot be taken from 6"):
        curve(proxy, true, [7])

    model, tokenizer = tiny("llama"), words()
    sample = sampler(model, tokenizer, new_tokens=4)
    length = lambda prompts, answers: torch.tensor([float(len(set(answer.split()))) for answer in answers])  # noqa: E731
    answer, rewards = best_of_n(length, "w4 w5", sample, 5)
    answers = sample("w4 w5", 5)
    assert answer == answers[int(rewards.argmax())] and len(set(answers)) > 1


def test_the_command(tmp_path):
    """Trains, judges and writes; what is written says the same in Python."""
    tiny("llama").save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in preferences(4)))
    model, pairs, out = (str(tmp_path / name) for name in ("model", "pairs.jsonl", "reward"))
    line = ["prefer", model, "--data", pairs, "--eval", pairs, "--rank", "4", "--steps", "1", "--out", out, "--json"]
    said = CliRunner().invoke(main_group, line, catch_exceptions=False)
    told = json.loads(said.stdout)
    assert told["phases"]["a, x"]["steps"] == 1 and told["settings"]["rank"] == 4
    reward = RewardModel.load(out)
    assert reward.accuracy(preferences(4)) == told["accuracy"]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "pairs.jsonl", "reward"}
