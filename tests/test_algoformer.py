"""AlgoFormer: a trained model with a loop in it, and a loop written down that descends a gradient."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import transect
from transect.anatomy import Anatomy
from transect.conversion import Calibration, conversion_named
from transect.errors import TransectError
from transect.evaluation import parameters
from transect.parts.construction import AlgoFormer, gradient_descent
from transect.tasks import task_named
from transect.tasks.regression import representation

from .models import assert_alike, inputs, logits, saved_and_loaded, tiny

SIZE, EXAMPLES = 4, 12


def converted(name="llama", **settings):
    anatomy = Anatomy(tiny(name))
    conversion_named("algoformer").function(anatomy, Calibration(), **{"loop": "", "times": 2, **settings})
    return anatomy.model


def prompts(size=SIZE, count=3):
    """Inputs with their answers (B x (N + 1) x (d + 1)), float64; the last answer is that of the query."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, EXAMPLES + 1, size, generator=draw, dtype=torch.float64)
    w = torch.randn(count, size, 1, generator=draw, dtype=torch.float64)
    return torch.cat([x, x @ w], dim=-1)


def descended(x, y, rate, times):
    """w after so many steps on the mean of (y - w · x)² / 2, by automatic differentiation."""
    w = torch.zeros(len(x), x.shape[-1], dtype=torch.float64)
    for _ in range(times):
        w.requires_grad_()
        loss = ((y - (x * w[:, None]).sum(-1)) ** 2).mean(1).sum() / 2
        w = (w - rate * torch.autograd.grad(loss, w)[0]).detach()
    return w


def fastest(x):
    """2 / λ_max of each prompt, the smallest."""
    return 2 / float(torch.linalg.eigvalsh(x.mT @ x / x.shape[1])[:, -1].max())


@pytest.mark.parametrize("times", [1, 2, 5, 20])
def test_the_loop_is_gradient_descent(times):
    prompt = prompts()
    x, y = prompt[:, :-1, :-1], prompt[:, :-1, -1]
    rate = 0.5 * fastest(x)
    w = descended(x, y, rate, times)
    made = gradient_descent(SIZE, rate, times)(prompt)
    torch.testing.assert_close(made, (prompt[..., :-1] * w[:, None]).sum(-1), atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_it_comes_to_least_squares_below_the_fastest_rate_and_runs_away_above():
    prompt = prompts()
    x, wanted = prompt[:, :-1, :-1], prompt[:, -1, -1]
    slow, fast = (gradient_descent(SIZE, factor * fastest(x), 1) for factor in (0.9, 1.5))
    # The examples' own squared errors, which descent lowers in every step.
    losses = [float((slow(prompt, t)[:, :-1] - prompt[:, :-1, -1]).square().mean()) for t in (0, 1, 2, 5, 20, 100)]
    assert all(one > other for one, other in pairwise(losses))
    assert (slow(prompt, 600)[:, -1] - wanted).abs().max() < 1e-4  # noise-free, more examples than dimensions
    apart = [float((fast(prompt, times)[:, -1] - wanted).abs().max()) for times in (20, 40, 80)]
    assert apart[0] < apart[1] < apart[2] and apart[2] > 1e3


def test_features_in_front_make_it_descent_in_feature_space():
    prompt = prompts(3)
    features = 6
    x = representation(prompt[..., :-1], features)
    in_space = torch.cat([x, prompt[..., -1:]], dim=-1)
    made = gradient_descent(features, 0.1, 7, lambda x: representation(x, features))
    assert_alike(made(prompt), gradient_descent(features, 0.1, 7)(in_space))


def test_the_answer_of_the_query_is_not_read_and_causal_ones_see_what_is_before_them():
    prompt, other = prompts(), prompts()
    other[:, -1, -1] += 5
    made = gradient_descent(SIZE, 0.1, 5)
    assert torch.equal(made(prompt), made(other))
    other = prompts()
    other[:, 6, -1] += 5  # the position's own answer, and all that comes behind it
    other[:, 7:] = 9.0
    causal = gradient_descent(SIZE, 0.1, 5, causal=True)
    assert torch.equal(causal(prompt)[:, :7], causal(other)[:, :7])
    assert not torch.allclose(causal(prompt)[:, 7], causal(other)[:, 7])
    assert not torch.allclose(made(prompt)[:, :6], made(other)[:, :6])


def test_turns_are_the_same_module_and_nothing_before_or_behind_is_the_plain_loop():
    torch.manual_seed(0)
    pre, loop, post = (nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))
    x = torch.randn(2, 3, 5)
    made = AlgoFormer(pre, loop, post, 3, inject=False)
    assert_alike(made(x), post(loop(loop(loop(pre(x))))))
    assert_alike(made(x, 0), post(pre(x)))
    injected = AlgoFormer(nn.Identity(), loop, nn.Identity(), 2)
    assert_alike(injected(x), loop(loop(x + x) + x))
    assert len(list(AlgoFormer(pre, loop, post, 9).parameters())) == len(list(made.parameters()))


@pytest.mark.parametrize("given", [(0, 0.1, 1), (3, 0.0, 1), (3, 0.1, -1)])
def test_what_means_nothing_is_refused(given):
    with pytest.raises(TransectError, match="size should be"):
        gradient_descent(*given)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3"])
def test_a_trained_model_is_gone_through_in_a_loop(name, tmp_path):
    model = converted(name, times=3)
    by_hand = tiny(name)
    Anatomy(by_hand).arrange([0, 1, 1, 1, 2], tied=False)
    assert_alike(logits(model, inputs(name)), logits(by_hand, inputs(name)))
    assert parameters(model) == parameters(tiny(name))
    again = saved_and_loaded(model, name, tmp_path)
    assert parameters(again) == parameters(model)


def test_no_turn_leaves_the_blocks_around_and_one_leaves_all():
    none = tiny("llama")
    Anatomy(none).drop_block(1)
    assert_alike(logits(converted(times=0), inputs("llama")), logits(none, inputs("llama")))
    assert_alike(logits(converted(times=1), inputs("llama")), logits(tiny("llama"), inputs("llama")))
    assert Anatomy(converted(loop="0-1", times=2)).config_value("blocks") == 5


def test_an_encoder_too():
    by_hand = tiny("vit")
    Anatomy(by_hand).arrange([0, 1, 1, 2], tied=False)
    assert_alike(logits(converted("vit"), inputs("vit")), logits(by_hand, inputs("vit")))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"loop": "0,2"}, "should follow one another"), ("llama", {"loop": "1-7"}, "blocks 0 to 2"),
        ("llama", {"loop": "0-2", "times": 0}, "all there is"), ("gpt_neo", {}, "block's place enters"),
        ("llama", {"times": -1}, "times=-1 must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_change(name, options, message):
    with pytest.raises(TransectError, match=message):
        transect.convert(tiny(name), "algoformer", **options)


def test_features_are_the_same_for_all_sequences_and_the_baselines_know_them():
    one, given = task_named("icl-regression"), {"dimensions": 3, "points": 20, "noise": 0.0, "features": 5}
    drawn = one.draw(200, 2, given)
    x, y = drawn.inputs[:, ::2], drawn.inputs[:, 1::2, 0]
    seen = representation(x, 5)
    solved = torch.linalg.lstsq(seen, y[..., None]).solution
    torch.testing.assert_close((seen @ solved)[..., 0], y, atol=1e-3, rtol=1e-3)
    assert 0.8 < float(y.square().mean()) < 1.2
    errors = one.baselines(drawn, **given)
    assert float(errors["least squares"][:, -1].mean()) < 1e-6 < float(errors["averaging"][:, -1].mean())
