"""What the study has found so far: one line per trained student, kept with the repository."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from vitkd_cli.evaluation import Metrics
from vitkd_cli.evaluation.contrasts import Scores
from vitkd_cli.files import read_sealed
from vitkd_cli.training import Result

STORE = Path(__file__).resolve().parents[1] / "study.jsonl"
COSTS = STORE.with_name("study_costs.json")  # of an update, in updates of the student alone
Key = tuple[str, int, str, int]  # data, updates, arm, seed


@dataclass(frozen=True)
class Cell:
    """A trained student.

    Attributes:
        right: on which validation images it was right, packed bits in hexadecimal.
        images: of the validation split.
        shares: of the student's gradient, by term, mean over the updates at which they were logged.
        seconds: from the first update to the last.
        machine: what it was trained on.
    """

    data: str
    updates: int
    arm: str
    seed: int
    top1: float
    loss: float | None
    agreement: float | None
    right: str
    images: int
    shares: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    machine: str = ""

    @classmethod
    def of(cls, key: Key, metrics: Metrics, seconds: float) -> Self:
        """Of what a student said."""
        return cls(
            *key,
            top1=metrics.top1,
            loss=metrics.loss,
            agreement=None,
            right=np.packbits(metrics.right.numpy()).tobytes().hex(),
            images=metrics.count,
            seconds=round(seconds, 1),
            machine=f"{platform.machine()} {platform.system()}",
        )

    @property
    def key(self) -> Key:
        return self.data, self.updates, self.arm, self.seed

    def answers(self) -> np.ndarray:
        """``[images]`` bool."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.right), np.uint8))[: self.images].astype(bool)


def known(store: Path = STORE) -> dict[Key, Cell]:
    """Every cell; of two of a key the later one."""
    lines = store.read_text().splitlines() if store.exists() else []
    cells = (Cell(**json.loads(line)) for line in lines)
    return {cell.key: cell for cell in cells}


def add(cells: Iterable[Cell], store: Path = STORE) -> None:
    """Append the cells that are not there yet."""
    there = known(store)
    with store.open("a") as file:
        for cell in cells:
            if cell.key not in there:
                file.write(json.dumps(asdict(cell)) + "\n")


def cell_of(data: str, updates: int, arm: str, folder: Path) -> Cell | None:
    """The student that a folder holds; None if its training has not ended."""
    file = folder / "result.json"
    result = Result.of(read_sealed(file), folder) if file.exists() else None
    if result is None or (metrics := result.metrics) is None:
        return None
    shares, seconds = _from_log(folder / "log.jsonl")
    cell = Cell.of((data, updates, arm, result.seed), metrics, seconds)
    return replace(cell, agreement=result.agreement, shares=shares)


def _from_log(log: Path) -> tuple[dict[str, float], float]:
    """Each term's share of the gradient, and the seconds of the training, without pauses."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.endswith("/grad_share"):
                found.setdefault(key.removesuffix("/grad_share"), []).append(value)
    steps = np.diff([line["time"] for line in lines if "time" in line])
    worked = steps[steps < 10 * np.median(steps)].sum() if len(steps) else 0.0  # it may have been stopped
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}, round(float(worked), 1)


def scores(cells: dict[Key, Cell], data: str, updates: int, arm: str) -> Scores:
    """An arm's students by seed."""
    own = [cell for key, cell in cells.items() if key[:3] == (data, updates, arm)]
    return Scores({cell.seed: cell.top1 for cell in own}, {cell.seed: cell.answers() for cell in own})
