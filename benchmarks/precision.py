"""Final losses with parameters in bfloat16, and with optimizer state in few bits, beside float32.

    python -m benchmarks.precision [--only parameters|state] [--seeds 1]

The demo's model, the same batches in the same order. Writes docs/precision.md from the runs in --out, where every run
is kept as it ends, so that a broken one goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import oput_dist as oput
from benchmarks.training import Size, train
from launch.data import read_corpus
from launch.model import GPT

PAGE = Path(__file__).parents[1] / "docs" / "precision.md"
DEMO = Size(width=128, layers=4, heads=4, context=128, batch=8)
RATES = {"adamw": 1e-3, "lion": 2e-4, "adan": 2e-3, "lamb": 1e-2}
STEPS = {"parameters": 2000, "state": 500}
FP32 = "float32"
WIDE = {"state_dtype": "fp32"}


@dataclass(frozen=True)
class Setting:
    """One row of a table: how parameters and state are kept."""

    table: str
    optimizer: str
    name: str
    low: bool
    options: dict[str, Any]

    def make(self) -> Callable[[GPT], torch.optim.Optimizer]:
        """The optimizer of a model."""

        def made(model: GPT) -> torch.optim.Optimizer:
            if self.low:
                oput.to_low_precision(model, fp32_modules=None)
            return oput.create(self.optimizer, model, lr=RATES[self.optimizer], weight_decay=0.1, **self.options)

        return made


SETTINGS = [
    Setting("parameters", "adamw", FP32, False, {}),
    Setting("parameters", "adamw", "bfloat16, Kahan summation", True, WIDE),
    Setting(
        "parameters",
        "adamw",
        "bfloat16, stochastic rounding",
        True,
        {**WIDE, "stochastic_rounding": True},
    ),
    Setting("parameters", "adamw", "bfloat16, plain", True, {**WIDE, "kahan_sum": False}),
    *(
        Setting("state", optimizer, name, False, options)
        for optimizer in RATES
        for name, options in ((FP32, {}), ("int8", {"state_dtype": "int8"}))
    ),
    *(Setting("state", "adamw", name, False, {"state_dtype": name}) for name in ("fp8", "int4")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["parameters", "state"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = read_corpus(None, DEMO.context)
    options.out.mkdir(parents=True, exist_ok=True)
    losses: dict[int, list[float]] = {}
    for number, setting in enumerate(SETTINGS):
        if options.only in (None, setting.table):
            for seed in range(options.seeds):
                steps = STEPS[setting.table]
                file = options.out / f"{setting.table}-{setting.optimizer}-{number}-{steps}-{seed}.json"
                if not file.exists():
                    run = train(DEMO, setting.make(), seed, steps, corpus, steps // 10)
                    file.write_text(json.dumps(vars(run)))
                    print(setting.optimizer, setting.name, seed, run.losses[-1], flush=True)
                losses.setdefault(number, []).append(json.loads(file.read_text())["losses"][-1])
    if options.only is None:
        PAGE.write_text(page(losses, options))
        print(PAGE)


def page(losses: dict[int, list[float]], options: argparse.Namespace) -> str:
    """docs/precision.md."""
    lines = [
        "# Losses in low precision",
        "",
        f"The demo's GPT ({DEMO.layers} layers, {DEMO.width} wide) on bytes of Python's standard library,",
        f"{DEMO.batch} sequences a step, {options.seeds} seed(s). Rows of a table begin with the same parameters",
        "and see the same batches; rows of one optimizer have one learning rate. Losses are of held-out text, computed",
        "in float32 from the parameters as they are. Made by `python -m benchmarks.precision`.",
    ]
    for table, title in (("parameters", "Parameters in bfloat16"), ("state", "State in few bits")):
        lines += [
            "",
            f"## {title}",
            "",
            f"{STEPS[table]} steps.",
            "",
            "| optimizer | | final loss | against float32 |",
            "| --- | --- | --- | --- |",
        ]
        base: dict[str, float] = {}
        for number, setting in enumerate(SETTINGS):
            if setting.table == table:
                mean = statistics.mean(losses[number])
                base.setdefault(setting.optimizer, mean)
                apart = "" if setting.name == FP32 else f"{100 * (mean / base[setting.optimizer] - 1):+.2f}%"
                lines.append(f"| `{setting.optimizer}` | {setting.name} | {mean:.4f} | {apart} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
