"""Inverse roots of positive semidefinite matrices. One that fails is reported, and is no NaN anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["METHODS", "inverse_root", "orthogonal_basis"]

_NEWTON_STEPS = 40
_SCHULZ_STEPS = 40


def by_eigenvalues(stacked: torch.Tensor, root: float, ridge: float = 0.0) -> torch.Tensor:
    """``(A + ridge I)^(-1/root)`` by an eigendecomposition. Eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(stacked)
    powers = (values.clamp(min=torch.finfo(stacked.dtype).tiny) + ridge).pow(-1.0 / root)
    found: torch.Tensor = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return found


def by_newton(stacked: torch.Tensor, root: float, ridge: float = 0.0) -> torch.Tensor:
    """``(A + ridge I)^(-1/p)`` for a whole number ``p`` by the coupled Newton iteration.

    ``x <- x ((1 + 1/p) I - m / p)``, and ``m = x^p a`` goes to the identity (Guo and Higham 2006; Anil et al.,
    https://arxiv.org/abs/2002.09018).
    """
    p = int(root)
    size = stacked.shape[-1]
    identity = torch.eye(size, dtype=stacked.dtype, device=stacked.device).expand_as(stacked)
    stacked = stacked + ridge * identity
    scale = (1 + p) / (2 * _norm(stacked))
    m = stacked * scale
    x = identity * scale.pow(1.0 / p)
    for _ in range(_NEWTON_STEPS):
        factor = identity * (1 + 1 / p) - m / p
        x = x @ factor
        m = torch.linalg.matrix_power(factor, p) @ m
    return (x + x.mT) / 2


def by_newton_schulz(stacked: torch.Tensor, root: float, ridge: float = 0.0) -> torch.Tensor:
    """``(A + ridge I)^(-1/2^k)`` by ``k`` square roots, each by coupled Newton-Schulz iterations (Higham 2008, 6.7)."""
    stacked = stacked + ridge * torch.eye(stacked.shape[-1], dtype=stacked.dtype, device=stacked.device)
    for _ in range(int(math.log2(root)) - 1):
        stacked, _ = _square_roots(stacked)
    return _square_roots(stacked)[1]


def _square_roots(stacked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``A^(1/2)`` and ``A^(-1/2)``."""
    scale = _norm(stacked)
    y = stacked / scale
    z = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y)
    identity = z
    for _ in range(_SCHULZ_STEPS):
        middle = 1.5 * identity - 0.5 * (z @ y)
        y, z = y @ middle, middle @ z
    return (y + y.mT) / 2 * scale.sqrt(), (z + z.mT) / 2 / scale.sqrt()


def _norm(stacked: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.matrix_norm(stacked, keepdim=True)
    return found


METHODS: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "eigh": by_eigenvalues,
    "newton": by_newton,
    "newton_schulz": by_newton_schulz,
}
"""Ways to an inverse root. Newton's needs a whole number, Newton-Schulz a power of two from 2 on."""


def inverse_root(stacked: torch.Tensor, root: float, ridge: float, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(A + ridge I)^(-1/root)`` of each matrix, and which of them succeeded.

    A matrix on which the method fails is tried by eigendecomposition in float64, and if the device cannot do that, on
    the CPU. What then is not finite is zeros.

    Args:
        stacked: ``[n, d, d]``, symmetric, no eigenvalue below zero but by rounding.
        root: > 0.
        ridge: added to the diagonal, >= 0.
        method: of :data:`METHODS`.

    Returns:
        ``[n, d, d]`` in the dtype of ``stacked``; ``[n]`` bool on its device.
    """
    return _checked(stacked, lambda a: METHODS[method](a, root, ridge), lambda a: by_eigenvalues(a, root, ridge))


def orthogonal_basis(stacked: torch.Tensor, last: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors of each symmetric matrix, the largest eigenvalue first, and which succeeded.

    Args:
        stacked: ``[n, d, d]``.
        last: a basis that was near, ``[n, d, d]``, to take one step of orthogonal iteration from; None to start.
    """
    if last is None:
        return _checked(stacked, _eigenvectors, _eigenvectors)
    return _checked(stacked @ last, _orthonormal, _orthonormal)


def _eigenvectors(stacked: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.eigh(stacked)[1].flip(-1)
    return found


def _orthonormal(stacked: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.qr(stacked)[0]
    return found


def _checked(
    given: torch.Tensor, quick: Callable[[torch.Tensor], torch.Tensor], sure: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``quick`` makes; where that fails, what ``sure`` makes in float64. Waits for the device."""
    usable = torch.isfinite(given).flatten(1).all(1)
    clean = torch.where(
        usable[:, None, None], given, torch.eye(given.shape[-1], dtype=given.dtype, device=given.device)
    )
    try:
        made = _shared_out(quick, clean)
    except (RuntimeError, torch.linalg.LinAlgError):  # one matrix that does not converge fails the whole stack
        made = torch.full_like(clean, math.nan)
    good = torch.isfinite(made).flatten(1).all(1)
    for i in (usable & ~good).nonzero().flatten().tolist():
        made[i] = _slowly(clean[i : i + 1].double(), sure)[0].to(made)
    good = usable & torch.isfinite(made).flatten(1).all(1)
    return torch.where(good[:, None, None], made, torch.zeros_like(made)), good


def _shared_out(function: Callable[[torch.Tensor], torch.Tensor], stacked: torch.Tensor) -> torch.Tensor:
    """``function`` of parts of a stack, each on a core of its own.

    LAPACK makes little of several threads, and where other processes want the cores too, they wait for each other:
    seconds for what takes milliseconds.
    """
    threads = torch.get_num_threads()
    if stacked.device.type != "cpu" or threads == 1 or len(stacked) < threads:
        return function(stacked)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(function, stacked.tensor_split(threads))))
    finally:
        torch.set_num_threads(threads)


def _slowly(one: torch.Tensor, sure: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    for device in dict.fromkeys((one.device, torch.device("cpu"))):
        try:
            return sure(one.to(device)).to(one.device)
        except (RuntimeError, torch.linalg.LinAlgError):
            continue
    return torch.full_like(one, math.nan)
