"""Comparisons with one block in memory at a time: the same table, interrupted or not, and what they refuse."""

import errno

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import transect
from transect.cli import main_group
from transect.comparison import streamed
from transect.errors import TransectError

from .models import VOCABULARY, tiny
from .reliability.faults import Failing

DATA = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
HELD_OUT = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(6))
SAME = [
    "method", "allocation", "keep", "kept", "loss", "standard_error", "over_dense", "over_dense_error", "perplexity",
    "accuracy", "tokens", "bytes", "matrix_bytes", "parameters",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    return path


def compare(folder, out, methods=("kfac-svd", "svd-llm"), keep=(0.7, 0.4), held_out=HELD_OUT, **options):
    return transect.compare(folder, methods, keep, DATA, held_out, out, stream=True, batch_size=4, **options)


def assert_same_table(found, expected):
    same = [*SAME, *(column for column in expected if "," in column)]  # the latter of further texts
    pd.testing.assert_frame_equal(found[same], expected[same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"methods": ("kfac-svd", "svd", "modegpt", "gptq", "sparsegpt", "cospadi", "svd-llm+rtn8", "kfac-svd+gptq4"),
     "settings": {"cospadi": {"iterations": 2}}},
    {"methods": ("svd-llm", "kfac-svd"), "allocations": ("uniform", "global", "farms", "similarity")},
    {"methods": ("kfac-svd", "svd-llm", "amp"), "sequential": True},
    {"methods": ("mixed",), "settings": {"mixed": {"structures": "integer"}}, "keep": (0.4, 0.3)},
    {"methods": ("svd-llm", "modegpt"), "dtype": "bfloat16", "keep": (0.5,), "also": {"other": HELD_OUT.flip(1)}},
])  # fmt: skip
def test_the_table_is_that_of_a_comparison_in_memory(options, folder, tmp_path):
    options = {"keep": (0.7, 0.4), **options}
    expected = transect.compare(folder, data=DATA, eval_data=HELD_OUT, out=tmp_path / "one", batch_size=4, **options)
    found = compare(folder, tmp_path / "two", **options)
    assert_same_table(found, expected)
    assert found["prefill_tokens_per_second"].isna().all() and found["compress_seconds"].notna().any()
    assert found["over_dense"].iloc[1:].abs().max() > 1e-4


def test_an_encoder_and_a_model_of_one_matrix_for_q_k_and_v(tmp_path):
    for name, held_out in (("gpt2", HELD_OUT), ("bert", [{"input_ids": HELD_OUT, "labels": HELD_OUT}])):
        data = DATA if name == "gpt2" else [{"input_ids": DATA, "labels": DATA}]
        tiny(name).save_pretrained(tmp_path / name)
        tables = [
            transect.compare(tmp_path / name, ("kfac-svd",), (0.5,), data, held_out, tmp_path / out, stream=stream)
            for out, stream in ((f"{name}1", False), (f"{name}2", True))
        ]
        assert_same_table(tables[1], tables[0])


def test_an_interrupted_comparison_goes_on(folder, tmp_path, monkeypatch):
    expected = compare(folder, tmp_path / "whole")
    stops = [("forward_pass", 1), ("backward_pass", 1), ("factorize_blocks", 1), ("compress_block", 7)]
    for name, after in stops:
        calls, function = [], getattr(streamed, name)

        def interrupted(*args, calls=calls, function=function, after=after, **options):
            calls.append(1)
            if len(calls) == after:
                raise KeyboardInterrupt
            return function(*args, **options)

        monkeypatch.setattr(streamed, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(folder, tmp_path / "run")
        monkeypatch.setattr(streamed, name, function)
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "rows").iterdir()}
    assert finished
    monkeypatch.setattr(streamed, "forward_pass", lambda *a, **k: pytest.fail("the statistics are there"))
    assert_same_table(compare(folder, tmp_path / "run"), expected)
    rows = tmp_path / "run" / "rows"
    assert all((rows / name).stat().st_mtime_ns == time for name, time in finished.items())


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(folder, tmp_path):
    expected = compare(folder, tmp_path / "whole")
    reasons = []
    for n in (6, 33, 52, 71):
        try:
            with Failing(tmp_path / "run", n, OSError(errno.ENOSPC, "No space left on device")):
                compare(folder, tmp_path / "run")
        except (TransectError, OSError) as error:  # of the latter the command line makes one line
            reasons.append(str(error))
    assert len(reasons) >= 2 and all("No space left" in reason for reason in reasons), reasons
    assert_same_table(compare(folder, tmp_path / "run"), expected)


def test_another_run_is_not_gone_on_with(folder, tmp_path):
    compare(folder, tmp_path / "run", methods=("svd",))
    with pytest.raises(TransectError, match="another model, data or settings"):
        compare(folder, tmp_path / "run", methods=("svd",), held_out=DATA)
    assert len(compare(folder, tmp_path / "run", methods=("svd",), held_out=DATA, overwrite=True)) == 3


@pytest.mark.parametrize(("options", "reason"), [
    ({"refit": True}, "refit cannot be combined"),
    ({"roles": ["q"]}, "roles cannot be combined"),
    ({"workers": 2}, "workers cannot be combined"),
    ({"facts": "common"}, "facts cannot be combined"),
    ({"allocations": ["ilp"]}, "neither ilp"),
    ({"methods": ["llm-drop"]}, "which llm-drop changes as a whole"),
    ({"methods": ["mixed"]}, "with --mixed.structures integer"),
    ({"methods": ["modegpt+gptq4"]}, "cannot be streamed"),
])  # fmt: skip
def test_what_needs_the_whole_model_is_refused_before_any_work(options, reason, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "forward_pass", lambda *a, **k: pytest.fail("work was done"))
    for dry_run in (False, True):
        with pytest.raises(TransectError, match=reason):
            compare(folder, tmp_path / "run", dry_run=dry_run, **options)


def test_the_command_line(tmp_path):
    line = (
        "compare organism --methods svd,gptq --keep 0.6 --data organism:calibration --sequences 4 "
        "--eval organism:heldout --eval-sequences 4 --stream --out"
    )
    found = CliRunner().invoke(main_group, [*line.split(), str(tmp_path / "run")], catch_exceptions=False)
    assert found.exit_code == 0 and "gptq" in found.output and "tokens/s" not in found.output
    assert (tmp_path / "run" / "pareto.png").is_file()
