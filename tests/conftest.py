"""What tests of several files share: processes that have imported everything once, and the order of files."""

import pytest
import torch

from .processes import WITH_TRANSECT, WITHOUT_TRANSECT, Forks

# Files that take a minute or more. They go first, so that no process is left alone with one at the end.
LONG = ("test_one_line", "test_compare", "test_degenerate", "test_every_method", "test_benchmarks", "test_kills",
        "test_streaming_kills", "test_checkpoint", "test_architectures", "test_every_command")  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files first, in the order above; the others as they were found."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


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
