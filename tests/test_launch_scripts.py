"""The commands that README.md gives, and the scripts in launch/, do what they say."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.started import torchrun

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
SCRIPTS = ("launch/_env.sh", "launch/demo.sh", "launch/test.sh", ".ci/run")
SHORT = ["--steps", "2", "--warmup", "0", "--batch-size", "4", "--eval-sequences", "2", "--threads", "1"]
SHORT += ["--width", "16", "--layers", "1", "--heads", "2", "--context", "16"]
# Commands that are not run by the tests in this file, and where they are run instead.
ELSEWHERE = {
    "bash launch/demo.sh": "test_demo",
    "bash launch/test.sh": "whoever runs these tests",
    "python -m benchmarks.": "tests of the benchmarks",
    "pip install": "launch/_env.sh",
    "source .venv/bin/activate": "launch/_env.sh uses that environment",
}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def is_training(line: str) -> bool:
    return "launch/train.py" in line


def run(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts, so that what they write goes elsewhere; the library is that of this checkout."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_readme_begins_with_the_two_commands() -> None:
    assert readme_commands()[:2] == ["bash launch/demo.sh", "bash launch/test.sh"]


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    unknown = [c for c in readme_commands() if not is_training(c) and not c.startswith(tuple(ELSEWHERE))]
    assert not unknown
    assert sum(map(is_training, readme_commands())) >= 3


@pytest.mark.parametrize("line", [line for line in readme_commands() if is_training(line)])
def test_training_commands_of_the_readme(line: str, tmp_path: Path) -> None:
    """``torchrun`` itself, for processes that were not forked, starts in test_demo, and ``python`` below."""
    starter, arguments = line.split("launch/train.py")
    size = re.fullmatch(r"(?:python|torchrun --standalone --nproc-per-node (\d)) ", starter)
    assert size
    words = [*shlex.split(arguments), *SHORT, "--out", str(tmp_path)]
    if "--checkpoint" in words:
        words += ["--checkpoint", str(tmp_path / "saved")]
    ranks = torchrun(int(size[1] or 1), TRAIN, words, tmp_path)
    for rank in ranks:
        assert rank.wait() == 0, rank.said + rank.complained
    if "--help" in words:
        assert "--optimizer NAME" in ranks[0].said
    else:
        assert re.search(r"^held-out loss: \S+ at first, \S+ at the end", ranks[0].said, flags=re.MULTILINE)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_python_itself(tmp_path: Path) -> None:
    line = next(line for line in readme_commands() if is_training(line))
    words = shlex.split(line)
    assert words[:2] == ["python", "launch/train.py"]
    done = run([sys.executable, *words[1:], *SHORT, "--out", str(tmp_path)], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script: str) -> None:
    assert run(["bash", "-n", script], ROOT).stderr == ""


def test_demo(checkout: Path) -> None:
    environment = {"OPUT_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = run(["bash", "launch/demo.sh", *SHORT], checkout, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Lamb, fsdp2, 2 rank(s)" in done.stdout
    loss, saved = re.findall(r"^(?:loss curve|checkpoint): +(.*)$", done.stdout, flags=re.MULTILINE)
    assert (checkout / loss).stat().st_size > 5000
    assert (checkout / saved / "run.json").is_file()


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_scripts_without_a_usable_python_end_with_2(checkout: Path, script: str) -> None:
    fake = checkout / "python2"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    done = run(["bash", f"launch/{script}"], checkout, PYTHON=str(fake), OPUT_PYTHON="")
    assert done.returncode == 2
    assert re.fullmatch(r"error: no Python 3.10 to 3.13 .*python2.*\n", done.stderr)
    assert not (checkout / ".venv").exists()


def test_tests_without_a_compiler_end_with_2(checkout: Path) -> None:
    tools = checkout / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = run(["bash", "launch/test.sh"], checkout, PATH=str(tools), CXX="")
    assert done.returncode == 2
    assert re.fullmatch(r"note: no C\+\+ compiler .*\n", done.stderr)
