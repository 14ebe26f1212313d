"""Steps of DeepSpeed engines with the optimizer on the host, ours beside DeepSpeed's CPUAdam, in turns.

    python -m benchmarks.offload [--stage 2] [--dtype float32] [--threads 2] [--rounds 15]

Every optimizer has an engine of its own, all of the same model, in one process. In each round each engine makes a
forward and a backward pass, which are not timed, and then a step: of that the whole ``engine.step()`` is timed, which
clips, copies and gathers too, and within it what the optimizer takes. What the latter may take is 1.25 times what
CPUAdam takes (torch's fused AdamW where CPUAdam does not build), by the bytes that each must move.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .report import machine, plain_table
from .timing import CASES, Case, median_ratio
from .variants import bytes_per_element

LR = 1e-5
BAR = 1.25
OURS = {"adamw": {}, "lion": {}, "adan": {}, "lamb": {"weight_decay": 0.01}}


class Weights(nn.Module):
    """Parameters whose gradients are given."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.02) for shape in case.shapes])

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(w * g).sum() for w, g in zip(self.weights, gradients, strict=True)]).sum()


@dataclass
class Contender:
    """An engine, and the seconds of its steps by round."""

    optimizer: str
    by: str
    engine: Any
    clock: Callable[[], float]
    own: list[float] = field(default_factory=list)
    """Within the optimizer."""
    whole: list[float] = field(default_factory=list)
    """Of ``engine.step()``."""

    def __post_init__(self) -> None:
        self._within = 0.0
        step = self.engine.basic_optimizer.step

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            result = step(*args, **kwargs)
            self._within += self.clock() - start
            return result

        self.engine.basic_optimizer.step = timed

    def turn(self, gradients: list[torch.Tensor], keep: bool) -> None:
        self.engine.backward(self.engine(gradients))
        self._within, start = 0.0, self.clock()
        self.engine.step()
        if keep:
            self.whole.append(self.clock() - start)
            self.own.append(self._within)


def engine_of(case: Case, stage: int, dtype: torch.dtype, entry: dict[str, Any] | Callable[..., Any]) -> Any:
    """An engine with its optimizer on the host: ``entry`` is the optimizer of the configuration, or makes one."""
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    if isinstance(entry, dict):
        config["optimizer"], entry = entry, None  # type: ignore[assignment]
    else:  # DeepSpeed's words for "not one of mine"
        config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    model = Weights(case)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), optimizer=entry, config=config)[0]


def contenders(case: Case, stage: int, dtype: torch.dtype, clock: Callable[[], float]) -> list[Contender]:
    """What steps here; CPUAdam first, if it builds."""
    found = []
    try:
        found.append(Contender("adamw", "DeepSpeedCPUAdam", engine_of(case, stage, dtype, {"type": "AdamW"}), clock))
    except Exception as error:  # whatever a compiler says
        print(f"DeepSpeedCPUAdam does not build here: {type(error).__name__}: {str(error).splitlines()[0]:.100}")

    def fused(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, fused=True)

    found.append(Contender("adamw", "torch fused", engine_of(case, stage, dtype, fused), clock))
    for name, options in OURS.items():
        entry = {"type": f"oput.{name}", "params": {"lr": LR, **options}}
        found.append(Contender(name, "oput", engine_of(case, stage, dtype, entry), clock))
    return found


def measure(found: list[Contender], case: Case, dtype: torch.dtype, rounds: int) -> None:
    """Time all in turns."""
    gradients = [(torch.randn(shape) * 0.01).to(dtype) for shape in case.shapes]
    for number in range(3 + rounds):
        turn = number % len(found)
        for contender in [*found[turn:], *found[:turn]]:
            contender.turn(gradients, number >= 3)


def row(contender: Contender, anchor: Contender, elements: int) -> dict[str, Any]:
    """A line of the table. Offloaded copies of the weights and their state are fp32, whatever the model is."""
    nbytes = bytes_per_element(contender.optimizer)
    return {
        "optimizer": contender.optimizer,
        "by": contender.by,
        "ms": 1000 * statistics.median(contender.own),
        "gb_per_s": nbytes * elements / statistics.median(contender.own) / 1e9,
        "engine_ms": 1000 * statistics.median(contender.whole),
        "ratio": median_ratio(contender.own, anchor.own),
        "by_bytes": median_ratio(contender.own, anchor.own) * bytes_per_element(anchor.optimizer) / nbytes,
    }


def _cells(made: dict[str, Any]) -> tuple[str, ...]:
    over = "" if made["by_bytes"] <= BAR else f" (over {BAR})"
    figures = (f"{made['ms']:.1f}", f"{made['gb_per_s']:.1f}", f"{made['engine_ms']:.0f}", f"{made['ratio']:.2f}")
    return (made["optimizer"], made["by"], *figures, f"{made['by_bytes']:.2f}{over}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--case", choices=[*CASES], default="medium")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, for a machine that others use; with --threads 1"
    )
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(args.threads), DS_ACCELERATOR="cpu")  # CPUAdam has an OpenMP of its own
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo")
    import logging

    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    import oput_dist.deepspeed  # noqa: F401

    logger.setLevel(logging.WARNING)
    __compatible_ops__["deepspeed_shm_comm"] = False  # nothing to communicate with
    clock = time.process_time if args.cpu_time else time.perf_counter
    case, dtype = CASES[args.case], getattr(torch, args.dtype)
    found = contenders(case, args.stage, dtype, clock)
    measure(found, case, dtype, args.rounds)
    table = [row(contender, found[0], case.elements) for contender in found]
    about = {
        **machine(torch.device("cpu")),
        "stage": args.stage,
        "dtype": args.dtype,
        "case": str(case),
        "cpu_time": args.cpu_time,
    }
    print(about)
    headings = ("optimizer", "by", "ms", "GB/s", "engine.step() ms", "x first", "by bytes")
    cells = [_cells(made) for made in table]
    print(plain_table(headings, cells))
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": table}, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
