"""How many ranks lie along each axis of the mesh, and what that means for the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from launch.errors import UsageError
from launch.world import World


@dataclass(frozen=True)
class Grid:
    """The mesh of a run. Neighbouring ranks differ along the last axis."""

    axes: tuple[str, ...]  # of "replica", "shard" and "tensor"
    sizes: tuple[int, ...]

    @staticmethod
    def of(parallel: str, axes: tuple[str, ...], world: World, given: Mapping[str, int | None]) -> "Grid":
        """One axis takes all ranks. Of two, the last takes as many as `given` for it, the first as many as go round.

        UsageError for a size that does not go round, or that was given for an axis where there is no choice.
        """
        for axis, size in given.items():
            if size is not None and axis not in axes[1:]:
                raise UsageError(f"--{axis}-size {size} is not for --parallel {parallel}; use it with {CHOICE[axis]}")
        if len(axes) < 2:
            return Grid(axes, (world.size,) * len(axes))
        axis = axes[-1]
        inner = given[axis] or _usual(axis, world)
        if world.size % inner:
            fits = [str(n) for n in range(1, world.size + 1) if world.size % n == 0]
            raise UsageError(
                f"--{axis}-size {inner} does not divide the {world.size} rank(s) of --parallel {parallel}; "
                f"use {', '.join(fits)}"
            )
        return Grid(axes, (world.size // inner, inner))

    def __str__(self) -> str:
        ranks = f"{math.prod(self.sizes)} rank(s)"
        return ranks if len(self.axes) < 2 else f"{ranks} ({' x '.join(map(str, self.sizes))}: {' x '.join(self.axes)})"

    @property
    def tensor(self) -> int:
        """The ranks that compute one sequence together, each with its part of the heads."""
        return self.sizes[-1] if self.axes[-1:] == ("tensor",) else 1

    @property
    def readers(self) -> int:
        """Into how many shares a batch is divided: the ranks that compute together read the same share."""
        return math.prod(self.sizes) // self.tensor

    def reader(self, rank: int) -> int:
        """Which of these shares is for `rank`."""
        return rank // self.tensor


CHOICE = {"shard": "hsdp or fsdp1-hybrid", "tensor": "fsdp2-tp"}


def _usual(axis: str, world: World) -> int:
    """Tensor parallelism in pairs; shards within a machine or, where there is only one, within half of it."""
    if axis == "tensor":
        return 2
    return world.local_size if world.local_size < world.size else max(1, world.size // 2)
