"""Optimizers around others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import oput_dist as oput
from tests.conformance import SECOND, Case

ADAMW, LAMB = ("oput_dist.AdamW", {"lr": 0.1}), ("oput_dist.Lamb", {"lr": 0.1})
SGD = ("oput_dist.SGD", {"lr": 0.2, "momentum": 0.9})


@dataclass(frozen=True)
class Wrapped(Case):
    """``options`` are the wrapper's, and ``inner`` among them the class and the options of what it wraps."""

    partly: bool = False

    def build(self, params: dict[str, torch.Tensor], **extra: Any) -> torch.optim.Optimizer:
        options = dict(self.options)
        kinds = [options.pop(name) for name in ("inner", "direction") if name in options]
        made = [
            Case(self.name, kind, given, self.second if i == 0 else {}).build(params, **extra)
            for i, (kind, given) in enumerate(kinds)
        ]
        wrapper = getattr(oput, self.optimizer.rpartition(".")[2])
        optimizer: torch.optim.Optimizer = wrapper(*made, **options)
        return optimizer


@dataclass(frozen=True)
class Sharp(Wrapped):
    """The second gradient is the first, and the parameters where it is taken."""

    def advance(self, optimizer: Any, step: int, difference: float = 0.0) -> None:
        if optimizer.needs_second_pass:
            optimizer.first_step(zero_grad=False)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.add_(p.detach())
        optimizer.step()


NO_DECAY = {"lr": SECOND["lr"]}
CASES: list[Case] = [
    Wrapped("lookahead adamw", "oput_dist.Lookahead", {"inner": ADAMW, "k": 2, "inner_state": "pullback"}, SECOND),
    Wrapped("lookahead lamb", "oput_dist.Lookahead", {"inner": LAMB, "k": 2}, SECOND, exact=False),
    Wrapped("ema", "oput_dist.EMA", {"inner": ADAMW, "decay": 0.8}, SECOND),
    Wrapped("swa", "oput_dist.SWA", {"inner": ADAMW, "start": 1}, SECOND),
    Wrapped("lawa", "oput_dist.LAWA", {"inner": ADAMW, "window": 2, "every": 1}, SECOND),
    *(
        Wrapped(
            f"adagraft {scope}",
            "oput_dist.AdaGraft",
            {
                "inner": SGD,
                "direction": (ADAMW[0], {"lr": 0.1, "weight_decay": 0.0}),
                "scope": scope,
                "weight_decay": 0.1,
            },
            NO_DECAY,
            exact=False,
            vectors=("direction_step",),
        )
        for scope in ("tensor", "global")
    ),
    Sharp("sam", "oput_dist.SAM", {"inner": SGD, "rho": 0.5}, SECOND, exact=False),
    Sharp("asam", "oput_dist.ASAM", {"inner": LAMB, "rho": 0.5}, SECOND, exact=False),
    Sharp("gsam", "oput_dist.GSAM", {"inner": SGD, "rho": 0.5, "alpha": 0.3}, SECOND, exact=False),
    Sharp("looksam", "oput_dist.LookSAM", {"inner": SGD, "rho": 0.5, "k": 2}, SECOND, exact=False),
]
ORACLES: list[Any] = []  # tests/test_lookahead.py and its neighbours
