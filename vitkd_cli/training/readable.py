"""Which images of a run can be read: looked at once, before the hours are spent."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vitkd_cli.data.decoding import decoding_of
from vitkd_cli.data.images import ImageData, Images, Split
from vitkd_cli.data.scan import Scan, image_files, scan, stamp, unreadable, without
from vitkd_cli.errors import UserError
from vitkd_cli.files import write_json
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session

KNOWN = "scan.json"


@dataclass(frozen=True)
class Readable:
    """What a look at the files found.

    Attributes:
        data: without the validation images that cannot be read.
        stamp: of the files; empty on all processes but the main one.
    """

    data: ImageData
    stamp: str
    broken: dict[str, str]

    def keep(self, folder: Path) -> None:
        """Spare a resumed run the look at the same files."""
        if self.stamp:
            write_json(folder / KNOWN, {"files": self.stamp, "broken": self.broken})


def readable(recipe: Recipe, data: ImageData, folder: Path, session: Session) -> Readable:
    """Look at every image file that the run will read, unless ``folder`` holds what such a look found.

    Raises:
        UserError: files cannot be read, and ``--skip-corrupt`` was not given; it lists them all.
    """
    now, found, decoding, reporter = "", None, decoding_of(recipe), session.reporter
    with reporter.bar("looking at the images", 0):
        files = image_files(data.train_all, data.val, data.bank)
        if session.accelerator.is_main_process and files:
            now = stamp(files, decoding)
            found = _known(folder / KNOWN, now)
        found = scan(
            files,
            decoding,
            lambda done, total: reporter.advance(done, total=total),
            session.accelerator,
            found=found,
        )
    broken = found.broken
    if not broken:
        return Readable(data, now, broken)
    if not recipe.skip_corrupt:
        raise unreadable(broken, len(files), "repair or delete them, or pass --skip-corrupt")

    def rest(images: Split | None) -> Split | None:
        return without(images, broken) if isinstance(images, Images) else images

    val, same = rest(data.val), data.bank is data.val
    if data.val is not None and not val:
        raise UserError(f"no validation image of {data.name} can be read", "repair the files", exit_code=3)
    gone = sorted(set(image_files(data.val)) & broken.keys())
    reporter.warn(
        f"{len(broken):,} of {len(files):,} image files cannot be read: in training others of their class "
        f"stand in for them; validation goes without {len(gone):,}"
    )
    for file, why in broken.items():
        reporter.say(f"  {file}: {why}")
    return Readable(
        replace(data, val=val, bank=val if same else rest(data.bank), left_out=tuple(gone)), now, broken
    )


def _known(file: Path, stamp: str) -> Scan | None:
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(file.read_bytes())
        if content["files"] == stamp:
            return Scan(dict(content["broken"]), 0)
    return None
