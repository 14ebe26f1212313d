"""A slot: one parameter with its layout, its state, and flat views of what this rank holds of them."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from oput_dist.backends import compute_dtype
from oput_dist.layout import Box, Layout, LayoutError, dense_strides, flat, same_order, whole_or_local

from .recipe import Recipe, vector_shape
from .writing import COMPENSATION

__all__ = ["Slot", "vectors_of"]


class Slot:
    """One layout of one parameter. Views are cached; :meth:`stale` tells when the parameter moved from under them.

    A flat parameter of FSDP1 has several slots, one for each original parameter. They share its state and its counter.

    Args:
        parameter: the parameter.
        name: what to call it in messages.
        layout: where its elements live.
        group: number of the parameter group.
        index: number of the slot.
        counter: number of the parameter.
        shared: whether other slots share the parameter.
    """

    def __init__(
        self, parameter: torch.Tensor, name: str, layout: Layout, group: int, index: int, counter: int, shared: bool
    ) -> None:
        self.parameter, self.name, self.layout, self.group, self.index = parameter, name, layout, group, index
        self.counter, self.shared = counter, shared
        self.settled: torch.Tensor | None = None
        """The gradient of this step in place of the parameter's own, where that is a partial sum."""
        self.called: str | None = layout.name
        """The qualified name, where it is known."""
        self.layer: type[nn.Module] | None = None
        """The class of the parameter's module, where it is known."""
        self.facts: dict[Any, Any] = {}
        """What follows from the layout alone, kept by those who worked it out."""
        bare = parameter.detach()
        memory = whole_or_local(bare)
        self._address, self._shape, self._memory_strides = memory.data_ptr(), memory.shape, memory.stride()
        piece = layout.piece(bare)
        self.numel = piece.numel()
        self.dtype, self.device = piece.dtype, piece.device
        self.piece = piece
        self.strides = dense_strides(piece)
        self.in_place = same_order(piece, self.strides)
        self._flat = flat(piece, self.strides) if self.in_place else None
        self._names: tuple[str, ...] = ()
        self._known: list[tuple[str, torch.Tensor, int]] = []  # name, value and address of each
        self._views: tuple[torch.Tensor, ...] = ()

    def stale(self) -> bool:
        """Whether the parameter's memory, shape, dtype or device changed since the slot was made."""
        memory = whole_or_local(self.parameter)
        return (
            memory.data_ptr() != self._address
            or memory.dtype != self.dtype
            or memory.shape != self._shape
            or memory.stride() != self._memory_strides
        )

    def flat_parameter(self) -> torch.Tensor:
        """This rank's piece, 1-d. For a piece that is not dense, a copy: see :meth:`store`."""
        return self._flat if self._flat is not None else flat(self.piece, self.strides)

    @property
    def boxes(self) -> tuple[Box, ...]:
        """This rank's piece as boxes of the whole parameter."""
        return self.layout.boxes

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The boxes of a flat tensor in the parameter's order."""
        at = flat.storage_offset()
        return [flat.as_strided(box.shape, box.strides, at + box.start) for box in self.boxes]

    def key(self, name: str) -> str:
        """The key of state that is not parameter-shaped: the name, and of which original if there are several."""
        return f"{name}.{self.layout.name}" if self.shared else name

    def vector(
        self, state: MutableMapping[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """The local memory of state that is not parameter-shaped; zeros of a dtype are made if it is missing."""
        key = self.key(name)
        if state.get(key) is None:
            state[key] = self.layout.vector(shape, dtype)
        memory = self.layout.memory_of_vector(state[key])
        if memory.shape != shape:
            raise ValueError(
                f"state {key!r} of {self.name} has shape {tuple(memory.shape)}, but it must be {tuple(shape)}"
            )
        if memory.device != self.device:  # the parameter was moved after it was made
            state[key] = self.layout.adopt_vector(state[key], shape)
            memory = self.layout.memory_of_vector(state[key])
        return memory

    def store(self, values: torch.Tensor) -> None:
        """Write a copy that :meth:`flat_parameter` made back to a piece that is not dense."""
        self.piece.copy_(values.as_strided(self.piece.shape, self.strides))

    def flat_gradient(self) -> torch.Tensor | None:
        """The gradient of this rank's piece, 1-d in the parameter's order; None if there is none.

        Raises:
            TypeError: for a sparse or complex gradient.
            ValueError: for one of another shape or layout.
        """
        gradient = self.parameter.grad if self.settled is None else self.settled
        if gradient is None:
            return None
        if gradient.layout is not torch.strided or gradient.is_complex():
            kind = "complex" if gradient.is_complex() else "sparse"
            raise TypeError(
                f"{self.name} has a {kind} gradient, which no optimizer here takes: "
                + ("optimize torch.view_as_real of it" if kind == "complex" else "build the layer with sparse=False")
            )
        if isinstance(gradient, DTensor) != isinstance(self.parameter, DTensor):
            raise ValueError(
                f"{self.name} is a {type(self.parameter).__name__} but its gradient is a {type(gradient).__name__}: "
                "both must be laid out alike"
            )
        if (fault := self.layout.fault_of(gradient)) is not None:
            raise ValueError(f"{self.name} has a gradient {fault}")
        piece = self.layout.piece(gradient)
        if piece.shape != self.piece.shape:
            raise ValueError(
                f"{self.name} has a gradient of shape {tuple(gradient.shape)}, "
                f"but the parameter is {tuple(self.parameter.shape)}"
            )
        return flat(piece, self.strides)

    def flat_state(
        self, state: MutableMapping[str, Any], names: tuple[str, ...], dtype: torch.dtype | None
    ) -> tuple[torch.Tensor, ...]:
        """This rank's pieces of the state, 1-d; zeros are made for what is missing, in ``dtype`` or the parameter's.

        What rounding lost is always in the parameter's dtype.
        """
        if names != self._names or not self._kept(state):
            self._views = tuple(self._flat_state(state, name, dtype) for name in names)
            self._names = names
            self._known = [(n, state[n], flat.data_ptr()) for n, flat in zip(names, self._views, strict=True)]
        return self._views

    def _kept(self, state: MutableMapping[str, Any]) -> bool:
        """Whether all state is where it was at the last step."""
        for name, value, address in self._known:  # a loop, for it runs for every parameter at every step
            if state.get(name) is not value or self.layout.piece_of_state(value).data_ptr() != address:
                return False
        return True

    def lost(self, state: MutableMapping[str, Any]) -> torch.Tensor | None:
        """What rounding this rank's piece of the parameter lost, 1-d, where that is kept."""
        return None if state.get(COMPENSATION) is None else self._flat_state(state, COMPENSATION, None)

    def _flat_state(self, state: MutableMapping[str, Any], name: str, dtype: torch.dtype | None) -> torch.Tensor:
        if state.get(name) is None:
            state[name] = self.layout.zeros(self.dtype if name == COMPENSATION or dtype is None else dtype)
        if not self._fits(state[name]):  # it was made before the parameter was moved, or sharded otherwise
            try:
                state[name] = self.layout.adopt(state[name])
            except LayoutError as error:
                raise ValueError(
                    f"{error} ({name!r} of {self.name}): if the parameter was sharded after this optimizer was made, "
                    "make the optimizer anew"
                ) from None
        return flat(self.layout.piece_of_state(state[name]), self.strides)

    def _fits(self, value: torch.Tensor) -> bool:
        """Whether state lies as the piece does, so that it can be updated in place."""
        memory = self.layout.piece_of_state(value)
        return memory.device == self.device and memory.shape == self.piece.shape and same_order(memory, self.strides)


def vectors_of(slot: Slot, recipe: Recipe, state: MutableMapping[str, Any]) -> list[torch.Tensor]:
    """The local memory of a slot's state that is not parameter-shaped; zeros are made for what is missing."""
    return [
        slot.vector(state, name, vector_shape(slot.layout.shape, axes), compute_dtype(slot.dtype))
        for name, axes in recipe.vectors
    ]
