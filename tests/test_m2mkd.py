import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import transect
from tests.models import VOCABULARY, apart, assert_same_tensors, inputs, logits, tiny
from transect.anatomy import Anatomy
from transect.conversion import Plan, convert_anatomy
from transect.conversion.catalog.m2mkd import (
    Host,
    Hybrids,
    _hosted,
    _loss_of_module,
    _of_module,
    distilled,
)
from transect.conversion.registry import Calibration, conversion_named
from transect.conversion.repair import repair
from transect.data import load
from transect.data.split import split
from transect.errors import TransectError
from transect.forward import at_rest
from transect.training import Machine, Run, Schedule, State

DATA = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(5))


def started(name="llama", **settings):
    """A teacher, and its student with the host in it."""
    teacher = tiny(name)
    entry = conversion_named("m2mkd")
    chosen = entry.settings(settings)
    student = entry.function(Anatomy(teacher), Calibration(load(DATA, teacher)), **chosen)
    _hosted(Anatomy(student))
    return teacher, student


def twin(teacher):
    """A student that is the teacher, with a host of its blocks and no stitches, cut into three modules."""
    student = tiny("llama")
    width = teacher.config.hidden_size
    student.host = Host(list(Anatomy(teacher).block_list), [0, 1, 2, 3], width, width)
    for stitches in (student.host.pre, student.host.post):
        for number in range(3):
            stitches[number] = nn.Identity()
    return student


@torch.no_grad()
def test_the_teacher_s_own_modules_without_stitches_say_what_it_says():
    teacher, batch = tiny("llama"), inputs("llama")
    student = twin(teacher)
    hybrids = Hybrids(teacher, student, student.host, batch)
    for module in range(3):
        theirs, ours = hybrids.of_teacher(module), hybrids.of_student(module)
        assert apart(ours, theirs) < 1e-5 and apart(theirs, logits(teacher, batch)) < 1e-5
        targets = torch.zeros(theirs.shape[0] * theirs.shape[1], dtype=torch.long)
        kl = distilled(ours.flatten(0, 1), theirs.flatten(0, 1), targets, 1.0, 2.0, "rows")
        assert float(kl) == pytest.approx(0, abs=1e-4)
    for block in student.host.meta:  # S_i = M_i is the host itself
        for parameter in block.parameters():
            parameter.mul_(1.1)
    for number, block in enumerate(student.host.meta):
        Anatomy(student).block_list[number].load_state_dict(block.state_dict())
    assert apart(hybrids.of_student(1), hybrids.of_host()) < 1e-5
    assert apart(hybrids.of_teacher(1), hybrids.of_host()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bloom"])
def test_one_module_is_plain_distillation_of_the_whole(name):
    teacher, student = started(name, modules=1, depth=2, width=24)
    batch = inputs(name)
    hybrids = Hybrids(teacher, student, student.host, batch)
    assert apart(hybrids.of_teacher(0), logits(teacher, batch)) < 1e-5
    assert apart(hybrids.of_student(0), logits(student, batch)) < 1e-5


def test_losses():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(9, (6,), generator=generator)
    hard = nn.functional.cross_entropy(s, y, reduction="sum").float()
    torch.testing.assert_close(distilled(s, t, y, 0.0, 1.0, "rows"), hard)
    soft = distilled(s, t, y, 1.0, 1.0, "rows")
    torch.testing.assert_close(distilled(s, t, (y + 1) % 9, 1.0, 1.0, "rows"), soft)  # no labels
    torch.testing.assert_close(distilled(s, t, y, 1.0, 1.0, "classes"), soft / 9)
    torch.testing.assert_close(distilled(s, t, y, 0.5, 1.0, "rows"), (hard + soft) / 2)
    assert soft > 0
    assert float(distilled(t + torch.randn(6, 1), t, y, 1.0, 1.0, "rows")) == pytest.approx(0, abs=1e-5)
    sizes = []
    for temperature in (20.0, 40.0):
        x = s.clone().requires_grad_()
        distilled(x, t, y, 1.0, temperature, "rows").backward()
        assert x.grad is not None
        sizes.append(float(x.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


@pytest.mark.parametrize("module", [0, 1, 2])
def test_only_a_module_and_its_stitches_learn_in_its_turn(module):
    teacher, student = started(width=24, depth=2)
    teacher.requires_grad_(False)  # as a stage's teacher is
    wanted = {
        name: parameter for name, parameter in student.named_parameters()
        if re.search(_of_module(module, 3, 2), name)
    }  # fmt: skip
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    loss, count = _loss_of_module(module, 0.5, 1.0, "classes")(student, teacher, {"input_ids": DATA})
    loss.backward()
    assert count == 16 * 11
    moved = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert moved == set(wanted)
    assert sum(float(parameter.grad.abs().sum()) for parameter in wanted.values()) > 0
    assert any(name.startswith("model.embed_tokens") for name in wanted) == (module == 0)
    assert any(name.startswith("lm_head") for name in wanted) == (module == 2)
    assert {name.split(".")[2] for name in wanted if name.startswith("model.layers.")} == {
        str(2 * module), str(2 * module + 1)
    }  # fmt: skip
    for number in range(3):
        pre, post = student.host.pre[number], student.host.post[number]
        assert (number > 0) == isinstance(pre, nn.Sequential) and (number < 2) == isinstance(post, nn.Sequential)
        if number > 0:
            assert pre[1].weight.shape == (24, 32)
        if number < 2:
            assert post[1].weight.shape == (32, 24)


def test_modules_learn_independently_and_are_put_together_as_they_were_left():
    """Their turns in any order leave the same modules, and the training end to end begins with these, alone."""
    found = {}
    for order in ([0, 1, 2], [2, 0, 1]):
        teacher, student = started(width=24)
        start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
        host, *turns, end = conversion_named("m2mkd").training(conversion_named("m2mkd").settings({"width": 24}))
        left = {}

        def note(anatomy, key, left=left):
            left[key] = {name: p.detach().clone() for name, p in anatomy.model.named_parameters()}

        def begin(anatomy, note=note, end=end):
            end.begin(anatomy)
            note(anatomy, "assembled")

        stages = [host] + [replace(turns[at], end=lambda one, at=at, note=note: note(one, at)) for at in order]
        run = Run(Schedule(lr=1e-2, steps=8, epochs=8, every=8), Machine(), State(None))
        training, held_out = split(load(DATA, teacher), 0.25, 4, 0)
        with at_rest(teacher, student, frozen=True):
            stages = [replace(one, share=0.25, keeps="last") for one in [*stages, replace(end, begin=begin)]]
            repair(Anatomy(student), teacher, stages, run, training, held_out)
        assert not any("host" in name for name in left["assembled"])
        for module in range(3):
            names = [name for name in left["assembled"] if re.search(_of_module(module, 3, 1), name)]
            assert names and any(not torch.equal(left[module][name], start[name]) for name in names)
            assert all(torch.equal(left["assembled"][name], left[module][name]) for name in names)
        assert set(left["assembled"]) == {name for name in start if not name.startswith("host.")}
        found[tuple(order)] = left["assembled"]
    one, other = found.values()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_student_is_as_one_from_scratch_and_the_teacher_is_not_changed():
    teacher = tiny("gpt2")
    found = transect.convert(teacher, "m2mkd", DATA, width=24, steps=20, epochs=10, batch_size=4, held_out=0.25)
    assert_same_tensors(teacher, tiny("gpt2"))
    fresh, _ = convert_anatomy(Anatomy(tiny("gpt2")), Plan("m2mkd", {"width": 24}))
    assert list(found.model.state_dict()) == list(fresh.state_dict())
    assert found.model.config.hidden_size == 24 and not hasattr(found.model, "host")
    names = [stage["name"] for stage in found.outcome["stages"]]
    assert names == ["host", "module 0", "module 1", "module 2", "end to end"]
    assert found.outcome["loss_after"] < found.outcome["loss_converted"]


def test_without_training_it_is_the_random_student():
    found, _ = convert_anatomy(Anatomy(tiny("llama")), Plan("m2mkd", steps=0), load(DATA, tiny("llama")))
    fresh, _ = convert_anatomy(Anatomy(tiny("llama")), Plan("m2mkd"))
    assert_same_tensors(found, fresh)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"modules": 4}, "cannot be cut from 3 blocks"), ({"experts": 1, "chosen": 2}, "chosen=2 of 1 experts"),
     ({"width": 31}, "even number"), ({"alpha": 1.5}, "alpha"), ({"temperature": 0.0}, "temperature")],
)  # fmt: skip
def test_what_cannot_be_done_is_said(given, said):
    with pytest.raises(TransectError, match=said):
        convert_anatomy(Anatomy(tiny("llama")), Plan("m2mkd", given))
    with pytest.raises(TransectError, match="next token"):
        convert_anatomy(Anatomy(tiny("bert")), Plan("m2mkd"))
