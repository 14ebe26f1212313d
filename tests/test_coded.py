"""State in few bits: the maps, the bytes, what refuses, checkpoints, and what else a step can be."""

from __future__ import annotations

import copy
from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from torch import nn

import oput_dist as oput
from benchmarks import coding_checks
from benchmarks.checks import Setup
from oput_dist.backends import backend, coding
from oput_dist.backends.coding import decode, encode
from oput_dist.engine.coded import Coded
from oput_dist.engine.waves import WAVE
from oput_dist.kernels.codes import FORMATS, Format, format_of
from oput_dist.kernels.native import native
from tests.test_kernels import CPU, run
from tests.test_memory import allocated

NAMES = [f"{code.name}-{'signed' if code.signed else 'unsigned'}" for code in FORMATS]


def dynamic_map(decades: int, signed: bool) -> torch.Tensor:
    """The dynamic map of OPTIMIZERS.md section 5, ascending: middles of equal cells of each decade, 0 and 1."""
    values = [0.0, 1.0]
    for i in range(decades):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**i + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - decades + 1)).tolist()
        values += middles + [-x for x in middles] * signed
    return torch.tensor(sorted(values), dtype=torch.float64)


def values_of(code: Format) -> torch.Tensor:
    """All values of a format, by code."""
    if code == format_of("fp8", False):
        mantissas = 1 + torch.arange(8, dtype=torch.float64) / 8
        values = torch.cat([mantissas * 2.0**exponent for exponent in range(-33, 1)])
        return torch.cat([torch.zeros(1, dtype=torch.float64), values[values <= 1][-255:]])
    if code.name == "fp8":
        codes = torch.arange(256, dtype=torch.uint8)
        return codes.view(torch.float8_e4m3fn).double() / 448
    if code == format_of("int4", False):
        return torch.arange(1, 17, dtype=torch.float64) / 16
    return dynamic_map(7 if code.name == "int8" else 3, code.signed)


def blocks(code: Format, count: int = 40, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(count, code.block, generator=torch.Generator().manual_seed(seed))
    drawn = drawn * drawn.roll(1, 1).exp() * 10.0 ** torch.arange(-20, count - 20).clamp(-12, 12).unsqueeze(1)
    drawn[1] = 0.0
    return drawn if code.signed else drawn.abs()


def coded(code: Format, values: torch.Tensor, name: str = "eager") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales = torch.empty(len(values), code.width, dtype=torch.uint8), torch.empty(len(values))
    encode(backend(name), [(code, codes, scales, values)])
    out = torch.empty_like(values)
    decode(backend(name), [(code, codes, scales, out)])
    return codes, scales, out


def unpacked(code: Format, codes: torch.Tensor) -> torch.Tensor:
    return codes if code.bits == 8 else torch.cat([codes & 15, codes >> 4], 1)


@pytest.mark.parametrize("code", FORMATS, ids=NAMES)
def test_codes_are_those_of_the_map(code: Format) -> None:
    """Each code stands for its value of the map, and what is coded is at most half a cell away from it."""
    values, table = blocks(code), values_of(code)
    codes, scales, out = coded(code, values)
    assert torch.equal(scales, values.abs().amax(1))
    said = table[unpacked(code, codes).long()] * scales.double().unsqueeze(1)
    torch.testing.assert_close(out.double(), said, rtol=2e-6, atol=1e-13)
    ordered = table[~table.isnan()].unique()
    y = (values.double() / scales.double().clamp(min=1e-30).unsqueeze(1)).flatten()
    made = (out.double() / scales.double().clamp(min=1e-30).unsqueeze(1)).flatten()
    place = (made.unsqueeze(1) - ordered).abs().argmin(1)
    gaps = torch.cat([ordered.diff(), ordered[-1:] - ordered[-2:-1]])
    cell = torch.maximum(gaps[place], gaps[(place - 1).clamp(min=0)])  # where decades meet, the wider of two
    cell = torch.where((place == 0) & ~torch.tensor(code.signed), 2 * cell, cell)  # what is below the least value
    assert ((made - y).abs() <= 0.5 * cell * (1 + 1e-4) + 3e-7).all()
    nearest = (y.unsqueeze(1) - ordered).abs().amin(1)
    assert ((made - y).abs() <= nearest * (1 + 1e-4) + 3e-7).float().mean() > (0.9 if code.bits == 8 else 0.7)


@pytest.mark.parametrize("code", FORMATS, ids=NAMES)
def test_compiled_codes_are_the_same_to_the_bit(code: Format) -> None:
    values = blocks(code, 9)
    for plain, compiled in zip(coded(code, values), coded(code, values, "compile"), strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("code", FORMATS, ids=NAMES)
def test_compiled_codes_are_in_cpp_and_change_where_the_others_do(code: Format) -> None:
    """Around the least number of every code, 256 floats on either side, and at random ones."""
    assert native() is not None
    signs = (False, True) if code.signed else (False,)
    drawn = torch.randint(as_bits(1.0) + 1, (2**16,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for negative in signs:
        low, high = torch.zeros(256, dtype=torch.int32), torch.full((256,), as_bits(1.0), dtype=torch.int32)
        first = int(at_scale_one(code, torch.zeros(256, dtype=torch.int32), negative, "eager")[0])
        falls = negative and code.name != "fp8"
        wanted = (first if not negative or falls else 128) + torch.arange(256) * (-1 if falls else 1)
        for _ in range(31):  # the least magnitude whose code is at least so far from that of zero
            middle = low + torch.div(high - low, 2, rounding_mode="floor")
            codes = at_scale_one(code, middle, negative, "eager").int()
            reached = (codes <= wanted) if falls else (codes >= wanted)
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        near = (high.unsqueeze(1) + torch.arange(-256, 256, dtype=torch.int32)).clamp(0, as_bits(1.0)).flatten()
        for bits in (near, drawn):
            eager = at_scale_one(code, bits, negative, "eager")
            assert torch.equal(at_scale_one(code, bits, negative, "compile"), eager)


def as_bits(x: float) -> int:
    return int(torch.tensor(x).view(torch.int32))


def at_scale_one(code: Format, bits: torch.Tensor, negative: bool, name: str) -> torch.Tensor:
    """The codes of floats of given bits."""
    values = bits.view(torch.float32).view(-1, code.block) * (-1 if negative else 1)
    codes = torch.empty(len(values), code.width, dtype=torch.uint8)
    encode(backend(name), [(code, codes, torch.ones(len(values)), values)], known=True)
    return unpacked(code, codes).flatten()


def test_without_a_compiler_for_cpp_torch_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    code = format_of("int8", True)
    values = blocks(code, 9)
    found = coded(code, values, "compile")
    monkeypatch.setattr(coding, "native", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(coded(code, values, "compile"), found, strict=True))


def test_kernels_do_the_same(interpreter: Executor) -> None:
    """Codes and values to the bit, and steps on them where a rule has no roots and sums; others nearly."""
    run(interpreter, coding_checks.codes, *((i, Setup(CPU), 11, True) for i in range(len(FORMATS))))
    cases = [("lion", "int8", True), ("lion", "int4", True), ("adamw", "int8", False), ("lamb", "fp8", False)]
    run(interpreter, coding_checks.coded_steps, *((name, state, Setup(CPU), exact) for name, state, exact in cases))


def test_a_block_with_a_number_that_is_not_finite_is_not_finite() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        values = torch.ones(2, 256)
        values[1, 7] = bad
        _, _, out = coded(format_of("int8", True), values)
        assert torch.equal(out[0], values[0])
        assert not out[1].isfinite().any()


def test_tiny_blocks_are_zero() -> None:
    _, scales, out = coded(format_of("int8", False), torch.full((1, 256), 1e-38))
    assert not out.any()
    assert not scales.any()


# ------------------------------------------------------------------------------------------------------- in a step


class Model(nn.Module):
    """Parameters of several blocks, an embedding, and small ones."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(70, 60, dtype=dtype)
        self.up = nn.Linear(60, 70, dtype=dtype)
        self.down = nn.Linear(70, 60, dtype=dtype)

    def backward(self, step: int) -> None:
        index = torch.randint(70, (8,), generator=torch.Generator().manual_seed(step))
        (self.down(self.up(self.table(index)).tanh()) - 1).square().sum().backward()


def trained(name: str, steps: int, model: Model | None = None, **options: Any) -> tuple[Model, Any]:
    model = model or Model()
    optimizer = oput.create(name, model, lr=1e-2, **options)
    for step in range(steps):
        optimizer.zero_grad()
        model.backward(step)
        optimizer.step()
    return model, optimizer


def kinds(optimizer: Any, p: torch.Tensor) -> dict[str, Any]:
    return {k: v.code.name if isinstance(v, Coded) else v.dtype for k, v in optimizer.state[p].items() if k != "step"}


def test_what_has_codes() -> None:
    model, optimizer = trained("adamw", 1, state_dtype="int8")
    assert kinds(optimizer, model.up.weight) == {"exp_avg": "int8", "exp_avg_sq": "int8"}
    assert kinds(optimizer, model.table.weight) == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    assert kinds(optimizer, model.up.bias) == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    model, optimizer = trained("adamw", 1, state_dtype={"exp_avg": "bf16", "exp_avg_sq": "int4"})
    assert kinds(optimizer, model.up.weight) == {"exp_avg": torch.bfloat16, "exp_avg_sq": "int4"}
    overrides: dict[Any, str] = {"*": "fp8", "down.*": "bf16", nn.Embedding: "fp32"}
    model, optimizer = trained("lion", 1, state_dtype="int8", state_overrides=overrides)
    found = {name: kinds(optimizer, p)["exp_avg"] for name, p in model.named_parameters()}
    assert found == {
        "table.weight": torch.float32,
        "up.weight": "fp8",
        "up.bias": "fp8",
        "down.weight": torch.bfloat16,
        "down.bias": torch.bfloat16,
    }
    model, optimizer = trained("adan", 1, state_dtype="int8")
    assert kinds(optimizer, model.up.weight)["previous_grad"] == torch.float32


def test_a_step_is_that_of_float32_on_the_decoded_state() -> None:
    """The rule sees what codes stand for, and the parameter what the rule makes of it before it is coded again."""
    model, optimizer = trained("adamw", 3, state_dtype="int8")
    twin, other = Model(), None
    twin.load_state_dict(model.state_dict())
    other = oput.AdamW(twin, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        m.backward(3)
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for name in ("exp_avg", "exp_avg_sq"):
        made, exact = optimizer.state_dict()["state"][1][name], other.state[twin.up.weight][name]
        assert not torch.equal(made, exact)
        assert (made - exact).abs().max() <= 0.036 * exact.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.1},
        {"cautious": True},
        {"backend": "eager"},
        {"state_dtype": "int4"},
    ],
    ids=str,
)
def test_ranges_of_a_parameter_change_nothing(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """A step in many small waves is one in a single wave, to the bit; norms are sums of other parts."""
    every = {"state_dtype": "int8", "backend": "foreach", **options}
    for name in ("adamw", "lamb"):
        whole, _ = trained(name, 3, **every)
        monkeypatch.setitem(WAVE, "cpu", 512)
        cut, optimizer = trained(name, 3, **every)
        monkeypatch.undo()
        exact = name == "adamw" and "max_grad_norm" not in options
        for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
        assert isinstance(optimizer.state[cut.up.weight]["exp_avg"], Coded)


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True}, {"kahan_sum": False}], ids=str)
def test_bfloat16_parameters(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    model, optimizer = trained("adamw", 4, Model(torch.bfloat16), state_dtype="int8", **options)
    assert ("kahan_comp" in optimizer.state[model.up.weight]) == (options == {})
    monkeypatch.setitem(WAVE, "cpu", 512)
    other, _ = trained("adamw", 4, Model(torch.bfloat16), state_dtype="int8", **options)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_missing_gradients_leave_codes_alone() -> None:
    model, optimizer = trained("adamw", 2, state_dtype="int8")
    before = optimizer.state[model.up.weight]["exp_avg"].codes.clone()
    model.up.weight.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[model.up.weight]["exp_avg"].codes, before)
    assert optimizer.state[model.up.weight]["step"] == 2
    assert optimizer.state[model.down.weight]["step"] == 3


def test_accumulation_changes_codes_and_no_parameter() -> None:
    model, optimizer = trained("adamw", 2, state_dtype="int8")
    before = [p.detach().clone() for p in model.parameters()]
    codes = optimizer.state[model.up.weight]["exp_avg"].codes.clone()
    optimizer.optimizer_accumulation = True
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not torch.equal(optimizer.state[model.up.weight]["exp_avg"].codes, codes)


def test_gradient_release_is_the_plain_step() -> None:
    plain, _ = trained("adamw", 3, state_dtype="int8", backend="foreach")
    model = Model()
    optimizer = oput.AdamW(
        model, lr=1e-2, weight_decay=0.01, state_dtype="int8", backend="foreach", gradient_release=True
    )
    oput.prepare_for_gradient_release(model, optimizer)
    for step in range(3):
        model.backward(step)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------------ bytes and checkpoints


def test_bytes() -> None:
    """bfloat16 parameters and gradients, AdamW: at most 2.1 bytes of state an element, 7 of everything, 5 without
    gradients, by the allocator's account."""
    count, side = 12, 256
    told: list[oput.Memory] = []

    def train(release: bool) -> Any:
        params = nn.ParameterList(nn.Parameter(torch.ones(side, side, dtype=torch.bfloat16)) for _ in range(count))
        optimizer = oput.AdamW(
            params, state_dtype="int8", stochastic_rounding=True, backend="foreach", gradient_release=release
        )
        if release:
            oput.prepare_for_gradient_release(params, optimizer)
        for _ in range(2):
            if release:
                torch.stack([p.sum() for p in params]).sum().backward()
            else:
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.step()
        told.append(oput.memory(optimizer))
        return params, optimizer

    for release, most in ((False, 7), (True, 5)):
        train(release)
        found = allocated(lambda release=release: train(release))
        assert told[-1].state <= 2.1 * count * side * side
        assert found <= most * count * side * side
        if not release:
            assert found == told[-1].total
    named = {str(i): (side, side) for i in range(count)}
    planned = oput.plan(named, oput.AdamW, 1, state_dtype="int8")
    assert planned.state_bytes.most == told[0].state


@pytest.mark.parametrize("state", ["int8", "fp8", "int4"])
def test_training_goes_on_from_a_checkpoint(state: str) -> None:
    """Through numbers, and twice through the same file without a step: nothing is lost on the way."""
    straight, _ = trained("adamw", 6, state_dtype=state)
    model, optimizer = trained("adamw", 3, state_dtype=state)
    saved = copy.deepcopy(optimizer.state_dict())
    assert {value.dtype for value in saved["state"][1].values()} == {torch.float32}
    twin = Model()
    twin.load_state_dict(model.state_dict())
    other = oput.AdamW(twin, lr=1e-2, state_dtype=state)
    other.load_state_dict(saved)
    again = other.state_dict()
    assert all(
        torch.equal(again["state"][i][k], saved["state"][i][k]) for i in saved["state"] for k in saved["state"][i]
    )
    other.load_state_dict(copy.deepcopy(again))
    for step in range(3, 6):
        other.zero_grad()
        twin.backward(step)
        other.step()
    for p, q in zip(straight.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert isinstance(other.state[twin.up.weight]["exp_avg"], Coded)
    whole = oput.full_state_dict(other)
    assert torch.equal(whole["state"][1]["exp_avg"], other.state_dict()["state"][1]["exp_avg"])


def test_forms_may_change_between_runs() -> None:
    for before, after in ((None, "int8"), ("int8", None), ("int8", "fp8")):
        model, optimizer = trained("adamw", 3, **({"state_dtype": before} if before else {}))
        other = oput.AdamW(model, lr=1e-2, **({"state_dtype": after} if after else {}))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        model.backward(3)
        other.step()
        assert kinds(other, model.up.weight)["exp_avg"] == (after or torch.float32)
        assert other.state[model.up.weight]["step"] == 4


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", {"state_dtype": "int3"}, r"state_dtype='int3' .*'int8', 'fp8', 'int4'"),
        ("adamw", {"state_dtype": "itn8"}, r"Did you mean 'int8'"),
        ("adamw", {"state_dtype": {"exp_avgs": "int8"}}, r"names 'exp_avgs'.*Did you mean 'exp_avg'"),
        ("adan", {"state_dtype": {"previous_grad": "int8"}}, r"'previous_grad' cannot be kept in int8"),
        ("sgd", {"state_dtype": "int8", "momentum": 0.0}, r"no state of this optimizer can be coded"),
        ("madgrad", {"state_dtype": "int4"}, r"no state of this optimizer can be coded"),
        ("adamw", {"state_dtype": "int8", "state_overrides": {"up.*": "int1"}}, r"state_overrides\['up.\*'\]='int1'"),
        ("adamw", {"state_dtype": "int8", "state_overrides": {3: "int8"}}, r"has the key 3"),
        ("adamw", {"state_overrides": "fp32"}, r"must be a dict"),
    ],
)
def test_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        oput.create(name, Model(), **options)


def test_lookahead_does_not_change_codes() -> None:
    with pytest.raises(ValueError, match="inner_state='keep'"):
        oput.Lookahead(oput.AdamW(Model(), state_dtype="int8"), inner_state="pullback")
    model = Model()
    optimizer = oput.EMA(oput.Lookahead(oput.AdamW(model, state_dtype="int8"), k=2))
    for step in range(4):
        optimizer.zero_grad()
        model.backward(step)
        optimizer.step()
    assert optimizer.state_dict()["state"][1]["exp_avg"].dtype == torch.float32
