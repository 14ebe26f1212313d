"""SAM and ASAM: sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from oput_dist.engine import Params
from oput_dist.engine.hyper import Nonnegative

from .sharpness import SharpnessAware

__all__ = ["ASAM", "SAM"]


class SAM(SharpnessAware):
    r"""SAM, sharpness-aware minimization: the step of another optimizer, by gradients taken a step up.

    .. math::
        e = \rho \frac{g}{\lVert g \rVert + 10^{-12}}, \qquad g = \nabla L(w), \qquad
        \text{the step from } w \text{ by } \nabla L(w + e)

    and with ``adaptive``, for sizes :math:`T = |w| + \eta`,

    .. math::
        e = \rho \frac{T^2 g}{\lVert T g \rVert + 10^{-12}}

    Norms are those of all parameters together. ``e`` follows from the raw gradient, without weight decay or clipping.

    Both ways to step::

        optimizer = oput.SAM(model, torch.optim.SGD, lr=0.1, momentum=0.9)  # or oput.SAM(oput.Lamb(model))

        def closure():
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # calls it twice; sets gradients to None before

        loss_fn(model(x), y).backward()  # of all micro-batches, where gradients accumulate
        optimizer.first_step()
        loss_fn(model(x), y).backward()  # of the same
        optimizer.second_step(zero_grad=True)

    Clip gradients between the second backward pass and the second step, or by ``max_grad_norm`` of the inner optimizer.
    With a GradScaler, whose ``step`` calls that of the optimizer, which after a first step is the second; on an
    overflow the weights are restored and the step is skipped::

        scaler.scale(loss_fn(model(x), y)).backward()
        optimizer.first_step()
        scaler.scale(loss_fn(model(x), y)).backward()
        scaler.unscale_(optimizer)  # for FSDP1, and for clipping; not needed otherwise
        scaler.step(optimizer)
        scaler.update()

    If something fails between the steps, ``optimizer.restore()`` gives the weights back; ``step(closure)`` does that
    itself. Between the steps batch-norm layers of the module do not track statistics. If the norm of the first gradient
    is not finite, nothing is perturbed.

    Args:
        params: the optimizer to wrap; or parameters, groups, named parameters or a module, for ``base_optimizer``.
        base_optimizer: the class of the optimizer inside, or a function that makes it.
        rho: the length :math:`\rho \ge 0` of the perturbation. Default 0.05.
        adaptive: scale the perturbation by the sizes of the weights (ASAM). Default False.
        eta: :math:`\eta \ge 0`, added to the sizes where ``adaptive``. Default 0: weights that are zero are not
            perturbed.
        local: perturb by each rank's own gradient, where parameters are replicated: the norm takes no exchange.
            ``step(closure)`` then runs the first pass under ``no_sync`` of the module, which must be the
            DistributedDataParallel one; otherwise make the first backward pass under it. Default False.
        skip_nonfinite: leave parameters, state and counters as they are, on all ranks, if a gradient of either pass
            holds NaN or infinity on any rank; ``skipped`` counts it. Each step then waits for the device, and takes one
            more small all-reduce. Default False.
        module: the module of the parameters, where neither ``params`` nor the optimizer inside was made from it: for
            batch-norm layers and FSDP1.
        **options: for ``base_optimizer``.

    ``rho``, ``adaptive`` and ``eta`` are in the groups, as ``sam_rho`` and so on, and can differ between them.

    Raises:
        TypeError: for what cannot be wrapped, or is wrapped by one of this family.
        ValueError: for a value out of range.
        RuntimeError: for a step without closure and first step, or steps out of order.

    Sharding class G, plus that of the optimizer inside: one all-reduce of a sum for each process group that parameters
    are sharded over, none where they are replicated. Memory: a copy of what the rank holds of the parameters, between
    the passes. State: none.

    When: generalization matters more than time; a step takes two passes. Start: ``rho=0.05``, all else as without.

    Paper: Foret et al., https://arxiv.org/abs/2010.01412; Kwon et al., https://arxiv.org/abs/2102.11600 (ASAM).
    """

    prefix: ClassVar[str] = "sam"

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base_optimizer: Callable[..., Any] | None = None,
        rho: Nonnegative = 0.05,
        adaptive: bool = False,
        eta: Nonnegative = 0.0,
        local: bool = False,
        skip_nonfinite: bool = False,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        settings = {"rho": rho, "adaptive": adaptive, "eta": eta}
        super().__init__(params, base_optimizer, options, settings, module, local, skip_nonfinite)


class ASAM(SAM):
    r"""ASAM: :class:`SAM` with ``adaptive=True``, so that the perturbation does not depend on how weights are scaled.

    .. math::
        e = \rho \frac{T^2 g}{\lVert T g \rVert + 10^{-12}}, \qquad T = |w| + \eta

    With the default :math:`\eta = 0` the rule is that of davda54's implementation. That of the paper's authors has
    ``eta=0.01``, and :math:`T = 1` for biases and norms: put those in a group with ``sam_adaptive=False``.

    Args:
        params: see :class:`SAM`.
        base_optimizer: see :class:`SAM`.
        rho: the length :math:`\rho \ge 0` of the perturbation, ten times that of SAM or more. Default 0.5.
        eta: :math:`\eta \ge 0`. Default 0.
        local: see :class:`SAM`. Default False.
        skip_nonfinite: see :class:`SAM`. Default False.
        module: see :class:`SAM`.
        **options: for ``base_optimizer``.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`SAM`.

    Sharding class, memory and state: as :class:`SAM`; the state dicts are alike.

    When: SAM helps, but its best ``rho`` differs between models. Start: ``rho=0.5``.

    Paper: Kwon et al., https://arxiv.org/abs/2102.11600.
    """

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base_optimizer: Callable[..., Any] | None = None,
        rho: Nonnegative = 0.5,
        eta: Nonnegative = 0.0,
        local: bool = False,
        skip_nonfinite: bool = False,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, True, eta, local, skip_nonfinite, module, **options)
