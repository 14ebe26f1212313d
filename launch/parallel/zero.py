"""DeepSpeed's ZeRO: an engine around the model, of the files in launch/deepspeed/, or of one that --ds-config names."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from launch.errors import UsageError

__all__ = ["engine", "is_engine"]

CONFIGS = Path(__file__).resolve().parents[1] / "deepspeed"


def engine(
    model: nn.Module, make: Callable[[Any], Any], name: str, path: Path | None, bf16: bool, micro_batch: int
) -> Any:
    """DeepSpeed's engine around a model. UsageError for what its configuration or the optimizer does not allow.

    Args:
        model: on its device.
        make: the optimizer, from parameters.
        name: of --parallel: "zero2-ds" takes zero2.json.
        path: of another configuration.
        bf16: whether the engine computes in bf16; the optimizer sees fp32 in any case.
        micro_batch: sequences of a rank at a time.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed

        import oput_dist.deepspeed
    except ImportError as e:
        raise UsageError(
            f"--parallel {name} needs DeepSpeed ({e}): DS_BUILD_OPS=0 pip install 'oput-dist[deepspeed]'"
        ) from e
    from deepspeed.ops import __compatible_ops__

    if on_cpu:  # it would be compiled when ranks first meet, for half a minute
        __compatible_ops__["deepspeed_shm_comm"] = False
    config = _config(path or CONFIGS / f"{name.removesuffix('-ds')}.json")
    config |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_clipping": 0.0}  # --clip: in the optimizer
    config |= {"bf16": {"enabled": bf16}, "steps_per_print": 10**9}
    try:
        made, *_ = deepspeed.initialize(model=model, optimizer=make, config=config)
    except oput_dist.deepspeed.ConfigError as e:
        raise UsageError(f"--parallel {name}: {e}") from e
    return made


def _config(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"--ds-config {path} cannot be read ({e}); give a DeepSpeed configuration in JSON") from e
    if "optimizer" in found or "scheduler" in found:
        raise UsageError(f"--ds-config {path}: the optimizer and its schedule are for --optimizer and --schedule")
    return found


def is_engine(module: nn.Module) -> bool:
    """Whether a module is one of DeepSpeed's engines, told without importing DeepSpeed."""
    return type(module).__module__.startswith("deepspeed.")
