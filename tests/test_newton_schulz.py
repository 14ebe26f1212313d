"""Newton-Schulz iterations on Gram matrices: where they are taken, and how near they are to the plain iteration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.matrix_checks import plain_iteration
from oput_dist.matrix import orthogonal
from oput_dist.matrix.orthogonal import NEWTON_SCHULZ, Orthogonalize, orthogonalized, polar_express, runs

ITERATIONS = {
    "muon-5": (NEWTON_SCHULZ,) * 5,
    "muon-8": (NEWTON_SCHULZ,) * 8,
    "polar-5": polar_express(5),
    "polar-8": polar_express(8),
}
SPECTRA = ("random", "1/k", "1/k^2", "to 1e-6", "an eighth of the rank", "one large")


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def matrices(spectrum: str, rows: int = 64, columns: int = 256, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, rows, columns, generator=generator, dtype=torch.float64)
    if spectrum == "random":
        return x
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    k = torch.arange(1, rows + 1, dtype=torch.float64)
    values = {"1/k": 1 / k, "1/k^2": 1 / k**2, "to 1e-6": 10 ** (-6 * k / rows)}
    values |= {"an eighth of the rank": (k <= rows / 8).double(), "one large": (k == 1) + 1e-3}
    return (u * values[spectrum]) @ vh


# ------------------------------------------------------------------------------------------ against the plain iteration


@pytest.mark.parametrize("name", ITERATIONS)
@pytest.mark.parametrize("shape", [(2, 64, 160), (3, 64, 256), (1, 40, 1000), (3, 256, 64), (4, 64, 65)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_as_the_plain_iteration(name: str, shape: tuple[int, int, int], dtype: torch.dtype, limit: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wide = x.mT if shape[1] > shape[2] else x
    found = orthogonalized(x, ITERATIONS[name], 1e-7)
    assert found.dtype == dtype
    assert off(found.mT if shape[1] > shape[2] else found, plain_iteration(wide, ITERATIONS[name])) <= limit


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ITERATIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0), (torch.float16, 0.0)])
def test_no_spectrum_is_rounded_much_worse_than_by_the_plain_iteration(
    dtype: torch.dtype, limit: float, name: str, spectrum: str
) -> None:
    """Both against float64: where small singular values make it hard, it is as hard for both."""
    x = matrices(spectrum)
    wanted = plain_iteration(x, ITERATIONS[name])
    found = off(orthogonalized(x.to(dtype), ITERATIONS[name], 1e-7), wanted)
    assert found <= max(limit, 3 * off(plain_iteration(x.to(dtype), ITERATIONS[name]), wanted))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ITERATIONS)
def test_fp64_of_every_spectrum(name: str, spectrum: str) -> None:
    """Eight of Muon's iterations make 2e4 of what is no more than rounding, in the directions that a matrix lacks."""
    x = matrices(spectrum)
    limit = 4e-12 if spectrum == "an eighth of the rank" else 1e-12
    assert off(orthogonalized(x, ITERATIONS[name], 1e-7), plain_iteration(x, ITERATIONS[name])) <= limit


def test_one_gram_matrix_for_all_iterations_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrices("1/k^2")
    wanted = plain_iteration(x, ITERATIONS["muon-8"])
    assert off(orthogonalized(x.float(), ITERATIONS["muon-8"], 1e-7), wanted) < 1e-3
    monkeypatch.setitem(orthogonal.GROWTH, torch.float32, math.inf)
    assert off(orthogonalized(x.float(), ITERATIONS["muon-8"], 1e-7), wanted) > 1e-2


@pytest.mark.parametrize("shape", [(3, 20, 90), (3, 90, 20), (3, 20, 39)])
def test_against_singular_vectors(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        assert off(orthogonalized(x.to(dtype), polar_express(10), 1e-7), u @ vh) < limit


def test_zeros_and_nan_keep_to_themselves() -> None:
    x = matrices("random", 8, 40, 3)
    x[0], x[1, 2, 3] = 0, torch.nan
    found = orthogonalized(x, ITERATIONS["muon-5"], 1e-7)
    assert not found[0].any()
    assert found[1].isnan().all()
    assert off(found[2:], plain_iteration(x[2:], ITERATIONS["muon-5"])) <= 1e-12


@pytest.mark.parametrize("shape", [(7, 24, 96), (7, 24, 30), (7, 96, 24), (7, 6, 8)])
def test_alone_or_in_a_stack(shape: tuple[int, int, int]) -> None:
    """Which rank works on which matrices must not matter: not by more than products of other stacks round otherwise."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for name, iterations in ITERATIONS.items():
        whole = orthogonalized(x, iterations, 1e-7)
        for part in (slice(0, 1), slice(1, 4), slice(4, 7)):
            assert off(orthogonalized(x[part], iterations, 1e-7), whole[part]) <= 1e-14, name


# ------------------------------------------------------------------------------------------------ how they are taken


def test_runs() -> None:
    def lengths(name: str, rows: int, columns: int, dtype: torch.dtype) -> list[int]:
        made = runs(ITERATIONS[name], rows, columns, dtype)
        assert [each for run in made for each in run] == list(ITERATIONS[name])
        return [len(run) for run in made]

    assert lengths("muon-5", 64, 159, torch.float32) == [1] * 5
    assert lengths("muon-5", 64, 160, torch.float32) == lengths("muon-5", 64, 4096, torch.float64) == [3, 2]
    assert lengths("muon-5", 64, 160, torch.bfloat16) == lengths("muon-5", 64, 160, torch.float16) == [2, 2, 1]
    assert lengths("muon-8", 64, 160, torch.float32) == [3, 3, 2]
    assert lengths("polar-5", 64, 160, torch.float32) == [2, 2, 1]
    assert lengths("polar-5", 64, 160, torch.bfloat16) == [1, 2, 2]
    assert lengths("polar-8", 64, 160, torch.float32) == [2, 2, 4]


def counted(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Operations of the products that a call really makes."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        orthogonalized(torch.ones(1, *shape, dtype=dtype), ITERATIONS["muon-5"], 1e-7)
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_cost_is_that_of_what_is_done(dtype: torch.dtype | None) -> None:
    whole = Orthogonalize(ITERATIONS["muon-5"], 1e-7, None, dtype)
    for shape in ((16, 16), (16, 39), (16, 40), (16, 160), (160, 16), (39, 16)):
        assert whole.cost(shape) == counted(shape, dtype or torch.float32)
    assert whole.cost((16, 4, 8)) == whole.cost((16, 32))
    assert whole.cost((64, 256)) < 0.8 * 5 * (4 * 64**2 * 256 + 2 * 64**3)  # that of the plain iteration
