"""Inverse roots of positive semidefinite matrices. One that fails is reported, and is no NaN anywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from .cores import shared_out
from .kronecker import Mask

__all__ = ["METHODS", "Checked", "eigenvectors", "inverse_roots", "orthonormal"]

_NEWTON_STEPS = 40
_SCHULZ_STEPS = 40
_ALIASED, _APART = 1024, 8
"""Columns of so many elements fall on the same lines of a CPU's caches, and a decomposition takes an eighth longer; so
many zeros more at the end of each, which stay zeros, tell them apart."""


def by_eigenvalues(stacked: torch.Tensor, root: float, ridge: float = 0.0) -> torch.Tensor:
    """``(A + ridge I)^(-1/root)`` by an eigendecomposition. Eigenvalues that rounding made negative count as zero."""
    values, vectors = _eigh(stacked)
    powers = (values.clamp(min=torch.finfo(stacked.dtype).tiny) + ridge).pow(-1.0 / root)
    return torch.bmm(vectors * powers.unsqueeze(-2), vectors.mT)


def _eigh(stacked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, rising, and eigenvectors. Transposed, so that columns, as LAPACK has them, need no slow copy."""
    values, vectors = torch.linalg.eigh(stacked.mT)
    return values, vectors


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


Stacks = Sequence[torch.Tensor]
"""Each ``[n, d, d]``, of one dtype, on one device."""
Checked = list[tuple[torch.Tensor, Mask]]
"""For each stack what was found, of its shape and dtype, and which of it succeeded."""


def inverse_roots(stacks: Stacks, root: float, ridge: float, method: str) -> Checked:
    """``(A + ridge I)^(-1/root)`` of each matrix of some stacks.

    A matrix on which the method fails is tried by eigendecomposition in float64, and if the device cannot do that, on
    the CPU. What then is not finite is zeros.

    Args:
        stacks: symmetric matrices, no eigenvalue below zero but by rounding.
        root: > 0.
        ridge: added to the diagonal, >= 0.
        method: of :data:`METHODS`.
    """
    return _checked(stacks, lambda a: METHODS[method](a, root, ridge), lambda a: by_eigenvalues(a, root, ridge))


def eigenvectors(stacks: Stacks) -> Checked:
    """Eigenvectors of symmetric matrices, the largest eigenvalue first. What fails is as in :func:`inverse_roots`."""
    return _checked(stacks, _eigenvectors, _eigenvectors)


def orthonormal(stacks: Stacks) -> Checked:
    """Each matrix with its columns made orthonormal, from the first on. What fails is as in :func:`inverse_roots`."""
    return _checked(stacks, _orthonormal, _orthonormal)


def _eigenvectors(stacked: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _eigh(stacked)[1].flip(-1)
    return found


def _orthonormal(stacked: torch.Tensor) -> torch.Tensor:
    if stacked.device.type != "cpu":
        found: torch.Tensor = torch.linalg.qr(stacked)[0]
        return found
    size = stacked.shape[-1]
    if size % _ALIASED == 0:
        stacked = torch.nn.functional.pad(stacked.mT, (0, _APART)).mT
    reflected, scales = torch.geqrf(stacked)  # what qr does, which also copies R: a quarter of its time
    found = torch.linalg.householder_product(reflected, scales)
    return found[..., :size, :]


Function = Callable[[torch.Tensor], torch.Tensor]


def _checked(stacks: Stacks, quick: Function, sure: Function) -> Checked:
    """What ``quick`` makes; where that fails, what ``sure`` makes in float64. Waits for the device."""
    usable = [_finite(stack) for stack in stacks]
    clean = [stack if fine is None else _cleaned(stack, fine) for stack, fine in zip(stacks, usable, strict=True)]
    made = _shared_out(quick, clean)
    return [_mended(*each, sure) for each in zip(clean, made, usable, strict=True)]


def _finite(stacked: torch.Tensor) -> Mask:
    if all(map(math.isfinite, torch.linalg.vector_norm(stacked, dim=(1, 2)).tolist())):
        return None
    fine = torch.isfinite(stacked).all(2).all(1)  # the norm may be too large by itself
    return None if bool(fine.all()) else fine


def _cleaned(stacked: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """With the identity for what is not fine."""
    identity = torch.eye(stacked.shape[-1], dtype=stacked.dtype, device=stacked.device)
    return torch.where(fine[:, None, None], stacked, identity)


def _mended(clean: torch.Tensor, made: torch.Tensor, usable: Mask, sure: Function) -> tuple[torch.Tensor, Mask]:
    fine = _finite(made)
    if usable is None and fine is None:
        return made, None
    for i in [] if fine is None else (~fine).nonzero().flatten().tolist():
        made[i] = _slowly(clean[i : i + 1].double(), sure)[0].to(made)
    good = _both(usable, _finite(made))
    return made if good is None else torch.where(good[:, None, None], made, torch.zeros_like(made)), good


def _both(one: Mask, other: Mask) -> Mask:
    return other if one is None else one if other is None else one & other


def _shared_out(function: Function, stacks: Stacks) -> list[torch.Tensor]:
    """``function`` of some stacks; NaN where it fails. On CPUs each matrix is on a core of its own."""
    attempt = functools.partial(_attempted, function)
    if stacks[0].device.type != "cpu":
        return [attempt(stack) for stack in stacks]
    singles = [stack[i : i + 1] for stack in stacks for i in range(len(stack))]
    jobs = [functools.partial(attempt, one) for one in singles]
    in_order = iter(shared_out(jobs, [float(one.shape[-1]) ** 3 for one in singles]))
    return [_joined([next(in_order) for _ in stack]) for stack in stacks]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _attempted(function: Function, stacked: torch.Tensor) -> torch.Tensor:
    try:
        return function(stacked)
    except (RuntimeError, torch.linalg.LinAlgError):  # one matrix that does not converge fails the whole stack
        return torch.full_like(stacked, math.nan)


def _slowly(one: torch.Tensor, sure: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    for device in dict.fromkeys((one.device, torch.device("cpu"))):
        try:
            return sure(one.to(device)).to(one.device)
        except (RuntimeError, torch.linalg.LinAlgError):
            continue
    return torch.full_like(one, math.nan)
