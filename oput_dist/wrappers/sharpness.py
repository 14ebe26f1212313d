"""What the wrappers of the SAM family share: steps of two passes, in two interfaces."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from oput_dist.engine import Params
from oput_dist.engine.hyper import boolean, check_group
from oput_dist.engine.step import Outcome
from oput_dist.engine.wrapper import check_no_closure, inner_of, wrappers_of
from oput_dist.layout import is_flattened, whole_or_local

from .perturb import FirstPass, Perturbing

__all__ = ["Closure", "SharpnessAware"]

Closure = Callable[..., Any]
_FLAGS = {"local": boolean, "skip_nonfinite": boolean}
_USAGE = (
    "call step(closure), where closure computes the loss and calls backward(), or "
    "loss_fn(model(x), y).backward(); optimizer.first_step(); loss_fn(model(x), y).backward(); optimizer.second_step()"
)


class SharpnessAware(Perturbing):
    """A wrapper whose step has two passes: at the weights, and at weights a step up the gradient.

    Attributes:
        counts: whether steps are counted, under ``steps`` in the groups.
    """

    counts: ClassVar[bool] = False

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base_optimizer: Callable[..., Any] | None,
        options: Mapping[str, Any],
        settings: Mapping[str, Any],
        module: nn.Module | None,
        local: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        owner = type(self).__name__
        check_group(owner, {"skip_nonfinite": skip_nonfinite, "local": local}, _FLAGS)
        inner, module = inner_of(owner, params, base_optimizer, options, module)
        for other in wrappers_of(inner):
            if isinstance(other, SharpnessAware):
                raise TypeError(
                    f"{owner}: the optimizer is wrapped by {type(other).__name__} already, and either makes a second "
                    f"pass: wrap what is inside, {owner}(optimizer.inner)"
                )
        check_no_closure(owner, inner)
        counted = {"steps": 0} if self.counts else {}
        super().__init__(inner, {**settings, **counted}, module)
        self._local, self._skip = local, skip_nonfinite
        self._skipped = 0

    @property
    def needs_second_pass(self) -> bool:
        """Whether this step has a second pass, alike on all ranks."""
        return True

    def rewrite_gradients(self, first: FirstPass | None) -> None:
        """Make the gradients that ``inner`` gets from those of the passes; ``first`` is None after a single one."""

    # --------------------------------------------------------------------------------------------- the two interfaces

    @torch.no_grad()
    def step(self, closure: Closure | None = None, **extra: Any) -> Any:
        """Take one step; see the class for both ways to call it.

        Args:
            closure: computes the loss and calls ``backward()``. It is called twice; gradients are zeroed before. None
                after :meth:`first_step` and a second backward pass: then this is :meth:`second_step`.
            **extra: for the step of ``inner``. An optimizer that takes the loss (Momo) is given that of the first pass
                unless ``loss`` is here.

        Returns:
            what ``closure`` returned the first time.

        Raises:
            RuntimeError: without a closure and a first step.
        """
        if closure is not None:
            return self._step_with(closure, extra)
        if self._first is not None:
            return self.second_step(**extra)
        if self.rehearsing():
            self.rewrite_gradients(None)
            return self.step_inner()
        if self.needs_second_pass:
            raise RuntimeError(f"{type(self).__name__}.step() needs a second pass: {_USAGE}")
        return self._finish(None, extra)

    def _step_with(self, closure: Closure, extra: dict[str, Any]) -> Any:
        self._check_begins()
        twice = self.needs_second_pass
        self.zero_grad()
        with torch.enable_grad(), self._unaveraged() if twice else contextlib.nullcontext():
            loss = closure()
        extra = self._with_loss(loss, extra)
        if not twice:
            self._finish(None, extra)
            return loss
        self.first_step()
        self._end_with(closure, extra)
        return loss

    def _end_with(self, second: Callable[[], Any], extra: Mapping[str, Any]) -> None:
        """The second pass and what follows; if it raises, the model is as before the step."""
        try:
            with torch.enable_grad():
                second()
        except BaseException:
            self.restore()
            raise
        self.second_step(**extra)

    def _unaveraged(self) -> Any:
        """Where DistributedDataParallel leaves gradients to each rank, for a local first pass."""
        if not self._local or not dist.is_initialized() or dist.get_world_size() == 1:
            return contextlib.nullcontext()
        if not hasattr(self._module, "no_sync"):
            raise RuntimeError(
                f"{type(self).__name__}: local=True: step(closure) must keep the first pass from averaging gradients: "
                f"give {type(self).__name__}(..., module=ddp_model), or call first_step() after a backward pass under "
                "ddp_model.no_sync()"
            )
        return self._module.no_sync()  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Perturb the weights by the gradients of the first backward pass. All ranks must call it.

        Args:
            zero_grad: set the gradients to None, for the second pass.

        Raises:
            RuntimeError: after another first step.
            TypeError, ValueError: for a gradient or setting that cannot be used, before anything is changed.
        """
        self._check_begins()
        if self.needs_second_pass:
            self.perturb()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False, **extra: Any) -> Any:
        """Go back to the weights, and take a step of ``inner`` with the gradients of the second backward pass.

        Args:
            zero_grad: set the gradients to None afterwards.
            **extra: for the step of ``inner``.

        Returns:
            what the step of ``inner`` returned.

        Raises:
            RuntimeError: without a first step.
        """
        self._opt_called = True  # as step() does: schedulers look for it
        if self._first is None and self.needs_second_pass:
            raise RuntimeError(f"{type(self).__name__}.second_step() was called without first_step(): {_USAGE}")
        first = self._first
        self.restore()
        result = self._finish(first, extra)
        if zero_grad:
            self.zero_grad()
        return result

    def _check_begins(self) -> None:
        if self._first is not None:
            raise RuntimeError(
                f"{type(self).__name__}: a first step was made already: end it with second_step(), or undo it with "
                "restore()"
            )
        self.check_settings()

    # ----------------------------------------------------------------------------------------------- the inner step

    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by GradScaler: a step must be called after an overflow too, to go back."""
        return True

    @property
    def skipped(self) -> int:
        """Steps that were left out because a gradient was not finite, here or inside."""
        return self._skipped + super().skipped

    def _finish(self, first: FirstPass | None, extra: Mapping[str, Any]) -> Any:
        self._check_scale()
        if self._must_skip(first):
            self._skipped += 1
            self.outcome = Outcome.SKIPPED
            return None
        self.rewrite_gradients(first)
        self._unscale()
        result = self.step_inner(**extra)
        if self.counts and self.outcome is Outcome.DONE:
            self.set("steps", self.setting(self.param_groups[0], "steps") + 1)
        return result

    def _must_skip(self, first: FirstPass | None) -> bool:
        """Whether some gradient was not finite: on any rank, where steps are skipped jointly."""
        overflow = getattr(self, "found_inf", None)
        if not self._skip:
            return overflow is not None and bool(overflow)
        plan = self.whole_plan()
        squares = [self.squares(plan, self.parts(plan)), *([] if first is None else [first.squares])]
        bad = (~torch.isfinite(torch.stack(squares)).all()).double()
        if overflow is not None:
            bad = torch.maximum(bad, overflow.to(bad))
        for group in self.data_groups:  # replicas may have gradients of their own
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
        return bool(bad)

    def _check_scale(self) -> None:
        if getattr(self, "grad_scale", None) is not None and any(
            is_flattened(p) for group in self.param_groups for p in group["params"]
        ):
            raise RuntimeError(
                f"{type(self).__name__}: gradients of FSDP1 (FullyShardedDataParallel) parameters must be unscaled "
                "before the step, since its scaler tells ranks of each other's overflows only then: call "
                "scaler.unscale_(optimizer), then scaler.step(optimizer). The weights are as before the step"
            )

    def _unscale(self) -> None:
        """Unless ``inner`` knows GradScaler itself: divide gradients by its factor, and tell ``inner`` nothing."""
        if getattr(self.inner, "_step_supports_amp_scaling", False):
            return
        if (scale := getattr(self, "grad_scale", None)) is not None:
            kinds: dict[Any, list[torch.Tensor]] = {}
            for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                memory = whole_or_local(parameter.grad)
                kinds.setdefault((memory.device, memory.dtype), []).append(memory)
            inverse = scale.double().reciprocal()
            for (device, dtype), memories in kinds.items():
                torch._foreach_mul_(memories, inverse.to(device, torch.promote_types(dtype, torch.float32)))
        if hasattr(self, "found_inf"):  # which GradScaler deletes
            self.grad_scale = self.found_inf = None

    def _with_loss(self, loss: Any, extra: dict[str, Any]) -> dict[str, Any]:
        takes = "loss" in inspect.signature(self.origin.step).parameters
        return {"loss": loss, **extra} if takes else extra

    # -------------------------------------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Wrapper.state_dict`; not between the passes of a step."""
        self._check_between_steps("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`Wrapper.load_state_dict`; not between the passes of a step."""
        self._check_between_steps("load_state_dict()")
        super().load_state_dict(state_dict)

    def _check_between_steps(self, asked: str) -> None:
        if self._first is not None:
            raise RuntimeError(
                f"{type(self).__name__}.{asked} between first_step() and second_step(), while the weights are "
                "perturbed: end the step with second_step(), or undo it with restore()"
            )
