"""The ``triton`` backend: one grouped launch for each stage of a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oput_dist.kernels.boxed import TILES, boxed, boxed_constexprs
from oput_dist.kernels.grouped import BLOCK, constexprs, grouped, num_warps, segmented_sum
from oput_dist.kernels.stage import Stage

from .batch import Batch, Codes, Stack
from .boxes import BoxedStack, fits, view_of
from .torchlike import Compile, Eager
from .transfer import on, send

__all__ = ["Triton"]

NARROW = 32
"""Columns up to which tiles are narrow."""


@dataclass
class _Grid:
    """The tiles of a batch: static as long as the same tensors are batched."""

    tiles: torch.Tensor
    first_tile: torch.Tensor
    count: int


class Triton:
    """Grouped kernels; on CPU tensors only under ``TRITON_INTERPRET=1``."""

    name = "triton"

    def __init__(self) -> None:
        self._compile, self._eager = Compile(), Eager()

    def run(self, stage: Stage, batch: Batch, sums: torch.Tensor | None) -> torch.Tensor | None:
        """See :class:`Backend`."""
        device = batch.p[0].device
        grid = _grid(batch, device)
        terms = len(stage.sums)
        fixed = constexprs(
            stage,
            batch.prologue,
            batch.scalars.kind,
            0 if sums is None else sums.shape[1],
            batch.scale is not None,
            batch.p[0].dtype,
            batch.g[0].dtype,
            tuple(s.dtype for s in batch.state[0]),
        )
        table = _table(batch, device)
        hyper = batch.scalars.table
        partial = torch.empty(grid.count, terms, dtype=torch.float64, device=device) if terms else hyper
        with on(device):
            grouped[(grid.count,)](
                table,
                hyper,
                grid.tiles,
                hyper if batch.scale is None else batch.scale,
                partial,
                hyper if sums is None else sums.contiguous(),
                **fixed,
                num_warps=num_warps(torch.version.hip is not None),
            )
            if not terms:
                return None
            out = torch.empty(len(batch.p), terms, dtype=torch.float64, device=device)
            segmented_sum[(len(batch.p),)](partial, grid.first_tile, out, N_TERMS=terms, BLOCK=BLOCK)
        return out

    def takes_codes(self, stage: Stage, batch: Batch, state: Sequence[torch.Tensor | Codes]) -> bool:
        """See :class:`Backend`."""
        return False

    def run_stacks(self, stage: Stage, batch: Batch, stacks: Sequence[Stack]) -> list[tuple[torch.Tensor, ...]]:
        """See :class:`Backend`. What the boxed kernel cannot run goes through torch."""
        results: list[tuple[torch.Tensor, ...]] = [()] * len(stacks)
        jobs: dict[Any, list[tuple[int, BoxedStack]]] = {}
        for i, stack in enumerate(stacks):
            view = view_of(stage, stack)
            if fits(view, stage):
                job = BoxedStack(stage, stack, view, TILES[view.columns <= NARROW], batch.p[0].device)
                jobs.setdefault((job.tile, job.modes), []).append((i, job))
            else:
                other = self._compile if batch.p[0].device.type == "cuda" else self._eager
                results[i] = other.run_stacks(stage, batch, [stack])[0]
        for members in jobs.values():
            self._launch(stage, batch, [job for _, job in members])
            for i, job in members:
                results[i] = job.totals()
        return results

    def _launch(self, stage: Stage, batch: Batch, jobs: Sequence[BoxedStack]) -> None:
        """One launch for boxes with the same kind of tile, whose terms leave it alike."""
        device, tile = batch.p[0].device, jobs[0].tile
        which = [i for job in jobs for i in job.stack.which]
        table = [row for job in jobs for row in job.rows()]
        tiles = _box_tiles(batch, tile, jobs, device)
        hyper = batch.scalars.table[send(torch.tensor(which, device="cpu"), device)]
        fixed = boxed_constexprs(
            stage,
            batch.prologue,
            batch.scalars.kind,
            len(jobs[0].stack.factors),
            jobs[0].modes,
            tile,
            batch.scale is not None,
            batch.p[0].dtype,
            batch.g[0].dtype,
            tuple(s.dtype for s in batch.state[0]),
        )
        with on(device):
            boxed[(len(tiles),)](
                send(torch.tensor(table, dtype=torch.int64, device="cpu"), device),
                hyper,
                tiles,
                hyper if batch.scale is None else batch.scale,
                **fixed,
                num_warps=num_warps(torch.version.hip is not None),
            )


def _box_tiles(batch: Batch, tile: tuple[int, int], jobs: Sequence[BoxedStack], device: torch.device) -> torch.Tensor:
    """``[box, batch, tile of rows, tile of columns]`` of all boxes."""
    sizes = [(*job.view.counts(tile), len(job.stack.which)) for job in jobs]
    key = ("box tiles", tile, tuple(sizes))
    if key not in batch.cache:
        parts, first = [], 0
        for batches, rows, columns, boxes in sizes:
            ranges = [torch.arange(n, device="cpu") for n in (boxes, batches, rows, columns)]
            part = torch.cartesian_prod(*ranges)
            part[:, 0] += first
            parts.append(part)
            first += boxes
        batch.cache[key] = send(torch.cat(parts).to(torch.int32), device)
    tiles: torch.Tensor = batch.cache[key]
    return tiles


def _grid(batch: Batch, device: torch.device) -> _Grid:
    """Tiles of all tensors, each with its tensor and its place in it."""
    if "grid" not in batch.cache:
        counts = torch.tensor([-(-p.numel() // BLOCK) for p in batch.p], dtype=torch.int64, device="cpu")
        first = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0)])
        tensor = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
        place = torch.arange(int(first[-1]), device="cpu") - first[tensor]
        tiles = torch.stack([tensor, place], 1).to(torch.int32)
        batch.cache["grid"] = _Grid(send(tiles, device), send(first.to(torch.int32), device), int(first[-1]))
    grid: _Grid = batch.cache["grid"]
    return grid


def _table(batch: Batch, device: torch.device) -> torch.Tensor:
    """The pointer table, sent again only if a pointer changed since the last launch."""
    rows = [
        (p.numel(), p.data_ptr(), g.data_ptr(), *(s.data_ptr() for s in state))
        for p, g, state in zip(batch.p, batch.g, batch.state, strict=True)
    ]
    if batch.cache.get("pointers") != rows:
        batch.cache["pointers"] = rows
        # Kernels use 128-bit accesses where all pointers of a tensor allow it.
        values = [(row[0], int(all(pointer % 16 == 0 for pointer in row[1:])), *row[1:]) for row in rows]
        batch.cache["table"] = send(torch.tensor(values, dtype=torch.int64, device="cpu"), device)
    table: torch.Tensor = batch.cache["table"]
    return table
