"""The examples of the README run one after the other as they stand there, on two ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import oput_dist as oput

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_examples_run(tmp_path: Path) -> None:
    assert len(EXAMPLES) >= 3
    script = tmp_path / "examples.py"
    script.write_text("".join(f"{example}\nprint('example {i} ran')\n" for i, example in enumerate(EXAMPLES)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]
    for i in range(len(EXAMPLES)):
        assert result.stdout.count(f"example {i} ran") == 2


def test_every_optimizer_is_in_the_table() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert sorted(name.lower() for name in listed if name.lower() in oput.available()) == oput.available()
