"""Steps of Shampoo, SOAP and Muon beside other libraries', in turns, on the matrices of a small GPT.

    python -m benchmarks.preconditioned [--width 256] [--layers 4] [--rounds 5] [--threads 2] [--cpu-time]

Roots and bases are found every 10 steps, and blocks are 256 wide, for all that can be told so. Libraries that are not
installed are left out: ``distributed_shampoo`` (facebookresearch/optimizers) and ``heavyball`` are not among the
project's own dependencies.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

import oput_dist as oput

from .timing import median_ratio

EVERY = 10
BLOCK = 256
DELAY = 2  # of what is found beside the training, which here is nothing but more steps
PERIODS = 2  # in a turn: so every turn has as many roots as any other
Make = Callable[[Sequence[torch.Tensor]], Any]


def shapes(width: int, layers: int) -> list[tuple[int, int]]:
    """The matrices of a GPT."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers


def facebooks(params: Sequence[torch.Tensor]) -> Any:
    """Distributed Shampoo with Adam grafted."""
    shampoo = importlib.import_module("distributed_shampoo")
    return shampoo.DistributedShampoo(
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        epsilon=1e-12,
        max_preconditioner_dim=BLOCK,
        precondition_frequency=EVERY,
        start_preconditioning_step=EVERY,
        grafting_config=shampoo.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
    )


def of(library: str, name: str, **options: Any) -> Make:
    """A class of another library."""
    return lambda params: getattr(importlib.import_module(library), name)(params, lr=1e-3, **options)


def routed(params: Sequence[torch.Tensor]) -> Any:
    """pytorch_optimizer's Muon, which is told what is a matrix."""
    muon = importlib.import_module("pytorch_optimizer").Muon
    return muon([{"params": list(params), "use_muon": True}], lr=1e-3)


class InFp32:
    """torch's Muon, which iterates in bfloat16, made to iterate in the dtype of the gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            self._optimizer.step()


CONTENDERS: dict[str, dict[str, Make]] = {
    "shampoo": {
        "oput": lambda p: oput.Shampoo(p, lr=1e-3, block_size=BLOCK, precondition_frequency=EVERY),
        "oput, delayed": lambda p: oput.Shampoo(
            p, lr=1e-3, block_size=BLOCK, precondition_frequency=EVERY, refresh_delay=DELAY
        ),
        "facebookresearch": facebooks,
        "pytorch_optimizer": of("pytorch_optimizer", "Shampoo", preconditioning_compute_steps=EVERY),
        "pytorch_optimizer, blocks": of(
            "pytorch_optimizer",
            "ScalableShampoo",
            block_size=BLOCK,
            preconditioning_compute_steps=EVERY,
            start_preconditioning_step=EVERY,
        ),
    },
    "soap": {
        "oput": lambda p: oput.SOAP(p, lr=1e-3, precondition_frequency=EVERY),
        "oput, delayed": lambda p: oput.SOAP(p, lr=1e-3, precondition_frequency=EVERY, refresh_delay=DELAY),
        "pytorch_optimizer": of("pytorch_optimizer", "SOAP", precondition_frequency=EVERY),
        "heavyball": of("heavyball", "SOAP", precondition_frequency=EVERY),
    },
    "muon": {
        "oput": lambda p: oput.Muon(p, lr=1e-3, ns_dtype="bfloat16"),
        "oput, fp32": lambda p: oput.Muon(p, lr=1e-3),
        "torch": of("torch.optim", "Muon"),
        "torch, fp32": lambda p: InFp32(torch.optim.Muon(p, lr=1e-3)),
        "pytorch_optimizer": routed,
        "heavyball": of("heavyball", "Muon"),
    },
}


def gradients(params: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gradients of full rank that differ from step to step, over and over."""
    kept = [[torch.randn_like(p) for p in params] for _ in range(4)]
    while True:
        yield from kept


def timed(
    optimizer: Any,
    params: Sequence[torch.Tensor],
    given: Iterator[list[torch.Tensor]],
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each step."""
    taken = []
    for _ in range(steps):
        for p, g in zip(params, next(given), strict=True):
            p.grad = g.clone()
        start = clock()
        optimizer.step()
        taken.append(clock() - start)
    return taken


def compare(
    contenders: dict[str, Make], sizes: Sequence[tuple[int, int]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[list[float]]]:
    """For each contender its steps' seconds in every round; those that cannot be made are left out."""
    running = {}
    for name, make in contenders.items():
        params = [torch.randn(size).mul_(0.02).requires_grad_() for size in sizes]
        try:
            optimizer, given = make(params), gradients(params)
            timed(optimizer, params, given, 2 * EVERY + 1)
        except Exception as error:  # whatever another library raises
            print(f"  {name}: left out, {type(error).__name__}: {str(error).splitlines()[0]:.90}")
            continue
        running[name] = (optimizer, params, given)
    found: dict[str, list[list[float]]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, (optimizer, params, given) in running.items():
            # Memory that nobody touched while others had their turn takes virtual machines up to 100 ms to find again.
            timed(optimizer, params, given, EVERY)
            found[name].append(timed(optimizer, params, given, PERIODS * EVERY, clock))
    return found


def row(name: str, turns: list[list[float]], own: list[list[float]]) -> dict[str, Any]:
    """A line of the table: milliseconds, and how many times as long as ours.

    What falls due does so at the same steps of every turn. The dearest of these, by the median over all turns, is not
    what else the machine did at one of them, as the 99th percentile may be.
    """
    steps = sorted(1e3 * second for turn in turns for second in turn)
    return {
        "by": name,
        "mean": statistics.median(1e3 * statistics.mean(turn) for turn in turns),
        "median": statistics.median(steps),
        "p99": steps[min(len(steps) - 1, round(0.99 * len(steps)))],
        "dearest": max(1e3 * statistics.median(alike) for alike in zip(*turns, strict=True)),
        "times ours": median_ratio([sum(turn) for turn in turns], [sum(turn) for turn in own]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, which a busy machine changes least")
    parser.add_argument("--json", help="write the figures to a file")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts one thread: give --threads 1, too")
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    warnings.simplefilter("ignore")
    sizes = shapes(options.width, options.layers)
    rows = []
    for rule in options.only:
        print(f"{rule}: {len(sizes)} matrices, {sum(a * b for a, b in sizes):,} elements, {options.threads} threads")
        wanted = {name: make for name, make in CONTENDERS[rule].items() if name not in options.without}
        found = compare(wanted, sizes, options.rounds, clock)
        for name, turns in found.items():
            rows.append({"rule": rule, **row(name, turns, found["oput"])})
            print(
                "  {by:28} {mean:8.1f} ms a step, median {median:.1f}, p99 {p99:.1f}, "
                "dearest step {dearest:.1f}: {times ours:.2f}".format(**rows[-1])
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"torch": torch.__version__, "threads": options.threads, "shapes": sizes, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
