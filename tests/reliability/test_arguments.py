"""Arguments of the verbs are held to their annotations once, before any work; one TransectError says what is wrong."""

from __future__ import annotations

import inspect
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transect
from tests.models import VOCABULARY, tiny
from transect import verbs
from transect.arguments import Kind, Range, accepted, checked
from transect.errors import TransectError
from transect.recovery import Settings

VERBS = [getattr(verbs, name) for name in verbs.__all__]
DATA = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(5))
PAIRS = [{"prompt": f"w{number} ", "better": "w5 w6", "worse": "w7"} for number in range(4)]
# What each verb requires, right; only one argument at a time is wrong.
RIGHT: dict[str, dict[str, Any]] = {
    "adapt": {"method": "lora", "data": DATA},
    "build": {"base": "llama"},
    "catalogue": {"out": "out"},
    "check_claims": {"names": ["fwsvd/below-svd"], "data": DATA, "eval_data": DATA},
    "compare": {"methods": ["svd"], "keep": [0.7], "data": DATA, "eval_data": DATA, "out": "out"},
    "compress": {"method": "svd", "keep": 0.7, "data": DATA},
    "convert": {"method": "liger", "data": DATA},
    "diff": {"other": None, "data": DATA},
    "edit": {"method": "neuron-clamp", "data": DATA},
    "evaluate": {"data": DATA},
    "inspect": {"probes": ["spectra"], "data": DATA},
    "memorize": {"data": DATA},
    "merge": {"method": "average", "models": [tiny("llama"), tiny("llama", 1)]},
    "prefer": {"data": PAIRS},
    "race": {"adapters": ["lora"], "data": DATA, "eval_data": DATA, "out": "out"},
    "race_parts": {"base": "llama", "task": "induction", "mixer": ["pooling"], "out": "out"},
    "recover": {"data": DATA},
    "search": {"data": DATA},
    "study": {"name": "one-layer-knowledge"},
}  # fmt: skip
UNCHECKED = {"model", "data", "eval_data", "facts", "choices", "passages", "tokenizer", "teacher", "architecture",
             "other", "forgets", "models", "curve", "merge.base"}  # fmt: skip
NEVER = [object(), b"bytes", 1j, float("nan"), float("-inf"), -(2**70), {1: object()}, torch.zeros(2, 2), lambda: None,
         "no such thing \0", "", [], [[]], True, 10**5000, -1, 1.5, "8", torch.int8, None, Ellipsis]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def arguments():
    """Every argument of every verb that says what it takes."""
    for verb in VERBS:
        hints = typing.get_type_hints(verb, include_extras=True)
        for parameter in inspect.signature(verb).parameters.values():
            names = {parameter.name, f"{verb.__name__}.{parameter.name}"}
            if parameter.kind is not parameter.VAR_KEYWORD and not names & UNCHECKED:
                yield verb, parameter.name, hints[parameter.name]


@pytest.mark.parametrize(("verb", "name", "annotation"), [
    pytest.param(*one, id=f"{one[0].__name__}-{one[1]}") for one in arguments()
])  # fmt: skip
def test_every_argument_refuses_what_it_does_not_take(verb, name, annotation):
    """Before anything else happens, even to the model, which is none here."""
    assert annotation is not Any, f"{verb.__name__}: say what {name} takes, or list it among UNCHECKED"
    refused = 0
    for value in NEVER:
        try:
            accepted(annotation, value, name)
        except TransectError:
            refused += 1
            with pytest.raises(TransectError, match=f"^{verb.__name__}: {name} must be .+, got .+") as raised:
                model = {"model": None} if "model" in inspect.signature(verb).parameters else {}
                verb(**{**model, **RIGHT[verb.__name__], name: value})
            assert len(str(raised.value)) < 500
    assert refused > 8
    assert not os.listdir()


def test_every_verb_is_checked():
    assert set(RIGHT) == {verb.__name__ for verb in VERBS}


@pytest.mark.parametrize(
    ("verb", "wrong", "said"),
    [
        ("compress", {"fisher": "x"}, "fisher must be 'empirical' or 'sampled', got 'x'"),
        ("compare", {"workers": 0}, "workers must be a whole number from 1"),
        ("compare", {"keep": []}, "keep must be a list.*got \\[\\]: it is empty"),
        ("compare", {"keep": [0.5, math.nan]}, "keep must be a list, each a number above 0 and at most 1"),
        ("compress", {"keep": math.nan}, "above 0 and at most 1, got nan"),
        ("recover", {"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ("compress", {"seed": 2**64}, "seed must be a whole number from 0 to"),
        ("compress", {"seed": -1}, "seed must be"),
        ("evaluate", {"sequences": 0}, "sequences must be"),
        ("evaluate", {"batch_size": True}, "batch_size must be a whole number.*got True"),
        ("evaluate", {"batch_size": "8"}, "batch_size must be a whole number.*got '8'"),
        ("evaluate", {"sequence_length": 0}, "sequence_length must be a whole number from 2"),
        ("compress", {"roles": ["nope"]}, "roles must be a list.*'gate'"),
        ("compress", {"accumulate": torch.int8}, "accumulate must be .*torch.float64"),
        ("compress", {"dtype": "int7"}, "dtype must be a type for weights"),
        ("compress", {"device": "toaster"}, "device must be a device .* got 'toaster': .*toaster"),
        ("edit", {"out": ""}, "out must be the name of a folder .* it is empty"),
        ("inspect", {"out": "a\0b"}, "out must be .* NUL"),
        ("compress", {"method": None}, "method must be a text, got None"),
        ("inspect", {"settings": {"spectra": 3}}, "settings must be a dict"),
        ("recover", {"on_check": 3}, "on_check must be a function, got 3"),
        ("evaluate", {"data": b"bytes"}, "bytes"),
        ("evaluate", {"data": None}, "is None"),
        ("evaluate", {"model": None}, "None"),
        ("evaluate", {"model": 3}, "int"),
    ],
)  # fmt: skip
def test_one_error_says_what_came_and_what_was_expected(verb, wrong, said):
    with pytest.raises(TransectError, match=said):
        getattr(transect, verb)(**{"model": tiny("llama"), **RIGHT[verb], **wrong})
    assert not os.listdir()


def test_numbers_of_other_libraries_are_numbers():
    given: dict[str, Any] = {"keep": np.float64(0.7), "batch_size": np.int64(2), "sequences": torch.tensor(4)}
    model = transect.compress(tiny("llama"), "svd-llm", data=DATA, seed=np.uint8(3), roles="q", **given)
    assert transect.Anatomy(model).record.history[-1]["compress"]["keep"] == 0.7


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([field.name for field in fields(Settings)]), st.data())
def test_settings_of_a_repair_are_right_or_refused(name, data):
    anything = st.none() | st.integers() | st.floats() | st.text() | st.booleans() | st.lists(st.integers(), max_size=1)
    value = data.draw(anything)
    try:
        made = getattr(Settings(**{name: value}).resolved(), name)
    except TransectError as error:
        assert str(error).startswith(f"recover: {name} must be") and len(str(error)) < 500
    else:
        assert value is None or made == type(made)(value)  # a whole number for a rate becomes the nearest float


WRITTEN = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a Path",
    Annotated[int, Range(1)]: "a whole number at least 1", Literal["a", "b"]: "'a' or 'b'",
    int | None: "a whole number or None", Sequence[str]: "a list, each a text", Mapping[str, Any]: "a dict",
    Callable[[int], int]: "a function", Annotated[float, Range(0, 1, True, True)]: "a number above 0 and below 1",
}  # fmt: skip


def test_annotations_are_said_in_words():
    for annotation, words in WRITTEN.items():
        with pytest.raises(TransectError, match=f"^it must be {re.escape(words)}, got a object$"):
            accepted(annotation, object(), "it")


@settings(max_examples=300, deadline=None)
@given(
    st.integers() | st.floats() | st.booleans() | st.text(max_size=5) | st.none(), st.integers(-3, 3), st.integers(0, 5)
)
def test_a_range_takes_the_numbers_in_it_and_nothing_else(value, low, wide):
    inside = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= low + wide
    try:
        assert accepted(Annotated[float, Range(low, low + wide)], value, "it") == value and inside
    except TransectError:
        assert not inside


def refuse(value: Any) -> Any:
    if value != "good":
        raise ValueError("it is bad")
    return value.upper()


def test_a_function_gets_what_its_annotations_say():
    @checked
    def verb(
        count: Annotated[int, Range(0, 5)], *, names: Iterable[str] = (),
        kind: Annotated[str, Kind("a good text", refuse)] = "", **others: Any,
    ) -> Any:  # fmt: skip
        return count, names, kind, others

    assert verb(np.int8(3), names="ab", kind="good", more=1) == (3, ["ab"], "GOOD", {"more": 1})
    assert verb(2.0) == (2, (), "", {})  # a default is taken as it is
    with pytest.raises(TransectError, match="verb: kind must be a text, a good text, got 'x': it is bad"):
        verb(1, kind="x")
    with pytest.raises(TypeError, match="missing"):
        verb()  # type: ignore[call-arg]
