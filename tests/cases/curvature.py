"""Optimizers that divide by an estimate of the Hessian: here four times the squared gradient, at every other step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sophia_opt

import oput_dist as oput
from tests.conformance import SECOND, Case
from tests.formulas.curvature import BATCH, adahessian, sophia
from tests.parity import Oracle


@dataclass(frozen=True)
class Curved(Case):
    """Takes an estimate before every other step."""

    def advance(self, optimizer: Any, step: int, difference: float = 0.0) -> None:
        if step % 2 == 0:
            optimizer.update_hessian(BATCH)
        super().advance(optimizer, step, difference)


CASES: list[Case] = [
    Curved("sophia", "oput_dist.Sophia", {"lr": 0.1, "rho": 0.5}, SECOND),
    Curved("sophia-g", "oput_dist.SophiaG", {"lr": 0.1, "rho": 2.0, "maximize": True}, SECOND),
    Curved("sophia-h", "oput_dist.SophiaH", {"lr": 0.1, "rho": 0.1, "weight_decay": 0.0}, SECOND),
    Curved("adahessian", "oput_dist.AdaHessian", {"lr": 0.1}, SECOND),
    Curved("adahessian power", "oput_dist.AdaHessian", {"lr": 0.1, "hessian_power": 0.5}, SECOND, exact=False),
]


def given_estimates(kind: Any) -> Any:
    """A class of the suite that takes an estimate before every other step."""

    class Given(kind):  # type: ignore[misc]
        steps = 0

        def step(self, closure: Any = None) -> Any:
            if self.steps % 2 == 0:
                self.update_hessian(BATCH)
            self.steps += 1
            return super().step(closure)

    Given.__name__ = kind.__name__
    return Given


class Reference(sophia_opt.SophiaG):  # type: ignore[misc]
    """The authors', which takes the batch at every step."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        if self.steps % 2 == 0:
            self.update_hessian()
        self.steps += 1
        return super().step(closure, bs=BATCH)


SOPHIA: list[dict[str, Any]] = [
    {"lr": 0.02},
    {"lr": 0.02, "betas": (0.5, 0.8), "rho": 3.0, "weight_decay": 0.2},
]
ADAHESSIAN: list[dict[str, Any]] = [
    {"lr": 0.02},
    {"lr": 0.02, "betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.2, "hessian_power": 0.5},
]
ORACLES = [
    *(Oracle(given_estimates(oput.SophiaG), options, sophia) for options in SOPHIA),
    # Theirs multiplies in another order, and adds 1e-15 to the denominator.
    *(Oracle(given_estimates(oput.SophiaG), options, Reference, limit=1e-14) for options in SOPHIA),
    Oracle(given_estimates(oput.Sophia), {"lr": 0.02, "eps": 0.1}, sophia),
    Oracle(given_estimates(oput.SophiaH), {"lr": 0.02, "rho": 0.5, "betas": (0.5, 0.8)}, sophia),
    Oracle(given_estimates(oput.AdaHessian), ADAHESSIAN[0], adahessian),
    Oracle(given_estimates(oput.AdaHessian), ADAHESSIAN[1], adahessian, limit=1e-14),  # a power by logarithms
]
