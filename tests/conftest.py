"""What tests of several files share: processes that have imported everything once, and the order of files."""

import gc
import os
import re
from collections import defaultdict
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch

from .models import CONFIGS
from .processes import WITH_TRANSECT, WITHOUT_TRANSECT, Forks
from .suite import SHORT

# Files that take half a minute or more. They go first, so that no process is left alone with one at the end.
LONG = ("test_architectures", "test_every_claim", "test_compare", "test_parts", "test_every_method", "test_adaptation",
        "test_every_command", "test_experts", "test_streaming_kills", "test_one_line", "test_checkpoint",
        "test_compare_streamed", "test_benchmarks", "test_degenerate", "test_kills")  # fmt: skip

# Transformers compiles the same hundreds of patterns for each model that it loads: Python remembers 512, and then none.
re._MAXCACHE = 8192


def pytest_configure(config):
    config.addinivalue_line("markers", "nightly: not in `make test`, but in `make nightly` and where it is asked for")


def pytest_collection_modifyitems(items, config):
    """Long files first, in the order above; the others as they were found."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if SHORT:
        left_out = {item for item in items if item.get_closest_marker("nightly")} | set(over_architectures(items))
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def over_architectures(items):
    """What is left out where a case of a test is asked of several architectures.

    Of a dozen and more Llama stays, and those whose turn it is: another third in each case. Of fewer one stays, another
    in each case, if the test has a dozen cases and more. The tests of the architectures themselves stay whole.
    """
    tests, every = defaultdict(lambda: defaultdict(list)), list(CONFIGS)
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        name = next((value for value in given.values() if isinstance(value, str) and value in CONFIGS), None)
        if name is not None and item.path.stem != "test_architectures":
            case = re.sub(rf"\b{name}\b", "", item.name)  # whatever the architecture
            tests[item.path, item.originalname][case].append((item, name))
    for cases in tests.values():
        large = sum(map(len, cases.values())) >= 12
        for case, asked in cases.items():
            turn = crc32(case.encode())
            for number, (item, name) in enumerate(asked):
                if len(asked) >= 12:
                    stays = name == "llama" or (every.index(name) + turn) % 3 == 0
                else:
                    stays = not large or (number + turn) % len(asked) == 0
                if not stays:
                    yield item


def pytest_collection(session):
    """What is imported from here on stays: no garbage is looked for in it, neither now nor later."""
    gc.disable()


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def own_descriptions(monkeypatch):
    """Descriptions of architectures that a test registers are forgotten after it."""
    monkeypatch.setattr("transect.anatomy.architecture._registered", {})


@pytest.fixture(scope="session", autouse=True)
def in_a_hurry():
    """Speed is measured on one pass, nothing waits for the disk, since no test cuts the power, and no seed takes the
    stack down (milliseconds in a test), which torch does where CUDA has not begun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transect.evaluation.speed.BUDGET", 0.01)
        patch.setattr("torch.cuda.traceback", SimpleNamespace(format_stack=list))
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


@pytest.fixture(scope="session", autouse=True)
def attention_that_runs_here():
    """With ATEN_CPU_CAPABILITY=avx2, torch's fused attention fails in bfloat16 where the processor has AMX."""
    states = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
    before = torch.backends.cuda.flash_sdp_enabled()  # in spite of its name this is asked on a CPU, too
    try:
        torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
    except RuntimeError:
        torch.backends.cuda.enable_flash_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(before)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Processes that have imported all of Transect; see `Forks`."""
    made = Forks(WITH_TRANSECT, tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """Fresh processes that have imported transformers and not Transect.

    With other kernels and another number of threads than here, as on another machine.
    """
    notes = tmp_path_factory.mktemp("elsewhere")
    other = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": str(torch.get_num_threads() + 1)}
    made = Forks(WITHOUT_TRANSECT, notes, HF_MODULES_CACHE=str(notes / "modules"), **other)
    yield made
    made.close()
