"""Replicas share whole matrices: DDP and FSDP1 against one process, and who works on what."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from tests.counting import NAMES, OPTIONS, assert_same_state, owned_bytes, sent, worked
from tests.meshes import world_mesh
from tests.parity import pull
from tests.pool import Pool

WIDTHS = [8, 12, 8, 4, 12, 8, 12, 4, 8]  # eight layers, in square blocks, so that no null space is left to chance


class Net(nn.Module):
    """Linear layers, of which some may be left out; doubles, so that only mistakes show."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS))
        self.double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3

    def forward(self, x: Tensor, without: int | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) if i != without else x.repeat(1, 3)[:, : WIDTHS[i + 1]]
        return x.square().sum(1).mean()


def batch(step: int) -> Tensor:
    return torch.randn(12, WIDTHS[0], generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    start = list(Net().parameters())
    assert min((w - p).abs().max().item() for w, p in zip(wanted, start, strict=True)) > 1e-3
    return max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True))


# ------------------------------------------------------------------------------------------------- DDP, step after step

STEPS = 6


def trained(name: str, how: str) -> dict[str, Any]:
    """Six steps on this rank's part of each batch: in the third a layer is left out, in the fourth another on rank 0
    alone, in the fifth one is frozen, and the sixth has two micro-batches."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if how != "alone" else (1, 0)
    net = Net()
    module = net if how == "alone" else DistributedDataParallel(net, find_unused_parameters=True)
    given: Any = net.parameters() if how == "bare" else module
    optimizer = oput.create(name, given, **OPTIONS[name])
    with worked() as counted, sent() as bytes_sent:
        for step in range(STEPS):
            net.layers[5].weight.requires_grad_(step != 4)
            optimizer.zero_grad()
            own = batch(step).chunk(ranks)[rank]
            if step == 5:
                with module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext():
                    (module(own) / 2).backward()
                (module(own.flip(1)) / 2).backward()
            elif step == 3:
                _one_rank_without(module, net, own, ranks)
            else:
                module(own, 2 if step == 2 else None).backward()
            optimizer.step()
    return {
        "parameters": [p.detach().clone() for p in net.parameters()],
        "worked": sum(counted),
        "sent": bytes_sent,
        "owned": owned_bytes(optimizer),
        "whole": oput.full_state_dict(optimizer),
        "saved": optimizer.state_dict(),
    }


def _one_rank_without(module: nn.Module, net: Net, own: Tensor, ranks: int) -> None:
    """A layer that the first part of the batch leaves out."""
    if ranks > 1:
        module(own, 6 if dist.get_rank() == 0 else None).backward()
    else:
        parts = own.chunk(PARTS)
        (sum(net(part, 6 if i == 0 else None) for i, part in enumerate(parts)) / PARTS).backward()


PARTS = 2


@pytest.mark.parametrize("name", NAMES)
def test_replicas_work_on_each_matrix_once_and_end_where_one_process_does(pool: Pool, name: str) -> None:
    alone = trained(name, "alone")
    ranks = pool.run(PARTS, trained, name, "module")
    assert sum(rank["worked"] for rank in ranks) == alone["worked"] > STEPS
    assert max(rank["worked"] for rank in ranks) < 0.7 * alone["worked"]
    for rank in ranks:
        assert apart(rank["parameters"], alone["parameters"]) < 1e-10
        assert all(torch.equal(a, b) for a, b in zip(rank["parameters"], ranks[0]["parameters"], strict=True))
        assert rank["sent"]["all-to-all"] == 0  # owners hold what they work on
        assert rank["sent"]["all-gather"] > 0
        assert_same_state(rank["whole"], alone["whole"])
        assert_same_state(rank["saved"], alone["saved"])
    assert sum(rank["owned"] for rank in ranks) == alone["owned"]
    assert alone["owned"] == 0 if name == "muon" else max(rank["owned"] for rank in ranks) < 0.6 * alone["owned"]


@pytest.mark.parametrize("name", NAMES)
def test_from_bare_parameters_each_replica_works_on_all_and_tells_nobody(pool: Pool, name: str) -> None:
    alone = trained(name, "alone")
    for rank in pool.run(PARTS, trained, name, "bare"):
        assert rank["worked"] == alone["worked"]
        assert rank["sent"] == {"all-to-all": 0, "all-gather": 0, "calls": 0}
        assert apart(rank["parameters"], alone["parameters"]) < 1e-10


def test_what_replicas_tell_each_other_is_each_matrix_once(pool: Pool) -> None:
    """All ranks send as much as the fullest, since gloo gathers equal sizes only."""
    for n in (2, 3):
        elements = sum(a * b for a, b in itertools.pairwise(WIDTHS))
        for told in pool.run(n, one_step, "muon"):
            assert 8 * elements / n * (n - 1) <= told["all-gather"] < 1.3 * 8 * elements / n * (n - 1)


def one_step(name: str) -> dict[str, int]:
    module = DistributedDataParallel(Net())
    optimizer = oput.create(name, module, **OPTIONS[name])
    module(batch(0)).backward()
    with sent() as found:
        optimizer.step()
    return found


# ------------------------------------------------------------------------------------------- replicas that do not agree


def odd_replicas(name: str) -> dict[str, Any]:
    """Gradients that one replica alone lacks, or has spoiled, as no wrapper leaves them: nobody waits for ever."""
    found: dict[str, Any] = {}
    for what in ("none", "nan", "skipped", "overflow", "created"):
        module = DistributedDataParallel(Net())
        options = {**OPTIONS[name], "skip_nonfinite": what == "skipped"}
        if what == "created":
            options["lr"] = 0.0
        optimizer: Any = oput.create(name, module, **options)
        module(batch(0)).backward()
        odd, weight = dist.get_rank() == 1, module.module.layers[3].weight
        if what == "none" and odd:
            weight.grad = None
        if what in ("nan", "skipped") and odd:
            weight.grad[0, 0] = torch.nan
        if what == "overflow":
            optimizer.found_inf = torch.tensor(float(odd))
        if what == "created" and odd:
            module.zero_grad(set_to_none=False)
        optimizer.step()
        found[what] = optimizer.outcome.name
    return found


@pytest.mark.parametrize("name", NAMES)
def test_replicas_that_do_not_agree_go_on_alike(pool: Pool, name: str) -> None:
    for found in pool.run(2, odd_replicas, name):
        assert found == {
            "none": "DONE",
            "nan": "DONE",
            "skipped": "SKIPPED",
            "overflow": "SKIPPED",
            "created": "DONE",
        }


# ---------------------------------------------------------------------------------------------------------- checkpoints


def halves(name: str, how: str, saved: bytes | None, steps: range) -> tuple[bytes, list[Tensor]]:
    """Some steps from where others stopped; what the first rank saves, and where it arrived."""
    net = Net()
    module: Any = net
    if how == "ddp":
        module = DistributedDataParallel(net)
    elif how == "fsdp2":
        module = fully_shard(net, mesh=world_mesh((dist.get_world_size(),)))
    optimizer = oput.create(name, module, **{**OPTIONS[name], **({} if saved is None else {"lr": 9.0})})
    if saved is not None:
        before = torch.load(io.BytesIO(saved), weights_only=True)
        with torch.no_grad():
            for p, value in zip(net.parameters(), before["model"], strict=True):
                p.copy_(value if how != "fsdp2" else distribute_tensor(value, p.device_mesh, p.placements))  # type: ignore[attr-defined]
        optimizer.load_state_dict(before["optimizer"])
    for step in steps:
        optimizer.zero_grad()
        module(batch(step)).backward()
        optimizer.step()
    ends = [p.detach() if how != "fsdp2" else p.full_tensor().detach() for p in net.parameters()]  # type: ignore[attr-defined]
    state = optimizer.state_dict() if how == "ddp" else oput.full_state_dict(optimizer)
    buffer = io.BytesIO()
    torch.save({"model": [end.clone() for end in ends], "optimizer": state}, buffer)
    return buffer.getvalue(), ends


@pytest.mark.parametrize("name", NAMES)
def test_what_one_replica_saved_goes_on_anywhere(pool: Pool, name: str) -> None:
    """Its state dict is that of one process, though all ranks had a part in making it."""
    wanted = halves(name, "alone", None, range(6))[1]
    saved = {"ddp": pool.run(3, halves, name, "ddp", None, range(3))[0][0]}
    saved["alone"] = halves(name, "alone", None, range(3))[0]
    saved["fsdp2"] = pool.run(2, halves, name, "fsdp2", None, range(3))[0][0]
    assert apart(halves(name, "alone", saved["ddp"], range(3, 6))[1], wanted) < 1e-10
    for source, n, how in (("ddp", 2, "ddp"), ("alone", 3, "ddp"), ("fsdp2", 2, "ddp"), ("ddp", 2, "fsdp2")):
        for _, found in pool.run(n, halves, name, how, saved[source], range(3, 6)):
            assert apart(found, wanted) < 1e-10, (source, n, how)


def one_rank_with_other(name: str, what: str) -> str:
    """A state dict of which one replica has lost something, or has something more."""
    module = DistributedDataParallel(Net())
    optimizer: Any = oput.create(name, module, **OPTIONS[name])
    module(batch(0)).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    if dist.get_rank() == 1 and what == "lacks 'factor_0'":
        del saved["state"][0]["factor_0"]
    elif dist.get_rank() == 1:
        saved["state"][0]["odd"] = torch.ones(3)
    with pytest.raises(ValueError, match=what) as error:
        optimizer.load_state_dict(saved)
    return str(error.value)


@pytest.mark.parametrize("what", ["lacks 'factor_0'", "has 'odd'"])
@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_all_replicas_refuse_what_one_of_them_cannot_load(pool: Pool, name: str, what: str) -> None:
    first, second = pool.run(2, one_rank_with_other, name, what, timeout=60.0)
    assert "because of rank 1" in first
    assert "because of" not in second


def saved_by_one_rank() -> bool:
    """Muon keeps nothing at owners, so that one replica alone can save, and before the first step too."""
    module = DistributedDataParallel(Net())
    optimizer = oput.Muon(module)
    for _ in range(2):
        if dist.get_rank() == 0:
            optimizer.state_dict()
            oput.full_state_dict(optimizer)
        module(batch(0)).backward()
        optimizer.step()
    return True


def test_one_replica_alone_saves_muon(pool: Pool) -> None:
    assert all(pool.run(2, saved_by_one_rank, timeout=30.0))


def copied_on_rank() -> float:
    """How far copies of module and optimizer end from the originals."""
    module = DistributedDataParallel(Net())
    optimizer: Any = oput.Shampoo(module, **OPTIONS["shampoo"])
    ends = []
    for step in range(3):
        module(batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(TypeError, match=r"shares its work over the ranks of DistributedDataParallel cannot be pickled"):
        pickle.dumps(optimizer)
    twin = copy.deepcopy(optimizer)
    for one in (optimizer, twin):
        params = [p for group in one.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, 3)
        one.step()
        ends.append(params)
    return max((a - b).abs().max().item() for a, b in zip(*ends, strict=True))


def test_copies_share_on(pool: Pool) -> None:
    assert pool.run(2, copied_on_rank) == [0.0, 0.0]


def wrapped_run(how: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Lookahead around Shampoo, with a group that comes later; saved whole, loaded and gone on."""
    net = Net()
    module = net if how == "alone" else DistributedDataParallel(net)
    small = [2, 3, 6, 7]
    first = [p for i in small for p in net.layers[i].parameters()]
    later = [p for i in {*range(8)} - {*small} for p in net.layers[i].parameters()]
    options = {**OPTIONS["shampoo"], "block_size": None}
    whole: dict[str, Any] = {}

    def made() -> Any:
        return oput.Lookahead(oput.Shampoo(first, **options, module=module), k=2)

    optimizer = made()
    for step in range(6):
        if step == 2:
            optimizer.add_param_group({"params": later})
        if step == 4:
            whole = oput.full_state_dict(optimizer)
            optimizer = made()
            optimizer.add_param_group({"params": later})
            optimizer.load_state_dict(whole)
        optimizer.zero_grad()
        module.zero_grad()
        module(batch(step)).backward()
        optimizer.step()
    return whole, [p.detach().clone() for p in net.parameters()]


def test_wrappers_know_what_replicas_share(pool: Pool) -> None:
    whole, wanted = wrapped_run("alone")
    for found, ends in pool.run(2, wrapped_run, "ddp"):
        assert_same_state(found, whole)
        assert apart(ends, wanted) < 1e-10


# ----------------------------------------------------------------------------------------------------- FSDP1's replicas


def with_fsdp1(name: str, strategy: str) -> tuple[int, int, list[Tensor]]:
    kind = ShardingStrategy[strategy]
    mesh = world_mesh((2, 2) if kind is ShardingStrategy.HYBRID_SHARD else (dist.get_world_size(),))
    module = FullyShardedDataParallel(
        Net(), device_mesh=mesh, device_id=torch.device("cpu"), sharding_strategy=kind, use_orig_params=True
    )
    optimizer = oput.create(name, module, **OPTIONS[name])
    with worked() as counted:
        for step in range(3):
            optimizer.zero_grad()
            module(batch(step).chunk(dist.get_world_size())[dist.get_rank()]).backward()
            optimizer.step()
    own = owned_bytes(optimizer) if name != "muon" else 0
    whole = oput.full_state_dict(optimizer)
    optimizer.load_state_dict(whole)
    with FullyShardedDataParallel.summon_full_params(module):
        return sum(counted), own, [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("strategy", ["HYBRID_SHARD", "NO_SHARD"])
@pytest.mark.parametrize("name", ["muon", "shampoo"])
def test_replicas_of_fsdp1_share_too(pool: Pool, name: str, strategy: str) -> None:
    net = Net()
    alone = oput.create(name, net, **OPTIONS[name])
    with worked() as counted:
        for step in range(3):
            alone.zero_grad()
            net(batch(step)).backward()
            alone.step()
    ranks = pool.run(4, with_fsdp1, name, strategy)
    assert sum(rank[0] for rank in ranks) == sum(counted)
    for _, own, found in ranks:
        assert apart(found, list(net.parameters())) < 1e-10
        assert own <= 0.5 * owned_bytes(alone)
