"""Gradients that come as partial sums: tensor parallelism leaves them so on replicated parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from oput_dist.layout import Layout, managed_by_fsdp2, whole_or_local

__all__ = ["PartialSums"]


class PartialSums:
    """Adds up gradients that are partial sums, packed: one all-reduce for each process group, dtype and device.

    Which parameters take part follows from metadata: those that are replicated over some mesh dimension and whose
    gradients FSDP2 does not reduce itself. A rank that has no gradient, or one that is no partial sum, adds nothing,
    so that no rank waits for another in vain. Parameters that cannot have partial gradients cost nothing.

    Args:
        parameters: the parameters, in the same order on all ranks.
        layouts: of the parameters.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> None:
        self._parameters, self._layouts = parameters, layouts
        candidates = [i for i, layout in enumerate(layouts) if layout.partial_groups and parameters[i].requires_grad]
        managed = managed_by_fsdp2() if candidates else set()
        self._families: dict[object, list[int]] = {}
        for i in candidates:
            if id(parameters[i]) not in managed:
                ranks = tuple(tuple(dist.get_process_group_ranks(group)) for group in layouts[i].partial_groups)
                key = (ranks, parameters[i].dtype, whole_or_local(parameters[i]).device)
                self._families.setdefault(key, []).append(i)

    def __bool__(self) -> bool:
        """Whether there is anything to add up, ever."""
        return bool(self._families)

    def settled(self) -> dict[int, torch.Tensor]:
        """The gradients that were partial sums, by number of the parameter, placed like it. Every rank must call it."""
        found: dict[int, torch.Tensor] = {}
        for members in self._families.values():
            found.update(self._settled(members))
        return found

    def _settled(self, members: Sequence[int]) -> dict[int, torch.Tensor]:
        gradients = [self._parameters[i].grad for i in members]
        layouts = [self._layouts[i] for i in members]
        shares = [
            (0.0,) * len(layout.partial_groups) if gradient is None else layout.partial(gradient)
            for layout, gradient in zip(layouts, gradients, strict=True)
        ]
        values: list[torch.Tensor] = []
        for i, layout, gradient, share in zip(members, layouts, gradients, shares, strict=True):
            own = whole_or_local(self._parameters[i])
            if gradient is not None and any(share):
                values.append(layout.partial_piece(gradient).to(own.dtype).contiguous())
            else:
                values.append(torch.zeros(own.shape, dtype=own.dtype, device=own.device))
        for dim, group in enumerate(layouts[0].partial_groups):
            terms = [value.mul(share[dim]) for value, share in zip(values, shares, strict=True)]
            packed = torch.cat([term.reshape(-1) for term in terms])
            dist.all_reduce(packed, group=group)
            sums = torch.split(packed, [term.numel() for term in terms])
            values = [
                total.view(value.shape) if share[dim] else value
                for value, total, share in zip(values, sums, shares, strict=True)
            ]
        return {
            i: layout.placed(value)
            for i, layout, value, share in zip(members, layouts, values, shares, strict=True)
            if any(share)
        }
