import copy
import itertools

import pytest
import torch
from transformers import AutoModelForImageClassification

import transect
from tests.models import apart, assert_alike, assert_same_tensors, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.conversion import Plan, convert_anatomy
from transect.conversion.catalog.ia_red2 import _judged, _learned, decided, heat_map, reward, tokens_of
from transect.errors import TransectError
from transect.parts import build_model, insert
from transect.parts.catalog.ia_red2 import Interpreter

NAMES = ["vit", "deit"]


def converted(name="vit", dtype=torch.float32, spread=3.0, **settings):
    """A tiny model whose interpreters differ from patch to patch so much that some are dropped, some kept."""
    model, _ = convert_anatomy(Anatomy(tiny(name)), Plan("ia-red2", settings))
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, Interpreter):
            module.query.weight.data = torch.randn_like(module.query.weight) * spread
            module.query.bias.data.zero_()
    return model.to(dtype).eval()


def trained_mode(model):
    model.eval()
    for module in model.modules():
        if hasattr(module, "slot"):
            module.train()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_at_threshold_0_it_is_the_model_as_it_was(name):
    batch = inputs(name)
    before = logits(tiny(name), batch)
    for groups in (3, 2):
        model = converted(name, threshold=0.0, groups=groups)
        assert apart(logits(model, batch), before) < 1e-5
        assert apart(logits(trained_mode(model), batch), before) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_taken_out_is_as_hidden_in_a_batch_and_alone(name):
    model, batch = converted(name, torch.float64), inputs(name, batch=6, dtype=torch.float64)
    gathered, decisions = decided(model, batch)
    assert len({int(one) for one in decisions[0].kept.sum(1)}) > 1  # different counts in one batch
    assert 0 < decisions[-1].kept.double().mean() < 0.9
    with torch.no_grad():
        masked, hidden = decided(trained_mode(model), batch)
    torch.testing.assert_close(gathered, masked, atol=1e-9, rtol=1e-7)
    for one, other in zip(decisions, hidden, strict=True):
        assert torch.equal(one.kept, other.kept) and torch.equal(one.present, other.present)
    model.eval()
    for row in range(6):
        alone = logits(model, {"pixel_values": batch["pixel_values"][row : row + 1]})
        torch.testing.assert_close(alone[0], gathered[row], atol=1e-9, rtol=1e-7)


def test_fewer_positions_go_through_the_blocks():
    model, batch = converted(), inputs("vit", batch=1)
    seen = []
    for block in Anatomy(model).block_list:
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    logits(model, batch)
    kept = [int(one.kept.sum()) + 1 for one in decided(model, batch)[1]]
    assert seen[:3] == kept and kept[-1] < 17


def test_what_was_dropped_cannot_matter():
    model, batch = converted(groups=2), inputs("vit", batch=1)
    decisions = decided(model, batch)[1]
    dropped = (decisions[0].present & ~decisions[0].kept)[0].nonzero()[:, 0]
    assert len(dropped)
    seen = []
    hook = (
        Anatomy(model)
        .block_list[0]
        .layernorm_before.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    )
    logits(model, batch)
    hook.remove()
    assert seen == [int(decisions[0].kept.sum()) + 1]  # taken out, they are not there at all
    part = Anatomy(trained_mode(model)).block_list[0].around.part
    with torch.no_grad():
        expected, inner = decided(model, batch)[0], part._dropped

        def perturbed(x):
            y = inner(x).clone()
            y[:, 1 + dropped] += 5
            return y

        part._dropped = perturbed
        torch.testing.assert_close(decided(model, batch)[0], expected, atol=1e-6, rtol=0)


def test_kept_sets_are_nested_and_one_patch_always_stays():
    for spread, threshold in ((3.0, 0.5), (3.0, 1.0)):
        decisions = decided(converted(spread=spread, threshold=threshold), inputs("vit", batch=4))[1]
        for one, behind in itertools.pairwise(decisions):
            assert torch.equal(one.kept, behind.present)
        for one in decisions:
            assert not bool((one.kept & ~one.present).any()) and bool((one.kept.sum(1) >= 1).all())
        if threshold == 1.0:  # nothing reaches it: the best one stays
            best = decisions[0].scores.argmax(1, keepdim=True)
            assert torch.equal(decisions[0].kept, torch.zeros_like(decisions[0].kept).scatter(1, best, True))


def test_scores_are_of_what_a_patch_holds():
    torch.manual_seed(0)
    interpreter = Interpreter(32, 4).double()
    x = torch.randn(3, 10, 32, dtype=torch.float64)
    scores, order = interpreter(x), torch.randperm(10)
    assert bool(((scores > 0) & (scores < 1)).all())
    torch.testing.assert_close(interpreter(x[:, order]), scores[:, order])
    assert float(scores.detach().mean()) == pytest.approx(0.8, abs=0.03) and float(scores.detach().std()) > 0.01
    assert sum(one.numel() for one in interpreter.parameters()) == 2 * 32 * 32 + 2 * 32 + 32


def test_rewards():
    kept, present = torch.tensor([[True] * 4, [True, True, False, False]]), torch.ones(2, 4, dtype=torch.bool)
    assert reward(kept, present, torch.tensor([True, True]), 0.5).tolist() == [0, 0.75]
    assert reward(kept, present, torch.tensor([False, False]), 0.5).tolist() == [-0.5, -0.5]


def test_the_policy_s_gradient_is_that_of_the_expected_reward():
    """Four patches, sixteen actions: each gradient times its probability, against the mean over draws."""
    model = build_model("vit", hidden=16, blocks=1, heads=2, neurons=16, image=4, patch=2, channels=1, classes=3)
    insert(model, "block", "ia-red2", settings={"groups": 1})
    trained_mode(model)
    generator = torch.Generator().manual_seed(2)
    batch = {"pixel_values": torch.randn(1, 1, 4, 4, generator=generator), "labels": torch.tensor([1])}
    part = Anatomy(model).block_list[0].around.part
    policy = part.interpreter.policy
    with torch.no_grad():
        batch["labels"] = decided(model, batch)[0].argmax(-1)
    scores = []
    hook = part.interpreter.register_forward_hook(lambda module, args, output: scores.append(output))
    exact = torch.zeros_like(policy)
    decided(model, batch, 0)
    chance = scores[-1][0] * 0.8 + (1 - scores[-1][0]) * 0.2
    hook.remove()
    plain = part._chosen
    for action in itertools.product([False, True], repeat=4):
        keep = torch.tensor([action])
        part._chosen = lambda scores, present, keep=keep: (keep, None)
        with torch.no_grad():
            said, found = decided(model, batch, 0)
        gained = reward(found[0].kept, found[0].present, said.argmax(-1) == batch["labels"], 0.5)
        p = torch.where(keep[0], chance, 1 - chance).prod()
        exact += torch.autograd.grad(p, policy, retain_graph=True)[0] * float(gained)
    part._chosen = plain
    torch.manual_seed(0)
    many = {name: tensor.expand(500, *tensor.shape[1:]) for name, tensor in batch.items()}
    draws = []
    for _ in range(8):
        loss, count = _learned(0, 0.5)(model, None, many)
        draws.append(-torch.autograd.grad(loss, policy)[0] / count)
    draws = torch.stack(draws)
    error = draws.std(0) / 8**0.5
    assert ((draws.mean(0) - exact).abs() < 6 * error + 1e-6).all() and exact.abs().max() > 6 * error.max()


def test_actions_that_are_the_greedy_ones_teach_the_policy_nothing():
    model, batch = trained_mode(converted()), inputs("vit", batch=6)
    group = 1
    part = Anatomy(model).block_list[group].around.part
    own = part._chosen

    def greedy(scores, present):
        _, log_probability = own(scores, present)
        return present & (scores >= part.threshold), log_probability

    for chosen, nothing in ((greedy, True), (own, False)):
        part._chosen = chosen
        torch.manual_seed(0)
        batch["labels"] = torch.zeros(6, dtype=torch.long)
        said = decided(model, batch, group)[0].detach()
        batch["labels"] = said.argmax(-1)  # all right, so that the reward is of the patches kept
        loss, _ = _learned(group, 0.5)(model, None, batch)
        entropy = torch.nn.functional.cross_entropy(said, batch["labels"], reduction="sum")
        policy = torch.autograd.grad(loss, part.interpreter.policy)[0]
        assert (abs(float(loss.detach() - entropy)) < 1e-5) == nothing
        assert bool((policy == 0).all()) == nothing


def test_in_a_group_s_turn_nothing_in_front_of_it_and_no_other_interpreter_learns():
    model, batch = trained_mode(converted()), inputs("vit", batch=4)
    loss, count = _learned(1, 0.5)(model, None, batch)
    loss.backward()
    assert count == 4 and tokens_of(model).decisions == [] and tokens_of(model).learning is None
    for name, parameter in model.named_parameters():
        number = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None
        moves = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        if number == 0 or (number == 2 and "interpreter" in name):
            assert not moves, name
        elif number == 1 and name.endswith("interpreter.query.weight"):
            assert moves
    found = decided(model, batch, 1)[1]
    assert torch.equal(found[2].kept, found[2].present)  # those behind keep everything
    assert float(_judged(1, 0.5)(model, None, batch)[0]) >= -4


def test_training_drops_patches_and_the_same_seed_does_the_same():
    data = inputs("vit", batch=16)
    with torch.no_grad():
        data["labels"] = tiny("vit")(data["pixel_values"]).logits.argmax(-1)
    runs = [
        transect.convert(tiny("vit"), "ia-red2", data, steps=24, epochs=12, lr=3e-2, batch_size=8, held_out=0.25)
        for _ in range(2)
    ]
    assert_same_tensors(runs[0].model, runs[1].model)
    assert [stage["name"] for stage in runs[0].outcome["stages"]] == ["group 0", "group 1", "group 2"]
    kept = decided(runs[0].model, data)[1][-1].kept.double().mean()
    plain, _ = convert_anatomy(Anatomy(tiny("vit")), Plan("ia-red2"))
    assert kept < decided(plain, data)[1][-1].kept.double().mean()


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_from_a_folder(name, tmp_path):
    model, batch = converted(name), inputs(name)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert_same_tensors(again, model)
    assert_alike(logits(again, batch), expected)
    assert_alike(logits(copy.deepcopy(model), batch), expected)


def test_heat_maps_are_scores_in_the_places_of_patches():
    model, batch = converted(), inputs("vit")
    first, second = (heat_map(model, batch["pixel_values"], group) for group in (0, 1))
    assert first.shape == second.shape == (2, 4, 4) and not bool(first.isnan().any())
    kept = decided(model, batch)[1][0].kept.unflatten(1, (4, 4))
    assert torch.equal(~second.isnan(), kept) and torch.equal(first >= 0.5, kept)
    with pytest.raises(TransectError, match="none of the 3 groups"):
        heat_map(model, batch["pixel_values"], 3)
    with pytest.raises(TransectError, match="convert it by ia-red2"):
        heat_map(tiny("vit"), batch["pixel_values"])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_other_models_are_refused_before_any_change(name):
    model = tiny(name)
    with pytest.raises(TransectError, match="ViT or DeiT"):
        convert_anatomy(Anatomy(model), Plan("ia-red2"))
    assert_same_tensors(model, tiny(name))


def test_bad_settings():
    for given, said in (({"groups": 4}, "more than the 3 blocks"), ({"threshold": 2}, "threshold"),
                        ({"penalty": -1}, "penalty")):  # fmt: skip
        model = tiny("vit")
        with pytest.raises(TransectError, match=said):
            convert_anatomy(Anatomy(model), Plan("ia-red2", given))
        assert_same_tensors(model, tiny("vit"))
    with pytest.raises(TransectError, match="around block 0 already"):
        convert_anatomy(Anatomy(converted()), Plan("ia-red2"))
    with pytest.raises(TransectError, match="drops positions"):
        insert(tiny("llama"), "block", "ia-red2")
