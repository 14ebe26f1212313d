"""Pieces that lie together are summed over, and scaled, in one loop of rows: what each gets is its own."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

import oput_dist as oput
from oput_dist.backends import Batch, Scalars, backend
from oput_dist.backends.rows import ROW, Rows, parted
from oput_dist.kernels.stage import Prologue

SIZES = (9 * ROW + 3, 1, 700, 8 * ROW - 704, 20 * ROW, 5, ROW + 77, 7 * ROW)
"""The fourth ends where a row does, and so does the fifth; the run ends inside of one."""


def columns(seed: int, count: int) -> list[list[torch.Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [list(torch.rand(sum(SIZES), generator=made).split(SIZES)) for _ in range(count)]


def lamb_batch(every: list[list[torch.Tensor]]) -> Batch:
    optimizer = oput.Lamb([torch.zeros(1)], lr=0.1, weight_decay=0.01)
    group = optimizer.param_groups[0]
    rows = [(1.0, *optimizer.scalars(group, 1)), (1.0, *optimizer.scalars({**group, "lr": 0.3}, 5))]
    p, g, m, v = every
    which = [int(i >= 5) for i in range(len(SIZES))]
    scalars = Scalars(type(optimizer.scalars(group, 1)), rows, which, torch.device("cpu"))
    return Batch(p, g, list(zip(m, v, strict=True)), scalars, Prologue())


def test_every_element_is_in_one_row_or_one_part() -> None:
    """Summing ones gives sizes, whatever was cut."""
    run = Rows(range(len(SIZES)), SIZES)
    assert run.worthwhile
    ends = {end // ROW for end in accumulate(SIZES) if end % ROW}
    assert len({end for end in ends if end < run.count}) == run.count - len(run._whole)
    sums = run.by_piece([torch.full((run.count, 1), float(ROW), dtype=torch.float64)])[:, 0]
    assert (sums + torch.zeros_like(sums).index_add(0, run.pieces, run.lengths.double())).tolist() == list(SIZES)


def test_what_does_not_lie_together_is_left() -> None:
    """Neither is what has other scalars, nor a run too short."""
    every = columns(0, 4)
    every[1][4] = every[1][4].clone()
    runs, rest, left = parted(lamb_batch(every))
    assert [run.indices for run in runs] == [[0, 1, 2, 3]]
    assert left == [4, 5, 6, 7]
    assert rest is not None
    assert [p.numel() for p in rest.p] == list(SIZES[4:])


def test_many_edges_are_not_worth_it() -> None:
    assert not Rows(range(100), [ROW // 2 + 1] * 100).worthwhile


@pytest.mark.parametrize("apart", [None, 4], ids=["one run", "two parts"])
def test_values_are_those_of_the_pieces(apart: int | None) -> None:
    """Both stages of Lamb, on pieces of two groups, against the plain loop over pieces."""
    together, alone = columns(0, 4), [[t.clone() for t in column] for column in columns(0, 4)]
    if apart is not None:
        together[1][apart] = together[1][apart].clone()
    optimizer = oput.Lamb([torch.zeros(1)], lr=0.1)
    first, second = optimizer.recipe(optimizer.param_groups[0], torch.Size((1,))).stages
    results = []
    for name, every in (("compile", together), ("eager", alone)):
        sums = backend(name).run(first, lamb_batch(every), None)
        assert sums is not None
        table = torch.cat([sums, torch.tensor(SIZES, dtype=torch.float64).unsqueeze(1)], 1)
        assert backend(name).run(second, lamb_batch(every), table) is None
        results.append(sums)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)
    for got, wanted in zip(together, alone, strict=True):
        for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7, msg=lambda m, i=i: f"piece {i}: {m}")
