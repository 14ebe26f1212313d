"""Perturbations by each rank's own gradient, and what is refused under sharding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from oput_dist.wrappers.esam import ESAM
from oput_dist.wrappers.sam import SAM
from tests.formulas import sam as formulas
from tests.pool import Pool
from tests.test_sam_sharded import LIMIT, Place, counted, network
from tests.toy import largest_difference, same


def local(by_hand: bool) -> tuple[float, int]:
    """The largest difference from the formula, which has a perturbation for each rank; and collectives of its norm."""
    place = Place("ddp")
    optimizer = SAM(place.model, torch.optim.SGD, lr=0.1, rho=0.3, local=True)
    params = [p.detach().clone() for p in network().parameters()]
    with counted() as sizes:
        for step in range(3):
            if by_hand:
                with place.model.no_sync():
                    place.losses(step).mean().backward()
                optimizer.first_step()
                place.losses(step).mean().backward()
                optimizer.second_step(zero_grad=True)
            else:
                optimizer.step(place.call("sam", step))
            total = [torch.zeros_like(p) for p in params]
            for rank in range(dist.get_world_size()):

                def grads_at(weights: list[Tensor], rank: int = rank, step: int = step) -> list[Tensor]:
                    leaves, losses = share_of(rank, weights, step)
                    return list(torch.autograd.grad(losses.mean(), leaves))

                grads = formulas.sam(params, grads_at, rho=0.3)
                total = [t + g / dist.get_world_size() for t, g in zip(total, grads, strict=True)]
            params = [p - 0.1 * t for p, t in zip(params, total, strict=True)]
    return largest_difference(place.values(), params), len(sizes)


def share_of(rank: int, params: list[Tensor], step: int) -> tuple[list[Tensor], Tensor]:
    """Leaves, and the losses of a rank's share at them."""
    leaves = [p.detach().requires_grad_() for p in params]
    model, other = network(), Place("plain")
    named = dict(zip([name for name, _ in model.named_parameters()], leaves, strict=True))
    other.share = slice(rank, None, dist.get_world_size())
    other.model = lambda x: torch.func.functional_call(model, named, x)
    return leaves, other.losses(step)


def mean_gradients(params: list[Tensor], step: int, chosen: dict[int, list[int]] | None = None) -> list[Tensor]:
    """Of the mean over ranks, of all their samples or some."""
    ranks = dist.get_world_size()
    total = [torch.zeros_like(p) for p in params]
    for rank in range(ranks):
        leaves, losses = share_of(rank, params, step)
        losses = losses if chosen is None else losses[chosen[rank]]
        total = [t + g / ranks for t, g in zip(total, torch.autograd.grad(losses.mean(), leaves), strict=True)]
    return total


def samples_by_rank() -> float:
    """ESAM where each rank chooses a third of its own samples."""
    place, params = Place("ddp"), [p.detach().clone() for p in network().parameters()]
    optimizer = ESAM(place.model, torch.optim.SGD, lr=0.1, rho=0.3, beta=1.0, gamma=0.34)

    def losses_of(indices: Tensor | None, step: int) -> Tensor:
        own, full = place.share, range(12)
        if indices is not None:
            place.share = [list(full)[own][i] for i in indices]  # type: ignore[assignment]
        try:
            return place.losses(step)
        finally:
            place.share = own

    for step in range(3):
        optimizer.step(lambda indices, step=step: losses_of(indices, step))
        up = formulas.climbed(params, mean_gradients(params, step), 0.3)
        chosen = {}
        for rank in range(dist.get_world_size()):
            rise = share_of(rank, up, step)[1] - share_of(rank, params, step)[1]
            chosen[rank] = rise.topk(2)[1].tolist()
        grads = mean_gradients(up, step, chosen)
        params = [p - 0.1 * g for p, g in zip(params, grads, strict=True)]
    return largest_difference(place.values(), params)


def refused() -> None:
    for kind in ("fsdp2", "tp", "fsdp1"):
        place = Place(kind)
        optimizer = place.make("sam", "lamb", local=True)
        before = place.values()
        place.losses(0).mean().backward()
        with pytest.raises(ValueError, match=r"local=True, but parameter '.*' is sharded"):
            optimizer.first_step()
        assert same(place.values(), before)
    place = Place("plain")
    with pytest.raises(RuntimeError, match=r"under ddp_model.no_sync\(\)"):
        place.make("sam", "lamb", local=True).step(place.call("sam", 0))
    for flat in ("fsdp1", "fsdp1-flat"):
        place = Place(flat)
        optimizer, scaler = place.make("sam", "lamb"), torch.amp.GradScaler("cpu", init_scale=64.0)
        before = place.values()
        scaler.scale(place.losses(0).mean()).backward()
        optimizer.first_step()
        scaler.scale(place.losses(0).mean()).backward()
        with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(optimizer\)"):
            scaler.step(optimizer)
        assert same(place.values(), before)
    bare = Place("fsdp1")
    optimizer = SAM(bare.model.parameters(), torch.optim.SGD, lr=0.1)
    bare.losses(0).mean().backward()
    with pytest.raises(ValueError, match="module=fsdp_module"):
        optimizer.first_step()


def locally() -> list[Any]:
    refused()
    return [*(local(by_hand) for by_hand in (False, True)), (samples_by_rank(), 0)]


def test_local_perturbation_and_what_is_refused(pool: Pool) -> None:
    for found in pool.run(2, locally):
        for difference, reductions in found:
            assert difference <= LIMIT
            assert reductions == 0
