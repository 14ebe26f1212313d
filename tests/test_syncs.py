"""No step reads a tensor on the host: on a GPU each reading would wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import oput_dist as oput
from oput_dist.matrix import kronecker, roots
from oput_dist.optimizers import OPTIMIZERS
from tests.toy import create, parameters, tensors

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "allclose"}


class Trapped(TorchDispatchMode):
    """Raises for every operation that needs a value on the host, or whose shape depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.split("::")[-1] in READS:
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole matrices look at values on a CPU, which costs nothing.

    To find a root or a basis waits on a GPU, too: it may have to be retried.
    """
    checked = roots._checked

    def untrapped(*args: Any) -> Any:
        with _disable_current_modes():
            return checked(*args)

    monkeypatch.setattr(kronecker, "READABLE", set())
    monkeypatch.setattr(roots, "_checked", untrapped)


def steps(name: str, options: dict[str, Any], count: int) -> None:
    params = parameters()
    if options.get("cautious") and OPTIMIZERS[name].why_not_cautious:
        options = {}
    optimizer = create(name, params, weight_decay=0.1, **options)
    for step in range(count):
        for p, g in zip(params, tensors(step), strict=True):
            p.grad = g
        with Trapped():
            optimizer.run(None, torch.tensor(1.0))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"cautious": True}], ids=["plain", "clip", "cautious"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_no_step_reads_a_tensor(name: str, options: dict[str, Any]) -> None:
    steps(name, options, 7)  # through every phase that optimizers with phases have in the toy's settings


def test_the_trap_bites() -> None:
    with Trapped(), pytest.raises(AssertionError, match="reads a tensor"):
        bool(torch.ones(()) > 0)
    with pytest.raises(AssertionError, match="reads a tensor"):
        steps("adamw", {"skip_nonfinite": True}, 1)  # which decides on the host


class Reading(oput.SGD):
    """Planted fault: a threshold that is looked at on the host."""

    def run(self, closure: Any, loss: Any) -> Any:
        if self.param_groups[0]["params"][0].grad.norm() > 0:
            return super().run(closure, loss)


def test_the_trap_sees_what_an_optimizer_does() -> None:
    (p,) = parameters()[:1]
    p.grad = torch.ones_like(p)
    with Trapped(), pytest.raises(AssertionError, match="reads a tensor"):
        Reading([p], lr=0.1).run(None, None)
