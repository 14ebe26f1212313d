"""The command line of train.py."""

import argparse
import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launch.errors import UsageError
from launch.parallel import PARALLEL, Grid
from launch.schedule import SCHEDULES
from launch.world import World
from launch.wrapping import WRAPPERS


@dataclass
class Options:
    """What the command line asks for; the fields are described by `train.py --help`."""

    optimizer: str
    opt: dict[str, Any]
    wrap: list[str]
    lr: float | None
    clip: float | None
    schedule: str
    warmup: int
    parallel: str
    shard_size: int | None
    tensor_size: int | None
    ds_config: Path | None
    device: str | None
    dtype: str | None
    threads: int | None
    steps: int
    batch_size: int
    accumulate: int
    seed: int
    data: Path | None
    width: int
    layers: int
    heads: int
    context: int
    eval_every: int
    eval_sequences: int
    checkpoint: Path | None
    checkpoint_every: int
    resume: bool
    out: Path

    def grid(self, world: World) -> Grid:
        """UsageError if the sizes do not fit the parallelism or `world`."""
        given = {"shard": self.shard_size, "tensor": self.tensor_size}
        return Grid.of(self.parallel, PARALLEL[self.parallel][0], world, given)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists all flags)")


def _whole(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _literal(text: str) -> Any:
    """A Python literal; true, false and none in any case; anything else is a string."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key, _literal(value)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "train.py",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a small byte-level GPT on text, on one process or, under torchrun, on many.",
    )
    group = parser.add_argument_group("optimizer")
    group.add_argument("--optimizer", default="lamb", metavar="NAME", help="any of oput.available()")
    group.add_argument("--opt", nargs="+", action="extend", default=[], type=_assignment, metavar="KEY=VALUE",
                       help="options of the optimizer, in Python's form: --opt betas=(0.9,0.95) eps=1e-6")  # fmt: skip
    group.add_argument("--wrap", nargs="+", choices=WRAPPERS, default=[], metavar="NAME",
                       help=f"what stands around it, innermost first: {', '.join(WRAPPERS)}")  # fmt: skip
    group.add_argument("--lr", type=_number, help="peak learning rate (default: the optimizer's)")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate after warm-up")
    group.add_argument("--warmup", type=_whole(0), default=0, metavar="STEPS", help="steps of linear warm-up")
    group.add_argument("--clip", type=_positive, metavar="NORM", help="largest norm of the gradient (default: any)")
    group = parser.add_argument_group("ranks")
    group.add_argument("--parallel", choices=PARALLEL, help="(default: fsdp2 on several ranks, single on one)")
    group.add_argument("--shard-size", type=_whole(1), metavar="N", help="ranks that hold one replica, for hsdp and "
                       "fsdp1-hybrid (default: those of a machine, or half of them on one machine)")  # fmt: skip
    group.add_argument("--tensor-size", type=_whole(1), metavar="N", help="ranks that share the heads, for fsdp2-tp "
                       "(default: 2)")  # fmt: skip
    group.add_argument("--ds-config", type=Path, metavar="FILE", help="a DeepSpeed configuration for zero1-ds to "
                       "zero3-ds (default: launch/deepspeed/zero1.json to zero3.json)")  # fmt: skip
    group.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    group.add_argument("--dtype", choices=("fp32", "bf16"), help="of the computation (default: bf16 on GPUs, or fp32)")
    group.add_argument("--threads", type=_whole(1), help="per rank on a CPU (default: the cores, shared out)")
    group.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it, beside LOCAL_RANK
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=_whole(1), default=1000, help="optimizer steps")
    group.add_argument("--batch-size", type=_whole(1), default=32, metavar="N", help="sequences a step, on all ranks")
    group.add_argument("--accumulate", type=_whole(1), default=1, metavar="N", help="micro-batches a step")
    group.add_argument("--seed", type=_whole(0), default=0, help="of the initial model and the order of the data")
    group.add_argument("--data", type=Path, metavar="FOLDER", help="text to learn (default: Python's standard library)")
    group.add_argument("--width", type=_whole(1), default=128, help="of the model")
    group.add_argument("--layers", type=_whole(1), default=4, help="of the model")
    group.add_argument("--heads", type=_whole(1), default=4, help="of the attention")
    group.add_argument("--context", type=_whole(1), default=128, help="bytes that the model sees")
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, default=Path("runs/train"), metavar="DIR",
                       help="folder of metrics.jsonl and loss.png, which a new run replaces")  # fmt: skip
    group.add_argument("--eval-every", type=_whole(0), default=50, metavar="STEPS", help="0: only after the last step")
    group.add_argument("--eval-sequences", type=_whole(1), default=64, metavar="N", help="held-out sequences used")
    group.add_argument("--checkpoint", type=Path, metavar="DIR", help="folder of the checkpoint (default: none)")
    group.add_argument("--checkpoint-every", type=_whole(0), default=0, metavar="STEPS", help="0: only after the last")
    group.add_argument("--resume", action="store_true", help="continue from the checkpoint, if there is one")
    return parser


def parse(arguments: Sequence[str] | None, world: World) -> Options:
    """The options of this run; UsageError if they make no sense together or for `world`."""
    values = vars(_parser().parse_args(arguments))
    pairs = values.pop("opt")
    values.pop("local_rank")
    options = Options(opt=dict(pairs), **values)
    if len(options.opt) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise UsageError(f"--opt sets {twice} twice; give it once")
    options.parallel = options.parallel or ("fsdp2" if world.size > 1 else "single")
    if options.parallel == "single" and world.size > 1:
        raise UsageError(f"--parallel single is for one rank, not {world.size}; use ddp, zero1 or fsdp2")
    grid = options.grid(world)
    pieces = grid.readers * options.accumulate
    if options.batch_size % pieces:
        below = options.batch_size // pieces * pieces
        readers = "rank(s)" if grid.tensor == 1 else f"group(s) of {grid.tensor} rank(s)"
        fits = f"{below} or {below + pieces}" if below else f"{pieces}"
        raise UsageError(
            f"--batch-size {options.batch_size} cannot be divided over {grid.readers} {readers} times "
            f"{options.accumulate} micro-batch(es); use {fits}"
        )
    if options.ds_config is not None and not options.parallel.endswith("-ds"):
        raise UsageError(f"--ds-config is for zero1-ds, zero2-ds and zero3-ds, not --parallel {options.parallel}")
    if options.width % options.heads:
        raise UsageError(f"--width {options.width} is not a multiple of --heads {options.heads}")
    if options.heads % grid.tensor:
        raise UsageError(
            f"--heads {options.heads} cannot be divided over the {grid.tensor} ranks that --parallel "
            f"{options.parallel} gives each sequence; use a multiple of {grid.tensor}"
        )
    if options.warmup >= options.steps:
        raise UsageError(f"--warmup {options.warmup} must be less than --steps {options.steps}")
    if options.checkpoint is None and (options.resume or options.checkpoint_every):
        raise UsageError("--resume and --checkpoint-every need --checkpoint DIR")
    return options
