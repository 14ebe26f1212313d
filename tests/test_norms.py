"""What LARS, NovoGrad, A2Grad, Apollo, SWATS and Amos promise beyond their formulas."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import oput_dist as oput
from tests.cases.norms import A2GRAD, SWITCH
from tests.parity import STEPS, pull, start
from tests.pool import Pool
from tests.toy import make, parameters, same, trajectory, walk

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("lars", {"momentum": 1.0}, r"momentum=1.0 .*\[0, 1\)"),
    ("lars", {"trust_coeff": 0.0}, r"trust_coeff=0.0 .*> 0"),
    ("lars", {"nesterov": True, "dampening": 0.1}, r"LARS: nesterov=True .*dampening=0.1: needs .*dampening = 0"),
    ("novograd", {"betas": (0.9, 1.0)}, r"betas=.*numbers in \[0, 1\)"),
    ("novograd", {"grad_averaging": 1}, r"grad_averaging=1 .*True or False"),
    *[(name, {"lips": 0.0}, r"lips=0.0 .*> 0") for name in ("a2graduni", "a2gradinc", "a2gradexp")],
    *[(name, {"beta": -1.0}, r"beta=-1.0 .*>= 0") for name in ("a2graduni", "a2gradinc", "a2gradexp")],
    ("a2gradexp", {"rho": 1.0}, r"rho=1.0 .*\[0, 1\)"),
    ("apollo", {"eps": 0.0}, r"eps=0.0 .*> 0"),
    ("apollo", {"warmup": -1}, r"warmup=-1 .*>= 0"),
    ("apollo", {"init_lr": -0.1}, r"init_lr=-0.1 .*None or .*>= 0"),
    ("apollo", {"rebound": "hope"}, r"rebound='hope' .*'constant' or 'belief'"),
    ("apollo", {"weight_decay_type": "l2"}, r"weight_decay_type='l2' .*'L2' or 'decoupled' or 'stable'"),
    ("swats", {"eps": 0.0}, r"eps=0.0 .*> 0"),
    ("swats", {"tolerance": -1.0}, r"tolerance=-1.0 .*>= 0"),
    ("amos", {"eta": 0.0}, r"eta=0.0 .*None or .*> 0"),
    ("amos", {"extra_l2": -1.0}, r"extra_l2=-1.0 .*>= 0"),
    ("lamb", {"bias_correction": None}, r"bias_correction=None .*True or False"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_hyperparameters(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oput.create(name, parameters(), **options)
    optimizer = oput.create(name, parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


def test_lars_steps_do_not_depend_on_the_scale_of_the_gradient() -> None:
    found = []
    for scale in (1.0, 1000.0):
        params = [nn.Parameter(value) for value in start()]
        optimizer = oput.LARS(params, trust_coeff=0.1, always_adapt=True, eps=0.0)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = scale * pull(torch.zeros_like(p), i, step)
            optimizer.step()
        found.append([p.detach() for p in params])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    assert not same(found[0], start())


def test_novograd_begins_once() -> None:
    """A gradient of zero at the first step: the second moment goes on from 0 and does not begin anew."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = oput.NovoGrad([p], betas=(0.9, 0.75))
    for gradient in ([0.0, 0.0], [3.0, 4.0]):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].item() == 0.25 * 25.0


@pytest.mark.parametrize("name", ["a2graduni", "a2gradinc", "a2gradexp"])
def test_a2grad_has_no_use_for_lr(name: str) -> None:
    assert same(trajectory(name, lr=9.0), trajectory(name))
    assert not same(trajectory(name, lips=1.0), trajectory(name))
    decoupled = {"decouple_lr": True, "max_lr": 10.0}
    assert not same(trajectory(name, **decoupled, lr=9.0), trajectory(name, **decoupled))


def test_a2grad_begins_at_the_parameter() -> None:
    p = nn.Parameter(torch.tensor([5.0]))
    optimizer = oput.A2GradUni([p], **A2GRAD)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == 5.0


def test_apollo_warms_up() -> None:
    """The first steps are those of the small rates; afterwards a schedule of lr counts."""
    lrs = {"lr": 0.02, "warmup": 4, "init_lr": 0.004}
    params, other = parameters(torch.float64), parameters(torch.float64)
    warming, by_hand = make("apollo", params, **lrs), make("apollo", other, warmup=0)
    for step, lr in enumerate((0.004, 0.008, 0.012, 0.016, 0.02, 0.02)):
        by_hand.param_groups[0]["lr"] = lr
        found, wanted = (walk(o, p, range(step, step + 1)) for o, p in ((warming, params), (by_hand, other)))
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    thousandth = make("apollo", params, lr=0.02, warmup=4)
    assert thousandth.scalars(thousandth.param_groups[0], 1).lr == pytest.approx(2e-5)


def test_apollo_says_what_values_of_torch_optimizer_mean_here() -> None:
    values = {"lr": 1e-2, "beta": 0.9, "eps": 1e-4, "warmup": 0, "init_lr": 0.01, "weight_decay": 0}
    with pytest.warns(UserWarning, match=r"init_lr=0.01 has no effect with warmup=0.*write lr=0.0001") as said:
        optimizer = oput.Apollo(parameters(), **values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(optimizer, optimizer.param_groups[0]["params"], range(2))
        oput.Apollo(parameters())
    assert len(said) == 1


EARLY = {**SWITCH, "tolerance": 0.1}


def phases(later: float = 0.1, **options: Any) -> tuple[list[Tensor], list[dict[int, float]]]:
    """Where the parity problem leads under SWATS, and after each step the rates of tensors that are in the SGD phase.

    From the eighth step on the learning rate is ``later``.
    """
    params = [nn.Parameter(value) for value in start()]
    optimizer = oput.SWATS(params, **options)
    rates = []
    for step in range(STEPS):
        if step == 8:
            optimizer.param_groups[0]["lr"] = later
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, step)
        optimizer.step()
        found = [optimizer.state[p]["sgd_lr"].item() for p in params]
        rates.append({i: rate for i, rate in enumerate(found) if rate})
    return [p.detach() for p in params], rates


def test_swats_switches_each_tensor_by_itself_and_keeps_its_rate() -> None:
    found, rates = phases(**EARLY)
    rescheduled, _ = phases(0.0, **EARLY)
    assert same(found, rescheduled)
    sizes = [len(found) for found in rates]
    assert sizes[0] == 0
    assert sizes[-1] == 4
    assert len(set(sizes)) > 2
    for before, after in itertools.pairwise(rates):
        assert before.items() <= after.items()
    assert all(rate > 0 for rate in rates[-1].values())


def test_swats_stays_adam_while_the_estimate_moves() -> None:
    found, rates = phases(lr=0.1)
    rescheduled, _ = phases(0.0, lr=0.1)
    assert not any(rates)
    assert not same(found, rescheduled)


def test_amos_scale_is_that_of_the_shape_or_of_the_group() -> None:
    def first_step(shape: tuple[int, ...], **group: Any) -> float:
        p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        p.grad = torch.ones_like(p)
        oput.Amos([{"params": [p], **group}], lr=0.01).step()
        return -p.flatten()[0].item()

    assert first_step((3,)) == first_step(()) == pytest.approx(0.01 * 0.5)
    assert first_step((4, 8)) == pytest.approx(0.01 * 0.5)
    assert first_step((8, 2)) == pytest.approx(0.01)
    assert first_step((5, 2, 3, 3)) == pytest.approx(0.01 / 3)
    assert first_step((4, 8), eta=2.0) == first_step((3,), eta=2.0) == pytest.approx(0.02)


def swats_with_an_idle_rank() -> list[list[float]]:
    """Each step's estimate and learning rate of SGD, 0 while Adam goes on; rank 1 has no gradient at some steps."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None))
    optimizer = oput.SWATS([p], lr=0.01, betas=(0.8, 0.9), tolerance=0.3)
    found = []
    for step in range(8):
        g = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) + 1
        idle = dist.get_rank() == 1 and step in (1, 2, 3)
        p.grad = None if idle else distribute_tensor(g, mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
        state = optimizer.state[p]
        found.append([getattr(v, "to_local", lambda v=v: v)().item() for v in (state["exp_avg2"], state["sgd_lr"])])
    return found


def test_all_ranks_switch_together(pool: Pool) -> None:
    first, second = pool.run(2, swats_with_an_idle_rank)
    assert first == second
    assert any(values[-1] > 0 for values in first)
