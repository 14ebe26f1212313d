"""``oput.memory``: the bytes that an optimizer and its parameters occupy on this rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oput_dist.layout import whole_or_local

from .hosted import Hosted
from .wrapper import Wrapper

__all__ = ["Memory", "memory"]


@dataclass(frozen=True)
class Memory:
    """Bytes that are allocated on this rank. Memory that several tensors share counts once, where it comes first."""

    parameters: int
    gradients: int
    state: int
    """Of parameters, and tensors in the parameter groups."""
    scratch: int
    """That is kept from step to step to work in, and small tables."""
    host: int = 0
    """Of state in host memory (``state_device="cpu"``), which is in none of the others."""

    @property
    def total(self) -> int:
        """All of them but :attr:`host`."""
        return self.parameters + self.gradients + self.state + self.scratch

    def __str__(self) -> str:
        rows = [(name, value) for name, value in vars(self).items() if name != "host"]
        rows += [("total", self.total), *([("on host", self.host)] if self.host else [])]
        return "\n".join(f"{name:<10}  {value:>18,} B  {value / 2**20:>12,.2f} MiB" for name, value in rows)


def memory(optimizer: torch.optim.Optimizer) -> Memory:
    """The bytes that an optimizer and its parameters occupy on this rank, as they are now.

    Whole allocations count, padding and all, of which a tensor may be a part: what an allocator reports. Gradients are
    there between backward and ``zero_grad``; state and scratch from the first step on. What a step allocates and frees
    again is not among it.

    Args:
        optimizer: any of this library's, of torch's (which keep no scratch), or a wrapper.

    Returns:
        bytes of parameters, gradients, state and scratch, and apart from them of state in host memory; ``print`` shows
        them as a table.

    Example::

        print(oput.memory(optimizer))
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    settings = [value for group in optimizer.param_groups for key, value in group.items() if key != "params"]
    state = [*optimizer.state.values(), settings]
    seen: set[tuple[torch.device, int]] = set()
    hosted = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Hosted)]
    host = _bytes(_tensors(hosted, {}), seen)
    each = {"parameters": parameters, "gradients": gradients, "state": state, "scratch": list(_working(optimizer))}
    return Memory(**{name: _bytes(_tensors(part, {}), seen) for name, part in each.items()}, host=host)


def _working(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """What an optimizer keeps beside its state, and those that it wraps."""
    yield {key: value for key, value in vars(optimizer).items() if key not in ("param_groups", "state", "defaults")}
    if isinstance(optimizer, Wrapper):
        yield from _working(optimizer.inner)


def _tensors(value: Any, visited: dict[int, Any]) -> Iterator[torch.Tensor]:
    """The tensors in a structure of containers and of this library's objects."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in visited:
        return
    visited[id(value)] = value  # which keeps it, so that no other gets its id
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (str, bytes)):
        parts = value
    elif type(value).__module__.partition(".")[0] == "oput_dist" and not isinstance(value, type):
        slots = [getattr(value, name, None) for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        parts = [*getattr(value, "__dict__", {}).values(), *slots]
    for part in parts:
        yield from _tensors(part, visited)


def _bytes(tensors: Iterable[torch.Tensor], seen: set[tuple[torch.device, int]]) -> int:
    total = 0
    for tensor in tensors:
        local = whole_or_local(tensor)
        storage = local.untyped_storage()
        key = (local.device, storage.data_ptr())
        if local.device.type != "meta" and key not in seen:
            seen.add(key)
            total += storage.nbytes()
    return total
