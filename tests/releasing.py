"""Gradient release beside ordinary steps: the same model and batches, on this rank alone, under DDP, or under FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from oput_dist.optimizers import OPTIMIZERS
from tests.conformance import gradients, start_values
from tests.meshes import world_mesh
from tests.toy import create
from tests.wrapped import LAYOUTS

REFUSED = {  # and why
    "adahessian": "refresh",
    "dadaptadam": "sums over all gradients",
    "momo": "sums over all gradients",
    "momoadam": "sums over all gradients",
    "muon": "whole matrices",
    "shampoo": "whole matrices",
    "soap": "whole matrices",
    "prodigy": "sums over all gradients",
    "ranger21": "sums over all gradients",
    "sophia": "refresh",
    "sophiag": "refresh",
    "sophiah": "refresh",
}
SUPPORTED = [name for name in OPTIMIZERS if name not in REFUSED]
STEPS = 3


class Block(nn.Module):
    """Layers of several shapes, one of them convolutional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.mT).mT).tanh()


class Net(nn.Module):
    """A model with an embedding that is its head, too, and fewer rows than ranks in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.blocks = nn.Sequential(Block(), Block())
        self.out = nn.Linear(6, 1)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embedding(tokens))
        return self.head(x).square().mean() + self.out(x).sin().mean()


def alone(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=0.0005)  # several buckets


def ddp_views(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = world_mesh((dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "alone": alone,
    "ddp": ddp,
    "ddp views": ddp_views,
    "fsdp2": fsdp2,
}


def batch(step: int) -> Tensor:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(10 * step + rank))


def started(wrap: str, name: str, release: bool, **options: Any) -> tuple[nn.Module, oput.Optimizer]:
    torch.manual_seed(0)
    model = WRAPS[wrap](Net().to(options.pop("dtype", torch.float32)))
    options = {"lr": 0.01, "weight_decay": 0.1, **options}
    optimizer = create(name, model, gradient_release=release, **options)
    if release:
        oput.prepare_for_gradient_release(model, optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: oput.Optimizer, steps: range, schedule: bool = True) -> None:
    """An ordinary loop. Where gradients are released, none is left after the backward pass."""
    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.75)
    for step in steps:
        model(batch(step)).backward()
        if optimizer._release is not None:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def held(model: nn.Module, optimizer: oput.Optimizer) -> list[Any]:
    """Everything that this rank holds: parameters, state, and what groups keep."""
    values: list[Any] = []
    for p in model.parameters():
        for value in (p, *(value for _, value in sorted(optimizer.state[p].items()))):
            values.append((value.to_local() if isinstance(value, DTensor) else value).detach().clone())
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [values, repr(groups)]


def apart(found: list[Any], wanted: list[Any]) -> bool:
    """Whether anything differs in any bit; NaN would."""
    tensors = zip(found[0], wanted[0], strict=True)
    return not all(torch.equal(f, w) for f, w in tensors) or found[1] != wanted[1]


def differing(wrap: str, names: list[str], **options: Any) -> list[str]:
    """The optimizers that end elsewhere with gradient release than without."""
    found = []
    for name in names:
        runs = [started(wrap, name, release, **options) for release in (False, True)]
        for model, optimizer in runs:
            train(model, optimizer, range(STEPS))
        if apart(held(*runs[1]), held(*runs[0])):
            found.append(name)
    return found


class Stack(nn.ModuleList):
    """Models that have nothing to do with each other, in one pass."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.stack([net(tokens) for net in self]).sum()


def differing_in_one_pass(names: list[str]) -> list[str]:
    """The same under FSDP2, with models of all optimizers in units that they share: passes take the time, not steps."""
    runs = [stacked(names, release) for release in (False, True)]
    for stack, optimizers in runs:
        for step in range(STEPS):
            stack(batch(step)).backward()
            for net, (optimizer, scheduler) in zip(stack, optimizers, strict=True):
                assert optimizer._release is None or all(p.grad is None for p in net.parameters())
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    ends = [
        [held(net, optimizer) for net, (optimizer, _) in zip(stack, optimizers, strict=True)]
        for stack, optimizers in runs
    ]
    return [name for name, plain, other in zip(names, *ends, strict=True) if apart(other, plain)]


def stacked(names: list[str], release: bool) -> tuple[Stack, list[tuple[oput.Optimizer, Any]]]:
    torch.manual_seed(0)
    net, mesh = Net(), world_mesh((dist.get_world_size(),))
    stack = Stack(copy.deepcopy(net) for _ in names)
    for i in range(len(net.blocks)):
        fully_shard([one.blocks[i] for one in stack], mesh=mesh)
    fully_shard(stack, mesh=mesh)
    optimizers = []
    for name, one in zip(names, stack, strict=True):
        optimizer = create(name, one, gradient_release=release, lr=0.01, weight_decay=0.1)
        if release:
            oput.prepare_for_gradient_release(one, optimizer)
        optimizers.append((optimizer, torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.75)))
    return stack, optimizers


def differing_under(layout: str, names: list[str]) -> list[str]:
    """The same for the model and the gradients of the conformance harness, some of which are missing in one step."""
    found = []
    for name in names:
        ends = []
        for release in (False, True):
            made = LAYOUTS[layout]()
            params = made.start(start_values(torch.float32))
            options = {"lr": 0.05, "weight_decay": 0.1, **made.options}
            averaged = [p for p in params.values() if p.ndim]  # FSDP2 leaves scalars alone
            optimizer = create(name, averaged, gradient_release=release, **options)
            if release:
                oput.prepare_for_gradient_release(made.module, optimizer)
            for step in range(3):
                made.give(params, gradients(step, torch.float32))
                optimizer.step()
            ends.append(held(made.module, optimizer))
        if apart(ends[1], ends[0]):
            found.append(name)
    return found
