"""Whether kernels write parameters of 16 bits as the eager backend does, whatever is done about rounding."""

from __future__ import annotations

import math
from typing import Any

import torch

from .checks import ABSENT, LOSS, Result, Setup, give_gradients, groups, shapes_for, snapshot, steps_for, tensors
from .variants import LR, Variant

__all__ = ["compensated", "tossed"]


def compensated(variant: Variant, setup: Setup, exact: bool) -> Result:
    """Parameters with what their rounding lost, and the state, which is fp32, against those of backend eager.

    Args:
        variant: the optimizer.
        setup: where, and in which dtype parameters are.
        exact: whether nothing less than equality is right: of interpreted rules without roots and sums.
    """
    found, wanted = (_trained(variant, setup, backend, {}) for backend in (setup.backend, "eager"))
    unit = torch.finfo(setup.dtype).eps
    error = 0.0
    for got, right in zip(found, wanted, strict=True):
        if "kahan_comp" not in right or got.keys() != right.keys():
            return Result(math.inf, f"state {sorted(got)}")
        if exact and not all(torch.equal(got[k], right[k]) for k in right):
            return Result(math.inf, "not the same bits")
        off = (got["p"] + got["kahan_comp"] - right["p"] - right["kahan_comp"]).abs()
        error = max(error, (off / (unit**2 * (1 + right["p"].abs()) + 1e-5)).max().item())
    return Result(error if error == error else math.inf)


def tossed(variant: Variant, setup: Setup, exact: bool) -> Result:
    """Parameters that were rounded stochastically against those of backend eager; all bits are the same.

    Where arithmetic differs in the last bit of fp32, one in some thousands may fall on the other side.
    """
    options = {"stochastic_rounding": True}
    found, wanted = (_trained(variant, setup, backend, options) for backend in (setup.backend, "eager"))
    pairs = [(got["p"], right["p"]) for got, right in zip(found, wanted, strict=True)]
    differ = sum(int((got != right).sum()) for got, right in pairs)
    near = all(((g - r).abs() <= 2 * torch.finfo(setup.dtype).eps * r.abs() + 1e-4).all() for g, r in pairs)
    allowed = 0.5 if exact else 1e-3 * sum(got.numel() for got, _ in pairs)
    return Result(differ / allowed if near else math.inf, f"{differ} elements differ")


def _trained(variant: Variant, setup: Setup, backend: str, options: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    params = tensors(setup, shapes_for(setup))
    optimizer = variant.build(groups(params, LR), backend=backend, state_dtype=torch.float32, **options)
    for step in steps_for(setup):
        give_gradients(params, step, ABSENT.get(step))
        optimizer.run(None, LOSS)
    return snapshot(optimizer, params)
