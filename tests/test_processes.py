"""The processes in which tests run commands: one that is killed at any moment leaves nothing behind for the next."""

import signal

import pytest

from .processes import Job


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kills on this system")
def test_one_that_is_killed_while_it_draws_a_bar_does_not_hold_up_the_next(forks, tmp_path):
    killed = "import tqdm\ntqdm.tqdm.get_lock().acquire()\nos.kill(os.getpid(), signal.SIGKILL)"
    assert forks.run(Job(before=killed), tmp_path).code == -signal.SIGKILL
    draws = "import tqdm\nprint(*tqdm.tqdm([1], desc='drawn', disable=False))"  # a command run before may disable it
    done = forks.run(Job(before=draws, seconds=15), tmp_path)
    assert done.code == 0 and done.out == "1\n" and "drawn: 100%" in done.err
