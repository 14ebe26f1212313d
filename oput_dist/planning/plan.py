"""``oput.plan``: from a model, an optimizer and a mesh to what training will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from oput_dist.engine import Optimizer

from .forecast import Forecast, Spread
from .given import given
from .machine import Machine
from .matrices import Ownership, ownership
from .memory import Held, held
from .sums import Exchange, all_reduces, gathers
from .world import World, world_of

__all__ = ["plan"]


def plan(
    model: nn.Module | Mapping[str, Sequence[int]] | None,
    optimizer: str | type[Optimizer] | Optimizer,
    mesh: int | Sequence[int] | DeviceMesh = 1,
    *,
    layout: str | None = None,
    dtype: torch.dtype = torch.float32,
    machine: Machine | None = None,
    **options: Any,
) -> Forecast:
    """What training will cost each rank: memory, bytes sent, balance, time. Nothing is run, allocated or sent.

    Sizes and numbers of collectives are exact: they are taken from what the engine itself plans, on tensors without
    memory. Only seconds are estimated, from the constants of ``machine``.

    Args:
        model: a module, best on the meta device and before it is wrapped; or the shapes of parameters by name, of which
            only heads are told from hidden matrices (give ``matrix_params`` for embeddings); or None for an optimizer
            that has its parameters. Frozen parameters count as memory only.
        optimizer: a name (``oput.available()`` lists them) or class, made with ``options``; or one that is made.
        mesh: number of ranks; ``(replicas, shards)`` for HSDP; or a mesh. Default 1.
        layout: ``"fsdp2"``, rows of each parameter on each rank; ``"zero1"``, whole parameters, and state for rows of
            each (``shard_group=``); ``"ddp"``, everything on each rank, but whole matrices shared as where
            the optimizer gets the module; ``"hsdp"``, FSDP2 within each row of a mesh of
            two dimensions. Default None: fsdp2, or hsdp for such a mesh.
        dtype: of parameters that are given as shapes. Default float32.
        machine: the constants of the estimate; None for :class:`oput_dist.Machine` as it is. Default None.
        **options: of the optimizer.

    Returns:
        all figures; ``print`` shows them as a table.

    Raises:
        ValueError: for an unknown optimizer, with the nearest name; a mesh that does not fit the layout; no parameters.
        TypeError: for what is no model or optimizer.

    Example::

        with torch.device("meta"):
            model = Model()
        print(oput.plan(model, "shampoo", 64, block_size=1024))
    """
    world, machine = world_of(mesh, layout), machine or Machine()
    params = given(model, optimizer, dtype, options)
    slots = params.slots(world, 0)
    memory, owners = held(params, world), ownership(params, world, slots)
    alone = World("ddp", (1,))
    kept, whole = sum(owners.kept), held(params, alone)[0]
    sums, rows = all_reduces(params, world, slots), gathers(world, slots)
    sent = _sent(world, sums, rows, owners)
    return Forecast(
        optimizer=type(params.optimizer).__name__,
        layout=world.layout,
        mesh=world.sizes,
        elements=sum(p.numel() for p in (*(p for _, p in params.entries), *params.frozen)),
        parameter_bytes=Spread.of([one.parameters for one in memory]),
        gradient_bytes=Spread.of([one.gradients for one in memory]),
        state_bytes=Spread.of(_state(memory, owners)),
        host_bytes=Spread.of([one.host for one in memory]),
        all_state_bytes=Spread.of([a + one.host for a, one in zip(_state(memory, owners), memory, strict=True)]),
        whole_state_bytes=whole.state + whole.host + kept,
        sent={purpose: Spread.of(each) for purpose, each in sent.items()},
        sent_bytes=Spread.of([sum(each) for each in zip(*sent.values(), strict=True)]),
        collectives={
            "all-reduce": len(sums),
            "all-to-all": owners.exchanges,
            "all-gather": len(rows) + len(owners.told),
        },
        owner_seconds=Spread.of([cost / machine.matrix_rate for cost in owners.cost]),
        owner_bytes=Spread.of(owners.kept),
        least_imbalance=owners.least_imbalance,
        seconds=_seconds(world, machine, memory, sums, rows, owners),
    )


def _state(memory: Sequence[Held], owners: Ownership) -> list[int]:
    return [one.state + kept for one, kept in zip(memory, owners.kept, strict=True)]


def _sent(world: World, sums: Sequence[Exchange], rows: Sequence[Exchange], owners: Ownership) -> dict[str, list[int]]:
    """Bytes that each rank sends, by purpose."""
    return {
        "sums": [sum(sent for _, sent in sums)] * world.ranks,
        "to owners": owners.to_owners,
        "from owners": owners.back,
        "updated rows": [sum(sent for _, sent in rows)] * world.ranks,
    }


def _seconds(
    world: World,
    machine: Machine,
    memory: Sequence[Held],
    sums: Sequence[Exchange],
    rows: Sequence[Exchange],
    owners: Ownership,
) -> dict[str, float]:
    """The time of the busiest rank, by purpose."""
    moved = max(owners.to_owners) + max(owners.back)
    waits = (owners.exchanges + len(owners.told)) * machine.collective(world.ranks, 0)
    sending = machine.collective(world.ranks, moved) - machine.collective(world.ranks, 0)
    return {
        "passes": max(one.traffic for one in memory) / machine.memory_rate,
        "state from the host": max(one.fetched for one in memory) / machine.host_rate,
        "sums": sum(machine.collective(ranks, sent) for ranks, sent in sums),
        "matrices": max(owners.cost) / machine.matrix_rate,
        "to owners and back": waits + sending,
        "updated rows": sum(machine.collective(ranks, sent) for ranks, sent in rows),
    }
