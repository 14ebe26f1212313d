"""Averages of weights along the way, to evaluate and to keep: EMA, SWA, LAWA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from oput_dist.engine import Group, Params, row_of
from oput_dist.engine.hyper import Fraction, NonnegativeInteger, PositiveInteger, check_group, signature_checks
from oput_dist.engine.sweep import Part, sweep
from oput_dist.engine.wrapper import inner_of
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Update

from .average import Averaging

__all__ = ["EMA", "LAWA", "SWA"]


@rule
def take_in(p, g, state, h):
    """The average ``p`` takes in the weights ``g``; the first are it, whatever was there before."""
    return tl.where(h.weight < 1, lerp(p, g, h.weight), g), state


class RunningAverage(Averaging):
    """An average that each new value changes by a weight."""

    @abstractmethod
    def weight(self, group: Group) -> float:
        """The weight of the coming value, where it is not the first."""

    def take(self, groups: Mapping[int, Group]) -> None:
        rows = {
            i: row_of(weight=self.weight(group) if self.setting(group, "averages") else 1.0)
            for i, group in groups.items()
        }
        parts = [Part(part.slot, part.state[0], part.p) for part in self.parts(groups, self.keeps)]
        sweep(self.plan(), Update(take_in), parts, rows, self.backends)


class EMA(RunningAverage):
    r"""EMA, the exponential moving average of the weights, around any optimizer.

    .. math::
        a_1 = p_1, \qquad a_n = \beta_n a_{n-1} + (1 - \beta_n) p_n, \qquad
        \beta_n = \beta \quad\text{or}\quad \min\Bigl(\beta, \frac{n}{n + 9}\Bigr) \text{ with warm-up}

    where :math:`p_n` are the parameters at the :math:`n`-th average, taken after every so many steps. A step that was
    skipped, or that only created state, does not count. Training is not changed; :meth:`averaged` shows the average.
    Buffers, such as batch-norm statistics, are not averaged: see there.

    Args:
        params: the optimizer to wrap; or parameters, groups, named parameters, or a module, with ``base``.
        base: the class of the optimizer to make, with ``options``.
        decay: :math:`\beta` in [0, 1). Default 0.999.
        every: steps between averages, an integer >= 1. Default 1.
        warmup: let :math:`\beta_n` grow, so that the start is soon forgotten. Default False.
        average_dtype: of the average, such as ``torch.float32`` for bf16 parameters; the parameters' own by default.
            Where it is not that of the inner state, torch's own state dicts of FSDP1 cannot carry both: save
            ``oput.full_state_dict(optimizer)``.
        module: the module of the parameters, where neither ``params`` nor the inner optimizer has it and FSDP1
            (``FullyShardedDataParallel``) flattened them.
        **options: of ``base``. What has the name of an argument above must be given to the inner optimizer itself.

    Raises:
        TypeError: for what is no optimizer.
        ValueError: for a value out of range.
        RuntimeError: for a step while parameters are the average.

    Sharding class W: as the inner optimizer, nothing more is communicated in steps. State: 4 bytes per parameter
    (fp32), sharded as the inner state.

    Example::

        optimizer = EMA(oput.AdamW(model, lr=1e-3), decay=0.999)
        ...
        with optimizer.averaged():
            evaluate(model)

    When: nearly always for generative and vision models. Start: ``decay=0.999`` to ``0.9999``, ``warmup=True`` for
    short runs.

    Paper: Polyak and Juditsky, https://doi.org/10.1137/0330046; Morales-Brotons et al.,
    https://arxiv.org/abs/2411.18704.
    """

    prefix = "ema"
    keeps = ("ema_average",)

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base: Callable[..., Any] | None = None,
        *,
        decay: Fraction = 0.999,
        every: PositiveInteger = 1,
        warmup: bool = False,
        average_dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        inner, module = inner_of("EMA", params, base, options, module)
        super().__init__(inner, {"decay": decay, "every": every, "warmup": warmup}, module, average_dtype)

    def weight(self, group: Group) -> float:
        n: int = self.setting(group, "averages") + 1
        decay: float = self.setting(group, "decay")
        return 1 - (min(decay, n / (n + 9)) if self.setting(group, "warmup") else decay)


class SWA(RunningAverage):
    r"""SWA, stochastic weight averaging: the mean of the weights from some step on, around any optimizer.

    .. math::
        a_n = a_{n-1} + \frac{1}{n} (p_n - a_{n-1})

    where :math:`p_n` are the parameters at the :math:`n`-th average: after steps ``start + every``,
    ``start + 2 * every`` and so on. A step that was skipped, or that only created state, does not count. Training is
    not changed; :meth:`averaged` shows the average. Buffers, such as batch-norm statistics, are not averaged: see
    there. A constant or cyclic learning rate from ``start`` on is a matter of the schedule
    (``torch.optim.swa_utils.SWALR``).

    Args:
        params: the optimizer to wrap; or parameters, groups, named parameters, or a module, with ``base``.
        base: the class of the optimizer to make, with ``options``.
        start: steps before the average begins, an integer >= 0: most of the run. Default 0.
        every: steps between averages, an integer >= 1: in the paper an epoch. Default 1.
        average_dtype: of the average, such as ``torch.float32`` for bf16 parameters; the parameters' own by default.
            Where it is not that of the inner state, torch's own state dicts of FSDP1 cannot carry both: save
            ``oput.full_state_dict(optimizer)``.
        module: the module of the parameters, where neither ``params`` nor the inner optimizer has it and FSDP1
            (``FullyShardedDataParallel``) flattened them.
        **options: of ``base``. What has the name of an argument above must be given to the inner optimizer itself.

    Raises:
        TypeError: for what is no optimizer.
        ValueError: for a value out of range.
        RuntimeError: for a step while parameters are the average.

    Sharding class W: as the inner optimizer, nothing more is communicated in steps. State: 4 bytes per parameter
    (fp32), sharded as the inner state, from the first step on.

    Example::

        optimizer = SWA(model, torch.optim.SGD, start=7500, every=100, lr=0.05, momentum=0.9)
        ...
        with optimizer.averaged():
            torch.optim.swa_utils.update_bn(loader, model)
            evaluate(model)

    When: the last quarter of a run with a constant or cyclic learning rate. Start: ``start`` at 75% of the steps,
    ``every`` an epoch.

    Paper: Izmailov et al., https://arxiv.org/abs/1803.05407.
    """

    prefix = "swa"
    keeps = ("swa_average",)

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base: Callable[..., Any] | None = None,
        *,
        start: NonnegativeInteger = 0,
        every: PositiveInteger = 1,
        average_dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        inner, module = inner_of("SWA", params, base, options, module)
        super().__init__(inner, {"start": start, "every": every}, module, average_dtype)

    def due(self, group: Group, steps: int) -> bool:
        after: int = steps - self.setting(group, "start")
        return after > 0 and after % self.setting(group, "every") == 0

    def weight(self, group: Group) -> float:
        before: int = self.setting(group, "averages")
        return 1 / (before + 1)


class LAWA(Averaging):
    r"""LAWA, latest weight averaging: the mean of the last snapshots of the weights, around any optimizer.

    .. math::
        a = \frac{1}{\min(n, w)} \sum_{i = \max(1, n - w + 1)}^n p_i

    where :math:`p_i` are the parameters at the :math:`i`-th snapshot, taken after every so many steps, and :math:`n`
    the number of snapshots so far. A step that was skipped, or that only created state, does not count. Training is not
    changed; :meth:`averaged` shows the average. Buffers, such as batch-norm statistics, are not averaged: see there.

    Args:
        params: the optimizer to wrap; or parameters, groups, named parameters, or a module, with ``base``.
        base: the class of the optimizer to make, with ``options``.
        window: :math:`w`, how many snapshots are kept, an integer >= 1. The same for all groups. Default 5.
        every: steps between snapshots, an integer >= 1: in the paper an epoch. Default 100.
        average_dtype: of the snapshots, such as ``torch.bfloat16``; the parameters' own by default.
        module: the module of the parameters, where neither ``params`` nor the inner optimizer has it and FSDP1
            (``FullyShardedDataParallel``) flattened them.
        **options: of ``base``. What has the name of an argument above must be given to the inner optimizer itself.

    Raises:
        TypeError: for what is no optimizer.
        ValueError: for a value out of range.
        RuntimeError: for a step while parameters are the average.

    Sharding class W: as the inner optimizer, nothing more is communicated in steps. State: 4 bytes per parameter and
    snapshot (fp32), sharded as the inner state, from the first step on.

    Example::

        optimizer = LAWA(oput.AdamW(model, lr=1e-3), window=5, every=1000)
        ...
        with optimizer.averaged():
            evaluate(model)

    When: the loss in the midst of a run should be what only a decayed learning rate would give. Start: ``window=5``,
    and ``every`` 2% of the steps.

    Paper: Kaddour, https://arxiv.org/abs/2209.14981.
    """

    prefix = "lawa"

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base: Callable[..., Any] | None = None,
        *,
        window: PositiveInteger = 5,
        every: PositiveInteger = 100,
        average_dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        check_group("LAWA", {"window": window}, signature_checks(type(self)))  # type: ignore[arg-type]
        inner, module = inner_of("LAWA", params, base, options, module)
        self.window = window
        self.keeps = tuple(f"lawa_{i}" for i in range(window))  # type: ignore[misc]  # here they depend on an argument
        super().__init__(inner, {"every": every}, module, average_dtype)

    def filled(self, group: Group) -> int:
        return min(self.window, int(self.setting(group, "averages")))

    def take(self, groups: Mapping[int, Group]) -> None:
        """A snapshot takes the place of the oldest."""
        for i, group in groups.items():
            name = f"lawa_{self.setting(group, 'averages') % self.window}"
            for part in self.parts({i: group}, (name,)):
                part.state[0].copy_(part.p)
