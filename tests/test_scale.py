"""The commands of docs/scale.md that start processes, run on this machine with a small run in their place."""

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
    return flags({**tiny, "epochs": 1, "steps": 3, "batch_size": 20, "global_batch": 20})


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


def node(words: list[str], number: int, port: int) -> subprocess.Popen[str]:
    """torchrun as one of two machines with one process each, both on this one."""
    own = words.index("-m")
    asked = [part for word in words[1:own] for part in word.split("=", 1)]
    here = {
        "--nproc-per-node": "1",
        "--node-rank": str(number),
        "--master-addr": "127.0.0.1",
        "--master-port": str(port),
    }
    for flag, value in here.items():
        asked[asked.index(flag) + 1] = value
    command = [sys.executable, "-m", "torch.distributed.run", *asked, *words[own:]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("words", [TORCHRUN, [*POD["command"], *POD["args"]]], ids=["torchrun", "kubernetes"])
def test_two_machines_train_as_one_process(words, small, alone, tmp_path, read_log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = with_small(words, small, tmp_path / "run")
    nodes = [node(words, number, port) for number in (0, 1)]
    said = [one.communicate(timeout=300) for one in nodes]
    assert [one.returncode for one in nodes] == [0, 0], said
    assert "student  vit_tiny" in said[0][0] and not said[1][0]
    for ours, theirs in zip(read_log(tmp_path / "run"), read_log(alone), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), rel=1e-5)


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
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), rel=1e-5)
    stopped = subprocess.run(
        ["bash", "-c", f"(exit 143)\n{end}"], env=environment, capture_output=True, text=True
    )
    assert stopped.stdout == "requeue 7\n"
