"""Work on many matrices at once."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from transect.threads import side_by_side


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_torch_has_its_threads_back(threads):
    seen = set()

    def one(number):
        seen.add(threading.get_ident())
        if threads > 1:
            assert torch.get_num_threads() == 1
        return number * number

    assert side_by_side(one, range(20)) == [number * number for number in range(20)]
    assert torch.get_num_threads() == threads
    assert (threading.get_ident() in seen) == (threads == 1)
    assert side_by_side(one, []) == []


def test_no_more_at_a_time_than_is_asked(threads):
    running, most = 0, 0
    lock = threading.Lock()

    def one(number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        torch.linalg.eigvalsh(torch.eye(60))
        with lock:
            running -= 1

    side_by_side(one, range(30), most=2)
    assert 1 <= most <= min(threads, 2)


def test_progress_advances_as_results_come(threads):
    finished, steps = [], []

    def one(number):
        finished.append(number)
        return -number

    def shown(numbers):
        for number in numbers:
            yield number
            steps.append((number, number in finished))

    assert side_by_side(one, range(9), shown=shown) == [-number for number in range(9)]
    assert steps == [(number, True) for number in range(9)]


def test_the_first_error_is_raised_and_what_has_not_begun_never_does(threads):
    begun = []

    def one(number):
        begun.append(number)
        if number == 0:
            raise ValueError("number 0")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="number 0"):
        side_by_side(one, range(1000))
    assert len(begun) < 1000 and torch.get_num_threads() == threads
