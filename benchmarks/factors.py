"""Final losses of Shampoo and SOAP with factors in fewer bytes, beside float32: on the model of the race.

    python -m benchmarks.factors [--steps 300] [--seeds 3] [--only Shampoo SOAP]

Prints the table of docs/memory.md. Learning rates are those that won the race with float32. Shampoo runs once as it did
there, and once with statistics that change by a thousandth at a step, as is its default.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

import oput_dist as oput
from benchmarks.race import RACERS, SIZE
from benchmarks.training import train
from launch.data import Corpus, read_corpus

RATES = {"Shampoo": 0.016, "SOAP": 0.024}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("Shampoo", "`betas=(0.9, 0.95)`", {}),
    ("Shampoo", "`betas=(0.9, 0.999)`", {"betas": (0.9, 0.999)}),
    ("SOAP", "", {}),
]
FORMS = (None, "bfloat16", "int8")


def loss(name: str, options: dict[str, Any], seed: int, steps: int, corpus: Corpus) -> tuple[float, int]:
    """The final loss on held-out text, and bytes of state."""
    made: list[torch.optim.Optimizer] = []

    def make(model: Any) -> torch.optim.Optimizer:
        made.append(oput.create(name, model, lr=RATES[name], **{**RACERS[name][1], **options}))
        return made[0]

    run = train(SIZE, make, seed, steps, corpus, steps)
    return run.losses[-1], oput.state_bytes(made[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(RATES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    corpus = read_corpus(None, SIZE.context)
    print("| optimizer | | `factor_dtype` | final loss, mean (least to largest) | against float32 | bytes of state |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, title, options in CASES:
        base = 0.0
        for form in FORMS if name in given.only else ():
            runs = [
                loss(name, {**options, "factor_dtype": form}, seed, given.steps, corpus)
                for seed in range(1, given.seeds + 1)
            ]
            losses = [one for one, _ in runs]
            mean = statistics.mean(losses)
            base = mean if form is None else base
            spread = f"{mean:.4f} ({min(losses):.3f} to {max(losses):.3f})"
            print(
                f"| `{name}` | {title} | `{form!r}` | {spread} | {mean / base - 1:+.2%} | {runs[0][1]:,} |", flush=True
            )


if __name__ == "__main__":
    main()
