"""Every rule compiles for GPUs that are not here, with 128-bit accesses and no spilled registers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.machine_code import Product, Row, faults, jobs, product_faults, products, report
from benchmarks.variants import bytes_per_element, programs
from oput_dist.kernels.codes import FORMATS
from oput_dist.kernels.compiling import TARGETS, Report, compile_code
from oput_dist.kernels.stage import Decay, Write

CODES = [i for i, code in enumerate(FORMATS) if code.signed or code.bits == 8]


def compiled_code(job: tuple[str, int, bool]) -> tuple[str, bool, Report]:
    target, number, encode = job
    return FORMATS[number].name, encode, compile_code(target, FORMATS[number], encode)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    return report(jobs())


def test_every_rule_for_every_target(rows: list[Row]) -> None:
    rules = {program.stage.rule.__name__ for program in programs()}
    compiled = {(row.program.split()[0], row.target) for row in rows}
    assert compiled == {(rule, target) for rule in rules for target in TARGETS}
    in_dtypes = {(row.program.split()[0], row.dtype) for row in rows}
    assert in_dtypes >= {(rule, dtype) for rule in rules for dtype in ("float32", "bfloat16")}
    assert {number for number, _, _ in jobs()} == set(range(len(programs())))
    assert {row.program for row in rows} == {program.name for program in programs()}


def test_every_target_sees_every_prologue() -> None:
    known = programs()
    ways = {(known[i].prologue.decay, known[i].scaled, target, dtype) for i, target, dtype in jobs()}
    dtypes = (torch.float32, torch.bfloat16)
    assert ways >= set(itertools.product(Decay, (False, True), TARGETS, dtypes))
    assert {(known[i].prologue.write, target) for i, target, _ in jobs()} == set(itertools.product(Write, TARGETS))


def test_wide_accesses_and_no_spills(rows: list[Row]) -> None:
    found = faults(rows)
    assert not found, "\n".join(found)


def test_faults_are_seen() -> None:
    right = Row("adam", "gfx942", "float32", 8, 8, 6, 6, spills=0, registers=59)
    assert not faults([right])
    for change in ({"wide_loads": 7}, {"wide_loads": 9}, {"wide_stores": 5}, {"spills": 4}, {"registers": 161}):
        assert len(faults([replace(right, **change)])) == 1


def test_codes() -> None:
    """What codes state and decodes it: no spills, and 128-bit accesses where a code has a byte."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        made = list(
            pool.map(compiled_code, [(target, i, e) for target in TARGETS for i in CODES for e in (True, False)])
        )
    assert not any(row.spills for _, _, row in made)
    narrow = [(code, row.target) for code, encodes, row in made if not (row.wide_loads if encodes else row.wide_stores)]
    assert {name for name, _ in narrow} <= {"int4"}


def test_symmetric_products() -> None:
    rows = products()
    assert {(row.target, row.dtype) for row in rows} == {
        (target, dtype) for target in TARGETS for dtype in ("float32", "bfloat16", "float16")
    }
    found = product_faults(rows)
    assert not found, "\n".join(found)


def test_faults_of_products_are_seen() -> None:
    right = Product("sm_90", "bfloat16", "plain", tensor_cores=4, wide_loads=24, spills=0)
    assert not product_faults([right])
    changes: list[dict[str, Any]] = [{"tensor_cores": 0}, {"wide_loads": 0}, {"spills": 8}, {"dtype": "float32"}]
    for change in changes:
        assert len(product_faults([replace(right, **change)])) == 1


def test_minimum_traffic() -> None:
    """Bytes per fp32 parameter, as the literature counts them: what the accesses above add up to."""
    wanted = {"lion": 20, "adamw": 28, "adam": 28, "adan": 44, "stableadamw": 36, "lamb": 40, "sgd": 12}
    assert {name: bytes_per_element(name) for name in wanted} == wanted


def test_command_without_gpu(rows: list[Row]) -> None:
    """``python -m benchmarks.gpu`` says that there is no GPU, compiles everything (here from the cache), exits 0."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no NVIDIA GPU here")
    assert f"all {len(rows)} programs: every access 128 bits wide, nothing spilled" in done.stdout
