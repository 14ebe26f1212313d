"""How many steps Muon, SOAP and Shampoo need for AdamW's final loss, on a small byte-level GPT.

    python -m benchmarks.race [--steps 300] [--trials 5] [--seeds 3]

Every optimizer gets as many trials of its learning rate, a factor of 2 apart; the best on the held-out text, with one
seed, then runs with several other seeds. The schedule warms up for a tenth of the run and falls to zero along a cosine.
Writes docs/race.md and docs/race.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import oput_dist as oput
from benchmarks.training import Run, Size, train
from launch.data import Corpus, read_corpus

DOCS = Path(__file__).parents[1] / "docs"
SIZE = Size(width=64, layers=2, heads=4, context=64, batch=16)
EVERY = 20  # steps between looks at the held-out text
RACERS: dict[str, tuple[float, dict[str, Any]]] = {  # the rate in the middle of the trials, and settings that stay
    "AdamW": (2e-3, {"betas": (0.9, 0.95), "weight_decay": 0.1}),
    "Muon": (8e-2, {"adam_factor": 0.15, "weight_decay": 0.1}),
    "SOAP": (1.2e-2, {"weight_decay": 0.1}),
    "Shampoo": (8e-3, {"weight_decay": 0.1, "betas": (0.9, 0.95), "graft_beta": 0.95}),
}


def run(name: str, lr: float, seed: int, steps: int, corpus: Corpus) -> Run:
    """Train once."""
    return train(SIZE, lambda model: oput.create(name, model, lr=lr, **RACERS[name][1]), seed, steps, corpus, EVERY)


def trials(name: str, count: int, steps: int, corpus: Corpus) -> dict[float, float]:
    """The final loss at each learning rate that is tried."""
    middle = RACERS[name][0]
    rates = [middle * 2.0 ** (i - count // 2) for i in range(count)]
    return {lr: run(name, lr, 0, steps, corpus).losses[-1] for lr in rates}


def reached(runs: Sequence[Run], goal: float) -> tuple[int, float] | None:
    """The first steps and seconds at which the mean loss of some runs is at the goal."""
    for i, step in enumerate(runs[0].steps):
        if statistics.mean(one.losses[i] for one in runs) <= goal:
            return step, statistics.mean(one.seconds[i] for one in runs)
    return None


def plot(runs: dict[str, list[Run]], goal: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for name, each in runs.items():
        mean = [statistics.mean(one.losses[i] for one in each) for i in range(len(each[0].steps))]
        seconds = [statistics.mean(one.seconds[i] for one in each) for i in range(len(mean))]
        axes[0].plot(each[0].steps[1:], mean[1:], label=name)
        axes[1].plot(seconds[1:], mean[1:], label=name)
    for axis, label in zip(axes, ("steps", "seconds of one core"), strict=True):
        axis.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, mean over seeds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def page(tried: dict[str, dict[float, float]], runs: dict[str, list[Run]], goal: float, options: Any) -> str:
    """docs/race.md."""
    lines = [
        "# A race: steps to AdamW's final loss",
        "",
        f"A GPT of {SIZE.layers} layers, {SIZE.width} wide, over bytes of Python's standard library, {SIZE.batch}",
        f"sequences of {SIZE.context} a step, {options.steps} steps. Each optimizer had {options.trials} trials of",
        f"its learning rate with one seed, a factor of 2 apart; the best ran with {options.seeds} other seeds.",
        "Losses are of held-out text, seconds those of one core, evaluation left out. A small model and a short run on",
        "purpose: the command",
        "below repeats it in minutes, and nothing follows from it for large ones.",
        "",
        "![Loss against steps and against seconds](race.png)",
        "",
        "| optimizer | lr | final loss, mean (least to largest) | steps to AdamW's | seconds to it | seconds in all |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in runs.items():
        final = [one.losses[-1] for one in each]
        at = reached(each, goal)
        lr = min(tried[name], key=tried[name].__getitem__)
        there = f"{at[0]} | {at[1]:.1f}" if at is not None else "not reached | not reached"
        total = statistics.mean(one.seconds[-1] for one in each)
        spread = f"{statistics.mean(final):.3f} ({min(final):.3f} to {max(final):.3f})"
        lines.append(f"| `{name}` | {lr:g} | {spread} | {there} | {total:.1f} |")
    lines += ["", "All trials, final loss by learning rate:", "", "| optimizer | trials |", "| --- | --- |"]
    for name, found in tried.items():
        lines.append(f"| `{name}` | {', '.join(f'{lr:g}: {loss:.3f}' for lr, loss in found.items())} |")
    lines += ["", "```bash", "python -m benchmarks.race", "```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = read_corpus(None, SIZE.context)
    tried, runs = {}, {}
    for name in RACERS:
        tried[name] = trials(name, options.trials, options.steps, corpus)
        best = min(tried[name], key=tried[name].__getitem__)
        runs[name] = [run(name, best, seed, options.steps, corpus) for seed in range(1, options.seeds + 1)]
        print(
            name,
            {lr: round(loss, 3) for lr, loss in tried[name].items()},
            [one.losses[-1] for one in runs[name]],
            flush=True,
        )
    goal = statistics.mean(one.losses[-1] for one in runs["AdamW"])
    plot(runs, goal, DOCS / "race.png")
    (DOCS / "race.md").write_text(page(tried, runs, goal, options))
    print(DOCS / "race.md")


if __name__ == "__main__":
    main()
