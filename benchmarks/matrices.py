"""Time symmetric products and Newton-Schulz iterations beside torch's products: ``python -m benchmarks.matrices``."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oput_dist.kernels.symmetric import symmetric_product
from oput_dist.matrix.orthogonal import NEWTON_SCHULZ, orthogonalized, polar_express

from .matrix_checks import plain_iteration
from .report import machine, plain_table, write
from .timing import take_turns

__all__ = ["Row", "table", "timings"]

Row = dict[str, Any]
Shape = tuple[int, int, int]

ITERATIONS = {
    "5 steps": (NEWTON_SCHULZ,) * 5,
    "8 steps": (NEWTON_SCHULZ,) * 8,
    "5 of Polar Express": polar_express(5),
    "8 of Polar Express": polar_express(8),
}
CPU_SHAPES: list[Shape] = [(8, 256, 256), (8, 256, 400), (8, 256, 512), (8, 256, 1024), (4, 512, 2048)]
PRODUCTS: list[Shape] = [
    *((8, rows, rows) for rows in (256, 512, 1024, 1536, 2048)),
    *((1, rows, 4 * rows) for rows in (1024, 2048, 4096)),
    *((4, rows, rows) for rows in (2048, 4096)),
]
GPU_SHAPES: list[Shape] = [(8, 1024, 1024), (8, 1024, 4096), (4, 2048, 4096), (2, 4096, 8192), (2, 4096, 16384)]


def product(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The kernel and torch, of what a polynomial needs: ``b gram + c gram gram^T``; so shapes give ``x`` of a Gram."""
    x = torch.randn(shape, device=device, dtype=dtype)
    add = x @ x.mT
    return (
        lambda: symmetric_product(x, add, 0.7, -1.3),
        lambda: torch.baddbmm(add, x, x.mT, beta=-1.3, alpha=0.7),
    )


def iteration(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Ours and the plain one."""
    x = torch.randn(shape, device=device, dtype=dtype)
    return lambda: orthogonalized(x, ITERATIONS[name], 1e-7), lambda: plain_iteration(x, ITERATIONS[name])


def timings(device: torch.device, rounds: int, deadline: float = math.inf) -> list[Row]:
    """A row for each case: milliseconds of ours and of torch's, and how many times as fast ours is.

    The kernel of symmetric products on GPUs only, and at all sizes: so it shows from which on it pays.
    """
    made: list[Row] = []
    if device.type == "cuda":
        wanted = [
            ("symmetric product", shape, dtype) for dtype in (torch.bfloat16, torch.float32) for shape in PRODUCTS
        ]
        wanted += [(name, shape, torch.bfloat16) for name in ITERATIONS for shape in GPU_SHAPES]
    else:
        wanted = [(name, shape, torch.float32) for name in ITERATIONS for shape in CPU_SHAPES]
    for name, shape, dtype in wanted:
        if time.monotonic() > deadline:
            break
        pair = product(shape, device, dtype) if name not in ITERATIONS else iteration(name, shape, device, dtype)
        for step in pair:
            step()
        made.append(_row(name, shape, dtype, *take_turns(pair, device, rounds, deadline)))
    return made


def _row(name: str, shape: Shape, dtype: torch.dtype, ours: list[float], plain: list[float]) -> Row:
    return {
        "what": name,
        "shape": list(shape),
        "dtype": str(dtype)[6:],
        "ms": 1000 * statistics.median(ours),
        "plain_ms": 1000 * statistics.median(plain),
        "times_as_fast": statistics.median(b / a for a, b in zip(ours, plain, strict=True)),
    }


def table(made: list[Row]) -> str:
    cells = [
        (
            r["what"],
            " x ".join(map(str, r["shape"])),
            r["dtype"],
            f"{r['ms']:.3g}",
            f"{r['plain_ms']:.3g}",
            f"{r['times_as_fast']:.2f}",
        )
        for r in made
    ]
    return plain_table(("what", "matrices", "dtype", "ms", "plain ms", "times as fast"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrices", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    made = timings(device, args.rounds)
    print(table(made))
    write(args.out, f"matrices-{args.device}", {"machine": machine(device), "rows": made})


if __name__ == "__main__":
    main()
