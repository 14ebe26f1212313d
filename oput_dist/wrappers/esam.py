"""ESAM, efficient SAM: some tensors are perturbed, and some samples seen again."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from oput_dist.engine import Group, Params
from oput_dist.engine.hyper import Nonnegative, NonnegativeInteger, Share
from oput_dist.engine.slot import Slot

from .sharpness import Closure, SharpnessAware

__all__ = ["ESAM"]

_LOSSES = (
    "def losses_of(indices): chosen = slice(None) if indices is None else indices; "
    "return F.cross_entropy(model(x[chosen]), y[chosen], reduction='none')"
)


class ESAM(SharpnessAware):
    r"""ESAM, efficient SAM: :class:`SAM` with a perturbation of some tensors and a second pass on some samples.

    Each parameter tensor is perturbed with probability :math:`\beta`, and then by as much more:

    .. math::
        e_i = \frac{m_i}{\beta} \rho \frac{g_i}{\lVert g \rVert + 10^{-12}}, \qquad m_i \in \{0, 1\}

    so that the mean over :math:`m` is the perturbation of SAM (the norm is that of all gradients). The second pass is
    over those :math:`\lfloor \gamma n \rfloor` of ``n`` samples, but at least one, whose loss rises most from
    :math:`w` to :math:`w + e`, which takes a forward pass of all. Losses of a batch are given by a function::

        def losses_of(indices):  # None: all samples of the batch
            chosen = slice(None) if indices is None else indices
            return F.cross_entropy(model(x[chosen]), y[chosen], reduction="none")

        loss = optimizer.step(losses_of)  # calls backward() itself

    or step by step, as with a GradScaler (see :class:`SAM`)::

        before = losses_of(None)
        before.mean().backward()
        optimizer.first_step()
        with torch.no_grad():
            after = losses_of(None)
        losses_of(optimizer.sharpest(before, after)).mean().backward()
        optimizer.second_step(zero_grad=True)

    Which tensors are perturbed follows from seed, step and the parameter's number alone, so ranks agree and a resumed
    run goes on alike. Samples are chosen on each rank among its own, as many on all where batches are alike, so that
    the mean of gradients is right.

    Args:
        params: the optimizer to wrap; or parameters, groups, named parameters or a module, for ``base_optimizer``.
        base_optimizer: the class of the optimizer inside, or a function that makes it.
        rho: the length :math:`\rho \ge 0` of the perturbation. Default 0.05.
        beta: the share :math:`\beta` of the tensors to perturb, in (0, 1]. Default 0.6.
        gamma: the share :math:`\gamma` of the samples of the second pass, in (0, 1]. The first group's holds.
            Default 0.5.
        seed: an integer >= 0, the same on all ranks. Default 0.
        adaptive: see :class:`SAM`. Default False.
        eta: see :class:`SAM`. Default 0.
        local: see :class:`SAM`. Default False.
        skip_nonfinite: see :class:`SAM`. Default False.
        module: see :class:`SAM`.
        **options: for ``base_optimizer``.

    All from ``rho`` to ``eta`` are in the groups, as ``esam_rho`` and so on; ``esam_steps`` counts.

    Raises:
        TypeError: for what cannot be wrapped, or is wrapped by one of this family; for a function that takes no
            indices.
        ValueError: for a value out of range, or losses that are not one for each sample.
        RuntimeError: for a step without the function and first step, or steps out of order.

    Sharding class G, plus that of the optimizer inside: as :class:`SAM`, memory and state too.

    When: SAM helps and two passes are too dear. Start: ``beta=0.6``, ``gamma=0.5``.

    Paper: Du et al., https://arxiv.org/abs/2110.03141. The authors' code divides by the norm of the chosen tensors.
    """

    prefix: ClassVar[str] = "esam"
    counts: ClassVar[bool] = True

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base_optimizer: Callable[..., Any] | None = None,
        rho: Nonnegative = 0.05,
        beta: Share = 0.6,
        gamma: Share = 0.5,
        seed: NonnegativeInteger = 0,
        adaptive: bool = False,
        eta: Nonnegative = 0.0,
        local: bool = False,
        skip_nonfinite: bool = False,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        settings = {"rho": rho, "beta": beta, "gamma": gamma, "seed": seed, "adaptive": adaptive, "eta": eta}
        super().__init__(params, base_optimizer, options, settings, module, local, skip_nonfinite)

    def radius(self, group: Group) -> Any:
        return super().radius(group) / self.setting(group, "beta")

    def perturbs(self, slot: Slot) -> bool:
        group = self.param_groups[slot.group]
        drawn = chance(self.setting(group, "seed"), self.setting(self.param_groups[0], "steps"), slot.index)
        return bool(drawn < self.setting(group, "beta"))

    def sharpest(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
        """The samples for the second pass, ascending; None for all.

        Args:
            before: the loss of each sample in the first pass.
            after: the same at the perturbed weights.
        """
        gamma = self.setting(self.param_groups[0], "gamma")
        count = max(1, math.floor(gamma * len(before) + 1e-9))
        if count == len(before):
            return None
        return (after - before).detach().sort(descending=True, stable=True)[1][:count].sort()[0]

    def _step_with(self, closure: Closure, extra: dict[str, Any]) -> Any:
        """The step with ``losses_of``, which it is given in place of a closure."""
        self._check_begins()
        try:
            inspect.signature(closure).bind(None)
        except TypeError:
            raise TypeError(f"ESAM.step() takes a function of indices that gives losses, as in: {_LOSSES}") from None
        self.zero_grad()
        with torch.enable_grad(), self._unaveraged():
            before = _losses(closure, None)
            before.mean().backward()  # type: ignore[no-untyped-call]
        before = before.detach()
        extra = self._with_loss(before.mean(), extra)
        self.first_step()
        self._end_with(lambda: self._pass_again(closure, before), extra)
        return before.mean()

    def _pass_again(self, losses_of: Closure, before: torch.Tensor) -> None:
        chosen = None
        if self.setting(self.param_groups[0], "gamma") < 1:
            with torch.no_grad():
                after = _losses(losses_of, None)
            chosen = self.sharpest(before, after)
        _losses(losses_of, chosen).mean().backward()  # type: ignore[no-untyped-call]


def _losses(losses_of: Closure, indices: torch.Tensor | None) -> torch.Tensor:
    losses = losses_of(indices)
    tensor = isinstance(losses, torch.Tensor)
    if not tensor or losses.ndim != 1 or (indices is not None and len(losses) != len(indices)):
        given = f"shape {tuple(losses.shape)}" if tensor else f"type {type(losses).__name__}"
        asked = "all samples" if indices is None else f"{len(indices)} samples"
        raise ValueError(f"ESAM: losses of {asked} have {given}, but must be 1-d, one for each: {_LOSSES}")
    return losses  # type: ignore[no-any-return]


def chance(*counter: int) -> float:
    """A number in [0, 1) that follows from the counter alone: SplitMix64 over its entries."""
    state = 0
    for value in counter:
        state = (state + value + 0x9E3779B97F4A7C15) & _ALL
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _ALL
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


_ALL = 2**64 - 1
