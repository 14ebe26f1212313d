"""DeepSpeed's ZeRO: original parameters as ranges of its flat fp32 partitions, read from its own structures.

DeepSpeed gives an optimizer flat tensors without shapes. What lies where in them is known to the ZeRO optimizer around
it: the order of the parameters, the offset of each, and the process group over which a tensor was cut. DeepSpeed's own
``_hp_mapping`` is not used: under ``round_robin_gradients`` it is wrong for most parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .base import LayoutError
from .fsdp1 import Flat, Original

__all__ = ["Partition", "deepspeed_partitions"]

_STAGE_3 = ("fp32_partitioned_groups_flat", "fp16_groups", "sub_group_to_group_id", "sub_group_process_groups")
_STAGES_1_AND_2 = (
    "single_partition_of_fp32_groups",
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "real_dp_process_group",
)
_BF16 = ("fp32_groups_flat_partition", "bf16_groups", "real_dp_process_group")


@dataclass(frozen=True)
class Partition:
    """A flat tensor that DeepSpeed hands to the optimizer."""

    tensor: torch.Tensor
    group: int
    """Number of the parameter group that it stands for, or a part of which (a sub-group of stage 3)."""
    flat: Flat
    """The originals in it: the same on all ranks, in the same order."""


def deepspeed_partitions(zero: Any) -> list[Partition]:
    """The partitions of a ZeRO optimizer of DeepSpeed, in the order in which it steps them.

    Args:
        zero: DeepSpeed's optimizer of stage 1, 2 or 3, or its BF16 optimizer.

    Raises:
        LayoutError: for one that keeps other structures, as another version's might.
    """
    kind, read = {
        "fp32_partitioned_groups_flat": (_STAGE_3, _stage_3),
        "single_partition_of_fp32_groups": (_STAGES_1_AND_2, _stages_1_and_2),
        "fp32_groups_flat_partition": (_BF16, _bf16),
    }.get(next((name for name, *_ in (_STAGE_3, _STAGES_1_AND_2, _BF16) if hasattr(zero, name)), ""), ((), None))
    missing = [name for name in (*kind, "param_names") if not hasattr(zero, name)]
    if read is None or missing:
        raise LayoutError(
            f"{type(zero).__name__} of this version of DeepSpeed has no "
            f"{missing[0] if read else 'flat fp32 partitions'}, so which parameters lie where in its partitions is not "
            "known: install deepspeed>=0.19.8,<0.20"
        )
    return list(read(zero))


def _stages_1_and_2(zero: Any) -> Iterator[Partition]:
    groups = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
    for number, (parameters, offsets) in enumerate(groups):
        tensor, group = zero.single_partition_of_fp32_groups[number], zero.real_dp_process_group[number]
        yield Partition(tensor, number, _cut(zero, parameters, offsets, tensor.numel(), group))


def _bf16(zero: Any) -> Iterator[Partition]:
    for number, parameters in enumerate(zero.bf16_groups):
        tensor, group = zero.fp32_groups_flat_partition[number], zero.real_dp_process_group[number]
        offsets, at = [], 0
        for parameter in parameters:
            offsets.append(at)
            at += parameter.numel()
        yield Partition(tensor, number, _cut(zero, parameters, offsets, tensor.numel(), group))


def _cut(
    zero: Any, parameters: Sequence[torch.Tensor], offsets: Sequence[int], size: int, group: dist.ProcessGroup
) -> Flat:
    """This rank's ``size`` elements of parameters that lie one after the other, at offsets, in one flat tensor."""
    begin = dist.get_rank(group) * size
    originals = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        first, last = max(offset, begin), min(offset + parameter.numel(), begin + size)
        here = (first - offset, last - first, first - begin) if first < last else (0, 0, 0)
        originals.append(_original(zero, parameter, parameter.shape, *here, group))
    return Flat(tuple(originals), size, False)


def _stage_3(zero: Any) -> Iterator[Partition]:
    """Every parameter is cut by itself: as many elements for each rank, the last one's padded."""
    for number, parameters in enumerate(zero.fp16_groups):
        tensor, group = zero.fp32_partitioned_groups_flat[number], zero.sub_group_process_groups[number]
        originals, at = [], 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = min(dist.get_rank(group) * share, parameter.ds_numel)
            numel = min(share, parameter.ds_numel - start)
            originals.append(_original(zero, parameter, parameter.ds_shape, start, numel, at, group))
            at += share
        yield Partition(tensor, zero.sub_group_to_group_id[number], Flat(tuple(originals), at, False))


def _original(
    zero: Any,
    parameter: torch.Tensor,
    shape: torch.Size,
    start: int,
    numel: int,
    offset: int,
    group: dist.ProcessGroup,
) -> Original:
    return Original(
        name=zero.param_names[parameter],
        shape=torch.Size(shape),
        order=tuple(range(len(shape))),
        start=start,
        numel=numel,
        offset=offset,
        groups=(group,) if dist.get_world_size(group) > 1 else (),
    )
