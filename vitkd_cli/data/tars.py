"""Images in tar files: one, tars in a tar, or a folder of tars; timm's reader."""

import os
import tarfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images
from vitkd_cli.data.walk import TYPES, in_order, passed_over
from vitkd_cli.errors import UserError, first_line
from vitkd_cli.text import nfc


def tar_images(root: Path) -> tuple[Images, list[str]]:
    """Images without labels, and the name of each one's class.

    It is the first folder below those that hold all images, or the name of the tar where there are no folders
    in it; empty for images that lie side by side. The reader opens its tars in the process that reads first:
    read no image before the loader's workers start.
    """
    try:
        reader = _reader(root)
        order, within = _members(reader)
    except (tarfile.TarError, OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"{root} cannot be read as tar files of images: {first_line(error)}",
            "give a .tar with one folder per class",
        ) from error
    shared = Path(os.path.commonpath(["/".join(folder) for folder in within])).parts
    above = len(shared)
    if above and set(within) == {shared}:
        above -= 1  # all in one folder: it is the class
    names = [nfc(folder[above]) if len(folder) > above else "" for folder in within]
    images = Images(order, [-1] * len(order), partial(_open, reader), partial(_name, root, reader), str(root))
    return images, names


def _members(reader: Any) -> tuple[list[int], list[tuple[str, ...]]]:
    """The reader's indices of the images in natural order, and the folders that each lies in."""
    members: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)  # path → (tars, index)
    folders: list[tuple[str, ...]] = []
    for index, (member, tar, child) in enumerate(reader.samples):
        tars = [Path(name).with_suffix("").name for name in (tar, child and child.name) if name]
        *parts, name = (part for part in member.path.split("/") if part not in ("", "."))
        folders.append(tuple(parts or tars[-1:]))
        if not any(map(passed_over, (*parts, name))):
            members[member.path].append(("/".join(tars), index))
    order = [index for path in in_order(members) for _, index in sorted(members[path])]
    if not order:
        raise ValueError("there are no images in it")
    return order, [folders[index] for index in order]


def _open(reader: Any, index: int, decoding: Decoding) -> Image.Image:
    return decoding(reader[index][0])


def _name(root: Path, reader: Any, index: int) -> str:
    return f"{root}/{reader.filename(index)}"


def _reader(root: Path) -> Any:
    for place in [root] if root.is_file() else sorted(root.glob("*.tar")):
        with open(place, "rb") as file:
            _follow(file, str(place))
    before = get_img_extensions()
    set_img_extensions(TYPES)
    try:
        # timm's cache of the listing is a pickle beside the tar; without it a big one is listed anew
        return ReaderImageInTar(str(root), cache_tarinfo=False)
    finally:
        set_img_extensions(before)


def _follow(file: IO[bytes], name: str) -> None:
    """Refuse a tar that cannot be followed to its end mark, two blocks of zeros; tarfile stops silently."""
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
