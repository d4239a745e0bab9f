"""From a recipe to a trained student: the order of things."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from vitkd_cli.data import (
    Deal,
    ImageData,
    Images,
    Keyed,
    Mixing,
    mixing,
    open_data,
    train_view,
    updates_per_epoch,
    val_loader,
    val_view,
)
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Metrics, measure
from vitkd_cli.evaluation.accuracy import preprocessing_of
from vitkd_cli.export.timm_folder import save_student
from vitkd_cli.objective import Formula, Objective, Summand, parse
from vitkd_cli.recipe import SAMPLE, Recipe
from vitkd_cli.training.launch import is_launched, launch
from vitkd_cli.training.learner import Learner, Teacher
from vitkd_cli.training.progress import Reporter
from vitkd_cli.training.rehearsal import Rehearsal, rehearse
from vitkd_cli.training.trainer import Job, optimizer_of, train
from vitkd_cli.vit.build import Built, build, parse_kwargs
from vitkd_cli.vit.names import Resolved, better_tags, published_top1, resolve, teacher_tag_for
from vitkd_cli.vit.spec import as_seen_by, with_statistics

FROM_SCRATCH_WANTS = 100_000  # images; below, a 300-epoch run from scratch is the wrong recipe
MACHINE = ("workers", "device", "num_processes", "log_with")  # may change on resume


@dataclass(frozen=True)
class Result:
    """One trained model.

    Attributes:
        arm: ``distilled``, ``alone`` or ``teacher``.
        folder: its run folder; its student lies in ``folder/student``.
        top1, top5: percent on the validation split; None where there is none.
        agreement: percent of validation images on which it names the teacher's class.
        images_per_second: of the model alone, on the run's device.
        history: one entry a validation.
    """

    arm: str
    seed: int
    folder: str
    model: str
    parameters: int
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    agreement: float | None = None
    images_per_second: float | None = None
    skipped_images: int = 0
    history: tuple[dict[str, Any], ...] = ()

    @property
    def student(self) -> Path:
        return Path(self.folder) / "student"


@dataclass(frozen=True)
class Run:
    """What a run leaves.

    Attributes:
        folder: the run folder.
        results: one a trained student, in the order of training.
        teacher: the teacher's own figures; None without a teacher, or if its classes are not the data's.
    """

    folder: Path
    recipe: Recipe
    results: tuple[Result, ...]
    teacher: Result | None

    @property
    def student(self) -> Path:
        """The student's folder: ``timm.create_model(f"local-dir:{run.student}", pretrained=True)``."""
        return self.folder / "student"


@dataclass(frozen=True)
class Plan:
    """A rehearsed run: what ``--dry-run`` prints and the start-up says."""

    recipe: Recipe
    data: ImageData
    student: Built
    teacher: Built | None
    learner: Learner
    tapped: Teacher | None
    view: Callable[[Any], Tensor]
    rehearsal: Rehearsal
    updates_per_epoch: int
    updates: int
    seconds_per_update: float | None = None
    checkpoint_bytes: int = 0


def distill(
    recipe: Recipe | None = None,
    *,
    resume: str | Path | None = None,
    machine: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
    show_plan: Callable[[Plan], None] = lambda plan: None,
) -> Run | None:
    """Train the recipe's student, with the recipe's teacher if its objective reads one.

    Args:
        recipe: what to run.
        resume: a run folder to go on with instead, with its own recipe.
        machine: fields of the recipe that may change on resume, such as ``workers``.
        overwrite: replace what the output folder holds.
        dry_run: resolve and rehearse everything, show the plan and stop.
        show_plan: is handed the rehearsed plan before training begins.

    Returns:
        What the run left; None for a dry run.

    Raises:
        UserError: anything that the user can mend.
    """
    if resume is not None:
        folder = Path(resume)
        if not (folder / "recipe.toml").is_file():
            raise UserError(f"{folder} is no run folder: it has no recipe.toml", "name the folder of a run")
        stored = Recipe.from_toml(folder / "recipe.toml")
        recipe = stored.but(**(machine or {}), output=str(folder))
        if finished := _finished(folder, recipe):
            (reporter or Reporter()).say(
                f"{folder} is finished; nothing to do. Its student: {finished.student}"
            )
            return finished
    if recipe is None:
        raise UserError("there is no recipe to run", "give a Recipe, or a run folder to resume")
    recipe = with_data(recipe)
    if recipe.student is None:
        raise UserError("no student is named", "--student NAME, such as --student deit_tiny")
    formula = formula_of(recipe)
    if formula.uses_teacher and recipe.teacher is None:
        raise UserError(
            f"the loss reads a teacher ({formula}), and none is named",
            "--teacher NAME, or --loss labels to train without one",
        )
    folder = Path(recipe.output or _new_folder(recipe))
    recipe = recipe.but(output=str(folder))
    if recipe.num_processes > 1 and not is_launched():
        _launched(recipe, resume is not None, overwrite, dry_run, quiet=bool(reporter and reporter.silent))
        return _finished(folder, recipe)
    session = _Session(recipe, reporter)
    recipe = session.recipe
    if resume is None and not dry_run:
        _check_folder(folder, overwrite)
        session.accelerator.wait_for_everyone()  # nobody makes the folder while another looks
    return _run(recipe, formula, folder, session, resume is not None, dry_run, show_plan)


def _launched(recipe: Recipe, resume: bool, overwrite: bool, dry_run: bool, quiet: bool) -> None:
    """The same request in several processes."""
    switches = {"--overwrite": overwrite, "--dry-run": dry_run, "--quiet": quiet}
    arguments = [switch for switch, wanted in switches.items() if wanted]
    with tempfile.TemporaryDirectory(prefix="vitkd-") as folder:
        if resume:
            arguments += ["--resume", str(recipe.output)]
            for key in MACHINE:
                if (value := getattr(recipe, key)) is not None:
                    arguments += [f"--{key.replace('_', '-')}", str(value)]
        else:
            path = Path(folder) / "recipe.toml"
            path.write_text(recipe.to_toml())
            arguments += ["--recipe", str(path)]
        launch(recipe.num_processes, ["distill", *arguments])


def with_data(recipe: Recipe) -> Recipe:
    """The recipe with its data settled; ``--data-dir`` alone means ``--data``."""
    if recipe.data is None and recipe.data_dir is not None:
        return recipe.but(data=recipe.data_dir, data_dir=None)
    if recipe.data is None:
        return recipe.but(data=os.environ.get("VITKD_DATA") or SAMPLE)
    return recipe


def formula_of(recipe: Recipe) -> Formula:
    """The recipe's objective; ``--smoothing`` is the default of the terms that smooth."""

    def smoothed(summand: Summand) -> Summand:
        if "smoothing" in summand.written:
            return summand
        options = ((k, recipe.smoothing if k == "smoothing" else v) for k, v in summand.options)
        return replace(summand, options=tuple(options))

    formula = parse(recipe.loss)
    return replace(formula, summands=tuple(map(smoothed, formula.summands)))


def _run(
    recipe: Recipe,
    formula: Formula,
    folder: Path,
    session: _Session,
    resume: bool,
    dry_run: bool,
    show_plan: Callable[[Plan], None],
) -> Run | None:
    say, warn = session.reporter.say, session.reporter.warn
    data = _data(recipe, folder if resume else None)
    for note in data.notes:
        warn(note)
    _small_data(recipe, data, warn)
    arms = [("distilled" if formula.uses_teacher else "student", formula)]
    if recipe.baseline and formula.uses_teacher:
        arms.append(("alone", _without_teacher(formula)))
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    single = len(arms) == 1 and recipe.seeds == 1

    student_name = resolve(recipe.student or "", role="student")
    say(f"student  {_origin(student_name, recipe.pretrained, recipe.initial_checkpoint)}")
    teacher_name = None
    if formula.uses_teacher:
        teacher_name = resolve(recipe.teacher or "", role="teacher")
        if formula.reads_teacher_logits and not recipe.finetune_teacher:
            teacher_name = teacher_tag_for(teacher_name, data.num_classes)
        say(f"teacher  {_origin(teacher_name, recipe.teacher_pretrained, recipe.teacher_checkpoint)}")
        own = recipe.teacher_pretrained and recipe.teacher_checkpoint is None
        if own and (better := better_tags(teacher_name)):
            top1 = published_top1(teacher_name.name)
            others = ", ".join(f".{tag} ({value:.2f})" for tag, value in better[:3])
            say(f"         published top-1 {top1:.2f}; better tags of it: {others}")
    say(f"data     {data.description}")

    student = _student(recipe, student_name, data, seed=recipe.seed)
    teacher = _teacher(recipe, formula, teacher_name, student, data) if teacher_name else None
    plan = _rehearsed(recipe, formula, data, student, teacher, session, timed=dry_run)
    show_plan(plan)
    for note in (*student.notes, *(teacher.notes if teacher else ()), *plan.learner.objective.warnings):
        warn(note)
    if plan.rehearsal.frozen:
        warn(f"no term reaches {', '.join(plan.rehearsal.frozen[:4])}: frozen")
    if teacher and sum(p.numel() for p in teacher.model.parameters()) < sum(
        p.numel() for p in student.model.parameters()
    ):
        warn(f"the teacher ({teacher.spec.name}) is smaller than the student ({student.spec.name})")
    if dry_run:
        session.end()
        return None
    # Only now: a request that was refused leaves nothing behind that a second try would stumble over.
    session.alone_first(lambda: _open_folder(folder, recipe, data, resume))

    if recipe.finetune_teacher and teacher_name and teacher:
        del teacher, plan
        tuned = _finetuned(recipe, data, folder / "teacher", session, resume)
        recipe_with_it = recipe.but(
            teacher=str(tuned.student),
            teacher_kwargs=None,
            teacher_checkpoint=None,
            teacher_pretrained=True,
            finetune_teacher=0,
        )
        teacher = _teacher(recipe_with_it, formula, resolve(str(tuned.student)), student, data)
    teacher_result, teacher_metrics = _score_teacher(recipe, teacher, data, session)

    results = []
    for seed in seeds:
        for arm, arm_formula in arms:
            place = folder if single else folder / f"{arm}-{seed}"
            results.append(
                _one(
                    recipe.but(seed=seed),
                    arm,
                    arm_formula,
                    student_name,
                    teacher if arm_formula.uses_teacher else None,
                    teacher_metrics,
                    data,
                    place,
                    session,
                    resume,
                )
            )
    run = Run(folder, recipe, tuple(results), teacher_result)
    if not single:
        session.alone_first(lambda: _copy_student(results[0].student, run.student))
    session.alone_first(lambda: _write_run(run))
    session.end()
    return run


def _origin(name: Resolved, pretrained: bool, checkpoint: str | None) -> str:
    """What was typed → what it is, and where its weights come from."""
    if pretrained and checkpoint is None:
        return name.line()
    chosen = name.architecture or name.name
    arrow = "" if name.typed == chosen else f"{name.typed} → "
    return f"{arrow}{chosen} ({f'weights of {checkpoint}' if checkpoint else 'from scratch'})"


def _one(
    recipe: Recipe,
    arm: str,
    formula: Formula,
    name: Resolved,
    teacher: Built | None,
    teacher_metrics: Metrics | None,
    data: ImageData,
    folder: Path,
    session: _Session,
    resume: bool,
    images: Images | None = None,
) -> Result:
    """Train one student in its own folder, save it and score it."""
    if resume and (folder / "result.json").is_file():
        done = _read_result(json.loads((folder / "result.json").read_text()))
        session.reporter.say(f"{arm} (seed {done.seed}) is finished already")
        return done
    session.alone_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    images = images or data.train
    if images is None:
        raise UserError(f"{data.name} has no training images", "name the split with --train-split")
    student = _student(recipe, name, data, seed=recipe.seed)
    plan = _rehearsed(recipe, formula, replace(data, train=images), student, teacher, session)
    learner, tapped = plan.learner, plan.tapped
    if recipe.torchcompile:
        learner.student.compile()
        if tapped:
            tapped.tapped.compile()
    if recipe.grad_checkpointing:
        _checkpoint_gradients(student.model)
    validate = _validation(recipe, student, data, session)
    job = Job(
        folder=folder,
        run=Path(recipe.output or folder),
        title=arm if recipe.seeds == 1 else f"{arm} (seed {recipe.seed})",
        seed=recipe.seed,
        images=Keyed(images, plan.view, recipe.seed, skip_corrupt=recipe.skip_corrupt),
        updates_per_epoch=plan.updates_per_epoch,
        updates=plan.updates,
        mixing=_mixing(recipe, data),
        validate=validate,
    )
    chosen, progress = train(
        recipe, job, learner, tapped, session.accelerator, session.reporter, resume=resume
    )
    metrics = validate(chosen, session.reporter) if validate else None
    speed = _images_per_second(chosen, student, session)
    agreement = None
    if metrics and teacher_metrics and len(metrics.predictions) == len(teacher_metrics.predictions):
        agreement = metrics.agreement(teacher_metrics)
    result = Result(
        arm=arm,
        seed=recipe.seed,
        folder=str(folder),
        model=student.spec.name,
        parameters=sum(p.numel() for p in chosen.parameters()),
        top1=metrics.top1 if metrics else None,
        top5=metrics.top5 if metrics else None,
        loss=metrics.loss if metrics else None,
        agreement=agreement,
        images_per_second=speed,
        skipped_images=len(progress.skipped),
        history=tuple(progress.history),
    )

    def save() -> None:
        if progress.skipped:
            (folder / "skipped.txt").write_text("\n".join(sorted(set(progress.skipped))) + "\n")
        save_student(
            chosen,
            folder / "student",
            class_names=data.class_names,
            preprocessing=_preprocessing(recipe, student),
            recipe=recipe,
            formula=str(formula),
            teacher=teacher.spec.name if teacher else None,
            teacher_licence=teacher.licence if teacher else None,
            metrics={"top1": result.top1, "top5": result.top5, "loss": result.loss},
            weights="average"
            if recipe.select == "ema" or (recipe.select == "best" and recipe.model_ema)
            else "raw",
            selected=recipe.select,
        )
        _write_json(folder / "result.json", asdict(result))

    session.alone_first(save)
    return result


# What the run is made of ------------------------------------------------------------------------------


class _Session:
    """The processes of a run, and who speaks for them."""

    def __init__(self, recipe: Recipe, reporter: Reporter | None) -> None:
        if recipe.device not in (None, "cpu", "cuda"):
            raise UserError(f"there is no device {recipe.device!r}", "--device cpu or --device cuda")
        if recipe.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no GPU that torch can use", "--device cpu")
        cpu = recipe.device == "cpu" or not torch.cuda.is_available()
        precision: str = recipe.mixed_precision
        if precision == "auto":
            precision = "bf16" if not cpu and torch.cuda.is_bf16_supported() else "no"
        if precision != "no" and recipe.model_dtype == "float64":
            raise UserError("--mixed-precision and --model-dtype float64 exclude each other")
        if precision == "fp16" and cpu:
            raise UserError("--mixed-precision fp16 needs a GPU", "--mixed-precision bf16 or no")
        if not is_launched():  # a second run of one Python process may want another device or precision
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.grad_accum_steps,
            step_scheduler_with_optimizer=False,
            log_with=recipe.log_with.split(",") if recipe.log_with else None,
            project_dir=recipe.output,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        world = self.accelerator.num_processes
        if recipe.num_processes not in (1, world):
            raise UserError(
                f"--num-processes {recipe.num_processes} was asked for, and {world} started",
                "start with vitkd itself, or give torchrun the same number",
            )
        self.recipe = recipe.but(num_processes=world)
        self.device = self.accelerator.device
        self.dtype = getattr(torch, recipe.model_dtype)
        self.reporter = reporter or Reporter(silent=not self.accelerator.is_main_process)
        if recipe.log_with:
            flat = {k: v for k, v in asdict(recipe).items() if isinstance(v, (int, float, str))}
            self.accelerator.init_trackers("vitkd", flat)

    def alone_first(self, act: Callable[[], None]) -> None:
        """Rank 0 acts, the others wait."""
        if self.accelerator.is_main_process:
            act()
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        # Leaving while another process still talks aborts it.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def _data(recipe: Recipe, resumed: Path | None) -> ImageData:
    listed = resumed / "split.json" if resumed else None
    return open_data(
        recipe.data or SAMPLE,
        data_dir=recipe.data_dir,
        train_split=recipe.train_split,
        val_split=recipe.val_split,
        val_fraction=recipe.val_fraction,
        class_map=recipe.class_map,
        num_classes=recipe.num_classes,
        shots=recipe.shots,
        seed=recipe.seed,
        dataset_download=recipe.dataset_download,
        input_key=recipe.input_key,
        target_key=recipe.target_key,
        split_files=json.loads(listed.read_text()) if listed and listed.is_file() else None,
    )


def _small_data(recipe: Recipe, data: ImageData, warn: Callable[[str], None]) -> None:
    count = len(data.train) if data.train is not None else 0
    from_scratch = not (recipe.pretrained or recipe.initial_checkpoint)
    if from_scratch and recipe.epochs >= 300 and 0 < count < FROM_SCRATCH_WANTS:
        warn(
            f"{count:,} images are few for {recipe.epochs} epochs from scratch; "
            "--recipe finetune is meant for such data"
        )


def _student(recipe: Recipe, name: Resolved, data: ImageData, seed: int) -> Built:
    def built(drop_path: float) -> Built:
        torch.manual_seed(seed)  # every arm of a comparison starts from the same weights
        return build(
            name,
            pretrained=recipe.pretrained,
            checkpoint=recipe.initial_checkpoint,
            num_classes=data.num_classes,
            img_size=recipe.img_size,
            in_chans=recipe.in_chans,
            drop_path=drop_path,
            kwargs=recipe.model_kwargs,
            file_flag="--initial-checkpoint",
        )

    student = built(recipe.drop_path or 0.0)
    if recipe.drop_path is None and sum(p.numel() for p in student.model.parameters()) >= 80e6:
        student = built(0.1)
    return replace(student, spec=with_statistics(student.spec, recipe.mean, recipe.std))


def _teacher(recipe: Recipe, formula: Formula, name: Resolved, student: Built, data: ImageData) -> Built:
    """The teacher at the size at which it is used.

    Its own size where its logits are read; for features alone the size at which its grid is the
    student's, so that no feature is resampled.
    """

    random = not (recipe.teacher_pretrained or recipe.teacher_checkpoint)
    # Weights keep their own classes, unless they are tuned to the data's first.
    renew = recipe.finetune_teacher or (random and "num_classes" not in parse_kwargs(recipe.teacher_kwargs))

    def built(img_size: int | tuple[int, int] | None) -> Built:
        torch.manual_seed(recipe.seed)
        return build(
            name,
            pretrained=recipe.teacher_pretrained,
            checkpoint=recipe.teacher_checkpoint,
            num_classes=data.num_classes if renew else None,
            img_size=img_size,
            in_chans=recipe.in_chans,
            kwargs=recipe.teacher_kwargs,
            file_flag="--teacher-checkpoint",
        )

    teacher = built(recipe.teacher_img_size)
    if random and not recipe.finetune_teacher:
        teacher = replace(teacher, notes=(*teacher.notes, "the teacher's weights are random, as asked"))
    wanted = student.spec.final_grid
    if (
        recipe.teacher_img_size is None
        and not formula.reads_teacher_logits
        and teacher.spec.final_grid != wanted
    ):
        sides = zip(teacher.spec.input_size, teacher.spec.final_grid, wanted, strict=True)
        rows, columns = (size // grid * target for size, grid, target in sides)
        teacher = built((rows, columns))
    if len(teacher.spec.mean) != len(student.spec.mean):
        raise UserError(
            f"the teacher takes {len(teacher.spec.mean)} image channels, the student "
            f"{len(student.spec.mean)}",
            "--in-chans sets both",
        )
    return teacher


def _without_teacher(formula: Formula) -> Formula:
    """The baseline's objective: the label terms at full weight."""
    from vitkd_cli.terms import registered_terms

    own = [s for s in formula.summands if not registered_terms()[s.name].uses_teacher]
    if not own:
        raise UserError(
            f"--baseline: nothing of {formula} is left without a teacher", 'add labels, such as "labels + …"'
        )
    return Formula(tuple(replace(s, weight=1.0) for s in own))


def _rehearsed(
    recipe: Recipe,
    formula: Formula,
    data: ImageData,
    student: Built,
    teacher: Built | None,
    session: _Session,
    timed: bool = False,
) -> Plan:
    torch.manual_seed(recipe.seed)
    objective = Objective(formula, student.spec, teacher.spec if teacher else None)
    learner = Learner(student.model, objective, student.spec).to(session.device, session.dtype)
    tapped = None
    if teacher:
        tapped = Teacher(teacher, objective.teacher_taps, stop_early=not recipe.torchcompile)
        tapped.to(session.device, session.dtype)
    size = _crop(student, teacher)
    images = 2 if not timed else min(recipe.batch_size, 8)
    rehearsal = rehearse(
        learner, tapped, size=size, device=session.device, dtype=session.dtype, images=images
    )
    seconds = None
    if timed:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            rehearse(learner, tapped, size=size, device=session.device, dtype=session.dtype, images=images)
            times.append(time.perf_counter() - start)
        seconds = min(times) / images * recipe.device_batch
    count = len(data.train) if data.train is not None else 0
    per_epoch = updates_per_epoch(count, recipe.global_batch)
    # Too few images for one batch, or an odd batch that cannot be mixed, is refused before the training.
    Deal(
        count,
        recipe.batch_size,
        accum=recipe.grad_accum_steps,
        world=recipe.num_processes,
        seed=0,
        epoch=0,
        mirrored=_mixing(recipe, data) is not None,
    )
    # The names and options of optimizer, scheduler and validation view are checked here, too.
    optimizer_of(recipe, learner, per_epoch)
    _validation(recipe, student, data, session)
    updates = per_epoch * (recipe.epochs + recipe.cooldown_epochs)
    weights = sum(p.numel() * p.element_size() for p in learner.parameters())
    return Plan(
        recipe,
        data,
        student,
        teacher,
        learner,
        tapped,
        _train_view(recipe, student, teacher),
        rehearsal,
        per_epoch,
        min(updates, recipe.steps or updates),
        seconds,
        # weights, AdamW's two moments, and the average where there is one
        weights * (4 if recipe.model_ema else 3),
    )


def _crop(student: Built, teacher: Built | None) -> tuple[int, int]:
    """Crops are made at the larger of both sizes and shrunk for the other."""
    sizes = [student.spec.input_size] + ([teacher.spec.input_size] if teacher else [])
    return max(s[0] for s in sizes), max(s[1] for s in sizes)


def _train_view(recipe: Recipe, student: Built, teacher: Built | None) -> Callable[[Any], Tensor]:
    return train_view(
        _crop(student, teacher),
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        aa=recipe.aa,
        interpolation=recipe.train_interpolation,
        reprob=recipe.reprob,
        remode=recipe.remode,
        recount=recipe.recount,
        no_aug=recipe.no_aug,
        mean=student.spec.mean,
        std=student.spec.std,
        in_chans=len(student.spec.mean),
    )


def _mixing(recipe: Recipe, data: ImageData) -> Mixing | None:
    return mixing(recipe.mixup, recipe.cutmix, recipe.mixup_prob, recipe.mixup_switch_prob, data.num_classes)


def _preprocessing(recipe: Recipe, built: Built) -> dict[str, Any]:
    return preprocessing_of(
        built.model,
        input_size=(len(built.spec.mean), *built.spec.input_size),
        crop_pct=recipe.crop_pct,
        interpolation=recipe.interpolation,
        mean=built.spec.mean,
        std=built.spec.std,
    )


def _validation(
    recipe: Recipe, built: Built, data: ImageData, session: _Session
) -> Callable[[nn.Module, Reporter], Metrics] | None:
    """A function that scores a model of this architecture on the validation split."""
    if data.val is None or built.spec.num_classes != data.num_classes:
        return None
    images, spec, config = data.val, built.spec, _preprocessing(recipe, built)
    view = val_view(
        spec.input_size,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        mean=spec.mean,
        in_chans=len(spec.mean),
    )
    accelerator = session.accelerator

    def score(model: nn.Module, reporter: Reporter) -> Metrics:
        loader = val_loader(
            images,
            view,
            recipe.validation_batch_size or recipe.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=min(recipe.workers, os.cpu_count() or 1),
            pin_memory=session.device.type == "cuda",
        )
        training = model.training
        model.eval()
        done = 0

        def each(count: int) -> None:
            nonlocal done
            done += count * accelerator.num_processes
            reporter.advance(min(done, len(images)))

        def logits(batch: Tensor) -> Tensor:
            with accelerator.autocast():
                return model(as_seen_by(spec, batch.to(session.dtype)))

        with reporter.bar("validation", len(images)):
            metrics = measure(
                logits,
                loader,
                len(images),
                device=session.device,
                reduce=lambda tensor: accelerator.reduce(tensor, "sum"),
                each=each,
            )
        model.train(training)
        return metrics

    return score


def _score_teacher(
    recipe: Recipe, teacher: Built | None, data: ImageData, session: _Session
) -> tuple[Result | None, Metrics | None]:
    """Say what the teacher is worth on this data, at the size at which it is used."""
    if teacher is None:
        return None, None
    plain = recipe.but(crop_pct=None, interpolation=None, mean=None, std=None)
    score = _validation(plain, teacher, data, session)
    size = "×".join(map(str, teacher.spec.input_size))
    if score is None:
        why = (
            "there is no validation split"
            if data.val is None
            else (
                f"its {teacher.spec.num_classes} classes are not the data's {data.num_classes}"
                if teacher.spec.num_classes
                else "it has no classes"
            )
        )
        session.reporter.say(f"teacher  {teacher.spec.name} at {size}: no accuracy to report, {why}")
        return None, None
    teacher.model.to(session.device, session.dtype)
    metrics = score(teacher.model, session.reporter)
    session.reporter.say(
        f"teacher  {teacher.spec.name} at {size}: top-1 {metrics.top1:.2f}, top-5 {metrics.top5:.2f} "
        f"on {metrics.count:,} validation images"
    )
    result = Result(
        "teacher",
        recipe.seed,
        str(Path(recipe.output or ".") / "teacher"),
        teacher.spec.name,
        sum(p.numel() for p in teacher.model.parameters()),
        metrics.top1,
        metrics.top5,
        metrics.loss,
        images_per_second=_images_per_second(teacher.model, teacher, session),
    )
    return result, metrics


@torch.inference_mode()
def _images_per_second(model: nn.Module, built: Built, session: _Session) -> float:
    """Speed of a model alone, on a batch of noise: the best of five."""
    noise = torch.rand(32, len(built.spec.mean), *built.spec.input_size).to(session.device, session.dtype)
    training = model.training
    model.eval()
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        model(noise)
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    model.train(training)
    return len(noise) / best


def _finetuned(recipe: Recipe, data: ImageData, folder: Path, session: _Session, resume: bool) -> Result:
    """``--finetune-teacher``: the teacher with a new head, trained on all training images."""
    tuning = recipe.but(
        student=recipe.teacher,
        pretrained=recipe.teacher_pretrained and recipe.teacher_checkpoint is None,
        initial_checkpoint=recipe.teacher_checkpoint,
        model_kwargs=recipe.teacher_kwargs,
        img_size=recipe.teacher_img_size,
        epochs=recipe.finetune_teacher,
        steps=None,
        loss="labels",
        warmup_epochs=None,
        mixup_off_epoch=0,
        # What is pretrained should move least where it is most general (Clark et al. 2020).
        layer_decay=0.75 if recipe.teacher_pretrained or recipe.teacher_checkpoint else None,
        model_ema=False,
        select="last",
        drop_path=None,
        mean=None,
        std=None,
    )
    session.reporter.say(f"fine-tuning the teacher for {recipe.finetune_teacher} epochs → {folder}/student")
    result = _one(
        tuning,
        "teacher",
        formula_of(tuning),
        resolve(recipe.teacher or "", role="teacher"),
        None,
        None,
        data,
        folder,
        session,
        resume,
        images=data.train_all,
    )
    return result


def _checkpoint_gradients(model: nn.Module) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError("--grad-checkpointing: this model has none")
    model.set_grad_checkpointing(True)  # type: ignore[operator]


# The run folder -----------------------------------------------------------------------------------------


def _new_folder(recipe: Recipe) -> str:
    def short(name: str | None) -> str:
        return Path((name or "alone").rpartition(":")[2]).name.partition(".")[0]

    return f"runs/{short(recipe.teacher)}-{short(recipe.student)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise UserError(f"--output {folder} is a file", "name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    ours = (folder / "recipe.toml").is_file()
    if ours and not any(folder.rglob("*.safetensors")):
        return  # a run that never came to anything
    if not overwrite:
        more = f", --resume {folder} goes on" if ours else ""
        raise UserError(f"{folder} is not empty", f"--overwrite replaces it{more}")
    if not ours:
        raise UserError(f"{folder} holds something that is no run; it was not touched", "name another")


def _open_folder(folder: Path, recipe: Recipe, data: ImageData, resume: bool) -> None:
    try:
        if folder.is_dir() and not resume:
            shutil.rmtree(folder)  # what _check_folder let pass
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"cannot make {folder}: {problem.strerror}", "--output FOLDER") from None
    if data.split_files:
        _write_json(folder / "split.json", data.split_files)
    beside = folder / ".recipe.toml"
    beside.write_text(recipe.to_toml())
    os.replace(beside, folder / "recipe.toml")


def _copy_student(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def _write_json(path: Path, content: Any) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(content, indent=1))
    os.replace(beside, path)


def _write_run(run: Run) -> None:
    """``run.json`` is written last: where it is, the run is finished."""
    content = {
        "results": [asdict(result) for result in run.results],
        "teacher": asdict(run.teacher) if run.teacher else None,
    }
    _write_json(run.folder / "run.json", content)


def _finished(folder: Path, recipe: Recipe) -> Run | None:
    if not (folder / "run.json").is_file():
        return None
    content = json.loads((folder / "run.json").read_text())
    results = tuple(_read_result(result) for result in content["results"])
    teacher = _read_result(content["teacher"]) if content["teacher"] else None
    return Run(folder, recipe, results, teacher)


def _read_result(content: dict[str, Any]) -> Result:
    return Result(**{**content, "history": tuple(content["history"])})
