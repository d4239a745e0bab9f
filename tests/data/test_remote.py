"""Tars at addresses: those of a storage in memory, and in the slow tests those of real servers."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import fsspec
import numpy as np
import pytest
from PIL import Image
from tarred import cls, picture, refused, samples, shards, write_tar

from vitkd_cli.data import remote
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.keyed import Keyed, train_loader
from vitkd_cli.data.transforms import train_view
from vitkd_cli.errors import UserError


class Bucket(NamedTuple):
    """Tars at an address, the folder that they were put there from, and that of their copies."""

    address: str
    here: Path
    copies: Path
    put: Callable[[Path], None]
    delete: Callable[[str], None]


@contextmanager
def in_memory(name: str) -> Iterator[tuple[str, Callable[[Path], None], Callable[[str], None]]]:
    system = fsspec.filesystem("memory")
    yield (
        f"memory://{name}",
        lambda path: system.put_file(str(path), f"/{name}/{path.name}"),
        lambda path: system.rm(f"/{name}/{path}"),
    )
    system.rm(f"/{name}", recursive=True)


@contextmanager
def by_http(name: str) -> Iterator[tuple[str, Callable[[Path], None], Callable[[str], None]]]:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// by aiohttp")
    with tempfile.TemporaryDirectory() as folder:
        handler = partial(SimpleHTTPRequestHandler, directory=folder)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            yield (
                f"http://127.0.0.1:{server.server_port}",
                lambda path: shutil.copy2(path, folder) and None,
                lambda path: os.unlink(f"{folder}/{path}"),
            )
            server.shutdown()


@contextmanager
def by_s3(name: str) -> Iterator[tuple[str, Callable[[Path], None], Callable[[str], None]]]:
    s3fs = pytest.importorskip("s3fs", reason="fsspec reads s3:// by s3fs")
    moto = pytest.importorskip("moto.server", reason="moto[server] is the storage that is read")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    known = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in known.items():
            patch.setenv(key, value)
        s3fs.S3FileSystem.clear_instance_cache()  # one is kept for all, with the address of a server before
        system = s3fs.S3FileSystem()
        bucket = f"tars-{os.urandom(4).hex()}"  # servers of one process share what they hold
        system.mkdir(bucket)
        yield (
            f"s3://{bucket}",
            lambda path: system.put_file(str(path), f"{bucket}/{path.name}"),
            lambda path: system.rm(f"{bucket}/{path}"),
        )
    server.stop()


@pytest.fixture(
    params=[in_memory, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (by_http, by_s3))],
    ids=["memory", "http", "s3"],
)
def bucket(request, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards(tmp_path / "here", sizes=(9, 9, 9))
    with request.param(tmp_path.name) as (address, put, delete):
        for path in (tmp_path / "here").glob("*.tar"):
            put(path)
        yield Bucket(address, tmp_path / "here", tmp_path / "cache" / "vitkd" / "copies", put, delete)


def test_tars_at_an_address(bucket):
    size = os.path.getsize(bucket.here / "train-000.tar")
    room = 2.5 * size / 2**30
    here = open_data(data=f"wds:{bucket.here}/train-{{000..002}}.tar", val_fraction=0).train
    for pattern in ("{000..002}", "*"):
        data = f"wds:{bucket.address}/train-{pattern}.tar"
        there = open_data(data=data, val_fraction=0, remote_cache=room).train
        for index in (26, 0, 13, 1, 25):
            assert np.array_equal(there[index][0], here[index][0]) and there[index][1] == here[index][1]
            assert sum(path.stat().st_size for path in bucket.copies.glob("*.tar")) <= 2.5 * size
    assert there.path(26).endswith("/train-002.tar/00026.png")
    assert not [path for path in bucket.copies.iterdir() if path.name.startswith(".part")]
    batches = train_loader(Keyed(there, train_view((8, 8)), 1), [[(0, n, n) for n in range(27)]], 2)
    assert [label for batch in batches for label in batch.labels.tolist()] == here.labels()


def test_a_tar_at_an_address_that_is_replaced_or_lost(bucket):
    data = f"wds:{bucket.address}/train-{{000..002}}.tar"
    before = open_data(data=data, val_fraction=0).train
    replaced = write_tar(bucket.here / "train-001.tar", samples(50, 9, cls=cls))  # as long as it was
    os.utime(replaced, (2e9, 2e9))  # http tells whole seconds
    bucket.put(replaced)
    after = open_data(data=data, val_fraction=0)
    assert after.train.labels()[9:18] == [n % 3 for n in range(50, 59)]
    assert np.array_equal(after.train[9][0], Image.open(io.BytesIO(picture(50))))
    assert "train-001.tar" in after.notes[0] and "indexed anew" in after.notes[0]
    assert np.array_equal(before[9][0], Image.open(io.BytesIO(picture(9))))  # its copy is still there
    for path in bucket.copies.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="changed under the run"):
        pickle.loads(pickle.dumps(before))[9]
    bucket.delete("train-002.tar")
    (lost,) = list(Keyed(after.train, train_view((8, 8)), 1, skip_corrupt=True).__getitems__([(0, 0, 20)]))
    assert "train-002.tar is missing" in lost.message and lost.exit_code == 3  # no other image stands in
    assert "train-002.tar is missing" in refused(data).message


def test_addresses_that_do_not_serve(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with in_memory(tmp_path.name) as (address, put, _):
        shards(tmp_path / "here", sizes=(9,))
        put(tmp_path / "here" / "train-000.tar")
        assert "train-007.tar is missing" in refused(f"wds:{address}/train-007.tar").message
        assert "no file fits" in refused(f"wds:{address}/val-*.tar").message
        assert "names no tars" in refused(f"wds:{address}").message
        assert "nowhere://" in refused("wds:nowhere://x/a.tar").message
        error = refused(f"wds:{address}/train-000.tar", remote_cache=1e-9)
        assert "copies may take" in error.message and error.hint == "--remote-cache GIB"
        system, tries = type(fsspec.filesystem("memory")), []
        monkeypatch.setattr(remote, "_PAUSES", (0.01, 0.01, 0))

        def broken(*_, **__):
            tries.append(1)
            raise ConnectionError("the line is dead\nlong story")

        monkeypatch.setattr(system, "get_file", broken)
        error = refused(f"wds:{address}/train-000.tar")
        assert "the line is dead" in error.message and error.exit_code == 3 and len(tries) == 3


@pytest.mark.parametrize(
    ("problem", "said", "cure"),
    [
        (PermissionError("Forbidden"), "Forbidden", "AWS_PROFILE"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate them"), "Unable", "AWS_PROFILE"),
        (ImportError("Install s3fs to access S3"), "Install s3fs", "pip install s3fs"),
        (FileNotFoundError("bucket/a.tar"), "is missing", "restore it"),
        (OSError("no route"), "no route", "the network"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_storage_says_is_told_with_a_cure(monkeypatch, problem, said, cure):
    def refuse(address):
        raise problem

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)
    error = refused("wds:s3://bucket/a.tar")
    assert error.message.startswith("s3://bucket/a.tar") and said in error.message and cure in error.hint


def test_by_http_a_dead_server_is_no_missing_tar(monkeypatch):
    gone = FileNotFoundError("http://host/a.tar")
    gone.__cause__ = ConnectionError("connection refused")

    def refuse(address):
        raise gone

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)
    assert "connection refused" in refused("wds:http://host/a.tar").message
    gone.__cause__ = type("Answer", (Exception,), {"status": 404})()
    assert "is missing" in refused("wds:http://host/a.tar").message
