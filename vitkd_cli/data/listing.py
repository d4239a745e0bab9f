"""Record which images a run had, to recognise them later: names, sizes and classes.

Names are relative to the data's folder, in Unicode's composed form and with ``/``: data that moved, even to
another system, keeps them.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitkd_cli.data.images import ImageData, Images, Split
from vitkd_cli.data.walk import from_root
from vitkd_cli.errors import UserError, expanded
from vitkd_cli.files import statuses
from vitkd_cli.text import listed, nfc

MOST_LISTED = 100_000  # files that a run folder lists
MOST_CARRIED = 20_000  # held-out files that a student lists
Files = dict[str, tuple[int, int]]  # name → bytes and class


def files_of(images: Split | None, root: Path) -> Files | None:
    """The files of images below a folder; None where they are not files, each its own."""
    if not isinstance(images, Images):
        return None
    if not images.are_files:
        return None
    known = list(images.refs)
    names = [from_root(path, root) for path in known]
    return dict(zip(names, zip(_sizes(known), images.labels(), strict=True), strict=True))


def _sizes(paths: Sequence[str]) -> Iterator[int]:
    return (-1 if status is None else status[0] for status in statuses(paths))


def digest_of(files: Files) -> str:
    """A digest of names and sizes; names are relative to the folder that holds all files."""
    above = len(os.path.commonpath(files)) if files else 0
    return _digest(f"{name[above:].lstrip('/')}\t{size}" for name, (size, _) in sorted(files.items()))


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()


def root_of(data: str, data_dir: str | None) -> Path:
    """The folder that ``--data`` means, if it is one."""
    here = expanded(data)
    return here if here.exists() or not data_dir else expanded(data_dir) / data


def written_down(data: ImageData, train_root: Path, val_root: Path) -> dict[str, Any]:
    """The run's images, for its ``data.json``.

    Args:
        train_root, val_root: the folders that hold the splits, where they are folders.
    """
    return {
        "classes": None if data.class_names is None else [nfc(name) for name in data.class_names],
        "held_out": data.split_files is not None,
        "train": _split(data.train_all or data.train, train_root),
        "validation": _split(data.val, val_root),
    }


def _split(images: Split | None, root: Path) -> dict[str, Any] | None:
    if not isinstance(images, Images):
        return None
    files = files_of(images, root)
    if files is None:
        if not images.archives:
            return {"images": len(images), "digest": _digest(map(str, images.labels()))}
        sizes = zip(images.archives, _sizes(images.archives), strict=True)
        tars = [f"{Path(tar).name}\t{size}" for tar, size in sizes]
        classes = hashlib.sha256(images.classes.tobytes()).hexdigest()
        return {"images": len(images), "digest": _digest([classes, *tars])}
    told: dict[str, Any] = {"images": len(images), "digest": digest_of(files)}
    return told | ({"files": files} if len(files) <= MOST_LISTED else {})


def carried(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that a student carries: digests, and the files that its run held out itself."""
    told: dict[str, Any] = {"held_out": record["held_out"]}
    for split in ("train", "validation"):
        known = record[split]
        told[split] = known and {key: known[key] for key in ("images", "digest")}
    files = (record["validation"] or {}).get("files")
    if record["held_out"] and files and len(files) <= MOST_CARRIED:
        told["validation"]["files"] = files
    return told


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two records, in words; empty if nothing did.

    Where a run held images out itself, the reader of its ``split.json`` reports new and missing files.
    """
    found = []
    if then["classes"] != now["classes"]:
        ours, theirs = then["classes"] or [], now["classes"] or []
        gone, added = ([name for name in a if name not in b] for a, b in ((ours, theirs), (theirs, ours)))
        words = [f"{listed(names)} {verb}" for names, verb in ((gone, "gone"), (added, "new")) if names]
        found.append(f"classes: {' and '.join(words) or 'in another order'}")
    for split in ("train", "validation"):
        one, other = then[split], now[split]
        if (one and one["digest"]) == (other and other["digest"]):
            continue
        if not (one and other and "files" in one and "files" in other):
            old, new = (f"{known['images']:,}" if known else "no" for known in (one, other))
            what = "other names or sizes" if old == new else f"{new} images in place of {old}"
            found.append(f"{split}: {what}")
            continue
        before, after = one["files"], other["files"]
        sides = {
            "gone": [] if then["held_out"] else [name for name in before if name not in after],
            "new": [] if then["held_out"] else [name for name in after if name not in before],
            "of another size": [n for n in before if n in after and before[n][0] != after[n][0]],
        }
        if words := [f"{len(names):,} {verb} ({listed(names)})" for verb, names in sides.items() if names]:
            found.append(f"{split}: {', '.join(words)}")
    return found


def read_record(file: Path) -> dict[str, Any] | None:
    """A run's ``data.json``; None where there is none."""
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_bytes())
        assert isinstance(record["held_out"], bool)
        assert record["classes"] is None or isinstance(record["classes"], list)
        for split in ("train", "validation"):
            assert record[split] is None or isinstance(record[split]["digest"], str)
            for name, (size, label) in ((record[split] or {}).get("files") or {}).items():
                assert isinstance(name, str) and isinstance(size, int) and isinstance(label, int)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(
            f"{file} is damaged: nobody can tell whether the data changed",
            "delete it if you are sure that the data is the same",
        ) from None
    return dict(record)


def read_split(file: Path) -> dict[str, list[str]]:
    """A run's ``split.json``: the names of its training and validation images."""
    try:
        content = json.loads(file.read_bytes())
        split: dict[str, list[str]] = {key: list(content[key]) for key in ("train", "validation")}
        names = [*split["train"], *split["validation"]]
        assert names and all(isinstance(name, str) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(
            f"{file} is damaged: it lists no training and validation images",
            "restore it: without it nobody knows which images were held out",
        ) from None
    if twice := sorted(set(split["train"]) & set(split["validation"])):
        raise UserError(
            f"{file} is damaged: {listed(twice)} in both training and validation",
            "restore it: without it nobody knows which images were held out",
        )
    return split


def there(files: Files, root: Path) -> tuple[dict[str, str], int]:
    """Where the files of a list lie below a folder, and how many of these have the size that it says.

    Returns:
        Name → path of those that are there.
    """
    found, fitting = {}, 0
    for name, (size, _) in files.items():
        for spelling in dict.fromkeys((name, unicodedata.normalize("NFD", name))):
            path = root / spelling
            if path.is_file():
                found[name] = str(path)
                fitting += path.stat().st_size == size
                break
    return found, fitting
