"""Ranks that mpirun or srun started, in the environment variables that torchrun would have set."""

import os
import socket

from launch.errors import UsageError

__all__ = ["adopt_ranks"]


def adopt_ranks() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from MPI or Slurm.

    Does nothing where RANK is set (torchrun, the deepspeed launcher), or under neither.

    Raises:
        UsageError: under mpirun without mpi4py; under srun without MASTER_ADDR and MASTER_PORT.
    """
    if "RANK" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))  # deepspeed's name for it
    elif "OMPI_COMM_WORLD_RANK" in os.environ or {"PMI_RANK", "MPI_LOCALRANKID"} <= os.environ.keys():
        _from_mpi()
    elif {"SLURM_PROCID", "SLURM_STEP_ID"} <= os.environ.keys():
        _from_slurm()


def _from_mpi() -> None:
    try:
        from mpi4py import MPI
    except ImportError as e:
        raise UsageError(f"mpirun needs mpi4py ({e}): pip install 'oput-dist[mpi]'") from e
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = None
    if world.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = ("127.0.0.1" if local.size == world.size else socket.gethostname(), probe.getsockname()[1])
    host, port = world.bcast(address)
    _set(world.rank, world.size, local.rank, local.size)
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))


def _from_slurm() -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(f"under srun {missing[0]} must be set, as in launch/slurm.sh")
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
    size = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    _set(int(os.environ["SLURM_PROCID"]), size, int(os.environ.get("SLURM_LOCALID", "0")), int(per_node))


def _set(rank: int, size: int, local_rank: int, local_size: int) -> None:
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    os.environ.update({name: str(value) for name, value in values.items()})
