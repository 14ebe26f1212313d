"""Replicated parameters whose update and state are partitioned over a group: ZeRO-1 for DDP."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .base import Layout
from .box import Box
from .dtensor import Distributed

__all__ = ["Partitioned"]


@functools.cache
def _mesh(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device_type)


class Partitioned(Layout):
    """A parameter that is whole on every rank of ``group``, of which this rank updates some rows.

    The rows are those that FSDP2 would give it (``ceil(rows / ranks)`` for each rank, the last ones fewer or none), and
    the state is the same DTensor, so checkpoints of both look alike. A 0-d parameter is updated by every rank, and the
    first rank's value is taken.
    """

    def __init__(self, parameter: torch.Tensor, group: dist.ProcessGroup) -> None:
        self.shape = parameter.shape
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self._split = parameter.dim() > 0
        rows = parameter.shape[0] if self._split else 0
        height = -(-rows // ranks)
        self._bounds = [(min(r * height, rows), min((r + 1) * height, rows)) for r in range(ranks)]
        self._rows = self._bounds[rank]
        self.groups = (group,) if self._split and ranks > 1 else ()
        self.gather_group = group if ranks > 1 else None
        self.device = parameter.device
        mesh = _mesh(group, parameter.device.type)
        self._state = Distributed(_on_mesh(parameter, self.piece(parameter), mesh, self._split))

    @property
    def boxes(self) -> tuple[Box, ...]:
        return self._state.boxes

    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self._rows[0] : self._rows[1]] if self._split else tensor

    def pieces(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        if self._split:
            return [parameter[start:stop] for start, stop in self._bounds]
        one = parameter.view(1)  # every rank updates it, and the first one's value holds
        return [one] + [one[1:]] * (len(self._bounds) - 1)

    def zeros(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        return self._state.zeros(dtype, device)

    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        return self._state.adopt(value)

    def piece_of_state(self, value: torch.Tensor) -> torch.Tensor:
        return self._state.piece_of_state(value)

    def vector(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._state.vector(shape, dtype)

    def spread(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        return self._state.spread(length, dtype)

    def memory_of_vector(self, value: torch.Tensor) -> torch.Tensor:
        return self._state.memory_of_vector(value)


def _on_mesh(parameter: torch.Tensor, piece: torch.Tensor, mesh: DeviceMesh, split: bool) -> DTensor:
    """The DTensor whose local piece is ``piece``: what FSDP2 would make of the parameter."""
    placement = Shard(0) if split else Replicate()
    with torch.no_grad():
        return DTensor.from_local(
            piece.detach(), mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
