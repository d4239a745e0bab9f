"""The commands of docs/scale.md that start processes, run on this machine with a small run in their place.

pytest -m slow -s tests/test_scale.py -k however    # prints a table of every way to start two processes
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file
from test_world import HYDRA, OPEN_MPI, SLURM

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text().replace("\\\n", " ")
BLOCKS = dict(re.findall(r"^```(bash|yaml)\n(.*?)^```$", PAGE, re.M | re.S))
TORCHRUN = shlex.split(re.findall(r"^torchrun .*$", PAGE, re.M)[0])
POD = list(yaml.safe_load_all(BLOCKS["yaml"]))[1]["spec"]["template"]["spec"]["containers"][0]

# srun, which gives its processes the variables of a step on one machine.
SRUN = """#!/bin/bash
export SLURM_JOB_ID=$$ SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & ids="$ids $!"; done
for id in $ids; do wait $id || code=$?; done
exit $code
"""


@pytest.fixture(scope="module")
def small(tiny, flags):
    """A run of three updates of 20 images, in place of the page's."""
    exact = {"model_dtype": "float64", "mixed_precision": "no"}
    return flags({**tiny, **exact, "epochs": 1, "steps": 3, "batch_size": 20, "global_batch": 20})


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    words = [sys.executable, "-m", "vitkd_cli", "distill", *small, "--output", str(folder)]
    subprocess.run(words, check=True, capture_output=True)
    return folder


def with_small(words: list[str], small: list[str], folder: Path) -> list[str]:
    """A command of the page, of whose run the folder and ``--resume auto`` stay."""
    assert "auto" in re.split("[ =]", words[-1]) and any("--output" in word for word in words)
    return [*words[: words.index("distill") + 1], *small, "--output", str(folder), "--resume", "auto"]


def started(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """A command that is under way."""
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env={**os.environ, **environment}, **said)


def node(words: list[str], number: int, port: int, address: str = "127.0.0.1") -> list[str]:
    """torchrun as one of two machines with one process each."""
    own = words.index("-m")
    asked = [part for word in words[1:own] for part in word.split("=", 1)]
    here = {
        "--nproc-per-node": "1",
        "--node-rank": str(number),
        "--master-addr": address,
        "--master-port": str(port),
    }
    for flag, value in here.items():
        asked[asked.index(flag) + 1] = value
    return [sys.executable, "-m", "torch.distributed.run", *asked, *words[own:]]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("words", [TORCHRUN, [*POD["command"], *POD["args"]]], ids=["torchrun", "kubernetes"])
def test_two_machines_train_as_one_process(words, small, alone, port, tmp_path, read_log):
    words = with_small(words, small, tmp_path / "run")
    nodes = [started(node(words, number, port)) for number in (0, 1)]
    said = [one.communicate(timeout=300) for one in nodes]
    assert [one.returncode for one in nodes] == [0, 0], said
    assert "student  vit_tiny" in said[0][0] and not said[1][0]
    for ours, theirs in zip(read_log(tmp_path / "run"), read_log(alone), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), rel=1e-9)


@pytest.mark.slow
def test_the_job_of_slurm_trains_as_one_process_and_is_queued_again(small, alone, tmp_path, read_log):
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "$@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command, end = re.findall(r"^srun (vitkd .*)\n(\[.*)$", BLOCKS["bash"], re.M)[0]
    words = with_small(shlex.split(command), small, tmp_path / "run")
    script = f"srun {shlex.join([sys.executable, '-m', 'vitkd_cli', *words[1:]])}\n{end}"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "requeue" not in done.stdout, done
    assert done.stdout.count("curves.png") == 1  # one of them speaks
    for ours, theirs in zip(read_log(tmp_path / "run"), read_log(alone), strict=True):
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), rel=1e-9)
    stopped = subprocess.run(
        ["bash", "-c", f"(exit 143)\n{end}"], env=environment, capture_output=True, text=True
    )
    assert stopped.stdout == "requeue 7\n"


# Every way to start two processes ---------------------------------------------------------------------------

DISTILL = ("-m", "vitkd_cli", "distill")
STEP = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
BY_HAND = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
# What a launcher tells two processes on this machine: what both hear, and the names that count them.
TOLD = {
    "srun": (STEP, ("SLURM_PROCID", "SLURM_LOCALID")),
    "mpirun": (OPEN_MPI, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
    "mpiexec": ({**HYDRA, "MPI_LOCALNRANKS": "2"}, ("PMI_RANK", "MPI_LOCALRANKID")),
    "variables by hand": (BY_HAND, ("RANK", "LOCAL_RANK")),
}
CONFIGURED = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_machines: 1
num_processes: 2
"""
REFUSED = "accelerate launch was to start several processes on the CPU, and started one"


@pytest.fixture(scope="module")
def shown():
    """What each way came to."""
    table = [("started by", "exit", "loss", "weights", "lines that each says")]
    yield table
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print("", *("  ".join(map(str.ljust, row, widths)) for row in table), sep="\n")


@pytest.fixture
def namespaces():
    """Two networks with a cable between them; what to type before a command, and the first one's address."""
    names = [f"vitkd-{os.getpid()}-{end}" for end in "ab"]
    cable = [f"v{os.getpid()}{end}" for end in "ab"]
    tries = [f"ip netns add {name}" for name in names]
    tries.append(f"ip link add {cable[0]} netns {names[0]} type veth peer name {cable[1]} netns {names[1]}")
    for number, (name, end) in enumerate(zip(names, cable, strict=True), 1):
        tries.append(f"ip -n {name} addr add 10.77.0.{number}/24 dev {end}")
        tries += [f"ip -n {name} link set {place} up" for place in ("lo", end)]
    try:
        for command in tries:
            subprocess.run(command.split(), check=True, capture_output=True, text=True)
        yield [["ip", "netns", "exec", name] for name in names], "10.77.0.1"
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no network namespaces here: {getattr(problem, 'stderr', '') or problem}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def finished(running, logs=None):
    """Exit codes of what was started, and what each process said on stdout, the first one's first.

    Args:
        logs: the folder in which torchrun keeps what its processes say, one for each of ``running``.
    """
    said = [one.communicate(timeout=500) for one in running]
    outs = [out for out, _ in said]
    if logs:
        files = [file for log in logs for file in sorted(log.glob("*/attempt_0/*/stdout.log"))]
        outs = [file.read_text() for file in files]
    return [one.returncode for one in running], outs, "".join(err for _, err in said)


def largest(ours, theirs):
    """The largest difference between two runs' losses, and between their students' weights."""
    losses = [[line["loss"] for line in lines] for lines in (ours[0], theirs[0])]
    students = [load_file(folder / "student" / "model.safetensors") for folder in (ours[1], theirs[1])]
    assert students[0].keys() == students[1].keys()
    return (
        max(abs(one - other) for one, other in zip(*losses, strict=True)),
        max(float(abs(students[0][name] - students[1][name]).max()) for name in students[0]),
    )


def torchrun(logs, *flags):
    return [sys.executable, "-m", "torch.distributed.run", "--redirects=3", f"--log-dir={logs}", *flags]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["--num-processes 2", "torchrun", "two nodes on loopback", "two network namespaces", *TOLD]
)
def test_however_two_processes_are_started_they_train_as_one(
    way, small, alone, port, tmp_path, read_log, shown, request
):
    run, logs = tmp_path / "run", [tmp_path / end for end in "ab"]
    words = [*DISTILL, *small, "--output", str(run)]
    if way in TOLD:
        told, counting = TOLD[way]
        told = {**told, "MASTER_PORT": str(port)}
        both = [started([sys.executable, *words], **{**told, **dict.fromkeys(counting, n)}) for n in "01"]
        codes, outs, err = finished(both)
    elif way.startswith("two"):
        before, address = [[], []], "127.0.0.1"
        if "namespaces" in way:
            before, address = request.getfixturevalue("namespaces")
        asked = shlex.split(
            "torchrun --nnodes=2 --nproc-per-node=1 --node-rank=0 --master-addr=a --master-port=0"
        )
        nodes = [
            node([*asked, "--redirects=3", f"--log-dir={log}", *words], n, port, address)
            for n, log in enumerate(logs)
        ]
        codes, outs, err = finished([started([*b, *one]) for b, one in zip(before, nodes, strict=True)], logs)
    elif way == "torchrun":
        codes, outs, err = finished([started([*torchrun(logs[0], "--nproc-per-node=2"), *words])], logs[:1])
    else:
        codes, outs, err = finished([started([sys.executable, *words, *way.split()])])
    assert set(codes) == {0}, err
    differences = largest((read_log(run), run), (read_log(alone), alone))
    lines = [len(out.splitlines()) for out in outs]
    shown.append((way, f"{codes}", *(f"{one:.0e}" for one in differences), f"{lines}"))
    assert max(differences) < 1e-9
    assert lines[0] > 3 and not any(lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accelerate launch --cpu", "accelerate launch of a MULTI_CPU configuration"])
def test_accelerates_launcher_of_one_process_is_refused_with_the_line_to_type(way, small, tmp_path, shown):
    (tmp_path / "own.yaml").write_text(CONFIGURED)
    flags = (
        ["--cpu", "--num_processes=2"]
        if way.endswith("--cpu")
        else [f"--config_file={tmp_path / 'own.yaml'}"]
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", *flags, *DISTILL]
    codes, outs, err = finished([started([*launch, *small, "--output", str(tmp_path / "run")])])
    shown.append((way, f"{codes}", "refused", "refused", f"{[len(out.splitlines()) for out in outs]}"))
    assert codes == [1] and REFUSED in err  # by accelerate, whose process ended with 2
    assert "hint: vitkd … --num-processes N, or torchrun" in err
    assert not (tmp_path / "run").exists()
