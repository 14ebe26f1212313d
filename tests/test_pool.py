"""The pool must report every way in which a rank can fail, and work again afterwards."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.pool import Pool, RankError


def whoami() -> tuple[int, int, int, int]:
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(total), torch.get_num_threads()


def row_sums() -> list[float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = distribute_tensor(torch.arange(12.0).reshape(6, 2), mesh, [Shard(0)])
    return [*rows.sum(dim=0).full_tensor().tolist(), (rows * 2).full_tensor().sum().item()]


def draw() -> float:
    return torch.rand(()).item()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"planted on rank {rank}")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def process_id() -> int:
    return os.getpid()


def test_world_is_exactly_the_ranks_asked_for(pool: Pool) -> None:
    for n in (1, 2, 3, 4, 2, 4, 1):
        assert pool.run(n, whoami) == [(rank, n, n * (n + 1) // 2, 1) for rank in range(n)]


def test_dtensors_work_after_every_change_of_world_size(pool: Pool) -> None:
    for n in (2, 4, 2, 3, 2):
        assert pool.run(n, row_sums) == [[30.0, 36.0, 132.0]] * n


def test_workers_are_reused_and_seeded(pool: Pool) -> None:
    assert pool.run(4, process_id)[:2] == pool.run(2, process_id)
    first, second = pool.run(2, draw), pool.run(2, draw)
    assert first == second
    assert first[0] == first[1]


def test_exception_names_the_rank_and_keeps_its_traceback(pool: Pool) -> None:
    with pytest.raises(RankError, match="planted on rank 1") as error:
        pool.run(3, raise_on, 1)
    assert "raise_on" in error.value.failures[1]
    assert error.value.failures[0] == "still waiting when another rank failed"
    assert pool.run(3, whoami)[2] == (2, 3, 6, 1)


def test_death_of_a_worker_is_reported(pool: Pool) -> None:
    with pytest.raises(RankError) as error:
        pool.run(2, die_on, 0)
    assert error.value.failures[0] == "the worker died with exit code 7"
    assert pool.run(2, whoami)[1] == (1, 2, 3, 1)


def test_a_hanging_rank_costs_the_time_limit_and_no_more(pool: Pool) -> None:
    pool.run(2, whoami)
    start = time.monotonic()
    with pytest.raises(RankError) as error:
        pool.run(2, hang_on, 1, timeout=1.0)
    assert time.monotonic() - start < 4.0
    assert error.value.failures.keys() == {1}
    assert error.value.failures[1].startswith("no reply within the time limit")
    assert "in hang_on" in error.value.failures[1]
    assert pool.run(2, whoami)[0] == (0, 2, 3, 1)


def test_a_world_larger_than_the_pool_is_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="world size 6"):
        pool.run(6, whoami)
