"""State in few bits: no layout changes a bit of an elementwise optimizer, though ranks hold parts of blocks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from oput_dist.engine.blocks import blocks_of
from tests.conformance import Case, Row, faults, local, start_values
from tests.layouts import Plain
from tests.pool import Pool
from tests.releasing import STEPS, started, train
from tests.test_conformance import BY_NAME, ONE_EACH
from tests.wrapped import WORLDS, WRAPPED_WORLDS


def coded(case: Case, name: str) -> Case:
    """A case whose state has codes, also that of small parameters."""
    options = {**case.options, "state_dtype": name, "state_overrides": {"*": name}}
    return replace(case, name=f"{case.name} {name}", options=options, partly=False)


FEW = [BY_NAME[name] for name in ("adamw", "lion", "adan", "lamb")]
NONE = {f"oput_dist.{name}" for name in ("Amos", "Adafactor", "MADGRAD", "SGD", "SGDScheduleFree")}
"""Optimizers that keep no moving average in these settings; they refuse."""
THOROUGH = [("rows", 3), ("zero1", 2), ("grid", 4)]


def rows_for(layout: str, n: int) -> list[Row]:
    """Every optimizer where the others' settings all run too, elsewhere some."""
    if (layout, n) not in THOROUGH:
        return list(itertools.product([coded(case, "int8") for case in FEW], [torch.float32], ["foreach"]))
    cases = [coded(case, "int8") for case in ONE_EACH if type(case) is Case and case.optimizer not in NONE] + [
        coded(c, name) for c in FEW for name in ("fp8", "int4")
    ]
    return list(itertools.product(cases, [torch.float32], ["foreach"]))


def test_some_refuse() -> None:
    for case in ONE_EACH:
        if case.optimizer in NONE:
            with pytest.raises(ValueError, match="no state of this optimizer can be coded"):
                coded(case, "int8").build(Plain().start(start_values(torch.float32)))


def released() -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Parameters after ordinary steps and after released ones, and how many blocks are cut here."""
    ends, cut = [], 0
    for release in (False, True):
        options = {"state_dtype": "int8", "state_overrides": {"*": "int8"}}
        model, optimizer = started("fsdp2", "adamw", release, **options)
        train(model, optimizer, range(STEPS))
        ends.append([local(p) for p in model.parameters()])
        cut = sum(len(blocks_of(slot, 256).cut) for slot in optimizer._current_plan().slots)
    return ends[0], ends[1], cut


def test_gradient_release_codes_blocks_that_shards_cut_alike(pool: Pool) -> None:
    for plain, early, cut in pool.run(2, released):
        assert cut > 0
        assert all(np.array_equal(p, q) for p, q in zip(plain, early, strict=True))


@pytest.mark.parametrize(("layout", "n"), [*WORLDS, *WRAPPED_WORLDS])
def test_sharding_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    found = faults(pool, layout, n, rows_for(layout, n))
    assert not found, "\n".join(found)
