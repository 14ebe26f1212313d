"""Boxes and index maps: what a layout says about a piece, held against the elements that the piece really has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from oput_dist.layout import Layout, LayoutError, boxes_of_range, dense_strides, flat, flattened_in, layouts_of
from oput_dist.layout.dtensor import _Cut, _unambiguous
from tests.meshes import world_mesh
from tests.pool import Pool


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@settings(max_examples=300, deadline=None)
@given(ranges())
def test_boxes_of_a_range_are_the_range(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    whole = np.arange(prod(shape)).reshape(shape)
    boxes = boxes_of_range(shape, start, stop)
    parts = [whole[tuple(slice(i.start, i.stop) for i in box.index)] for box in boxes]
    assert [part.shape for part in parts] == [box.shape for box in boxes]
    assert np.concatenate([part.ravel() for part in parts] + [np.empty(0)]).tolist() == list(range(start, stop))
    begins = np.cumsum([0] + [part.size for part in parts])
    assert [box.start for box in boxes] == begins[:-1].tolist()
    assert len(boxes) <= max(2 * len(shape) - 1, 1)
    for box, part in zip(boxes, parts, strict=True):
        assert np.array_equal(torch.arange(start, stop).as_strided(box.shape, box.strides, box.start).numpy(), part)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
def test_a_range_outside_of_the_tensor(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"range .* of shape \(2, 3\) with 6 elements"):
        boxes_of_range((2, 3), start, stop)


def faults_of(layout: Layout, parameter: Tensor, label: str) -> list[str]:
    """What is wrong with the boxes of a parameter whose elements are their own global row-major numbers."""
    numbers = torch.arange(layout.shape.numel()).view(layout.shape)
    piece = layout.piece(parameter.detach())
    found = []
    if sum(prod(box.shape) for box in layout.boxes) != piece.numel():
        found.append(f"{label}: boxes {layout.boxes} for a piece of {piece.numel()} elements")
    memory = flat(piece, dense_strides(piece))  # as slots take it
    for box in layout.boxes:
        wanted = numbers[box.index]
        got = memory.as_strided(box.shape, box.strides, memory.storage_offset() + box.start)
        if tuple(wanted.shape) != box.shape or not torch.equal(wanted.float(), got.float()):
            found.append(f"{label}: box {box} holds {got.tolist()} instead of {wanted.tolist()}")
    return found


def numbered(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.arange(float(prod(shape))).view(shape))


SHAPES = [(), (1,), (7,), (8, 3), (5, 4), (2, 9), (3, 4, 5), (1, 6)]


def placements_of(mesh_dims: int, ndim: int) -> Iterator[list[Placement]]:
    choices: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(ndim))]
    if mesh_dims == 1:
        yield from ([choice] for choice in choices)
    else:
        yield from ([a, b] for a in choices for b in choices)


def distributed_faults() -> list[str]:
    n = dist.get_world_size()
    meshes = [world_mesh((n,))] + ([world_mesh((2, 2))] if n == 4 else [])
    found, count = [], 0
    for mesh in meshes:
        for shape in SHAPES:
            for placements in placements_of(mesh.ndim, len(shape)):
                p = nn.Parameter(distribute_tensor(numbered(shape).detach(), mesh, placements, src_data_rank=None))
                (layout,) = layouts_of(p)
                found += faults_of(layout, p, f"{shape} {placements}")
                count += 1
    assert count > 20
    turned = [nn.Parameter(numbered(shape).detach().mT.contiguous().mT) for shape in SHAPES if len(shape) > 1]
    for p in [numbered(shape) for shape in SHAPES] + turned:
        for group in (None, dist.group.WORLD):
            (layout,) = layouts_of(p, group)
            found += faults_of(layout, p, f"{tuple(p.shape)} {group} {p.stride()}")
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
def test_boxes_of_dtensors_plain_and_zero1(pool: Pool, n: int) -> None:
    assert pool.run(n, distributed_faults) == [[]] * n


class Net(nn.Module):
    """Two layers that tensor parallelism cuts, one that it does not know, and sizes of one's choice."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, 5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(numbered(tuple(p.shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(x))))


PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def strided_faults(width: int, hidden: int) -> tuple[list[str], list[str], str]:
    mesh = world_mesh((2, 2), ("data", "model"))
    net = Net(width, hidden)
    parallelize_module(net, mesh["model"], {name: style() for name, style in PLAN.items()})
    fully_shard(net, mesh=mesh["data"])
    found, refused = [], []
    for name, p in net.named_parameters():
        (layout,) = layouts_of(p)
        try:
            found += faults_of(layout, p, name)
        except LayoutError as error:
            refused.append(f"{name}: {error}")
    strided = [p for p in net.parameters() if any(isinstance(placement, _StridedShard) for placement in p.placements)]
    return found, refused, f"{len(strided)} strided"


@pytest.mark.parametrize(("width", "hidden"), [(8, 12), (6, 7), (5, 3)])
def test_boxes_of_strided_shards(pool: Pool, width: int, hidden: int) -> None:
    for found, refused, count in pool.run(4, strided_faults, width, hidden):
        assert (found, refused, count) == ([], [], "2 strided")


def chunks(values: Tensor, n: int) -> list[list[int]]:
    """n parts, empty ones included."""
    parts = [part.tolist() for part in values.chunk(n)] if len(values) else []
    return [*parts, *([[]] * (n - len(parts)))]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_uneven_strided_shards_are_told_from_even_ones(ranks: int) -> None:
    """Nine rows, cut in two by tensor parallelism and then in four by FSDP2, lie otherwise than torch itself thinks."""
    ambiguous = []
    for size in range(1, 40):
        rows = torch.arange(size)
        as_made = [chunks(torch.tensor(part, dtype=torch.int64), ranks) for part in chunks(rows, 2)]
        shards, _ = _StridedShard(0, split_factor=2)._split_tensor(rows, ranks, with_padding=False)
        as_placed = [chunks(shard, 2) for shard in shards]
        same = all(as_made[model][data] == as_placed[data][model] for model in range(2) for data in range(ranks))
        assert same == _unambiguous(size, [_Cut(ranks, 2, 0), _Cut(2, 1, 1)]), size
        ambiguous += [] if same else [size]
    assert (9 in ambiguous) == (ranks == 4)


# ---------------------------------------------------------------------------------------------------------- FSDP1


class Nested(nn.Module):
    """Units within units, sizes that divide nothing, a shared parameter, a transposed one, and one that is ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.block = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5, bias=False))
        self.conv = nn.Conv2d(2, 3, 2)
        self.out = nn.Linear(5, 7)
        self.out.weight = self.embed.weight
        self.loose = nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.ones(1))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(numbered(tuple(p.shape)))
            self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        image = x.new_ones(1, 2, 3, 3)
        rest = self.conv(image).mean() + self.loose(image[0, :, 0, :2]).mean()
        return self.out(self.block(self.embed(x.long()))) * self.gain + rest


def wrapped(orig: bool, strategy: str) -> nn.Module:
    net = Nested()
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": orig}
    options["sharding_strategy"] = ShardingStrategy[strategy]
    if strategy == "HYBRID_SHARD":
        options["device_mesh"] = world_mesh((2, dist.get_world_size() // 2))
    net.block = FullyShardedDataParallel(net.block, **options)
    return FullyShardedDataParallel(net, ignored_modules=[net.loose], **options)


def flat_faults(orig: bool, strategy: str) -> tuple[list[str], dict[str, Any]]:
    module = wrapped(orig, strategy)
    flattened = flattened_in(module)
    found, shapes = [], {}
    for p in module.parameters():
        for layout in layouts_of(p, None, flattened):
            found += faults_of(layout, p, str(layout.name))
            ranks = [dist.get_process_group_ranks(group) for group in layout.groups]
            shapes[str(layout.name)] = (tuple(layout.shape), ranks, sum(prod(box.shape) for box in layout.boxes))
    return found, shapes


ORIGINALS = {name: tuple(p.shape) for name, p in Nested().named_parameters() if not name.startswith("loose")}


@pytest.mark.parametrize("orig", [True, False])
@pytest.mark.parametrize(
    ("strategy", "n"),
    [("FULL_SHARD", 2), ("FULL_SHARD", 3), ("SHARD_GRAD_OP", 4), ("HYBRID_SHARD", 4), ("NO_SHARD", 2)],
)
def test_fsdp1_shapes_and_ranges_are_recovered(pool: Pool, orig: bool, strategy: str, n: int) -> None:
    results = pool.run(n, flat_faults, orig, strategy)
    groups = {"NO_SHARD": [[]] * n, "HYBRID_SHARD": [[[0, 1]]] * 2 + [[[2, 3]]] * 2}.get(
        strategy, [[list(range(n))]] * n
    )
    for (found, shapes), group in zip(results, groups, strict=True):
        assert found == []
        flat = {name: shape for name, shape in shapes.items() if name != "None"}
        assert {name: shape[0] for name, shape in flat.items()} == ORIGINALS
        assert all(ranks == group for _, ranks, _ in flat.values())
    copies = {"NO_SHARD": n, "HYBRID_SHARD": 2}.get(strategy, 1)
    for name, shape in ORIGINALS.items():  # every element on just as many ranks as there are replicas
        assert sum(shapes[name][2] for _, shapes in results) == copies * prod(shape), name
    assert "None" in results[0][1]  # what FSDP1 ignores is plain


def whole_in_hand() -> str:
    module = wrapped(True, "FULL_SHARD")
    with FullyShardedDataParallel.summon_full_params(module), contextlib.suppress(StopIteration):
        flattened = flattened_in(module)
        for p in module.parameters():
            try:
                layouts_of(p, None, flattened)
            except LayoutError as error:
                return str(error)
    return ""


def test_fsdp1_parameters_in_full_are_refused(pool: Pool) -> None:
    for message in pool.run(2, whole_in_hand):
        assert "outside of summon_full_params" in message


def refusals() -> list[str]:
    line = world_mesh((2,))
    flat_module = wrapped(True, "FULL_SHARD")
    cut = nn.Parameter(distribute_tensor(torch.ones(4), line, [Shard(0)]))
    other = DeviceMesh("cpu", [1 - dist.get_rank()], _init_backend=False)
    away = nn.Parameter(DTensor.from_local(torch.ones(4), other, [Replicate()], run_check=False))
    attempts: list[Callable[[], Any]] = [
        lambda: layouts_of(next(flat_module.parameters()), dist.group.WORLD, flattened_in(flat_module)),
        lambda: layouts_of(next(flat_module.parameters()), dist.group.WORLD),
        lambda: layouts_of(cut, dist.group.WORLD),
        lambda: layouts_of(away),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(LayoutError) as error:
            attempt()
        messages.append(str(error.value))
    return messages


def test_layouts_that_are_refused(pool: Pool) -> None:
    for messages in pool.run(2, refusals):
        assert all("leave shard_group out" in message for message in messages[:3])
        assert "FSDP1" in messages[0]
        assert "which this rank is not part of" in messages[3]
