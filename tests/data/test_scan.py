"""Broken files are found before training: all of them, each with its reason, and only once."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vitkd_cli.data import scan
from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import loose_images
from vitkd_cli.data.scan import Scan, image_files, without

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def loop(file: Path) -> None:
    file.unlink()
    os.symlink(file.name, file)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "truncated|Truncated|[Bb]roken|unrecognized|decod"),
    "empty": (lambda file: file.write_bytes(b""), "the file is empty"),
    "text": (lambda file: file.write_text("no image"), "not a picture"),
    "loop": (loop, "symbolic links"),
    "gone": (lambda file: file.unlink(), "No such file"),
    "locked": (lambda file: (file.unlink(), file.mkdir()), "directory"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_damage_of_every_kind_of_file_is_found(
    suffix: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SAMPLE", 1)  # the damaged file is not decoded for the sample's sake
    files = [tmp_path / f"{n}.{suffix}" for n in range(3)]
    for file in files:
        PHOTO.save(file)
    act, why = DAMAGE[damage]
    act(files[1])
    found = scan.scan([str(file) for file in files], Decoding())
    assert list(found.broken) == [str(files[1])]

    assert re.search(why, found.broken[str(files[1])]), found


def test_the_middle_of_a_sample_is_decoded(tmp_path: Path) -> None:
    file = tmp_path / "rotten.png"
    PHOTO.save(file)
    content = bytearray(file.read_bytes())
    content[300:320] = bytes(20)
    file.write_bytes(content)
    assert list(scan.scan([str(file)], Decoding()).broken) == [str(file)]


def test_headers_alone_are_read_of_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(tmp_path / f"{n}.jpg") for n in range(40)]
    for file in files:
        PHOTO.save(file, exif=TURNED)
    decoded: list[int] = []
    monkeypatch.setattr(scan, "SAMPLE", 4)
    monkeypatch.setattr(Decoding, "upright", lambda self, image: decoded.append(1))
    seen: list[tuple[int, int]] = []
    assert scan.scan(files, Decoding(), lambda *done: seen.append(done)) == Scan({}, turned=40)
    assert len(decoded) == 4 and seen[-1] == (40, 40)
    too_large = scan.scan(files[:1], Decoding(max_pixels=100))
    assert too_large.broken == {files[0]: "too large: 4,096 pixels"}


def test_what_other_processes_find_is_what_the_main_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.utils

    said = iter(
        [[None], [None], [Scan({"a.jpg": "the file is empty"}, 0)]]
    )  # it goes on, it goes on, it is done
    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda _: next(said))
    monkeypatch.setattr(scan, "_scan", lambda *_: pytest.fail("it looks itself"))
    other = SimpleNamespace(num_processes=2, is_main_process=False)
    assert scan.scan(["a.jpg"], Decoding(), accelerator=other).broken == {"a.jpg": "the file is empty"}


def test_the_others_hear_that_the_main_one_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.utils

    said: list[object] = []
    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda told: said.append(*told))
    monkeypatch.setattr(scan, "_BEAT", -1.0)
    main = SimpleNamespace(num_processes=2, is_main_process=True)

    def act(each: Callable[[int, int], None]) -> str:
        each(1, 2)
        each(2, 2)
        return ""

    assert scan.by_main(act, lambda done, total: None, main) == ""
    assert said == [None, None, ""]


def test_a_machine_that_waits_says_for_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.utils

    later = iter([(1, 4), (2, 4), (3, 4)])

    def gathered(ours: list[object]) -> list[object]:
        return [*ours, ("gpu02", at, None) if (at := next(later, None)) else ("gpu02", (4, 4), "its line")]

    monkeypatch.setattr(accelerate.utils, "gather_object", gathered)
    main, said, shown = SimpleNamespace(num_processes=2, is_local_main_process=True), [], []
    lines = scan.on_every_machine(
        lambda each: "our line", lambda done, total: shown.append((done, total)), said.append, main
    )
    assert lines == ["our line", "its line"] and shown == [(1, 4), (2, 4), (3, 4)]
    assert said == ["waiting for gpu02, where images are decoded"]


def test_broken_images_leave_a_split(tmp_path: Path) -> None:
    for n in range(3):
        PHOTO.save(tmp_path / f"{n}.jpg")
    images = loose_images([tmp_path])
    files = image_files(images, images)
    assert len(files) == 3
    rest = without(images, {files[1]: "the file is empty"})
    assert [rest.path(index) for index in range(len(rest))] == [files[0], files[2]]
    assert without(images, {}) is images


def test_a_resumed_run_does_not_look_at_the_same_files_again(tmp_path: Path, photos: Path) -> None:
    from vitkd_cli.data.datasets import open_data
    from vitkd_cli.progress import Reporter
    from vitkd_cli.recipe import Recipe
    from vitkd_cli.training.data import readable

    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    (root / "cat" / "00.jpg").write_bytes(b"")
    data = open_data(data=str(root))
    session = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, is_main_process=True), reporter=Reporter(silent=True)
    )
    looks: list[int] = []
    whole = scan._scan

    def counted(*arguments: object) -> Scan:
        looks.append(1)
        return whole(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_scan", counted)
        recipe = Recipe(skip_corrupt=True)
        first = readable(recipe, data, tmp_path, session)  # type: ignore[arg-type]
        first.keep(tmp_path)
        again = readable(recipe, data, tmp_path, session)  # type: ignore[arg-type]
        assert looks == [1] and again.broken == first.broken == {
            str(root / "cat/00.jpg"): "the file is empty"
        }
        PHOTO.save(root / "cat" / "00.jpg")  # repaired
        assert readable(Recipe(), data, tmp_path, session).broken == {}  # type: ignore[arg-type]
        (tmp_path / "scan.json").write_text("[1")
        assert readable(Recipe(), data, tmp_path, session).broken == {}  # type: ignore[arg-type]
        assert looks == [1, 1, 1]


@pytest.mark.parametrize(
    ("damaged", "hint"), [(0, "scale them down, or"), (1, "repair them; too large ones: scale")]
)
def test_too_large_is_not_to_be_repaired(damaged: int, hint: str) -> None:
    broken = {"a.png": "too large: 169,000,000 pixels", "b.png": "too large: 200,000,000 pixels"}
    if damaged:
        broken["c.png"] = "the file is empty"
    error = scan.unreadable(broken, 10, "repair them")
    assert error.hint.startswith(hint) and error.hint.endswith("--max-pixels 200000000")
    assert len(error.details) == len(broken) and "c.png" not in error.message
