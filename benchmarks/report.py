"""What is said of the timings: bars that must hold, tables, JSON and plots."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .timing import Case, Timing, ratio
from .variants import bytes_per_element

__all__ = ["Bar", "bars", "machine", "plain_table", "plot", "rows", "show", "write"]

Row = dict[str, Any]
Bar = dict[str, Any]


def machine(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "triton": version,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def rows(case: Case, timings: Sequence[Timing], anchor: Timing | None, dtype: torch.dtype, roof: float) -> list[Row]:
    """A row for each candidate; GB/s count the least bytes that its rule must move."""
    made = []
    for timing in timings:
        nbytes = bytes_per_element(timing.candidate.optimizer, dtype.itemsize) * case.elements
        made.append(
            {
                "case": case.name,
                "tensors": len(case.shapes),
                "elements": case.elements,
                "dtype": str(dtype)[6:],
                "optimizer": timing.candidate.optimizer,
                "by": timing.candidate.by,
                "ms": 1000 * timing.median,
                "quartiles_ms": [1000 * q for q in statistics.quantiles(timing.seconds, n=4)[::2]]
                if len(timing.seconds) > 1
                else [],
                "rounds": len(timing.seconds),
                "of_anchor": math.nan if anchor is None else ratio(timing, anchor),
                "gb_per_s": nbytes / timing.median / 1e9,
                "of_copy": nbytes / timing.median / roof,
                "error": timing.error,
            }
        )
    return made


def bars(case: Case, timings: Sequence[Timing]) -> list[Bar]:
    """What a step on a CPU may cost, as ratios within one run."""
    by_name = {timing.candidate.name: timing for timing in timings if timing.seconds}
    asked: list[tuple[str, str, float]] = []
    if case.name == "small":
        asked.append(("adamw oput default", "adamw torch foreach", 1.5))
    else:
        asked.append(("adamw oput compile", "adamw torch fused", 1.15))
        for name in ("lion", "adan", "lamb", "stableadamw"):
            share = bytes_per_element(name) / bytes_per_element("adamw")
            asked.append((f"{name} oput compile", "adamw torch fused", 1.25 * share))
        asked += [(f"{name} oput default", f"{name} torch foreach", 1.0) for name in ("adamw", "adam", "sgd")]
    return [
        {"case": case.name, "what": a, "over": b, "limit": limit, "ratio": value, "holds": value <= limit}
        for a, b, limit in asked
        if a in by_name and b in by_name
        for value in (ratio(by_name[a], by_name[b]),)
    ]


HEADINGS = ("optimizer", "by", "ms", "GB/s", "of copy", "x torch fused adamw")


def _cells(made: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (r["optimizer"], r["by"], r["error"], "", "", "")
        if r["error"]
        else (
            r["optimizer"],
            r["by"],
            f"{r['ms']:.3g}" if r["ms"] < 100 else f"{r['ms']:.0f}",
            f"{r['gb_per_s']:.1f}",
            f"{r['of_copy']:.0%}",
            f"{r['of_anchor']:.2f}",
        )
        for r in made
    ]


def plain_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, readable as it is."""
    widths = [max(len(row[i]) for row in [headings, *cells]) for i in range(len(headings))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    head = "| " + " | ".join(cell.ljust(w) for cell, w in zip(headings, widths, strict=True)) + " |"
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines])


def timing_table(made: Sequence[Row]) -> str:
    return plain_table(HEADINGS, _cells(made))


def show(title: str, made: Sequence[Row], verdicts: Sequence[Bar]) -> None:
    """Print the table and the bars, in colour where rich is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"\n{title}\n{timing_table(made)}")
    else:
        table = Table(title=title)
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
        for cells in _cells(made):
            table.add_row(*cells)
        Console().print(table)
    for bar in verdicts:
        print(bar_line(bar))


def bar_line(bar: Bar) -> str:
    verdict = "pass" if bar["holds"] else "OVER"
    return f"{verdict}  {bar['case']}: {bar['what']} / {bar['over']} = {bar['ratio']:.2f}, at most {bar['limit']:.2f}"


def write(folder: Path, stem: str, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def plot(folder: Path, stem: str, made: Sequence[Row], title: str) -> Path | None:
    """Milliseconds of every candidate, a panel for each case; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    panels = list(dict.fromkeys((r["case"], r["dtype"]) for r in made))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 9), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        good = [r for r in made if (r["case"], r["dtype"]) == panel and not r["error"]]
        names = [f"{r['optimizer']}  {r['by']}" for r in good]
        colours = ["tab:blue" if r["by"].startswith("oput") else "tab:grey" for r in good]
        axis.barh(names, [r["ms"] for r in good], color=colours)
        axis.bar_label(axis.containers[0], fmt="%.3g", padding=2, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("ms per step (median)")
        axis.set_title(f"{panel[0]}: {good[0]['tensors']:,} x {good[0]['elements'] // good[0]['tensors']:,} {panel[1]}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path = folder / f"{stem}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
