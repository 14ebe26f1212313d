"""What the averages of weights share: when they are taken, and how they take the parameters' place for a while."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from oput_dist.engine import Group, row_of
from oput_dist.engine.finish import finish, updated
from oput_dist.engine.step import Outcome
from oput_dist.engine.sweep import Part, sweep
from oput_dist.engine.wrapper import Wrapper
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.stage import Update
from oput_dist.layout import whole_or_local

__all__ = ["Averaging"]


@rule
def mean_of(p, g, state, h):
    """The mean of the first ``h.filled`` of some tensors."""
    total = state[0]
    for i in tl.static_range(1, len(state)):
        total = total + tl.where(h.filled > i, state[i], 0.0)
    return total / h.filled, ()


class Averaging(Wrapper):
    """What the averages share: when they are taken, and how they take the place of the parameters for a while."""

    def __init__(
        self, inner: torch.optim.Optimizer, settings: Mapping[str, Any], module: nn.Module | None, dtype: Any
    ) -> None:
        owner = type(self).__name__
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{owner}: average_dtype={dtype!r} is not allowed: must be None or a floating-point dtype")
        self._dtype, self._shown = dtype, False
        super().__init__(inner, {**settings, "steps": 0, "averages": 0}, module)

    def due(self, group: Group, steps: int) -> bool:
        """Whether an average is taken after so many steps."""
        return bool(steps % self.setting(group, "every") == 0)

    @abstractmethod
    def take(self, groups: Mapping[int, Group]) -> None:
        """Take the parameters of some groups, by number, into the average."""

    def filled(self, group: Group) -> int:
        """Of how many tensors the average is the mean."""
        return 1

    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """A step of the inner optimizer, and then the average. Returns what the inner one did.

        Args:
            closure: computes the loss anew, with gradients.
            **extra: what else the inner ``step`` takes.

        Raises:
            RuntimeError: while parameters are the average.
        """
        self._check_hidden("step()")
        self.check_settings()
        self._begin()
        result = self.step_inner(closure, **extra)
        if self.outcome is Outcome.DONE:
            self._count()
        return result

    @torch.no_grad()
    def _begin(self) -> None:
        """Make what is kept before it is needed, so that checkpoints hold the same at any time."""
        plan = self.plan()
        for name in self.keeps:
            self._kept.begin(plan, name, self._dtype, lambda slot: False)

    @torch.no_grad()
    def _count(self) -> None:
        due = {}
        for number, group in enumerate(self.param_groups):
            steps = self.setting(group, "steps") + 1
            group[f"{self.prefix}_steps"] = steps
            if self.due(group, steps):
                due[number] = group
        if due:
            self.take(due)
        for group in due.values():
            group[f"{self.prefix}_averages"] += 1

    def parts(self, groups: Mapping[int, Any], names: tuple[str, ...]) -> list[Part]:
        """The parameters of some groups, by number, with what is kept of them under some names."""
        parts = []
        for slot in self.plan().slots:
            kept = self._kept.state.get(slot.parameter, {})
            if slot.group in groups and slot.numel and all(name in kept for name in names):
                p = slot.flat_parameter()
                parts.append(Part(slot, p, p, slot.flat_state(kept, names, None)))
        return parts

    # ------------------------------------------------------------------------------------- in place of the parameters

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Make parameters the average inside a ``with`` block, and then, bitwise, what they were; after errors too.

        All ranks enter it together, since ``shard_group`` gathers; leaving communicates nothing. Groups of which no
        average was taken yet stay as they are. Batch-norm statistics are not averaged: renew them inside, if the model
        has any, by ``torch.optim.swa_utils.update_bn(loader, model)``, and afterwards again. The block takes memory for
        one copy of what this rank holds of the parameters.

        Example::

            with optimizer.averaged():
                evaluate(model)
                torch.save(model.state_dict(), path)  # the average

        Raises:
            RuntimeError: inside another such block. Inside, ``step``, ``state_dict``, ``load_state_dict`` and copies
                of the optimizer raise it too: a checkpoint is of the training weights.
        """
        self._check_hidden("averaged()")
        before = self._show()
        self._shown = True
        try:
            yield
        finally:
            self._shown = False
            self._restore(before)

    @torch.no_grad()
    def _show(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Write the average to the parameters; returns what this rank held of them."""
        self.reshard()
        begun = {i: group for i, group in enumerate(self.param_groups) if self.setting(group, "averages")}
        rows = {i: row_of(filled=self.filled(group)) for i, group in begun.items()}
        before = [(p, whole_or_local(p.detach()).clone()) for group in begun.values() for p in group["params"]]
        parts = self.parts(begun, self.keeps)
        sweep(self.plan(), Update(mean_of), parts, rows, self.backends)
        # What is gathered must be the same on all ranks, also on one whose piece of a parameter is empty.
        finish(self.plan(), [(part.slot, part.p) for part in parts], lambda s: s.group in begun and updated(s))
        return before

    @torch.no_grad()
    def _restore(self, before: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.reshard()
        for parameter, values in before:
            whole_or_local(parameter.detach()).copy_(values)

    def _check_hidden(self, asked: str) -> None:
        if self._shown:
            raise RuntimeError(
                f"{type(self).__name__}: {asked} inside of `with optimizer.averaged():`, where parameters are the "
                "average: leave the block first"
            )

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Wrapper.state_dict`."""
        self._check_hidden("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`Wrapper.load_state_dict`."""
        self._check_hidden("load_state_dict()")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._check_hidden("a copy")
        return super().__getstate__()
