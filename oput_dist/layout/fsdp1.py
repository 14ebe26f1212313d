"""FSDP1 (``FullyShardedDataParallel``): original parameters as ranges of flat ones, recovered from the module."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from .base import Layout, LayoutError
from .box import Box, boxes_of_range, in_order
from .dtensor import whole_tensor
from .plain import Plain

__all__ = [
    "Flat",
    "Fragment",
    "Original",
    "clean_name",
    "data_groups_of_fsdp1",
    "flattened_in",
    "fsdp1_layouts",
    "reshard_fsdp1",
    "unreduced_by_fsdp1",
]

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def clean_name(name: str) -> str:
    """A parameter's qualified name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@dataclass(frozen=True)
class Original:
    """One original parameter of a flat one."""

    name: str
    """Qualified, in the module that was searched."""
    shape: torch.Size
    order: tuple[int, ...]
    """Its dimensions from the outermost in memory to the innermost: flattened in this order."""
    start: int
    """Where this rank's range of it begins, in elements of the original."""
    numel: int
    """Elements of the range; 0 if other ranks hold all of it."""
    offset: int
    """Where the range begins in this rank's flat parameter."""
    groups: tuple[dist.ProcessGroup, ...]
    """The group of ranks that hold the other ranges; replicas are not in it."""
    replica_groups: tuple[dist.ProcessGroup, ...] = ()
    """Those of the replicas."""

    @functools.cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The range as boxes of the original."""
        shape = [self.shape[dim] for dim in self.order]
        return in_order(boxes_of_range(shape, self.start, self.start + self.numel), self.order)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's range of a tensor of the original shape, 1-d."""
        return whole.permute(self.order).reshape(-1)[self.start : self.start + self.numel]


@dataclass(frozen=True)
class Flat:
    """What one tensor that FSDP1 hands out stands for."""

    originals: tuple[Original, ...]
    size: int
    """Elements of the tensor on this rank, padding included."""
    whole: bool
    """Whether the tensor is one whole original in its own shape (NO_SHARD)."""


def flattened_in(module: nn.Module) -> dict[torch.Tensor, Flat]:
    """What each parameter that FSDP1 made in a module stands for; empty for a module without FSDP1.

    Raises:
        LayoutError: for FSDP1 around tensor-parallel parameters, whose local pieces it flattens.
    """
    found: dict[torch.Tensor, Flat] = {}
    names = {id(child): name for name, child in module.named_modules()}
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is None:  # nothing left to manage: all parameters ignored or in inner units
            continue
        flat: Any = handle.flat_param
        prefix = names[id(handle._fully_sharded_module)]
        among = getattr(unit, "_inter_node_pg", None)
        originals = tuple(_originals(handle, prefix, () if among is None else (among,)))
        sharded = handle.uses_sharded_strategy
        if flat._params is None:
            found[flat] = Flat(originals, flat._sharded_size.numel(), False)
        else:
            for parameter, original in zip(flat._params, originals, strict=True):
                found[parameter] = Flat((original,), original.numel, not sharded)
    return found


def _originals(handle: Any, prefix: str, among: tuple[dist.ProcessGroup, ...]) -> Iterator[Original]:
    """The originals of a flat parameter; ``among`` has the group over which replicas are averaged."""
    flat = handle.flat_param
    if any(extension is not None for extension in flat._param_extensions):
        raise LayoutError(
            f"{clean_name(flat._fqns[0])} is tensor-parallel inside FullyShardedDataParallel, which flattens its local "
            "piece: use torch.distributed.fsdp.fully_shard (FSDP2) with tensor parallelism"
        )
    own = (handle.process_group,) if handle.world_size > 1 else ()
    groups, replicas = (own, among) if handle.uses_sharded_strategy else ((), (*own, *among))
    replicas = tuple(group for group in replicas if dist.get_world_size(group) > 1)
    columns = (flat._fqns, flat._shapes, flat._strides, flat._contiguities, flat._shard_param_infos)
    for name, shape, strides, contiguous, info in zip(*columns, strict=True):
        order = range(len(shape)) if contiguous else sorted(range(len(shape)), key=lambda dim: -strides[dim])
        yield Original(
            name=clean_name(f"{prefix}.{name}" if prefix else name),
            shape=torch.Size(shape),
            order=tuple(order),
            start=info.intra_param_start_idx if info.in_shard else 0,
            numel=info.numel_in_shard if info.in_shard else 0,
            offset=info.offset_in_shard if info.in_shard else 0,
            groups=groups,
            replica_groups=replicas,
        )


def fsdp1_layouts(parameter: torch.Tensor, flat: Flat) -> list[Layout]:
    """The layouts of a parameter that :func:`flattened_in` found: one for each original parameter.

    Raises:
        LayoutError: while FSDP1 holds the whole parameter, as between forward and backward.
    """
    if flat.whole:
        whole = Plain(parameter, flat.originals[0].name)
        whole.replica_groups = flat.originals[0].replica_groups
        return [whole]
    if tuple(parameter.shape) != (flat.size,):
        raise LayoutError(
            f"FSDP1 holds it with shape {tuple(parameter.shape)} now and not as this rank's {flat.size} elements: "
            "step after backward, and outside of summon_full_params"
        )
    return [Fragment(parameter, original, flat.size) for original in flat.originals]


class Fragment(Layout):
    """This rank's range of an original parameter, inside a 1-d tensor that may hold ranges of others too.

    With ``use_orig_params=True`` the tensor is the range itself; otherwise it is the flat parameter, and so is state.
    """

    def __init__(self, parameter: torch.Tensor, original: Original, size: int) -> None:
        self.name, self.shape, self.groups = original.name, original.shape, original.groups
        self.replica_groups = original.replica_groups
        self.device = parameter.device
        self._original, self._size = original, size
        self._alone = size == original.numel
        self._range = slice(0, size) if self._alone else slice(original.offset, original.offset + original.numel)

    @property
    def boxes(self) -> tuple[Box, ...]:
        return self._original.boxes

    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self._range]

    def piece_of_state(self, value: torch.Tensor) -> torch.Tensor:
        return value if self._alone or tuple(value.shape) != (self._size,) else value[self._range]

    def zeros(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        return torch.zeros(self._size, dtype=dtype, device=device or self.device)

    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, DTensor):
            value = whole_tensor(value)
        if tuple(value.shape) == (self._size,):
            return self.zeros(value.dtype).copy_(value)
        if not self._alone or value.shape != self.shape:
            raise LayoutError(
                f"state of shape {tuple(value.shape)} for a parameter of shape {tuple(self.shape)}, of which FSDP1 "
                f"keeps a flat tensor of {self._size} elements on this rank"
            )
        return self.zeros(value.dtype).copy_(self._original.cut(value))

    def put(self, state: torch.Tensor, whole: torch.Tensor) -> None:
        """Write this rank's range of a tensor of the original shape into state that :meth:`zeros` made.

        Raises:
            LayoutError: for another shape.
        """
        if whole.shape != self.shape:
            raise LayoutError(f"state of shape {tuple(whole.shape)} for a parameter of shape {tuple(self.shape)}")
        self.piece_of_state(state).copy_(self._original.cut(whole))


def data_groups_of_fsdp1(module: nn.Module) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which FSDP1 averages gradients in a module; none if there is no FSDP1 in it."""
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        return tuple(g for g in (getattr(unit, "_inter_node_pg", None), unit.process_group) if g is not None)
    return ()


def unreduced_by_fsdp1(module: nn.Module) -> bool:
    """Whether a module is inside of FSDP1's ``no_sync()``."""
    return any(not unit._sync_gradients for unit in FullyShardedDataParallel.fsdp_modules(module))


def reshard_fsdp1(module: nn.Module) -> None:
    """Free the gathered parameters that a forward pass without a backward pass left, so that the next gathers anew."""
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
            handle.reshard(True)
            handle.post_reshard()  # type: ignore[no-untyped-call]
