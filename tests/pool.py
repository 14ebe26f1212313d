"""A pool of worker processes that all distributed tests share.

Starting a process and importing PyTorch costs seconds, so the workers start once. A task asks for a world of n ranks
and runs on workers 0..n-1, whose default process group is then exactly those n ranks: code under test may use
``dist.group.WORLD`` freely. A rank that raises, dies or hangs fails its task and never the tasks after it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

MAX_WORLD = 5
GRACE = (
    2.0  # seconds the other ranks get after one has failed: long enough to report, too short to wait for a dead peer
)
DUMPING = 1.0  # seconds that a rank gets to write where its threads are
multiprocessing.set_forkserver_preload(["tests.preloaded"])  # a process has one server for all that it forks


class RankError(AssertionError):
    """A task failed on at least one rank. ``failures`` maps the rank to what it reported."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))


class Pool:
    """``Pool().run(n, fn, *args)`` calls ``fn(*args)`` on n ranks and returns their results in rank order."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._workers: list[tuple[Any, Any]] = []  # (process, our end of the pipe)
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")
        self._world: tuple[int, str] = (0, "")  # the process group that the workers hold: its size and rendezvous file
        self._worlds = 0

    def run(self, n: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """``fn`` must be importable by the workers (module level), ``args`` and results picklable."""
        if not 1 <= n <= MAX_WORLD:
            raise ValueError(f"world size {n}: the pool has 1 to {MAX_WORLD} ranks")
        self._start(n)
        if self._world[0] != n:
            self._worlds += 1
            self._world = (n, os.path.join(self._folder.name, f"world{self._worlds}"))
        task = pickle.dumps((*self._world, timeout, fn, args))
        for _, pipe in self._workers[:n]:
            pipe.send_bytes(task)
        replies, failures = self._collect(n, time.monotonic() + timeout)
        if failures:
            self.close()  # the survivors may be inside a collective with a dead peer: no way back but new processes
            raise RankError(failures)
        return [pickle.loads(replies[rank]) for rank in range(n)]

    def _collect(self, n: int, deadline: float) -> tuple[dict[int, bytes], dict[int, str]]:
        replies: dict[int, bytes] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:n])}
        limit = deadline
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, limit - time.monotonic()))
            if not ready:
                ranks = sorted(waiting.values())
                if limit == deadline:
                    failures |= {
                        r: f"no reply within the time limit\n{text}" for r, text in self._stacks(ranks).items()
                    }
                else:
                    failures |= dict.fromkeys(ranks, "still waiting when another rank failed")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, payload = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    process = self._workers[rank][0]
                    process.join(1.0)
                    text = self._dump(rank).read_text()
                    good, payload = False, f"the worker died with exit code {process.exitcode}\n{text}".rstrip()
                if good:
                    replies[rank] = payload
                else:
                    failures[rank] = payload
                    limit = min(deadline, time.monotonic() + GRACE)
        return replies, failures

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Where each thread of these workers is: of a rank that hangs the only thing that helps."""
        for rank in ranks:
            os.kill(self._workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(DUMPING)
        return {rank: self._dump(rank).read_text() for rank in ranks}

    def _dump(self, rank: int) -> Path:
        return Path(self._folder.name, f"stacks{rank}")

    def _start(self, n: int) -> None:
        """At least four, as nearly all tests need them; a fifth for the tests that do."""
        for rank in range(len(self._workers), max(n, 4)):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(rank, theirs, self._dump(rank)), daemon=True, name=f"pool-rank{rank}"
            )
            process.start()
            theirs.close()  # so that the death of the worker reads as the end of the pipe
            self._workers.append((process, ours))

    def close(self) -> None:
        """Ends the workers; the next ``run`` starts new ones."""
        for process, pipe in self._workers:
            process.kill()
            pipe.close()
        for process, _ in self._workers:
            process.join()
        self._workers, self._world = [], (0, "")


def _serve(rank: int, pipe: Any, stacks: Path) -> None:
    """A worker's loop: join the world that the task names, run it, reply (True, result) or (False, traceback)."""
    dump = stacks.open("w")
    faulthandler.register(signal.SIGUSR1, dump)
    faulthandler.enable(dump)
    import torch

    torch.set_num_threads(1)
    linear = torch.nn.functional.linear
    joined = ""
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            n, rendezvous, timeout, fn, args = pickle.loads(task)
            if rendezvous != joined:
                _join(n, rank, rendezvous, timeout)
                joined = rendezvous
            torch.manual_seed(0)
            # DeepSpeed's stage 3 leaves its own there. With DTensors that makes other collectives than torch's does,
            # and a rank that once ran DeepSpeed would wait for ever for one that did not.
            torch.nn.functional.linear = linear
            reply = pickle.dumps((True, pickle.dumps(fn(*args))))
        except BaseException:  # CheckpointException and SystemExit are not Exceptions, and the parent must hear of both
            reply = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(reply)


def _join(n: int, rank: int, rendezvous: str, timeout: float) -> None:
    import datetime

    import torch.distributed as dist
    from torch.distributed.tensor import debug

    if dist.is_initialized():
        dist.destroy_process_group()
        # DTensor caches the meshes of results, and those name process groups of the world that is gone.
        for clear in ("_clear_python_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
            getattr(debug, clear, lambda: None)()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=n,
        timeout=datetime.timedelta(seconds=max(timeout, 60.0)),
    )
