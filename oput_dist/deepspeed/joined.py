"""One step of the engine is one step of the optimizer.

DeepSpeed calls ``optimizer.step()`` once for each parameter group (stages 1 and 2) or sub-group (stage 3), with groups
that hold nothing else. Norms of the whole model, schedules that count steps, and all-reduces that carry the sums of all
parameters need the whole. So the calls are collected: the last one of an ``engine.step()`` runs the step, with all
gradients, and the weights of the earlier ones are then brought up to date.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from oput_dist.curvature import CurvatureError
from oput_dist.engine import Optimizer
from oput_dist.engine.wrapper import Wrapper, wrappers_of
from oput_dist.layout.flattened import mark_flattened

from .checks import origin_of
from .zero import Partitioned, Zero

__all__ = ["Joined", "joined_of"]

_Groups = list[dict[str, Any]]


class Joined:
    """Stands between DeepSpeed and an optimizer, in place of the optimizer's ``step`` and of what else writes weights.

    Until :meth:`attach`, steps do nothing: DeepSpeed makes one with zero gradients at the real learning rate while it
    builds an engine of stage 0 in low precision.

    Args:
        optimizer: the optimizer; or wrappers around it that need no gradients but the one backward pass's.
    """

    def __init__(self, optimizer: Optimizer | Wrapper) -> None:
        self._optimizer: Any = optimizer
        self._origin: Any = origin_of(optimizer)
        self._step, self._rewrite = self._optimizer.step, self._origin.rewrite
        self._zero: Zero | None = None
        self._arrived: dict[torch.Tensor, torch.Tensor | None] = {}  # partitions of this step, with their gradients
        self._groups: _Groups = []  # the parameter groups, as they came
        self._losses: deque[torch.Tensor] | None = None
        self._estimate: dict[str, Any] | None = None
        self._optimizer.step, self._origin.rewrite = self.step, self.rewrite  # type: ignore[method-assign]
        if hasattr(self._origin, "update_hessian"):
            self._update_hessian, self._origin.update_hessian = self._origin.update_hessian, self.update_hessian
        wrappers: list[Any] = wrappers_of(optimizer)
        for wrapper in wrappers:
            if hasattr(wrapper, "averaged"):
                wrapper.averaged = functools.partial(self.averaged, wrapper.averaged)

    def attach(self, zero: Zero, module: nn.Module) -> None:
        """Lay out the optimizer's parameters as DeepSpeed has cut them.

        Raises:
            LayoutError: for what cannot be laid out, or not summed over where the optimizer needs it.
        """
        self._zero = zero
        for part in zero.partitions:
            mark_flattened(part.tensor)
        for group in self._optimizer.param_groups:
            group.pop("param_names", None)
        model, everyone = Partitioned(module, zero), [*wrappers_of(self._optimizer), self._origin]
        for one in everyone:
            one._model, one._plan = model, None
        if zero.partitions and hasattr(self._origin, "refresh"):
            self._origin.refresh = self._no_refresh
        zero.keep_hyperparameters(self._optimizer)
        with self.filled():
            for one in everyone:
                one._current_plan()

    def take_losses(self, engine: Any) -> None:
        """Remember the losses that ``engine.backward`` is given, where the optimizer needs them."""
        if "loss" not in inspect.signature(type(self._origin).step).parameters:
            return
        losses: deque[torch.Tensor] = deque(maxlen=engine.gradient_accumulation_steps())
        self._losses = losses
        backward = engine.backward

        def remembering(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            losses.append(loss.detach().double())
            return backward(loss, *args, **kwargs)

        engine.backward = remembering

    # ------------------------------------------------------------------------------------------------------- stepping

    def step(self, closure: Any = None, **given: Any) -> Any:
        """What DeepSpeed calls, or at stage 0 a user."""
        if self._zero is None:
            return None
        if self._losses and not given:
            given = {"loss": torch.stack(list(self._losses)).mean()}
        if not self._zero.partitions:
            return self._run(closure, given)
        if not self._collect():
            return None
        arrived, groups = self._arrived, self._groups
        self._arrived, self._groups = {}, []
        with self._instead(groups, self._members()), _gradients(arrived):
            result = self._run(closure, given)
        now = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        self._zero.publish([n for n, part in enumerate(self._zero.partitions) if id(part.tensor) not in now])
        self._zero.link_states()
        return result

    def _collect(self) -> bool:
        """Take the gradients of the partitions that came with this call; whether all have come now."""
        assert self._zero is not None
        known = {id(group) for group in self._groups}
        self._groups += [group for group in self._optimizer.param_groups if id(group) not in known]
        for group in self._optimizer.param_groups:
            self._arrived.update({p: p.grad for p in group["params"]})
        return len(self._arrived) == len(self._zero.partitions)

    def _run(self, closure: Any, given: Mapping[str, Any]) -> Any:
        if self._estimate is not None:
            estimate, self._estimate = self._estimate, None
            self._update_hessian(**estimate)
        return self._step(closure, **given)

    # ---------------------------------------------------------------------------------------------- outside of a step

    @contextmanager
    def filled(self) -> Iterator[None]:
        """The groups with all their partitions: stage 3 leaves them empty between steps."""
        with self._instead(self._optimizer.param_groups, self._members()):
            yield

    def _members(self) -> dict[int, list[torch.Tensor]]:
        """The partitions of each group, by its number."""
        members: dict[int, list[torch.Tensor]] = {}
        for part in self._zero.partitions if self._zero is not None else ():
            members.setdefault(part.group, []).append(part.tensor)
        return members

    @contextmanager
    def _instead(self, groups: _Groups, members: Mapping[int, Sequence[torch.Tensor]]) -> Iterator[None]:
        """The optimizer with these groups, of these members; as it was before, afterwards."""
        before, held = self._optimizer.param_groups, [group["params"] for group in groups]
        self._optimizer.param_groups = groups
        for number, tensors in members.items():
            groups[number]["params"] = list(tensors)
        try:
            yield
        finally:
            self._optimizer.param_groups = before
            for group, params in zip(groups, held, strict=True):
                group["params"] = params

    def rewrite(self, *args: Any, **kwargs: Any) -> None:
        """Rewrite the partitions, and the model's weights after them."""
        with self.filled():
            self._rewrite(*args, **kwargs)
        self.publish_all()

    @contextmanager
    def averaged(self, own: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """A wrapper's own ``averaged``, with the model's weights after the partitions."""
        shown = own()
        with self.filled():
            shown.__enter__()
        self.publish_all()
        try:
            yield
        finally:
            with self.filled():
                shown.__exit__(None, None, None)
            self.publish_all()

    def load(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of whole tensors outside of DeepSpeed's own functions."""
        optimizer = self._optimizer
        held = [group["params"] for group in optimizer.param_groups]
        for number, tensors in self._members().items():
            optimizer.param_groups[number]["params"] = list(tensors)
        try:
            optimizer.load_state_dict(state_dict)  # which makes the groups anew
        finally:
            for group, params in zip(optimizer.param_groups, held, strict=True):
                group["params"] = params

    def publish_all(self) -> None:
        """Make the model's weights what the optimizer's are."""
        assert self._zero is not None
        self._zero.publish_all()

    def update_hessian(self, batch_size: int = 1) -> None:
        """Estimate from the gradients of the next ``engine.step()``, before it: they are nowhere until then."""
        self._estimate = {"batch_size": batch_size}

    def _no_refresh(self, *outputs: Any, force: bool = False) -> bool:
        raise CurvatureError(
            f"{type(self._origin).__name__}.refresh cannot run the model's backward pass under DeepSpeed's ZeRO, "
            "which takes all gradients for the next step: call optimizer.update_hessian(batch_size) before "
            "engine.step(), which estimates from the squares of its gradients; or use stage 0"
        )


def joined_of(engine: Any) -> Joined:
    """What stands between an engine and its optimizer.

    Raises:
        TypeError: for an engine with another optimizer.
    """
    joined = getattr(getattr(engine.basic_optimizer, "step", None), "__self__", None)
    if not isinstance(joined, Joined):
        raise TypeError(f"the engine's {type(engine.basic_optimizer).__name__} is none of oput_dist's optimizers")
    return joined


@contextmanager
def _gradients(given: Mapping[torch.Tensor, torch.Tensor | None]) -> Iterator[None]:
    """Tensors with these gradients; with those that they had, afterwards."""
    before = {tensor: tensor.grad for tensor in given}
    for tensor, gradient in given.items():
        tensor.grad = gradient
    try:
        yield
    finally:
        for tensor, gradient in before.items():
            tensor.grad = gradient
