"""The support table of docs/deepspeed.md: every optimizer at every ZeRO stage, measured.

    python -m tests.deepspeed_table

It trains as ``tests/test_deepspeed.py`` does and asserts nothing; the tests do that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.conformance import Case, Key
from tests.deepspeed_worlds import Weighed, World, on_rank, reference, start_values
from tests.pool import Pool
from tests.test_deepspeed import ONE_EACH

OUT = Path(__file__).resolve().parents[1] / "docs" / "deepspeed.md"
BEGIN, END = "<!-- written by python -m tests.deepspeed_table -->\n", "<!-- end -->\n"
RANKS = (1, 2, 3)


def error_of(wanted: Weighed, got: Weighed) -> float:
    """The largest error of a parameter, relative to its largest change."""
    start = start_values()
    errors = [
        np.abs(got[name] - whole).max() / max(np.abs(whole - start[name].numpy()).max(), 1e-30)
        for name, whole in wanted.items()
    ]
    return float(max(errors))


def measured(cases: list[Case]) -> list[list[float]]:
    """For each stage the worst error of each optimizer, on any number of ranks."""
    pool, worst = Pool(), []
    for stage in range(4):
        errors = [0.0] * len(cases)
        for n in RANKS:
            for ranks in pool.run(n, on_rank, World(stage, 3), cases, timeout=600.0):
                found = [error_of(reference(Key(c), 3), got) for c, got in zip(cases, ranks, strict=True)]
                errors = [max(pair) for pair in zip(errors, found, strict=True)]
        worst.append(errors)
    pool.close()
    return worst


def main() -> None:
    cases = sorted(ONE_EACH, key=lambda case: case.optimizer.lower())
    columns = [["exact" if error == 0 else f"{error:.0e}" for error in stage] for stage in measured(cases)]
    lines = ["| `type` | stage 0 | 1 | 2 | 3 |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{case.optimizer.replace('oput_dist', 'oput')}` | {' | '.join(row)} |"
        for case, row in zip(cases, zip(*columns, strict=True), strict=True)
    ]
    text = OUT.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    OUT.write_text(head + "\n" + "\n".join(lines) + "\n\n" + tail)
    print(OUT)


if __name__ == "__main__":
    main()
