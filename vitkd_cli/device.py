"""Where models run, and how exactly they compute there."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

from vitkd_cli import __version__
from vitkd_cli.errors import UserError

_SAID = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE")


def device_named(name: str | None) -> torch.device:
    """What ``--device`` means; unset, a GPU where there is one."""
    present: dict[str, Any] = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    if name not in (None, "cpu", *present):
        raise UserError(f"there is no device {name!r}", f"one of cpu, {', '.join(present)}")
    if name in present and not present[name].is_available():
        raise UserError(f"--device {name}: this machine has no GPU that torch can use", "--device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> tuple[str, list[int]]:
    """This machine, and which of its cores the process may use; none where the system does not say."""
    return platform.node(), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def loader_workers(asked: int | None, processes: int, device: torch.device) -> int:
    """Loader processes for one of the processes of a machine.

    Args:
        asked: None leaves it to the cores. On a CPU, which computes as well, more than 4 gain nothing.
        processes: that share its cores.
    """
    if asked is not None:
        return min(asked, cores())
    share = cores() // processes
    return max(1, min(4, share) if device.type == "cpu" else share - 1)


def check_cores(device: torch.device, processes: int) -> None:
    """Refuse to start more processes on a CPU than it has cores: each would wait for the others."""
    if device.type == "cpu" and processes > cores():
        raise UserError(
            f"{processes} processes for the {cores()} cores of this machine",
            f"--num-processes {cores()}, and --grad-accum-steps for a larger global batch",
        )


def check_gpus(device: torch.device, processes: int) -> None:
    """Refuse more processes than GPUs."""
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes for the {torch.cuda.device_count()} GPUs of this machine",
            "start at most one process a GPU, or --device cpu",
        )


@contextmanager
def tensor_float32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Whether a GPU may multiply and convolve float32 in TF32, ten bits of mantissa; put back afterwards.

    timm's train.py and validate.py allow it: training is about twice as fast. On a CPU this does nothing, nor
    where somebody used torch's newer switches, which do not mix with these.
    """
    try:
        products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        device = torch.device("cpu")
    if device.type != "cuda":
        yield
        return
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def environment() -> dict[str, str]:
    """Versions, torch's build, devices, cores, memory; no path, and no name of anybody."""
    facts = {
        "vitkd": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    names = ["torchvision", "numpy", "pillow"]
    with suppress(PackageNotFoundError):  # a checkout that is not installed
        names += [re.split(r"[^\w.-]", requirement)[0] for requirement in requires("vitkd") or ()]
    for name in names:
        with suppress(PackageNotFoundError):  # of an extra
            facts[name] = version(name)
    gib = 2**30
    cuda = torch.version.cuda
    facts["torch's build"] = (
        f"CUDA {cuda}" if cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    )
    facts["GPUs"] = (
        ", ".join(
            f"{card.name} ({card.total_memory / gib:.0f} GiB)"
            for card in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        )
        or "none"
    )
    facts["mps, xpu"] = ", ".join(
        "yes" if place.is_available() else "no" for place in (torch.backends.mps, torch.xpu)
    )
    facts["cores"] = f"{cores()} of {os.cpu_count()}, {torch.get_num_threads()} threads of torch"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / gib:.1f} GiB"
    if os.path.isdir("/dev/shm"):
        facts["/dev/shm"] = f"{shutil.disk_usage('/dev/shm').total / gib:.1f} GiB"  # loader workers need it
    facts |= {name: os.environ[name] for name in _SAID if name in os.environ}
    return facts
