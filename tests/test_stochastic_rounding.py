"""Stochastic rounding: right on average, and the same bits in every backend, layout and number of ranks."""

from __future__ import annotations

import itertools
import re
from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oput_dist as oput
from benchmarks import rounding_checks
from benchmarks.checks import Setup
from benchmarks.variants import Variant
from oput_dist.engine.noise import bits_for
from oput_dist.engine.slot import Slot
from oput_dist.kernels.language import as_torch
from oput_dist.kernels.rounding import toss_bfloat16, toss_float16
from oput_dist.layout.plain import Plain
from tests.conformance import SHAPES, Case, faults, held, start_values
from tests.pool import Pool
from tests.test_conformance import BY_NAME
from tests.test_kahan import Regression
from tests.test_kernels import CPU, run
from tests.toy import make, parameters, same, walk
from tests.wrapped import LAYOUTS

SHORT = (torch.bfloat16, torch.float16)
TOSSES = [(toss_bfloat16, torch.bfloat16, 16), (toss_float16, torch.float16, 13)]


@pytest.mark.parametrize(("toss", "dtype", "width"), TOSSES, ids=["bfloat16", "float16"])
def test_all_bits_together_are_exact(toss: Any, dtype: torch.dtype, width: int) -> None:
    """Of all that the bits can be, as many round up as the number lies above the lower neighbour; so the mean is it."""
    x = torch.tensor([1.001, -1.001, 0.7, -300.3, 3e-6, -3.01e-6, 2.0**-14 * 1.0001, 2.0**-14 * 0.9999, 0.0])
    bits = torch.arange(2**width, dtype=torch.int32).unsqueeze(1)
    rounded = as_torch(toss)(x.expand(2**width, -1), bits)
    assert torch.equal(rounded.to(dtype).float(), rounded)
    unit = torch.finfo(dtype).eps * x.abs().clamp(min=2.0**-14 if dtype == torch.float16 else 0)
    assert ((rounded.double().mean(0) - x.double()).abs() <= unit / 2**11).all()
    assert (rounded.amax(0) - rounded.amin(0) <= unit).all()
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan])
    torch.testing.assert_close(as_torch(toss)(ends, bits[5]), ends, equal_nan=True)


def slot_of(shape: tuple[int, ...], name: str = "weight") -> Slot:
    p = torch.zeros(shape, dtype=torch.bfloat16)
    return Slot(p, name, Plain(p), 0, 0, 0, False)


def test_bits_look_random() -> None:
    """Each of the 16 bits is as often 0 as 1, neighbours, rows, steps and names do not go together."""
    slot = slot_of((512, 1024))

    def uniform(one: Slot, step: int) -> Tensor:
        return (bits_for(one, step).int() & 0xFFFF).double() / 2**16

    u = uniform(slot, 1)
    n = u.numel()
    for bit in range(16):
        assert abs(float(((bits_for(slot, 1).int() >> bit) & 1).double().mean()) - 0.5) < 4 / n**0.5
    assert abs(float(u.mean()) - 0.5) < 2 / n**0.5
    others = [u.roll(1), u.roll(1024), u.roll(1025), uniform(slot, 2), uniform(slot_of((512, 1024), "bias"), 1)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 5 / n**0.5
    counts = torch.histc(u, 64)
    assert float(((counts - n / 64) ** 2 / (n / 64)).sum()) < 120  # chi square of 63 degrees: 99.999% below


def test_decay_is_right_on_average() -> None:
    """1,000 steps without gradients at lr * weight decay = 1e-4."""
    p = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = oput.Lion([p], lr=1e-3, weight_decay=0.1, stochastic_rounding=True)
    for _ in range(1_000):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(0.9999**1_000, rel=2e-3)
    assert p.float().std().item() > 1e-3


def test_training_as_in_fp32() -> None:
    regression = Regression()
    wanted = regression.loss(torch.float32)
    assert regression.loss(torch.bfloat16, stochastic_rounding=True) == pytest.approx(wanted, rel=0.01)


# ------------------------------------------------------------------------------------------------ backends and layouts


def test_kernels_as_eager(interpreter: Executor) -> None:
    exact = [Variant("lion"), Variant("sgd", {"momentum": 0.9, "weight_decay": 0.1, "cautious": True})]
    bf16, fp16 = (Setup(CPU, dtype) for dtype in SHORT)
    cases = [(variant, setup, True) for variant, setup in zip(exact, (fp16, bf16), strict=True)]
    run(interpreter, rounding_checks.tossed, *cases, (Variant("adafactor"), bf16, False))


@pytest.mark.parametrize("backend", ["foreach", "compile"])
def test_backends_agree(backend: str) -> None:
    setup = Setup(CPU, torch.bfloat16, backend=backend)
    assert rounding_checks.tossed(Variant("lion"), setup, exact=True).ok
    assert rounding_checks.tossed(Variant("sm3"), setup, exact=False).ok


@pytest.mark.parametrize(("layout", "n"), [("rows", 3), ("columns", 2), ("zero1", 2), ("grid", 4), ("fsdp2-tp", 4)])
def test_sharding_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    options = {"lr": 0.1, "weight_decay": 0.1, "stochastic_rounding": True}
    cases = [Case(name, f"oput_dist.{name}", options, partly=False) for name in ("AdamW", "Lion")]
    found = faults(pool, layout, n, list(itertools.product(cases, SHORT[:1], ["foreach"])))
    if layout == "fsdp2-tp":  # vectors have gradients there that are partial sums, in bf16
        found = [line for line in found if ": vector." not in line and ", vector." not in line]
    assert not found, "\n".join(found)


def drawn(layout: str) -> dict[str, tuple[str, list[int], list[int]]]:
    """Of each parameter: what it is called, which of its elements a rank holds, and the bits for them."""
    shards = LAYOUTS[layout]()
    params = shards.start(start_values(torch.float32))
    optimizer: Any = BY_NAME["lion"].build(params, **shards.options)
    slots = {slot.name.rstrip("'").rpartition(".")[2]: slot for slot in optimizer._current_plan().slots}
    pieces = held(LAYOUTS[layout]())
    return {
        name: (slots[name].name, pieces[name].reshape(-1).tolist(), bits_for(slots[name], 7).tolist())
        for name in SHAPES
    }


def test_flat_parameters_have_the_bits_of_their_originals(pool: Pool) -> None:
    """FSDP1 cuts one tensor of all parameters anywhere; with the module, names and places are known."""
    for pieces in pool.run(2, drawn, "fsdp1-flat"):
        for name, (called, indices, bits) in pieces.items():
            assert bits == bits_for(slot_of(SHAPES[name], called), 7).view(-1)[indices].tolist()
            assert re.fullmatch(rf"parameter '(\w+\.)*{name}'", called)


class ByRank(oput.Lion):
    """Planted fault: bits follow from where an element lies on its rank."""

    def run(self, closure: Any, loss: Any) -> Any:
        for slot in self._current_plan().slots:
            slot.name += str(torch.distributed.get_rank()) if torch.distributed.is_initialized() else ""
        return super().run(closure, loss)


def test_other_bits_are_seen(pool: Pool) -> None:
    options = {"lr": 0.1, "stochastic_rounding": True}
    case = Case("by rank", "tests.test_stochastic_rounding.ByRank", options, partly=False)
    assert any("param is off by" in line for line in faults(pool, "rows", 2, [(case, torch.bfloat16, "foreach")]))


def test_strided_and_transposed_parameters() -> None:
    """Bits belong to places in the tensor, not in memory."""

    def trained(transposed: bool) -> Tensor:
        values = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        p = nn.Parameter(values.mT.contiguous().mT if transposed else values)
        optimizer = oput.SGD([p], lr=0.01, stochastic_rounding=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p.detach()

    assert torch.equal(trained(True), trained(False))


def test_resume_is_exact() -> None:
    whole, params = parameters(torch.bfloat16), parameters(torch.bfloat16)
    options = {"stochastic_rounding": True}
    wanted = walk(make("adamw", whole, **options), whole, range(6))
    first, second = make("adamw", params, **options), make("adamw", params, **options)
    walk(first, params, range(3))
    second.load_state_dict(first.state_dict())
    assert same(walk(second, params, range(3, 6)), wanted)
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in second.state.values())


# ------------------------------------------------------------------------------------------------------------ bad input


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"Lion: stochastic_rounding=1.0 is not allowed"):
        oput.Lion(parameters(torch.bfloat16), stochastic_rounding=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kahan_sum=True and stochastic_rounding=True cannot go together"):
        oput.Lion(parameters(torch.bfloat16), stochastic_rounding=True, kahan_sum=True)
    with pytest.raises(ValueError, match=r"no parameter is bfloat16 or float16.*to_low_precision"):
        oput.Lion(parameters(), stochastic_rounding=True)


def test_longer_parameters_beside_shorter_ones_are_written_as_ever() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    plain = [nn.Parameter(torch.ones(3))]
    for optimizer in (oput.Lion(params, lr=1e-3, stochastic_rounding=True), oput.Lion(plain, lr=1e-3)):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(params[0], plain[0])
