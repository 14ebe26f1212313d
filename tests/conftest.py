"""Fixtures that the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch starts its threads: the machine is shared with the ranks

import pytest

from tests import pool as pool_module
from tests.interpreting import interpreters
from tests.matrix import Tally

TALLY = Tally()
LONGEST = (
    "test_conformance",
    "test_deepspeed",
    "test_compile",
    "test_recipes",
    "test_kernels",
    "test_train",
    "test_deepspeed_launch",
    "test_deepspeed_checkpoint",
    "test_launch_scripts",
    "test_checkpoint_matrix",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: processes that take one file after the other (launch/test.sh) then end together."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of the tests that run alone most files have none, and importing all takes longer than such a test."""
    alone = config.option.markexpr == "alone" and collection_path.suffix == ".py"
    return True if alone and "pytest.mark.alone" not in collection_path.read_text() else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        TALLY.add(report.nodeid, report.outcome)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How often each optimizer was checked, after a run of everything."""
    if lines := TALLY.lines():
        terminalreporter.section("checks of each optimizer")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def pool() -> Iterator[pool_module.Pool]:
    """Worker processes for distributed tests, started at the first use: ``pool.run(n, fn, *args)``."""
    workers = pool_module.Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Executor]:
    """Processes in which Triton interprets its kernels, started at the first use: ``interpreter.submit(fn, *args)``."""
    with interpreters() as pool:
        from oput_dist.backends import interpreting

        assert pool.submit(interpreting).result()
        yield pool
