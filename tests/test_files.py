"""What is written is whole; a disk's refusal is a line; foreign text is harmless."""

from __future__ import annotations

import errno
import os

import pytest

from vitkd_cli import text
from vitkd_cli.errors import UserError
from vitkd_cli.files import damaged, saving, whole_file, write_json, write_manifest, write_text


def test_a_reader_sees_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), whole_file(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_two_writers_of_one_file_each_write_their_own(tmp_path):
    path = tmp_path / "file.txt"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_permissions_are_what_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "weights") as beside:
            beside.touch()
            beside.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (OSError(errno.EACCES, "Permission denied"), "permission denied"),
        (FileExistsError(errno.EEXIST, "File exists"), "a file lies there"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "a file lies where a folder should be"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . unexpected pos 64 vs 0"), "disk is full"),
    ],
)
def test_a_disk_that_refuses_is_named(tmp_path, problem, said):
    with pytest.raises(UserError, match=said) as caught, saving(tmp_path / "a" / "file"):
        raise problem
    assert caught.value.exit_code == 3
    assert str(tmp_path) in caught.value.message


def test_other_problems_are_bugs(tmp_path):
    with pytest.raises(KeyError), saving(tmp_path):
        raise KeyError("x")


def test_a_flipped_bit_and_a_missing_file_are_seen(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(bytes(100))
    write_manifest(tmp_path, ["a", "b", "c"])
    assert damaged(tmp_path) == {}
    (tmp_path / "a").write_bytes(bytes(99) + b"\x01")
    (tmp_path / "b").unlink()
    assert set(damaged(tmp_path)) == {"a", "b"}
    (tmp_path / "manifest.json").write_text("{")
    assert set(damaged(tmp_path)) == {"manifest.json"}


def test_foreign_text_is_one_harmless_line():
    hostile = "a\n# b \x1b[31m<script>|`[x](y)"
    assert "\n" not in text.plain(hostile)
    assert "\x1b" not in text.plain(hostile)
    shown = text.markdown(hostile)
    assert "\\<script\\>" in shown
    assert "\\|" in shown
    assert "\n" not in shown
    assert text.csv_cell("=1+1") == "'=1+1"
    assert text.csv_cell("cat") == "cat"
    assert text.csv_cell(-1.0) == -1.0
    assert text.csv_cell("a\n\x1b") == r"a\n\x1b"
    assert text.plain("café 猫") == "café 猫"
