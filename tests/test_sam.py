"""The SAM family: against formulas, in both interfaces, with scalers and checkpoints, and in bad hands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_optimizer import GSAM as TheirGSAM
from pytorch_optimizer import SAM as TheirSAM
from torch import Tensor, nn

import oput_dist as oput
from oput_dist.wrappers.esam import ESAM, chance
from oput_dist.wrappers.gsam import GSAM
from oput_dist.wrappers.looksam import LookSAM
from oput_dist.wrappers.sam import ASAM, SAM
from tests.formulas import sam as formulas
from tests.toy import largest_difference, same

STEPS = 5
LIMIT = 1e-14
SGD: tuple[Any, dict[str, Any]] = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
ADAM: tuple[Any, dict[str, Any]] = (torch.optim.Adam, {"lr": 0.05})
Make = Callable[..., Any]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (12,), generator=generator)


def losses_at(step: int) -> Callable[[list[Tensor]], Tensor]:
    net = network()
    names = [name for name, _ in net.named_parameters()]

    def losses(params: list[Tensor]) -> Tensor:
        x, y = batch(step)
        logits = torch.func.functional_call(net, dict(zip(names, params, strict=True)), (x,))
        return F.cross_entropy(logits, y, reduction="none")

    return losses


def grads_at(step: int) -> formulas.GradsAt:
    def grads(params: list[Tensor]) -> list[Tensor]:
        leaves = [p.detach().requires_grad_() for p in params]
        return list(torch.autograd.grad(losses_at(step)(leaves).mean(), leaves))

    return grads


def closure_of(model: nn.Module, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def by_formula(rule: Any, base: Any, options: dict[str, Any]) -> list[Tensor]:
    params = [p.detach().clone().requires_grad_() for p in network().parameters()]
    optimizer = base(params, **options)
    for step in range(STEPS):
        for p, g in zip(params, rule([p.detach() for p in params], grads_at(step)), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def one_step(optimizer: Any, closure: Callable[[], Tensor], by_hand: bool = False) -> None:
    if not by_hand:
        optimizer.step(closure)
        return
    optimizer.zero_grad()
    closure()
    if optimizer.needs_second_pass:
        optimizer.first_step()
        closure()
    optimizer.second_step() if optimizer.needs_second_pass else optimizer.step()


def trained(make: Make, by_hand: bool = False, steps: int = STEPS) -> list[Tensor]:
    model = network()
    optimizer = make(model)
    for step in range(steps):
        one_step(optimizer, closure_of(model, step), by_hand)
    return [p.detach() for p in model.parameters()]


# ------------------------------------------------------------------------------------------------------- formulas

RULES: dict[str, tuple[Any, dict[str, Any], Callable[[], Any]]] = {
    "sam": (SAM, {"rho": 0.1}, lambda: lambda p, g: formulas.sam(p, g, rho=0.1)),
    "sam-adaptive": (
        SAM,
        {"rho": 0.5, "adaptive": True},
        lambda: lambda p, g: formulas.sam(p, g, rho=0.5, adaptive=True),
    ),
    "asam-eta": (
        ASAM,
        {"rho": 0.5, "eta": 0.01},
        lambda: lambda p, g: formulas.sam(p, g, rho=0.5, adaptive=True, eta=0.01),
    ),
    "gsam": (GSAM, {"rho": 0.3}, lambda: lambda p, g: formulas.gsam(p, g, 0.4, rho=0.3)),
    "looksam": (LookSAM, {"rho": 0.3, "k": 2}, lambda: formulas.LookSam(2, 0.7, rho=0.3)),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["closure", "by-hand"])
@pytest.mark.parametrize("inner", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", RULES)
def test_equals_the_formula(name: str, inner: tuple[Any, dict[str, Any]], by_hand: bool) -> None:
    wrapper, settings, rule = RULES[name]
    base, options = inner
    found = trained(lambda model: wrapper(model, base, **settings, **options), by_hand)
    assert largest_difference(found, by_formula(rule(), base, options)) <= LIMIT
    plain = trained(lambda model: wrapper(model, base, **{**settings, "rho": 0.0}, **options))
    assert largest_difference(found, plain) > 1e-4  # the perturbation is seen


@pytest.mark.parametrize("name", [*RULES, "esam"])
def test_both_interfaces_give_the_same_bits(name: str) -> None:
    if name == "esam":
        runs = [esam_trained(by_hand) for by_hand in (False, True)]
    else:
        wrapper, settings, _ = RULES[name]
        runs = [trained(lambda m: wrapper(oput.Lamb(m, lr=0.05), **settings), by_hand) for by_hand in (False, True)]
    assert same(*runs)


@pytest.mark.parametrize("backend", ["foreach", "compile"])
@pytest.mark.parametrize("name", RULES)
def test_backends_give_the_same(name: str, backend: str) -> None:
    wrapper, settings, _ = RULES[name]
    runs = [
        trained(lambda m, b=b: wrapper(oput.SGD(m, lr=0.1, backend=b), **settings), steps=3) for b in ("eager", backend)
    ]
    assert largest_difference(*runs) <= LIMIT


def test_looksam_by_hand_without_asking_is_the_same_in_two_passes() -> None:
    model, other = network(), network()
    mine, asked = LookSAM(model, *SGD[:1], k=3, **SGD[1]), LookSAM(other, *SGD[:1], k=3, **SGD[1])
    for step in range(4):
        closure_of(model, step)()
        mine.first_step()
        closure_of(model, step)()
        mine.second_step(zero_grad=True)
        one_step(asked, closure_of(other, step))
    assert same(list(model.parameters()), list(other.parameters()))


def test_closures_are_called_as_often_as_passes_are_needed() -> None:
    model, calls = network(), []

    def closure() -> Tensor:
        calls.append(all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled())
        return closure_of(model, 0)()

    optimizer = LookSAM(model, *SGD[:1], k=2, **SGD[1])
    losses = [optimizer.step(closure) for _ in range(3)]
    assert calls == [True] * 5
    assert losses[0].item() == F.cross_entropy(network()(batch(0)[0]), batch(0)[1]).item()


def test_groups_have_settings_of_their_own() -> None:
    model = network()
    groups = [
        {"params": model[0].parameters(), "sam_rho": 0.4},
        {"params": model[2].parameters(), "sam_adaptive": True},
    ]
    optimizer = SAM(groups, torch.optim.SGD, lr=0.0, rho=0.2)
    closure_of(model, 0)()
    grads = grads_at(0)([p.detach() for p in network().parameters()])
    weights = [p.detach() for p in network().parameters()]
    sizes = [torch.ones_like(w) if i < 2 else w.abs() for i, w in enumerate(weights)]
    length = formulas.norm([t * g for t, g in zip(sizes, grads, strict=True)]) + 1e-12
    wanted = [
        w + (0.4 if i < 2 else 0.2) * t**2 * g / length
        for i, (w, t, g) in enumerate(zip(weights, sizes, grads, strict=True))
    ]
    optimizer.first_step()
    assert largest_difference([p.detach() for p in model.parameters()], wanted) <= LIMIT
    optimizer.restore()
    assert same(list(model.parameters()), list(network().parameters()))


@pytest.mark.parametrize(("lr", "rho"), [(0.1, 0.4), (0.05, 0.25), (0.0, 0.1), (0.02, 0.16)])
def test_the_radius_of_gsam_follows_the_learning_rate(lr: float, rho: float) -> None:
    def run(**settings: Any) -> list[Tensor]:
        model = network()
        optimizer = GSAM(model, torch.optim.SGD, lr=lr, **settings)
        closure_of(model, 0)()
        optimizer.first_step()
        return [p.detach() for p in model.parameters()]

    assert largest_difference(run(rho=0.4, rho_min=0.1, lr_max=0.1), run(rho=rho)) <= LIMIT


def test_gsam_follows_a_scheduler_and_a_tensor_rate() -> None:
    model = network()
    optimizer = GSAM(model, torch.optim.Adam, lr=torch.tensor(0.1, dtype=torch.float64), rho=0.4, lr_max=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step(closure_of(model, 0))
    scheduler.step()
    assert float(optimizer.radius(optimizer.param_groups[0])) == pytest.approx(0.2)


# ----------------------------------------------------------------------------------------------------------- ESAM

ESAM_SETTINGS: dict[str, Any] = {"rho": 0.3, "beta": 0.5, "gamma": 0.4, "seed": 3}


def losses_of(model: nn.Module, step: int, seen: list[Any] | None = None) -> Callable[[Tensor | None], Tensor]:
    def losses(indices: Tensor | None) -> Tensor:
        x, y = batch(step)
        if seen is not None:
            seen.append(None if indices is None else indices.tolist())
        chosen: Any = slice(None) if indices is None else indices
        return F.cross_entropy(model(x[chosen]), y[chosen], reduction="none")

    return losses


def esam_trained(by_hand: bool, seen: list[Any] | None = None) -> list[Tensor]:
    model = network()
    optimizer = ESAM(model, *SGD[:1], **ESAM_SETTINGS, **SGD[1])
    for step in range(STEPS):
        losses = losses_of(model, step, seen)
        if not by_hand:
            optimizer.step(losses)
            continue
        before = losses(None)
        before.mean().backward()
        optimizer.first_step()
        with torch.no_grad():
            after = losses(None)
        losses(optimizer.sharpest(before, after)).mean().backward()
        optimizer.second_step(zero_grad=True)
    return [p.detach() for p in model.parameters()]


def test_esam_equals_the_formula() -> None:
    params = [p.detach().clone().requires_grad_() for p in network().parameters()]
    optimizer, wanted_samples, choices = torch.optim.SGD(params, **SGD[1]), [], set()
    for step in range(STEPS):
        chosen = [chance(3, step, i) < 0.5 for i in range(len(params))]
        choices.add(tuple(chosen))
        grads, samples = formulas.esam([p.detach() for p in params], losses_at(step), chosen, 0.5, 0.4, 0.3)
        wanted_samples.append(samples)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
    seen: list[Any] = []
    assert largest_difference(esam_trained(False, seen), [p.detach() for p in params]) <= LIMIT
    assert [indices for indices in seen if indices is not None] == wanted_samples
    assert len(wanted_samples[0]) == 4
    assert len(choices) > 1


def test_tensors_are_chosen_by_their_share() -> None:
    drawn = [chance(7, step, index) for step in range(100) for index in range(100)]
    assert sum(x < 0.3 for x in drawn) / len(drawn) == pytest.approx(0.3, abs=0.02)
    assert len(set(drawn)) == len(drawn)
    optimizer = ESAM(network(), *SGD[:1], beta=0.6, rho=0.3, **SGD[1])
    assert optimizer.radius(optimizer.param_groups[0]) == 0.3 / 0.6  # so that the mean is that of SAM


# -------------------------------------------------------------------------------------------------- another library


@pytest.mark.parametrize("adaptive", [False, True])
def test_equals_the_sam_of_pytorch_optimizer(adaptive: bool) -> None:
    model = network()
    theirs = TheirSAM(model.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1, momentum=0.9)
    for step in range(STEPS):
        closure_of(model, step)()
        theirs.first_step(zero_grad=True)
        closure_of(model, step)()
        theirs.second_step(zero_grad=True)
    found = trained(lambda m: SAM(m, torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1, momentum=0.9))
    assert largest_difference(found, [p.detach() for p in model.parameters()]) <= 1e-9


class Constant:
    """A scheduler for their GSAM."""

    def step(self) -> float:
        return 0.1


def test_equals_the_gsam_of_pytorch_optimizer() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    theirs = TheirGSAM(model.parameters(), base, model, Constant(), alpha=0.4)
    for step in range(STEPS):
        theirs.set_closure(F.cross_entropy, *batch(step))
        theirs.step()
    found = trained(lambda m: GSAM(m, torch.optim.SGD, rho=0.1, alpha=0.4, lr=0.1, momentum=0.9))
    # They add 1e-12 to norms three times.
    assert largest_difference(found, [p.detach() for p in model.parameters()]) <= 1e-8
