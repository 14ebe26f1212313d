"""Meshes of a world, made once: gloo's groups take 0.1 s each, and threads for as long as the world lives.

With hundreds of groups a machine does little else.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["pairs_of", "world_mesh"]

_MADE: dict[object, object] = {}


def world_mesh(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """The CPU mesh of a shape in the world that this rank is in. Every rank must call it."""
    mesh = _once((shape, names), lambda: init_device_mesh("cpu", shape, mesh_dim_names=names))
    assert isinstance(mesh, DeviceMesh)
    return mesh


def pairs_of() -> dist.ProcessGroup:
    """This rank's group of two. Every rank must call it."""
    group = _once("pairs", lambda: dist.new_subgroups(2)[0])
    assert isinstance(group, dist.ProcessGroup)
    return group


def _once(key: object, make: object) -> object:
    world = dist.group.WORLD
    if _MADE.get("world") is not world:  # what was made in another world is gone with it
        _MADE.clear()
        _MADE["world"] = world
    if key not in _MADE:
        assert callable(make)
        _MADE[key] = make()
    return _MADE[key]
