"""Several processes on one machine, started by torch.distributed.run's own launcher.

Accelerate's CPU launch silently starts one rank; on GPUs ``torchrun`` and ``accelerate launch`` work
as well, and then nothing is launched here.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from vitkd_cli.errors import UserError

_ERRORS = "VITKD_ERRORS"  # a folder in which a process leaves its last words for the one that started it


def is_launched() -> bool:
    """Are we one process of several already?"""
    return "WORLD_SIZE" in os.environ


def launched_by_us() -> bool:
    """Is it :func:`launch` that waits for us, rather than torchrun?"""
    return is_launched() and _ERRORS in os.environ


def launch(processes: int, arguments: list[str], device: str | None, run: str | None = None) -> None:
    """Run ``vitkd ARGUMENTS`` in that many processes and wait.

    Args:
        device: what ``--device`` says.

    Raises:
        UserError: there are fewer GPUs; or whatever the first process to fail would have told the user.
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
    # What went wrong is told by the process itself, once.
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
            _pass_on(Path(words))
            code = next(iter(failure.failures.values())).exitcode
            raise SystemExit(code if code > 0 else 1) from None  # a bug: its traceback is printed already
        except SignalException as stopped:
            _pass_on(Path(words))
            name = signal.Signals(stopped.sigval).name
            raise UserError(f"stopped by {name}", exit_code=128 + int(stopped.sigval)) from None


def leave_word(error: UserError) -> bool:
    """Leave an error for the process that started us; False if there is none and we must tell it."""
    folder = os.environ.get(_ERRORS)
    if not (folder and is_launched()):
        return False
    content: dict[str, Any] = {
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "details": error.details,
    }
    (Path(folder) / f"{int(os.environ.get('RANK', 0)):04d}.json").write_text(json.dumps(content))
    return True


def _pass_on(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        raise UserError(**json.loads(file.read_text()))
