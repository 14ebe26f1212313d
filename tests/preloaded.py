"""What every process that tests fork has imported: once for all of them, in the server that they are forked from.

Importing costs each process seconds otherwise. Not more than torch: with Triton, Dynamo and the tests themselves
imported before the fork, a rank died of a segmentation fault in one of two whole runs, and never in ten runs before.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when Inductor is imported

# ruff: noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.debug
