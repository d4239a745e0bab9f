"""What a model says of images, labelled or not: its first classes, or embeddings; kept while it goes."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from vitkd_cli.data.images import Images, Stream
from vitkd_cli.data.scan import image_files, scan, unreadable, without
from vitkd_cli.data.transforms import view_of
from vitkd_cli.data.webdataset import named_images
from vitkd_cli.device import device_named
from vitkd_cli.errors import UserError, expanded
from vitkd_cli.evaluation.cache import cache_file, read_tensors, write_tensors
from vitkd_cli.evaluation.images import Provenance
from vitkd_cli.evaluation.opening import Progress, facts_of, over_images, prepared_for, seen_by
from vitkd_cli.evaluation.writing import check_table, write_table
from vitkd_cli.files import remove, whole_file
from vitkd_cli.options import takes
from vitkd_cli.requests import PredictRequest
from vitkd_cli.text import html_table
from vitkd_cli.vit.build import open_model, source_of
from vitkd_cli.vit.model import Model

EVERY = 20.0  # seconds between two parts
_KEY = 16  # bytes that tell one image from another


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said of N images.

    Attributes:
        model: its name.
        images: names or paths of the images.
        classes, probabilities: ``[N, k]`` the first k classes, best first; None for embeddings.
        embeddings: ``[N, E]`` float32; None for classes.
        names: of the model's classes; empty if nobody knows them.
        left_out: unreadable file → why.
        resumed: images that an earlier call, which was stopped, had an answer to.
        notes: what a reader should know, one line each.
    """

    model: str
    images: tuple[str, ...]
    classes: Tensor | None
    probabilities: Tensor | None
    embeddings: Tensor | None
    names: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    notes: tuple[str, ...] = ()

    def columns(self, *, nested: bool = False) -> dict[str, Any]:
        """Name → type, of a table with a row per image.

        Args:
            nested: an embedding is one column.
        """
        found: dict[str, Any] = {"image": str}
        if self.embeddings is not None:
            width = self.embeddings.shape[1]
            return found | ({"embedding": list[float]} if nested else {f"e{i}": float for i in range(width)})
        assert self.classes is not None
        for rank in range(1, self.classes.shape[1] + 1):
            found[f"class_{rank}"] = int
            found |= {f"name_{rank}": str} if self.names else {}
            found[f"probability_{rank}"] = float
        return found

    def rows(self, *, nested: bool = False) -> Iterator[dict[str, Any]]:
        """One row per image, with these columns."""
        for index, image in enumerate(self.images):
            row: dict[str, Any] = {"image": image}
            if self.embeddings is not None:
                values = self.embeddings[index].tolist()
                yield row | ({"embedding": values} if nested else {f"e{i}": x for i, x in enumerate(values)})
                continue
            assert self.classes is not None and self.probabilities is not None
            said = zip(self.classes[index].tolist(), self.probabilities[index].tolist(), strict=True)
            for rank, (number, probability) in enumerate(said, 1):
                row[f"class_{rank}"] = number
                row |= {f"name_{rank}": self.names[number]} if self.names else {}
                row[f"probability_{rank}"] = probability
            yield row

    def write(self, path: str | Path) -> None:
        """Write a whole ``.csv``, ``.parquet`` or ``.safetensors``.

        The last has ``images``, their names in UTF-8 with a zero byte between two; ``classes`` and
        ``probabilities``, or ``embeddings``; and ``model`` and ``class_names`` in its header.
        """
        path = expanded(path)
        if path.suffix != ".safetensors":
            nested = path.suffix == ".parquet"
            write_table(path, self.columns(nested=nested), self.rows(nested=nested))
            return
        names = torch.tensor([*os.fsencode("\0".join(self.images))], dtype=torch.uint8)
        parts = {
            "classes": None if self.classes is None else self.classes.int(),
            "probabilities": None if self.probabilities is None else self.probabilities.float(),
            "embeddings": self.embeddings,
        }
        tensors = {name: part.contiguous() for name, part in parts.items() if part is not None}
        with whole_file(path) as beside:
            about = {"model": self.model, "class_names": json.dumps(self.names)}
            save_file({"images": names, **tensors}, beside, about)

    def __repr__(self) -> str:
        what = "embeddings" if self.classes is None else f"first {self.classes.shape[1]} classes"
        return f"Predictions({self.model!r}: {what} of {len(self.images):,} images)"

    def _repr_html_(self) -> str:
        if self.embeddings is not None:
            return html_table(["model", "images", "width"], [[self.model, *self.embeddings.shape]])
        titles, some = list(self.columns()), [row for row, _ in zip(self.rows(), range(10), strict=False)]
        return html_table(titles, [[row[title] for title in titles] for row in some])


@takes(PredictRequest)
def predict(request: PredictRequest, *, progress: Progress = lambda stage, done, total: None) -> Predictions:
    """Name images, or embed them, with a timm model, a run's student or a weight file.

    With ``output`` the answers are written there; while it goes, they are kept in a folder beside it, and a
    call that was killed goes on from there.

    Args:
        request: or its settings, the model and the images first.
        progress: told the stage, what is done, and of how much.
    """
    check_predict(request)
    images, notes = _images(request)
    model = open_model(request.model, request)
    if request.embed and not model.spec.embed_dim:
        raise UserError(f"{model.spec.name} gives no embedding of an image: it returns tokens", "--images …")
    if not request.embed and not model.spec.num_classes:
        raise UserError(f"{model.spec.name} has no classes: it gives an embedding", "--embed")
    names = () if request.embed else _readable_names(model)
    model = prepared_for(model, request, device_named(request.device))
    files = image_files(images)
    broken = scan(files, images.decoding, partial(progress, "looking at the files")).broken
    if broken and not request.skip_corrupt:
        raise unreadable(broken, len(files), "repair or delete them, or leave them out with --skip-corrupt")
    images = without(images, broken)
    if not len(images):
        raise UserError("no image is left to look at", "name others", exit_code=3)
    rows, resumed = _answers(model, images, request, progress)
    half = rows.shape[1] // 2
    found = Predictions(
        model=model.spec.name,
        images=tuple(map(images.path, range(len(images)))),
        classes=None if request.embed else rows[:, :half].long(),
        probabilities=None if request.embed else rows[:, half:],
        embeddings=rows if request.embed else None,
        names=names,
        left_out=broken,
        resumed=resumed,
        notes=(*notes, *(f"{model.spec.name}: {note}" for note in model.notes)),
    )
    if request.output is not None:
        found.write(request.output)
        remove(_folder(request.output))
    return found


def check_predict(request: PredictRequest) -> None:
    """Refuse what cannot be, before anything is read."""
    if request.embed and request.test_time_pool:
        raise UserError("--test-time-pool is about heads, and --embed about embeddings", "leave one out")
    if request.output is None:
        return
    check_table(request.output, "--output", (".csv", ".parquet", ".safetensors"), "answers.csv")
    if expanded(request.output).exists() and not request.overwrite:
        raise UserError(f"--output {request.output} is there already", "--overwrite replaces it")


def _images(request: PredictRequest) -> tuple[Images, Sequence[str]]:
    """The images, and what a person should know of them."""
    origin = Provenance([request.checkpoint or source_of(request.model)])
    if request.images:
        images, names = named_images(request.images), None
        notes = list(images.notes)
    else:
        data = origin.data(request.data)
        chosen = origin.images(data, request.split, data_dir=request.data_dir)
        if isinstance(chosen.images, Stream):
            raise UserError(f"{data} is a stream: its images have no names", "name files with --images")
        images, names = chosen.images, chosen.names
        notes = [f"images of {chosen.about}", *chosen.notes]
    images.decode_by(origin.decoding(request, names))
    return images, notes


def _readable_names(model: Model) -> tuple[str, ...]:
    """Of the model's classes; ImageNet's in words."""
    names = model.class_names or ()
    subset = infer_imagenet_subset({"num_classes": model.spec.num_classes})
    if not names or subset is None:
        return names
    imagenet = ImageNetInfo(subset)
    known = set(imagenet.label_names())
    return tuple(imagenet.label_name_to_description(name) if name in known else name for name in names)


def _answers(model: Model, images: Images, request: PredictRequest, progress: Progress) -> tuple[Tensor, int]:
    """``[N, 2k]`` float64 classes and probabilities, or ``[N, E]`` float32; how many were known before."""
    k = min(request.topk, model.spec.num_classes)

    def answer(labels: Tensor, seen: Tensor) -> Tensor:
        if request.embed:
            return model.embedding(seen).float()
        best = model.logits(seen).double().softmax(1).topk(k)
        return torch.cat([best.indices.double(), best.values], 1)

    # Images without files of their own are known by their number alone, in the data that is named.
    of = None if request.images else [request.data, request.data_dir, request.split]
    facts = [facts_of(model), request.mixed_precision, request.embed, k, images.decoding, of]
    parts = _Parts(request.output, facts, images)
    width = model.spec.embed_dim if request.embed else 2 * k
    rows = torch.zeros(len(images), width, dtype=torch.float32 if request.embed else torch.float64)
    left = parts.read_into(rows)
    table, done, saved, latest = rows.new_zeros(len(left), width).to(model.device), 0, 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, saved, latest
        done += count
        progress(model.spec.name, len(images) - len(left) + done, len(images))
        if done == len(left) or time.monotonic() - latest >= EVERY:
            some = table[saved:done].cpu()
            if bad := int((~some.isfinite().all(1)).sum()):
                raise UserError(
                    f"what {model.spec.name} gives are not numbers, on {bad} of {len(some)} images",
                    "--mixed-precision no, or weights of a training that did not diverge",
                    exit_code=3,
                )
            rows[left[saved:done]] = some
            if done < len(left):
                parts.write(left[saved:done], some)
            saved, latest = done, time.monotonic()

    over_images(answer, images.subset(left), view_of(seen_by(model)), table, request, advance=advance)
    return rows, len(images) - len(left)


def _folder(output: str) -> Path:
    return expanded(output).with_name(f"{expanded(output).name}.parts")


class _Parts:
    """The answers of a call that may be killed, in files beside its output.

    Args:
        facts: that answers depend on, but for the images; parts that depended on others are deleted.
    """

    def __init__(self, output: str | None, facts: Sequence[Any], images: Images) -> None:
        self.folder = None if output is None else _folder(output)
        self.facts, self.count = facts, 0
        self.keys = [] if self.folder is None else [_key(images, index) for index in range(len(images))]

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return cache_file(self.folder, f"{number:06d}", *self.facts)

    def read_into(self, rows: Tensor) -> list[int]:
        """Fill in what is known of the images; the indices of those of which nothing is."""
        left = list(range(len(rows)))
        if self.folder is None or not self.folder.is_dir():
            return left
        known: dict[bytes, Tensor] = {}
        for file in sorted(self.folder.iterdir()):
            number = int(file.name[:6]) if file.name[:6].isdigit() else -1
            tensors = read_tensors(file) if number >= 0 and file == self._file(number) else None
            if tensors is None or tensors["rows"].shape[1:] != rows.shape[1:]:
                remove(file)
                continue
            self.count = max(self.count, number + 1)
            for key, row in zip(tensors["keys"].numpy(), tensors["rows"], strict=True):
                known[key.tobytes()] = row
        for index, key in enumerate(self.keys):
            if key in known:
                rows[index] = known[key]
        return [index for index in left if self.keys[index] not in known]

    def write(self, indices: Sequence[int], rows: Tensor) -> None:
        """Keep the answers to some images."""
        if self.folder is None:
            return
        keys = torch.tensor([[*self.keys[index]] for index in indices], dtype=torch.uint8)
        write_tensors(self._file(self.count), {"keys": keys, "rows": rows})
        self.count += 1


def _key(images: Images, index: int) -> bytes:
    """What tells an image from others, and from an earlier one of its name: path, size, time of change."""
    digest = hashlib.blake2b(os.fsencode(images.path(index)), digest_size=_KEY)
    if place := images.place(index):
        file, start = place
        facts = f"\0{os.path.abspath(file)}"
        with suppress(OSError):  # at an address
            status = os.stat(file)
            facts += f"\0{status.st_size}\0{status.st_mtime_ns}"
        facts += f"\0{start}" if start else ""
        digest.update(facts.encode(errors="surrogateescape"))
    else:
        digest.update(f"\0{len(images)}\0{images.labels()[index]}".encode())
    return digest.digest()
