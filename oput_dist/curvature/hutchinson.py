"""Hutchinson's estimate: a random vector times the Hessian times the vector, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from oput_dist.engine.finish import finish
from oput_dist.engine.hyper import check_group, one_of, optional, positive
from oput_dist.engine.recipe import row_of
from oput_dist.engine.slot import Slot
from oput_dist.engine.sweep import Part, sweep
from oput_dist.kernels.language import rule
from oput_dist.kernels.math import square_terms
from oput_dist.kernels.stage import WHOLE, Measure, Update
from oput_dist.layout import flat, is_flattened, managed_by_fsdp2

from .context import Context, CurvatureError, Outputs
from .estimator import Estimator, first_output
from .noise import key_of, probe

__all__ = ["Hutchinson"]

_CALL = "optimizer.refresh(lambda: loss_function(model(inputs), labels))"
_WAYS_OUT = (
    'use Hutchinson(product="difference"), which takes two first-order backward passes in its place, or '
    "GaussNewtonBartlett(), which takes one"
)


@rule
def moved(p, g, state, h):
    return p + h.step * g, ()


class Hutchinson(Estimator):
    r"""Hutchinson's estimate of the Hessian's diagonal.

    .. math:: \hat h = u \odot \nabla^2 \ell(\theta)\, u, \qquad E[u u^T] = I

    One product for all parameters together. Every rank has its pieces of the same :math:`u`, so that ranks with
    different data estimate the same and their mean is that of the global batch.

    The function returns the mean loss of the batch, as for training.

    Args:
        probe: of what :math:`u` is made: ``"rademacher"`` (signs: least variance) or ``"normal"``. Default Rademacher.
        product: ``"exact"`` differentiates twice. That is impossible where the backward pass is fused (attention
            other than the MATH kernel), and under FSDP, whose gathered parameters are gone by then: an error says so.
            ``"difference"`` takes :math:`(\nabla\ell(\theta + \epsilon u) - \nabla\ell(\theta - \epsilon u)) /
            2\epsilon`: two ordinary forward and backward passes, under every layout; exact to about
            :math:`\epsilon^2` and to the rounding of gradients over :math:`\epsilon`, so for fp32 or fp64 gradients,
            not for bf16 ones. Default exact.
        step: :math:`\epsilon > 0` of the difference; by default the cube root of the parameters' precision times the
            root mean square of all parameters.
        spatial: take the mean of the absolute values over each convolution kernel, as AdaHessian does. Default False.
        seed: of :math:`u`. Default 0.

    Raises:
        CurvatureError: in ``refresh``, where the product cannot be had in this way; with the way out.

    Papers: Hutchinson 1989; Yao et al., https://arxiv.org/abs/2006.00719; Liu et al., https://arxiv.org/abs/2305.14342.
    """

    def __init__(
        self,
        probe: Literal["rademacher", "normal"] = "rademacher",
        product: Literal["exact", "difference"] = "exact",
        step: float | None = None,
        spatial: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        given = {"probe": probe, "product": product, "step": step}
        checks = {"probe": one_of(("rademacher", "normal")), "product": one_of(("exact", "difference"))}
        check_group("Hutchinson", given, {**checks, "step": optional(positive)})
        self.probe, self.product, self.step, self.spatial = probe, product, step, spatial

    def estimate(self, context: Context, outputs: Outputs) -> dict[int, torch.Tensor]:
        slots = [slot for slot in context.plan.slots if slot.numel]
        if self.product == "exact":
            _check_twice(context.plan.owners)
        probes = {
            slot.index: probe(slot, key_of(self.seed, context.number, context.names[slot.index]), self.probe)
            for slot in slots
        }
        products = (self._exact if self.product == "exact" else self._difference)(context, outputs, probes)
        return {index: probes[index] * product for index, product in products.items()}

    def _exact(self, context: Context, outputs: Outputs, probes: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The Hessian of the mean loss times the probes, by differentiating twice."""
        slots = [slot for slot in context.plan.owners if slot.parameter.requires_grad and slot.index in probes]
        leaves = [slot.parameter for slot in slots]
        vectors = [slot.layout.placed(probes[slot.index].as_strided(slot.piece.shape, slot.strides)) for slot in slots]
        made: dict[int, torch.Tensor] = {}
        for output in outputs:
            for slot, one in zip(slots, _twice(output, leaves, vectors), strict=True):
                if one is not None:
                    piece = flat(slot.layout.piece(_placed_as(slot.parameter, one)), slot.strides) / len(outputs)
                    made[slot.index] = made[slot.index] + piece if slot.index in made else piece
        return _averaged(made, slots, context)

    def _difference(
        self, context: Context, outputs: Outputs, probes: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """The same from gradients at two points on either side."""
        plan = context.plan
        step = self._step(context)
        slots = [slot for slot in plan.slots if slot.index in probes and slot.parameter.requires_grad]
        kept = {slot.index: slot.flat_parameter().clone() for slot in slots}
        sides, states = [], _random_states()
        try:
            for sign in (1.0, -1.0):
                points = {slot.index: kept[slot.index].clone() for slot in slots}
                h = {group: row_of(step=sign * step) for group in {slot.group for slot in slots}}
                parts = [Part(slot, points[slot.index], probes[slot.index]) for slot in slots]
                sweep(plan, Update(moved), parts, h, context.backends)
                _write(context, slots, points)
                _restore_random(states)  # both sides drop out alike
                sides.append(_gradients(context, outputs))
        finally:
            _write(context, slots, kept)
        plus, minus = sides
        return {i: (plus[i] - minus[i]) / (2.0 * step * len(outputs)).to(plus[i]) for i in plus if i in minus}

    def _step(self, context: Context) -> torch.Tensor:
        """How far the points are: 0-d, float64, the same on all ranks."""
        slots = [slot for slot in context.plan.slots if slot.numel]
        device = context.plan.devices[0]
        if self.step is not None:
            return torch.tensor(self.step, dtype=torch.float64, device=device)
        h = {group: row_of(order=2.0) for group in {slot.group for slot in slots}}
        parts = [Part(slot, p, p) for slot in slots for p in (slot.flat_parameter(),)]
        sums = sweep(context.plan, Measure(square_terms, (WHOLE,), writes_state=False), parts, h, context.backends)
        assert sums is not None
        squares, count = sums.total().unbind()
        size = (squares / count.clamp(min=1)).sqrt()
        coarsest = max(torch.finfo(slot.dtype).eps for slot in context.plan.slots)
        step: torch.Tensor = coarsest ** (1 / 3) * torch.where(size > 0, size, 1.0)
        return step


def _check_twice(slots: Sequence[Slot]) -> None:
    """Raise where a parameter's gradient cannot be differentiated: decided by metadata, so on all ranks alike."""
    managed = managed_by_fsdp2()
    for slot in slots:
        one = is_flattened(slot.parameter)
        if one or id(slot.parameter) in managed:
            raise CurvatureError(
                f"{slot.name} is sharded by {'FSDP1 (FullyShardedDataParallel)' if one else 'FSDP2 (fully_shard)'}, "
                f"whose gradients cannot be differentiated again: {_WAYS_OUT}"
            )


def _twice(
    output: Any, leaves: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """The Hessian of one output times the vectors; None for leaves that it does not depend on."""
    with torch.enable_grad():
        loss = _loss(output())
        firsts = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        used = [(g, v) for g, v in zip(firsts, vectors, strict=True) if g is not None and g.requires_grad]
        if not used:
            return [None if g is None else torch.zeros_like(g) for g in firsts]
        try:
            return torch.autograd.grad(
                [g for g, _ in used], leaves, [v for _, v in used], allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:
            if "not implemented" not in str(error) and "once_differentiable" not in str(error):
                raise
            raise CurvatureError(
                f"a part of the model cannot be differentiated twice ({error}): {_WAYS_OUT}"
            ) from error


def _loss(output: object) -> torch.Tensor:
    loss = first_output(output, "a loss", _CALL)
    loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
    if loss.numel() != 1:
        raise TypeError(
            f"the function must return one loss, the mean over the batch, but returned shape {tuple(loss.shape)} "
            f"(logits, perhaps): {_CALL}"
        )
    return loss.reshape(())


def _placed_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor) and isinstance(value, DTensor):
        placed: torch.Tensor = value.redistribute(parameter.device_mesh, parameter.placements)
        return placed
    return value


def _averaged(made: dict[int, torch.Tensor], slots: Sequence[Slot], context: Context) -> dict[int, torch.Tensor]:
    """The mean over ranks with different data: one all-reduce for each dtype and device."""
    if not context.groups:
        return made
    kinds: dict[Any, list[Slot]] = {}
    for slot in slots:
        kinds.setdefault((slot.dtype, slot.device), []).append(slot)
    for members in kinds.values():
        zeros = [made.get(slot.index, torch.zeros(0, dtype=slot.dtype)) for slot in members]
        parts = [
            part if part.numel() else torch.zeros(slot.numel, dtype=slot.dtype, device=slot.device)
            for part, slot in zip(zeros, members, strict=True)
        ]
        packed = torch.cat(parts) / context.readers
        for group in context.groups:
            dist.all_reduce(packed, group=group)
        sums = torch.split(packed, [slot.numel for slot in members])
        made |= dict(zip((slot.index for slot in members), sums, strict=True))
    return made


def _gradients(context: Context, outputs: Outputs) -> dict[int, torch.Tensor]:
    """Of the sum of the outputs, as wrappers reduce them."""
    for parameter in context.parameters:
        parameter.grad = None
    for output in outputs:
        with torch.enable_grad():
            _loss(output()).backward()  # type: ignore[no-untyped-call]
    return {index: gradient.clone() for index, gradient in context.gradients().items()}


def _write(context: Context, slots: Sequence[Slot], values: dict[int, torch.Tensor]) -> None:
    """Give parameters other values, and have FSDP gather them."""
    written = []
    for slot in slots:
        own = slot.flat_parameter()
        own.copy_(values[slot.index])
        written.append((slot, own))
    finish(context.plan, written)
    context.reshard()


def _random_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _restore_random(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
