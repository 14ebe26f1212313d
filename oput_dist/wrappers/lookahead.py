"""Lookahead: slow weights that follow the inner optimizer's every few steps, part of the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from oput_dist.engine import Optimizer, Params, row_of
from oput_dist.engine.finish import finish, updated
from oput_dist.engine.forms import lost_of
from oput_dist.engine.hosted import Hosted
from oput_dist.engine.hyper import PositiveInteger, Share, check_group, signature_checks
from oput_dist.engine.slot import Slot
from oput_dist.engine.step import Outcome
from oput_dist.engine.sweep import Far, Part, part_of, sweep
from oput_dist.engine.wrapper import Wrapper, inner_of
from oput_dist.kernels.language import rule
from oput_dist.kernels.stage import Update
from oput_dist.layout import LayoutError
from oput_dist.layout.plain import Plain

__all__ = ["Lookahead", "momenta_of", "refuse_second_iterate"]

SLOW = "lookahead_slow"
SECOND_ITERATES = ("z", "slow_buffer", "lookahead_params")
"""Names of state that is a second set of weights, which a change of the parameters alone would leave behind."""


@rule
def meet(p, g, state, h):
    slow = state[0] + h.alpha * (p - state[0])
    return slow, (slow,)


class Lookahead(Wrapper):
    r"""Lookahead, k steps forward, one step back: around any optimizer.

    .. math::
        \phi_0 = \theta_0, \qquad
        \phi \leftarrow \phi + \alpha (\theta - \phi), \quad \theta \leftarrow \phi \qquad \text{every } k \text{ steps}

    with fast weights :math:`\theta`, which are the parameters that the inner optimizer steps, and slow weights
    :math:`\phi`, which begin as the parameters before the first step. Each group counts its own steps. One that was
    skipped, or that only created state, does not count.

    Args:
        params: the optimizer to wrap; or parameters, groups, named parameters, or a module, with ``base``.
        base: the class of the optimizer to make, with ``options``.
        k: steps between two synchronisations, an integer >= 1. Default 5.
        alpha: :math:`\alpha` in (0, 1], the share of the way that slow weights go. Default 0.5.
        inner_state: what becomes of the inner momentum (``momentum_buffer``, ``exp_avg`` and the like) when weights
            meet: ``"keep"`` leaves it, ``"reset"`` makes it zero, ``"pullback"`` moves it back as the weights are,
            towards its value at the last synchronisation (0 before the first). Second moments and step counts stay.
            Default ``"keep"``.
        slow_dtype: of the slow weights, such as ``torch.bfloat16``, which rounds them at each synchronisation by up to
            0.2%; the parameters' own by default. torch's own state dicts of FSDP1 take one dtype for all state of a
            parameter: there, save ``oput.full_state_dict(optimizer)``.
        slow_device: ``"cpu"`` keeps slow weights in host memory; each tensor then visits the device when weights meet.
            For whole parameters only (one process, DDP), unless they are on the CPU themselves.
        module: the module of the parameters, where neither ``params`` nor the inner optimizer has it and FSDP1
            (``FullyShardedDataParallel``) flattened them.
        **options: of ``base``. What has the name of an argument above must be given to the inner optimizer itself.

    Raises:
        TypeError: for what is no optimizer, or one that keeps slow weights or an average of its own.
        ValueError: for a value out of range, or ``inner_state`` other than ``"keep"`` where there is no momentum.
        LayoutError: at the first step, for ``slow_device="cpu"`` and parameters that are sharded on other devices.

    Sharding class W: as the inner optimizer; nothing more is communicated, but under ``shard_group`` the parameters
    that met are gathered. State: 4 bytes per parameter (fp32), 8 with ``"pullback"``, sharded as the inner state.

    Example::

        optimizer = Lookahead(oput.AdamW(model, lr=1e-3), k=5, alpha=0.5)
        optimizer = Lookahead(model, torch.optim.SGD, k=5, lr=0.1, momentum=0.9)

    When: the learning rate is high, or must not be tuned. Start: ``k=5``, ``alpha=0.5``, the inner optimizer as it was.

    Paper: Zhang et al., https://arxiv.org/abs/1907.08610.
    """

    prefix = "lookahead"

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base: Callable[..., Any] | None = None,
        *,
        k: PositiveInteger = 5,
        alpha: Share = 0.5,
        inner_state: Literal["keep", "reset", "pullback"] = "keep",
        slow_dtype: torch.dtype | None = None,
        slow_device: torch.device | str | None = None,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        check_group("Lookahead", {"inner_state": inner_state}, signature_checks(type(self)))  # type: ignore[arg-type]
        _check_place(slow_dtype, slow_device)
        inner, module = inner_of("Lookahead", params, base, options, module)
        refuse_second_iterate("Lookahead", inner)
        self._inner_state, self._slow_dtype, self._on_host = inner_state, slow_dtype, slow_device is not None
        self._momenta = () if inner_state == "keep" else momenta_of(inner, inner_state)
        slow_momenta = (_slow_name(name) for name in self._momenta if inner_state == "pullback")
        self.keeps = (SLOW, *slow_momenta)  # type: ignore[misc]  # here they depend on the inner optimizer
        super().__init__(inner, {"k": k, "alpha": alpha, "steps": 0}, module)

    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """A step of the inner optimizer, and a synchronisation if it is time. Returns what the inner one did.

        Args:
            closure: computes the loss anew, with gradients.
            **extra: what else the inner ``step`` takes.
        """
        self.check_settings()
        self._begin()
        result = self.step_inner(closure, **extra)
        if self.outcome is Outcome.DONE:
            self._count()
        return result

    @torch.no_grad()
    def _begin(self) -> None:
        """Slow weights begin as parameters before the first step: what came before that, as loaded weights, counts."""
        plan = self.plan()
        early = [self.setting(group, "steps") == 0 for group in self.param_groups]
        if self._on_host:
            _check_whole(plan.slots)
        self._kept.begin(plan, SLOW, self._slow_dtype, lambda slot: early[slot.group])
        for slot in plan.slots:
            kept = self._kept.state.get(slot.parameter)
            if kept is None:
                continue
            slot.flat_state(kept, self.keeps[1:], None)
            if self._far(slot) and kept[SLOW].device.type != "cpu":
                kept[SLOW] = kept[SLOW].cpu()

    def _far(self, slot: Slot) -> bool:
        """Whether slow weights are on another device than the parameter."""
        return self._on_host and slot.device.type != "cpu"

    @torch.no_grad()
    def _count(self) -> None:
        due: dict[int, Any] = {}
        for number, group in enumerate(self.param_groups):
            steps = self.setting(group, "steps") + 1
            group[f"{self.prefix}_steps"] = steps
            if steps % self.setting(group, "k") == 0:
                due[number] = row_of(alpha=self.setting(group, "alpha"))
        if due:
            self._synchronize(due)

    def _synchronize(self, due: Mapping[int, Any]) -> None:
        """Let fast and slow weights of some groups meet; ``due`` has the scalars of each."""
        self.reshard()
        plan = self.plan()
        slots = [s for s in plan.slots if s.group in due and s.numel and s.parameter in self._kept.state]
        flats = [(slot, slot.flat_parameter()) for slot in slots]
        sweep(plan, Update(meet), [self._part(slot, p) for slot, p in flats], due, self.backends)
        # What is gathered must be the same on all ranks, also on one whose piece of a parameter is empty.
        finish(plan, flats, lambda s: s.group in due and updated(s))
        for name in self._momenta:
            self._pull_back(name, slots, due)

    def _part(self, slot: Slot, p: torch.Tensor) -> Part | Far:
        kept, slow = self._kept.state[slot.parameter], (SLOW,)
        far = Hosted(_flat_on_host(slot, kept[SLOW]), slot.device) if self._far(slot) else None
        state = slot.flat_state(kept, slow, None) if far is None else (far,)
        return part_of(slot, p, p, state, lost_of(slot, self.origin.state.get(slot.parameter, {})))

    def _pull_back(self, name: str, slots: list[Slot], due: Mapping[int, Any]) -> None:
        """Reset a momentum, or move it back."""
        state, parts = self.origin.state, []
        for slot in slots:
            if state.get(slot.parameter, {}).get(name) is None:
                continue
            (momentum,) = slot.flat_state(state[slot.parameter], (name,), None)
            if self._inner_state == "reset":
                momentum.zero_()
            else:
                slow = slot.flat_state(self._kept.state[slot.parameter], (_slow_name(name),), None)
                parts.append(Part(slot, momentum, momentum, slow))
        sweep(self.plan(), Update(meet), parts, due, self.backends)


def _slow_name(name: str) -> str:
    return f"{SLOW}_{name}"


def _flat_on_host(slot: Slot, slow: torch.Tensor) -> torch.Tensor:
    """Slow weights on the CPU, 1-d, in the order of the parameter's memory, which they were copied with."""
    return slow.as_strided((slot.numel,), (1,))


def _check_place(dtype: Any, device: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"Lookahead: slow_dtype={dtype!r} is not allowed: must be None or a floating-point dtype")
    if device is not None and str(device) != "cpu":
        raise ValueError(f"Lookahead: slow_device={device!r} is not allowed: must be None or 'cpu'")


def _check_whole(slots: list[Slot]) -> None:
    for slot in slots:
        if slot.device.type != "cpu" and not isinstance(slot.layout, Plain):
            raise LayoutError(
                f"Lookahead: slow_device='cpu' is for whole parameters, but {slot.name} is sharded on {slot.device}, "
                "and its slow weights with it: leave slow_device out, or give slow_dtype=torch.bfloat16"
            )


# ------------------------------------------------------------------------------------- what an inner optimizer keeps


def recipe_names(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """The names of parameter-shaped state; None for an optimizer that is not of this library."""
    origin = optimizer.origin if isinstance(optimizer, Wrapper) else optimizer
    if not isinstance(origin, Optimizer):
        return None
    shapes = [(group, p.shape) for group in origin.param_groups for p in group["params"]]
    return {name for group, shape in shapes for name in origin.recipe(group, shape).state}


def refuse_second_iterate(owner: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError for an optimizer with weights of its own beside the parameters: an average, or slow weights."""
    found = sorted((recipe_names(optimizer) or set()) & set(SECOND_ITERATES))
    found += [key for group in optimizer.param_groups for key in ("train_mode",) if key in group]  # schedule-free ones
    if found:
        origin = optimizer.origin if isinstance(optimizer, Wrapper) else optimizer
        raise TypeError(
            f"{owner} cannot wrap {type(origin).__name__}, which keeps slow weights or an average of its own "
            f"({found[0]!r}) that would be left behind: take the optimizer without, as RAdam for Ranger or AdamW for "
            f"AdamWScheduleFree: {owner}(oput.AdamW(model))"
        )


def momenta_of(optimizer: torch.optim.Optimizer, asked: str) -> tuple[str, ...]:
    """The names of an optimizer's momentum. torch's keep no list of their state, so their groups must tell.

    Raises:
        ValueError: if there is none.
        TypeError: around two optimizers.
    """
    if hasattr(optimizer, "direction"):
        raise TypeError(
            f"Lookahead: inner_state={asked!r} is for one momentum, but AdaGraft has two optimizers: "
            "Lookahead(AdaGraft(...)), which keeps them"
        )
    origin: Any = optimizer.origin if isinstance(optimizer, Wrapper) else optimizer
    if getattr(getattr(origin, "options", None), "opens", False):
        raise ValueError(
            f"Lookahead: inner_state={asked!r} changes momentum as it is kept, and state_dtype=, state_overrides= or "
            f"state_device= of {type(origin).__name__} keep it in forms or places of their own: give "
            "inner_state='keep', or one dtype"
        )
    names = recipe_names(optimizer)
    if names is None:
        groups = optimizer.param_groups
        names = {"exp_avg" for group in groups if "betas" in group}
        names |= {"momentum_buffer" for group in groups if group.get("momentum")}
    found = tuple(sorted(name for name in names if name.startswith(("momentum_buffer", "exp_avg")) and _first(name)))
    if not found:
        raise ValueError(
            f"Lookahead: inner_state={asked!r} is for optimizers with momentum, and {type(origin).__name__} here keeps "
            "none: give inner_state='keep', or the inner optimizer a momentum"
        )
    return found


def _first(name: str) -> bool:
    """Whether state is an average of gradients themselves: not of their squares, nor of learning rates."""
    return not any(word in name for word in ("_sq", "_var", "_lr"))
