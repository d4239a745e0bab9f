"""A split, image by image: files, scans in memory, timm's readers, streams, and selections of these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from vitkd_cli.errors import UserError


class UnreadableImage(UserError):
    """An image that cannot be opened or decoded; exit code 3, for the run had begun."""


class Images(ABC):
    """A split, image by image: ``images[i]`` is ``(PIL image in its own mode, class)``."""

    iterable = False  # True for streams, which have no index

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

    @abstractmethod
    def labels(self) -> list[int]:
        """The class of every image, without decoding any where the source allows it."""


class FolderImages(Images):
    """Image files with their classes: ``samples`` is ``[(path, class), ...]``."""

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with reading(path):
            return _decoded(path), label

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
    for path in paths:
        if "://" in str(path):
            raise UserError(f"{path} is an address, not a file", "download the image, and name the file")
        place = Path(path).expanduser()
        if place.is_dir():
            inside = [name for name, _ in find_images_and_targets(str(place))[0]]
            inside = [name for name in inside if not Path(name).name.startswith(".")]
            if not inside:
                types = ", ".join(get_img_extensions())
                raise UserError(f"there are no images in {place}", f"files that count: {types}")
            found += inside
        elif place.is_file():
            found.append(str(place))
        else:
            raise UserError(f"there is no image or folder {place}", "name files or folders of images")
    return FolderImages([(name, -1) for name in found])


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
            else:  # past timm's dataset, which would replace an unreadable image by the next one
                file, label, *_ = self.reader[index]
                image = _decoded(file)
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
        self.images, self.indices = images, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[self.indices[index]]

    def path(self, index: int) -> str:
        return self.images.path(self.indices[index])

    def file(self, index: int) -> str | None:
        return self.images.file(self.indices[index])

    def labels(self) -> list[int]:
        labels = self.images.labels()
        return [labels[index] for index in self.indices]


class Labelled(Images):
    """The same images with other classes, one an image."""

    def __init__(self, images: Images, labels: Sequence[int]) -> None:
        self.images, self._labels = images, list(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index][0], self._labels[index]

    def path(self, index: int) -> str:
        return self.images.path(index)

    def file(self, index: int) -> str | None:
        return self.images.file(index)

    def labels(self) -> list[int]:
        return list(self._labels)


class TarImages(Images):
    """Images inside of a tar file, of tars in a tar, or of a folder of tars; timm's reader.

    A file within is opened by the process that reads it first; read none before the loader's workers start.
    """

    def __init__(self, root: Path, class_map: str | None = None) -> None:
        # timm's cache of the listing is a pickle beside the tar; without it a big one is listed anew
        self.reader = ReaderImageInTar(str(root), class_map=class_map or "", cache_tarinfo=False)
        self.root = root

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with reading(lambda: self.path(index)):
            file, label = self.reader[index]
            return _decoded(file), int(label)

    def path(self, index: int) -> str:
        return f"{self.root}/{self.reader.filename(index)}"

    def file(self, index: int) -> str | None:
        return str(self.root)

    def labels(self) -> list[int]:
        return [int(label) for label in self.reader.targets]


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


def _decoded(file: Any) -> Image.Image:
    """All pixels of an image file, in its own mode."""
    with Image.open(file) as image:
        image.load()
    return image


@contextmanager
def reading(path: str | Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        name = path if isinstance(path, str) else path()
        raise UnreadableImage(
            f"cannot read image {name}: {first_line(error)}", "repair or delete it", exit_code=3
        ) from error


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
