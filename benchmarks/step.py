"""Time optimizer steps side by side: ``python -m benchmarks.step --help``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .peers import Candidate, candidates
from .report import Bar, Row, bars, machine, plot, rows, show, write
from .timing import CASES, Case, copy_bandwidth, even, measure


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument(
        "--case", choices=["large", "small", "model", "all"], default="all", help="all: large and small"
    )
    parser.add_argument("--elements", type=int, help="elements in all, in place of --case")
    parser.add_argument("--tensors", type=int, default=1, help="equal tensors that --elements are cut into")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "lion", "adan", "lamb", "stableadamw", "sgd"])
    parser.add_argument("--backends", nargs="+", default=None, help="of ours; by default: default, foreach, compile")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", help="of the files; default: step-cpu or step-cuda")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[Case]:
    if args.elements:
        return [even(f"{args.tensors}x{args.elements // args.tensors}", args.elements, args.tensors)]
    return [CASES[name] for name in (("large", "small") if args.case == "all" else (args.case,))]


def compare(
    name: str,
    wanted: Sequence[Candidate],
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    roof: float,
    deadline: float = math.inf,
) -> tuple[list[Row], list[Bar]]:
    """Time what runs one optimizer, and torch's fused AdamW among it, which all bars refer to."""
    anchor = candidates(["adamw"], [], libraries=False)[-1]
    entered = [candidate for candidate in wanted if candidate.optimizer == name]
    extra = [] if name == "adamw" else [anchor]
    timings = measure([*entered, *extra], case, device, dtype, rounds, deadline)
    fused = next((t for t in timings if t.candidate.name == anchor.name), None)
    judged = bars(case, timings) if device.type == "cpu" and dtype == torch.float32 else []
    return rows(case, timings[: len(entered)], fused, dtype, roof), judged


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    names = args.backends or ["default", "foreach", "compile", *["triton"] * (device.type == "cuda")]
    wanted = candidates(args.optimizers, [None if name == "default" else name for name in names])
    about = machine(device)
    roof = copy_bandwidth(device, 2**32 if device.type == "cuda" else 2**28)
    print(f"{about}\ncopy within memory: {roof / 1e9:.1f} GB/s")
    table, verdicts = [], []
    for case in cases(args):
        for name in args.optimizers:
            made, judged = compare(name, wanted, case, device, dtype, args.rounds, roof)
            show(f"{case}, {args.dtype}, {args.rounds} rounds", made, judged)
            table += made
            verdicts += judged
    stem = args.name or f"step-{device.type}"
    content = {"machine": about, "copy_gb_per_s": roof / 1e9, "rows": table, "bars": verdicts}
    print(f"written: {write(args.out, stem, content)}")
    title = f"{about['gpu'] if 'gpu' in about else about['cpu']}, {about['threads']} threads, torch {about['torch']}"
    print(f"written: {plot(args.out, stem, table, title)}")


if __name__ == "__main__":
    main()
