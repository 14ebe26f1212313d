"""Which parameters decay, and which are cast: by layer and original shape, whatever wraps the model."""

from __future__ import annotations

from typing import Any

import optimi
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from oput_dist.layout import clean_name
from tests.pool import Pool


class RotaryTable(nn.Module):
    """Angles, kept by its name in the model or by its class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.linspace(0, 1, 4))
        self.gain = nn.Parameter(torch.ones(1, 4))


class ScaleNorm(nn.Module):
    """A normalisation layer whose weight has two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm(dim=-1, keepdim=True)


class Net(nn.Module):
    """A little of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(8, 4)
        self.RoPE = RotaryTable()
        self.body = nn.Sequential(nn.Linear(4, 4), ScaleNorm(), nn.BatchNorm1d(4))
        self.ln_f = nn.LayerNorm(4)
        self.pos_embed = nn.Parameter(torch.ones(3, 4))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) * self.RoPE.gain + self.pos_embed.sum(0)
        return self.head(self.ln_f(self.body(x)))


SPARED = {"body.0.bias", "body.1.weight", "body.2.weight", "body.2.bias", "ln_f.weight", "ln_f.bias"}
DECAYED = {"wte.weight", "RoPE.gain", "body.0.weight", "pos_embed"}


def names(model: nn.Module, groups: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    known = {id(p): clean_name(name).removeprefix("module.") for name, p in model.named_parameters()}
    first, second = ({known[id(p)] for p in group["params"]} for group in groups)
    return first, second


def test_decay_groups() -> None:
    model = Net()
    groups = oput.param_groups_weight_decay(model, weight_decay=0.1)
    assert names(model, groups) == (SPARED, DECAYED)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1]
    spare = oput.param_groups_weight_decay(model, additional_layers=["pos_embed", nn.Embedding])
    assert names(model, spare) == (SPARED | {"pos_embed", "wte.weight"}, DECAYED - {"pos_embed", "wte.weight"})
    model.wte.requires_grad_(False)
    assert names(model, oput.param_groups_weight_decay(model))[1] == DECAYED - {"wte.weight"}
    oput.AdamW(oput.param_groups_weight_decay(nn.LayerNorm(3)))  # one group is empty


def test_decay_groups_are_those_of_optimi_where_it_sees_norms() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3), nn.Embedding(3, 3))
    found = oput.param_groups_weight_decay(model, 0.1, ["3."])
    wanted = optimi.param_groups_weight_decay(model, 0.1, ["3."])
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["weight_decay"] == theirs["weight_decay"]
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]


def wrapped() -> list[tuple[set[str], set[str]]]:
    """The groups under every wrapper."""

    def fsdp1(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

    wraps = [lambda m: m, DistributedDataParallel, fully_shard, torch.compile, fsdp1]
    found = []
    for wrap in [*wraps, lambda m: torch.compile(DistributedDataParallel(m))]:
        model: Any = wrap(Net())
        found.append(names(model, oput.param_groups_weight_decay(model)))
    return found


def test_decay_groups_under_every_wrapper(pool: Pool) -> None:
    for found in pool.run(2, wrapped):
        assert found == [(SPARED, DECAYED)] * 6


def test_what_went_where_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    oput.param_groups_weight_decay(Net(), 0.1, show=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["parameter", "layer", "axes", "weight", "decay"]
    assert ["body.1.weight", "ScaleNorm", "2", "0"] in [line.split() for line in lines]
    assert ["wte.weight", "Embedding", "2", "0.1"] in [line.split() for line in lines]
    oput.to_low_precision(Net(), show=True)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["RoPE.gain", "parameter", "bfloat16"] in rows
    assert ["RoPE.angles", "buffer", "float32"] in rows


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {clean_name(name): value.dtype for name, value in model.state_dict().items()}


def test_low_precision_keeps_what_needs_more() -> None:
    model = Net()
    parameters, half = list(model.parameters()), torch.bfloat16
    assert oput.to_low_precision(model) is model
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    kept = {name for name, dtype in dtypes(model).items() if dtype == torch.float32}
    assert kept == {"wte.weight", "head.weight", "RoPE.angles"}  # the head is the embedding; RoPE in any case
    assert model.body[2].num_batches_tracked.dtype == torch.int64
    assert model.body[2].running_mean.dtype == model.body[0].weight.dtype == half
    other = oput.to_low_precision(Net(), torch.float16, "cpu", (nn.LayerNorm, nn.BatchNorm1d), RotaryTable)
    kept = {name for name, dtype in dtypes(other).items() if dtype == torch.float32}
    norms = {"ln_f.weight", "ln_f.bias", "body.2.weight", "body.2.bias", "body.2.running_mean", "body.2.running_var"}
    assert kept == {*norms, "RoPE.angles"}
    everything = oput.to_low_precision(Net(), fp32_modules=None, fp32_buffers=None)
    assert set(dtypes(everything).values()) == {half, torch.int64}


def test_low_precision_is_that_of_optimi_where_nothing_is_shared() -> None:
    class Lower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rope, self.embed, self.rest = RotaryTable(), nn.Embedding(3, 4), nn.BatchNorm1d(4)

    for options in ({}, {"fp32_modules": nn.BatchNorm1d}, {"fp32_buffers": None}, {"fp32_buffers": (RotaryTable,)}):
        torch.manual_seed(0)
        found = oput.to_low_precision(Lower(), **options).state_dict()
        torch.manual_seed(0)
        wanted = optimi.to_low_precision(Lower(), **options).state_dict()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)


def cast_under(kind: str) -> bool:
    wrap = {
        "ddp": DistributedDataParallel,
        "fsdp2": fully_shard,
        "fsdp1": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
    }[kind]
    model: Any = wrap(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="call to_low_precision first"):
        oput.to_low_precision(model)
    return all(p.dtype == torch.float32 for p in model.parameters())


def compiled_after_the_cast() -> None:
    model = oput.to_low_precision(torch.compile(Net()))
    assert dtypes(model) == dtypes(oput.to_low_precision(Net()))


def test_low_precision_under_wrappers(pool: Pool) -> None:
    compiled_after_the_cast()
    for kind in ("ddp", "fsdp2", "fsdp1"):
        assert pool.run(2, cast_under, kind) == [True, True]


def test_bad_input() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"dtype=torch\.float64 is not allowed"):
        oput.to_low_precision(model, torch.float64)
    with pytest.raises(TypeError, match="fp32_modules='norm' is not allowed: each must be a class"):
        oput.to_low_precision(model, fp32_modules="norm")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"fp32_buffers=\(3,\) is not allowed"):
        oput.to_low_precision(model, fp32_buffers=(3,))  # type: ignore[arg-type]
    assert model.weight.dtype == torch.float32
    with pytest.raises(TypeError, match=r"must be the nn\.Module"):
        oput.param_groups_weight_decay(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_decay=-1"):
        oput.param_groups_weight_decay(model, -1)
    with pytest.raises(TypeError, match="additional_layers: 3 is not allowed"):
        oput.param_groups_weight_decay(model, additional_layers=[3])  # type: ignore[list-item]
    with pytest.warns(UserWarning, match="'wieght' matches no parameter"):
        oput.param_groups_weight_decay(model, additional_layers="wieght")
