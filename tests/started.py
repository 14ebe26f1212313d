"""Python scripts as processes of their own, forked from the server that has imported PyTorch (tests/preloaded.py).

What ``python SCRIPT`` and the ranks of ``torchrun SCRIPT`` do, with the environment that these give them: importing
PyTorch anew would cost each of them seconds. The launchers themselves are started by tests/test_launch_scripts.py and
tests/test_deepspeed_launch.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tests.pool  # noqa: F401  # it names what the server imports

__all__ = ["Rank", "free_port", "start", "torchrun"]


@dataclass
class Rank:
    """A started script."""

    process: Any
    out: Path
    err: Path

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit status; it is killed when the time is over."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        status: int = self.process.exitcode
        return status

    @property
    def said(self) -> str:
        return self.out.read_text()

    @property
    def complained(self) -> str:
        return self.err.read_text()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def start(script: Path, words: Sequence[object], folder: Path, name: str = "0", **environment: str) -> Rank:
    """``python SCRIPT WORDS`` in this environment, without matplotlib: a plot takes a third of the time of a short run.

    What it prints goes to files in ``folder``.
    """
    rank = Rank(None, folder / f"out{name}", folder / f"err{name}")
    arguments = (str(script), [*map(str, words)], str(rank.out), str(rank.err), environment)
    rank.process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments, daemon=True)
    rank.process.start()
    return rank


def torchrun(ranks: int, script: Path, words: Sequence[object], folder: Path) -> list[Rank]:
    """``torchrun --standalone --nproc-per-node RANKS SCRIPT WORDS``, without the process that watches them."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        start(script, words, folder, str(rank), RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(ranks)
    ]


def _run(script: str, words: list[str], out: str, err: str, environment: Mapping[str, str]) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    # as a process begins that was not forked: what it prints into a file is kept back, and it says nothing of a death
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
