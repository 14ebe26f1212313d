"""Fixtures that the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch starts its threads: the machine is shared with the ranks

import pytest

from tests import pool as pool_module


@pytest.fixture(scope="session")
def pool() -> Iterator[pool_module.Pool]:
    """Worker processes for distributed tests, started at the first use: ``pool.run(n, fn, *args)``."""
    workers = pool_module.Pool()
    yield workers
    workers.close()
