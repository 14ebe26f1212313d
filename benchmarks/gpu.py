"""Check and time every Triton path on one NVIDIA GPU, in at most nine minutes: ``python -m benchmarks.gpu``.

Needs PyTorch and Triton only, and no installation: run it from the root of the repository. Without a GPU it compiles
every rule for three of them and exits 0. ``--device cpu`` under ``TRITON_INTERPRET=1`` runs the checks interpreted.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from oput_dist.backends import interpreting
from oput_dist.kernels.codes import FORMATS
from oput_dist.kernels.symmetric import SUPPORTED
from oput_dist.matrix.orthogonal import polar_express

from . import checks, coding_checks, cuda_checks, hosting_checks, machine_code, matrices, matrix_checks
from .checks import Result, Setup
from .peers import candidates
from .report import machine, plain_table, timing_table, write
from .step import compare
from .timing import CASES, Case, copy_bandwidth, even
from .variants import MAX_NORM, Variant, variants

LIMIT = 530.0
"""Seconds after which the process ends itself, whatever hangs."""
CLIPPED = {"weight_decay": 0.1, "maximize": True, "max_grad_norm": MAX_NORM}

Job = tuple[str, Callable[..., Result], tuple[Any, ...]]
Section = tuple[str, float, list[Job]]


def sections(device: torch.device) -> list[Section]:
    """Title, seconds, and checks of each section."""
    cuda = device.type == "cuda"
    fp32 = Setup(device)
    few = [Variant("adamw"), Variant("lamb", CLIPPED), Variant("adafactor")]
    plain = [variant for variant in variants() if not variant.options]
    dtypes = [
        (fp32, variants() if cuda else plain),
        (Setup(device, torch.bfloat16), plain if cuda else few),
        (Setup(device, torch.float16), few if cuda else []),
        (Setup(device, torch.bfloat16, torch.float32), few if cuda else []),
        (Setup(device, torch.float64), few if cuda else []),
    ]
    right: list[Job] = [
        (f"{variant.name}, {setup.name}", checks.accuracy, (variant, setup))
        for setup, chosen in dtypes
        for variant in chosen
    ]
    launches: list[Job] = [
        (f"many tensors: {variant.name}", checks.many_tensors, (variant, fp32, 5_000 if cuda else 50))
        for variant in [*few[:1], Variant("lamb")]
    ]
    size, times = (1_000_001, 100) if cuda else (3_000, 3)
    launches += [(f"repeated: {variant.name}", checks.repeatable, (variant, fp32, size, times)) for variant in few[-1:]]
    launches += [
        ("exact sums", checks.exact_sums, (fp32, 100_000_000 if cuda else 50_000)),
        *(
            (f"sums of boxes {shape}", checks.kept_sums, (fp32, shape))
            for shape in (*checks.BOXES, *([(4_096, 8_192)] if cuda else []))
        ),
        ("segmented sums", checks.segments, (fp32, 1_000_000 if cuda else 5_000)),
    ]
    launches += [
        (f"lr is a tensor on {where}: {variant.name}", checks.tensor_lr, (variant, fp32, where))
        for where in dict.fromkeys((device, torch.device("cpu")))
        for variant in few
    ]
    found: list[Section] = [("against float64", 255.0, right), ("launches, sums, scalars", 70.0, launches)]
    found.append(
        (
            "one rank of a job",
            60.0,
            [
                (f"{layout}: {variant.name}", cuda_checks.one_rank, (variant, fp32, layout))
                for layout in ("fsdp2", "zero1")
                for variant in few
            ],
        )
    )
    found.append(("matrices", 45.0, matrix_jobs(device)))
    coded: list[Job] = [
        (
            f"{code.name}, {'signed' if code.signed else 'never negative'}",
            coding_checks.codes,
            (i, fp32, count, not cuda),
        )
        for count in (100_001 if cuda else 37,)
        for i, code in enumerate(FORMATS)
    ]
    coded += [
        (f"{name}, state in {state}", coding_checks.coded_steps, (name, state, fp32, not cuda and name == "lion"))
        for name in ("lion", "adamw", "lamb")
        for state in ("int8", "fp8", "int4")
    ]
    found.append(("coded state", 30.0, coded))
    found.append(("state in host memory", 45.0, hosting_jobs(device)))
    if cuda:
        host: list[Job] = [(f"no waiting: {v.name}", cuda_checks.no_synchronization, (v, fp32)) for v in plain]
        host += [(f"schedule: {v.name}", cuda_checks.schedule_compiles_nothing, (v, fp32)) for v in few]
        host += [
            (f"backend {name}: {v.name}", checks.accuracy, (v, Setup(device, backend=name)))
            for name in ("compile", "foreach")
            for v in few
        ]
        found.append(("the host's side", 90.0, host))
    return found


def hosting_jobs(device: torch.device) -> list[Job]:
    """Steps on state that comes from the host and goes there; on GPUs also what the copies take."""
    cuda, setup = device.type == "cuda", Setup(device)
    scale, steps = (64, 10) if cuda else (1, 2)
    low = Setup(device, torch.bfloat16)
    wanted: list[tuple[str, Setup, dict[str, Any]]] = [
        ("adamw", setup, {}),
        ("lion", setup, {}),
        ("adamw", setup, {"state_dtype": "int8"}),
        ("adamw", low, {}),
        ("lion", low, {"stochastic_rounding": True, "state_dtype": torch.bfloat16}),
    ]
    jobs: list[Job] = [
        (f"{name}, {where.name} {options or ''}", hosting_checks.hosted_steps, (name, where, scale, steps, options))
        for name, where, options in (wanted if cuda else wanted[:3:2])
    ]
    if cuda:
        jobs += [(f"no waiting: {name}", hosting_checks.never_waits, (name, setup)) for name in ("adamw", "lamb")]
        jobs += [("memory on the device", hosting_checks.bounded, (setup,)), ("rate", hosting_checks.rate, (setup,))]
    return jobs


def matrix_jobs(device: torch.device) -> list[Job]:
    """Symmetric products and what is built of them; on GPUs large ones as they are launched there."""
    cuda = device.type == "cuda"
    small = [((3, 100, 40), layout, layout != "strided") for layout in matrix_checks.LAYOUTS]
    large = [((1, 2_048, 4_096), layout, True) for layout in matrix_checks.LAYOUTS]
    large += [((2, 1_000, 500), "plain", False), ((2, 2_051, 130), "plain", True)]
    jobs: list[Job] = [
        (
            f"symmetric product {shape}, {layout}, {str(dtype)[6:]}",
            matrix_checks.symmetric_products,
            (Setup(device, dtype), shape, layout, adds, None if cuda else matrix_checks.SMALL),
        )
        for dtype in SUPPORTED
        for shape, layout, adds in (*small, *(large if cuda else ()))
    ]
    shapes = [(2, 100, 400), *([(2, 2_048, 2_048), (1, 2_048, 8_192)] if cuda else [])]
    jobs += [
        (f"Newton-Schulz {shape}, {str(dtype)[6:]}", matrix_checks.newton_schulz, (Setup(device, dtype), shape, polar))
        for dtype in SUPPORTED
        for shape in shapes
        for polar in (polar_express(5), polar_express(8))
    ]
    if cuda:
        jobs.append(("kernel where it pays", matrix_checks.kernel_where_it_pays, (Setup(device, torch.bfloat16),)))
    return jobs


def check(title: str, seconds: float, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Run the checks of a section; what its time does not suffice for is no pass."""
    deadline = time.monotonic() + seconds
    outcomes = []
    for name, function, args in jobs:
        start = time.monotonic()
        if start > deadline:
            result = Result(math.nan, "not run: no time left")
        else:
            try:
                result = function(*args)
            except Exception as error:  # each check stands alone
                traceback.print_exc()
                result = Result(math.inf, f"{type(error).__name__}: {error}".splitlines()[0])
        outcomes.append(
            {"section": title, "check": name, "ok": result.ok, **dataclasses.asdict(result)}
            | {"seconds": round(time.monotonic() - start, 2)}
        )
        print(f"{'ok  ' if result.ok else 'FAIL'} {name}: error {result.error:.2g} {result.note}", flush=True)
    return outcomes


def timings(device: torch.device, deadline: float, quick: bool) -> tuple[list[dict[str, Any]], float]:
    """Ours and torch's, fp32 and bf16, a large model and small tensors."""
    roof = copy_bandwidth(device, 2**25 if quick else 2**32)
    backends: list[str | None] = ["triton", "compile"] if device.type == "cuda" else ["triton"]
    names = ["adamw", "lion", "adan", "lamb", "stableadamw"]
    wanted = candidates(names, backends)
    cases: list[tuple[Case, torch.dtype]] = [
        (CASES["model"], torch.float32),
        (CASES["model"], torch.bfloat16),
        (CASES["small"], torch.float32),
    ]
    if quick:
        cases, names = [(even("tiny", 2_000, 2), torch.float32)], names[:1]
    made = []
    for case, dtype in cases:
        for name in names:
            rows, _ = compare(name, wanted, case, device, dtype, 3 if quick else 20, roof, deadline)
            made += rows
        print(f"\n{case}, {dtype}\n{timing_table(made[-sum(c.optimizer in names for c in wanted) :])}", flush=True)
    return made, roof


def without_gpu() -> int:
    print("no NVIDIA GPU here: compiling every rule for other machines' GPUs instead")
    multiprocessing.set_forkserver_preload(["benchmarks.machine_code"])  # importing takes longer than compiling
    rows = machine_code.report(machine_code.jobs())
    cells = [
        (
            r.program,
            r.target,
            r.dtype,
            f"{r.wide_loads} of {r.needed_loads}",
            f"{r.wide_stores} of {r.needed_stores}",
            str(r.spills),
        )
        for r in rows
    ]
    print(plain_table(("program", "target", "dtype", "128-bit loads", "stores", "spills"), cells))
    made = machine_code.products()
    print(f"\nsymmetric products\n{machine_code.product_table(made)}")
    found = machine_code.faults(rows) + machine_code.product_faults(made)
    print("\n".join(found) or f"all {len(rows)} programs: every access 128 bits wide, nothing spilled")
    return int(bool(found))


def summary(outcomes: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]], about: Any, roof: float) -> str:
    titles = list(dict.fromkeys(o["section"] for o in outcomes))
    counted = [
        (t, str(sum(o["ok"] for o in outcomes if o["section"] == t)), str(sum(o["section"] == t for o in outcomes)))
        for t in titles
    ]
    failed = [
        f"- FAIL {o['section']}: {o['check']}: error {o['error']:.3g} {o['note']}" for o in outcomes if not o["ok"]
    ]
    parts = [f"# {about.get('gpu', about['cpu'])}, torch {about['torch']}, Triton {about['triton']}, {about['date']}"]
    parts.append(plain_table(("checks", "right", "of"), counted))
    parts += ["\n".join(failed)] if failed else []
    parts.append(f"Copy within device memory: {roof / 1e9:.0f} GB/s, read and written together.")
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in made):
        some = [r for r in made if (r["case"], r["dtype"]) == (case, dtype)]
        title = f"{case}: {some[0]['tensors']:,} tensors, {some[0]['elements']:,} elements, {dtype}"
        parts.append(f"{title}\n\n{timing_table(some)}")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: under TRITON_INTERPRET=1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    start = time.monotonic()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return without_gpu()
    if device.type == "cpu" and not interpreting():
        parser.error("--device cpu needs TRITON_INTERPRET=1: without a GPU Triton can only be interpreted")
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # last resort, for a hang
    quick = device.type == "cpu"
    about, stem = machine(device), f"gpu-{'interpreted' if quick else 'cuda'}"
    outcomes: list[dict[str, Any]] = []
    for section in sections(device):
        print(f"\n{section[0]}", flush=True)
        outcomes += check(*section)
        write(args.out, stem, {"machine": about, "checks": outcomes})  # kept, should a later section hang
    made, products, roof, broken = [], [], math.nan, False
    try:
        made, roof = timings(device, start + LIMIT - 120, quick)
        products = [] if quick else matrices.timings(device, 9, start + LIMIT - 30)
    except Exception:  # the checks are to be reported all the same
        traceback.print_exc()
        broken = True
    content = {"machine": about, "copy_gb_per_s": roof / 1e9, "checks": outcomes, "rows": made}
    content["matrices"] = products
    write(args.out, stem, content)
    text = summary(outcomes, made, about, roof)
    text += f"\nmatrices\n\n{matrices.table(products)}\n" if products else ""
    (args.out / f"{stem}.md").write_text(text)
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{text}\n{time.monotonic() - start:.0f} s")
    return int(broken or not all(o["ok"] for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
