"""Gradient release: each parameter is updated in the backward pass, and its gradient freed at once."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from oput_dist.backends import choose
from oput_dist.layout import Reduction

from .cuts import find_cuts
from .model import check_not_replaced
from .optimizer import Optimizer
from .part import Part
from .plan import Plan
from .recipe import prologue_of
from .releasable import check_no_gradients, check_optimizer, ready_by_bucket
from .slot import Slot
from .step import Outcome
from .wrapper import Wrapper

__all__ = ["Release", "prepare_for_gradient_release", "remove_gradient_release"]

_KEPT = "_oput_gradient_release"
"""The attribute of a model that holds its :class:`Release`."""


def prepare_for_gradient_release(
    model: nn.Module, optimizer: torch.optim.Optimizer, ignore_existing_hooks: bool = False
) -> None:
    """Have the optimizer update each parameter in the backward pass, as soon as its gradient is final, and free that.

    From then on every ``backward()`` is a step: ``optimizer.step()`` and ``zero_grad()`` do nothing more, and may stay
    in the loop. Parameters, state and step counters are those of ordinary steps, to the bit. To take the gradients of
    several passes into one step, see :attr:`Optimizer.optimizer_accumulation`; ``no_sync()`` of DDP and
    ``set_requires_gradient_sync(False)`` of FSDP2 accumulate gradients as ever, and keep them.

    Args:
        model: the module, as wrapped: under DDP a bucket is updated once it was averaged, under FSDP2 a parameter once
            its shard was reduced.
        optimizer: made with ``gradient_release=True``; all of its parameters are the model's. Elementwise, or with
            norms of single parameters. A model has one such optimizer; others may have other parameters of it.
        ignore_existing_hooks: go on where parameters have ``post_accumulate_grad`` hooks already. They run first.

    Raises:
        TypeError: for an optimizer of another library, or one that is wrapped.
        ValueError: for what cannot work, with what to do instead; nothing has changed then.

    In the loop, these raise RuntimeError: ``step()`` with a closure, from a GradScaler, or after several backward
    passes, each of which was a step; reentrant activation checkpointing; a process group that was made later.
    """
    optimizer = _checked(model, optimizer)
    plan = optimizer._current_plan()
    parameters = [slot.parameter for slot in plan.owners if slot.parameter.requires_grad]
    check_optimizer(optimizer, plan.slots)
    by_bucket = ready_by_bucket(model, optimizer, plan.slots)
    check_no_gradients(plan.owners, parameters)
    if not ignore_existing_hooks:
        for slot in plan.owners:
            if slot.parameter._post_accumulate_grad_hooks:
                raise ValueError(
                    f"gradient release: {slot.name} has a post_accumulate_grad hook already: remove it, or give "
                    "ignore_existing_hooks=True if it may run before the update"
                )
    release = Release(optimizer, {id(p) for p in parameters})
    bucketed: set[int] = set()
    for ddp, ids in by_bucket.items():
        bucketed |= ids
        release.enter(Reduction.of(ddp))
    release.hook(p for p in parameters if id(p) not in bucketed)
    optimizer._release = release
    setattr(model, _KEPT, release)


def remove_gradient_release(model: nn.Module) -> None:
    """Go back to ordinary steps. A model that was not prepared is left alone, with a warning.

    A copy of a prepared model and optimizer is not prepared.
    """
    release: Release | None = getattr(model, _KEPT, None)
    if release is None:
        warnings.warn("this model is not prepared for gradient release, so there is nothing to remove", stacklevel=2)
        return
    release.remove()
    delattr(model, _KEPT)


def _checked(model: nn.Module, optimizer: torch.optim.Optimizer) -> Optimizer:
    if not isinstance(model, nn.Module):
        raise TypeError(f"gradient release: model={model!r}: must be the nn.Module whose parameters are trained")
    if isinstance(optimizer, Wrapper):
        raise TypeError(
            f"gradient release is not possible with {type(optimizer).__name__}, which needs all gradients or all "
            "updated parameters at once: prepare an optimizer that is not wrapped"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"gradient release takes an optimizer of oput_dist, but this is a {type(optimizer).__name__}")
    owner = type(optimizer).__name__
    if not optimizer.gradient_release:
        raise ValueError(f"{owner} was not made for gradient release: make it with gradient_release=True")
    if optimizer._release is not None or getattr(model, _KEPT, None) is not None:
        raise ValueError(
            "gradient release is prepared already, for this model or this optimizer: call "
            "remove_gradient_release(model) first"
        )
    known = {id(p) for p in model.parameters()}
    for slot in optimizer._current_plan().owners:
        if id(slot.parameter) not in known:
            raise ValueError(
                f"gradient release: {slot.name} of the optimizer is no parameter of the model: give the module that "
                "holds all of them, as it is wrapped"
            )
    return optimizer


class Release:
    """An optimizer that steps in backward passes.

    Args:
        optimizer: the optimizer.
        ids: of the parameters that take part.
    """

    def __init__(self, optimizer: Optimizer, ids: set[int]) -> None:
        self._optimizer, self._ids = optimizer, ids
        self._handles: list[Any] = []
        self._reductions: list[Reduction] = []
        self._plan: Plan | None = None
        self._slots: dict[int, list[Slot]] = {}
        self._backends: dict[int, tuple[int, str]] = {}
        self._parts: dict[tuple[int, ...], list[tuple[Part, tuple[str, ...]]]] = {}
        self._pass: int | None = None
        self._passes = 0  # since the last step()
        self._ranks = _ranks()

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model is not prepared."""

    def __reduce__(self) -> Any:
        return type(None), ()

    # ------------------------------------------------------------------------------------------------- setting it up

    def hook(self, parameters: Iterable[torch.Tensor]) -> None:
        """Update these parameters one by one."""
        take = self._taken_weakly()
        for p in parameters:
            self._handles.append(p.register_post_accumulate_grad_hook(lambda p: take([p])))  # type: ignore[no-untyped-call]

    def enter(self, reduction: Reduction) -> None:
        """Update the parameters that DDP reduces, a bucket at a time."""
        reduction.receiver = self._taken_weakly()
        self._reductions.append(reduction)

    def _taken_weakly(self) -> Callable[[Sequence[torch.Tensor]], None]:
        """:meth:`take` for as long as the model lives, which holds this: torch would keep both alive for ever."""
        own = weakref.ref(self)

        def take(parameters: Sequence[torch.Tensor]) -> None:
            if (release := own()) is not None:
                release.take(parameters)

        return take

    def remove(self) -> None:
        """Undo all of that."""
        for handle in self._handles:
            handle.remove()
        for reduction in self._reductions:
            reduction.receiver = None
        self._optimizer._release = None

    # -------------------------------------------------------------------------------------------- in a backward pass

    @torch._disable_dynamo  # as torch.compiler.disable, which imports Dynamo at once: a second of a process
    @torch.no_grad()
    def take(self, parameters: Sequence[torch.Tensor]) -> None:
        """Update parameters whose gradients are final, and free those."""
        own = [p for p in parameters if id(p) in self._ids]
        self._begin()
        options = self._optimizer._options
        for part, chosen in self._parts_of(own):
            self._optimizer.step_on(part, replace(options, backends=chosen), False)
        for p in own:
            p.grad = None

    def _begin(self) -> None:
        """What comes once in a pass: all that a step checks, and the word to be called back at the end."""
        number = torch._C._current_graph_task_id()
        if number == self._pass:
            return
        if _nested():
            raise RuntimeError(
                "gradient release inside a backward pass that another one started: activation checkpointing must use "
                "torch.utils.checkpoint with use_reentrant=False"
            )
        if _ranks() != self._ranks:
            raise RuntimeError(
                "gradient release was prepared before init_process_group: call remove_gradient_release(model), wrap "
                "the model, and prepare it again"
            )
        optimizer = self._optimizer
        optimizer.check_step()
        plan = optimizer._current_plan()
        for slot in plan.owners:
            if slot.parameter.requires_grad and id(slot.parameter) not in self._ids:
                raise RuntimeError(
                    f"{slot.name} was frozen when gradient release was prepared: call remove_gradient_release(model) "
                    "and prepare it again"
                )
        if plan is not self._plan:
            self._lay_out(plan)
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._pass = number

    def _end(self) -> None:
        self._pass = None
        self._optimizer.end(Outcome.DONE)
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers warn of a missing step() else
        self._passes += not self._optimizer.optimizer_accumulation

    def _lay_out(self, plan: Plan) -> None:
        """Choose for every parameter the backend that an ordinary step, which has more of them, would choose."""
        optimizer = self._optimizer
        if optimizer.options.storage is not None:
            find_cuts(plan, optimizer.options.storage)  # of all parameters at once, not of parts
        kinds: dict[Any, list[Slot]] = {}
        for slot in plan.slots:
            group = optimizer.param_groups[slot.group]
            recipe = optimizer.recipe_of(group, slot.layout.shape)
            kinds.setdefault((recipe, prologue_of(recipe, group), slot.dtype, slot.device), []).append(slot)
        self._slots, self._backends, self._parts, self._plan = {}, {}, {}, plan
        for number, slots in enumerate(kinds.values()):
            numel = sum(slot.layout.shape.numel() for slot in slots)
            chosen = choose(optimizer._options.backends, slots[0].device, numel).name
            for slot in slots:
                self._slots.setdefault(id(slot.parameter), []).append(slot)
                self._backends[slot.index] = (number, chosen)

    def _parts_of(self, parameters: Sequence[torch.Tensor]) -> list[tuple[Part, tuple[str, ...]]]:
        """Parameters that come together, those of one kind as one part."""
        key = tuple(id(p) for p in parameters)
        if key not in self._parts:
            kinds: dict[tuple[int, str], list[Slot]] = {}
            for one in key:
                for slot in self._slots[one]:
                    kinds.setdefault(self._backends[slot.index], []).append(slot)
            assert self._plan is not None
            plan = self._plan
            self._parts[key] = [(Part.cut(plan, slots), (chosen,)) for (_, chosen), slots in kinds.items()]
        return self._parts[key]

    # ------------------------------------------------------------------------------------------------ in place of step

    def step(self, closure: Callable[[], Any] | None) -> None:
        """What is left of ``optimizer.step()``: to raise RuntimeError where the loop means something else by it."""
        optimizer, passes = self._optimizer, self._passes
        self._passes = 0
        if closure is not None:
            raise RuntimeError(
                "step(closure) is not possible with gradient release, where each backward pass is a step: call "
                "backward() in the loop, or remove_gradient_release(model)"
            )
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "GradScaler is not possible with gradient release, whose updates have been made with scaled gradients "
                "by now: start again without it, in bfloat16, or without gradient release"
            )
        if passes > 1:
            raise RuntimeError(
                f"{passes} backward passes came before this step(), and with gradient release each was a step of its "
                "own: to accumulate, set optimizer.optimizer_accumulation = True in all passes but the last"
            )
        assert optimizer._plan is not None
        check_not_replaced(optimizer._plan.owners, optimizer._model)
        for slot in optimizer._plan.owners:
            if slot.parameter.grad is not None:
                raise RuntimeError(
                    f"{slot.name} has a gradient that was not released: one that was set by hand, or not reduced yet "
                    "(no_sync), cannot be stepped on here; run a backward pass that reduces it, or call zero_grad()"
                )


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _nested() -> bool:
    """Whether this backward pass was started from within another one: the second of two engines on the stack."""
    frame, running = sys._getframe(1), False
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_engine_run_backward":
            running = True
        elif running and code.co_name == "apply" and code.co_filename.endswith("torch/autograd/function.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
