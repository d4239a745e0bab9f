"""What a teacher said of the views of a run, kept in a folder for the runs that see the same.

A cache is ``PLACE/TEACHER-SIZE-HASH``: ``cache.json`` with what its content depends on, of which the hash is,
and a folder of shards for each tap. Order and views of the images are functions of the view seed and the
epoch, their mixing of the update; so a cache can be shared by arms, seeds and runs, and be resumed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vitkd_cli.errors import UserError
from vitkd_cli.files import free_bytes, read_sealed, saving, write_sealed
from vitkd_cli.text import in_bytes, listed
from vitkd_cli.training.shards import Signal, Span, folder_of, spans
from vitkd_cli.vit.taps import LOGITS, Tap

_FACTS = "cache.json"
WEIGHTS = "weights of the teacher"  # the fact that tells teachers of one name apart


@dataclass(frozen=True)
class Cache:
    """The part of a cache that a run reads or writes.

    Attributes:
        place: what ``--teacher-cache`` names.
        teacher: its name, of no folder, and image size.
        facts: what its content depends on, in words; what is long is a digest.
        signals: what is kept of each tap.
        per_epoch: updates of an epoch.
        updates: that the run sees of it.
        done: of these, how many a resumed run is past.
        keeps: what is computed is put there.
        tuned_in: where the run is yet to fine-tune the teacher, whose weights are not known until then.
    """

    place: Path
    teacher: str
    facts: Mapping[str, Any]
    signals: Mapping[Tap, Signal]
    per_epoch: int
    updates: int
    done: int = 0
    keeps: bool = True
    tuned_in: str = ""

    @cached_property
    def token(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        return self.place / f"{self.teacher}-{self.token[:12]}"

    def about(self, tap: Tap, span: Span) -> dict[str, str]:
        """What a shard says of itself."""
        return {"cache": self.token, "tap": str(tap), "updates": span.file}

    def wanted(self, span: Span) -> int:
        """How many updates of a span the run has yet to see."""
        first = span.epoch * self.per_epoch
        return max(0, min(first + span.stop, self.updates) - max(first + span.start, self.done))

    @property
    def bytes(self) -> int:
        """Of one update."""
        return sum(signal.bytes for signal in self.signals.values())

    @property
    def needed(self) -> int:
        """Bytes of everything that the run has yet to see."""
        return (self.updates - self.done) * self.bytes

    @property
    def stored(self) -> int:
        """Bytes of it that are there."""
        return sum(
            signal.bytes * sum(map(self.wanted, spans(folder_of(self.folder, tap))))
            for tap, signal in self.signals.items()
        )

    def __str__(self) -> str:
        """What it takes, in words."""
        images = next(iter(self.signals.values())).shape[0]
        each = [f"{tap} {in_bytes(signal.bytes / images)}" for tap, signal in self.signals.items()]
        epochs = (self.updates - self.done) / self.per_epoch
        return (
            f"{in_bytes(self.bytes / images)} an image ({', '.join(each)}), "
            f"{in_bytes(self.needed)} for {epochs:.3g} epochs, of which {in_bytes(self.stored)} are there; "
            f"{in_bytes(free_bytes(self.place))} are free in {self.place}"
        )

    def odd(self, device: str) -> list[str]:
        """What a person should know of it before a run on a device of this type."""
        said = []
        if device == "cuda" and any(tap.kind != LOGITS.kind for tap in self.signals):
            said.append(
                "--teacher-cache keeps features, which take longer to read than a GPU takes to compute them "
                "(docs/performance.md); it pays for formulas that read logits alone"
            )
        others = sum(size for theirs, _, size in self._others() if theirs[WEIGHTS] != self.facts[WEIGHTS])
        if others and not self.tuned_in and not _bytes_in(self.folder):
            said.append(
                f"--teacher-cache {self.place} holds {in_bytes(others)} of {self.teacher} with other "
                "weights, and nothing of these"
            )
        return said

    def begin(self) -> None:
        """Make its folder, if it is not there yet."""
        path = self.folder / _FACTS
        with saving(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            if _facts_in(self.folder) != dict(self.facts):
                write_sealed(path, {"facts": dict(self.facts)})

    def check_place(self) -> None:
        """Refuse a place that cannot be a folder."""
        nearest = next(place for place in (self.place, *self.place.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise UserError(
                f"--teacher-cache {self.place}: {nearest} is no folder", "name a folder, or a new one"
            )

    def check_others(self) -> None:
        """Refuse a place that holds what the same teacher said of other images, views or batches.

        Nothing else would show that a change of the recipe costs a second cache and the teacher's time again.
        Other weights are another teacher's: of another arm, say, or fine-tuned by another recipe.
        """
        for theirs, other, size in self._others():
            if theirs[WEIGHTS] == self.facts[WEIGHTS] and not self.tuned_in:
                raise UserError(
                    f"--teacher-cache {self.place} holds another cache of {self.teacher}: "
                    f"{what_differs(theirs, self.facts)}",
                    f"name another folder for this one, delete {other} ({in_bytes(size)}), or go without: "
                    "--teacher-cache off",
                )

    def _others(self) -> Iterator[tuple[dict[str, Any], Path, int]]:
        """Facts, folder and bytes of each other cache of a teacher of this name."""
        for other in sorted(set(self.place.glob(f"{self.teacher}-*")) - {self.folder}):
            theirs, size = _facts_in(other), _bytes_in(other)
            if theirs and size:
                yield theirs, other, size


def _facts_in(folder: Path) -> dict[str, Any] | None:
    """The facts of a cache; None where they cannot be read, so that nobody's shards fit them."""
    try:
        return dict(read_sealed(folder / _FACTS)["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _bytes_in(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*.safetensors"):
        with suppress(OSError):  # a run that writes here has renamed its part since
            size += file.stat().st_size
    return size


def what_differs(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs between the facts of two caches, in words."""
    found = []
    for key in dict.fromkeys((*theirs, *ours)):
        then, now = theirs.get(key), ours.get(key)
        if then != now:
            digests = all(isinstance(value, str) and len(value) == 64 for value in (then, now))
            found.append(f"other {key}" if digests else f"{key} {_shown(then)} there, {_shown(now)} here")
    return listed(found)


def _shown(value: Any) -> str:
    return ",".join(map(_shown, value)) if isinstance(value, list) else f"{value}"


def together(caches: Mapping[str, Cache]) -> list[Cache]:
    """The caches of a run's arms, by their names; those that arms share once.

    Raises:
        UserError: two arms see the same teacher's answers to other views.
    """
    found: dict[tuple[str, str, str], tuple[str, Cache]] = {}
    for name, cache in caches.items():
        teacher = cache.teacher, cache.facts[WEIGHTS], cache.tuned_in
        first, known = found.get(teacher, (name, cache))
        if known.facts != cache.facts:
            raise UserError(
                f"--teacher-cache: what {cache.teacher} says in the arm {name} is no use to {first}: "
                f"{what_differs(known.facts, cache.facts)}",
                "give both the same images, views and batch, or compare them without a cache",
            )
        merged = replace(
            cache,
            signals={**known.signals, **cache.signals},
            updates=max(known.updates, cache.updates),
            done=min(known.done, cache.done),
        )
        found[teacher] = first, merged
    return [cache for _, cache in found.values()]


def check_disk(caches: Sequence[Cache]) -> None:
    """Refuse to begin what the disk cannot hold."""
    missing = sum(cache.needed - cache.stored for cache in caches)
    if not missing or missing <= (free := free_bytes(caches[0].place)):
        return
    epoch = sum(cache.per_epoch * cache.bytes for cache in caches)
    fits = (free + sum(cache.stored for cache in caches)) // epoch
    less = "--cache-dtype fp16 takes less, " if "exact" in caches[0].facts.values() else ""
    raise UserError(
        f"--teacher-cache {caches[0].place} takes {in_bytes(missing)} more, and {in_bytes(free)} are free",
        f"{less}--cached-epochs {fits} fits, or name a folder on another disk"
        if fits
        else f"{less}a formula that reads fewer blocks too; or name a folder on another disk",
        exit_code=3,
    )
