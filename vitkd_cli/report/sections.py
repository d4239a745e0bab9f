"""What a report tells of one run, gathered; what cannot be told is a sentence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from vitkd_cli.data.images import ImageData, Images
from vitkd_cli.evaluation.contrasts import Contrast
from vitkd_cli.report.facts import DataFacts, changes_of, command_of_run, data_facts, opened_data
from vitkd_cli.report.found import FoundRun, attempted
from vitkd_cli.report.mistakes import (
    MOST_PICTURES,
    Gallery,
    Mistakes,
    mistakes_of,
    to_look_at,
    validation_images,
)
from vitkd_cli.report.opened import Opened, opened
from vitkd_cli.report.pictures import AttentionRow, attention_rows
from vitkd_cli.report.rows import ModelRow, model_rows
from vitkd_cli.report.tables import top1_cell, verdict
from vitkd_cli.text import last_name, plain, without_places
from vitkd_cli.vit.model import Model

LOOKED_AT = 3  # images whose attention is shown
_OF_AN_ARM = 28  # pictures that an arm shows at most
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Section:
    """What the page tells of one run.

    Attributes:
        title: student and teacher.
        verdict: one sentence.
        contrasts: the run's own arm beside each of the others, with the other's title and number.
        changes: of the recipe: setting, value, default.
        attention: over some images, of which each has its class first.
        missing: sentences on what cannot be shown, by part of the page.
    """

    found: FoundRun
    title: str
    verdict: str
    contrasts: Sequence[tuple[str, int, Contrast]]
    rows: Sequence[ModelRow]
    changes: Sequence[tuple[str, str, str]]
    command: str
    data: DataFacts | None = None
    mistakes: Sequence[Mistakes] = ()
    attention: Sequence[tuple[str, Sequence[AttentionRow]]] = ()
    missing: dict[str, str] = field(default_factory=dict)


def section_of(found: FoundRun, before: str, tell: Tell, *, pictures: bool) -> Section:
    """Everything about one run but its curves.

    Args:
        before: a teacher's title, where the page has several runs.
        pictures: with what the models get wrong and look at.
    """
    tell("looking for the images", 0, 4)
    data, no_data = attempted("The images of this run cannot be shown", lambda: opened_data(found))
    facts, no_facts = attempted("Of the data nothing more is known", lambda: data_facts(found, data))
    tell("opening the models", 1, 4)
    models = opened(found, data)
    section = Section(
        found,
        title=_title(found),
        verdict=_verdict(found),
        contrasts=[
            (arm.title, arm.number, one)
            for one in (found.run.contrasts if found.run.results else [])
            for arm in found.arms
            if arm.results and arm.results[0].arm == one.second
        ],
        rows=model_rows(found, models, before),
        changes=changes_of(found.recipe),
        command=command_of_run(found.recipe),
        data=facts,
        missing={"data": " ".join(filter(None, (no_data, no_facts))), "models": " ".join(models.notes)},
    )
    return _with_pictures(section, data, models, tell) if pictures else section


def _with_pictures(section: Section, data: ImageData | None, models: Opened, tell: Tell) -> Section:
    found, missing = section.found, dict(section.missing)
    images: Images | None = None
    if data is not None:
        what = "The images that are named wrongly cannot be shown"
        images, missing["images"] = attempted(what, lambda: validation_images(found, data))
    names = (data.class_names if data is not None else None) or ()
    share = min(1.0, MOST_PICTURES / (_OF_AN_ARM * max(1, len(found.arms))))
    gallery = Gallery(images, names, share)
    tell("what the models get wrong", 2, 4)
    mistakes, missing["mistakes"] = attempted(
        "What the models get wrong cannot be told",
        lambda: [one for arm in found.arms if (one := mistakes_of(found, arm, gallery))],
    )
    if not mistakes and not missing["mistakes"]:
        missing["mistakes"] = "No answers to validation images are kept with this run."
    tell("attention", 3, 4)
    known = (("teacher", models.teacher), ("student", models.student))
    pairs = [(title, one.model) for title, one in known if one is not None]
    attention: Sequence[tuple[str, Sequence[AttentionRow]]] = ()
    if images is None or not pairs:
        missing["attention"] = "Attention is not shown: the images, or the models, are not at hand."
    else:
        what = "Attention is not shown"
        attention, missing["attention"] = attempted(what, lambda: _attention(found, pairs, gallery, images))
    return replace(section, mistakes=mistakes or (), attention=attention or (), missing=missing)


def _attention(
    found: FoundRun, models: Sequence[tuple[str, Model]], gallery: Gallery, images: Images
) -> list[tuple[str, Sequence[AttentionRow]]]:
    chosen = images.subset(to_look_at(found, gallery, LOOKED_AT))
    names = [gallery.name(label) for label in chosen.labels()]
    return list(zip(names, attention_rows(models, chosen), strict=True))


def _title(found: FoundRun) -> str:
    student, teacher = (plain(last_name(name or "")) for name in (found.recipe.student, found.recipe.teacher))
    return f"{student}, taught by {teacher}" if teacher else student


def _verdict(found: FoundRun) -> str:
    """One sentence: is the run's own arm better than the others?"""
    run = found.run
    if not run.results:
        return "No student is trained yet."
    if run.contrasts:
        return without_places(verdict(run))
    first = run.results[0]
    arm = without_places(first.arm)
    if first.top1 is None:
        return f"{arm}: nothing was scored, for the run had no validation."
    top1 = top1_cell(run.arms[first.arm])
    images = f"{first.images:,} images" if first.images else "its images"
    return f"{arm}: top-1 {top1} on {images}; no other arm was trained to compare it with."
