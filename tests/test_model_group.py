"""``model_group=``: pipeline stages hold different parameters, and what is summed over the model spans them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import oput_dist as oput
from tests.parity import pull, start
from tests.pool import Pool
from tests.toy import largest_difference

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "momo": ("Momo", {"lr": 0.5}),
    "prodigy": ("Prodigy", {"d0": 0.05}),
    "ranger21": ("Ranger21", {"lr": 0.05, "num_iterations": 13, "num_warmup_iterations": 2, "weight_decay": 0.5}),
    "clipped": ("AdamW", {"lr": 0.05, "max_grad_norm": 0.5}),
}


def staged(case: str) -> list[Tensor]:
    """Six steps of this rank's stage: every other parameter of two ranks, all of them of one."""
    name, options = CASES[case]
    ranks = dist.get_world_size()
    mine = [i for i in range(len(start())) if i % ranks == dist.get_rank()]
    params = {i: nn.Parameter(start()[i]) for i in mine}
    group = {"model_group": dist.group.WORLD} if ranks > 1 else {}
    optimizer = getattr(oput, name)(list(params.values()), **options, **group)
    for step in range(6):
        for i, p in params.items():
            p.grad = pull(p.detach(), i, step)
        optimizer.run(None, 6.0 - step)
    return [p.detach() for p in params.values()]


@pytest.mark.parametrize("case", CASES)
def test_sums_over_the_model_span_its_stages(pool: Pool, case: str) -> None:
    (whole,) = pool.run(1, staged, case)
    for rank, found in enumerate(pool.run(2, staged, case)):
        assert largest_difference(found, whole[rank::2]) <= 1e-13
    assert largest_difference(whole, start()) > 1e-2


def one_stage_is_not_finite() -> tuple[int, bool]:
    p = nn.Parameter(torch.ones(3))
    optimizer = oput.AdamW([p], lr=0.1, skip_nonfinite=True, model_group=dist.group.WORLD)
    p.grad = torch.full((3,), torch.nan if dist.get_rank() == 1 else 1.0)
    optimizer.step()
    return optimizer.skipped, torch.equal(p, torch.ones(3))


def test_all_stages_skip_together(pool: Pool) -> None:
    assert pool.run(2, one_stage_is_not_finite) == [(1, True)] * 2
