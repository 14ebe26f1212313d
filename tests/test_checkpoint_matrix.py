"""Every layout resumes what every other saved: by torch.distributed.checkpoint, and by a plain torch.save."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import LAYOUTS, load, save
from tests.pool import Pool


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder in which every layout saved every case."""
    folder = tmp_path_factory.mktemp("saved")
    for ranks in sorted({layout.ranks for layout in LAYOUTS.values()}, reverse=True):
        pool.run(ranks, save, ranks, str(folder), timeout=240.0)
    return str(folder)


@pytest.mark.parametrize("way", ["dcp", "whole"])
@pytest.mark.parametrize("layout", LAYOUTS)  # in the order of the number of ranks: starting a world takes time
def test_resumes_what_any_layout_saved(pool: Pool, saved: str, layout: str, way: str) -> None:
    for faults in pool.run(LAYOUTS[layout].ranks, load, layout, saved, way, timeout=240.0):
        assert not faults, "\n".join(faults)


def test_all_layouts_of_the_promise_are_there() -> None:
    assert {"one", "ddp", "zero1", "fsdp2", "fsdp2x3", "hsdp", "fsdp2+tp"} <= LAYOUTS.keys()
    assert Path(__file__).exists()
