"""The module behind an optimizer's parameters: their names, and what wrappers made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from oput_dist.layout import (
    Flat,
    LayoutError,
    clean_name,
    flattened_in,
    replaced_by_fsdp2,
    replicated_by_ddp,
    reshard_fsdp1,
)

from .slot import Slot

__all__ = ["Model", "check_not_replaced"]


class Model:
    """What an optimizer knows of a module. It can be copied and pickled with the optimizer; the module is not.

    Args:
        module: the module.
        shares: whether work on a parameter is shared over its replicas.

    Attributes:
        flattened: what the parameters stand for that FSDP1 made.
        replicated: the ranks that hold parameters of which DDP averages the gradients, where work is shared.
    """

    def __init__(self, module: nn.Module | None, shares: bool = False) -> None:
        self._module, self._shares = module, shares
        self.flattened: Mapping[torch.Tensor, Flat] = {}
        self.replicated: Mapping[torch.Tensor, dist.ProcessGroup] = {}
        self._homes: dict[int, tuple[nn.Module, str]] = {}
        self._names: dict[int, str] = {}
        self._layers: dict[str, int] = {}
        self._classes: dict[str, type[nn.Module]] = {}
        self.refresh()

    @property
    def module(self) -> nn.Module | None:
        """The module; None in a copy that was made without it."""
        return self._module

    def refresh(self) -> None:
        """Look at the module again: it may have been wrapped since."""
        if self._module is None:
            return
        self.flattened = flattened_in(self._module)
        self.replicated = replicated_by_ddp(self._module) if self._shares else {}
        for prefix, child in self._module.named_modules():
            layer = clean_name(f"{prefix}.").removesuffix(".")
            self._layers.setdefault(layer, len(self._layers))
            self._classes[layer] = type(child)  # what is wrapped comes after what wraps it
            for leaf, parameter in child.named_parameters(recurse=False):
                self._homes.setdefault(id(parameter), (child, leaf))
                self._names[id(parameter)] = clean_name(f"{prefix}.{leaf}" if prefix else leaf)

    def reshard(self) -> None:
        """Have FSDP1 gather its parameters anew at the next forward pass."""
        if self._module is not None:
            reshard_fsdp1(self._module)

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """The qualified name of a parameter of the module; None for others."""
        return self._names.get(id(parameter))

    def layer_of(self, name: str) -> int:
        """Where the layer of a parameter comes in the module, by its qualified name; 0 if that is not known."""
        return self._layers.get(name.rpartition(".")[0], 0)

    def class_of(self, name: str) -> type[nn.Module] | None:
        """The class of the module of a parameter, by its qualified name."""
        return self._classes.get(name.rpartition(".")[0])

    def lost(self, parameter: torch.Tensor) -> bool:
        """Whether the module held a parameter before and has another one in its place now."""
        if self._module is None or id(parameter) not in self._homes:
            return False
        child, leaf = self._homes[id(parameter)]
        if child._parameters.get(leaf) is parameter:
            return False
        return all(other is not parameter for other in self._module.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        twin = Model(memo.get(id(self._module)), self._shares)
        twin.flattened = {memo.get(id(p), p): flat for p, flat in self.flattened.items()}
        twin.replicated = {memo.get(id(p), p): group for p, group in self.replicated.items()}
        return twin

    def __reduce__(self) -> Any:
        if self.flattened:
            raise TypeError(
                "an optimizer of FSDP1 (FullyShardedDataParallel) parameters cannot be pickled, since process groups "
                "cannot: save its state_dict()"
            )
        if self.replicated:
            raise TypeError(
                "an optimizer that shares its work over the ranks of DistributedDataParallel cannot be pickled, since "
                "process groups cannot: save its state_dict()"
            )
        return Model, (None,)


def check_not_replaced(owners: Sequence[Slot], model: Model | None) -> None:
    """Raise for a parameter that gets no gradients any more since the module has another one in its place.

    Args:
        owners: a slot of each parameter.
        model: the module, where it is known.

    Raises:
        LayoutError: naming the parameter.
    """
    for slot in owners:
        p = slot.parameter
        if p.grad is None and p.requires_grad and (replaced_by_fsdp2(p) or (model is not None and model.lost(p))):
            raise LayoutError(
                f"{slot.name} was replaced in its module after this optimizer was made, as fully_shard, "
                "parallelize_module, FullyShardedDataParallel and load_state_dict(assign=True) do: make the optimizer "
                "after wrapping the module"
            )
