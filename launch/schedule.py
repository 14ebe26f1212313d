"""Learning-rate schedules: pure functions of the step, so that resuming needs no scheduler state."""

import math

SCHEDULES = ("constant", "cosine", "flat-cosine")
FLAT = 0.7  # the part of the steps after which flat-cosine begins to fall


def scale(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The factor on the peak learning rate of 0-based step `step` out of `steps`.

    It rises linearly to 1 at step `warmup`, reached from 1 / (warmup + 1); then `constant` stays at 1, `cosine` falls
    to 0 at `steps`, and `flat-cosine` stays at 1 until 70% of the steps and falls from there.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, round(FLAT * steps)) if schedule == "flat-cosine" else warmup
    if schedule == "constant" or step <= start:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - start) / (steps - start))))
