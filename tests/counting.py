"""What optimizers of whole matrices do on a rank: what it works on, the bytes that it sends, the state that it owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from oput_dist.collectives import gather as gather_module
from oput_dist.collectives import ranks as ranks_module
from oput_dist.matrix.orthogonal import Orthogonalize
from oput_dist.matrix.shampoo import Precondition
from oput_dist.matrix.soap import AdamInEigenbasis

NAMES = ["muon", "shampoo", "soap"]
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 0.05},
    "shampoo": {"lr": 0.02, "block_size": 4, "precondition_frequency": 2, "eps": 1e-4},
    "soap": {"lr": 0.02, "block_size": 4, "precondition_frequency": 2},
}


@contextmanager
def worked() -> Iterator[list[int]]:
    """How many matrices or blocks this rank works on."""
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Orthogonalize, Precondition, AdamInEigenbasis):
            call = kind.__call__
            patch.setattr(kind, "__call__", _counting(call, counted))
        yield counted


def _counting(call: Callable[..., Tensor], counted: list[int]) -> Callable[..., Tensor]:
    def counting(self: Any, stacked: Tensor, *more: Any) -> Tensor:
        counted.append(len(stacked))
        return call(self, stacked, *more)

    return counting


@contextmanager
def sent() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends, by kind of collective, and how many there are."""
    found = {"all-to-all": 0, "all-gather": 0, "calls": 0}
    exchange, gather = ranks_module._all_to_all, gather_module._all_gather

    def exchanging(
        output: Tensor, given: Tensor, sizes: list[int], sizes_in: list[int], *, group: Any, **more: Any
    ) -> Any:
        rank = dist.get_rank(group)
        found["all-to-all"] += sum(size for to, size in enumerate(sizes_in) if to != rank) * given.element_size()
        found["calls"] += 1
        return exchange(output, given, sizes, sizes_in, group=group, **more)

    def gathering(output: Tensor, own: Tensor, group: Any, **more: Any) -> Any:
        found["all-gather"] += own.nbytes * (dist.get_world_size(group) - 1)
        found["calls"] += 1
        return gather(output, own, group=group, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "_all_to_all", exchanging)
        patch.setattr(gather_module, "_all_gather", gathering)
        yield found


def owned_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the state of matrices that their owners keep."""
    found = 0
    for group in optimizer.param_groups:
        for p in group["params"] if group["matrix"] else ():
            found += sum(v.nbytes for name, v in optimizer.state[p].items() if name != "step" and p.shape != v.shape)
    return found


def assert_same_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """To rounding; eigenvectors may come with either sign."""
    assert found["state"].keys() == wanted["state"].keys()
    for key, entry in wanted["state"].items():
        assert found["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            there = found["state"][key][name]
            assert (there.shape, there.dtype) == (value.shape, value.dtype), name
            assert torch.allclose(there.abs(), value.abs(), rtol=1e-6, atol=1e-9), name
