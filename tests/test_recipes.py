"""Every parallelism of launch/train.py: the curve of one process, checkpoints across, and docs/parallel.md."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import oput_dist as oput
from launch.data import read_corpus
from launch.errors import UsageError
from launch.model import GPT
from launch.options import parse
from launch.parallel import PARALLEL, Grid
from launch.train import Trainer, run
from launch.world import World
from tests.pool import Pool

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "parallel.md").read_text()
SMALL = ["--width", "12", "--layers", "1", "--heads", "6", "--context", "8", "--batch-size", "24", "--threads", "1"]
SMALL += ["--eval-every", "2", "--eval-sequences", "5", "--data", str(ROOT / "launch")]
STEADY = [*SMALL, "--schedule", "constant", "--lr", "0.01", "--opt", "backend=foreach"]
OPTIMIZERS = {"adamw": ["--accumulate", "2", "--clip", "0.5"], "lamb": []}
STEPS = 4
CELLS = [("ddp", 2), ("zero1", 3), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("tp", 3), ("fsdp2-tp", 4)]
CELLS += [("fsdp1", 2), ("fsdp1-flat", 3), ("fsdp1-grad-op", 2), ("fsdp1-grad-op-flat", 2)]
CELLS += [("fsdp1-hybrid", 4), ("fsdp1-hybrid-flat", 4)]


def here() -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size)


def train(*runs: list[str]) -> str:
    """Each command line of train.py, one after the other, on the ranks of the pool; what the last one said.

    As if matplotlib were not installed: a plot takes a third of the time. tests/test_launch_scripts.py looks at plots.
    """
    for flags in runs:
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            patch.setitem(sys.modules, "matplotlib", None)
            status = run(flags, here())
        assert status == 0, f"{flags}: {said.getvalue()}"
    return said.getvalue()


def flags_of(optimizer: str, parallel: str, out: Path, steps: int = STEPS, *more: object) -> list[str]:
    flags = ["--optimizer", optimizer, *OPTIMIZERS[optimizer], "--parallel", parallel, "--steps", steps, "--out", out]
    return [*STEADY, *map(str, [*flags, *more])]


def curve(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "lr", "val_loss") if key in row} for row in rows]


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    """Losses differ by the order in which ranks add up: 3e-7 at most was seen."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=3e-6)


@pytest.fixture(scope="module")
def single(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    out = tmp_path_factory.mktemp("single")
    pool.run(1, train, *(flags_of(optimizer, "single", out / optimizer) for optimizer in OPTIMIZERS))
    curves = {optimizer: curve(out / optimizer) for optimizer in OPTIMIZERS}
    for rows in curves.values():
        assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    return curves


def test_every_parallelism_is_tested_and_documented() -> None:
    by_deepspeed = {"zero1-ds", "zero2-ds", "zero3-ds"}  # tests/test_deepspeed_launch.py
    assert {parallel for parallel, _ in CELLS} == PARALLEL.keys() - {"single"} - by_deepspeed
    assert {parse(words, world).parallel for words, world in commands()} == PARALLEL.keys()


@pytest.mark.parametrize(("parallel", "ranks"), CELLS)
def test_curve_is_that_of_one_process_and_resumes_bitwise(
    pool: Pool, single: dict[str, list[dict[str, float]]], tmp_path: Path, parallel: str, ranks: int
) -> None:
    """AdamW with micro-batches, interrupted; its uninterrupted run saves too, in the middle. Lamb, which sums norms, is
    interrupted in the next test."""
    saving = ["--checkpoint-every", 2, "--checkpoint"]
    runs = [
        flags_of("adamw", parallel, tmp_path / "adamw", STEPS, *saving, tmp_path / "other"),
        flags_of("adamw", parallel, tmp_path / "parts", 2, *saving, tmp_path / "saved"),
        flags_of("adamw", parallel, tmp_path / "parts", STEPS, "--checkpoint", tmp_path / "saved", "--resume"),
        flags_of("lamb", parallel, tmp_path / "lamb"),
    ]
    pool.run(ranks, train, *runs)
    for optimizer in OPTIMIZERS:
        assert_close(curve(tmp_path / optimizer), single[optimizer])
    assert curve(tmp_path / "parts") == curve(tmp_path / "adamw")


CHAIN = [("fsdp2", 2), ("fsdp2-tp", 4), ("single", 1), ("fsdp1", 2), ("hsdp", 4), ("fsdp1-flat", 3), ("tp", 2)]
CHAIN += [("zero1", 3), ("fsdp1-hybrid-flat", 4), ("ddp", 2), ("fsdp1-grad-op", 2), ("single", 1)]


def test_each_parallelism_continues_from_the_one_before(pool: Pool, tmp_path: Path) -> None:
    pool.run(1, train, flags_of("lamb", "single", tmp_path / "whole", len(CHAIN)))
    for step, (parallel, ranks) in enumerate(CHAIN, 1):
        saving = ["--checkpoint", tmp_path / "saved", "--resume", "--eval-every", 1]
        pool.run(ranks, train, flags_of("lamb", parallel, tmp_path / "parts", step, *saving))
    parts, whole = curve(tmp_path / "parts"), curve(tmp_path / "whole")
    assert [row["step"] for row in parts] == list(range(len(CHAIN) + 1))
    for row in whole:
        assert {key: parts[int(row["step"])][key] for key in row} == pytest.approx(row, rel=3e-6)


# --- how ranks share the work ---


class Collectives(TorchDispatchMode):
    """Counts collectives by name. torch's CommDebugMode also follows modules, and stumbles over those of FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def gradient_collectives(parallel: str, accumulate: int) -> Counter[str]:
    """How often each collective runs while the gradients of a step are computed."""
    flags = [*SMALL, "--parallel", parallel, "--accumulate", str(accumulate)]
    options = parse(flags, here())
    trainer = Trainer(options, here(), read_corpus(options.data, options.context), torch.device("cpu"))
    trainer.optimizer.step(lambda: trainer.forward_backward(0))
    trainer.optimizer.zero_grad()
    with Collectives() as collectives:
        trainer.forward_backward(1)
    return collectives.counts


@pytest.mark.parametrize("parallel", ["fsdp2", "hsdp", "fsdp1", "fsdp1-flat", "fsdp1-grad-op", "fsdp1-hybrid"])
def test_gradients_travel_once_a_step(pool: Pool, parallel: str) -> None:
    once, thrice = (pool.run(4, gradient_collectives, parallel, n)[0] for n in (1, 3))
    exchanges = [name for name in once if "reduce" in name]
    assert exchanges
    assert [thrice[name] for name in exchanges] == [once[name] for name in exchanges]


@pytest.mark.parametrize(
    ("flags", "ranks", "axes", "sizes"),
    [
        ("--parallel single", 1, (), ()),
        ("--parallel zero1", 3, ("replica",), (3,)),
        ("--parallel hsdp", 4, ("replica", "shard"), (2, 2)),
        ("--parallel hsdp --shard-size 1", 3, ("replica", "shard"), (3, 1)),
        ("--parallel fsdp1-hybrid-flat --shard-size 4", 8, ("replica", "shard"), (2, 4)),
        ("--parallel tp --heads 6 --width 96", 3, ("tensor",), (3,)),
        ("--parallel fsdp2-tp", 6, ("shard", "tensor"), (3, 2)),
        ("--parallel fsdp2-tp --tensor-size 4", 8, ("shard", "tensor"), (2, 4)),
    ],
)
def test_meshes(flags: str, ranks: int, axes: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    world = World(0, ranks, 0, ranks)
    grid = parse(["--batch-size", "24", *flags.split()], world).grid(world)
    assert grid == Grid(axes, sizes)
    shares = [grid.reader(rank) for rank in range(ranks)]
    assert sorted(set(shares)) == list(range(grid.readers))
    tensor = sizes[-1] if "tensor" in axes else 1
    assert shares == [rank // tensor for rank in range(ranks)]


def test_shards_stay_on_one_machine_by_default() -> None:
    world = World(5, 8, 1, 4)
    assert parse(["--parallel", "hsdp"], world).grid(world) == Grid(("replica", "shard"), (2, 4))


@pytest.mark.parametrize(
    ("flags", "ranks", "sentence"),
    [
        ("--parallel hsdp --shard-size 3", 4, "--shard-size 3 does not divide the 4 rank.* hsdp; use 1, 2, 4"),
        ("--parallel fsdp2-tp", 3, "--tensor-size 2 does not divide the 3 rank.* fsdp2-tp; use 1, 3"),
        ("--parallel fsdp2 --shard-size 2", 4, "--shard-size 2 is not for --parallel fsdp2; use it with hsdp or"),
        ("--parallel tp --tensor-size 2", 4, "--tensor-size 2 is not for --parallel tp; use it with fsdp2-tp"),
        ("--parallel tp --heads 4", 3, "--heads 4 cannot be divided over the 3 ranks .* tp .*; use a multiple of 3"),
        ("--parallel fsdp2-tp --batch-size 9", 4, r"9 .* 2 group\(s\) of 2 rank\(s\) times 1 .* use 8 or 10"),
        ("--parallel fsdp2-tp --tensor-size 0", 4, "--tensor-size: '0' is not a whole number of at least 1"),
        ("--clip 0", 1, "--clip: '0' is not a number above 0"),
    ],
)
def test_what_does_not_go_together(flags: str, ranks: int, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse(flags.split(), World(0, ranks, 0, ranks))


def test_clipping_is_asked_for_by_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--opt", "max_grad_norm=1", "--out", str(tmp_path)], World(0, 1, 0, 1)) == 2
    assert "--opt max_grad_norm is not for you to set; use --clip" in capsys.readouterr().err


def refusal(*flags: str) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return run([*SMALL, *flags], here()), said.getvalue()


@pytest.mark.parametrize("parallel", ["fsdp1", "fsdp1-flat"])
def test_what_fsdp1_cannot_save_is_refused_before_training(pool: Pool, tmp_path: Path, parallel: str) -> None:
    flags = ["--optimizer", "adafactor", "--parallel", parallel, "--checkpoint", str(tmp_path), "--out", str(tmp_path)]
    (status, said), other = pool.run(2, refusal, *flags)
    assert (status, other) == (2, (2, ""))
    assert re.fullmatch(
        "train.py: --checkpoint: Adafactor keeps sums [^\n]* FSDP1 cannot hold; use --parallel fsdp2 [^\n]*\n", said
    )
    assert not (tmp_path / "metrics.jsonl").exists()


def test_scalars_of_the_parameter_groups_are_saved(pool: Pool, tmp_path: Path) -> None:
    """Momo keeps averages of the loss there; and it needs the loss of each step."""
    flags = [*SMALL, "--optimizer", "momo", "--schedule", "constant", "--opt", "use_fstar=True", "backend=foreach"]
    pool.run(1, train, [*flags, "--steps", "4", "--out", str(tmp_path / "whole")])
    for parallel, ranks, steps in (("hsdp", 4, "1"), ("fsdp2-tp", 4, "2"), ("fsdp1-flat", 3, "3"), ("zero1", 2, "4")):
        saving = ["--parallel", parallel, "--checkpoint", str(tmp_path / "saved"), "--resume", "--eval-every", "4"]
        pool.run(ranks, train, [*flags, *saving, "--steps", steps, "--out", str(tmp_path / "parts")])
    parts, whole = curve(tmp_path / "parts"), curve(tmp_path / "whole")
    assert [row["loss"] for row in parts[1:]] == pytest.approx([row["loss"] for row in whole[1:]], rel=3e-6)
    assert whole[-1]["loss"] < whole[1]["loss"] - 0.1


# --- docs/parallel.md ---


def commands() -> list[tuple[list[str], World]]:
    """The arguments of train.py in each command, and the ranks that it is for."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            starter, arguments = line.split("launch/train.py")
            ranks = re.fullmatch(r"(?:python|torchrun --standalone --nproc-per-node (\d)) ", starter)
            assert ranks, line
            size = int(ranks[1] or 1)
            found.append((shlex.split(arguments), World(0, size, 0, size)))
    return found


def test_commands_run(pool: Pool, tmp_path: Path) -> None:
    """In the order of the page, so that a checkpoint of one command can be continued by a later one."""
    for words, world in commands():
        if parse(words, world).parallel.endswith("-ds"):
            continue  # tests/test_deepspeed_launch.py
        if "--checkpoint" in words:
            words[words.index("--checkpoint") + 1] = str(tmp_path / words[words.index("--checkpoint") + 1])
        steps = str(int(words[words.index("--steps") + 1]) // 100) if "--steps" in words else "1"
        pool.run(world.size, train, [*words, *SMALL, "--warmup", "0", "--steps", steps, "--out", str(tmp_path)])


def sections() -> dict[str, str]:
    """The example of each section that has one, under the name of its parallelism."""
    parts = re.findall(r"^## `([\w-]+)`[^\n]*\n(.*?)(?=^## |\Z)", DOCS, flags=re.DOTALL | re.MULTILINE)
    return {name: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0] for name, text in parts}


def losses(example: str) -> tuple[list[float], Counter[str]]:
    """Three steps of what an example builds, and the collectives of the last optimizer step."""
    torch.manual_seed(1)
    names = {"model": GPT(12, 2, 6, 8), "dist": dist, "oput": oput, "torch": torch, "device": torch.device("cpu")}
    exec(example, names)
    module, optimizer = names["module"], names["optimizer"]
    tokens = torch.arange(32).view(4, 8)
    found = []
    for _ in range(3):
        loss = module(tokens).logsumexp(-1).square().mean()
        loss.backward()
        with Collectives() as collectives:
            optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, collectives.counts


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """The losses of one process, by optimizer."""
    example = sections()["single"]
    found = {name: losses(example.replace("oput.Lamb", f"oput.{name}"))[0] for name in ("AdamW", "Lamb")}
    assert all(rows[2] < rows[0] * 0.97 for rows in found.values())
    return found


def table() -> dict[str, dict[str, int]]:
    """By parallelism, how many collectives the page says that a step of each optimizer takes."""
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\d) \| (\d) \|$", DOCS, flags=re.MULTILINE)
    return {name: {"AdamW": int(adamw), "Lamb": int(lamb)} for name, adamw, lamb in rows}


@pytest.mark.parametrize("parallel", sections())
def test_examples_give_the_losses_of_one_process_in_as_many_collectives_as_the_table_says(
    pool: Pool, alone: dict[str, list[float]], parallel: str
) -> None:
    ranks = next(world.size for words, world in commands() if parse(words, world).parallel == parallel)
    example = sections()[parallel]
    for name, collectives in table()[parallel].items():
        for found, counts in pool.run(ranks, losses, example.replace("oput.Lamb", f"oput.{name}")):
            assert found == pytest.approx(alone[name], rel=3e-6)
            assert (name, counts["allreduce_"]) == (name, collectives)


def test_every_section_has_a_row_in_the_table() -> None:
    assert table().keys() == sections().keys()
