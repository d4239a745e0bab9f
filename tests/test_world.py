"""Which of how many processes this is, as every launcher says it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from zoo import LEVIT

from vitkd_cli import UserError, evaluate
from vitkd_cli import world as launchers

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
SLURM = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}


@pytest.fixture
def started(monkeypatch):
    """The environment of a process that was started with these variables and no others."""

    def start(*variables):
        environment = {key: value for each in variables for key, value in each.items()}
        monkeypatch.setattr(os, "environ", environment)
        return environment

    return start


@pytest.mark.parametrize(
    ("variables", "size", "rank", "local", "address"),
    [
        (TORCHRUN, 2, 1, "1", "h"),
        (SLURM, 4, 3, "1", "gpu03"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1"}, 4, 3, "1", "127.0.0.1"),
        ({**SLURM, "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "7"}, 4, 3, "1", "h"),
        (OPEN_MPI, 2, 1, "1", "127.0.0.1"),
        ({**SLURM, **OPEN_MPI}, 2, 1, "1", "127.0.0.1"),  # whose daemons srun started
        ({**HYDRA, "MASTER_ADDR": "h"}, 2, 1, "0", "h"),
        ({**SLURM, "PMI_SIZE": "4", "PMI_RANK": "3"}, 4, 3, "1", "gpu03"),  # srun --mpi=pmi2
    ],
)
def test_whoever_started_us_we_are_told_by_torchruns_variables(
    started, variables, size, rank, local, address
):
    env = started(variables)
    assert launchers.world_size() == size
    assert launchers.rank() == rank
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), local, str(size))
    assert env["MASTER_ADDR"] == address
    assert 0 < int(env["MASTER_PORT"]) < 32768
    assert launchers.world_size() == size
    assert launchers.speaks() is (local == "0")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "7"},  # a pod of its own
        {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # sbatch
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_process_that_is_alone_joins_nobody(started, variables):
    started(variables)
    assert launchers.world_size() == 1
    assert launchers.rank() == 0
    assert launchers.speaks()


def test_two_jobs_on_a_machine_meet_at_two_ports(started):
    ports = set()
    for job in ("41", "42"):
        env = started(SLURM, {"SLURM_JOB_ID": job})
        launchers.world_size()
        ports.add(env["MASTER_PORT"])
    assert len(ports) == 2


@pytest.mark.parametrize(
    ("variables", "told", "cure"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set without RANK, LOCAL_RANK", "unset WORLD_SIZE"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE must be a number", "unset WORLD_SIZE"),
        (
            {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "7"},
            "WORLD_SIZE is set without LOCAL_RANK",
            "torchrun --nnodes 4 --nproc-per-node N --node-rank $RANK",
        ),
        (HYDRA, "nothing says on which machine", "mpiexec -genv MASTER_ADDR HOST vitkd"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "nothing says on", "mpirun -x MASTER_ADDR=HOST"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE is 2", "torchrun --nproc-per-node N -m vitkd_cli"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "accelerate launch was to start several",
            "vitkd … --num-processes N",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused_with_the_line_to_type(started, variables, told, cure):
    started(variables)
    with pytest.raises(UserError, match=told) as refused:
        launchers.world_size()
    assert cure in refused.value.hint


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[03-05,9],login", "gpu03"),
        ("rack[2-3]n[10,12]-ib,x", "rack2n10-ib"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_machine_of_slurms_list(hosts, first):
    assert launchers.first_host(hosts) == first


@pytest.fixture(scope="module")
def as_srun():
    """Two processes as srun starts them: exit codes, and what each said."""

    def run(*arguments, code=None):
        step = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
        step |= {"SLURM_JOB_ID": str(os.getpid()), "COLUMNS": "200"}
        command = [sys.executable, *(["-c", code] if code else ["-m", "vitkd_cli"]), *arguments]
        both = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            )
            for rank in "01"
        ]
        told = [process.communicate(timeout=300) for process in both]
        return [process.returncode for process in both], told

    return run


@pytest.mark.slow
def test_started_by_srun_two_processes_are_one_run_whose_log_tells_of_what_is_saved(
    tiny, flags, as_srun, read_log, tmp_path
):
    """The student has BatchNorm, whose running statistics are each process's own."""
    own = {"student": "levit_128s", "model_kwargs": ",".join(f"{k}={v}" for k, v in LEVIT.items())}
    more = {"loss": "labels", "batch_size": 10, "epochs": 1, "steps": 3, "lr": 0.01, "model_ema": True}
    values = {**tiny, **own, **more, "model_ema_decay": 0.5, "select": "ema"}
    codes, [first, second] = as_srun("distill", *flags(values), "--output", str(tmp_path))
    assert codes == [0, 0], (first, second)
    assert "student  " in first[0] + first[1] and "--sync-bn" in first[0] + first[1]
    assert not second[0] and "student  " not in second[1]
    *updates, validation = read_log(tmp_path)
    assert [line["epoch"] for line in updates] == pytest.approx([0.2, 0.4, 0.6])  # 20 of 100 images each
    found = evaluate(str(tmp_path), device="cpu", workers=0).metrics
    assert (validation["loss"], validation["top1"]) == pytest.approx((found.loss, found.top1), rel=1e-6)


def test_what_both_find_wrong_is_said_once_and_the_number_asked_for_must_be_theirs(as_srun):
    codes, [first, second] = as_srun("eval", "vit_tiny", "--num-processes", "3", "--device", "cpu")
    assert codes == [2, 2]
    assert "error: --num-processes 3 was asked for, and 2 started" in first[1]
    assert second == ("", "")


def test_jobs_side_by_side_are_not_trained_as_one(tiny, flags, as_srun, tmp_path):
    by_rank = (
        "import os, sys; from vitkd_cli.cli import main\n"
        "sys.argv += ['--seed', os.environ['SLURM_PROCID']]; main()"
    )
    codes, [first, second] = as_srun("distill", *flags(tiny), "--output", str(tmp_path / "run"), code=by_rank)
    assert codes == [2, 2], (first, second)
    assert "processes 0 and 1 of one job have different settings: seed 0 and 1" in first[1]
    assert "seed" not in second[1] and not (tmp_path / "run").exists()
