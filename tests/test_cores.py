"""Work shared out among a CPU's cores: who gets how many threads, and that results stay those of one thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import oput_dist as oput
from oput_dist.matrix.cores import parts, shared_out, started, threads
from tests.test_refresh_delay import BOTH, OPTIONS, apart, parameters, train


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def seen(number: int, where: list[tuple[int, int]]) -> int:
    where.append((number, torch.get_num_threads()))
    assert threads() == 3
    assert not torch.is_grad_enabled()
    return number


def test_each_has_a_core_and_what_would_leave_others_idle_has_all(three_threads: None) -> None:
    where: list[tuple[int, int]] = []
    costs = [1.0, 1.0, 40.0, 1.0, 2.0, 1.0]
    assert shared_out([partial(seen, i, where) for i in range(6)], costs) == list(range(6))
    assert where[0] == (2, 3)
    assert sorted(where[1:]) == [(i, 1) for i in (0, 1, 3, 4, 5)]
    where.clear()
    assert shared_out([partial(seen, 7, where)], [1.0]) == [7]  # one alone
    assert where == [(7, 3)]


@pytest.mark.parametrize(
    ("costs", "size", "wanted"),
    [
        ([1] * 24, 256, [4] * 6),  # each core twice
        ([1] * 20, 256, [3, 4, 3, 3, 4, 3]),
        ([1] * 108, 256, [12] * 9),  # and oftener, so that no more than 16 are worked on at a time
        ([3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3], 256, [1, 3, 3, 3, 1, 1]),  # as long, not as many
        ([1, 1], 256, [1, 1]),
        ([9, 1, 1], 1024, [1, 2]),
        ([1] * 500, 8, [500]),  # too small to share out
        ([1] * 12, 128, [4, 4, 4]),
        ([1] * 5, 0, [5]),
        ([0] * 3, 256, [3]),
    ],
)
def test_matrices_are_worked_on_together_by_as_many_as_pay(
    three_threads: None, costs: list[float], size: int, wanted: list[int]
) -> None:
    (made,) = parts([costs], [size * size])
    assert [place for part in made for place in range(len(costs))[part]] == list(range(len(costs)))
    assert [len(costs[part]) for part in made] == wanted


@pytest.mark.parametrize(
    ("costs", "wanted"),
    [
        ([[4, 4]] * 6, [2] * 6),  # each core has two parts
        ([[4, 4]] * 5 + [[4, 2], [1, 1]], [2] * 7),
        ([[2] * 6] * 4, [2, 2, 2, 3, 3, 3, 3, 3, 3]),  # or one core would have 18 and another 12
        ([], []),
        ([[30], [1, 1, 1]], [1, 3]),  # what cannot be cut takes longest, whatever becomes of the others
    ],
)
def test_no_more_are_cut_than_cores_must_have_as_much(
    three_threads: None, costs: list[list[float]], wanted: list[int]
) -> None:
    made = parts(costs, [2**16] * len(costs))
    for each, cut in zip(costs, made, strict=True):
        assert [place for part in cut for place in range(len(each))[part]] == list(range(len(each)))
    assert [len(each[part]) for each, cut in zip(costs, made, strict=True) for part in cut] == wanted


def test_an_error_comes_through_and_leaves_no_thread_count(three_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        shared_out([lambda: 1 // 0, *[lambda: 1] * 5], [1.0] * 6)
    assert torch.get_num_threads() == 3
    numbers: list[int] = []
    one = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    one.start()
    one.join()
    assert numbers == [3]  # also of threads to come, as autograd's


def who() -> set[int]:
    """The threads that work for three jobs, each of which waits for all to begin."""
    begun = threading.Barrier(3)

    def job() -> int:
        begun.wait(20)
        assert torch.get_num_threads() == 1
        return threading.get_ident()

    return set(shared_out([job] * 3, [1.0] * 3))


def test_threads_stay_and_follow_torchs_number(three_threads: None) -> None:
    first = who()
    assert len(first) == 3
    assert threading.get_ident() in first  # or it would only wait, and Linux let two others run on one core
    assert who() == first
    torch.set_num_threads(4)
    seen: list[tuple[int, int, bool]] = []
    shared_out([lambda: seen.append((threads(), torch.get_num_threads(), True))] * 4, [1.0] * 4)
    assert seen == [(4, 1, True)] * 4
    torch.set_num_threads(3)
    assert len(who()) == 3


def test_a_forked_process_has_threads_of_its_own(three_threads: None) -> None:
    who()
    child = os.fork()
    if child == 0:  # as a worker of a DataLoader
        signal.alarm(20)
        try:
            os._exit(0 if len(who()) == 3 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_that_begin_meanwhile_have_torchs_number(three_threads: None) -> None:
    """As one that saves a checkpoint: it would keep the number."""
    numbers: list[int] = []

    def begin() -> None:
        other = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
        other.start()
        other.join()

    shared_out([begin] * 3, [1.0] * 3)
    assert numbers == [3] * 3


def test_threads_that_stay_may_be_started_in_a_job(three_threads: None) -> None:
    """Those that find roots beside the training are."""
    numbers: list[int] = []

    def job() -> None:
        with started(2) as pool:
            assert list(pool.map(lambda _: (threads(), torch.get_num_threads()), range(2))) == [(3, 1)] * 2
        assert torch.get_num_threads() == 1

    shared_out([job] * 3, [1.0] * 3)
    one = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    one.start()
    one.join()
    assert numbers == [3]


def test_mkl_has_one_thread_in_a_job_too(three_threads: None) -> None:
    """It counts its threads itself once torch.set_num_threads was called."""
    x = torch.ones(512, 512)

    def used() -> float:
        before, started = time.thread_time(), time.process_time()
        for _ in range(20):
            x @ x
        return (time.process_time() - started) / (time.thread_time() - before)

    def alone() -> float:
        begun.wait(20)
        share = used() if threading.current_thread() is threading.main_thread() else 1.0
        done.wait(20)
        return share

    begun, done = threading.Barrier(3), threading.Barrier(3)
    assert used() > 1.5
    assert max(shared_out([alone] * 3, [1.0] * 3)) < 1.2


def test_an_error_waits_for_what_else_is_under_way(three_threads: None) -> None:
    done: list[int] = []

    def slow() -> None:
        time.sleep(0.2)
        done.append(1)

    with pytest.raises(ZeroDivisionError):
        shared_out([lambda: 1 // 0, slow, slow], [1.0] * 3)
    assert done == [1, 1]


@pytest.mark.parametrize("make", [*BOTH, oput.Muon])
def test_steps_are_those_of_one_thread(make: Any) -> None:
    options = OPTIONS if make in BOTH else {"lr": 0.02}
    found = []
    for number in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            params = parameters()
            found.append(train(make(params, **options), params, 0, 13))
        finally:
            torch.set_num_threads(before)
    assert apart(*found) < 1e-12


def test_threads_of_openmp_are_let_go_but_not_those_of_a_parent() -> None:
    """A forked process would wait for ever for the threads that its parent had."""
    script = (
        "import os, signal, time, torch\n"
        "from oput_dist.kernels.team import let_go\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(2)\n"
        "x = torch.ones(1 << 21)\n"
        "let_go()\n"
        "before = count()\n"
        "x.mul_(1.0)\n"
        "assert count() == before + 1\n"
        "let_go()\n"
        "time.sleep(0.2)\n"
        "assert count() == before\n"
        "x.mul_(1.0)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    let_go()\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
