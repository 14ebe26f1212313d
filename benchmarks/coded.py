"""Steps on state in few bits beside steps on float32 state, in turns: ``python -m benchmarks.coded [--rounds 15]``."""

from __future__ import annotations

import argparse

import torch

import oput_dist as oput

from .peers import LR, Candidate, Make
from .report import machine, plain_table
from .timing import CASES, measure, ratio

FORMS: tuple[str | None, ...] = (None, "bf16", "int8", "fp8", "int4")


def candidate(name: str, form: str | None, backend: str | None) -> Candidate:
    """An optimizer with its state in some form."""
    make: Make = lambda params: oput.create(name, params, lr=LR, state_dtype=form, backend=backend)  # noqa: E731
    return Candidate(name, form or "float32", make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=list(CASES), default="large")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "lion", "lamb"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, case = torch.device(options.device), CASES[options.case]
    backend = "compile" if device.type == "cpu" else None
    print(f"{machine(device)}\n{case}, {options.rounds} rounds")
    rows = []
    for name in options.optimizers:
        wanted = [candidate(name, form, backend) for form in FORMS]
        timings = measure(wanted, case, device, torch.float32, options.rounds)
        for timing in timings:
            apart = f"{ratio(timing, timings[0]):.2f}"
            rows.append((name, timing.candidate.by, timing.error or f"{1e3 * timing.median:.1f}", apart))
    print(plain_table(("optimizer", "state", "ms", "times float32"), rows))


if __name__ == "__main__":
    main()
