"""A slot: one parameter with its layout, its state, and flat views of what this rank holds of them."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from oput_dist.backends import compute_dtype
from oput_dist.kernels.stage import Axes
from oput_dist.layout import Box, Layout, dense_strides, flat, same_order, whole_or_local

from .recipe import vector_shape

__all__ = ["Slot"]


class Slot:
    """One parameter of the plan. Views are cached; :meth:`stale` tells when the parameter has moved from under them."""

    def __init__(self, parameter: torch.Tensor, name: str, layout: Layout, group: int, index: int) -> None:
        self.parameter, self.name, self.layout, self.group, self.index = parameter, name, layout, group, index
        memory = whole_or_local(parameter.detach())
        self._address, self._shape, self._memory_strides = memory.data_ptr(), memory.shape, memory.stride()
        piece = layout.piece(parameter.detach())
        self.numel = piece.numel()
        self.dtype, self.device = piece.dtype, piece.device
        self.piece = piece
        self.strides = dense_strides(piece)
        self.in_place = same_order(piece, self.strides)
        self._flat = flat(piece, self.strides) if self.in_place else None
        self._names: tuple[str, ...] = ()
        self._values: list[torch.Tensor] = []
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
        if len(self.boxes) == 1 and self.boxes[0].shape == self.piece.shape:
            return [flat.as_strided(self.piece.shape, self.strides, flat.storage_offset())]
        return [flat[box.start : box.start + torch.Size(box.shape).numel()].view(box.shape) for box in self.boxes]

    def vector(self, state: MutableMapping[str, Any], name: str, axes: Axes) -> torch.Tensor:
        """The memory of state that keeps some axes of the parameter only; zeros are made if it is missing.

        Never of fewer bits than fp32, since it is small and much depends on it.
        """
        shape = vector_shape(self.layout.shape, axes)
        if state.get(name) is None:
            state[name] = self.layout.vector(shape, compute_dtype(self.dtype))
        memory = self.layout.vector_memory(state[name])
        if tuple(memory.shape) != shape:
            raise ValueError(f"state {name!r} of {self.name} has shape {tuple(memory.shape)}, but it must be {shape}")
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
        gradient = self.parameter.grad
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
        """This rank's pieces of the state, 1-d; zeros are made for what is missing, in ``dtype`` or the parameter's."""
        if names == self._names and all(
            state.get(n) is v and whole_or_local(v).data_ptr() == flat.data_ptr()
            for n, v, flat in zip(names, self._values, self._views, strict=True)
        ):
            return self._views
        self._views = tuple(self._flat_state(state, name, dtype) for name in names)
        self._names, self._values = names, [state[name] for name in names]
        return self._views

    def _flat_state(self, state: MutableMapping[str, Any], name: str, dtype: torch.dtype | None) -> torch.Tensor:
        if state.get(name) is None:
            state[name] = self.layout.zeros(dtype or self.dtype)
        memory = whole_or_local(state[name])
        if memory.numel() != self.numel:
            raise ValueError(
                f"state {name!r} of {self.name} holds {memory.numel()} elements on this rank, "
                f"but its piece of the parameter holds {self.numel}"
            )
        if not same_order(memory, self.strides):  # it is updated in place, so it must lie as the parameter does
            state[name] = self.layout.adopt(state[name])
            memory = whole_or_local(state[name])
        return flat(memory, self.strides)
