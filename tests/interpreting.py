"""Processes in which Triton interprets its kernels, for all tests that need them.

Nothing that imports Triton may be imported here: it must be told to interpret before.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any


def interpreters() -> Executor:
    """Two processes; they start with the first task."""
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), prepare)


class Kept:
    """What has been replaced and stays so."""

    def restore(self) -> None:
        """Nothing."""


def prepare() -> None:
    """One thread, and an interpreter that prepares Triton's modules once.

    It replaces their functions whenever a kernel starts or one jitted function calls another, for a third of its time.
    Here they stay replaced, for the process does nothing else; what depends on the function is which modules it sees.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    replace, done = interpreter._patch_lang, set()

    def replace_once(fn: Any) -> Kept:
        seen = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if seen not in done:
            done.add(seen)
            replace(fn)
        return Kept()

    torch.set_num_threads(1)
    interpreter._patch_lang = replace_once
