"""What tests of several files share: processes that have imported everything once."""

import pytest
import torch

from .processes import WITH_TRANSECT, WITHOUT_TRANSECT, Forks


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
