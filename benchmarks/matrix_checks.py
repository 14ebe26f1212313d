"""Whether symmetric products and Newton-Schulz iterations are right, on a GPU or interpreted on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oput_dist.kernels.symmetric import Launch, symmetric, symmetric_product
from oput_dist.matrix.orthogonal import orthogonalized
from oput_dist.matrix.products import LEAST_ROWS
from oput_dist.matrix.products import symmetric as dispatched

from .checks import Result, Setup

__all__ = ["LAYOUTS", "SMALL", "drawn", "kernel_where_it_pays", "newton_schulz", "plain_iteration", "product_error",
           "symmetric_products"]  # fmt: skip

LAYOUTS = ("plain", "transposed", "strided")
SMALL = Launch(block=16, depth=16, group=2, warps=4, stages=2)
"""For small matrices, so that they have several tiles and bands."""
ALPHA, BETA = 0.7, -1.3


def drawn(setup: Setup, shape: tuple[int, int, int], layout: str) -> Tensor:
    """Random matrices, as they lie in memory by one of ``LAYOUTS``."""
    n, rows, columns = shape
    generator = torch.Generator().manual_seed(rows + columns)
    if layout == "transposed":
        return torch.randn(n, columns, rows, generator=generator).to(setup.device, setup.dtype).mT
    if layout == "strided":
        whole = torch.randn(n + 1, 2 * rows, 2 * columns + 3, generator=generator).to(setup.device, setup.dtype)
        return whole[1:, ::2, 3::2]
    return torch.randn(shape, generator=generator).to(setup.device, setup.dtype)


def product_error(setup: Setup, got: Tensor, x: Tensor, add: Tensor | None, alpha: float, beta: float) -> float:
    """The largest error of a product, in units of what is allowed; infinite if it is not symmetric to the last bit.

    Allowed are the rounding of the store, and that of fp32 sums: it grows with the root of the number of terms. What
    TF32 would lose is more, up to some thousand columns.
    """
    if got.dtype != x.dtype or not torch.equal(got, got.mT):
        return math.inf
    exact, unit = x.double(), 2.0**-24
    wanted = alpha * exact @ exact.mT
    norms = torch.linalg.vector_norm(exact, dim=-1)
    sums = abs(alpha) * math.sqrt(x.shape[-1]) * norms[:, :, None] * norms[:, None, :]
    if add is not None:
        wanted += beta * add.double()
        sums += abs(beta) * add.double().abs()
    interpreted = setup.device.type == "cpu" and x.dtype == torch.bfloat16  # stored truncated
    own = (1 if interpreted else 0.501) * torch.finfo(x.dtype).eps
    allowed = own * wanted.abs() + 2 * unit * sums + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    error = ((got.double() - wanted).abs() / allowed).max().item()
    return error if error == error else math.inf


def symmetric_products(
    setup: Setup, shape: tuple[int, int, int], layout: str, adds: bool, launch: Launch | None = None
) -> Result:
    """The kernel against float64."""
    x = drawn(setup, shape, layout)
    half = drawn(setup, (shape[0], shape[1], shape[1]), "plain")
    add = half + half.mT if adds else None
    got = symmetric_product(x, add, ALPHA, BETA, launch)
    return Result(product_error(setup, got, x, add, ALPHA, BETA))


def plain_iteration(x: Tensor, coefficients: Sequence[Sequence[float]], eps: float = 1e-7) -> Tensor:
    """Newton-Schulz as it is written down, of wide matrices, by torch's products."""
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


NEWTON_SCHULZ_ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Allowed of random matrices, relative, in the Frobenius norm: about thrice what the plain iteration is off."""


def newton_schulz(setup: Setup, shape: tuple[int, int, int], coefficients: Sequence[Sequence[float]]) -> Result:
    """Wide matrices against the plain iteration in float64 on the same device."""
    x = drawn(setup, shape, "plain")
    wanted = plain_iteration(x.double(), coefficients)
    got = orthogonalized(x, coefficients, 1e-7).double()
    error = torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted)
    return Result(error.item() / NEWTON_SCHULZ_ERROR[setup.dtype], f"{error.item():.1e} off")


def kernel_where_it_pays(setup: Setup) -> Result:
    """The dispatch launches the kernel from ``LEAST_ROWS`` on, and neither below nor for odd sizes nor for fp32."""
    launches = 0

    def count(*_: Any, **__: Any) -> None:
        nonlocal launches
        launches += 1

    least = LEAST_ROWS[torch.bfloat16]
    cases = [(least, torch.bfloat16, 1), (least - 16, torch.bfloat16, 0), (least + 1, torch.bfloat16, 0)]
    cases += [(least, torch.float16, 1), (least, torch.float32, 0)]
    symmetric.add_pre_run_hook(count)
    try:
        for rows, dtype, wanted in cases:
            launches = 0
            dispatched(torch.ones(1, rows, 64, device=setup.device, dtype=dtype))
            if launches != wanted:
                return Result(math.inf, f"{launches} launches for {rows} rows in {dtype}")
    finally:
        symmetric.pre_run_hooks.remove(count)
    return Result(0.0, f"from {least} rows on")
