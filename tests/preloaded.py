"""What every process that tests fork has imported: once for all of them, in the server that they are forked from.

Importing costs each process four seconds otherwise, and memory. Frozen, none of it is collected, or copied for it.
"""

from __future__ import annotations

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when Inductor is imported

# ruff: noqa: F401
import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.tensor.debug

import benchmarks.machine_code
import oput_dist.kernels.compiling
import tests.cases
import tests.checkpoints
import tests.wrapped

gc.collect()
gc.freeze()
