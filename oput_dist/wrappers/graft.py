"""AdaGraft: steps as long as one optimizer's, in the direction of another's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from oput_dist.engine import Group, Optimizer, Recipe, Shape, row_of
from oput_dist.engine.finish import finish
from oput_dist.engine.hyper import Nonnegative, check_group, signature_checks
from oput_dist.engine.recipe import as_scalar
from oput_dist.engine.slot import Slot
from oput_dist.engine.step import Outcome
from oput_dist.engine.sweep import Part, Sums, sweep
from oput_dist.engine.wrapper import Wrapper, check_own
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.stage import WHOLE, Apply, Factors, Measure, Update, Write

from .pairs import PREFIX, check_decay, check_pair, direction_group, merged, parted, prefixed, settings_of

__all__ = ["AdaGraft"]


@rule
def squared_lengths(p, g, state, h):
    """Of both steps: ``g`` is where they began, and the state where the other one led."""
    along, far = p - g, state[0] - g
    return state, (far * far, along * along)


@rule
def ratio(sums, h):
    far, along, _ = sums
    length = tl.sqrt(along)
    return (tl.where(length > 0, tl.sqrt(far) / (length + h.eps), 0.0),)


@rule
def grafted(p, g, state, h, c):
    return h.keep * g + c[0] * (p - g)


@rule
def grafted_alike(p, g, state, h):
    return h.keep * g + h.ratio * (p - g), state


TENSOR = Apply(grafted, Factors(ratio))
LENGTHS = Measure(squared_lengths, (WHOLE, WHOLE), writes_state=False)


class AdaGraft(Wrapper):
    r"""AdaGraft, grafting: the step length of one optimizer :math:`M`, the direction of another, :math:`D`.

    .. math::
        p_t = (1 - \eta\lambda) p_{t-1} + \frac{\lVert s_M \rVert}{\lVert s_D \rVert + \epsilon} s_D

    where :math:`s_M` and :math:`s_D` are the steps that the two would make from :math:`p_{t-1}`, and :math:`\eta` is
    the learning rate of :math:`M`. Norms are of each tensor, or of all together. So the learning rate of :math:`D`
    cancels; but give it one like that of :math:`M`, since its steps are rounded as parameters are. Parameters in bf16
    are too coarse for this, and ``kahan_sum`` and ``stochastic_rounding`` of either
    optimizer have no effect.

    The groups are those of the magnitude optimizer, ``inner``, which schedules act on. State and groups of
    ``direction`` are saved and loaded with it, under names that begin with ``direction_``.

    ``skip_nonfinite``, given to the magnitude optimizer, decides for both, as does GradScaler. An optimizer that needs
    the loss gets it: ``step(loss=loss)``, or what the closure returned.

    Args:
        magnitude: the optimizer whose step lengths are taken: of this library or torch's, without weight decay.
        direction: the optimizer whose directions are taken, likewise: of the same parameters in the same groups.
        scope: ``"tensor"`` for norms of each parameter, ``"global"`` for norms of all together. Default ``"tensor"``.
        weight_decay: decoupled, :math:`\lambda \ge 0`: once for both. Default 0.
        eps: :math:`\epsilon \ge 0`, beside the length of a direction. Default 1e-16.
        module: the module of the parameters, where the magnitude optimizer does not have it and FSDP1
            (``FullyShardedDataParallel``) flattened them.

    Raises:
        TypeError: for what is no optimizer; for a wrapper, which goes around AdaGraft; for one that keeps slow weights
            or an average of its own.
        ValueError: for a value out of range; if the parameters are not the same; for weight decay or, in the direction
            optimizer alone, ``skip_nonfinite``; for different values of ``shard_group``.

    Sharding class W: what both optimizers communicate, and one packed all-reduce; under ``shard_group`` parameters are
    gathered by each and once more. State: that of both. A step takes memory for two copies of this rank's pieces.

    Example::

        optimizer = AdaGraft(
            oput.SGD(model, lr=0.1, momentum=0.9), oput.AdamW(model, lr=1e-3, weight_decay=0.0), weight_decay=1e-4
        )

    When: an optimizer's step sizes are known to work, and another's directions should be tried without tuning it.
    Start: the magnitude optimizer as it was tuned, ``scope="tensor"``.

    Paper: Agarwal et al., https://arxiv.org/abs/2002.11803.
    """

    prefix = "graft"

    def __init__(
        self,
        magnitude: torch.optim.Optimizer,
        direction: torch.optim.Optimizer,
        *,
        scope: Literal["tensor", "global"] = "tensor",
        weight_decay: Nonnegative = 0.0,
        eps: Nonnegative = 1e-16,
        module: nn.Module | None = None,
    ) -> None:
        check_group("AdaGraft", {"scope": scope}, signature_checks(type(self)))  # type: ignore[arg-type]
        check_pair(magnitude, direction)
        for each in (magnitude, direction):
            if isinstance(each, Optimizer):  # where parameters end is where neither step went
                each._options = replace(each._options, write=Write.NEAREST)
        self.direction, self.scope = direction, scope
        super().__init__(magnitude, {"weight_decay": weight_decay, "eps": eps}, module)

    @property  # type: ignore[misc]  # the groups of two optimizers are not to be replaced
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the magnitude optimizer, with the values of the direction optimizer's: to read, not to change."""
        for group, other in zip(self.inner.param_groups, self.direction.param_groups, strict=False):
            group.update(prefixed(settings_of(other)))
        return self.inner.param_groups

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:  # type: ignore[override]
        """The state of both optimizers, by parameter: for reading."""
        state: Any = super().state
        for parameter, entry in self.direction.state.items():
            state[parameter] = {**state.get(parameter, {}), **prefixed(entry)}
        return state  # type: ignore[no-any-return]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        able = (getattr(each, "_step_supports_amp_scaling", False) for each in (self.inner, self.direction))
        return all(able)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        """That of the magnitude optimizer, with the state of both."""
        check_own("AdaGraft.recipe", self.direction)
        recipe, direction = super().recipe(group, shape), self.direction
        other: Recipe = direction.recipe(direction_group(group), shape)  # type: ignore[attr-defined]
        vectors = [(f"{PREFIX}{name}", axes) for name, axes in other.vectors]
        return replace(
            recipe,
            state=(*recipe.state, *(f"{PREFIX}{name}" for name in other.state)),
            vectors=(*recipe.vectors, *vectors, (f"{PREFIX}step", WHOLE)),  # its step count, so that it is kept
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to both optimizers. What begins with ``direction_`` is for the direction optimizer."""
        if not isinstance(param_group.get("params"), (torch.Tensor, set)):
            param_group["params"] = list(param_group["params"])  # which may be read only once
        self.direction.add_param_group({**direction_group(param_group), "params": param_group["params"]})
        try:
            super().add_param_group({name: v for name, v in param_group.items() if not name.startswith(PREFIX)})
            check_pair(self.inner, self.direction)
        except Exception:
            self.direction.param_groups.pop()
            del self.inner.param_groups[len(self.direction.param_groups) :]
            raise

    def _sums(self, group: Group, shape: Shape) -> bool:
        return True

    # ----------------------------------------------------------------------------------------------------------- steps

    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """A step of both optimizers, of which one with the length and the direction asked for is made.

        Args:
            closure: computes the loss anew, with gradients; called once.
            **extra: what else the ``step`` of one of them takes, such as ``loss``.

        Returns:
            what the step of the magnitude optimizer did.
        """
        self.check_settings()
        check_decay("magnitude", self.inner)
        check_decay("direction", self.direction)
        for name in extra:
            if not (takes(self.inner, name) or takes(self.direction, name)):
                raise TypeError(f"AdaGraft: neither optimizer's step() takes {name!r}")
        rehearsed = self.rehearsing()
        before = self._pieces()
        result = self.step_inner(closure, **{n: v for n, v in extra.items() if takes(self.inner, n)})
        if self.outcome is Outcome.SKIPPED:
            return result
        after = self._pieces()
        self._put(before)
        if closure is not None and "loss" not in extra:
            extra["loss"] = result
        self._step_direction({n: v for n, v in extra.items() if takes(self.direction, n)}, rehearsed)
        if self.outcome is Outcome.DONE:
            self._graft(before, after)
        else:
            self._put(before)
        return result

    def _step_direction(self, extra: Mapping[str, Any], rehearsed: bool) -> None:
        """A step of the direction optimizer: at lr 0, too, where the other may only be asked to create state."""
        direction = self.direction
        rates = [(group, group["lr"]) for group in direction.param_groups if rehearsed]
        for group, lr in rates:
            group["lr"] = torch.zeros_like(lr) if isinstance(lr, torch.Tensor) else 0.0
        scaler = {n: v for n in ("grad_scale", "found_inf") if (v := getattr(self, n, None)) is not None}
        vars(direction).update(scaler)
        try:
            direction.step(**extra)
        finally:
            for name in scaler:
                delattr(direction, name)
            for group, lr in rates:
                group["lr"] = lr

    @torch.no_grad()
    def _pieces(self) -> dict[int, torch.Tensor]:
        """Copies of what this rank updates, by number of the slot."""
        return {slot.index: slot.flat_parameter().clone() for slot in self._moving()}

    @torch.no_grad()
    def _put(self, pieces: Mapping[int, torch.Tensor]) -> None:
        """Write such copies back. Under ``shard_group`` other ranks' pieces are not here; no step reads them."""
        for slot in self._moving():
            slot.store(pieces[slot.index]) if not slot.in_place else slot.flat_parameter().copy_(pieces[slot.index])

    def _moving(self) -> list[Slot]:
        return [slot for slot in self.plan().slots if slot.numel and slot.parameter.requires_grad]

    @torch.no_grad()
    def _graft(self, before: Mapping[int, torch.Tensor], after: Mapping[int, torch.Tensor]) -> None:
        """Make the step, from what parameters were before and where the magnitude optimizer's step led."""
        self.reshard()
        plan = self.plan()
        slots = [slot for slot in self._moving() if slot.parameter.grad is not None]
        parts = [Part(s, s.flat_parameter(), before[s.index], (after[s.index],)) for s in slots]
        rows = {
            i: {"keep": 1 - as_scalar(g["lr"]) * self.setting(g, "weight_decay"), "eps": self.setting(g, "eps")}
            for i, g in enumerate(self.param_groups)
        }
        named = {i: row_of(**row) for i, row in rows.items()}
        sums = sweep(plan, LENGTHS, parts, named, self.backends)
        assert sums is not None
        if self.scope == "tensor":
            sweep(plan, TENSOR, parts, named, self.backends, sums)
        else:
            alike = [replace(part, state=()) for part in parts]
            whole = {i: row_of(keep=row["keep"], ratio=self._ratio(sums, row["eps"])) for i, row in rows.items()}
            sweep(plan, Update(grafted_alike), alike, whole, self.backends)
        finish(plan, [(part.slot, part.p) for part in parts])

    def _ratio(self, sums: Sums, eps: float) -> torch.Tensor:
        """That of both lengths over all parameters, 0-d; not read, so that no step waits for it."""
        far, along, _ = sums.total(self.model_groups).sqrt()
        return torch.where(along > 0, far / (along + eps), 0.0)

    # ---------------------------------------------------------------------------------------------- saving and loading

    def save_inner(self) -> dict[str, Any]:
        """The state dict of the magnitude optimizer, with the direction optimizer's in it."""
        assert self.param_groups is self.inner.param_groups  # which has brought them up to date
        return merged(self.inner.state_dict(), self.direction.state_dict())

    def load_inner(self, state_dict: dict[str, Any]) -> None:
        """Load both, or neither."""
        magnitude, direction = parted(state_dict)
        earlier = self.direction.state_dict()
        self.direction.load_state_dict(direction)
        try:
            super().load_inner(magnitude)
        except Exception:
            self.direction.load_state_dict(earlier)
            raise


def takes(optimizer: torch.optim.Optimizer, name: str) -> bool:
    """Whether an optimizer's step takes an argument."""
    parameters = inspect.signature(optimizer.step).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
