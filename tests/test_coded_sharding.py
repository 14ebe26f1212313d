"""State in few bits: no layout changes a bit of an elementwise optimizer, though ranks hold parts of blocks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.conformance import Case, Row, faults, start_values
from tests.layouts import Plain
from tests.pool import Pool
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


@pytest.mark.parametrize(("layout", "n"), [*WORLDS, *WRAPPED_WORLDS])
def test_sharding_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    found = faults(pool, layout, n, rows_for(layout, n))
    assert not found, "\n".join(found)
