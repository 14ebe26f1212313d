"""Every optimizer from its documented starting point: what 200 steps of the demo's GPT come to.

    python -m benchmarks.starts
    python -m benchmarks.starts --only lamb adamw --steps 50

Each is a run of ``launch/train.py`` on one thread: 200 steps of 8 sequences, 20 steps of warm-up, then a constant
learning rate. Results go to ``benchmarks/results/starts-cpu.json`` and from there to docs/optimizers.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import track

import oput_dist as oput
from oput_dist.optimizers import OPTIMIZERS

from .guide import guide

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "starts-cpu.json"
ENDS = 10  # steps over which the first and the last loss are averaged


def run(name: str, steps: int) -> dict[str, Any]:
    """Train with one optimizer; its loss at both ends, and the held-out loss."""
    start = guide(oput.lookup(name)).start
    lr = start.get("lr")
    options = [f"{key}={value}" for key, value in start.items() if key not in ("lr", "num_iterations")]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "launch/train.py", "--optimizer", name, "--steps", str(steps), "--batch-size", "8"),
            *("--schedule", "constant", "--warmup", str(min(20, steps - 1)), "--threads", "1", "--eval-every", "0"),
            *("--out", folder),
            *(["--lr", str(lr)] if lr is not None else []),
            *(["--opt", *options] if options else []),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "optimizer": oput.lookup(name).__name__,
        "start": start,
        "first": fmean(losses[:ENDS]),
        "last": fmean(losses[-ENDS:]),
        "held_out": rows[-1]["val_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="optimizers (default: all); others keep their rows")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    names = list(arguments.only or OPTIMIZERS)
    known = json.loads(OUT.read_text())["rows"] if arguments.only and OUT.exists() else []
    rows = {row["optimizer"]: row for row in known}
    about = {"steps": arguments.steps, "batch": 8, "torch": torch.__version__, "machine": platform.machine()}
    with ThreadPoolExecutor(arguments.processes) as pool:
        results = pool.map(lambda name: run(name, arguments.steps), names)
        for row in track(results, total=len(names), description="optimizers"):
            rows[row["optimizer"]] = row
            print(f"{row['optimizer']:20} {row['first']:.3f} -> {row['last']:.3f}, held-out {row['held_out']:.3f}")
            kept = {"about": about, "rows": [rows[key] for key in sorted(rows, key=str.lower)]}
            OUT.write_text(json.dumps(kept, indent=1))  # after each, since a run takes many minutes


if __name__ == "__main__":
    main()
