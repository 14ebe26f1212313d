"""What rank 0 shows and writes: a progress bar or plain lines, metrics.jsonl and loss.png."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import oput_dist as oput

PLAIN_LINES = 20  # of a whole run, where the output is not a terminal
GPU_ROWS = 10  # written at a time, so that a GPU's queue of work rarely runs dry
PLOT_SECONDS = 60.0  # between two updates of the plot


class Clock:
    """Moments on the device's own time line, read later without stopping it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Call it for CUDA events only after the device has passed `end`."""
        return float(start.elapsed_time(end)) if self.cuda else (end - start) * 1e3


@dataclass
class Row:
    """One step, still on the device: `marks` are the moments before it, after an estimate of curvature (if any), after
    backward and after the optimizer."""

    step: int
    loss: Tensor
    lr: float
    marks: tuple[Any, Any, Any, Any]
    estimated: bool
    val_loss: Tensor | None = None
    curvature: oput.SophiaReport | None = None


class Report:
    """Collects the rows of a run. The device is waited for only in `flush`."""

    def __init__(
        self, out: Path, kept: int, steps: int, step_tokens: int, clock: Clock, state_bytes: Callable[[], int]
    ):
        """Keeps the rows of an earlier run up to step `kept`; -1 keeps none."""
        self.out, self.steps, self.step_tokens, self.clock, self.state_bytes = (
            out,
            steps,
            step_tokens,
            clock,
            state_bytes,
        )
        self.metrics = out / "metrics.jsonl"
        self.history = keep_rows(self.metrics, kept)
        self.file = self.metrics.open("a")
        self.pending: list[Row] = []
        self.val_loss: float | None = next((r["val_loss"] for r in reversed(self.history) if "val_loss" in r), None)
        self.plotted = time.monotonic()
        self.bar = _bar(steps, max(kept, 0))

    def first(self, val_loss: Tensor) -> None:
        """The held-out loss of the untrained model, as step 0."""
        self._write({"step": 0, "val_loss": val_loss.item()})
        self.say(f"step 0/{self.steps}  held-out loss {self.val_loss:.3f}")

    def add(self, row: Row, flush: bool) -> None:
        """Take a row; `flush` writes it now, else it may wait for a moment that is cheap for the device."""
        self.pending.append(row)
        if flush or row.val_loss is not None or not self.clock.cuda or len(self.pending) == GPU_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows, and show the last."""
        for row in self.pending:
            loss = row.loss.item()
            estimate, forward_backward, optimizer = (
                self.clock.milliseconds(start, end) for start, end in pairwise(row.marks)
            )
            entry = {
                "step": row.step,
                "loss": loss,
                "lr": row.lr,
                "tokens_per_s": round(self.step_tokens / (estimate + forward_backward + optimizer) * 1e3, 1),
                "forward_backward_ms": round(forward_backward, 3),
                "optimizer_ms": round(optimizer, 3),
            }
            if row.estimated:
                entry["estimate_ms"] = round(estimate, 3)
            if row.val_loss is not None:
                entry["val_loss"] = row.val_loss.item()
            if row.curvature is not None:
                entry |= {name: value.item() for name, value in row.curvature._asdict().items()}
            self._write(entry)
            if self.bar is None and (row.step % max(1, self.steps // PLAIN_LINES) == 0 or "val_loss" in entry):
                print(f"step {row.step}/{self.steps}  {self._line(entry)}", flush=True)
        if self.pending and self.bar is not None:
            self.bar(self.pending[-1].step, self._line(entry))
        self.pending.clear()
        if time.monotonic() - self.plotted > PLOT_SECONDS:
            self.plot()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        """Finish the bar and the file."""
        if self.bar is not None:
            self.bar(None, "")
        self.file.close()

    @property
    def estimating(self) -> float | None:
        """The time that estimates of curvature took, as a share of that of all else; None without any."""
        rows = [row for row in self.history if "optimizer_ms" in row]
        if not any("estimate_ms" in row for row in rows):
            return None
        spent = sum(row.get("estimate_ms", 0.0) for row in rows)
        return float(spent / sum(row["forward_backward_ms"] + row["optimizer_ms"] for row in rows))

    def plot(self) -> Path | None:
        self.plotted = time.monotonic()
        return draw(self.history, self.out / "loss.png")

    def _write(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        self.val_loss = entry.get("val_loss", self.val_loss)

    def _line(self, entry: dict[str, Any]) -> str:
        held_out = "" if self.val_loss is None else f"held-out {self.val_loss:.3f}  "
        if "clip_fraction" in entry:
            held_out += f"clipped {entry['clip_fraction']:.0%}  Hessian norm {entry['hessian_norm']:.2g}  "
        return (
            f"loss {entry['loss']:.3f}  {held_out}lr {entry['lr']:.1e}  {entry['tokens_per_s']:,.0f} tokens/s  "
            f"forward/backward {entry['forward_backward_ms']:.1f} ms  optimizer {entry['optimizer_ms']:.1f} ms  "
            f"state {self.state_bytes() / 1e6:.2f} MB/rank"
        )


def keep_rows(path: Path, last: int) -> list[dict[str, Any]]:
    """Cut the file after step `last`, and at a row that a killed run left unfinished; returns what is kept."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > last:
            break
        rows.append(row)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> Path | None:
    """The loss curve; None if matplotlib is not installed."""
    try:
        import matplotlib.figure  # pyplot would take longer to import, and keep the figure
    except ImportError:
        return None
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "held out", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _bar(steps: int, done: int) -> Callable[[int | None, str], None] | None:
    """A function that moves a progress bar (None: ends it), or None where there is no terminal or no rich."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
    progress = Progress(*columns)
    task = progress.add_task("", total=steps, completed=done, line="")
    progress.start()

    def move(step: int | None, line: str) -> None:
        if step is None:
            progress.stop()
        else:
            progress.update(task, completed=step, line=line)

    return move
