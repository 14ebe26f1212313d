"""Train a small byte-level GPT with any optimizer of the suite: torchrun --nproc-per-node 2 launch/train.py --help."""

import dataclasses
import inspect
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

if not __package__:  # started as a script: find the neighbouring modules as the package `launch`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import oput_dist as oput
from launch import checkpoint, data, parallel
from launch.errors import UsageError
from launch.estimates import curved, refresh
from launch.model import GPT
from launch.mpi import adopt_ranks
from launch.options import Options, parse
from launch.parallel import zero
from launch.report import Clock, Report, Row
from launch.schedule import scale
from launch.world import (
    World,
    choose_device,
    connect,
    leave,
    mean_over_ranks,
    same_everywhere,
    set_up_device,
    together,
)
from launch.wrapping import averaged, title, wrapped

INSTEAD = {"lr": "--lr", "params": "--layers", "shard_group": "--parallel zero1", "max_grad_norm": "--clip"}


def build_optimizer(
    options: Options, model: nn.Module, module: nn.Module | None = None
) -> oput.Optimizer | oput.Wrapper:
    """The optimizer that the command line asks for; UsageError with the library's own sentence for what it refuses.

    Of a `module` that is DDP around the model, the ranks share work on whole matrices.
    """
    arguments = dict(options.opt)
    for key, flag in INSTEAD.items():
        if key in arguments:
            raise UsageError(f"--opt {key} is not for you to set; use {flag}")
    if options.lr is not None:
        arguments["lr"] = options.lr
    if options.clip is not None:
        arguments["max_grad_norm"] = options.clip
    if options.parallel == "zero1":
        arguments["shard_group"] = dist.group.WORLD
    elif isinstance(module, DistributedDataParallel):
        arguments["module"] = module
    try:
        known = inspect.signature(oput.lookup(options.optimizer)).parameters
        if "num_iterations" in known and not {"num_iterations", "num_epochs"} & arguments.keys():
            arguments["num_iterations"] = options.steps  # a schedule of its own needs the length of the run
        optimizer = oput.create(options.optimizer, model, **arguments)
    except (ValueError, TypeError) as e:
        raise UsageError(str(e)) from e
    return wrapped(optimizer, options.wrap)


class Trainer:
    """A model, its optimizer and its text, spread over the ranks of `world`."""

    def __init__(self, options: Options, world: World, corpus: data.Corpus, device: torch.device) -> None:
        self.options, self.world, self.corpus, self.device = options, world, corpus, device
        self.bf16 = (options.dtype or ("bf16" if device.type == "cuda" else "fp32")) == "bf16"
        torch.manual_seed(options.seed)
        self.grid = options.grid(world)
        model = GPT(options.width, options.layers, options.heads, options.context).to(device)
        self.size = sum(p.numel() for p in model.parameters())  # of the whole: FSDP1 leaves each rank a part
        self.optimizer: Any
        if options.parallel.endswith("-ds"):
            micro_batch = options.batch_size // (self.grid.readers * options.accumulate)
            make = partial(build_optimizer, options, model)
            self.module = zero.engine(
                model, lambda _: make(), options.parallel, options.ds_config, self.bf16, micro_batch
            )
            self.optimizer = self.module.basic_optimizer
        else:
            self.module = parallel.spread(model, options.parallel, self.grid, device, self.bf16)
            self.optimizer = build_optimizer(options, parallel.unwrapped(self.module), self.module)
        self.model = parallel.unwrapped(self.module)
        self.peak_lr = float(self.optimizer.param_groups[0]["lr"])
        self.clock = Clock(device)

    def logits(self, module: nn.Module, inputs: Tensor) -> Tensor:
        autocast = self.bf16 and not parallel.casts(module)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            logits: Tensor = module(inputs)
        return logits

    def loss(self, module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Nats per byte, for each sequence."""
        logits = self.logits(module, inputs)
        # In two dimensions, since in three the CUDA kernel is not deterministic.
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(dim=1)

    def step(self, step: int) -> Row:
        """0-based step `step`; nothing waits for the device."""
        options = self.options
        lr = self.peak_lr * scale(options.schedule, step, options.steps, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        marks = [self.clock.now()]
        inner, estimated = curved(self.optimizer), False
        if inner is not None and inner.due:
            with together(self.world):  # a model may not be differentiable as the estimator needs it
                estimated = refresh(inner, self.logits, self.module, next(self.batches(step)))
        marks.append(self.clock.now())

        def gradients() -> Tensor:  # as a closure, since some optimizers need the loss
            loss = self.forward_backward(step)
            marks.append(self.clock.now())
            return loss

        loss = parallel.optimizer_step(self.module, self.optimizer, gradients)
        self.optimizer.zero_grad()
        start, before, *_, middle = marks  # some optimizers ask for gradients twice
        moments = (start, before, middle, self.clock.now())
        return Row(step + 1, mean_over_ranks(loss, self.world), lr, moments, estimated)

    def batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches of a step: inputs and targets."""
        options, grid, text = self.options, self.grid, self.corpus.train
        starts = data.sequence_starts(len(text), options.context, options.batch_size, options.seed, step)
        for some in data.share(starts, grid.reader(self.world.rank), grid.readers, options.accumulate):
            yield data.sequences(text, some, options.context, self.device)

    def forward_backward(self, step: int) -> Tensor:
        """Accumulate the gradients of one global batch; the mean loss of this rank's share."""
        options, total = self.options, torch.zeros((), device=self.device)
        for part, (inputs, targets) in enumerate(self.batches(step)):
            with parallel.gradient_exchange(self.module, last=part == options.accumulate - 1):
                loss = self.loss(self.module, inputs, targets).mean()
                parallel.backward(self.module, loss, options.accumulate)
            total += loss.detach() / options.accumulate
        return total

    def held_out_loss(self) -> Tensor:
        """That of the weights that the optimizer would leave, which with an average are not those it trains."""
        inner = self.optimizer.origin if isinstance(self.optimizer, oput.Wrapper) else self.optimizer
        if isinstance(inner, oput.ScheduleFree):
            inner.eval()
        with averaged(self.optimizer):
            loss = self._held_out_loss()
        if isinstance(inner, oput.ScheduleFree):
            inner.train()
        return loss

    @torch.no_grad()
    def _held_out_loss(self) -> Tensor:
        """Over sequences spread evenly over the held-out text. All ranks make the same number of forward passes."""
        options, grid, text = self.options, self.grid, self.corpus.held_out
        count = options.eval_sequences
        starts = torch.linspace(0, len(text) - options.context - 1, count).long()
        micro_batch = options.batch_size // (grid.readers * options.accumulate)
        total = torch.zeros((), device=self.device)
        for begin in range(0, count, micro_batch * grid.readers):
            wanted = torch.arange(micro_batch) + begin + grid.reader(self.world.rank) * micro_batch
            inputs, targets = data.sequences(text, starts[wanted % count], options.context, self.device)
            losses = self.loss(self.model, inputs, targets)
            total += (losses * (wanted < count).to(self.device, non_blocking=True)).sum()
        return mean_over_ranks(total, self.world) * (grid.readers / count)

    def curvature(self) -> oput.SophiaReport | None:
        """How much is clipped, and how large the estimates are; for Sophia."""
        inner = curved(self.optimizer)
        return inner.report() if isinstance(inner, oput.Sophia) else None

    def settle(self) -> None:
        """Let DDP choose its buckets, as it does in the first backward pass, before the first real step.

        The order in which gradients are summed depends on the buckets, so that otherwise the first step after a resume
        would round differently from the same step of an uninterrupted run.
        """
        if isinstance(self.module, DistributedDataParallel):
            self.module(torch.zeros(1, self.options.context, dtype=torch.long, device=self.device)).sum().backward()
            self.optimizer.zero_grad()

    def describe(self) -> dict[str, Any]:
        """What this run is, for its checkpoints."""
        run = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self.options).items()}
        run |= {"optimizer": title(self.optimizer), "lr": self.peak_lr, "ranks": self.world.size}
        run |= {"dtype": "bf16" if self.bf16 else "fp32", "text": self.corpus.digest}
        return run

    def headline(self) -> str:
        options = self.options
        place = f"{torch.get_num_threads()} thread(s) each" if self.device.type == "cpu" else "NCCL"
        return (
            f"{title(self.optimizer)}, {options.parallel}, {self.grid} on {self.device.type} "
            f"({place}, {'bf16' if self.bf16 else 'fp32'}); GPT of {self.size / 1e6:.2f} M parameters; "
            f"{len(self.corpus.train) / 1e6:.1f} MB of text from {self.corpus.source}"
        )


def start(options: Options, world: World) -> tuple[Trainer, int]:
    """Everything before the first step: the trainer, and the step that it starts from. Bad input ends the run here."""
    with together(world):
        device = choose_device(options.device, world)
        set_up_device(device, options.threads, world)
        corpus = data.read_corpus(options.data, options.context)
    with together(world):
        same_everywhere(world, "text or version of Python", corpus.digest)
    with together(world):
        trainer = Trainer(options, world, corpus, device)
    if options.checkpoint is None:
        return trainer, 0
    with together(world):
        if options.parallel.endswith("-ds"):
            raise UsageError(
                f"--checkpoint is not for --parallel {options.parallel}, whose engine has save_checkpoint and "
                "load_checkpoint of its own (docs/deepspeed.md); use zero1 or fsdp2, or leave it out"
            )
        if world.rank == 0:
            make_folder("--checkpoint", options.checkpoint)
        checkpoint.check_savable(trainer.model, trainer.optimizer)
        found = checkpoint.newest(options.checkpoint)
        if found and not options.resume:
            raise UsageError(f"{found.path} exists; continue it with --resume or give another --checkpoint folder")
    if found is None:
        if options.resume and world.rank == 0:
            print(f"no checkpoint in {options.checkpoint} yet: starting from step 0", flush=True)
        return trainer, 0
    run = trainer.describe()
    with together(world):
        checkpoint.check(found, run, trainer.model, trainer.optimizer)
    with together(world):
        checkpoint.load(found, run, trainer.model, trainer.optimizer)
    if world.rank == 0:
        print(f"continuing from {found.path}{checkpoint.differences(found, run)}", flush=True)
    return trainer, found.step


def train(trainer: Trainer, first: int) -> None:
    """Run the steps from 0-based step `first` on, with a report on rank 0."""
    options, world, report = trainer.options, trainer.world, None
    with together(world):
        if world.rank == 0:
            print(trainer.headline(), flush=True)
            report = open_report(trainer, first)
    try:
        if first == 0:
            val_loss = trainer.held_out_loss()
            if report:
                report.first(val_loss)
        trainer.settle()
        for step in range(first, options.steps):
            row = trainer.step(step)
            if due(row.step, options.eval_every, options.steps):
                row = dataclasses.replace(row, val_loss=trainer.held_out_loss(), curvature=trainer.curvature())
            folder = options.checkpoint if due(row.step, options.checkpoint_every, options.steps) else None
            if report:
                report.add(row, flush=folder is not None)
            if folder is not None:
                checkpoint.save(folder, row.step, trainer.describe(), trainer.model, trainer.optimizer, world)
    finally:
        if report:
            report.close()
    if report:
        finish(report, options)


def due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def open_report(trainer: Trainer, first: int) -> Report:
    options = trainer.options
    make_folder("--out", options.out)
    tokens = options.batch_size * options.context
    return Report(
        options.out, first or -1, options.steps, tokens, trainer.clock, lambda: oput.state_bytes(trainer.optimizer)
    )


def make_folder(flag: str, folder: Path) -> None:
    """Make sure, before any work, that results can be written into `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UsageError(f"{flag} {folder} cannot be written ({e.strerror}); give a folder that can") from e


def finish(report: Report, options: Options) -> None:
    """Say what came out, and where it is."""
    held_out = [row["val_loss"] for row in report.history if "val_loss" in row]
    if held_out:
        print(f"held-out loss: {held_out[0]:.3f} at first, {held_out[-1]:.3f} at the end (nats per byte)")
    if report.estimating is not None:
        print(f"estimates:     {report.estimating:.1%} of the time of steps without them")
    print(f"metrics:       {report.metrics}")
    print(f"loss curve:    {report.plot() or 'not drawn, since matplotlib is not installed'}")
    if options.checkpoint is not None:
        print(f"checkpoint:    {options.checkpoint / f'step-{options.steps:06d}'}", flush=True)


def run(arguments: Sequence[str] | None, world: World) -> int:
    """Train as the command line says; the exit status."""
    try:
        with together(world):
            options = parse(arguments, world)
        if options.parallel != "single" and not dist.is_initialized():
            connect(world)
        train(*start(options, world))
    except SystemExit as e:  # raised on all ranks together
        return int(e.code or 0)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; 0, or 2 after one sentence about bad input, or 1 if it could not be finished."""
    try:
        adopt_ranks()
    except UsageError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return e.status
    world = World.from_environment()
    if world.size > 1:
        connect(world)
    status = run(arguments, world)
    leave()
    return status


if __name__ == "__main__":
    sys.exit(main())
