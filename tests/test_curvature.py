"""Estimates of the Hessian's diagonal: their mean, and that no sharding changes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from oput_dist.curvature import Context, Estimator
from oput_dist.curvature.noise import key_of, normal, probe, signs, uniform
from oput_dist.layout import boxes_of_range
from tests.meshes import world_mesh
from tests.network import ROWS, batch, network
from tests.pool import Pool

# --------------------------------------------------------------------------------------------------- random numbers


def test_random_numbers_are_what_they_are_called() -> None:
    index = torch.arange(200_000)
    u, s, z = uniform(key_of(1), index), signs(key_of(2), index), normal(key_of(3), index)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    for values, mean, variance in ((u, 0.5, 1 / 12), (s, 0.0, 1.0), (z, 0.0, 1.0)):
        assert abs(values.mean() - mean) < 5 * (variance / len(index)) ** 0.5
        assert abs(values.var() / variance - 1) < 0.02
        assert abs((values[1:] * values[:-1]).mean() - mean**2) < 0.01  # neighbours
    assert abs((z**4).mean() - 3) < 0.1
    other = signs(key_of(4), index)
    assert abs((s * other).mean()) < 0.01
    assert sorted(set(s.tolist())) == [-1.0, 1.0]


def test_a_piece_of_a_probe_is_a_piece_of_the_whole() -> None:
    """The index is that of the whole parameter, whatever range or order of memory a piece has."""
    p = nn.Parameter(torch.zeros(5, 4, 3).permute(2, 0, 1))
    optimizer = oput.AdamW([p])
    (slot,) = optimizer._current_plan().slots
    whole = probe(slot, 7, "rademacher").as_strided(slot.piece.shape, slot.strides)
    assert torch.equal(whole, signs(7, torch.arange(60).reshape(3, 5, 4)).to(whole))

    class Piece:
        layout, dtype, device, numel = slot.layout, slot.dtype, slot.device, 23
        boxes = boxes_of_range((3, 5, 4), 13, 36)

        def views(self, flat: Tensor) -> list[Tensor]:
            return [flat.as_strided(box.shape, box.strides, box.start) for box in self.boxes]

    assert torch.equal(probe(Piece(), 7, "rademacher"), whole.reshape(-1)[13:36])  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- their mean


def averaged(estimator: Estimator, module: nn.Module, output: Callable[[], Tensor], draws: int) -> Tensor:
    optimizer = oput.Sophia(module, estimator=estimator)
    plan = optimizer._current_plan()
    names = optimizer._names(plan)
    total: list[Tensor] = []
    for number in range(draws):
        made = estimator.estimate(Context(plan, names, (), number, module, lambda: None, ("eager",)), [output])
        flat = torch.cat([made[i] for i in sorted(made)])
        total = [total[0] + flat] if total else [flat]
        module.zero_grad()
    return total[0] / draws


def exact(module: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonals of the Gauss-Newton matrix and of the Hessian of the mean cross-entropy, by torch.func."""
    params = dict(module.named_parameters())

    def outputs(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in params.values()])
        given = {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}
        logits: Tensor = functional_call(module, given, (inputs,))
        return logits

    point = torch.cat([p.detach().reshape(-1) for p in params.values()])
    jacobian, chances = jacrev(outputs)(point), outputs(point).softmax(-1)
    inner = torch.diag_embed(chances) - chances.unsqueeze(-1) * chances.unsqueeze(-2)
    newton = torch.einsum("bcp,bcd,bdp->p", jacobian, inner, jacobian) / len(inputs)
    return newton, hessian(lambda v: F.cross_entropy(outputs(v), labels))(point).diagonal()


def test_the_mean_of_many_estimates_is_the_diagonal() -> None:
    """2,000 draws, of networks where so many suffice.

    The squares of Gauss-Newton-Bartlett have a variance of their own, which is least for small batches; Hutchinson's
    error grows with what is off the diagonal, which is little where each input has weights of its own.
    """
    module = network(3, 3, 2)
    inputs, labels = batch(0, 2, 3, 2)
    newton, _ = exact(module, inputs, labels)
    found = averaged(oput.GaussNewtonBartlett(), module, lambda: module(inputs), 2_000)
    assert (found - newton).norm() < 0.03 * newton.norm()

    module = network(8, 2, 6)
    module[2].weight.data *= 3
    inputs, labels = 3 * torch.eye(8, dtype=torch.float64), batch(0, 8, 8, 6)[1]
    _, second = exact(module, inputs, labels)

    def loss() -> Tensor:
        return F.cross_entropy(module(inputs), labels)

    for kind in ("rademacher", "normal"):
        found = averaged(oput.Hutchinson(kind), module, loss, 2_000)  # type: ignore[arg-type]
        assert (found - second).norm() < (0.03 if kind == "rademacher" else 0.06) * second.norm()


def test_a_difference_of_gradients_is_the_product() -> None:
    module = network()
    inputs, labels = batch(0)

    def loss() -> Tensor:
        return F.cross_entropy(module(inputs), labels)

    before = [p.detach().clone() for p in module.parameters()]
    exactly = averaged(oput.Hutchinson(), module, loss, 3)
    about = averaged(oput.Hutchinson(product="difference"), module, loss, 3)
    assert (about - exactly).abs().max() < 1e-8 * exactly.abs().max()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


# --------------------------------------------------------------------------------------------------- any sharding

MAKERS: dict[str, dict[str, Any]] = {
    "gnb": {"name": "SophiaG", "rho": 5.0},
    "fisher": {"name": "Sophia", "estimator": "empirical-fisher", "rho": 5.0},
    "difference": {"name": "SophiaH", "product": "difference", "rho": 1.0},
    "exact": {"name": "SophiaH", "rho": 1.0},
    "adahessian": {"name": "AdaHessian", "product": "difference", "k": 2},
}
LAYOUTS = {
    "ddp": (2, 3),
    "ddp-views": (2,),
    "zero1": (2, 3),
    "fsdp2": (2, 3, 4),
    "hsdp": (4,),
    "tp": (2,),
    "fsdp2-tp": (4,),
}
LAYOUTS |= {"fsdp1": (2, 3), "fsdp1-flat": (2,), "fsdp1-hybrid": (4,)}
TWICE = ("plain", "ddp", "ddp-views", "zero1", "tp")  # where gradients can be differentiated
STEPS = 3


def wrapped(layout: str) -> tuple[nn.Module, nn.Module, dict[str, Any], int]:
    """The module to call, the one with the parameters, options of the optimizer, and this rank's place in the data."""
    module, n, rank = network(), dist.get_world_size(), dist.get_rank()
    cut = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if layout in ("ddp", "ddp-views", "zero1"):
        options = {"shard_group": dist.group.WORLD} if layout == "zero1" else {}
        outer = DistributedDataParallel(module, gradient_as_bucket_view=layout == "ddp-views")
        return outer, module, options, rank
    if layout == "fsdp2":
        return fully_shard(module), module, {}, rank
    if layout == "hsdp":
        mesh = world_mesh((2, 2), ("replicate", "shard"))
        return fully_shard(module, mesh=mesh), module, {}, rank
    if layout == "tp":
        return parallelize_module(module, world_mesh((n,)), cut), module, {}, 0
    if layout == "fsdp2-tp":
        mesh = world_mesh((2, 2), ("data", "model"))
        parallelize_module(module, mesh["model"], cut)
        return fully_shard(module, mesh=mesh["data"]), module, {}, mesh.get_local_rank("data")
    options = {"device_id": torch.device("cpu"), "use_orig_params": layout != "fsdp1-flat"}
    if layout == "fsdp1-hybrid":
        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
        options["device_mesh"] = world_mesh((2, 2))
    outer = FullyShardedDataParallel(module, **options)
    return outer, outer, {}, rank


def trained(
    maker: str, outer: nn.Module, inner: nn.Module, options: dict[str, Any], place: int, places: int
) -> tuple[oput.Optimizer, list[Tensor]]:
    """After some steps with an estimate at every other; two micro-batches for each estimate."""
    given = {"lr": 0.05, "k": 2, **MAKERS[maker], **options}
    optimizer = getattr(oput, given.pop("name"))(inner, **given)
    norms = []
    for step in range(STEPS):
        inputs, labels = batch(step)
        own = slice(place * ROWS // places, (place + 1) * ROWS // places)
        F.cross_entropy(outer(inputs[own]), labels[own]).backward()
        if optimizer.due:
            with torch.no_grad():
                outer(inputs[own])  # leaves gathered what FSDP gathers
        own_ones = [p for group in optimizer.param_groups for p in group["params"]]
        aside = [p.grad.clone() for p in own_ones if p.grad is not None]
        optimizer.refresh(*functions(maker, outer, inputs, labels, place, places))
        back = [p.grad for p in own_ones if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(aside, back, strict=True))
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(optimizer, oput.Sophia):
            norms.append(torch.stack(optimizer.report()))
    return optimizer, norms


def functions(
    maker: str, outer: nn.Module, inputs: Tensor, labels: Tensor, place: int, places: int
) -> list[Callable[[], Tensor]]:
    """What runs the model on this rank's share of two micro-batches; of uneven shares where losses are counted."""
    half, made = ROWS // 2, []
    for begin, size in ((0, half - 2 if maker in ("gnb", "fisher") else half), (half, half)):
        own = slice(begin + place * size // places, begin + (place + 1) * size // places)

        def run(x: Tensor = inputs[own], y: Tensor = labels[own]) -> Tensor:
            logits: Tensor = outer(x)
            if maker == "gnb":
                return logits
            return F.cross_entropy(logits, y, reduction="none" if maker == "fisher" else "mean")

        made.append(run)
    return made


def on_rank(layout: str) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    found = {}
    for maker in MAKERS:
        if maker == "exact" and layout not in TWICE:
            outer, inner, options, place = wrapped(layout)
            with pytest.raises(oput.CurvatureError, match="difference"):
                trained(maker, outer, inner, options, place, 1)
            continue
        outer, inner, options, place = wrapped(layout)
        places = {"tp": 1, "fsdp2-tp": 2}.get(layout, dist.get_world_size())
        optimizer, norms = trained(maker, outer, inner, options, place, places)
        found[maker] = ([entry["hessian"] for entry in oput.full_state_dict(optimizer)["state"].values()], norms)
    return found


@pytest.mark.parametrize(("layout", "n"), [(layout, n) for layout, sizes in LAYOUTS.items() for n in sizes])
def test_no_sharding_changes_an_estimate(pool: Pool, layout: str, n: int) -> None:
    for found in pool.run(n, on_rank, layout, timeout=120.0):
        for maker, (hessians, norms) in found.items():
            module = network()
            optimizer, wanted_norms = trained(maker, module, module, {}, 0, 1)
            limit = 1e-6 if maker in ("difference", "adahessian") else 1e-12
            wanted = [entry["hessian"] for entry in oput.full_state_dict(optimizer)["state"].values()]
            for a, b in zip(hessians, wanted, strict=True):
                assert b.abs().max() > 1e-4
                assert (a - b).abs().max() <= limit * b.abs().max(), f"{maker}: {(a - b).abs().max() / b.abs().max()}"
            for a, b in zip(norms, wanted_norms, strict=True):
                assert torch.allclose(a, b, rtol=1e-6)
