"""Several processes on one machine, started by torch.distributed.run's own launcher.

Where another launcher started us (:mod:`vitkd_cli.world`), nothing is launched here.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from vitkd_cli.errors import UserError
from vitkd_cli.text import resuming
from vitkd_cli.world import rank, world_size

_LOST = 75  # exit code of a process whose others are gone, between the processes of a run only
# A folder for errors and heartbeats of the processes. Torch's ``@record`` keeps the text of an error, but
# no hint and no exit code, and nothing where the launcher is stopped by a signal.
_ERRORS = "VITKD_ERRORS"
PARENT = "VITKD_PARENT"  # the number of a process with which this one ends


def is_launched() -> bool:
    """Are we one process of several already?"""
    return world_size() > 1


def is_main_process() -> bool:
    """Does this process print and write for all?"""
    return rank() == 0


def end_with_parent() -> None:
    """End, as by SIGTERM, when the process that started this one has ended: our launcher, or a sweep."""
    if launched_by_us():
        parent = os.getppid()
        heartbeat("the start")
    elif PARENT in os.environ:
        parent = int(os.environ[PARENT])
    else:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        if launched_by_us():
            shutil.rmtree(os.environ[_ERRORS], ignore_errors=True)  # nobody reads it any more
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


_said = 0.0


def heartbeat(place: str) -> None:
    """Note where this process is, at most once per second, for the process that started it."""
    global _said
    if (folder := os.environ.get(_ERRORS)) and time.monotonic() - _said > 1:
        _said = time.monotonic()
        with contextlib.suppress(OSError):
            (Path(folder) / f"{rank()}.heard").write_text(place)


class LostProcess(UserError):
    """Another process of this run does not answer; the process that started both knows why."""


def connection_lost(problem: BaseException, run: str | Path | None = None) -> LostProcess | None:
    """What a broken or silent connection to another process is to a user; None if it is something else."""
    text = str(problem)
    words = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "gloo", "NCCL")
    if not is_launched() or not any(word in text for word in words):
        return None
    hint = how_to_resume(run)
    if "connectFullMesh" in text:  # the processes met, and cannot talk
        hint = "GLOO_SOCKET_IFNAME=NAME of the network by which the others reach this machine"
    return LostProcess(f"rank {rank()} lost another process: {text.splitlines()[0]}", hint, exit_code=3)


def how_to_resume(run: str | Path | None) -> str:
    """The hint after a run had to stop: resume it, if it began."""
    began = run is not None and (Path(run) / "recipe.toml").is_file()
    return f"go on with: {resuming(run)}" if began else "start again"


def launched_by_us() -> bool:
    """Were we started by :func:`launch`, rather than by torchrun?"""
    return is_launched() and _ERRORS in os.environ


def be_found() -> None:
    """Have gloo wait for other machines on the network on which this one reaches the first process.

    It would wait where this machine's own name leads: on many systems to 127.0.1.1, where nobody finds it.
    """
    import psutil

    if not is_launched() or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(OSError):  # a machine whose name leads nowhere waits at 127.0.0.1
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
    first = os.environ["MASTER_ADDR"]
    if first == "localhost" or first.startswith("127."):
        return  # there is no other machine
    for place in (first, "192.0.2.1"):  # the first one finds itself by its name; the other leads out of it
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((place, int(os.environ["MASTER_PORT"])))  # sends nothing
            here = probe.getsockname()[0]
            for network, addresses in psutil.net_if_addrs().items():
                if not here.startswith("127.") and here in {one.address for one in addresses}:
                    os.environ["GLOO_SOCKET_IFNAME"] = network
                    return


def launch(processes: int, arguments: list[str], device: str | None, run: str | None = None) -> None:
    """Run ``vitkd ARGUMENTS`` in that many processes and wait.

    Args:
        device: what ``--device`` says.
    """
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from vitkd_cli.device import check_cores, check_gpus, device_named

    place = device_named(device)
    check_gpus(place, processes)
    check_cores(place, processes)
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if place.type == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""  # torch's barrier would wait on a GPU that it sees
    # The processes report errors themselves, once.
    for name in ("agent.server.api", "multiprocessing.api", "multiprocessing.errors"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="vitkd-") as words, patch_environment(**own, **{_ERRORS: words}):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=Path(words).name,
            max_restarts=0,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "vitkd_cli", *arguments)
        except ChildFailedError as failure:
            _raise_told(Path(words))
            raise _first_failure(failure, Path(words), processes, run) from None
        except SignalException as stopped:
            _raise_told(Path(words))
            name = signal.Signals(stopped.sigval).name
            raise UserError(f"stopped by {name}", exit_code=128 + int(stopped.sigval)) from None


def _first_failure(failure: Any, words: Path, processes: int, run: str | None) -> BaseException:
    """Which process made the others end, and where it was."""

    def last_heard(one: int) -> str:
        file = words / f"{one}.heard"
        if not file.exists():
            return ""
        return f", last heard of at {file.read_text()} {time.time() - file.stat().st_mtime:.0f} s ago"

    marks = {one: words / f"{one}.lost" for one in range(processes)}
    told = {one: mark.read_text() for one, mark in marks.items() if mark.exists()}
    silent = [one for one in marks if one not in told]
    if silent and any("imed out" in text for text in told.values()):
        return UserError(
            f"no answer from {'; '.join(f'rank {one}{last_heard(one)}' for one in silent)}",
            f"--dist-timeout SECONDS is how long the others wait; {how_to_resume(run)}",
            exit_code=3,
        )
    for one, ended in failure.failures.items():
        if ended.exitcode < 0:
            return UserError(
                f"rank {one} (process {ended.pid}) was ended by {signal.Signals(-ended.exitcode).name}"
                + last_heard(one),
                f"SIGKILL is often the system's answer to a lack of memory; {how_to_resume(run)}",
                exit_code=3,
            )
    codes = [ended.exitcode for ended in failure.failures.values() if ended.exitcode != _LOST]
    if codes:
        return SystemExit(codes[0])  # a bug: its traceback is printed already
    return UserError("the processes of the run lost each other", how_to_resume(run), exit_code=3)


def tell_launcher(error: UserError) -> bool:
    """Write an error for the process that started us to show; False if there is none, and we show it.

    torchrun gets it for the summary of its own.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)
    folder = os.environ.get(_ERRORS)
    if not (folder and is_launched() and Path(folder).is_dir()):
        return False
    if isinstance(error, LostProcess):
        name, text = f"{rank()}.lost", error.message
        error.exit_code = _LOST
    else:
        name, text = f"{rank():04d}.json", json.dumps(error.facts)
    try:
        (Path(folder) / name).write_text(text)
    except OSError:
        return False
    return True


def _raise_told(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        raise UserError(**json.loads(file.read_text()))
