"""State in few bits, and bf16 parameters that lose nothing: no layout changes a bit of an elementwise optimizer.

Though ranks hold parts of the blocks that share a scale, and draw what they round by from where an element lies.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

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
KINDS = [
    BY_NAME[name]
    for name in ("came", "adammini", "swats", "ranger21", "muon", "soap", "prodigy", "momoadam", "lamb clipped")
]
"""One for each way in which ranks exchange what stages need, besides FEW."""
SOME = [BY_NAME[name] for name in ("adamw", "lion", "lamb")]


OTHER_FORMATS = [coded(case, name) for case in FEW for name in ("fp8", "int4")]


class Named(Case):
    """With the same names in every layout: what is drawn for a parameter follows from its name."""

    def build(self, params: dict[str, Any], **extra: Any) -> torch.optim.Optimizer:
        return super().build({name: (name, p) for name, p in params.items()}, **extra)


def drawn(case: Case) -> Case:
    """A case that rounds stochastically."""
    options = {**case.options, "stochastic_rounding": True}
    return Named(f"{case.name} drawn", case.optimizer, options, case.second, case.exact, partly=False)


def rows_for(layout: str, n: int) -> list[Row]:
    """Every optimizer's coded state in one world, in two others one for each kind of exchange, since what codes state
    knows no rule; elsewhere some, and bf16 parameters.

    Drawn: what rounds in the last bit may draw another way, so no norms. Not in bf16: layouts that round gradients on
    their way, as torch's own optimizers show there too (FSDP2 and FSDP1 multiply by a third or by half the square root
    of two, tensor parallelism adds up in another order).
    """
    if (layout, n) == ("rows", 3):
        cases = [coded(case, "int8") for case in ONE_EACH if type(case) is Case and case.optimizer not in NONE]
        return list(itertools.product([*cases, *OTHER_FORMATS], [torch.float32], ["foreach"]))
    if (layout, n) in (("zero1", 2), ("grid", 4)):
        cases = [coded(case, "int8") for case in (*FEW, *KINDS)]
        return list(itertools.product([*cases, *OTHER_FORMATS], [torch.float32], ["foreach"]))
    coded_rows = itertools.product([coded(case, "int8") for case in SOME], [torch.float32], ["foreach"])
    low = [replace(c, name=f"{c.name} kahan", options={**c.options, "kahan_sum": True}) for c in SOME]
    low += [drawn(case) for case in SOME if case.exact]
    rounding = (layout, n) == ("fsdp2", 3) or layout.startswith(("fsdp1", "tp", "fsdp2-tp"))
    return [*coded_rows, *(() if rounding else itertools.product(low, [torch.bfloat16], ["foreach"]))]


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
