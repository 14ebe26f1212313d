"""Every optimizer at every ZeRO stage of DeepSpeed gives what one process gives on the same gradients."""

from __future__ import annotations

import itertools

import pytest

from oput_dist.optimizers import OPTIMIZERS
from tests.cases import CASES
from tests.conformance import Case
from tests.deepspeed_worlds import LAST, World, faults
from tests.pool import Pool

OWN = [case for case in CASES if case.optimizer.rpartition(".")[2].lower() in OPTIMIZERS]
# DeepSpeed clips gradients itself, and says so: see tests/test_deepspeed_bad.py
NAMED = [case for case in OWN if "max_grad_norm" not in case.options]
ONE_EACH = list({case.optimizer: case for case in reversed(NAMED)}.values())


def training(stage: int, n: int, groups: int) -> tuple[list[Case], int]:
    """All settings of all optimizers where steps come in parts; elsewhere one of each, and a step less: the second has
    state and weights of the first, and Hessians are estimated again in the third."""
    return (NAMED, LAST + 1) if (n, stage, groups) == (2, 1, 3) else (ONE_EACH, LAST)


def test_every_optimizer_is_among_them() -> None:
    assert {case.optimizer.rpartition(".")[2].lower() for case in ONE_EACH} == set(OPTIMIZERS)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("n", "stage"), sorted(itertools.product([1, 2, 3], range(4))))
def test_stages_change_nothing(pool: Pool, n: int, stage: int, groups: int) -> None:
    found = faults(pool, n, World(stage, groups), *training(stage, n, groups))
    assert not found, "\n".join(found)
