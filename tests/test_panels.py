"""Symmetric products on CPUs: below the diagonal in panels, copied above it, against products in full in float64."""

from __future__ import annotations

import pytest
import torch

from oput_dist.kernels.mirror import can_mirror, mirror
from oput_dist.matrix.products import PANEL, _in_panels, add_symmetric, symmetric


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 5, 16, 17, 33, 200, 257, 1024])
def test_mirror_copies_what_is_below_the_diagonal(size: int, dtype: torch.dtype) -> None:
    made = torch.randn(2, size, size, dtype=dtype)
    wanted = made.tril() + made.tril(-1).mT
    assert can_mirror(made)
    mirror(made)
    assert torch.equal(made, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(2, 256, 128), (1, 300, 200), (2, 513, 130)])
def test_panels_are_the_product(shape: tuple[int, int, int], turned: bool, dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=drawn, dtype=torch.float64).to(dtype)
    x = x.mT.contiguous().mT if turned else x
    old = torch.randn(shape[0], shape[1], shape[1], generator=drawn, dtype=torch.float64).to(dtype)
    old = old + old.mT
    wanted = 0.9 * old.double() + 0.1 * x.double() @ x.double().mT
    assert _in_panels(x)
    assert shape[1] >= 2 * PANEL
    made = symmetric(x, old, 0.1, 0.9)
    add_symmetric(old, x, 0.1, 0.9)
    assert torch.equal(made, old)
    assert torch.equal(made, made.mT)
    torch.testing.assert_close(made.double(), wanted, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-12)
    alone, atol = symmetric(x), 2e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(alone.double(), x.double() @ x.double().mT, rtol=0, atol=atol)
