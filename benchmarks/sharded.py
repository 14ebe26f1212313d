"""Host time of a step over many small FSDP2 parameters, where a step is bound by what Python does for each of them.

torchrun --standalone --nproc-per-node 2 -m benchmarks.sharded
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import oput_dist as oput

__all__ = ["host_times", "main"]


class _Many(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(32, 32)) for _ in range(count)])

    def forward(self) -> torch.Tensor:
        return torch.stack([w.sum() for w in self.weights]).sum()


def host_times(count: int, rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time of a step of this process, medians of interleaved rounds, for each optimizer.

    CPU time, not wall time: the ranks may share processors with others. Needs a process group.
    """
    module = _Many(count)
    fully_shard(module)
    module().backward()
    options: dict[str, Any] = {"lr": 1e-3}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "torch AdamW foreach": torch.optim.AdamW(module.parameters(), foreach=True, **options),
        **{name: oput.create(name, module, **options) for name in ("adamw", "lion", "lamb", "adamp", "adafactor")},
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            began = time.process_time()
            optimizer.step()
            if turn >= 2:
                times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="parameters")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    times = host_times(args.count, args.rounds)
    if dist.get_rank() == 0:
        for name, ms in times.items():
            print(f"{name:24} {ms:8.1f} ms  {ms / times['torch AdamW foreach']:5.2f}")
        if args.out is not None:
            args.out.write_text(json.dumps({"parameters": args.count, "ms": times}, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
