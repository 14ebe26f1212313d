"""Pieces of flat tensors are run as one where an elementwise stage does not ask where they end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import oput_dist as oput
from oput_dist.backends import Batch, Scalars, backend
from oput_dist.backends.adjacent import joined
from oput_dist.kernels.stage import Prologue

SIZES = (3, 50, 1, 7)
ADAMW = oput.AdamW([torch.zeros(1)], lr=0.1)
STAGE = ADAMW.recipe(ADAMW.param_groups[0], torch.Size((1,))).stages[0]
H = ADAMW.scalars(ADAMW.param_groups[0], 1)


def flat(seed: int) -> torch.Tensor:
    return torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(seed))


def batch(columns: Sequence[list[torch.Tensor]], which: Sequence[int] = (0,) * len(SIZES)) -> Batch:
    rows = [(1.0, *H), (0.5, *H)]
    p, g, m, v = columns
    return Batch(p, g, list(zip(m, v, strict=True)), Scalars(type(H), rows, which, torch.device("cpu")), Prologue())


def pieces() -> list[list[torch.Tensor]]:
    return [list(flat(seed).split(SIZES)) for seed in range(4)]


def sizes(made: Batch) -> list[int]:
    assert all(len(column) == len(made.p) for column in (made.g, made.state, made.scalars.which))
    return [p.numel() for p in made.p]


def test_what_lies_together_is_one() -> None:
    assert sizes(joined(batch(pieces()))) == [61]


@pytest.mark.parametrize(
    ("column", "piece", "left"), [(0, 1, [3, 50, 8]), (1, 2, [53, 1, 7]), (3, 3, [54, 7])], ids=["p", "g", "state"]
)
def test_what_lies_elsewhere_is_left_alone(column: int, piece: int, left: list[int]) -> None:
    columns = pieces()
    columns[column][piece] = columns[column][piece].clone()
    assert sizes(joined(batch(columns))) == left


def test_a_gap_is_no_neighbour() -> None:
    columns = [[each[0], each[1][:-1], *each[2:]] for each in pieces()]
    assert sizes(joined(batch(columns))) == [52, 8]


def test_other_scalars_are_kept_apart() -> None:
    made = joined(batch(pieces(), (0, 0, 1, 1)))
    assert sizes(made) == [53, 8]
    assert list(made.scalars.which) == [0, 1]


def test_places_are_looked_up_anew() -> None:
    """The parameters of a batch stay; gradients and state may be replaced between steps."""
    one = batch(pieces())
    assert sizes(joined(one)) == [61]
    one.g = [g.clone() for g in one.g]
    assert sizes(joined(one)) == list(SIZES)


@pytest.mark.parametrize("name", ["foreach", "compile"])
def test_values_are_those_of_the_pieces(name: str) -> None:
    together, apart = pieces(), [[t.clone() for t in column] for column in pieces()]
    backend(name).run(STAGE, batch(together), None)
    backend("eager").run(STAGE, batch(apart), None)
    for got, wanted in zip(together, apart, strict=True):
        torch.testing.assert_close(torch.cat(got), torch.cat(wanted), rtol=1e-6, atol=0)
