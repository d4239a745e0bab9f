"""How many processes a run has and which one this is, whoever started them.

Torch and Accelerate read the variables of torchrun. What ``mpirun`` and ``srun`` say is put into these, once
and before anything else reads them; what cannot be joined is refused with the line to type.
"""

import os
import re
from zlib import crc32

from vitkd_cli.errors import UserError

_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Processes, which of them this is, and which on its machine. In a batch script that ``srun`` did not start
# there is no step. MPI comes first, since it may start its own daemons by ``srun``.
_LAUNCHERS = {
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
}
_ON_THIS_MACHINE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID")  # what tells jobs apart


def world_size() -> int:
    """How many processes a launcher started; if several, torchrun's variables are set from here on."""
    said = os.environ.get("WORLD_SIZE")
    if said == "1":  # of a Kubernetes pod, say: nobody to join
        return 1
    lacking = [name for name in _TORCHRUN if name not in os.environ]
    if said is None or lacking:
        size = _joined(said)
        if size is None and said is not None:
            raise _left_over(said, lacking)
        return size or 1
    if not said.isdecimal():
        raise UserError(f"WORLD_SIZE must be a number of processes, not {said!r}", "unset WORLD_SIZE")
    return int(said)


def rank() -> int:
    """Which of the processes this is; the first one prints and writes for all."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def speaks() -> bool:
    """Does this process show what every process of its machine finds wrong by itself?"""
    return world_size() == 1 or os.environ["LOCAL_RANK"] == "0"


def check_world(wanted: int) -> None:
    """Refuse another number of processes than a launcher started.

    Args:
        wanted: what ``--num-processes`` says.
    """
    if wanted not in (1, started := world_size()):
        raise UserError(
            f"--num-processes {wanted} was asked for, and {started} started",
            "leave it out, or give the launcher the same number",
        )


def _joined(said: str | None) -> int | None:
    """Put what a launcher says into torchrun's variables; None if there is no launcher.

    Args:
        said: ``WORLD_SIZE``, as batch scripts set it without the rest.
    """
    env = os.environ
    for launcher, names in _LAUNCHERS.items():
        if not all(name in env for name in names):
            continue
        size, rank, local = (env[name] for name in names)
        if size == "1" or said not in (None, size):
            return 1 if said is None else None
        address = env.get("MASTER_ADDR") or _address(launcher, size)
        job = " ".join(env.get(name, "") for name in _JOB)
        env |= {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": local, "MASTER_ADDR": address}
        if here := next(filter(None, map(env.get, _ON_THIS_MACHINE)), None):
            env.setdefault("LOCAL_WORLD_SIZE", here)
        env.setdefault("MASTER_PORT", str(15_000 + crc32(job.encode()) % 15_000))
        return int(size)
    if said is None and env.get("PMI_SIZE", "1") != "1":
        raise UserError(
            f"PMI_SIZE is {env['PMI_SIZE']}, and which process this is on its machine is not said",
            "torchrun --nproc-per-node N -m vitkd_cli …, or srun vitkd …",
        )
    # Accelerate's launcher for a CPU sets an address for several processes, and starts one.
    if said is None and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= env.keys():
        raise UserError(
            "accelerate launch was to start several processes on the CPU, and started one",
            "vitkd … --num-processes N, or torchrun --nproc-per-node N -m vitkd_cli …",
        )
    return None


def _left_over(size: str, lacking: list[str]) -> UserError:
    """Why a ``WORLD_SIZE`` cannot be joined."""
    told = f"WORLD_SIZE is set without {', '.join(lacking)}"
    if lacking == ["LOCAL_RANK"]:  # a pod per machine, in which torchrun is to start the processes
        place = "--node-rank $RANK --master-addr $MASTER_ADDR --master-port $MASTER_PORT"
        return UserError(told, f"torchrun --nnodes {size} --nproc-per-node N {place} -m vitkd_cli …")
    return UserError(
        f"{told}: it is left over from another job",
        "unset WORLD_SIZE; several processes are started with --num-processes N, or with torchrun",
    )


def _address(launcher: str, size: str) -> str:
    """The machine of the first process."""
    env = os.environ
    if size in {env.get(name) for name in _ON_THIS_MACHINE} or env.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if launcher == "srun" and hosts:
        return first_host(hosts)
    given = {"mpirun": "mpirun -x MASTER_ADDR=HOST", "mpiexec": "mpiexec -genv MASTER_ADDR HOST"}
    raise UserError(
        f"{launcher} started {size} processes, and nothing says on which machine the first one is",
        f"{given.get(launcher, 'MASTER_ADDR=HOST srun')} vitkd …",
    )


def first_host(hosts: str) -> str:
    """The first machine of a list as Slurm writes it: ``gpu[03-05,9],login`` → ``gpu03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else hosts)
