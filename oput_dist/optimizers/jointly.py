"""The base of optimizers of the whole model, which keep running scalars in their parameter groups."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from oput_dist.engine import Group, Optimizer

__all__: list[str] = []


class Jointly(Optimizer):
    """An optimizer whose parameter groups all keep the same running scalars: 0-d tensors, float64.

    Attributes:
        shared: options from which they follow. All groups must have the same; a group that names none has the first's.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def running(self, group: Group) -> dict[str, float]:
        """The running scalars before the first step. The names are those of ``Recipe.kept``."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters and parameters are checked first."""
        if isinstance(param_group, dict) and self.param_groups:
            self.validate({**self.defaults, **param_group})
            first = self.param_groups[0]
            for name in self.shared:
                if param_group.setdefault(name, first[name]) != first[name]:
                    raise ValueError(
                        f"{type(self).__name__}: {name}={param_group[name]!r} is not allowed: must be "
                        f"{first[name]!r} as in the first group, since all groups share what follows from it"
                    )
        super().add_param_group(param_group)

    def complete(self, group: dict[str, Any]) -> None:
        """Give a new group its running scalars: those that the others have by now."""
        super().complete(group)
        first = self.param_groups[0]
        for name, value in self.running(group).items():
            group.setdefault(name, torch.tensor(value, dtype=torch.float64) if group is first else first[name].clone())
