"""State in host memory: no trajectory changes by a bit, and what is saved, copied and reported is as ever.

What needs a GPU are streams and pinned memory (``python -m benchmarks.gpu``). All else runs here, where a ``Home``
serves the CPU: state is apart from the parameters, and comes and goes wave by wave.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

import oput_dist as oput
from benchmarks import hosting_checks
from benchmarks.checks import Setup
from oput_dist.backends import Carrier
from oput_dist.engine.hosted import Home, Hosted
from oput_dist.engine.waves import WAVE
from tests.conformance import Case, faults
from tests.pool import Pool
from tests.test_conformance import BY_NAME

APART = Home("cpu")
SHAPES = [(70, 60), (9,), (33, 40), (), (128, 24), (5, 4, 3, 3)]


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"p{i}", nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for i, s in enumerate(SHAPES)]


def give_gradients(params: Any, step: int) -> None:
    """One parameter has none now and then."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, (_, p) in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if i == 2 and step == 1:
            p.grad = None


def trained(
    name: str, steps: int = 3, dtype: torch.dtype = torch.float32, params: Any = None, **options: Any
) -> tuple[list[tuple[str, nn.Parameter]], Any]:
    params = params or parameters(dtype)
    optimizer = oput.create(name, params, lr=1e-2, backend="foreach", **options)
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return params, optimizer


def same(a: Any, b: Any) -> bool:
    """Whether structures of tensors are the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


ELEMENTWISE = ["adamw", "lion", "adan", "adamwschedulefree", "madgrad", "sophiag", "muon", "prodigy"]
LOW = [{}, {"kahan_sum": False}, {"stochastic_rounding": True}, {"state_dtype": torch.float32}]
FORMS = [
    *((torch.float32, name, {}) for name in [*ELEMENTWISE, "lamb", "adafactor", "adamp", "soap", "shampoo"]),
    *((torch.float32, name, {"cautious": True, "weight_decay": 0.1}) for name in ("adamw", "lamb")),
    *((torch.float32, name, {"state_dtype": "int8", "state_overrides": {"*": "int8"}}) for name in ("adamw", "lamb")),
    (torch.float32, "adan", {"state_dtype": {"exp_avg": "int4", "exp_avg_sq": "bf16"}}),
    *((torch.bfloat16, name, options) for name in ("adamw", "lamb", "adamp") for options in LOW),
    (torch.bfloat16, "adamw", {"state_dtype": "int8", "state_overrides": {"*": "int8"}}),
]


@pytest.mark.parametrize(("dtype", "name", "options"), FORMS, ids=str)
def test_no_bit_changes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str, options: Any) -> None:
    """In several waves, whose borders cut parameters of what takes no norms."""
    options = {"block_size": 32, **options} if name in ("soap", "shampoo") else options
    norms = name in ("lamb", "adamp", "adafactor", "prodigy") or "cautious" in options
    monkeypatch.setitem(WAVE, "cpu", 4200 if norms else 512)
    plain, near = trained(name, dtype=dtype, **options)
    params, optimizer = trained(name, dtype=dtype, state_device=APART, **options)
    for (_, p), (_, q) in zip(plain, params, strict=True):
        assert torch.equal(p, q)
    assert same(near.state_dict(), optimizer.state_dict())
    assert same(oput.full_state_dict(near), oput.full_state_dict(optimizer))
    names = {key for key in optimizer.state_dict()["state"][0] if key != "step"}
    shaped = optimizer.recipe(optimizer.param_groups[0], params[0][1].shape).state
    kept = optimizer.state[params[0][1]]
    assert {key for key in names if isinstance(kept[key], Hosted)} == {*shaped, *(names & {"kahan_comp"})}


CODED = {"state_dtype": "int8", "state_overrides": {"*": "int8"}}


def hosted(case: Case, **options: Any) -> Case:
    """A case whose state is apart from the parameters."""
    return replace(case, options={**case.options, "state_device": APART, **options}, partly=False)


FEW = [hosted(BY_NAME[name]) for name in ("adamw", "lion", "lamb", "adafactor")]
FEW += [hosted(BY_NAME[name], **CODED) for name in ("adamw", "lamb")]


@pytest.mark.parametrize(("layout", "n"), [("fsdp2", 2), ("zero1", 2), ("fsdp1-flat", 2), ("fsdp2-tp", 4)])
def test_sharding_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    """The blocks of codes are cut by shards here, and several originals are in one flat parameter."""
    cases = [*FEW, *([hosted(BY_NAME["soap"])] if layout == "fsdp1-flat" else [])]  # has other state under one name
    found = faults(pool, layout, n, list(itertools.product(cases, [torch.float32], ["foreach"])))
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------------------- what else a step is


def test_steps_that_accumulate_or_are_skipped() -> None:
    ends = []
    for where in (None, APART):
        params, optimizer = trained("adamw", 2, torch.bfloat16, state_device=where, skip_nonfinite=True)
        optimizer.optimizer_accumulation = True
        before = [p.detach().clone() for _, p in params]
        give_gradients(params, 2)
        optimizer.step()
        assert same(before, [p.detach() for _, p in params])
        params[0][1].grad[0, 0] = float("nan")
        optimizer.optimizer_accumulation = False
        optimizer.step()
        assert optimizer.skipped == 1
        give_gradients(params, 3)
        optimizer.step()
        ends.append(([p.detach() for _, p in params], optimizer.state_dict()["state"]))
    assert same(*ends)


def test_gradient_release_is_the_plain_step() -> None:
    ends = []
    for where in (None, APART):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))
        optimizer = oput.Lamb(model, lr=1e-2, gradient_release=where is not None, state_device=where)
        if where is not None:
            oput.prepare_for_gradient_release(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
        ends.append(list(model.parameters()))
    assert same(*ends)


def switched(optimizer: Any, params: Any) -> list[Any]:
    """What schedule-free optimizers show in evaluation, in which parameters are rewritten from the state."""
    seen = []
    for method in (optimizer.eval, optimizer.train):
        method()
        seen.append([p.detach().clone() for _, p in params])
    return seen


def estimated(optimizer: Any, params: Any) -> list[Any]:
    """What an estimate of the Hessian, folded into the state, makes of the next step."""
    optimizer.update_hessian(4)
    give_gradients(params, 7)
    optimizer.step()
    return [*(p.detach() for _, p in params), *optimizer.report()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "work"), [("adamwschedulefree", switched), ("sophiag", estimated)])
def test_what_reads_and_writes_state_between_steps(name: str, work: Any, dtype: torch.dtype) -> None:
    found = []
    for where in (None, APART):
        params, optimizer = trained(name, dtype=dtype, state_device=where)
        found.append([work(optimizer, params), optimizer.state_dict()["state"]])
    assert same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrappers(dtype: torch.dtype) -> None:
    """Lookahead carries on what rounding lost, which is on the host; the others keep copies of their own."""
    ends = []
    for where in (None, APART):
        params = parameters(dtype)
        inner = oput.AdamW(params, lr=1e-2, backend="foreach", state_device=where)
        optimizer = oput.EMA(oput.Lookahead(inner, k=2), decay=0.9)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
        ends.append((optimizer.state_dict()["state"], [p.detach() for _, p in params]))
    assert same(*ends)


# ----------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"state_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize(("first", "then"), [(APART, APART), (APART, None), (None, APART)], ids=["both", "off", "on"])
def test_training_goes_on_from_a_checkpoint(tmp_path: Any, first: Any, then: Any, options: dict[str, Any]) -> None:
    """With the option or without: it is not part of the format."""
    straight, _ = trained("adamw", 5, torch.bfloat16, **options)
    params, optimizer = trained("adamw", 3, torch.bfloat16, state_device=first, **options)
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    other = oput.AdamW(params, lr=1e-2, backend="foreach", state_device=then, **options)
    other.load_state_dict(torch.load(tmp_path / "saved"))
    kept = [value for name, value in other.state[params[0][1]].items() if name != "step"]
    assert all(isinstance(value, Hosted) == (then is not None) for value in kept)
    for step in range(3, 5):
        give_gradients(params, step)
        other.step()
    assert same([p for _, p in straight], [p for _, p in params])


def dcp_round_trip(folder: str) -> list[bool]:
    """Under FSDP2: what torch.distributed.checkpoint saves loads without the option, and back; and replicas agree."""
    torch.manual_seed(0)
    ends = []
    for where in (APART, None, APART):
        model = nn.Sequential(nn.Linear(37, 31), nn.Tanh(), nn.Linear(31, 37))
        fully_shard(model)
        optimizer = oput.AdamW(model, lr=1e-2, state_device=where, **CODED)
        if ends:
            state = get_optimizer_state_dict(model, optimizer)
            dcp.load(state, checkpoint_id=folder)
            set_optimizer_state_dict(model, optimizer, state)
        else:
            model(torch.ones(3, 37)).sum().backward()
            optimizer.step()
            dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder)
        oput.check_replicas(optimizer)
        ends.append(oput.full_state_dict(optimizer)["state"])
    return [same(ends[0], end) for end in ends] + [any(bool(v.any()) for v in ends[0][0].values())]


def test_torch_distributed_checkpoint(pool: Pool, tmp_path: Any) -> None:
    for rank in pool.run(2, dcp_round_trip, str(tmp_path)):
        assert all(rank)


def test_copies_and_pickles_go_on() -> None:
    straight, _ = trained("adamw", 4, **CODED)
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        params, optimizer = copied(trained("adamw", 3, state_device=APART, **CODED))
        give_gradients(params, 3)
        optimizer.step()
        assert same([p for _, p in straight], [p for _, p in params])
        assert isinstance(optimizer.state[params[0][1]]["exp_avg"], Hosted)


def test_groups_may_be_added() -> None:
    ends = []
    for where in (None, APART):
        params = parameters()
        _, optimizer = trained("adamw", 2, params=params[:3], state_device=where)
        optimizer.add_param_group({"params": params[3:]})
        give_gradients(params, 2)
        optimizer.step()
        ends.append([p for _, p in params])
    assert same(*ends)


@pytest.mark.parametrize("options", [{}, CODED], ids=["numbers", "codes"])
def test_state_comes_along_where_it_need_not_travel_any_more(options: dict[str, Any]) -> None:
    """A model that was moved to the CPU, or an optimizer that was unpickled there."""
    straight, _ = trained("adamw", 4, **options)
    params, optimizer = trained("adamw", 3, state_device=APART, **options)
    optimizer._options = replace(optimizer._options, home=Home("cuda"))
    give_gradients(params, 3)
    optimizer.step()
    assert same([p for _, p in straight], [p for _, p in params])
    assert not any(isinstance(value, Hosted) for value in optimizer.state[params[0][1]].values())


def test_state_of_another_shard_is_found() -> None:
    params, optimizer = trained("adamw", 1, state_device=APART)
    optimizer.state[params[0][1]]["exp_avg"] = Hosted(torch.zeros(7), params[0][1].device)
    give_gradients(params, 1)
    before = [p.detach().clone() for _, p in params]
    with pytest.raises(ValueError, match=r"'p0' has 7 elements here, but its piece 4200: .*make the optimizer anew"):
        optimizer.step()
    assert same(before, [p.detach() for _, p in params])


# ---------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("options", "each", "room"),
    [({}, 8, 8 * 1024), ({"state_dtype": torch.bfloat16}, 4, 4 * 1024), (CODED, None, 2 * 5.1 * 9 * 256)],
    ids=["float32", "bfloat16", "int8"],
)
def test_bytes(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], each: int | None, room: float) -> None:
    """What is on the host is all state but step counters; what is kept on the device is room for two waves."""
    monkeypatch.setitem(WAVE, "cpu", 1024)
    params, optimizer = trained("adamw", state_device=Home("cpu"), **options)
    told, numel = oput.memory(optimizer), sum(p.numel() for _, p in params)
    assert told.state == 4 * len(SHAPES)
    assert told.host == oput.state_bytes(optimizer) - told.state
    assert each is None or told.host == each * numel
    spaces = [space.memory.numel() for space in optimizer.options.home.carrier(torch.device("cpu"))._spaces]
    assert all(0 < space <= room + 2 * 16 * len(SHAPES) for space in spaces)
    assert told.scratch >= sum(spaces)
    assert f"on host {told.host:,} B" in " ".join(str(told).split())
    assert told.total == told.parameters + told.gradients + told.state + told.scratch
    shapes = {f"p{i}": shape for i, shape in enumerate(SHAPES)}
    planned = oput.plan(shapes, "adamw", layout="ddp", state_device="cpu", **options)
    assert planned.host_bytes.most == told.host
    assert planned.state_bytes.most == told.state
    assert planned.whole_state_bytes == told.host + told.state
    assert planned.state_share == 1
    assert planned.seconds["state from the host"] == told.host / oput.Machine().host_rate
    assert "state on host" in str(planned)


def test_a_carrier_copies_in_order_and_keeps_its_spaces() -> None:
    carrier, host = Carrier(torch.device("cpu")), torch.arange(40, dtype=torch.uint8)
    seen = []
    for start in range(0, 40, 10):
        space = carrier.reserve(10)
        carrier.bring(space, [(host[start : start + 10], space.memory[:10])], [])
        carrier.arrive(space)
        space.memory[:10] += 1
        carrier.take(space, [(host[start : start + 10], space.memory[:10])])
        seen.append(space.memory.data_ptr())
    assert torch.equal(host, torch.arange(1, 41, dtype=torch.uint8))
    assert len(set(seen)) == 2
    assert seen[:2] == seen[2:]
    assert carrier.reserve(30).memory.numel() == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_for_gpus_runs(dtype: torch.dtype) -> None:
    setup = Setup(torch.device("cpu"), dtype, backend="foreach")
    for options in ({}, {"state_dtype": "int8"}):
        assert hosting_checks.hosted_steps("adamw", setup, 1, 3, options).ok


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cpu", r"AdamW: state_device='cpu' is for parameters on a GPU, but these are on cpu.*leave state_device out"),
        (torch.device("cpu"), r"state_device='cpu' is for parameters on a GPU"),
        ("gpu", r"state_device='gpu' is not allowed: must be None.*or 'cpu'.* Did you mean 'cpu'\?"),
        ("cuda:1", r"state_device='cuda:1' is not allowed: must be None"),
    ],
)
def test_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oput.AdamW(parameters(), state_device=given)


def test_groups_have_no_place_of_their_own() -> None:
    with pytest.raises(ValueError, match="state_device holds for the whole optimizer"):
        oput.AdamW([{"params": parameters(), "state_device": "cpu"}])


def test_lookahead_does_not_change_momentum_on_the_host() -> None:
    with pytest.raises(ValueError, match=r"state_device= of AdamW.*inner_state='keep'"):
        oput.Lookahead(oput.AdamW(parameters(), state_device=APART), inner_state="pullback")
