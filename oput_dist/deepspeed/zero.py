"""DeepSpeed's own optimizers, which stand around this library's: what they hand out, and how weights get back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from oput_dist.engine.model import Model
from oput_dist.layout.deepspeed import Partition, deepspeed_partitions

__all__ = ["Partitioned", "Zero"]


class Zero:
    """What an engine of DeepSpeed put around an optimizer.

    Args:
        outer: ``engine.optimizer``: DeepSpeed's optimizer of ZeRO or of low precision, or the optimizer itself.
        inner: the optimizer.
    """

    def __init__(self, outer: Any, inner: torch.optim.Optimizer) -> None:
        self._outer = outer
        self._masters = outer is not inner and hasattr(outer, "fp32_groups")
        """Whether the optimizer sees fp32 copies of whole parameters (stage 0 in low precision)."""
        self.partitions: list[Partition] = []
        if outer is not inner and not self._masters:
            self.partitions = deepspeed_partitions(outer)

    @property
    def copies(self) -> dict[int, int]:
        """The ids of parameters by those of their fp32 copies."""
        if not self._masters:
            return {}
        low = [p for group in self._outer.fp16_groups for p in group]
        high = [p for group in self._outer.fp32_groups for p in group]
        return {id(copy): id(p) for p, copy in zip(low, high, strict=True)}

    def publish(self, numbers: Sequence[int]) -> None:
        """Copy some partitions to the weights that the model has, as DeepSpeed does for the one it has just stepped."""
        outer = self._outer
        for number in numbers:
            if hasattr(outer, "fp32_partitioned_groups_flat"):
                outer._reassign_or_swap_out_partitioned_parameters(number)
            elif hasattr(outer, "parallel_partitioned_bit16_groups"):
                rank = torch.distributed.get_rank(outer.real_dp_process_group[number])
                weights = outer.parallel_partitioned_bit16_groups[number][rank]
                weights.data.copy_(outer.single_partition_of_fp32_groups[number].data)

    def publish_all(self) -> None:
        """Make the model's weights what the optimizer's are, on all ranks, outside of a step."""
        outer = self._outer
        if self._masters:
            for low, high in zip(outer.fp16_groups, outer.fp32_groups, strict=True):
                torch._foreach_copy_(low, high)
        elif hasattr(outer, "fp32_partitioned_groups_flat"):
            outer._partition_all_parameters()
            self.publish(range(len(self.partitions)))
            if outer.persistent_parameters:
                outer.persistent_parameters[0].all_gather(outer.persistent_parameters)
        elif self.partitions:
            outer.update_lp_params()

    def keep_hyperparameters(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every group keep its own when a universal checkpoint is loaded: DeepSpeed's stage 3 gives all groups
        those of the first one that was saved."""
        name = "load_hp_checkpoint_state_from_checkpoint_dir_stage3"
        load = getattr(self._outer, name, None)
        if load is None or not self.partitions:
            return

        def loading(*args: Any, **kwargs: Any) -> None:
            before = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            load(*args, **kwargs)
            for group, own in zip(optimizer.param_groups, before, strict=True):
                group.update(own)

        setattr(self._outer, name, loading)

    def link_states(self) -> None:
        """Have DeepSpeed look for the optimizer's state again, which was not there when it first looked."""
        if hasattr(self._outer, "_hp_optimizer_states_linked"):
            self._outer._hp_optimizer_states_linked = False


class Partitioned(Model):
    """A module whose parameters the optimizer sees as DeepSpeed's partitions, or as fp32 copies."""

    def __init__(self, module: nn.Module, zero: Zero) -> None:
        self._zero = zero
        super().__init__(module)

    def refresh(self) -> None:
        super().refresh()
        if self._zero.partitions:
            self.flattened = {part.tensor: part.flat for part in self._zero.partitions}
        for copy, parameter in self._zero.copies.items():
            self._names[copy] = self._names[parameter]

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        raise TypeError("an optimizer inside of a DeepSpeed engine cannot be copied: copy its state_dict()")

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer inside of a DeepSpeed engine cannot be pickled, since process groups cannot: use "
            "engine.save_checkpoint"
        )
