"""Named configurations of ``oput.create``: their settings, and what their decay spares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import oput_dist as oput
from tests.pool import Pool

SETTINGS: dict[str, tuple[type[oput.Optimizer], dict[str, Any]]] = {  # as the list of configurations has them
    "ranger_gc": (oput.Ranger, {"use_gc": True}),
    "ranger_nogc": (oput.Ranger, {"use_gc": False}),
    "rangeradabelief_gc": (oput.RangerAdaBelief, {"use_gc": True}),
    "rangeradabelief_nogc": (oput.RangerAdaBelief, {"use_gc": False}),
    "sgd_plain": (oput.SGD, {"momentum": 0.0, "nesterov": False, "decouple_wd": True}),
    "sgd_momentum": (oput.SGD, {"momentum": 0.9, "nesterov": False, "decouple_wd": True}),
    "sgd_nesterov": (oput.SGD, {"momentum": 0.9, "nesterov": True, "decouple_wd": True}),
    "rmsprop_momentum": (oput.RMSprop, {"momentum": 0.9, "decouple_wd": True}),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.ln_f = nn.LayerNorm(4)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)
        self.scales = nn.Parameter(torch.ones(2, 4))  # a matrix outside of any normalisation layer


DECAYS = {"embedding.weight", "conv.weight", "head.weight", "scales"}


def spared(optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    return {
        name: group["weight_decay"] == 0
        for group in optimizer.param_groups
        for name in group.get("param_names", range(len(group["params"])))
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_and_decay(name: str) -> None:
    cls, settings = SETTINGS[name]
    optimizer = oput.create(name.upper().replace("_", "-"), Net(), weight_decay=0.1)
    assert type(optimizer) is cls
    for group in optimizer.param_groups:
        assert {key: group[key] for key in settings} == settings
    assert {key for key, zero in spared(optimizer).items() if not zero} == DECAYS
    assert len(spared(optimizer)) == len(list(Net().named_parameters()))


def test_all_are_listed() -> None:
    assert set(SETTINGS) == {name for name in oput.available() if "_" in name}
    with pytest.raises(ValueError, match=r"'sgd_nesterov'"):
        oput.create("sgd_nestrov", Net())


def test_what_the_caller_gives_comes_first() -> None:
    optimizer = oput.create("sgd_momentum", Net(), momentum=0.5, lr=0.3)
    assert {(group["momentum"], group["lr"]) for group in optimizer.param_groups} == {(0.5, 0.3)}


def test_other_ways_to_give_parameters() -> None:
    named = oput.create("sgd_plain", list(Net().named_parameters()), weight_decay=0.1)
    assert {key for key, zero in spared(named).items() if not zero} == DECAYS
    bare = oput.create("sgd_plain", Net().parameters(), weight_decay=0.1)
    assert [len(group["params"]) for group in bare.param_groups] == [4, 6]
    only = oput.create("sgd_plain", [nn.Parameter(torch.ones(3))], weight_decay=0.1)
    assert [group["weight_decay"] for group in only.param_groups] == [0.0]
    with pytest.raises(ValueError, match="makes parameter groups of its own"):
        oput.create("sgd_plain", [{"params": list(Net().parameters())}])


def spared_when_wrapped(kind: str) -> Any:
    net: nn.Module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    if kind == "fsdp2":
        fully_shard(net)
    elif kind != "plain":
        orig = kind == "fsdp1"
        net = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=orig)
    try:
        optimizer = oput.create("sgd_nesterov", net, lr=0.1, weight_decay=0.1)
    except ValueError as error:
        return str(error)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return spared(optimizer)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_the_same_after_wrapping(pool: Pool, kind: str) -> None:
    (wanted,) = pool.run(1, spared_when_wrapped, "plain")
    assert wanted == {"0.weight": False, "0.bias": True, "1.weight": True, "1.bias": True}
    assert pool.run(2, spared_when_wrapped, kind) == [wanted] * 2


def bare_parameters_of_fsdp1() -> str:
    net = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="needs the wrapped module in their place") as error:
        oput.create("sgd_momentum", net.parameters(), weight_decay=0.1)
    return str(error.value)


def test_bare_parameters_of_fsdp1_are_refused(pool: Pool) -> None:
    assert all(pool.run(2, bare_parameters_of_fsdp1))


def test_a_flat_parameter_of_both_kinds_is_refused(pool: Pool) -> None:
    for message in pool.run(2, spared_when_wrapped, "fsdp1-flat"):
        assert (
            "holds '0.bias' and '0.weight', which differ in decay: wrap the module with use_orig_params=True" in message
        )
