"""What a sweep shows: every point's figures, best first, each beside the default."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from vitkd_cli.evaluation.contrasts import Contrast, contrast, corrected
from vitkd_cli.evaluation.statistics import MIN_SEEDS, spread
from vitkd_cli.evaluation.writing import as_csv
from vitkd_cli.files import write_text
from vitkd_cli.sweeps.folder import SweepFolder
from vitkd_cli.sweeps.points import Axis, Point, written
from vitkd_cli.training.folder import Result, Run, known, scores_of

FINISHED = "finished"
_FIGURES = ("top5", "loss", "agreement")  # whose means sweep.csv has
_BESIDE_THE_DEFAULT = (
    *("difference", "low", "high", "low_other_images", "high_other_images"),
    *("p_holm", "detectable", "verdict"),
)


@dataclass(frozen=True)
class Outcome:
    """One point and what it came to.

    Attributes:
        results: of its own arm, one per seed; none if it failed.
        status: ``finished``, ``stopped at epoch …``, ``failed: …``, ``not finished`` or ``not run``.
        run: with the arms that the default has beside its own.
        against: it beside the default; None for the default, and for what is not finished.
    """

    point: Point
    results: tuple[Result, ...]
    status: str
    run: Run | None = None
    against: Contrast | None = None

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @cached_property
    def top1(self) -> dict[int, float]:
        """By seed, in percent."""
        return {r.seed: r.top1 for r in self.results if r.top1 is not None}

    @cached_property
    def mean(self) -> float | None:
        return fmean(self.top1.values()) if self.top1 else None

    @cached_property
    def reach(self) -> float | None:
        """Half the 95 % interval over seeds; None for one or two, which have none."""
        return spread([list(self.top1.values())])[1][0] if len(self.top1) >= MIN_SEEDS else None

    @property
    def mean_cell(self) -> str:
        """The mean with its reach, in text."""
        if self.mean is None:
            return "–"
        return f"{self.mean:.2f}" + ("" if self.reach is None else f" ± {self.reach:.2f}")


@dataclass(frozen=True)
class Sweep:
    """What a sweep has come to.

    Attributes:
        outcomes: the finished points, best first, then those that are not.
    """

    folder: Path
    axes: tuple[Axis, ...]
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, layout: SweepFolder, failed: Mapping[str, str]) -> "Sweep":
        """Read every point's run.

        Args:
            failed: last words by the point's name.
        """
        stages = layout.halved().get("stages", ())
        found = [_outcome(layout, point, stages, failed) for point in layout.points]
        ended = {one.point.name: one for one in found if one.finished and one.top1}
        default = layout.points[0].name
        if default in ended:
            images = ended[default].results[0].images
            scores = {name: scores_of(one.results) for name, one in ended.items()}
            base = scores.pop(default)
            made = (contrast(name, default, own, base, images) for name, own in scores.items())
            for beside in corrected([one for one in made if one]):
                ended[beside.first] = replace(ended[beside.first], against=beside)
        found = [ended.get(one.point.name, one) for one in found]
        # A sort keeps the grid's order among equals.
        found.sort(key=lambda one: (not one.finished, -1 if one.mean is None else -one.mean))
        return cls(layout.folder, layout.axes, tuple(found))

    @property
    def default(self) -> Outcome:
        return next(one for one in self.outcomes if one.point.default)

    @property
    def best(self) -> Outcome | None:
        """The finished point of the highest mean; None if none is."""
        first = self.outcomes[0]
        return first if first.finished and first.top1 else None

    @property
    def failed(self) -> dict[str, str]:
        """Last words by the name of each point that failed."""
        start = "failed: "
        return {
            o.point.name: o.status.removeprefix(start) for o in self.outcomes if o.status.startswith(start)
        }

    def write(self) -> Path:
        """Write ``sweep.csv``: every value and figure, but no speed, which no two sweeps share."""
        path = self.folder / "sweep.csv"
        seeds = sorted({seed for one in self.outcomes for seed in one.top1})
        write_text(path, as_csv([_row(one, self.axes, seeds) for one in self.outcomes]))
        return path

    def sentence(self) -> str:
        """In words: does the best differ from the default beyond chance?"""
        best, default = self.best, self.default
        if best is None or not default.finished or default.mean is None:
            return "the default is not finished: there is nothing to compare with"
        if best is default:
            return f"no point has a higher mean than the default ({default.mean_cell})"
        named = f"best: {best.point.name}, top-1 {best.mean_cell}; the default {default.mean_cell}"
        one = best.against
        if one is None:
            return f"{named}; they share no seed"
        gap = f"{named}: {one.sentence()}"
        if not one.claims:
            return f"{gap}: --seeds 5" if one.found.n < MIN_SEEDS else gap
        compared = sum(o.against is not None and o.against.claims for o in self.outcomes)
        return (
            f"{gap}: {one.verdict} (p = {one.p:.2g}, corrected for {compared} points). It was selected "
            f"on the images that it is scored on, which flatters it: images that chose nothing decide, "
            f"vitkd eval {self._student(best)} {self._student(default)} --data FOLDER"
        )

    def _student(self, one: Outcome) -> str:
        return shlex.quote(str(self.folder / "points" / one.point.place / "student"))


def _outcome(
    layout: SweepFolder, point: Point, stages: Sequence[Mapping[str, Any]], failed: Mapping[str, str]
) -> Outcome:
    stage = next((stage for stage in stages if point.name in stage["gone"]), None)
    run = layout.finished(point, None if stage else layout.last_step(point))
    results = tuple(run.own) if run else ()
    if stage:
        rank = f"rank {stage['ranks'][point.name]} of {len(stage['ranks'])}"
        return Outcome(point, results, f"stopped at epoch {stage['epoch']:g}, {rank}", run)
    if point.name in failed:
        return Outcome(point, (), f"failed: {failed[point.name]}")
    if run is None:
        return Outcome(point, (), "not finished" if layout.run(point).exists() else "not run")
    return Outcome(point, results, FINISHED, run)


def _row(one: Outcome, axes: Sequence[Axis], seeds: Sequence[int]) -> dict[str, Any]:
    means = {name: fmean(values) for name in _FIGURES if (values := known(one.results, name))}
    facts = one.against.facts() if one.against else {}
    return {
        "point": one.point.name,
        **{axis.name: written(one.point.values[axis.name]) for axis in axes},
        "default": one.point.default,
        "status": one.status,
        "seeds": len(one.top1),
        "top1": one.mean,
        "top1_half_interval": one.reach,
        **{f"top1_{seed}": one.top1.get(seed) for seed in seeds},
        **{name: means.get(name) for name in _FIGURES},
        "parameters": one.results[0].parameters if one.results else None,
        **{key: facts.get(key) for key in _BESIDE_THE_DEFAULT},
        "folder": f"points/{one.point.place}",
    }
