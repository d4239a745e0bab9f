"""What the study has found so far: one line per trained student, kept with the repository."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from vitkd_cli.evaluation import Metrics
from vitkd_cli.evaluation.cache import read_rows
from vitkd_cli.evaluation.contrasts import Scores
from vitkd_cli.files import read_sealed
from vitkd_cli.training import Result

STORE = Path(__file__).resolve().parents[1] / "study.jsonl"
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
    result = (
        Result.of(read_sealed(folder / "result.json"), folder) if (folder / "result.json").exists() else None
    )
    rows = read_rows(folder / "answers.safetensors") if result else None
    if result is None or rows is None or result.top1 is None:
        return None
    right = Metrics.from_rows(rows).right.numpy()
    shares, seconds = _from_log(folder / "log.jsonl")
    return Cell(
        data=data,
        updates=updates,
        arm=arm,
        seed=result.seed,
        top1=result.top1,
        loss=result.loss,
        agreement=result.agreement,
        right=np.packbits(right).tobytes().hex(),
        images=len(right),
        shares=shares,
        seconds=seconds,
        machine=f"{platform.machine()} {platform.system()}",
    )


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
