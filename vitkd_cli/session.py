"""Accelerate as a run uses it."""

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from vitkd_cli.device import check_gpus, device_named, loader_workers, own_cores
from vitkd_cli.errors import UserError
from vitkd_cli.files import CannotWrite, remove, saving
from vitkd_cli.meeting import agreed, meet, refused_together
from vitkd_cli.processes import be_found, is_launched
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe
from vitkd_cli.text import listed
from vitkd_cli.world import check_world, world_size

_SHARED = (("student", "shard", "--no-shard"), ("teacher", "shard-teacher", "--no-shard-teacher"))
_TRUE = ("1", "true", "yes", "on", "y", "t")  # as Accelerate reads a switch


class Session:
    """The processes of a run, and who speaks for them.

    Args:
        finds: what all of them must find alike (:func:`vitkd_cli.meeting.meet`).
    """

    def __init__(self, recipe: Recipe, reporter: Reporter | None, finds: str = "") -> None:
        with refused_together():
            recipe, precision = _checked(recipe)
            trackers = _trackers(recipe.log_with)
        meet(finds, recipe.dist_timeout)
        cpu = device_named(recipe.device).type == "cpu"
        if not is_launched():  # a second run of one Python process may want another device or precision
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        be_found()
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.grad_accum_steps,
            step_scheduler_with_optimizer=False,
            log_with=trackers,
            project_dir=recipe.output,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # One of them waits for the run folder, and the others for it.
                InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.dist_timeout + recipe.lock_timeout)),
            ],
        )
        self.recipe = recipe
        self.device = self.accelerator.device
        self.dtype = getattr(torch, recipe.model_dtype)
        self.speeds: dict[Any, tuple[float, int]] = {}  # of architectures: images per second, and the batch
        self.reporter = reporter or Reporter(silent=not self.accelerator.is_main_process)
        # Launchers bind processes to cores, or leave all of them to all.
        self._on_its_cores = gather_object([own_cores()]).count(own_cores())

    @property
    def workers(self) -> int:
        """Loader processes of this process."""
        return loader_workers(self.recipe.workers, self._on_its_cores, self.device)

    def check_same(self, settings: dict[str, Any]) -> None:
        """Refuse to train as one what was started with different settings: jobs side by side, say."""
        first, *others = gather_object([settings])
        for rank, theirs in enumerate(others, 1):
            differing = [
                f"{key} {first[key]} and {theirs[key]}" for key in first if first[key] != theirs[key]
            ]
            if differing:
                refusal = UserError(
                    f"processes 0 and {rank} of one job have different settings: {listed(differing)}",
                    "start runs of their own one by one, such as srun -n 1 vitkd … for each",
                )
                refusal.told_by_another = not self.accelerator.is_main_process
                raise refusal

    def keep_global_batch(self, wanted: int, recipe: Recipe) -> Recipe:
        """A resumed run's recipe for this number of processes, with as many images an update as before."""
        if wanted % recipe.num_processes:
            raise UserError(
                f"an update has {wanted} images, which {recipe.num_processes} processes cannot share",
                f"resume with a number of processes that divides {wanted}",
            )
        shared = replace(recipe, global_batch_size=wanted).shared_among(recipe.num_processes)
        self.accelerator.gradient_accumulation_steps = shared.grad_accum_steps
        return recipe.but(batch_size=shared.batch_size, grad_accum_steps=shared.grad_accum_steps)

    def start_trackers(self) -> None:
        """Open what ``--log-with`` names; some of them write into the run folder."""
        if self.recipe.log_with:
            flat = {k: v for k, v in asdict(self.recipe).items() if isinstance(v, (int, float, str))}
            self.accelerator.init_trackers("vitkd", flat)

    def main_process_first(self, act: Callable[[], None]) -> None:
        """The main process acts while the others wait; if it is refused, all are."""
        refusal: list[UserError | None] = [None]
        if self.accelerator.is_main_process:
            try:
                act()
            except UserError as problem:
                refusal = [problem]
        if refused := broadcast_object_list(refusal)[0]:
            refused.told_by_another = not self.accelerator.is_main_process
            raise refused

    def all_together(self, act: Callable[[], None]) -> None:
        """All processes act, without a word to each other; what one is refused, all are, and one says it."""
        agreed(self.accelerator, act)

    def check_shared(self, folder: Path, *, read_only: bool = False) -> None:
        """Refuse a folder that not all processes see: the first one leaves a token there, and all look.

        Args:
            read_only: it need not take a token; what lies there is looked for in its place.
        """
        if self.accelerator.num_processes == 1:
            return
        places = [folder.absolute(), *folder.absolute().parents]
        token: list[Any] = [None]

        def leave() -> None:
            levels = next(level for level, place in enumerate(places) if place.is_dir())
            try:
                with saving(folder):
                    descriptor, name = tempfile.mkstemp(prefix=".vitkd-", dir=places[levels])
                os.close(descriptor)
            except CannotWrite:
                there = sorted(folder.iterdir()) if read_only and levels == 0 else []
                if not there:
                    raise
                token[0] = levels, there[0].name, False
            else:
                token[0] = levels, Path(name).name, True

        self.main_process_first(leave)
        [(levels, name, left)] = broadcast_object_list(token)

        def look() -> None:
            if not (places[levels] / name).exists():
                raise UserError(
                    f"{folder} is another folder on {platform.node()} than to the first process",
                    "name one on a disk that all machines share",
                )

        try:
            self.all_together(look)
        finally:
            if left and self.accelerator.is_main_process:
                remove(places[levels] / name)

    def end(self) -> None:
        # Leaving while another process still talks aborts it.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def _checked(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe as these processes share it, and the precision that it comes to on this machine.

    Refuses what this machine cannot do, or would do otherwise.
    """
    check_world(recipe.num_processes)
    recipe = recipe.shared_among(world_size())
    place = device_named(recipe.device)
    cpu = place.type == "cpu"
    precision: str = recipe.mixed_precision
    if precision == "auto":
        capable = place.type == "cuda" and torch.cuda.is_bf16_supported() and recipe.model_dtype == "float32"
        precision = "bf16" if capable else "no"
    if precision != "no" and recipe.model_dtype == "float64":
        raise UserError("--mixed-precision and --model-dtype float64 exclude each other", "leave one out")
    if recipe.terms_dtype == "bf16" and precision != "bf16":
        raise UserError(
            f"--terms-dtype bf16, and the models compute in {'float32' if precision == 'no' else precision}",
            "--mixed-precision bf16, or leave it out",
        )
    if precision == "fp16" and cpu:
        raise UserError("--mixed-precision fp16 needs a GPU", "--mixed-precision bf16 or no")
    if recipe.sync_bn and cpu:
        raise UserError("--sync-bn needs GPUs", "leave it out: each process has statistics of its own")
    for whose, flag, leave in _SHARED:
        if getattr(recipe, flag.replace("-", "_")) and recipe.num_processes == 1:
            raise UserError(
                f"--{flag} shares the {whose}'s weights among processes, and there is one",
                f"--num-processes N, or {leave}",
            )
    check_gpus(place, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    _check_environment(recipe.but(mixed_precision=precision), cpu)
    return recipe, precision


def _check_environment(recipe: Recipe, cpu: bool) -> None:
    """Refuse what an ``accelerate`` configuration wants otherwise than the recipe.

    Accelerate would obey some of it in silence, and pass over the rest.

    Args:
        recipe: with the precision that it comes to.
    """

    def refuse(name: str, cure: str) -> None:
        raise UserError(
            f"{name}={os.environ[name]} is not what the recipe says, and the recipe decides",
            f"unset {name}, or take it out of accelerate's configuration{cure}",
        )

    told = {name: value.lower() for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    steps = str(recipe.grad_accum_steps)
    if (wanted := told.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)) != steps:
        refuse("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", f"; --grad-accum-steps {wanted} asks for it")
    if (wanted := told.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", recipe.mixed_precision):
        refuse("ACCELERATE_MIXED_PRECISION", f"; --mixed-precision {wanted} asks for it")
    if told.get("ACCELERATE_DYNAMO_BACKEND", "no") != "no":
        refuse("ACCELERATE_DYNAMO_BACKEND", "; --torchcompile compiles")
    if not cpu and told.get("ACCELERATE_USE_CPU") in _TRUE:
        refuse("ACCELERATE_USE_CPU", "; --device cpu asks for it")
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if told.get(name := f"ACCELERATE_USE_{engine}") in _TRUE:
            refuse(name, ": vitkd does not train with it")


def _trackers(names: str | None) -> list[str] | None:
    """The trackers that ``--log-with`` names; Accelerate leaves a missing one out in silence."""
    if not names:
        return None
    wanted = [name.strip() for name in names.split(",")]
    known = sorted({str(tracker) for tracker in LOGGER_TYPE_TO_CLASS})
    for name in wanted:
        if name not in known:
            raise UserError(f"--log-with: there is no tracker {name!r}", f"one of {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"--log-with {name}: its package is not installed", f"pip install {name}")
    return wanted
