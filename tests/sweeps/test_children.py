"""Several processes at once: who waits, who fails, and what a signal does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from vitkd_cli.recipe import Recipe
from vitkd_cli.sweeps.children import StoppedBySignal, Task, last_words, places_of, run_all


def task(folder: Path, name: str, code: str, **options) -> Task:
    return Task(name, [sys.executable, "-c", code], folder / f"{name}.log", **options)


def test_as_many_go_on_as_there_are_places(tmp_path):
    """Each has the environment of its place; one waits for what another makes; a failure ends no other."""
    made = tmp_path / "made"
    code = "import os, time; time.sleep(0.5); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    tasks = [
        task(tmp_path, "first", f"{code}; open({str(made)!r}, 'w').close()"),
        task(tmp_path, "second", code, ready=made.exists),
        task(tmp_path, "third", f"{code}; print('error: no luck'); print('hint: none'); raise SystemExit(2)"),
    ]
    ends, at_once = {}, []
    places = [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    run_all(tasks, places, lambda one, words: ends.update({one.name: words}), at_once.append)
    assert ends == {"first": "", "second": "", "third": "no luck"}
    assert ["first", "third"] in at_once and max(map(len, at_once)) == 2
    assert not any("first" in names and "second" in names for names in at_once)
    assert {(tmp_path / f"{name}.log").read_text()[:1] for name in ends} == {"4", "5"}


def test_what_waits_for_a_failure_is_not_begun(tmp_path):
    ends = {}
    tasks = [
        task(tmp_path, "first", "raise ValueError('of ours')"),
        task(tmp_path, "second", "", ready=lambda: False, never="not begun: no first"),
    ]
    run_all(tasks, [{}], lambda one, words: ends.update({one.name: words}), lambda names: None)
    assert ends["first"] == "ValueError: of ours"
    assert ends["second"] == "not begun: no first"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_each_save_itself(tmp_path, number):
    code = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: (print('saved'), sys.exit(143)))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    tasks = [task(tmp_path, name, code) for name in ("one", "two")]

    def stop() -> None:
        while not all(one.log.exists() and "up" in one.log.read_text() for one in tasks):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal) as stopped:
        run_all(tasks, [{}, {}], lambda *_: None, lambda names: None)
    assert stopped.value.number == number
    assert [one.log.read_text() for one in tasks] == ["up\nsaved\n"] * 2
    assert signal.getsignal(number) == before


def test_cores_are_shared(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert places_of(Recipe(device="cpu"), 1) == [{}]
    assert places_of(Recipe(device="cpu"), 2) == [{"OMP_NUM_THREADS": "4"}] * 2


def test_last_words(tmp_path):
    log = tmp_path / "log"
    assert last_words(log) == "it left no log"
    log.write_text("error: an old one\nerror: the disk is full\nhint: make room\n\n")
    assert last_words(log) == "the disk is full"
    log.write_text("")
    assert last_words(log) == "it ended without a word"
