"""Whether the kernels that code state do what torch operations do, and whether steps on coded state agree."""

from __future__ import annotations

import math
from typing import Any

import torch

import oput_dist as oput
from oput_dist.backends import backend, decode, encode
from oput_dist.kernels.codes import FORMATS, Format

from .checks import Result, Setup

__all__ = ["coded_steps", "codes", "values"]


def values(code: Format, count: int) -> torch.Tensor:
    """Blocks of numbers of many sizes, one of zeros, one that is tiny, one that is not finite."""
    drawn = torch.randn(count, code.block, generator=torch.Generator().manual_seed(0))
    drawn = drawn * drawn.roll(1, 1).exp() * 10.0 ** (torch.arange(count) % 24 - 12).unsqueeze(1)
    drawn[1], drawn[2] = 0.0, 1e-38
    drawn[3, 5] = math.inf
    return drawn if code.signed else drawn.abs()


def codes(number: int, setup: Setup, count: int, exact: bool) -> Result:
    """Codes, scales and values of a format of ``FORMATS``, by both ways.

    A GPU multiplies and adds at once: then a code may be the one beside it, on the border of its cell.
    """
    code = FORMATS[number]
    given = values(code, count).to(setup.device)
    made = []
    for name in (setup.backend, "eager"):
        bits = torch.zeros(count, code.width, dtype=torch.uint8, device=setup.device)
        scales = torch.zeros(count, device=setup.device)
        encode(backend(name), [(code, bits, scales, given)])
        out = torch.empty_like(given)
        decode(backend(name), [(code, bits, scales, out)])
        again = torch.zeros_like(bits)
        encode(backend(name), [(code, again, scales, given)], known=True)
        made.append([bits, scales, out, again])
    finite = given.isfinite().all(1)
    if not torch.equal(made[0][1], made[1][1]) or made[0][2][~finite].isfinite().any():
        return Result(math.inf, "scales differ, or what is not finite became so")
    differ = sum(int((a[finite] != b[finite]).sum()) for a, b in zip(made[0][::3], made[1][::3], strict=True))
    apart = (made[0][2] - made[1][2])[finite].abs() / made[1][1][finite].clamp(min=1e-30).unsqueeze(1)
    allowed = 0.5 if exact else 1e-3 * given.numel()
    near = apart.max().item() <= (0 if exact else 0.13 if code.bits == 4 else 0.07)
    return Result(differ / allowed if near else math.inf, f"{differ} codes differ, values by {apart.max():.1e}")


def coded_steps(name: str, state: str, setup: Setup, exact: bool) -> Result:
    """Parameters after steps on coded state against those of backend eager."""
    found, wanted = (_trained(name, state, setup, each) for each in (setup.backend, "eager"))
    if exact:
        same = all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        return Result(0.0 if same else math.inf, "" if same else "not the same bits")
    errors = [((a - b).abs().mean() / 1e-3).item() for a, b in zip(found, wanted, strict=True)]
    return Result(max(errors), "mean error of a parameter, of 1e-3")


def _trained(name: str, state: str, setup: Setup, chosen: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(40, 130), (5000,), (64, 256), (100, 41)]
    params = [torch.randn(shape, generator=generator).to(setup.device).requires_grad_() for shape in shapes]
    options: dict[str, Any] = {"backend": chosen, "state_dtype": state, "lr": 1e-2}
    optimizer = oput.create(name, params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(setup.device)
        optimizer.step()
    return [p.detach().cpu() for p in params]
