"""The study: the paper's tables on data that this machine carries, and docs/study.md with their pictures.

    python benchmarks/study.py                      # what is missing, hours on two cores; then the page
    python benchmarks/study.py --only digits-10 --seeds 1 2 3 --jobs 2
    python benchmarks/study.py --minutes 9 --jobs 15   # stops by itself, and goes on the next time
    python benchmarks/study.py --minutes 9 --jobs 5 --only glyphs-deep   # the list for a GPU
    python benchmarks/study.py --write              # the page alone

Nothing is downloaded. Every student is an arm of an ordinary run in ``runs/study``; its figures go to
benchmarks/study.jsonl, and a student that is there is not trained again.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from study_parts.glyphs import glyphs
from study_parts.page import write
from study_parts.plan import (
    ARMS,
    CURVE,
    DATA,
    EQUAL_TIME,
    SEEDS,
    TASKS,
    TEACHERS,
    student_recipe,
    teacher_recipe,
)
from study_parts.results import COSTS, Cell, add, cell_of, known
from study_parts.rivals import trained_by_timm

import vitkd_cli as vitkd
from vitkd_cli.files import write_json
from vitkd_cli.objective import parse
from vitkd_cli.training import trainer
from vitkd_cli.training.arms import WrittenArm

WORK = Path(os.environ.get("STUDY_WORK", "runs/study")).resolve()


CHUNK = 16  # arms of a run, all of one teacher: the first one pays for what it says, and for the views


@dataclass(frozen=True)
class Unit:
    """One run: arms of a data set, a length and a seed that are still to be trained."""

    data: str
    updates: int
    seed: int
    arms: tuple[str, ...]

    @property
    def folder(self) -> Path:
        arms = hashlib.sha256(" ".join(self.arms).encode()).hexdigest()[:8]
        return WORK / "units" / f"{self.data}-{self.updates}-{self.seed}-{arms}"

    @property
    def words(self) -> list[str]:
        """It as arguments of this script."""
        return ["unit", self.data, str(self.updates), str(self.seed), *self.arms]


def place_of(source: str) -> str:
    return "digits" if source == "digits" else str(glyphs(WORK / "data" / "glyphs"))


def train_teacher(source: str, key: str) -> None:
    folder = WORK / "teachers" / f"{source}-{key}"
    recipe = teacher_recipe(source, place_of(source), TEACHERS[key]).but(output=str(folder))
    vitkd.distill(recipe, resume="auto")


def drawn_once(load: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    """The loader, whose batches are kept: all arms of a seed see the same views of the same images."""
    seen: dict[str, list[Any]] = {}

    def loaded(images: Any, keys: Iterable[Any], *others: Any, **options: Any) -> Iterable[Any]:
        keys = list(keys)
        name = hashlib.sha256(repr((images.seed, keys)).encode()).hexdigest()
        if len(seen.get(name, ())) == len(keys):
            return seen[name]
        seen.clear()
        return kept(load(images, keys, *others, **options), seen.setdefault(name, []))

    def kept(batches: Iterable[Any], whole: list[Any]) -> Iterator[Any]:
        for batch in batches:
            whole.append(batch)
            yield batch

    return loaded


def train_unit(unit: Unit) -> None:
    """The students of a unit, as arms of one run, of which the first is the run's own; or one by timm."""
    data = DATA[unit.data]
    recipe = student_recipe(data, place_of(data.source), unit.seed, unit.updates)

    def settings(arm: str) -> dict[str, Any]:
        folder = WORK / "teachers" / f"{data.source}-{data.teacher_of(arm)}" / "student"
        return {"loss": ARMS[arm].loss, "teacher": str(folder)}

    first, *others = unit.arms
    if first in TASKS:
        teacher = WORK / "teachers" / f"{data.source}-{data.teacher_of(first)}" / "student"
        cell = trained_by_timm(first, unit.data, unit.updates, recipe, teacher)
        unit.folder.mkdir(parents=True, exist_ok=True)
        write_json(unit.folder / "cell.json", asdict(cell))
        return
    trainer.train_loader = drawn_once(trainer.train_loader)
    recipe = recipe.but(**settings(first), output=str(unit.folder))
    against = tuple(
        "; ".join(f"{key}={value}" for key, value in {**settings(name), "name": name}.items())
        for name in others
    )
    said = unit.folder.with_suffix(".said")  # what their teachers say is the same for all arms
    cache = str(said) if data.device == "cpu" else None  # on a GPU it is sooner computed than read
    vitkd.distill(recipe.but(against=against, teacher_cache=cache), resume="auto")
    shutil.rmtree(said, ignore_errors=True)


def measure_costs() -> None:
    """The CPU time of an update of some arms, interleaved, on one thread; beside the student alone."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {arm: [] for arm in ("alone", *EQUAL_TIME)}
    for _, (arm, spent) in product(range(3), seconds.items()):
        ends = [time.process_time()]
        for updates in (8, 208):  # the difference is 200 updates, without the start
            with TemporaryDirectory() as folder:
                recipe = student_recipe(DATA["digits-10"], "digits", 1, updates).but(
                    output=folder, report=False
                )
                teacher = WORK / "teachers" / "digits-wide" / "student"
                vitkd.distill(recipe.but(loss=ARMS[arm].loss, teacher=str(teacher)))
            ends.append(time.process_time())
        spent.append(ends[2] - 2 * ends[1] + ends[0])
    medians = {arm: median(spent) for arm, spent in seconds.items()}
    write_json(COSTS, {arm: round(spent / medians["alone"], 2) for arm, spent in medians.items()})


def collect(units: list[Unit]) -> int:
    """Note every finished student; how many are new."""
    before, found = len(known()), []
    for unit in units:
        if (file := unit.folder / "cell.json").exists():
            found.append(Cell(**json.loads(file.read_text())))
            continue
        for name in unit.arms:
            own = "student" if name == "alone" else "distilled"
            of_one = len(unit.arms) == 1
            place = own if name == unit.arms[0] else WrittenArm(name, parse("labels"), {}).place
            folder = unit.folder if of_one else unit.folder / f"{place}-{unit.seed}"
            if cell := cell_of(unit.data, unit.updates, name, folder):
                found.append(cell)
    add(found)
    return len(known()) - before


def units_of(names: list[str], seeds: list[int], arms: list[str], lengths: bool) -> list[Unit]:
    """What is still to be trained: one data set after the other, and of each its first arms first."""
    asked = [(name, DATA[name].updates, DATA[name].arms) for name in names]
    if lengths:
        asked += [(name, updates, list(CURVE)) for name in names for updates in DATA[name].lengths]
    there, units = known(), []
    taught = sorted(TEACHERS, key=lambda key: key != ARMS["alone"].teacher)
    for (name, updates, of_set), by, seed in product(asked, [*taught, *TASKS], seeds):
        left = [
            arm
            for arm in of_set
            if arm in arms
            and by == (arm if arm in TASKS else DATA[name].teacher_of(arm))
            and (name, updates, arm, seed) not in there
        ]
        units += [Unit(name, updates, seed, tuple(left[i : i + CHUNK])) for i in range(0, len(left), CHUNK)]
    return units


def teachers_of(unit: Unit) -> set[tuple[str, str]]:
    """The teachers that it needs, as (source, key)."""
    data = DATA[unit.data]
    return {(data.source, data.teacher_of(arm)) for arm in unit.arms}


def train(units: list[Unit], jobs: int, until: float) -> None:
    """The teachers that are missing, then the units, each as soon as its own teachers are there."""
    needed = sorted(set().union(*map(teachers_of, units)))
    with ThreadPoolExecutor(jobs) as pool:
        teachers = {
            pair: pool.submit(call, ["teacher", *pair], until)
            for pair in needed
            if not (WORK / "teachers" / "-".join(pair) / "run.json").exists()
        }

        def follow(unit: Unit) -> None:
            wait(teachers[pair] for pair in teachers_of(unit) if pair in teachers)
            call(unit.words, until)

        list(pool.map(follow, units))


def call(words: list[str], until: float) -> int:
    """A part of the work in a process of its own, told to stop when time is up: it saves itself."""
    if time.time() >= until:
        return 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STUDY_WORK": str(WORK)}
    log = WORK / "logs" / f"{'-'.join(words[:5]).replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        job = subprocess.Popen(
            [sys.executable, __file__, *words], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = job.wait(max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGTERM)
            code = job.wait()
    ended = "done" if code == 0 else f"exit code {code}, see {log}"
    print(f"{time.strftime('%H:%M:%S')} {' '.join(words[:5])}: {ended}", flush=True)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    here = [name for name, data in DATA.items() if data.device == "cpu" or torch.cuda.is_available()]
    parser.add_argument("--only", nargs="+", choices=DATA, default=here, metavar="DATA")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *TASKS], default=[*ARMS, *TASKS], metavar="ARM")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--lengths", action="store_true", help="other lengths of training, too")
    parser.add_argument("--costs", action="store_true", help="measure an update of some arms, on idle cores")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    if asked.costs:
        measure_costs()
    elif not asked.write:
        until = time.time() + 60 * asked.minutes
        sources = sorted({DATA[name].source for name in asked.only})
        for source in sources:
            place_of(source)
        units = units_of(asked.only, asked.seeds, asked.arms, asked.lengths)
        print(f"{sum(len(unit.arms) for unit in units)} students in {len(units)} runs", flush=True)
        train(units, asked.jobs, until)
        print(f"{collect(units)} new students")
    write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["teacher"]:
        train_teacher(*sys.argv[2:4])
    elif sys.argv[1:2] == ["unit"]:
        train_unit(Unit(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), tuple(sys.argv[5:])))
    else:
        main()
