"""Describe data before it is used: classes, images of each, leaks between the splits."""

import os
from collections.abc import Callable, Hashable
from pathlib import Path
from statistics import median_low

from vitkd_cli.data.folders import counted
from vitkd_cli.data.images import ImageData, Images, Split
from vitkd_cli.data.scan import image_files
from vitkd_cli.files import sha256_of
from vitkd_cli.text import listed

FEW = 5  # training images of a class
MOST_FILES = 200_000  # that are compared by content: even their sizes take minutes on a disk far away


def summary(data: ImageData) -> list[str]:
    """The classes, least and most images of one, those with few, and the files that do not count."""
    lines = []
    names, train = data.class_names, data.train
    if names:
        lines.append(listed(names))
    if names and isinstance(train, Images):
        images = train.counts()
        # A number of classes that was asked for may go beyond those of the data, which have no name.
        own = [index for index, name in enumerate(names) if images[index] or name != f"class {index}"]
        sizes = sorted(images[index] for index in own)
        lines.append(
            f"training images of a class: {sizes[0]:,} at least, median {median_low(sizes):,}, "
            f"{sizes[-1]:,} at most"
        )
        every = data.train_all.counts() if isinstance(data.train_all, Images) else images
        if few := [f"{names[index]} ({every[index]})" for index in own if every[index] < FEW]:
            lines.append(f"fewer than {FEW} training images: {listed(few)}")
    if data.skipped:
        lines.append(f"skipped for their ending: {counted(data.skipped)}")
    return lines


def in_training(train: Split, val: Split, each: Callable[[int, int], None] = lambda done, total: None) -> str:
    """A note on the validation files that are also training files by content; empty if there are none.

    Sizes are compared first, then some of the content, and only what agrees is read whole.

    Args:
        each: is called with files done and in all.
    """
    trained, held = image_files(train), image_files(val)
    if len(trained) + len(held) > MOST_FILES:
        return f"validation images were not looked for in training: there are over {MOST_FILES:,} files"
    same = list(held)
    for key in (os.path.getsize, _from_the_middle, _content):
        keys = _keyed([*trained, *same], key, each)
        common = {keys[path] for path in trained} & {keys[path] for path in same} - {None}
        trained, same = ([path for path in some if keys[path] in common] for some in (trained, same))
    if not same:
        return ""
    names = [f"{Path(path).parent.name}/{Path(path).name}" for path in same]
    return f"{len(same):,} of {len(held):,} validation images are in training, too: {listed(names)}"


def _keyed(
    paths: list[str], key: Callable[[str], Hashable], each: Callable[[int, int], None]
) -> dict[str, Hashable]:
    """A key of every file; None for one that is empty or cannot be read."""
    keys: dict[str, Hashable] = {}
    for done, path in enumerate(paths):
        try:
            keys[path] = key(path) or None
        except OSError:
            keys[path] = None
        if done % 64 == 0:
            each(done, len(paths))
    return keys


def _from_the_middle(path: str) -> bytes:
    """Some of the content, past the headers that all files of a camera share."""
    with open(path, "rb") as file:
        file.seek(os.fstat(file.fileno()).st_size // 2)
        return file.read(1024)


def _content(path: str) -> str:
    return sha256_of(Path(path))
