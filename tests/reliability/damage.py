"""Files of runs damaged at random: what is damaged is named or made good, never used in silence.

``python tests/reliability/damage.py --count 120`` damages a stopped run before it is resumed, and a finished
one before it is scored, exported and resumed. It prints what came of it; a figure or a student that changed
without a word, and a traceback, are failures.
"""

from __future__ import annotations

import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from outcome import asked, command, leave
from safetensors.torch import load_file

MODEL = "img_size=32,patch_size=8,depth=2,num_heads=2"
REQUEST = [
    *(
        "distill",
        "--teacher",
        "vit_tiny",
        "--no-teacher-pretrained",
        "--student",
        "vit_tiny",
        "--data",
        "digits",
    ),
    *("--teacher-kwargs", f"{MODEL},embed_dim=32,num_classes=10", "--model-kwargs", f"{MODEL},embed_dim=16"),
    *("--shots", "10", "--epochs", "2", "--batch-size", "20", "--workers", "0", "--log-interval", "1"),
    *("--device", "cpu", "--checkpoint-hist", "4", "--recovery-interval", "3", "--keep-checkpoints"),
]


# --- ways to damage a file --------------------------------------------------------------------------------


def flip(path: Path, generator: random.Random) -> None:
    """One bit is another."""
    data = bytearray(path.read_bytes())
    if data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def flip_early(path: Path, generator: random.Random) -> None:
    """One bit of the first 200 bytes: of a header."""
    data = bytearray(path.read_bytes())
    if data:
        data[generator.randrange(min(200, len(data)))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, generator: random.Random) -> None:
    """The end is lost."""
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(max(1, len(data)))])


def empty(path: Path, generator: random.Random) -> None:
    path.write_bytes(b"")


def zeros(path: Path, generator: random.Random) -> None:
    """As a file system leaves a file that was not on the disk yet."""
    path.write_bytes(bytes(path.stat().st_size))


def lost(path: Path, generator: random.Random) -> None:
    path.unlink()


def exchanged(path: Path, generator: random.Random) -> None:
    """It changes places with another file of its name, or of its ending."""
    root = next(
        parent for parent in path.parents if (parent / "recipe.toml").exists() or parent.name == "run"
    )
    others = [other for other in root.rglob(f"*{path.suffix}") if other != path and other.is_file()]
    others = [other for other in others if other.name == path.name] or others
    if others:
        other = generator.choice(others)
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(ours)


def null(path: Path, generator: random.Random) -> None:
    """JSON, but not what is expected."""
    path.write_text(generator.choice(["null", "[]", "{}", '{"format": "x"}', "1", "[[1]]", '"text"']))


WAYS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(flip, flip, flip_early, truncate, empty, zeros, lost, exchanged, exchanged, null),
)


# --- what must not change in silence ----------------------------------------------------------------------


def figures(said: str) -> list[str]:
    """Numbers of an output, without those of the clock."""
    kept = [line for line in said.splitlines() if not re.search(r"images/s|\bms\b|seconds", line)]
    return re.findall(r"\d+\.\d+", "\n".join(kept))


def same_weights(ours: Path, theirs: Path) -> bool:
    if not ours.is_file():
        return False
    first, second = load_file(ours), load_file(theirs)
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


class Place:
    """Runs to damage: one that was killed after 9 of 10 updates, and one that is finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished, self.stopped = folder / "finished", folder / "stopped"
        code, said = command([*REQUEST, "--output", str(self.finished)])
        assert code == 0, said
        shutil.copytree(self.finished, self.stopped)
        for name in ("run.json", "result.json", "curves.png", "student", "checkpoints/update-00000010"):
            shutil.rmtree(self.stopped / name, ignore_errors=True)
            (self.stopped / name).unlink(missing_ok=True) if (self.stopped / name).is_file() else None
        assert len(list((self.stopped / "checkpoints").glob("update-*"))) >= 2
        self.scores = self.looks(self.finished)
        code, said = self.resumed(self._copy(self.stopped))
        assert code == 0 and same_weights(self.run / "student/model.safetensors", self.student), said

    @property
    def student(self) -> Path:
        return self.finished / "student/model.safetensors"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def _copy(self, source: Path) -> Path:
        shutil.rmtree(self.run, ignore_errors=True)
        return shutil.copytree(source, self.run)

    def resumed(self, run: Path) -> tuple[int | None, str]:
        return command(["distill", "--resume", str(run)])

    def looks(self, run: Path) -> dict[str, tuple[int | None, str]]:
        """What the commands that read a finished run say of it."""
        out = run.parent / "exported"
        shutil.rmtree(out, ignore_errors=True)
        calls = {
            "eval": ["eval", str(run), "--device", "cpu", "--workers", "0", "--json"],
            "export": [
                "export",
                str(run),
                "--to",
                "timm",
                "--output",
                str(out),
                "--device",
                "cpu",
                "--quiet",
            ],
            "resume": ["distill", "--resume", str(run)],
        }
        return {name: command(arguments) for name, arguments in calls.items()}

    def damage(self, generator: random.Random) -> tuple[str, str, list[str]]:
        """Damage one file of one run, and look.

        Returns:
            The case, what came of it, and what was wrong with that.
        """
        stopped = generator.random() < 0.6
        run = self._copy(self.stopped if stopped else self.finished)
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
        path = generator.choice(files)
        way = generator.choice(WAYS)
        name = path.relative_to(run)
        case = f"{'stopped' if stopped else 'finished'} {way.__name__} {name}"
        before = path.read_bytes()
        way(path, generator)
        if path.exists() and path.read_bytes() == before:
            return case, "unchanged", []
        if stopped:
            code, said = self.resumed(run)
            sound = same_weights(run / "student/model.safetensors", self.student)
            return case, *self._judged(code, said, sound)
        worst, wrong = "harmless", []
        for command_name, (code, said) in self.looks(run).items():
            _, expected = self.scores[command_name]
            sound = figures(said) == figures(expected)
            if command_name == "resume":  # which makes good what is gone
                sound = same_weights(run / "student/model.safetensors", self.student)
            came, problems = self._judged(code, said, sound)
            wrong += [f"{command_name}: {problem}" for problem in problems]
            worst = came if came != "harmless" else worst
        return case, worst, wrong

    @staticmethod
    def _judged(code: int | None, said: str, sound: bool) -> tuple[str, list[str]]:
        if code is None:
            return "TRACEBACK", [said[-1500:]]
        if code:
            named = "error: " in said
            return ("named", []) if named else ("SILENT", [f"exit {code} with: {said[-500:]}"])
        if sound:
            return ("fell back" if "note: " in said and "damaged" in said else "harmless"), []
        return ("said", []) if "damaged" in said else ("SILENT", [said[-1500:]])


def run(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Damage ``count`` files; outcomes, and a text for each failure."""
    place = Place(folder)
    outcomes: Counter[str] = Counter()
    failures = []
    for index in range(count):
        case, came, wrong = place.damage(random.Random(f"{seed} {index}"))
        outcomes[came] += 1
        failures += [f"{index}: {case}: {came}\n{problem}" for problem in wrong]
    return outcomes, failures


def main() -> None:
    arguments = asked(__doc__, 120)
    with tempfile.TemporaryDirectory() as folder:
        outcomes, failures = run(arguments.count, arguments.seed, Path(folder))
    for came, number in outcomes.most_common():
        print(f"{number:6}  {came}")
    leave(failures)


if __name__ == "__main__":
    main()
