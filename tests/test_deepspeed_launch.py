"""The same script under mpirun, the deepspeed launcher and srun: one loss curve, that of one process.

Each launcher starts one run; under torchrun tests/test_launch_scripts.py runs the demo. What else DeepSpeed runs or
refuses is on the ranks of the pool.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_worlds import enter
from tests.pool import Pool
from tests.started import free_port, start
from tests.test_recipes import SMALL, assert_close, curve, refusal, train

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
BIN = Path(sys.executable).parent
MPIRUN = [str(BIN / "mpirun"), "-n", "2", sys.executable]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_accelerators", "2"]
FLAGS = [*SMALL, "--schedule", "constant", "--lr", "0.01", "--optimizer", "lamb", "--steps", "4"]
FLAGS += ["--accumulate", "2", "--clip", "0.5"]


def launch(starter: list[str], parallel: str, out: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "MPI", "SLURM"))}
    env |= {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [*starter, "launch/train.py", *flags(parallel, out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def flags(parallel: str, out: Path) -> list[str]:
    return [*FLAGS, "--parallel", parallel, "--out", str(out)]


def under_deepspeed(parallel: str, out: Path) -> None:
    enter()
    train(flags(parallel, out))


def refused(parallel: str, out: Path, *more: str) -> tuple[int, str]:
    enter()
    return refusal(*flags(parallel, out), *more)


@pytest.fixture(scope="module")
def single(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("single")
    pool.run(1, train, flags("single", out))
    rows = curve(out)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    return rows


@pytest.mark.parametrize("starter", [MPIRUN, DEEPSPEED], ids=lambda starter: Path(starter[0]).name)
def test_curve_is_that_of_one_process(single: Any, tmp_path: Path, starter: list[str]) -> None:
    assert shutil.which(starter[0])
    launch([*starter, "--master_port", free_port()] if starter is DEEPSPEED else starter, "zero2-ds", tmp_path)
    assert_close(curve(tmp_path), single)


@pytest.mark.parametrize("parallel", ["zero1-ds", "zero3-ds"])
def test_other_stages_have_that_curve(pool: Pool, single: Any, tmp_path: Path, parallel: str) -> None:
    pool.run(2, under_deepspeed, parallel, tmp_path)
    assert_close(curve(tmp_path), single)


def test_ranks_of_slurm(single: Any, tmp_path: Path) -> None:
    """srun itself needs a cluster: its variables are set by hand, as it sets them."""
    common = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        start(TRAIN, flags("fsdp2", tmp_path), tmp_path, rank, **common, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in ("0", "1")
    ]
    for rank in ranks:
        assert rank.wait() == 0, rank.said + rank.complained
    assert_close(curve(tmp_path), single)


def test_srun_without_a_meeting_point_is_refused(tmp_path: Path) -> None:
    rank = start(TRAIN, flags("ddp", tmp_path), tmp_path, SLURM_STEP_ID="0", SLURM_PROCID="0")
    assert rank.wait() == 2
    assert "under srun MASTER_ADDR must be set, as in launch/slurm.sh" in rank.complained


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--wrap", "sam"], "zero2-ds: DeepSpeed's configuration, zero_optimization.stage: SAM takes passes"),
        (["--ds-config", "nowhere.json"], "--ds-config nowhere.json cannot be read"),
        (["--checkpoint", "{out}"], "--checkpoint is not for --parallel zero2-ds"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_said_in_a_sentence(
    pool: Pool, tmp_path: Path, more: list[str], sentence: str
) -> None:
    words = [word.format(out=tmp_path / "saved") for word in more]
    ((status, said),) = pool.run(1, refused, "zero2-ds", tmp_path, *words)
    assert status == 2, said
    assert sentence in said
