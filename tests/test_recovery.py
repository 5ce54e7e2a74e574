"""The repair after compression: what it changes, what it leaves alone, and that it goes on where it stopped."""

import copy
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import transect
from transect.anatomy import Anatomy
from transect.cli import main_group
from transect.data import Batches, load
from transect.data.split import share, split
from transect.errors import BadData, TransectError
from transect.evaluation.loss import evaluate_loss
from transect.operators import Bank, Operator, Shared
from transect.recovery import Machine, Settings
from transect.recovery.trained import changed_parameters
from transect.training.loop import Problem, _gradients
from transect.training.objectives import distance_from, own_loss
from transect.training.schedule import Schedule
from transect.training.stepper import Stepper

from .models import CONFIGS, VOCABULARY, assert_same_model, inputs, logits, tiny

HOW = ["lora", "full", "distill", "blocks"]
FAST = dict(lr=1e-2, epochs=2, device="cpu")


def text(sequences=40, length=12):
    """Sequences that go up by 5 from any start: easy to learn."""
    start = torch.randint(0, 61, (sequences, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(length) * 5) % 61 + 3


DATA = text()
HELD_OUT = DATA[36:]  # the last tenth


@pytest.fixture(scope="module")
def dense():
    """A tiny model that has learned the text; not to be changed."""
    return transect.recover(tiny("llama"), DATA, "full", **{**FAST, "epochs": 8})


@pytest.fixture
def small(dense):
    return transect.compress(copy.deepcopy(dense), "svd", 0.5)


def history(model):
    return Anatomy(model).record.history[-1]


def held_out_loss(model):
    return evaluate_loss(model, load(HELD_OUT, model)).loss


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def described(model):
    """Everything about a model but its numbers."""
    return (
        str(model),
        Anatomy(model).record.modules,
        [(n, p.requires_grad, p.shape) for n, p in model.named_parameters()],
    )


def needed(how, dense):
    return {"teacher": dense} if how in ("distill", "blocks") else {}


@pytest.mark.parametrize("how", HOW)
def test_every_repair_lowers_the_held_out_loss_and_keeps_the_structure(how, dense, small, tmp_path):
    before, teacher, structure = held_out_loss(small), weights(dense), described(small)
    noise = torch.random.get_rng_state()
    shown = []
    assert transect.recover(small, DATA, how, **needed(how, dense), **FAST, on_check=shown.append) is small
    assert torch.equal(noise, torch.random.get_rng_state())
    assert described(small) == structure and not small.training and equal(weights(dense), teacher)
    assert all(parameter.grad is None for parameter in small.parameters())
    noted = history(small)
    assert noted["loss_before"] == pytest.approx(before, rel=1e-5)
    assert noted["loss_after"] == pytest.approx(held_out_loss(small), rel=1e-5)
    assert noted["loss_after"] < 0.9 * before and noted["kept"] != "start"
    trainings = 3 if how == "blocks" else 1
    assert noted["steps"] == trainings * 10 and noted["tokens"] == trainings * 2 * 36 * 12 and noted["seconds"] > 0
    assert [[c.step, c.loss, c.held_out] for c in shown] == [check for checks in noted["checks"] for check in checks]
    json.dumps(noted)
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_same_model(again, small, {"input_ids": DATA})
    assert history(again)["recover"]["how"] == how
    generated = again.generate(DATA[:2, :4], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[:, -1], logits(again, {"input_ids": generated[:, :-1]})[:, -1].argmax(-1))


@pytest.mark.parametrize("how", HOW)
def test_an_interrupted_repair_goes_on_bit_for_bit(how, dense, small, tmp_path):
    options = dict(needed(how, dense), **FAST, every=2, batch_size=4, accumulate=2)
    if how != "full":
        options["train"] = "lora"  # with dropout, so that random numbers matter
    small = small.to(torch.bfloat16) if how == "full" else small  # with copies in float32
    interrupted = copy.deepcopy(small)
    transect.recover(small, DATA[:12], how, **options)
    place, seen = tmp_path / "unfinished", []

    def stop(check):
        seen.append(check)
        if len(seen) == (3 if how == "blocks" else 1):  # in the middle, in the blocks of the second one
            raise KeyboardInterrupt

    start = copy.deepcopy(interrupted)
    with pytest.raises(KeyboardInterrupt):
        transect.recover(interrupted, DATA[:12], how, **options, checkpoint=place, on_check=stop)
    assert str(interrupted) == str(start)  # no adapter is left in it
    files = {path.name for path in place.iterdir()}
    assert files == {".transect", "state.safetensors"} | ({"block-00000.safetensors"} if how == "blocks" else set())
    more = []
    transect.recover(start, DATA[:12], how, **options, checkpoint=place, on_check=more.append)
    assert equal(weights(start), weights(small)) and not place.exists()
    assert [*seen, *more][-1].step == 4 and len(more) + len(seen) == sum(map(len, history(small)["checks"]))
    first, second = ({k: v for k, v in history(m).items() if k != "seconds"} for m in (small, start))
    assert first == second


def test_another_repair_starts_over_and_other_folders_are_refused(small, tmp_path):
    def stop(check):
        raise KeyboardInterrupt

    alone, other = copy.deepcopy(small), copy.deepcopy(small)
    with pytest.raises(KeyboardInterrupt):
        transect.recover(other, DATA, "full", **FAST, checkpoint=tmp_path / "a", on_check=stop)
    other = copy.deepcopy(small)
    transect.recover(other, DATA, "full", **FAST, steps=3, checkpoint=tmp_path / "a")
    transect.recover(alone, DATA, "full", **FAST, steps=3)
    assert equal(weights(alone), weights(other))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(TransectError, match="not an unfinished repair"):
        transect.recover(small, DATA, "full", checkpoint=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_held_out_sequences_are_never_trained_on(small):
    trained, judged = set(), set()

    def watch(module, args, kwargs):
        (trained if torch.is_grad_enabled() else judged).update(tuple(row.tolist()) for row in kwargs["input_ids"])

    small.register_forward_pre_hook(watch, with_kwargs=True)
    transect.recover(small, DATA, "full", **FAST)
    assert trained == {tuple(row.tolist()) for row in DATA[:36]} and judged == {tuple(row.tolist()) for row in HELD_OUT}


def test_lora_adds_updates_of_its_rank_to_linear_layers_only():
    model = tiny("llama")
    transect.recover(model, DATA, "lora", **FAST, rank=2)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    changed = set()
    for name, old in weights(tiny("llama")).items():
        update = model.state_dict()[name] - old
        if name.removesuffix(".weight") in linear:
            assert torch.linalg.matrix_rank(update, rtol=1e-4) == 2, name
        if update.any():
            changed.add(name.removesuffix(".weight"))
    assert changed == linear and not Anatomy(model).record.modules
    assert history(model)["trained_parameters"] == sum(2 * sum(model.get_submodule(n).weight.shape) for n in linear)


class Masked(Operator):
    """A matrix with few entries: their values are a parameter, their places a buffer."""

    kind = "test_masked"

    def __init__(self, d_in, d_out, bias):
        super().__init__(d_in, d_out)
        self.values = nn.Parameter(torch.ones(2 * d_out))
        self.register_buffer("places", torch.arange(2 * d_out) * 7 % d_in)
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def to_dense(self):
        rows = torch.arange(self.out_features).repeat_interleave(2)
        return torch.zeros(self.out_features, self.in_features).index_put((rows, self.places), self.values)

    def forward(self, x):
        return functional.linear(x, self.to_dense(), self.bias)

    def describe(self):
        return {"kind": self.kind, "in": self.in_features, "out": self.out_features, "bias": self.bias is not None}


@pytest.mark.parametrize("how", ["lora", "full"])
def test_what_an_operator_holds_itself_is_trained_and_its_places_stay(how):
    model = tiny("gpt2")  # whose dense layers are Conv1D
    matrix = Anatomy(model).blocks[1].mlp.down
    matrix.replace(Masked(matrix.shape[1], matrix.shape[0], bias=True))
    operator, before, structure = matrix.module, weights(model), described(model)
    transect.recover(model, DATA, how, **FAST)
    assert matrix.module is operator and described(model) == structure and history(model)["kept"] != "start"
    same = {name for name, tensor in weights(model).items() if torch.equal(tensor, before[name])}
    held = "transformer.h.1.mlp.c_proj."
    assert held + "values" not in same and held + "places" in same
    assert (held + "bias" in same) == (how == "lora")
    assert ("transformer.h.0.mlp.c_fc.weight" not in same) and ("transformer.h.0.ln_1.weight" in same) == (
        how == "lora"
    )
    assert {"transformer.wte.weight", "transformer.ln_f.weight"} <= same


class Sharing(Shared):
    """A matrix that is a shared one."""

    kind = "test_sharing"
    bias = None

    def forward(self, x):
        return functional.linear(x, self.bank.weight)

    def describe(self):
        return {"kind": self.kind, "in": self.in_features, "out": self.out_features, "owns_bank": self.owns_bank}


def test_numbers_that_blocks_share_are_trained_with_all_but_not_block_by_block():
    model = tiny("llama")
    anatomy, bank = Anatomy(model), Bank(torch.randn(32, 48))
    for i, block in enumerate(anatomy.blocks[:2]):
        block.mlp.down.replace(Sharing(48, 32, "mlp", bank, i == 0))
    shared = "0.mlp.down_proj.bank.weight"
    for how, is_trained in (("lora", True), ("full", True), ("blocks", False)):
        changed = changed_parameters(anatomy, Settings(how=how).resolved())
        assert (shared in changed) == is_trained and "2.mlp.down_proj.weight" in changed


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name):
    model, teacher = tiny(name), tiny(name)
    transect.compress(model, "svd", 0.6)
    structure = described(model)
    batches = [inputs(name, seed=seed) for seed in range(2)]
    if "bert" in name:
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    transect.recover(
        model, batches, "blocks", teacher=teacher, train="lora", device="cpu", lr=1e-2, batch_size=4, steps=1
    )
    assert described(model) == structure
    noted = history(model)
    assert [len(checks) for checks in noted["checks"]] == [1, 1, 1] and noted["loss_after"] <= noted["loss_before"]


def test_a_repair_that_makes_it_worse_is_undone(small):
    before = weights(small)
    transect.recover(small, DATA, "full", **{**FAST, "lr": 3.0}, steps=4)
    noted = history(small)
    assert noted["kept"] == "start" and equal(weights(small), before)
    assert noted["loss_after"] == noted["loss_before"] < min(held_out for _, _, held_out in noted["checks"][0])


def test_a_loss_that_is_not_finite_stops_it_and_the_best_numbers_stay(small):
    losses = [held_out_loss(small)]

    def poison(check):
        losses.append(check.held_out)
        if check.step == 4:
            with torch.no_grad():
                small.model.norm.weight.fill_(float("nan"))

    norm = small.model.norm.weight.clone()
    with pytest.raises(TransectError, match="not finite after 5 steps"):
        transect.recover(small, DATA, "full", **FAST, every=1, on_check=poison)
    with torch.no_grad():
        small.model.norm.weight.copy_(norm)
    assert held_out_loss(small) == pytest.approx(min(losses), rel=1e-5) and min(losses) < losses[0]
    assert not Anatomy(small).record.history[-1].get("recover")


def test_bad_input_is_refused_before_anything_changes(dense, small, tmp_path, monkeypatch):
    before, structure = weights(small), described(small)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    fewer, other = transect.Anatomy(copy.deepcopy(dense)), tiny("llama")
    fewer.drop_block(1)
    other.resize_token_embeddings(VOCABULARY + 8)
    half = copy.deepcopy(small).half()
    for message, options in {
        "how must be 'lora', .* got 'magic'": dict(how="magic"),
        "learns from the dense model": dict(how="distill"),
        "uses no teacher": dict(how="full", teacher=dense),
        "the very model": dict(how="blocks", teacher=small),
        "another vocabulary": dict(how="distill", teacher=other),
        "another task": dict(how="distill", teacher=tiny("bert")),
        "use how='distill'": dict(how="blocks", teacher=fewer.model),
        "trains 'lora'": dict(how="lora", train="full"),
        "steps must be": dict(steps=0),
        "lr must be": dict(lr=-1.0),
        "dropout must be": dict(dropout=1.0),
        "held_out must be": dict(held_out=0.0),
        "exists and is not empty": dict(out=tmp_path / "there"),
        "float16": dict(model=half),
    }.items():
        with pytest.raises(TransectError, match=message):
            transect.recover(options.pop("model", small), DATA, **options)
    for data, message in ((DATA[:1], "none is left"), ([], "empty"), (DATA[:0], "empty"), (DATA + 60, "rows")):
        with pytest.raises(BadData, match=message):
            transect.recover(small, data)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TransectError, match="pip install"):
        transect.recover(small, DATA, "lora")
    assert equal(weights(small), before) and described(small) == structure


def test_the_last_sequences_are_held_out_and_the_others_all_there():
    rows = [torch.full((length,), i) for i, length in enumerate([5, 5, 3, 5, 3, 5, 5, 5, 5, 5])]
    data = Batches([{"input_ids": row[None]} for row in rows])
    training, held_out = split(data, 0.2, 3, seed=0)
    assert [int(row[0]) for batch in held_out for row in batch["input_ids"]] == [8, 9]
    seen = [int(row[0]) for batch in training for row in batch["input_ids"]]
    assert sorted(seen) == list(range(8)) and seen != sorted(seen)
    assert split(data, 0.2, 3, seed=0)[0].fingerprint == training.fingerprint
    parts = [share(training, index, 2) for index in range(2)]
    for batch, *shares in zip(training, *parts, strict=True):
        mine = torch.cat([part["input_ids"] for part in shares if part is not None])
        assert sorted(mine[:, 0].tolist()) == sorted(batch["input_ids"][:, 0].tolist())
    assert share(Batches([{"input_ids": rows[0][None]}]), 1, 2) == [None]


def test_a_step_is_the_mean_over_all_its_predictions_however_it_is_shared_out():
    model = tiny("llama", dtype=torch.float64)
    name = "model.layers.0.mlp.down_proj.weight"
    uneven = Batches([{"input_ids": DATA[:5]}, {"input_ids": DATA[5:7]}, {"input_ids": DATA[7:8, :6]}])
    logits_, labels = zip(*(transect.forward.predictions(model, batch) for batch in uneven), strict=True)
    mean = functional.cross_entropy(torch.cat(logits_), torch.cat(labels))  # over predictions, not over batches
    (expected,) = torch.autograd.grad(mean, model.get_parameter(name))

    def gradient(batches):
        problem = Problem(
            "", {name: model.get_parameter(name)}, batches, lambda batch: own_loss(model, batch), float, model.eval
        )
        gradients, loss = _gradients(problem, [0, 1, 2], Machine("cpu"))
        counted = sum(batch["input_ids"][:, 1:].numel() for batch in batches if batch is not None)
        return gradients[name] * counted, loss * counted, counted

    whole = gradient(share(uneven, 0, 1))
    torch.testing.assert_close(whole[0] / whole[2], expected, rtol=1e-3, atol=1e-6)  # the norms compute in float32
    assert whole[1] / whole[2] == pytest.approx(mean.item(), rel=1e-6)
    parts = [gradient(share(uneven, index, 2)) for index in range(2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-3, atol=1e-4)
    assert parts[0][2] + parts[1][2] == whole[2] and parts[0][1] + parts[1][1] == pytest.approx(whole[1])


def test_distillation_measures_the_divergence(dense, small):
    batch = {"input_ids": DATA[:3]}
    p, q = (logits(model, batch)[:, :-1].double().div(2.0).softmax(-1) for model in (dense, small))
    expected = 4.0 * (p * (p / q).log()).sum()
    with torch.no_grad():
        found, count = distance_from(dense, small, batch, 2.0)
        assert count == 3 * 11 and float(found) == pytest.approx(float(expected), rel=1e-4)
        assert abs(float(distance_from(dense, copy.deepcopy(dense), batch, 1.0)[0])) < 1e-4


def test_steps_in_bfloat16_add_up_and_the_rate_rises_and_falls():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Stepper({"w": parameter}, Schedule(lr=1e-3), 40)
    rates = [Schedule(lr=1e-3).rate(step, 40) for step in range(40)]
    assert max(rates) == rates[2] == 1e-3 and rates[0] == 5e-4 and rates[1:2] == [1e-3] and 0 < rates[-1] < 1e-5
    for step in range(40):
        optimizer.step(step, {"w": torch.full((4,), 0.1)})
    # Adam moves by the rate under a constant gradient; each of these steps is below bfloat16's spacing near 1.
    assert optimizer.masters["w"][0].item() == pytest.approx(1 - sum(rates), abs=1e-5)
    assert parameter[0].item() == pytest.approx(1 - sum(rates), abs=2**-8) and parameter[0] < 1
    again = Stepper({"w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}, Schedule(lr=1e-3), 40)
    again.load({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for one in (optimizer, again):
        one.step(5, {"w": torch.tensor([0.1, 0.2, -0.3, 0.4])})
    assert torch.equal(optimizer.masters["w"], again.masters["w"])


def test_a_step_has_at_most_norm_1():
    steps = []
    for size in (1.0, 1000.0):
        parameter = nn.Parameter(torch.zeros(2))
        optimizer = Stepper({"w": parameter}, Schedule(lr=1e-2), 10)
        optimizer.step(0, {"w": torch.tensor([3.0, 4.0]) * size})
        optimizer.step(1, {"w": torch.tensor([0.3, 0.4])})
        steps.append(parameter.detach().clone())
    torch.testing.assert_close(*steps)


def test_the_command(dense, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    for name, model in (("dense", dense), ("small", small)):
        model.save_pretrained(name)
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(name)
    (tmp_path / "train.txt").write_text(" ".join(f"w{i}" for i in DATA.flatten().tolist()))
    line = ["recover", "small", "--data", "train.txt", "--sequence-length", "12", "--lr", "0.01", "--device", "cpu"]

    def run(*more):
        result = CliRunner().invoke(main_group, [*line, "--out", *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    said = run("a")
    assert "held-out loss" in said.stdout and "lora: step 5/5" in said.stderr and not list(tmp_path.glob(".*"))
    outcome = json.loads(run("b", "--how", "blocks", "--teacher", "dense", "--train", "lora", "--json").stdout)
    assert outcome["loss_after"] < outcome["loss_before"] and outcome["out"] == "b"
    assert outcome["recover"]["train"] == "lora" and outcome["trained_parameters"] > 0
    again = AutoModelForCausalLM.from_pretrained("b")
    assert held_out_loss(again) == pytest.approx(outcome["loss_after"], rel=1e-5)
    assert [entry.get("recover", {}).get("how") for entry in Anatomy(again).record.history][-2:] == [None, "blocks"]
    with pytest.raises(TransectError, match="--teacher"):
        main_group([*line, "--out", "c", "--how", "distill"], standalone_mode=False)
    with pytest.raises(TransectError, match="not empty"):
        main_group([*line, "--out", "a"], standalone_mode=False)
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"v{i}": i for i in range(VOCABULARY)}, unk_token="v0"))
    )
    changed.save_pretrained("dense")
    with pytest.raises(TransectError, match="another vocabulary"):
        main_group([*line, "--out", "c", "--how", "distill", "--teacher", "dense"], standalone_mode=False)
