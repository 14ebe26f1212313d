"""The examples of the README run one after the other as they stand there, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import catalogue
from oput_dist.optimizers import OPTIMIZERS
from tests.started import torchrun

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
WITHOUT_OPS = """\
import os
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.ops import __compatible_ops__
__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for half a minute
"""


def test_examples_run(tmp_path: Path) -> None:
    assert len(EXAMPLES) >= 3
    script = tmp_path / "examples.py"
    script.write_text(
        WITHOUT_OPS + "".join(f"{example}\nprint('example {i} ran')\n" for i, example in enumerate(EXAMPLES))
    )
    for rank in torchrun(2, script, [], tmp_path):
        assert rank.wait() == 0, rank.complained[-3000:]
        assert re.findall(r"example (\d) ran", rank.said) == [str(i) for i in range(len(EXAMPLES))]


def test_every_optimizer_is_in_the_table_once() -> None:
    table = README[README.index("## Optimizers") : README.index("[docs/optimizers.md]")]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    listed = re.findall(r"`(\w+)`", " ".join(cells))
    assert sorted(listed) == sorted(cls.__name__ for cls in OPTIMIZERS.values())


def test_the_catalogue_is_what_the_code_says() -> None:
    """``python -m benchmarks.catalogue`` writes it anew."""
    assert catalogue.OUT.read_text() == catalogue.text()


def test_examples_on_memory_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "memory.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) == 8
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    assert "bfloat16" in capsys.readouterr().out
