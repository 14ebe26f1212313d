"""``refresh``: when it is due, what it leaves alone, and what it refuses."""

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
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from tests.network import CLASSES, ROWS, batch, network
from tests.pool import Pool


def kernels_on_rank(shape: tuple[int, ...], parts: int) -> list[Tensor]:
    """Spatial means of a convolution's kernel, which is cut in this way."""
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
