"""Estimates of the Hessian's diagonal: their mean, and that no sharding changes them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from oput_dist.curvature import Context, Estimator
from oput_dist.curvature.noise import key_of, normal, probe, signs, uniform
from oput_dist.layout import boxes_of_range
from tests.pool import Pool

ROWS, CLASSES = 24, 5


def network(features: int = 6, hidden: int = 8, classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double()


def batch(step: int, rows: int = ROWS, features: int = 6, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (rows,), generator=generator)


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
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(module, mesh=mesh), module, {}, rank
    if layout == "tp":
        return parallelize_module(module, init_device_mesh("cpu", (n,)), cut), module, {}, 0
    if layout == "fsdp2-tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        parallelize_module(module, mesh["model"], cut)
        return fully_shard(module, mesh=mesh["data"]), module, {}, mesh.get_local_rank("data")
    options = {"device_id": torch.device("cpu"), "use_orig_params": layout != "fsdp1-flat"}
    if layout == "fsdp1-hybrid":
        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
        options["device_mesh"] = init_device_mesh("cpu", (2, 2))
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


# ------------------------------------------------------------------------------------ what stands around an estimate


def kernels_on_rank(shape: tuple[int, ...], parts: int) -> list[Tensor]:
    """Spatial means of a convolution's kernel, which is cut in this way."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) - 20
    p = nn.Parameter(distribute_tensor(values, mesh, [Shard(parts)], src_data_rank=None))
    p.grad = p.detach().clone()
    optimizer = oput.AdaHessian([p])
    plan = optimizer._current_plan()
    (slot,) = plan.slots
    gradient = slot.flat_gradient()
    assert gradient is not None
    optimizer._take_over({0: gradient.clone()} if slot.numel else {}, spatial=True)
    return [optimizer.state[p]["hessian"].full_tensor()]


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_spatial_means_wherever_a_kernel_is_cut(pool: Pool, axis: int) -> None:
    shape = (3, 4, 2, 4)
    whole = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) - 20
    wanted = whole.abs().mean((2, 3), keepdim=True).expand(shape)
    for (found,) in pool.run(2, kernels_on_rank, shape, axis):
        assert torch.allclose(found, wanted, rtol=1e-14, atol=0)


def test_refresh_comes_before_the_first_step_and_every_k_steps() -> None:
    module = network()
    optimizer = oput.SophiaG(module, k=3)
    inputs, labels = batch(0)
    made = []
    for _ in range(8):
        made.append(optimizer.refresh(lambda: module(inputs)))
        F.cross_entropy(module(inputs), labels).backward()
        optimizer.step()
    assert made == [True, False, False, True, False, False, True, False]
    assert optimizer.refresh(lambda: module(inputs), force=True)
    assert optimizer.param_groups[0]["refreshes"] == 4


def test_batch_norm_statistics_stay() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).double()
    inputs, labels = batch(0)
    buffers = [b.clone() for b in module.buffers()]
    optimizers = [oput.SophiaG(module), oput.SophiaH(module), oput.SophiaH(module, product="difference")]
    optimizers[0].refresh(lambda: module(inputs))
    for optimizer in optimizers[1:]:
        optimizer.refresh(lambda: F.cross_entropy(module(inputs), labels))
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers, strict=True))
    module(inputs)
    assert not torch.equal(module[1].running_mean, buffers[0])  # type: ignore[arg-type]


def test_dropout_is_the_same_on_both_sides_of_a_difference() -> None:
    module = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, CLASSES)).double()
    inputs, labels = batch(0)
    optimizer = oput.SophiaH(module, product="difference")
    optimizer.refresh(lambda: F.cross_entropy(module(inputs), labels))
    assert max(optimizer.state[p]["hessian"].abs().max() for p in module.parameters()) < 1  # masks apart give 1e4


def test_what_is_not_finite_leaves_no_trace() -> None:
    module = network()
    optimizer = oput.SophiaG(module, betas=(0.9, 0.5))
    for step, poison in enumerate((0.0, float("nan"))):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        module[0].weight.grad[1, 2] = 1 + poison  # type: ignore[index]
        optimizer.update_hessian()
        hessian = optimizer.state[module[0].weight]["hessian"]
        assert hessian[1, 2] == 0.5
        assert hessian[0, 0] == (0.5, 0.75)[step]


@pytest.mark.parametrize("estimator", ["gauss-newton-bartlett", "empirical-fisher", "hutchinson"])
def test_micro_batches_are_one_batch(estimator: str) -> None:
    module = network()
    inputs, labels = batch(0)

    def function(own: slice) -> Callable[[], Tensor]:
        if estimator == "gauss-newton-bartlett":
            return lambda: module(inputs[own])
        reduction = "none" if estimator == "empirical-fisher" else "mean"
        return lambda: F.cross_entropy(module(inputs[own]), labels[own], reduction=reduction)

    found = []
    for cuts in ((0, ROWS), (0, 12, ROWS) if estimator == "hutchinson" else (0, 7, 11, ROWS)):
        optimizer = oput.Sophia(module, estimator=estimator)
        optimizer.refresh(*(function(slice(a, b)) for a, b in pairwise(cuts)))
        found.append(torch.cat([optimizer.state[p]["hessian"].flatten() for p in module.parameters()]))
    assert (found[0] - found[1]).abs().max() < 1e-12 * found[0].abs().max()


def test_keep_leaves_rows_out() -> None:
    module = network()
    inputs, _ = batch(0)
    keep = torch.arange(ROWS) < 7
    found = []
    for optimizer, output in (
        (oput.SophiaG(module), lambda: (module(inputs), keep)),
        (oput.SophiaG(module), lambda: module(inputs[:7])),
    ):
        optimizer.refresh(output)
        found.append(optimizer.state[module[0].weight]["hessian"])
    assert torch.allclose(*found, rtol=1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).view(2, 4, 1, 24).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 8)


def test_fused_attention_is_refused_by_what_differentiates_twice() -> None:
    module = Attention()
    x = torch.randn(2, 4, 8)
    with pytest.raises(oput.CurvatureError, match=r"cannot be differentiated twice.*product=.difference.*GaussNewton"):
        oput.SophiaH(module).refresh(lambda: module(x).square().mean())
    oput.SophiaH(module, product="difference").refresh(lambda: module(x).square().mean())
    oput.SophiaG(module).refresh(lambda: module(x))


@pytest.mark.parametrize(
    ("name", "output", "error", "text"),
    [
        (
            "SophiaG",
            "loss",
            TypeError,
            r"logits of shape \[..., classes\], but returned shape \(\) \(a loss, perhaps\)",
        ),
        ("SophiaG", "labels", TypeError, r"dtype torch.int64: optimizer.refresh\(lambda: model\(inputs\)\)"),
        ("SophiaG", "nothing", TypeError, "must return logits, but returned a NoneType"),
        ("SophiaG", "no_grad", RuntimeError, r"without a graph: call the model inside of it, not under torch.no_grad"),
        ("SophiaH", "logits", TypeError, r"one loss, the mean over the batch, but returned shape \(24, 5\)"),
        ("SophiaH", "no_grad", RuntimeError, r"without a graph.*loss_function\(model\(inputs\), labels\)"),
        ("Fisher", "loss", TypeError, r"losses that are not reduced.*reduction=.none."),
    ],
)
def test_bad_output(name: str, output: str, error: type[Exception], text: str) -> None:
    module = network()
    inputs, labels = batch(0)
    outputs: dict[str, Callable[[], Any]] = {
        "loss": lambda: F.cross_entropy(module(inputs), labels),
        "labels": lambda: labels,
        "nothing": lambda: None,
        "no_grad": torch.no_grad()(lambda: module(inputs)),
        "logits": lambda: module(inputs),
    }
    optimizer = oput.Sophia(module, estimator="empirical-fisher") if name == "Fisher" else getattr(oput, name)(module)
    gradient = module[0].weight.grad = torch.ones_like(module[0].weight)
    with pytest.raises(error, match=text):
        optimizer.refresh(outputs[output])
    assert module[0].weight.grad is gradient
    assert optimizer.due
    assert not optimizer.state_dict()["state"]


def test_bad_calls() -> None:
    module = network()
    optimizer = oput.SophiaG(module)
    with pytest.raises(TypeError, match=r"nothing was given: optimizer.refresh\(lambda: model\(inputs\)\)"):
        optimizer.refresh()
    with pytest.raises(TypeError, match="a value was given"):
        optimizer.refresh(module(batch(0)[0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Did you mean 'hutchinson'"):
        oput.Sophia(module, estimator="hutchinsen")
    with pytest.raises(ValueError, match="step=-1 is not allowed: must be None or a finite number > 0"):
        oput.Hutchinson(step=-1)


def test_copies_go_on_estimating() -> None:
    module = network()
    optimizer = oput.SophiaG(module)
    inputs, _ = batch(0)
    twin_module, twin = copy.deepcopy((module, optimizer))
    optimizer.refresh(lambda: module(inputs))
    twin.refresh(lambda: twin_module(inputs))
    mine, theirs = optimizer.state[module[0].weight], twin.state[twin_module[0].weight]
    assert torch.equal(mine["hessian"], theirs["hessian"])
    assert pickle.loads(pickle.dumps(optimizer)).estimator.seed == 0


def unaveraged_on_rank() -> list[str]:
    """What is said where nothing averages the gradients of an estimate; and that training gradients are untouched."""
    inputs, _ = batch(dist.get_rank())
    said = []
    ddp = DistributedDataParallel(network())
    optimizer = oput.SophiaG(ddp.module)
    for run in (lambda: ddp(inputs), lambda: ddp.module(inputs)):
        with ddp.no_sync(), pytest.raises(oput.CurvatureError) as error:
            optimizer.refresh(run)
        said.append(str(error.value))
    sharded = fully_shard(network())
    sharded.set_requires_gradient_sync(False)
    with pytest.raises(oput.CurvatureError) as error:
        oput.SophiaG(sharded).refresh(lambda: sharded(inputs))
    said.append(str(error.value))
    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with flat.no_sync(), pytest.raises(oput.CurvatureError) as error:
        oput.SophiaG(flat).refresh(lambda: flat(inputs))
    return [*said, str(error.value)]


def test_refresh_where_nothing_averages_is_refused(pool: Pool) -> None:
    for said in pool.run(2, unaveraged_on_rank):
        assert len(said) == 4
        assert all("call refresh outside of no_sync()" in text for text in said)


def test_keep_must_be_a_mask() -> None:
    module = network()
    inputs, _ = batch(0)
    for keep in (torch.ones(ROWS, dtype=torch.int64), torch.ones(ROWS - 1, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"keep must be boolean and of shape \(24,\)"):
            oput.SophiaG(module).refresh(lambda keep=keep: (module(inputs), keep))


def test_adahessian_without_an_estimate_warns() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.warns(UserWarning, match="stepped without an estimate of curvature"):
        oput.AdaHessian([p]).step()
