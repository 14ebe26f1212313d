"""Copies between host memory and a device, beside what the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .transfer import on

__all__ = ["Carrier", "Move", "Space", "to_host", "zeros_on_host"]

SPACES = 2
"""One is computed on, and then copied out while the other is copied in. A third would hide what is computed, some
hundredths of what is copied."""

Move = tuple[torch.Tensor, torch.Tensor]
"""Memory on the host and memory on the device, of one shape and dtype."""


def zeros_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in host memory that a device copies from and to by itself; no memory, where the device has none."""
    where = device if device.type == "meta" else torch.device("cpu")
    return torch.zeros(tuple(shape), dtype=dtype, device=where, pin_memory=device.type == "cuda")


def to_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor in such memory."""
    return zeros_on_host(tensor.shape, tensor.dtype, device).copy_(tensor)


@dataclass
class Space:
    """Memory on the device for what came from the host.

    Attributes:
        memory: bytes; what was there before is lost.
        arrived: when all is there.
        left: when all is copied out, and it may be overwritten.
        streams: that the allocator knows to use the memory.
    """

    memory: torch.Tensor
    arrived: Any = None
    left: Any = None
    streams: set[Any] = field(default_factory=set)


class Carrier:
    """Copies in on one stream and out on another, so that both directions and the computation go on at once.

    Nothing waits but streams for events: the host goes on. There are :data:`SPACES` spaces, used in turn. On a CPU,
    which has no streams, every copy is made at once, in the same order.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._streams = device, torch.get_device_module(device)
        with on(device):
            self._inward, self._outward = self._streams.Stream(), self._streams.Stream()
        self._spaces: list[Space] = [Space(torch.empty(0, dtype=torch.uint8, device=device)) for _ in range(SPACES)]
        self._turn = 0

    def reserve(self, size: int) -> Space:
        """The next space, of at least so many bytes."""
        space = self._spaces[self._turn]
        self._turn = (self._turn + 1) % SPACES
        if space.memory.numel() < size:
            space.memory = space.memory[:0].clone()  # free it before there is another
            space.memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            space.streams = set()
            self._inward.wait_stream(self._current())  # which may still use what was there before
        return space

    def bring(self, space: Space, moves: Iterable[Move], after: Iterable[Any]) -> None:
        """Copy from the host into a space, once it is free and these events have happened."""
        for event in {id(event): event for event in (space.left, *after)}.values():
            if event is not None:
                self._inward.wait_event(event)
        self._enter(space, self._inward)
        with self._streams.stream(self._inward):
            for there, here in moves:
                here.copy_(there, non_blocking=True)
            space.arrived = self._inward.record_event()

    def arrive(self, space: Space) -> None:
        """Have what is launched from now on wait for what was brought."""
        self._enter(space, self._current())
        if space.arrived is not None:
            self._current().wait_event(space.arrived)

    def take(self, space: Space, moves: Sequence[Move]) -> Any:
        """Copy from a space to the host, after all that was launched so far.

        Returns:
            the event that it is done; None on a CPU.
        """
        space.left = self._current().record_event()
        if moves:
            if space.left is not None:
                self._outward.wait_event(space.left)
            self._enter(space, self._outward)
            with self._streams.stream(self._outward):
                for there, here in moves:
                    there.copy_(here, non_blocking=True)
                space.left = self._outward.record_event()
        return space.left

    def _enter(self, space: Space, stream: Any) -> None:
        """Have the allocator keep the memory, should it be freed, until a stream is done with it."""
        if self._device.type != "cpu" and stream not in space.streams:
            space.memory.record_stream(stream)
            space.streams.add(stream)

    def _current(self) -> Any:
        return self._streams.current_stream(self._device)
