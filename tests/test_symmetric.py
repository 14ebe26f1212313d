"""Symmetric products: the kernel, interpreted, and the dispatch. On a GPU the same checks are benchmarks.gpu."""

from __future__ import annotations

import contextlib
from concurrent.futures import Executor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.checks import Setup
from benchmarks.matrix_checks import LAYOUTS, SMALL, drawn, product_error, symmetric_products
from oput_dist.kernels.symmetric import SUPPORTED, Launch, launch_of
from oput_dist.matrix import products
from oput_dist.matrix.products import symmetric
from tests.test_kernels import run

CPU = torch.device("cpu")
SIZES, COLUMNS = (1, 15, 16, 17, 33, 100), (40, 1, 33, 16, 15, 17)


# --------------------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
def test_sizes_about_the_tiles(interpreter: Executor, dtype: torch.dtype) -> None:
    cases = [
        ((3 if rows < 50 else 1, rows, columns), "plain", True) for rows, columns in zip(SIZES, COLUMNS, strict=True)
    ]
    run(interpreter, symmetric_products, *((Setup(CPU, dtype), *case, SMALL) for case in cases))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_and_without_a_matrix_added(interpreter: Executor, layout: str) -> None:
    cases = [((3, 18, 50), layout, adds) for adds in (True, False)]
    run(interpreter, symmetric_products, *((Setup(CPU, dtype), *case, SMALL) for dtype in SUPPORTED for case in cases))


@pytest.mark.parametrize("group", [1, 2, 8])
def test_every_tile_is_made_in_any_order(interpreter: Executor, group: int) -> None:
    """Bands that divide the rows of tiles, and bands that do not."""
    launch = Launch(16, 32, group, 4, 2)
    run(interpreter, symmetric_products, *((Setup(CPU), (2, rows, 32), "plain", True, launch) for rows in (64, 80)))


@pytest.mark.parametrize("hip", [False, True])
def test_as_launched_on_gpus(interpreter: Executor, hip: bool) -> None:
    cases = [(Setup(CPU, dtype), (2, 140, 70), "plain", True, launch_of(dtype, hip)) for dtype in SUPPORTED]
    run(interpreter, symmetric_products, *cases)


def seen(setup: Setup, change: str) -> float:
    """The error that the check finds in a right product, after one change."""
    x = drawn(setup, (2, 40, 500), "plain")
    got = (x.double() @ x.double().mT).to(x.dtype)
    if change == "one term less":
        got -= x[..., -1:] @ x[..., -1:].mT
    elif change == "another term":
        got[:, 3, 5] = got[:, 5, 3] = (x[:, 3] * x[:, 4]).sum(-1)
    elif change == "not mirrored":
        got[:, 3, 5] += 1e-5 * got[:, 3, 5].abs().max()
    elif change == "TF32":
        cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
        got = cut @ cut.mT
    elif change == "NaN":
        got[:, 0, 0] = torch.nan
    return product_error(setup, got, x, None, 1.0, 0.0)


def test_the_check_can_fail() -> None:
    assert seen(Setup(CPU), "nothing") <= 1
    for change in ("one term less", "another term", "not mirrored", "TF32", "NaN"):
        assert seen(Setup(CPU), change) > 1, change


# ------------------------------------------------------------------------------------------------------- the dispatch


def by_elements(x: Tensor, add: Tensor | None, alpha: float, beta: float) -> Tensor:
    made = alpha * torch.einsum("nik,njk->nij", x.double(), x.double())
    return made if add is None else made + beta * add.double()


@pytest.mark.parametrize("dtype", [*SUPPORTED, torch.float64], ids=str)
def test_on_a_cpu(dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        x = drawn(Setup(CPU, dtype), (3, 17, 33), layout)
        add = symmetric(x)
        limit = 4 * torch.finfo(dtype).eps * by_elements(x, add, 1.0, 1.0).abs().max().item()
        for given, alpha, beta in ((None, 1.0, 0.0), (None, 0.7, 0.0), (add, 0.7, -1.3), (add, 1.0, 0.0)):
            got = symmetric(x, given, alpha, beta)
            assert got.dtype == dtype
            assert (got.double() - by_elements(x, given, alpha, beta)).abs().max() <= limit


def dispatched_to_the_kernel(adds: bool) -> float:
    """The error of the dispatch where it takes the kernel, here interpreted."""
    setup = Setup(CPU)
    x = drawn(setup, (2, 20, 30), "plain")
    add = x @ x.mT if adds else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_pays", lambda x: True)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.delattr(torch, "bmm")
        patch.delattr(torch, "baddbmm")
        got = symmetric(x, add, 0.7, -1.3)
    return product_error(setup, got, x, add, 0.7, -1.3)


@pytest.mark.parametrize("adds", [False, True])
def test_with_the_kernel(interpreter: Executor, adds: bool) -> None:
    assert interpreter.submit(dispatched_to_the_kernel, adds).result() <= 1


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "start", "device", "wanted"),
    [
        ((1, 2048, 4096), (1, 4096, 1), torch.bfloat16, 0, "cuda", True),
        ((1, 2048, 4096), (1, 1, 2048), torch.float16, 0, "cuda", True),
        ((1, 2032, 4096), (1, 4096, 1), torch.bfloat16, 0, "cuda", False),
        ((1, 2056, 4096), (1, 4096, 1), torch.bfloat16, 0, "cuda", False),
        ((1, 2048, 4097), (1, 4112, 1), torch.bfloat16, 0, "cuda", False),
        ((1, 2048, 4096), (1, 4097, 1), torch.bfloat16, 0, "cuda", False),
        ((1, 2048, 4096), (1, 4096, 1), torch.bfloat16, 2, "cuda", False),
        ((1, 2048, 4096), (1, 4096, 1), torch.float32, 0, "cuda", False),
        ((1, 2048, 4096), (1, 4096, 1), torch.bfloat16, 0, "cpu", False),
    ],
)
def test_where_the_kernel_pays(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, start: int, device: str, wanted: bool
) -> None:
    of_gpu: Any = SimpleNamespace(
        shape=shape, stride=lambda: strides, dtype=dtype, data_ptr=lambda: start, device=torch.device(device)
    )
    assert products._pays(of_gpu) is wanted


def test_what_is_added_must_fit() -> None:
    x = torch.ones(2, 3, 4)
    for add in (torch.ones(2, 4, 4), torch.ones(3, 3), torch.ones(2, 3, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"add is .*: must be torch.float32 \(2, 3, 3\), as the product"):
            symmetric(x, add)
