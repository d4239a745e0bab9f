"""``vitkd env``: what a bug report needs."""

import json
import os
import platform
import re
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from vitkd_cli.cli.flags import AsJson, command_of, waking

_SAID = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE")


def _env(shown: AsJson) -> None:
    """Print what a bug report needs: versions, torch's build, devices, cores, memory. No path, no name of yours."""
    from vitkd_cli.terminal import Terminal

    with waking():
        facts = _facts()
    if shown.as_json:
        print(json.dumps(facts))
        return
    Terminal().facts(facts)


def _facts() -> dict[str, Any]:
    import torch

    from vitkd_cli import __version__
    from vitkd_cli.device import cores

    facts: dict[str, Any] = {
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
            f"{torch.cuda.get_device_name(index)} ({torch.cuda.get_device_properties(index).total_memory / gib:.0f} GiB)"
            for index in range(torch.cuda.device_count())
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


command = command_of("env", _env, AsJson)
