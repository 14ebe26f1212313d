"""The form of state dicts: each has a version, and what this release writes is kept here for later ones to load.

``python -m tests.test_checkpoint_format`` writes ``tests/fixtures/format1`` anew. It is made once for each version of
the format: a later release gets a folder of its own and still loads the old ones.

- ``whole.pt``: for each case ``oput.full_state_dict``, by torch.save, and the whole parameters;
- ``ends.pt``: the parameters three steps later;
- the other files: ``torch.distributed.checkpoint`` of some, saved by two ranks under FSDP2.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import oput_dist as oput
from oput_dist.engine.saved import FORMAT, FORMAT_KEY
from tests.checkpoints import CASES, HALF, START, UPDATE, parts, restore, resumed_by_dcp, start, train, whole
from tests.pool import Pool

BY_DCP = ["adafactor"]  # every value of a group takes a kilobyte there
ADDED = {"refresh_delay": 0}
"""Options that came after this format was kept, with what they are where a state dict lacks them."""
LATER = range(HALF, HALF + 3)
KEPT = Path(__file__).parent / "fixtures" / "format1"


def write(folder: str) -> None:
    """Make the fixture, on the ranks of a world."""
    path = Path(folder)
    runs = {case: start("fsdp2", case, biases=True) for case in CASES}
    for case, run in runs.items():
        train("fsdp2", case, run, range(HALF))
    dcp.save({case: parts(runs[case]) for case in BY_DCP}, checkpoint_id=path)
    files = {
        c: {"model": whole(run.module), "optimizer": oput.full_state_dict(run.optimizer)} for c, run in runs.items()
    }
    for case, run in runs.items():
        train("fsdp2", case, run, LATER)
    ends = {case: whole(run.module) for case, run in runs.items()}
    if dist.get_rank() == 0:
        torch.save(files, path / "whole.pt")
        torch.save(ends, path / "ends.pt")


def resumed(layout: str, way: str) -> dict[str, dict[str, Tensor]]:
    """Where training from the fixture ends."""
    if way == "dcp":
        runs = resumed_by_dcp(layout, KEPT, BY_DCP, biases=True)
    else:
        loaded = torch.load(KEPT / "whole.pt", weights_only=True)
        runs = {case: start(layout, case, lr=9.0, biases=True) for case in CASES}
        for case, run in runs.items():
            restore(run.module, loaded[case]["model"])
            run.optimizer.load_state_dict(loaded[case]["optimizer"])
    for case, run in runs.items():
        train(layout, case, run, LATER)
    return {case: whole(run.module) for case, run in runs.items()}


@pytest.mark.parametrize("way", ["dcp", "whole"])
@pytest.mark.parametrize(("layout", "ranks"), [("one", 1), ("fsdp2", 2)])
def test_what_was_saved_in_format_1_continues(pool: Pool, layout: str, ranks: int, way: str) -> None:
    wanted = torch.load(KEPT / "ends.pt", weights_only=True)
    for ends in pool.run(ranks, resumed, layout, way):
        assert list(ends) == (BY_DCP if way == "dcp" else list(CASES))
        for case, model in ends.items():
            for name, value in wanted[case].items():
                error = (model[name] - value).abs().max() / (value - START[name]).abs().max()
                assert error <= UPDATE, (case, name, error)


def form(value: Any) -> Any:
    """The structure of a state dict, without its numbers."""
    if isinstance(value, dict):
        return {key: form(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return type(value).__name__


def written_now() -> dict[str, Any]:
    found = {}
    for case in CASES:
        run = start("one", case, biases=True)
        train("one", case, run, range(HALF))
        found[case] = oput.full_state_dict(run.optimizer)
    return found


def test_this_release_writes_the_format_that_is_kept(pool: Pool) -> None:
    """If this fails, what older releases saved may not load any more: raise FORMAT, and load the old form too."""
    assert FORMAT == 1
    kept, now = torch.load(KEPT / "whole.pt", weights_only=True), pool.run(1, written_now)[0]
    for case in CASES:
        old, new = kept[case]["optimizer"], now[case]
        assert form(old["state"]) == form(new["state"]), case
        assert old.keys() == new.keys(), case
        for group, other in zip(old["param_groups"], new["param_groups"], strict=True):
            later = {key: value for key, value in other.items() if key in ADDED and key not in group}
            assert form(group) | form(later) == form(other), case
            assert all(value == ADDED[key] for key, value in later.items()), case


@pytest.mark.parametrize("make", [oput.Shampoo, oput.SOAP])
def test_options_that_came_later_have_their_default_where_a_state_dict_lacks_them(make: Any) -> None:
    saved = make([nn.Parameter(torch.ones(2, 2))]).state_dict()
    for key in ADDED:
        del saved["param_groups"][0][key]
    optimizer = make([nn.Parameter(torch.ones(2, 2))], precondition_frequency=5)
    optimizer.load_state_dict(saved)
    assert {key: optimizer.param_groups[0][key] for key in ADDED} == ADDED


def test_every_group_has_the_version() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = oput.AdamW([{"params": [p]}, {"params": []}])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group[FORMAT_KEY] for group in optimizer.state_dict()["param_groups"]] == [FORMAT] * 3
    assert [group[FORMAT_KEY] for group in oput.full_state_dict(optimizer)["param_groups"]] == [FORMAT] * 3


def test_the_version_is_this_releases_after_loading_an_older_one() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = oput.AdamW([p])
    for version in (0, None):
        saved = optimizer.state_dict()
        saved["param_groups"][0][FORMAT_KEY] = version
        if version is None:
            del saved["param_groups"][0][FORMAT_KEY]
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0][FORMAT_KEY] == FORMAT


@pytest.mark.parametrize("version", [2, 10, "1", None, 1.5])
def test_a_newer_format_is_refused(version: Any) -> None:
    optimizer = oput.AdamW([nn.Parameter(torch.ones(2))])
    saved = optimizer.state_dict()
    saved["param_groups"][0][FORMAT_KEY] = version
    with pytest.raises(ValueError, match=r"AdamW: group 0 of the state dict has format .*: upgrade oput_dist"):
        optimizer.load_state_dict(saved)


def newer_by_dcp(folder: str) -> str:
    """A checkpoint of a later release, through torch.distributed.checkpoint."""
    run = start("fsdp2", "lamb")
    train("fsdp2", "lamb", run, range(1))
    for group in run.optimizer.param_groups:
        group[FORMAT_KEY] = 2
    dcp.save({"lamb": parts(run)}, checkpoint_id=folder)
    with pytest.raises(ValueError, match="has format 2") as error:
        resumed_by_dcp("fsdp2", Path(folder), ["lamb"])
    return str(error.value)


def test_the_version_survives_torchs_checkpoints(pool: Pool, tmp_path: Path) -> None:
    for message in pool.run(2, newer_by_dcp, str(tmp_path)):
        assert "reads formats up to 1: upgrade oput_dist" in message


if __name__ == "__main__":
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    workers = Pool()
    workers.run(2, write, str(KEPT))
    workers.close()
