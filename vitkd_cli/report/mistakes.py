"""What each arm of a run gets wrong, and where its student and the teacher differ, with the images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vitkd_cli.data.images import ImageData, Images
from vitkd_cli.data.scan import without
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.statistics import Array, confusions
from vitkd_cli.files import read_sealed
from vitkd_cli.report.found import FoundArm, FoundRun
from vitkd_cli.report.pictures import Picture, thumbnail
from vitkd_cli.text import plain
from vitkd_cli.training.data import KNOWN

PAIRS, IMAGES_OF_A_PAIR, DIFFERENT = 4, 4, 6
MOST_PICTURES = 120  # of a page, at some kB each


@dataclass(frozen=True)
class Mistake:
    """Two classes of which one is taken for the other.

    Attributes:
        count: images, mean over the arm's seeds.
    """

    true: str
    said: str
    count: float
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Mistakes:
    """Of one arm, over all its seeds.

    Attributes:
        wrong, images: how many of how many, mean over the seeds.
        differing: in a sentence, how often the teacher and the student differ; empty without a teacher.
        lost: images that the teacher names rightly and most seeds do not; ``won``: the other way round.
    """

    number: int
    title: str
    seeds: int
    wrong: float
    images: int
    pairs: Sequence[Mistake]
    differing: str = ""
    lost: Sequence[Picture] = ()
    won: Sequence[Picture] = ()


def validation_images(found: FoundRun, data: ImageData) -> Images:
    """The run's validation images, in the order of its answers.

    Raises:
        UserError: they cannot be shown, or are not those of the answers any more.
    """
    images = data.val
    if images is None:
        raise UserError("the run has none")
    if not isinstance(images, Images):
        raise UserError("they are a stream, of which no single image can be opened")
    if found.recipe.skip_corrupt and (found.folder / KNOWN).is_file():
        images = without(images, read_sealed(found.folder / KNOWN)["broken"])
    for metrics in (result.metrics for result in found.run.results):
        if metrics is not None and metrics.labels.tolist() != images.labels():
            raise UserError("they are not those that the run was validated on")
    return images


@dataclass(frozen=True)
class Gallery:
    """What mistakes are told with.

    Attributes:
        images: None where they are gone: then counts are told alone.
        names: of the classes, in the order of the labels.
        share: of the pictures that an arm may show, where many arms share a page.
    """

    images: Images | None
    names: Sequence[str]
    share: float = 1.0

    def name(self, label: int) -> str:
        return plain(self.names[label]) if 0 <= label < len(self.names) else f"class {label}"

    def number(self, wanted: int) -> int:
        return max(2, round(wanted * self.share))

    def most(self, votes: Array, wanted: int) -> list[int]:
        """The images with most votes, of those that have one."""
        order = np.argsort(-votes, kind="stable")[: self.number(wanted)]
        return [int(index) for index in order if votes[index] > 0]

    def pictures(self, indices: Sequence[int], words: Sequence[str], below: bool = True) -> list[Picture]:
        if self.images is None:
            return []
        pairs = zip(indices, words, strict=True)
        return [thumbnail(self.images, index, text, text if below else "") for index, text in pairs]


def mistakes_of(found: FoundRun, arm: FoundArm, gallery: Gallery) -> Mistakes | None:
    """What an arm gets wrong; None where no answers are kept."""
    seeds = [metrics for result in arm.results if (metrics := result.metrics) is not None]
    seeds = [one for one in seeds if one.labels.tolist() == seeds[0].labels.tolist()]
    if not seeds:
        return None
    labels, said = seeds[0].labels.numpy(), np.stack([one.predictions.numpy() for one in seeds])  # [S, N]
    right, pairs = said == labels, []
    confused = confusions(np.tile(labels, len(seeds)), said.reshape(-1))
    for true, taken, count in confused[: gallery.number(PAIRS)]:
        at = gallery.most(((labels == true) & (said == taken)).sum(0), IMAGES_OF_A_PAIR)
        one, other = gallery.name(true), gallery.name(taken)
        pictures = gallery.pictures(at, [f"{one}, taken for {other}"] * len(at), below=False)
        pairs.append(Mistake(one, other, count / len(seeds), pictures))
    told = Mistakes(arm.number, arm.title, len(seeds), float((~right).sum(1).mean()), len(labels), pairs)
    taught = {one.arm: one for one in (found.run.teacher, *found.run.more_teachers) if one is not None}
    own = arm.results[0]
    title = own.taught_by or f"teacher of {own.arm}"  # earlier versions did not note whose it is
    by = taught.get(title, None if own.taught_by else found.run.teacher)
    teacher = by.metrics if by else None
    if teacher is None or teacher.labels.tolist() != labels.tolist():
        return told
    theirs = teacher.predictions.numpy()
    lost, won = (right < (theirs == labels)), (right > (theirs == labels))  # [S, N]
    counts = (lost.sum(1).mean(), won.sum(1).mean(), (said != theirs).sum(1).mean())
    return replace(
        told,
        differing=(
            f"The teacher alone is right on {counts[0]:.0f} images, the student alone on {counts[1]:.0f}; "
            f"they name different classes on {counts[2]:.0f}."
        ),
        lost=_beside(gallery, lost, labels, said),
        won=_beside(gallery, won, labels, np.broadcast_to(theirs, said.shape)),
    )


def _beside(gallery: Gallery, differs: Array, labels: Array, wrong: Array) -> list[Picture]:
    """Images on which one is right and the other wrong, with the class and what it was taken for.

    Args:
        differs, wrong: ``[S, N]``; what the wrong one says.
    """
    at = gallery.most(differs.sum(0), DIFFERENT)
    says = [Counter(wrong[differs[:, index], index].tolist()).most_common(1)[0][0] for index in at]
    words = [
        f"{gallery.name(int(labels[i]))}, not {gallery.name(int(n))}" for i, n in zip(at, says, strict=True)
    ]
    return gallery.pictures(at, words)


def to_look_at(found: FoundRun, gallery: Gallery, count: int) -> list[int]:
    """Images: first those that the teacher names rightly and most seeds of the run's own arm do not."""
    total = 0 if gallery.images is None else len(gallery.images)
    teacher, votes = (found.run.teacher.metrics if found.run.teacher else None), np.zeros(total, int)
    for one in (result.metrics for result in found.run.own):
        if one is not None and teacher is not None and one.count == teacher.count == total:
            votes += (one.right < teacher.right).numpy()
    chosen = [index for index in np.argsort(-votes, kind="stable")[:count].tolist() if votes[index]]
    rest = (index for index in range(total) if index not in chosen)
    return [*chosen, *rest][:count]
