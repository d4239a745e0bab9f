"""Small models, small photographs, and the command line in this process."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

# Several test processes share few cores: more threads only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("VITKD_DATA", None)
# Where Python writes no bytecode, as in many containers, each process compiles torch and timm: ten seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

TEACHER = "img_size=32,patch_size=8,embed_dim=48,depth=3,num_heads=3"
STUDENT = "img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"


def pytest_collection_finish() -> None:
    """What every test module imported is no garbage: a run collects it often, and need not look there."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """A recipe's values for a run of seconds on the built-in digits; a random teacher of ten classes."""
    return {
        "teacher": "vit_tiny",
        "teacher_pretrained": False,
        "teacher_kwargs": f"{TEACHER},num_classes=10",
        "student": "vit_tiny",
        "model_kwargs": STUDENT,
        "data": "digits",
        "shots": 10,
        "epochs": 2,
        "batch_size": 20,
        "workers": 0,
        "log_interval": 1,
        "device": "cpu",
        "report": False,  # a page takes seconds; tests/report/ draws it
    }


@pytest.fixture(scope="session")
def flags() -> Callable[[dict[str, Any]], list[str]]:
    """A recipe's values as command-line arguments."""

    def spell(values: dict[str, Any]) -> list[str]:
        arguments: list[str] = []
        for name, value in values.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                arguments.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                arguments += [flag, str(value)]
        return arguments

    return spell


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs cut from scikit-image's photographs: a plain folder with one folder per class, no split."""
    import numpy as np
    from PIL import Image
    from skimage import data

    root = tmp_path_factory.mktemp("photos")
    sources = {"astronaut": data.astronaut(), "cat": data.chelsea(), "coffee": data.coffee()}
    generator = np.random.default_rng(0)
    for name, picture in sources.items():
        (root / name).mkdir()
        for index in range(24):
            y, x = (int(generator.integers(0, side - 96)) for side in picture.shape[:2])
            Image.fromarray(picture[y : y + 96, x : x + 96]).save(root / name / f"{index:02d}.jpg")
    return root


CLOCK = ("time", "images_per_second", "data_wait")  # keys of a log's line


@pytest.fixture(scope="session")
def read_log() -> Callable[[Path], list[dict[str, Any]]]:
    """``log.jsonl`` without what depends on the clock."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]

    return read


class Crash(BaseException):
    """The process is gone: nothing that it would still have done to a file happens."""


@pytest.fixture
def crash_after() -> Callable[[int, Callable[[], Any]], bool]:
    """Do something that dies after so many operations on files; did it live to its end?"""

    def crash(operations: int, act: Callable[[], Any]) -> bool:
        left = operations

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Crash
                return real(*args, **options)

            return operation

        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "mkdir", "unlink", "rmdir", "fsync", "chmod"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                act()
            except Crash:
                return False
        return True

    return crash


@pytest.fixture
def at_step() -> Iterator[Callable[[int, Callable[[], Any]], None]]:
    """Do something right after an optimizer's step of this number, counted from 1."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handles = []

    def wait(number: int, act: Callable[[], Any]) -> None:
        steps = count(1)
        hook = register_optimizer_step_post_hook(lambda *_: act() if next(steps) == number else None)
        handles.append(hook)

    yield wait
    for handle in handles:
        handle.remove()


@pytest.fixture
def registry(monkeypatch) -> None:
    """The terms that a test registers are forgotten after it."""
    from vitkd_cli import terms

    terms.registered_terms()
    monkeypatch.setattr(terms, "_registry", dict(terms._registry))


def _in_this_process(monkeypatch: pytest.MonkeyPatch, captured: Any) -> Callable[..., tuple[int, str, str]]:
    from vitkd_cli.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitkd", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *captured.readouterr())

    return run


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """``vitkd ARGUMENTS`` in this process: exit code, stdout, stderr."""
    return _in_this_process(monkeypatch, capsys)


@pytest.fixture
def launcher(monkeypatch, capfd) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """As :func:`cli`, with what the processes say that this one starts."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    yield _in_this_process(monkeypatch, capfd)
    for number, handler in zip(numbers, before, strict=True):  # torch's launcher leaves its own
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=quiet)
        yield running
        running.close()
