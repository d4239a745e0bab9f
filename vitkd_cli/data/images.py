"""A split of images that are read by index, and a stream beside it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitkd_cli.data.decoding import Decoding, TooLarge
from vitkd_cli.data.packed import column_of, some_of
from vitkd_cli.data.walk import TYPES, walk
from vitkd_cli.errors import UserError, expanded, first_line


class UnreadableImage(UserError):
    """An image that cannot be opened or decoded; exit code 3, for the run had begun."""


def _decoded(path: str, decoding: Callable[[Any], Any]) -> Any:
    return decoding(path)


class Images:
    """A split, image by image: ``images[i]`` is ``(upright RGB image, class)``.

    Args:
        refs: what tells one image from another: the path of its file, or an index in a dataset.
        labels: the class of each; -1 where there is none.
        open: decodes an image by its ref.
        name: what messages call an image, by its ref.
        archives: the files that hold them, if some hold many each.
        archive: which of these holds an image, by its ref, and from which byte on.
        notes: what was odd about the place that they come from, one line each.
        skipped: ending → files there that do not count.

    Attributes:
        class_names: by label, where somebody knows them and has use for them.
        decoding: how the pictures are read.
    """

    def __init__(
        self,
        refs: Iterable[Any],
        labels: Iterable[int],
        open: Callable[[Any, Callable[[Any], Any]], Any] = _decoded,
        name: Callable[[Any], str] = str,
        archives: Sequence[str] = (),
        archive: Callable[[Any], tuple[str, int]] | None = None,
        notes: Sequence[str] = (),
        skipped: Mapping[str, int] | None = None,
    ) -> None:
        self.refs, self._labels = column_of(refs), _int32(labels)
        self.open, self.name, self.archives, self.archive = open, name, archives, archive
        self.notes, self.skipped = notes, skipped or {}
        self.class_names: Sequence[str] = ()
        self.decoding = Decoding()

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its class; :class:`UnreadableImage` names the file.

        By a :class:`vitkd_cli.data.pixels.FastDecoding` it may be ``Pixels``.
        """
        with reading(lambda: self.path(index)):
            return self.open(self.refs[index], self.decoding), self.label(index)

    def path(self, index: int) -> str:
        """The name of an image, for messages."""
        return self.name(self.refs[index])

    @property
    def are_files(self) -> bool:
        """Is each image a file of its own?"""
        return len(self.refs) > 0 and isinstance(self.refs[0], str)

    def file(self, index: int) -> str | None:
        """The file that holds this image and no other; None where it is none."""
        ref = self.refs[index]
        return ref if isinstance(ref, str) else None

    def place(self, index: int) -> tuple[str, int] | None:
        """The file that holds this image, alone or with others, and from which byte on; else None."""
        if file := self.file(index):
            return file, 0
        return self.archive(self.refs[index]) if self.archive else None

    def label(self, index: int) -> int:
        """The class of an image."""
        return int(self._labels[index])

    @property
    def classes(self) -> np.ndarray[Any, Any]:
        """``[N]`` int32: the class of every image; to be read only."""
        return self._labels

    def counts(self) -> Counter[int]:
        """Class → how many images there are of it."""
        labels, counts = np.unique(self._labels, return_counts=True)
        return Counter(dict(zip(labels.tolist(), counts.tolist(), strict=True)))

    def labels(self) -> list[int]:
        """The class of every image, as numbers of Python's."""
        labels: list[int] = self._labels.tolist()
        return labels

    def decode_by(self, decoding: Decoding) -> None:
        """Read the pictures this way from now on."""
        self.decoding = decoding

    def subset(self, indices: Iterable[int]) -> "Images":
        """Some of the images."""
        part = copy(self)
        chosen = indices if isinstance(indices, np.ndarray) else np.fromiter(indices, np.int64)
        part.refs, part._labels = some_of(self.refs, chosen), self._labels[chosen]
        return part

    def balanced_subset(self, count: int) -> "Images":
        """``count`` images, taken from the classes in turn."""
        seen: Counter[int] = Counter()
        order = []
        for index, label in enumerate(self.labels()):
            order.append((seen[label], label, index))
            seen[label] += 1
        return self.subset(index for _, _, index in sorted(order)[:count])

    def relabelled(self, labels: Iterable[int]) -> "Images":
        """The same images with other classes, one per image."""
        part = copy(self)
        part._labels = _int32(labels)
        return part


def _int32(labels: Iterable[int]) -> np.ndarray[Any, Any]:
    return labels.astype(np.int32) if isinstance(labels, np.ndarray) else np.fromiter(labels, np.int32)


class Stream:
    """Images without an index (``tfds/``, ``hfids/``): best effort, exempt from keyed randomness.

    Order and shuffling are the reader's; the number of workers may change them.

    Args:
        images: timm's ``IterableImageDataset``.
    """

    notes: Sequence[str] = ()

    def __init__(self, images: Any, name: str) -> None:
        self.images, self.name, self.decoding = images, name, Decoding()

    def __len__(self) -> int:
        return len(self.images)

    def decode_by(self, decoding: Decoding) -> None:
        """Read the pictures this way from now on."""
        self.decoding = decoding


Split = Images | Stream


@dataclass(frozen=True)
class ImageData:
    """What ``--data`` stands for.

    Attributes:
        name: a short name, for titles.
        train: the training images, after ``shots``; None if there are none.
        val: the validation images; None if there are none.
        class_names: ``num_classes`` names in the order of the labels; None if nobody knows them.
        num_classes: classes of the labels, or more if ``num_classes`` was given.
        description: one line for the start-up.
        split_files: which file of a folder without a validation split went where, relative to the folder.
        train_all: the training images before ``shots``.
        notes: oddities that do not stop a run, one line each.
        labelled: the training images have labels; without, their class is -1 and ``num_classes`` may be 0.
        bank: labelled images of ``--val-data``, whose classes nearest neighbours hand on to ``val``.
        by_neighbours: validation is by nearest neighbours, for the student has no head for these classes.
        skipped: ending → files of a folder that do not count as images.
        record: which images these are (:func:`vitkd_cli.data.listing.written_down`).
        left_out: files of validation images that cannot be read.
    """

    name: str
    train: Split | None = None
    val: Split | None = None
    class_names: tuple[str, ...] | None = None
    num_classes: int = 0
    description: str = ""
    split_files: dict[str, list[str]] | None = None
    train_all: Split | None = None
    notes: tuple[str, ...] = ()
    labelled: bool = True
    bank: Split | None = None
    by_neighbours: bool = False
    skipped: Mapping[str, int] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None
    left_out: tuple[str, ...] = ()


def loose_images(paths: Sequence[str | Path], types: Sequence[str] = TYPES) -> Images:
    """Image files without labels: those named, and those in the folders named, whatever their depth."""
    found: list[str] = []
    notes: list[str] = []
    skipped: Counter[str] = Counter()
    for path in paths:
        if "://" in str(path):
            raise UserError(f"{path} is an address, not a file", "download the image, and name the file")
        place = expanded(path)
        if place.is_dir():
            inside = walk(place, types)
            if not inside.files:
                raise UserError(f"there are no images in {place}", f"files that count: {', '.join(types)}")
            found += [name for name, _ in inside.files]
            notes += inside.notes
            skipped += inside.skipped
        elif place.is_file():
            found.append(str(place))
        else:
            raise UserError(f"there is no image or folder {place}", "name files or folders of images")
    return Images(found, [-1] * len(found), notes=notes, skipped=skipped)


@contextmanager
def reading(name: Callable[[], str]) -> Iterator[None]:
    """Turn whatever is wrong with an image into :class:`UnreadableImage`.

    A :class:`UserError` is of the place that holds it, a tar that is gone: no other image can stand in.
    """
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        hint = "repair or delete it"
        if isinstance(error, TooLarge):
            hint = f"scale it down, or let it pass with --max-pixels {error.pixels}"
        raise UnreadableImage(f"cannot read image {name()}: {reason(error)}", hint, exit_code=3) from error


def reason(error: BaseException) -> str:
    """Why a picture cannot be read, in one line that does not repeat its name."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
