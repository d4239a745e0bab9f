"""A split, image by image: files, scans in memory, timm's readers, streams, and selections of these."""

from __future__ import annotations

import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from vitkd_cli.data.decoding import Decoding, TooLarge
from vitkd_cli.data.walk import TYPES, in_order, passed_over, walk
from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.text import nfc


class UnreadableImage(UserError):
    """An image that cannot be opened or decoded; exit code 3, for the run had begun."""


class Images(ABC):
    """A split, image by image: ``images[i]`` is ``(upright RGB image, class)``."""

    iterable = False  # True for streams, which have no index
    notes: Sequence[str] = ()  # what was odd about the place that they come from, one line each
    class_names: Sequence[str] = ()  # by label, where somebody knows them and has use for them
    decoding = Decoding()

    def decode_by(self, decoding: Decoding) -> None:
        """Read the pictures this way from now on."""
        self.decoding = decoding

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its class; :class:`UnreadableImage` names the file."""

    @abstractmethod
    def path(self, index: int) -> str:
        """The name of an image, for messages."""

    def file(self, index: int) -> str | None:
        """The file that holds an image; None where nobody says which."""
        return None

    def own_file(self, index: int) -> str | None:
        """The file that holds this image and no other."""
        file = self.file(index)
        return file if file and file == self.path(index) else None

    @abstractmethod
    def labels(self) -> list[int]:
        """The class of every image, without decoding any where the source allows it."""


class FolderImages(Images):
    """Image files with their classes: ``samples`` is ``[(path, class), ...]``."""

    def __init__(self, samples: Sequence[tuple[str, int]], notes: Sequence[str] = ()) -> None:
        self.samples, self.notes = list(samples), notes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with reading(path):
            return self.decoding(path), label

    def path(self, index: int) -> str:
        return self.samples[index][0]

    file = path

    def labels(self) -> list[int]:
        return [label for _, label in self.samples]


def loose_images(paths: Sequence[str | Path]) -> FolderImages:
    """Image files without labels: those named, and those in the folders named, whatever their depth.

    Raises:
        UserError: an address, nothing there, or a folder without images.
    """
    found: list[str] = []
    notes: list[str] = []
    for path in paths:
        if "://" in str(path):
            raise UserError(f"{path} is an address, not a file", "download the image, and name the file")
        place = expanded(path)
        if place.is_dir():
            inside = walk(place)
            if not inside.files:
                raise UserError(f"there are no images in {place}", f"files that count: {', '.join(TYPES)}")
            found += [name for name, _ in inside.files]
            notes += inside.notes
        elif place.is_file():
            found.append(str(place))
        else:
            raise UserError(f"there is no image or folder {place}", "name files or folders of images")
    return FolderImages([(name, -1) for name in found], notes)


def spread(images: Images, count: int) -> Selection:
    """The first ``count`` images, a class after the other in turn; of all classes alike."""
    seen: Counter[int] = Counter()
    order = []
    for index, label in enumerate(images.labels()):
        order.append((seen[label], label, index))
        seen[label] += 1
    return Selection(images, [index for _, _, index in sorted(order)[:count]])


class DigitImages(Images):
    """8×8 scans, ``[N, 8, 8]`` with 17 grey values, shown as RGB from 0 to 255."""

    def __init__(self, scans: np.ndarray[Any, Any], labels: Sequence[int]) -> None:
        self.pixels = np.round(scans * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
        self._labels = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self._labels[index]

    def path(self, index: int) -> str:
        return f"digits[{index}]"

    def labels(self) -> list[int]:
        return list(self._labels)


class TimmImages(Images):
    """A dataset with an index from ``timm.data.create_dataset``: a reader of timm's, or torchvision's own."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)
        self.name = name
        self._labels: list[int] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with reading(lambda: self.path(index)):
            if self.reader is None:
                image, label = self.dataset[index]
                image = self.decoding.upright(image)
            else:  # past timm's dataset, which would replace an unreadable image by the next one
                file, label, *_ = self.reader[index]
                image = self.decoding(file)
        return image, -1 if label is None else int(label)

    def path(self, index: int) -> str:
        known = None if self.reader is None else self.reader.filename(index)
        return f"{self.name}[{index}]" + (f" ({known})" if known else "")

    def labels(self) -> list[int]:
        if self._labels is None:
            targets: Iterable[Any]
            if hasattr(self.reader, "iter_targets"):
                targets = self.reader.iter_targets()  # type: ignore[union-attr]
            elif getattr(self.dataset, "targets", None) is not None:
                targets = self.dataset.targets
            else:
                targets = (self[index][1] for index in range(len(self)))
            self._labels = [-1 if target is None else int(target) for target in targets]
        return list(self._labels)


class Selection(Images):
    """Some images of others, by index."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices, self.notes = images, list(indices), images.notes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[self.indices[index]]

    def path(self, index: int) -> str:
        return self.images.path(self.indices[index])

    def file(self, index: int) -> str | None:
        return self.images.file(self.indices[index])

    def decode_by(self, decoding: Decoding) -> None:
        self.images.decode_by(decoding)

    def labels(self) -> list[int]:
        labels = self.images.labels()
        return [labels[index] for index in self.indices]


class Labelled(Selection):
    """The same images with other classes, one per image."""

    def __init__(self, images: Images, labels: Sequence[int]) -> None:
        super().__init__(images, range(len(images)))
        self._labels = list(labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return super().__getitem__(index)[0], self._labels[index]

    def labels(self) -> list[int]:
        return list(self._labels)


class TarImages(Images):
    """Images inside of a tar file, of tars in a tar, or of a folder of tars; timm's reader, without labels.

    A file within is opened by the process that reads it first; read none before the loader's workers start.

    Attributes:
        names: of each image's class: the first folder below those that hold all images, or the name of its
            tar where there are no folders in it; empty for images that lie side by side.
    """

    def __init__(self, root: Path) -> None:
        for place in [root] if root.is_file() else sorted(root.glob("*.tar")):
            with open(place, "rb") as file:
                _follow(file, str(place))
        before = get_img_extensions()
        set_img_extensions(TYPES)
        try:
            # timm's cache of the listing is a pickle beside the tar; without it a big one is listed anew
            self.reader = ReaderImageInTar(str(root), cache_tarinfo=False)
        finally:
            set_img_extensions(before)
        self.root = root
        members: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)  # path → (tars, index)
        folders: list[tuple[str, ...]] = []
        for index, (member, tar, child) in enumerate(self.reader.samples):
            tars = [Path(name).with_suffix("").name for name in (tar, child and child.name) if name]
            *parts, name = (part for part in member.path.split("/") if part not in ("", "."))
            folders.append(tuple(parts or tars[-1:]))
            if not any(map(passed_over, (*parts, name))):
                members[member.path].append(("/".join(tars), index))
        order = [index for path in in_order(members) for _, index in sorted(members[path])]
        if not order:
            raise ValueError("there are no images in it")
        within = [folders[index] for index in order]
        shared = os.path.commonpath(["/".join(folder) for folder in within])
        above = len(Path(shared).parts)
        if above and set(within) == {Path(shared).parts}:
            above -= 1  # all in one folder: it is the class
        self.names = [nfc(folder[above]) if len(folder) > above else "" for folder in within]
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with reading(lambda: self.path(index)):
            file, _ = self.reader[self.order[index]]
            return self.decoding(file), -1

    def path(self, index: int) -> str:
        return f"{self.root}/{self.reader.filename(self.order[index])}"

    def file(self, index: int) -> str | None:
        return str(self.root)

    def labels(self) -> list[int]:
        return [-1] * len(self)


def _follow(file: IO[bytes], name: str) -> None:
    """Refuse a tar that cannot be followed to its end mark, two blocks of zeros; tarfile stops silently.

    Raises:
        UserError: it is cut, or a header in it is damaged.
    """
    count, problem = 0, ""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for member in tar:
                count += 1
                if member.isfile() and member.name.lower().endswith(".tar"):
                    _follow(tar.extractfile(member), f"{name}/{member.name}")  # type: ignore[arg-type]
        except tarfile.ReadError as error:
            problem = f": {first_line(error)}"
        file.seek(tar.offset)
        if problem or file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise UserError(
                f"{name} is cut or damaged: {count:,} files can be read, and at byte {tar.offset:,} there is "
                f"neither another nor the end mark{problem}",
                "copy or download it again",
            )


class IterableImages(Images):
    """A stream (``wds/``, ``tfds/``, ``hfids/``): best effort, and exempt from keyed randomness.

    Order, shuffling and the share of each process are the reader's, which skips what it cannot decode; the
    number of workers may change them. ``stream`` is timm's ``IterableImageDataset``.
    """

    iterable = True

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.name = stream, name

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise TypeError(f"{self.name} is a stream: it has no image {index}")

    def path(self, index: int) -> str:
        return self.name

    def labels(self) -> list[int]:
        raise TypeError(f"{self.name} is a stream: its labels are not known beforehand")


@contextmanager
def reading(path: str | Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        name = path if isinstance(path, str) else path()
        hint = "repair or delete it"
        if isinstance(error, TooLarge):
            hint = f"scale it down, or let it pass with --max-pixels {error.pixels}"
        raise UnreadableImage(f"cannot read image {name}: {reason(error)}", hint, exit_code=3) from error


def reason(error: BaseException) -> str:
    """Why a picture cannot be read, in one line that does not repeat its name."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
