"""The recipe of a run before it starts: what may change on resume, and where its files are."""

import os
import shlex
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitkd_cli.data.decoded import OFF, RAM
from vitkd_cli.errors import UserError, expanded
from vitkd_cli.files import write_text
from vitkd_cli.options import declared
from vitkd_cli.processes import launch
from vitkd_cli.recipe import READS, SAMPLE, WDS, Recipe, settings
from vitkd_cli.requests import DistillRequest
from vitkd_cli.terms import plugin_files
from vitkd_cli.text import folder_in
from vitkd_cli.training import checkpoint
from vitkd_cli.training.folder import EXTENSIONS, anew, is_run, student_folders, without_optimizer

DATA = ("data", "val_data", "data_dir")  # may be others on resume, where the same images lie
# What may change on resume, beside what EXTENSIONS may be given more of.
MACHINE = (
    *("plugin", "verify", "workers", "cache_images", "device", "num_processes", "log_with", "report"),
    *("skip_corrupt", "remote_cache", "max_pixels", "keep_checkpoints", "dist_timeout", "lock_timeout"),
    *("teacher_cache", "shard", "shard_teacher", *DATA),
)
# What a run settles for itself where nobody has.
_SETTLED = ("batch_size", "lr", "input_backend", "output", *DATA)


def begun(asked: DistillRequest) -> Path | None:
    """The folder of the run to go on with; None for a new run."""
    resume, output = asked.resume, asked.recipe.output if asked.recipe else None
    if resume == "auto":
        if output is None:
            raise UserError("--resume auto looks at --output, and none is named", "--output FOLDER")
        resume = output if is_run(Path(output)) else None
    if resume is None:
        return None
    folder = Path(resume)
    if not (folder / "recipe.toml").is_file():
        raise UserError(
            f"{folder} is no run folder: it has no recipe.toml",
            "name the folder of a run, on a disk that all of its machines share",
        )
    return folder


def otherwise(asked: Recipe, stored: Recipe, typed: Collection[str]) -> dict[str, Any]:
    """What a recipe has otherwise than the run that it would go on with.

    Args:
        typed: fields that a person gave now; a run that was extended since keeps what it has more of others.
    """
    asked = anchored(with_data(asked))
    values = {field.name: getattr(asked, field.name) for field in settings()}
    same = {key for key in _SETTLED if values[key] in (None, "auto")}
    same |= {key for key in EXTENSIONS if key not in typed and not _more(values[key], getattr(stored, key))}
    if asked.epochs != stored.epochs and "warmup_epochs" not in typed:
        same.add("warmup_epochs")  # it may have been cut to a quarter of the epochs
    # On another number of processes the run made other batches of the images of an update.
    sharing = ("batch_size", "grad_accum_steps", "num_processes")
    shared_alike = all(values[key] == getattr(stored, key) for key in sharing[1:])
    fits = stored.global_batch % asked.device_batch == 0 and not shared_alike
    whole = asked.shared_among(asked.num_processes).global_batch == stored.global_batch
    if asked.batch_size is None or fits or whole:
        same.update(sharing)
    return {key: value for key, value in values.items() if key not in same and value != getattr(stored, key)}


def _more(now: Any, before: Any) -> bool:
    """Is a value of ``EXTENSIONS`` more than the run has?"""
    if now is None or before is None:
        return now is not None
    return not set(now) <= set(before) if isinstance(now, tuple) else bool(now > before)


def resumed(stored: Recipe, changes: Mapping[str, Any], folder: Path) -> Recipe:
    """A run's recipe with what may be other, or more, on resume; refuses other changes."""
    if arms := changes.get("against"):  # beside those that it has
        more = anchored(stored.but(against=arms)).against
        changes = {**changes, "against": tuple(dict.fromkeys((*stored.against, *more)))}
    wanted = anchored(stored.but(**changes))
    changed = sorted(key for key in changes if getattr(wanted, key) != getattr(stored, key))
    changed = [key for key in changed if key not in MACHINE]
    if "output" in changed and Path(wanted.output or "").resolve() == folder.resolve():
        changed.remove("output")
    # The command of a new run names its own folder and weights.
    flags = shlex.join(
        _typed(wanted, [key for key in changed if key not in ("output", "initial_checkpoint")])
    )
    weights = folder / "student" / "model.safetensors"
    if not weights.is_file():
        weights = next(iter(sorted(folder.glob("checkpoints/*/learner.safetensors"), reverse=True)), weights)
    for key in changed:
        if key not in EXTENSIONS:
            raise UserError(
                f"--resume takes its recipe from the run; --{key.replace('_', '-')} cannot change it",
                anew(folder, weights, flags),
            )
        before, now = getattr(stored, key), getattr(wanted, key)
        if before is None or now < before:
            has = "one already" if before is True else f"{before or 'no such end'} already"
            raise UserError(
                f"{' '.join(_typed(wanted, [key]))}: the run has {has}",
                f"--resume extends a run; {anew(folder, weights, flags)}",
            )
    if {"epochs", "steps"} & set(changed):
        for place in student_folders(folder):
            if not checkpoint.can_go_on(place / "checkpoints"):
                raise without_optimizer(place, anew(folder, weights, flags))
    return wanted.but(output=str(folder))


def _typed(recipe: Recipe, keys: Sequence[str]) -> list[str]:
    """The command-line arguments that set these fields; none for one that is unset."""
    known = {field.name: field for field in settings()}
    values = {key: value for key in keys if (value := getattr(recipe, key)) is not None}
    return [word for key, value in values.items() for word in known[key].typed(value)]


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that it can be resumed from anywhere."""

    def resolved(key: str, value: str) -> str:
        if key in READS and value.startswith(WDS) and recipe.data_dir is None:
            parts = value.removeprefix(WDS).split("::")
            return WDS + "::".join(p if "://" in p else str(expanded(p).absolute()) for p in parts)
        if key in READS and value != SAMPLE and os.path.exists(os.path.expanduser(value)):
            return str(Path(os.path.expanduser(value)).resolve())
        if key in ("teacher", "student"):
            source, place = folder_in(value)
            path = Path(os.path.expanduser(place or "-"))
            if any(os.path.isfile(path / inside) for inside in ("config.json", "student/config.json")):
                return f"{source}{path.resolve()}"
        return value

    anchored = recipe.with_places(resolved)
    if recipe.answers_folder is not None:
        anchored = anchored.but(teacher_cache=str(expanded(recipe.answers_folder).resolve()))
    if recipe.cache_images not in (OFF, RAM):
        anchored = anchored.but(cache_images=str(expanded(recipe.cache_images).resolve()))
    if recipe.plugin is not None:
        anchored = anchored.but(plugin=",".join(map(str, plugin_files(recipe.plugin))))
    return anchored


def launched(recipe: Recipe, asked: DistillRequest, resume: bool, quiet: bool) -> None:
    """Make the same request in several processes, and wait for them."""
    switches = ("dry_run", "overwrite", "accept_changed_data")
    arguments = [declared(DistillRequest)[key].flag for key in switches if getattr(asked, key)]
    arguments += ["--trust-plugin", *(["--quiet"] if quiet else [])]
    with tempfile.TemporaryDirectory(prefix="vitkd-") as folder:
        if resume:
            arguments += ["--resume", str(recipe.output), *_typed(recipe, (*MACHINE, *EXTENSIONS))]
        else:
            path = Path(folder) / "recipe.toml"
            write_text(path, recipe.to_toml())
            arguments += ["--recipe", str(path)]
        launch(recipe.num_processes, ["distill", *arguments], recipe.device, run=recipe.output)


def with_data(recipe: Recipe) -> Recipe:
    """The recipe with its data settled; ``--data-dir`` alone means ``--data``."""
    if recipe.data is None and recipe.data_dir is not None:
        return recipe.but(data=recipe.data_dir, data_dir=None)
    if recipe.data is None:
        return recipe.but(data=os.environ.get("VITKD_DATA") or SAMPLE)
    return recipe
