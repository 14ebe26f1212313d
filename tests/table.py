"""The conformance table: every optimizer under every layout, measured, written to docs/conformance.md.

    python -m tests.table

It trains as ``tests/test_conformance.py`` does and asserts nothing; the tests do that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch.distributed.tensor.debug import CommDebugMode

import oput_dist as oput
from tests.conformance import LAST, Case, Key, Snapshot, gradients, held, reference, snapshot, start_values, states_of
from tests.layouts import Plain
from tests.pool import Pool
from tests.wrapped import LAYOUTS, WORLDS, WRAPPED_WORLDS

OUT = Path(__file__).resolve().parents[1] / "docs" / "conformance.md"
WHAT = {
    "plain": "every rank alone",
    "zero1": "replicas, `shard_group=`",
    "zero1-pairs": "the same, two groups of two",
    "zero1-strided": "the same, transposed and channels-last parameters",
    "rows": "DTensor, `Shard(0)`",
    "columns": "DTensor, `Shard(1)` where there are two axes",
    "hsdp": "DTensor, replicate x shard",
    "grid": "DTensor on a 2-d mesh",
    "mixture": "plain and DTensor parameters on several meshes",
    "ddp": "`DistributedDataParallel`",
    "ddp-zero1": "the same with `shard_group=`",
    "fsdp2": "`fully_shard`",
    "fsdp2-hsdp": "`fully_shard` on a replicate x shard mesh",
    "tp": "`parallelize_module`, column- and row-wise",
    "fsdp2-tp": "`fully_shard` after `parallelize_module`: strided shards",
    "fsdp1": "`FullyShardedDataParallel`, `use_orig_params=True`",
    "fsdp1-grad": "the same, `SHARD_GRAD_OP`",
    "fsdp1-hybrid": "the same, `HYBRID_SHARD`",
    "fsdp1-flat": "`FullyShardedDataParallel`, `use_orig_params=False`",
    "fsdp1-flat-grad": "the same, `SHARD_GRAD_OP`",
    "fsdp1-flat-hybrid": "the same, `HYBRID_SHARD`",
}


@dataclass
class Measured:
    """What one rank reports of one optimizer: what it holds in the end, or the error that it raised."""

    held: Snapshot
    pieces: dict[str, np.ndarray]
    state_bytes: int
    collectives: int
    raised: str = ""


def on_rank(layout: str, cases: list[Case]) -> list[Measured]:
    pieces = held(LAYOUTS[layout]())
    return [measure(layout, case, pieces) for case in cases]


def measure(name: str, case: Case, pieces: dict[str, np.ndarray]) -> Measured:
    """Trains; the collectives of the last step are counted."""
    layout = LAYOUTS[name]()
    params = layout.start(start_values(torch.float32))
    try:
        optimizer = case.build(params, **layout.options)
        for step in range(LAST):
            layout.give(params, gradients(step, torch.float32, layout.skips))
            case.advance(optimizer, step)
    except ValueError as error:
        return Measured({}, pieces, 0, 0, str(error))
    layout.give(params, gradients(LAST, torch.float32))
    with CommDebugMode() as counter:
        case.advance(optimizer, LAST)
    collectives = counter.get_total_counts()
    kept = snapshot(case, layout, params, states_of(params, optimizer))
    return Measured(kept, pieces, oput.state_bytes(optimizer), collectives)


def error_of(case: Case, layout: str, wanted: Snapshot, got: Measured) -> float:
    """The largest error of a parameter, relative to the largest change of it in training."""
    start, worst = start_values(torch.float64), 0.0
    for name, tensors in wanted.items():
        whole = tensors["param"]
        expected = whole if LAYOUTS[layout].whole_parameters else whole.reshape(-1)[got.pieces[name]]
        if got.pieces[name].size:
            scale = max(np.abs(whole - start[name].numpy()).max(), 1e-30)  # of what did not move, too
            worst = max(worst, np.abs(got.held[name]["param"] - expected).max() / scale)
    return float(worst)


@dataclass
class Cell:
    """What all ranks of one run came to."""

    raised: bool
    error: float = 0.0
    size: tuple[int, int] = (0, 0)
    collectives: int = 0

    @property
    def short(self) -> str:
        """The error alone."""
        return "raises" if self.raised else "exact" if self.error == 0 else f"{self.error:.0e}"

    def __str__(self) -> str:
        least, most = self.size
        held = str(least) if least == most else f"{least}-{most}"
        return self.short if self.raised else f"{self.short}, {held} B, {self.collectives}"


def cell(case: Case, layout: str, ranks: list[Measured]) -> Cell:
    if any(rank.raised for rank in ranks):
        return Cell(True)
    wanted = reference(Key(case), torch.float32, LAYOUTS[layout].skips, LAST + 1)
    error = max(error_of(case, layout, wanted, rank) for rank in ranks)
    sizes = [rank.state_bytes for rank in ranks]
    return Cell(False, error, (min(sizes), max(sizes)), max(rank.collectives for rank in ranks))


Results = dict[str, dict[int, dict[str, Cell]]]
"""By layout, number of ranks, and optimizer."""


def measured(cases: list[Case]) -> Results:
    results: Results = {}
    pool = Pool()
    for layout, n in track([*WORLDS, *WRAPPED_WORLDS], description="layouts"):
        reports = pool.run(n, on_rank, layout, cases, timeout=600.0)
        cells = [cell(case, layout, list(ranks)) for case, ranks in zip(cases, zip(*reports, strict=True), strict=True)]
        results.setdefault(layout, {})[n] = dict(zip(map(called, cases), cells, strict=True))
    pool.close()
    return results


def called(case: Case) -> str:
    return case.optimizer.rpartition(".")[2]


def worst(cells: list[Cell]) -> str:
    """The error of the worst of some runs."""
    return max(cells, key=lambda c: (c.raised, c.error)).short


def summary(results: Results, names: list[str]) -> list[str]:
    """One line for each optimizer: the worst error under each layout, whatever the number of ranks."""
    lines = [f"| optimizer | {' | '.join(results)} |", "| --- " * (len(results) + 1) + "|"]
    for name in names:
        row = [worst([cells[name] for cells in worlds.values()]) for worlds in results.values()]
        lines.append(f"| `{name}` | {' | '.join(row)} |")
    return lines


def details(results: Results, names: list[str]) -> list[str]:
    """A table for each layout: a line for each optimizer, a column for each number of ranks."""
    lines = []
    for layout, worlds in results.items():
        head = " | ".join(f"{n} rank" if n == 1 else f"{n} ranks" for n in worlds)
        lines += [f"### {layout}: {WHAT[layout]}", "", f"| optimizer | {head} |", "| --- " * (len(worlds) + 1) + "|"]
        lines += [f"| `{name}` | {' | '.join(str(cells[name]) for cells in worlds.values())} |" for name in names]
        lines.append("")
    return lines


def main() -> None:
    from tests.test_conformance import ONE_EACH

    cases = sorted({case.optimizer: case for case in ONE_EACH}.values(), key=lambda case: case.optimizer.lower())
    plain = Plain().start(start_values(torch.float32))
    elements = sum(p.numel() for p in plain.values())
    results, names = measured(cases), [called(case) for case in cases]
    text = [
        "# Conformance",
        "",
        f"The same seeded gradients in one process and on several ranks: {LAST + 1} steps, {len(plain)} parameters of "
        f"{elements} fp32 elements, from 0-d to convolutions, with uneven and empty pieces. The largest error of a "
        "parameter relative to its largest change; `exact`: equal to the last bit. Here the worst number of ranks, "
        "below each of them, with bytes of state on a rank (least and most) and the collectives of a step.",
        "",
        "Written by `python -m tests.table`. The tests (`tests/test_conformance.py`) run more: several settings of "
        "every optimizer, fp64 and bf16, gradients that are missing on all ranks or on one, state and counters "
        "compared too; limits are 0 for elementwise optimizers and 1e-6 for the others. CI runs all of them.",
        "",
        *summary(results, names),
        "",
        "Collectives: one all-reduce for each process group and boundary between stages, one more where a boundary "
        "has maxima beside sums, and with `shard_group=` the gather of updated rows. The mixture and 2-d meshes have "
        "several groups. Gradients of parameters that tensor parallelism replicates may arrive as partial sums; adding "
        "them up is counted too.",
        "",
        *details(results, names),
    ]
    OUT.write_text("\n".join(text).rstrip() + "\n")
    print(OUT)


if __name__ == "__main__":
    main()
