"""Writes docs/planning.md: what each of six optimizers costs for Llama-3-8B, from 1 to 1,024 ranks.

python -m benchmarks.plan
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import oput_dist as oput
from oput_dist.collectives.routes import WAVE_BYTES

__all__ = ["OPTIONS", "OUT", "llama", "text"]

OUT = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
RANKS = [2**i for i in range(11)]
OPTIMIZERS = ["AdamW", "Lamb", "Adafactor", "Muon", "Shampoo", "SOAP"]
OPTIONS: dict[str, dict[str, Any]] = {"shampoo": {"block_size": 1024}, "soap": {"block_size": 2048}}
HEAD = """# Planning: Llama-3-8B from 1 to 1,024 ranks

`oput.plan` computes this without running anything; this page is written by `python -m benchmarks.plan`. {elements:,}
fp32 parameters under FSDP2 on a mesh of one dimension, that is {size:.2f} GiB on N = 1. Shampoo has blocks of 1,024,
SOAP of 2,048 (`block_size`), all else is default: roots and bases every ten steps, embedding and head by AdamW.

- **state**: GiB of the fullest rank, and over an even share, the state of one process over N.
- **sent**: MiB a step by the busiest rank, for the optimizer alone: sums; matrices to owners and back, in fp32.
- **balance**: time and bytes of the owner that has most over the mean; in parentheses what the time is at least while
  no block is split, where that is above 1.05.
- **collectives**: a step's. Matrices travel in waves of {wave} MiB for each owner, two all-to-alls each.
- **step**: estimated milliseconds, nothing overlapped, on the constants of `oput.Machine()`:
  {machine}.
  None of these was measured here; give your own as `machine=`.

What the rows show: of Muon's 96 largest matrices some of 64 ranks must have two, and of more than 224 ranks some have
none: only splitting matrices would go further. Shampoo's and SOAP's blocks are many and small, and balance up to
several hundred ranks. Adafactor's rows and columns are the same on all ranks, so its share of state grows with N; they
are small.
"""


class Layer(nn.Module):
    """The matrices and norms of a transformer layer; it computes nothing."""

    def __init__(self, width: int, keys: int, hidden: int) -> None:
        super().__init__()
        sizes = {"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width)}
        sizes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))
        self.norms = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in range(2))


def llama() -> nn.Module:
    """The parameters of Llama-3-8B, on the meta device."""
    with torch.device("meta"):
        model = nn.Module()
        model.embed = nn.Embedding(128256, 4096)
        model.layers = nn.ModuleList(Layer(4096, 1024, 14336) for _ in range(32))
        model.norm = nn.RMSNorm(4096)
        model.lm_head = nn.Linear(4096, 128256, bias=False)
    return model


def text() -> str:
    """The page."""
    model = llama()
    elements = sum(p.numel() for p in model.parameters())
    constants = ", ".join(f"`{name}={value:g}`" for name, value in vars(oput.Machine()).items())
    lines = [HEAD.format(elements=elements, size=4 * elements / 2**30, wave=WAVE_BYTES // 2**20, machine=constants)]
    rows = {(ranks, name): _row(model, name.lower(), ranks) for ranks in RANKS for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        lines += [
            f"## {name}",
            "",
            "| N | state | over even share | sent | balance: time, bytes | collectives | step |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(rows[ranks, name] for ranks in RANKS),
            "",
        ]
    lines += ["## One of them in full", "", "```", str(oput.plan(model, "muon", 64)), "```"]
    return "\n".join(lines) + "\n"


def _row(model: nn.Module, name: str, ranks: int) -> str:
    told = oput.plan(model, name, ranks, **OPTIONS.get(name, {}))
    least, _ = told.least_imbalance
    bound = f" ({least:.2f})" if least > 1.05 else ""
    owners = f"{told.owner_seconds.imbalance:.2f}{bound}, {told.owner_bytes.imbalance:.2f}"
    cells = (
        f"{ranks:,}",
        f"{told.state_bytes.most / 2**30:.3f}",
        f"{told.state_share:.2f}",
        f"{told.sent_bytes.most / 2**20:,.2f}",
        owners if told.owner_seconds.most else "",
        ", ".join(f"{count} {kind}" for kind, count in told.collectives.items() if count) or "none",
        f"{told.step_seconds * 1e3:,.1f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    OUT.write_text(text())
    print(OUT)
