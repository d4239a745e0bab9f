"""From a recipe to a trained student: the order of things."""

from __future__ import annotations

import math
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from vitkd_cli.data.census import in_training, summary
from vitkd_cli.data.images import ImageData, Split
from vitkd_cli.data.keyed import Keyed, lost_worker
from vitkd_cli.data.scan import by_main
from vitkd_cli.device import tensor_float32
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Metrics
from vitkd_cli.evaluation.images import still_there
from vitkd_cli.evaluation.statistics import MIN_SEEDS
from vitkd_cli.export.timm_folder import save_student
from vitkd_cli.files import CannotWrite, repair, saving, write_text
from vitkd_cli.objective import Formula, Summand, parse
from vitkd_cli.processes import go_on, is_launched, launch, lost, speaks
from vitkd_cli.progress import Reporter, Stage
from vitkd_cli.recipe import FEW_IMAGES, READS, SAMPLE, Recipe, folder_in, recipe_of, settings
from vitkd_cli.session import Session
from vitkd_cli.terms import load_plugins, plugin_files
from vitkd_cli.text import plain, resuming
from vitkd_cli.training import checkpoint
from vitkd_cli.training.folder import (
    EXTENSIONS,
    Result,
    Run,
    check_data,
    check_folder,
    copy_student,
    finished_run,
    is_run,
    new_folder,
    open_folder,
    read_result,
    sole_writer,
    write_result,
    write_run,
)
from vitkd_cli.training.plan import (
    TUNING,
    Cost,
    Plan,
    data_of,
    doubt_about,
    images_per_second,
    length_of,
    mixing_of,
    preprocessing_for,
    rehearsed,
    scoring_seconds,
    student_of,
    teacher_of,
    validation_of,
    warn_of_small_data,
    with_record,
    without_teacher,
)
from vitkd_cli.training.readable import readable
from vitkd_cli.training.trainer import Job, anew, diverged, train
from vitkd_cli.vit.classes import match_classes
from vitkd_cli.vit.construct import parse_kwargs
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import Resolved, better_tags, published_top1, resolve, teacher_tag_for
from vitkd_cli.vit.taps import LOGITS

DATA = ("data", "val_data", "data_dir")  # may be others on resume, where the same images lie
# What may change on resume, beside what EXTENSIONS may be given more of.
MACHINE = (
    "plugin",
    "verify",
    "workers",
    "device",
    "num_processes",
    "log_with",
    "skip_corrupt",
    "max_pixels",
    "keep_checkpoints",
    "dist_timeout",
    "lock_timeout",
    *DATA,
)


def distill(
    recipe: Recipe | None = None,
    *,
    resume: str | Path | None = None,
    machine: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    trust_plugin: bool = False,
    accept_changed_data: bool = False,
    reporter: Reporter | None = None,
    show_plan: Callable[[Plan], None] = lambda plan: None,
) -> Run | None:
    """Train the recipe's student, with the recipe's teacher if its objective reads one.

    Args:
        recipe: what to run.
        resume: a run folder to go on with instead, with its own recipe; ``auto``: the recipe's output
            folder, if a run began there.
        machine: fields of the recipe that are other on resume, such as ``workers``, or more (``epochs``).
        overwrite: replace what the output folder holds.
        dry_run: resolve and rehearse everything, show the plan and stop.
        trust_plugin: run the code of the recipe's ``plugin``; one that ``machine`` names is trusted.
        accept_changed_data: resume although images were added, removed or replaced.
        show_plan: is handed the rehearsed plan before training begins.

    Returns:
        What the run left; None for a dry run.

    Raises:
        UserError: anything that the user can mend.
    """
    reporter = reporter or Reporter(silent=not speaks())
    if resume == "auto":
        if recipe is None or recipe.output is None:
            raise UserError("--resume auto looks at --output, and none is named", "--output FOLDER")
        resume = recipe.output if is_run(Path(recipe.output)) else None
    moved = False
    if resume is not None:
        folder = Path(resume)
        if not (folder / "recipe.toml").is_file():
            raise UserError(f"{folder} is no run folder: it has no recipe.toml", "name the folder of a run")
        stored = recipe_of(folder)
        recipe = _resumed(stored, machine or {}, folder)
        moved = any(getattr(recipe, key) != getattr(stored, key) for key in DATA)
        if finished := finished_run(folder, recipe, reporter.warn):
            reporter.say(f"{folder} is finished; nothing to do. Its student: {finished.student}")
            return None if dry_run else finished
        for place in (recipe.data, recipe.val_data):
            still_there(place, folder)
    if recipe is None:
        raise UserError("there is no recipe to run", "give a Recipe, or a run folder to resume")
    recipe = with_data(recipe)
    trusted = trust_plugin or "plugin" in (machine or {})
    load_plugins(recipe.plugin, trusted=trusted, tell=reporter.say)
    if recipe.student is None:
        raise UserError("no student is named", "--student NAME, such as --student deit_tiny")
    formula = formula_of(recipe)
    if formula.uses_teacher and recipe.teacher is None:
        raise UserError(
            f"the loss reads a teacher ({formula}), and none is named",
            "--teacher NAME, or --loss labels to train without one",
        )
    if resume is None or moved:
        recipe = _anchored(recipe)
    folder = Path(recipe.output or new_folder(recipe))
    recipe = recipe.but(output=str(folder))
    if recipe.num_processes > 1 and not is_launched():
        switches = {
            "--overwrite": overwrite,
            "--dry-run": dry_run,
            "--quiet": reporter.silent,
            "--trust-plugin": True,
            "--accept-changed-data": accept_changed_data,
        }
        _launched(recipe, resume is not None, [switch for switch, wanted in switches.items() if wanted])
        return None if dry_run else finished_run(folder, recipe, reporter.warn)
    session = Session(recipe, reporter)
    (output,) = broadcast_object_list([recipe.output])  # named by the clock: all must have one name
    folder, recipe = Path(output), session.recipe.but(output=output)
    if resume is not None:
        recipe = session.keep_global_batch(stored.global_batch, recipe)
    with ExitStack() as held, tensor_float32(session.device, allowed=True):

        def lock() -> None:
            held.enter_context(sole_writer(folder, recipe.lock_timeout, reporter.warn))

        def same(data: ImageData) -> None:
            if resume is not None and (changed := check_data(folder, data, accept_changed_data, moved)):
                reporter.warn(changed)

        def begin(settled: Recipe, data: ImageData) -> None:
            # Only now: a request that was refused leaves nothing behind that a second try would stumble over.
            if resume is None:
                lock()
                check_folder(folder, overwrite, recipe)  # somebody may have been here since
            open_folder(folder, settled, data, resume is not None)

        try:
            if resume is None and not dry_run:
                session.alone_first(lambda: check_folder(folder, overwrite, recipe))
            elif not dry_run:
                session.alone_first(lock)
            return _run(recipe, formula, folder, session, resume is not None, dry_run, show_plan, begin, same)
        except CannotWrite as problem:
            hint = f"see to the disk, then: {resuming(folder)}"
            raise CannotWrite(problem.message, hint if is_run(folder) else problem.hint) from None
        except RuntimeError as problem:
            if told := lost_worker(problem, go_on(folder)) or lost(problem, folder):
                raise told from None
            raise


def _resumed(stored: Recipe, changes: Mapping[str, Any], folder: Path) -> Recipe:
    """A run's recipe with what may be other, or more, on resume.

    Raises:
        UserError: something else differs; or there is nothing left to train on from.
    """
    wanted = _anchored(stored.but(**changes))
    changed = sorted(key for key in changes if getattr(wanted, key) != getattr(stored, key))
    changed = [key for key in changed if key not in MACHINE]
    if "output" in changed and Path(wanted.output or "").resolve() == folder.resolve():
        changed.remove("output")
    # The command of a new run names its own folder and weights.
    new = [key for key in changed if key not in ("output", "initial_checkpoint")]
    flags = shlex.join(_typed(wanted, new))
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
        for place in (folder, *folder.glob("*-[0-9]*")):
            if not checkpoint.can_go_on(place / "checkpoints"):
                raise UserError(
                    f"{place} was finished without --keep-checkpoints: its optimizer's state is gone, "
                    "so training cannot go on from it",
                    anew(folder, weights, flags),
                )
    return wanted.but(output=str(folder))


def _typed(recipe: Recipe, keys: Sequence[str]) -> list[str]:
    """The command-line arguments that set these fields; none for one that is unset."""
    known = {field.name: field for field in settings()}
    values = {key: value for key in keys if (value := getattr(recipe, key)) is not None}
    return [word for key, value in values.items() for word in known[key].typed(value)]


def _anchored(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that it can be resumed from anywhere."""
    changes = {}
    for key in READS:
        value = getattr(recipe, key)
        if value and value != SAMPLE and os.path.exists(os.path.expanduser(value)):
            changes[key] = str(Path(os.path.expanduser(value)).resolve())
    for key in ("teacher", "student"):
        source, place = folder_in(getattr(recipe, key))
        path = Path(os.path.expanduser(place or "-"))
        if any(os.path.isfile(path / inside) for inside in ("config.json", "student/config.json")):
            changes[key] = f"{source}{path.resolve()}"
    if recipe.plugin is not None:
        changes["plugin"] = ",".join(map(str, plugin_files(recipe.plugin)))
    return recipe.but(**changes)


def _launched(recipe: Recipe, resume: bool, switches: list[str]) -> None:
    """The same request in several processes."""
    arguments = [*switches]
    with tempfile.TemporaryDirectory(prefix="vitkd-") as folder:
        if resume:
            arguments += ["--resume", str(recipe.output)]
            arguments += _typed(recipe, (*MACHINE, *EXTENSIONS))
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
    session: Session,
    resume: bool,
    dry_run: bool,
    show_plan: Callable[[Plan], None],
    begin: Callable[[Recipe, ImageData], None],
    same: Callable[[ImageData], None],
) -> Run | None:
    """Plan, fine-tune the teacher if asked, train every arm with every seed."""
    say, warn = session.reporter.say, session.reporter.warn
    with session.reporter.bar("looking for images", 0):
        data = with_record(recipe, data_of(recipe, formula, folder if resume else None))
    same(data)
    for note in data.notes:
        warn(note)
    if not resume:  # a resumed run has its values
        recipe, fitted = recipe.fitted(len(data.train) if data.train is not None else FEW_IMAGES)
        for note in fitted:
            warn(note)
    warn_of_small_data(recipe, data, warn)
    if recipe.baseline and not formula.uses_teacher:
        warn("--baseline adds nothing: this loss reads no teacher")
    arms = [("distilled" if formula.uses_teacher else "student", formula)]
    if recipe.baseline and formula.uses_teacher:
        arms.append(("alone", without_teacher(formula)))
        if recipe.seeds < MIN_SEEDS:
            warn(f"--baseline claims a difference from {MIN_SEEDS} seeds on: --seeds 5")
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    single = len(arms) == 1 and recipe.seeds == 1

    student_name = resolve(recipe.student or "", role="student")
    say(f"student  {_origin(student_name, recipe.pretrained, recipe.initial_checkpoint)}")
    teacher_name = None
    if formula.uses_teacher:
        teacher_name = resolve(recipe.teacher or "", role="teacher")
        if formula.reads_teacher_logits and data.num_classes and not recipe.finetune_teacher:
            teacher_name = teacher_tag_for(teacher_name, data.num_classes)
        if teacher_name.name.startswith("local-dir:"):
            recipe = recipe.but(teacher_pretrained=True)  # a folder of weights is never emptied
        say(f"teacher  {_origin(teacher_name, recipe.teacher_pretrained, recipe.teacher_checkpoint)}")
        own = recipe.teacher_pretrained and recipe.teacher_checkpoint is None
        if own and (better := better_tags(teacher_name)):
            top1 = published_top1(teacher_name.name)
            others = ", ".join(f".{tag} ({value:.2f})" for tag, value in better[:3])
            say(f"         published top-1 {top1:.2f}; better tags of it: {others}")
    if not data.labelled and formula.reads_teacher_logits and teacher_name and recipe.num_classes is None:
        data = replace(data, num_classes=_classes_of_teacher(recipe, teacher_name))
    say(f"data     {data.description}")
    for number, line in enumerate(summary(data)):
        say(f"{'         ' if number else 'classes  '}{line}")
    _warn_of_leaks(data, session)
    if data.by_neighbours and data.bank is None:
        say("         no validation: --val-data FOLDER with class folders scores its nearest neighbours")

    with session.reporter.bar("building the models", 0):
        student = student_of(recipe, student_name, data, seed=recipe.seed)
        teacher = teacher_of(recipe, formula, teacher_name, student, data) if teacher_name else None
    unscored = ""
    if teacher and data.labelled and not recipe.finetune_teacher:
        try:
            teacher = _with_classes_of(data, teacher, say, warn)
        except UserError as problem:
            if formula.reads_teacher_logits:
                raise
            unscored = problem.message
    with session.reporter.bar("rehearsing", 0):
        plan = rehearsed(recipe, formula, data, student, teacher, session, timed=dry_run)
        if dry_run:
            plan = replace(plan, costs=_costs(plan, arms, seeds, teacher_name, session))
    show_plan(plan)
    for note in (*student.notes, *(teacher.notes if teacher else ()), *plan.learner.objective.warnings):
        warn(note)
    for note in recipe.pointless(plan.updates_per_epoch, plan.updates):
        warn(note)
    if data.labelled and student.spec.num_classes and LOGITS not in plan.learner.objective.student_taps:
        warn("no term reads the student's logits: its head stays as it began; --num-classes 0 leaves it out")
    if plan.rehearsal.frozen:
        warn(f"no term reaches {', '.join(plan.rehearsal.frozen[:4])}: frozen")
    if teacher and teacher.parameters < sum(p.numel() for p in student.net.parameters()):
        warn(f"the teacher ({teacher.spec.name}) is smaller than the student ({student.spec.name})")
    looked_at = readable(recipe, data, folder, session)
    data = looked_at.data
    if dry_run:
        session.end()
        return None
    session.alone_first(lambda: begin(recipe, data))
    session.alone_first(lambda: looked_at.keep(folder))
    session.start_trackers()
    session.reporter.stages = _stages(recipe, data, plan, [formula for _, formula in arms])
    # A run of one student keeps it in its own folder, and may be resumed with more of them.
    began = any((folder / name).exists() for name in ("checkpoints", "result.json"))
    of_one = single or (resume and began)
    places = {
        (arm, seed): folder if of_one and (arm, seed) == (arms[0][0], seeds[0]) else folder / f"{arm}-{seed}"
        for seed in seeds
        for arm, _ in arms
    }

    if recipe.finetune_teacher and teacher_name and teacher:
        del teacher, plan
        tuned = _finetuned(recipe, data, folder / "teacher", session, resume)
        recipe_with_it = recipe.but(
            teacher=str(tuned.student),
            teacher_kwargs=None,
            teacher_checkpoint=None,
            teacher_pretrained=True,
            use_ema=False,
            finetune_teacher=0,
        )
        teacher = teacher_of(recipe_with_it, formula, resolve(str(tuned.student)), student, data)
    teacher_result, teacher_metrics = _score_teacher(recipe, teacher, data, session, unscored)

    if teacher_metrics and (doubt := doubt_about(teacher_metrics, recipe, student, data, session)):
        warn(doubt)

    results: list[Result] = []
    for seed in seeds:
        for arm, arm_formula in arms:
            session.reporter.stage = bool(recipe.finetune_teacher) + len(results)
            results.append(
                _one(
                    recipe.but(seed=seed),
                    arm,
                    arm_formula,
                    student_name,
                    teacher if arm_formula.uses_teacher else None,
                    teacher_metrics,
                    data,
                    places[arm, seed],
                    session,
                    resume,
                )
            )
    run = Run(folder, recipe, tuple(results), teacher_result)
    if not of_one:
        session.alone_first(lambda: copy_student(results[0].student, run.student))
    session.alone_first(lambda: write_run(run))
    session.end()
    return run


def _stages(recipe: Recipe, data: ImageData, plan: Plan, formulas: list[Formula]) -> list[Stage]:
    """The models that will be trained, in order, each with the multiply-adds of an image.

    Backward costs twice what forward does, and a teacher that is imitated has none.
    """
    student = 3 * plan.student.multiply_adds
    teacher = plan.teacher.multiply_adds if plan.teacher else 0
    stages = []
    images = data.train_all or data.train
    if recipe.finetune_teacher and plan.teacher and images is not None:
        tuning = recipe.but(epochs=recipe.finetune_teacher, steps=None)
        stages.append(Stage("teacher", length_of(tuning, images)[1], 3 * teacher))
    students = recipe.seeds * len(formulas)
    for number in range(students):
        uses_teacher = formulas[number % len(formulas)].uses_teacher
        title = "student" if students == 1 else f"student {number + 1} of {students}"
        stages.append(Stage(title, plan.updates, student + teacher * uses_teacher))
    return stages


def _warn_of_leaks(data: ImageData, session: Session) -> None:
    """Say which validation images are in training, too."""
    if (train := data.train) is None or (val := data.val) is None:
        return
    with session.reporter.bar("comparing the splits", 0) as bar:
        note = by_main(
            lambda each: in_training(train, val, each),
            lambda done, total: bar.advance(done, total=total),
            session.accelerator,
        )
    if note:
        session.reporter.warn(note)


def _costs(
    plan: Plan, arms: list[tuple[str, Formula]], seeds: range, name: Resolved | None, session: Session
) -> tuple[Cost, ...]:
    """What each model costs that the run trains, in their order, and the teacher's score."""
    recipe, data = plan.recipe, plan.data
    costs = []
    if plan.teacher and name and recipe.finetune_teacher:
        tuning, every = _tuning(recipe), replace(data, train=data.train_all)
        model = student_of(tuning, name, data, seed=recipe.seed)
        (cost,) = rehearsed(tuning, formula_of(tuning), every, model, None, session, timed=True).costs
        costs.append(replace(cost, title=TUNING))
    if plan.teacher:
        seconds = scoring_seconds(plan.teacher, data, session)
        costs.append(Cost("scoring the teacher", 0, 0, seconds, 0, 0))
    of_arm = {arms[0][0]: plan.costs[0]}
    for arm, formula in arms[1:]:
        of_arm[arm] = rehearsed(recipe, formula, data, plan.student, None, session, timed=True).costs[0]
    costs += [replace(of_arm[arm], title=f"{arm} ({seed})") for seed in seeds for arm in of_arm]
    return tuple(costs)


def _classes_of_teacher(recipe: Recipe, name: Resolved) -> int:
    """How many classes a student has that learns a teacher's logits from unlabelled images."""
    own = recipe.teacher_pretrained and recipe.teacher_checkpoint is None
    classes = parse_kwargs(recipe.teacher_kwargs).get("num_classes", name.num_classes if own else None)
    if not classes:
        raise UserError(
            "the images have no labels, so the teacher's classes decide, and they are not known beforehand",
            "--num-classes N, as many as the teacher has",
        )
    return int(classes)


def _with_classes_of(
    data: ImageData, teacher: Model, say: Callable[[str], None], warn: Callable[[str], None]
) -> Model:
    """The teacher with the data's classes alone and in their order, where it knows them by name.

    Raises:
        UserError: it knows its classes, and one of the data's is not among them.
    """
    ours, count = data.class_names, teacher.spec.num_classes
    if not ours or not count:
        return teacher
    match = match_classes(
        teacher,
        ours,
        data.name,
        cure='--finetune-teacher N, or --loss "labels + vitkd", or --class-map FILE without those classes',
    )
    if match.rows is None:
        if match.note:
            warn(match.note)
        return teacher
    by = "synset" if re.fullmatch(r"n\d{8}", ours[0]) else "name"
    change = "put into the data's order" if len(ours) == count else f"narrowed to the data's {len(ours)}"
    say(f"teacher  its {count} classes {change} by {by}")
    return teacher.with_classes(match.rows[: len(ours)], ours)


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
    teacher: Model | None,
    teacher_metrics: Metrics | None,
    data: ImageData,
    folder: Path,
    session: Session,
    resume: bool,
    images: Split | None = None,
) -> Result:
    """Train one student in its own folder, save it and score it."""
    images = images or data.train
    assert images is not None
    per_epoch, updates = length_of(recipe, images)
    checkpoints = folder / "checkpoints"
    if resume and (done := read_result(folder, updates, recipe.verify, session.reporter.warn)):
        session.reporter.say(f"{arm} (seed {done.seed}) is finished already")
        session.alone_first(lambda: None if recipe.keep_checkpoints else checkpoint.strip(checkpoints))
        return done

    def open_place() -> None:
        with saving(folder):
            folder.mkdir(exist_ok=True)
            repair(folder)
            checkpoints.mkdir(exist_ok=True)
            repair(checkpoints)

    session.alone_first(open_place)
    with session.reporter.bar("rehearsing", 0):
        student = student_of(recipe, name, data, seed=recipe.seed)
        plan = rehearsed(recipe, formula, replace(data, train=images), student, teacher, session)
    learner, tapped = plan.learner, plan.tapped
    if recipe.torchcompile:
        learner.student.compile()
        if tapped:
            tapped.tapped.compile()
    if recipe.grad_checkpointing:
        _checkpoint_gradients(student.net)
    validate = validation_of(recipe, student, data, session)
    job = Job(
        folder=folder,
        run=Path(recipe.output or folder),
        title=arm if recipe.seeds == 1 else f"{arm} (seed {recipe.seed})",
        seed=recipe.seed,
        images=Keyed(images, plan.view, recipe.seed, skip_corrupt=recipe.skip_corrupt),
        updates_per_epoch=per_epoch,
        updates=updates,
        mixing=mixing_of(recipe, data),
        labelled=data.labelled,
        validate=validate,
    )
    chosen, progress = train(
        recipe, job, learner, tapped, session.accelerator, session.reporter, resume=resume
    )
    metrics = validate(chosen, session.reporter) if validate else None
    if metrics and metrics.loss is not None and not math.isfinite(metrics.loss):
        raise diverged(recipe, folder, job.run, updates, "the validation's loss")
    speed, speed_batch = images_per_second(chosen, student, session)
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
        images=metrics.count if metrics else None,
        speed_batch=speed_batch,
        skipped_images=sum(progress.skipped.values()),
        updates=updates,
        history=tuple(progress.history),
    )

    def save() -> None:
        if skipped := sorted({*progress.skipped, *data.left_out}):
            write_text(folder / "skipped.txt", "".join(f"{plain(path)}\n" for path in skipped))
        save_student(
            chosen,
            folder / "student",
            class_names=data.class_names,
            preprocessing=preprocessing_for(recipe, student),
            recipe=recipe,
            formula=str(formula),
            student=student,
            teacher=teacher,
            metrics={"top1": result.top1, "top5": result.top5, "loss": result.loss},
            weights="average"
            if recipe.select == "ema" or (recipe.select == "best" and recipe.model_ema)
            else "raw",
            selected=recipe.select,
            images=data.record,
        )
        write_result(result)
        if not recipe.keep_checkpoints:
            checkpoint.strip(checkpoints)

    session.alone_first(save)
    return result


def _score_teacher(
    recipe: Recipe, teacher: Model | None, data: ImageData, session: Session, unscored: str
) -> tuple[Result | None, Metrics | None]:
    """Say what the teacher is worth on this data, at the size at which it is used.

    Args:
        unscored: why its classes are not the data's; empty if they are.
    """
    if teacher is None:
        return None, None
    plain = recipe.but(crop_pct=None, interpolation=None, mean=None, std=None)
    score = None if unscored else validation_of(plain, teacher, data, session)
    size = "×".join(map(str, teacher.spec.input_size))
    if score is None:
        why = (
            "there is no validation split"
            if data.val is None
            else unscored
            or (
                f"its {teacher.spec.num_classes} classes are not the data's {data.num_classes}"
                if teacher.spec.num_classes
                else "it has no classes"
            )
        )
        session.reporter.say(f"teacher  {teacher.spec.name} at {size}: no accuracy to report, {why}")
        return None, None
    teacher.net.to(session.device, session.dtype)
    metrics = score(teacher.net, session.reporter)
    session.reporter.say(
        f"teacher  {teacher.spec.name} at {size}: top-1 {metrics.top1:.2f}, top-5 {metrics.top5:.2f} "
        f"on {metrics.count:,} validation images"
    )
    speed, speed_batch = images_per_second(teacher.net, teacher, session)
    result = Result(
        "teacher",
        recipe.seed,
        str(Path(recipe.output or ".") / "teacher"),
        teacher.spec.name,
        teacher.parameters,
        metrics.top1,
        metrics.top5,
        metrics.loss,
        images_per_second=speed,
        speed_batch=speed_batch,
        images=metrics.count,
    )
    return result, metrics


def _finetuned(recipe: Recipe, data: ImageData, folder: Path, session: Session, resume: bool) -> Result:
    """``--finetune-teacher``: the teacher with a new head, trained on all training images."""
    tuning = _tuning(recipe)
    session.reporter.say(f"fine-tuning the teacher for {recipe.finetune_teacher} epochs → {folder}/student")
    return _one(
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


def _tuning(recipe: Recipe) -> Recipe:
    """The recipe by which a teacher is fine-tuned."""
    return recipe.but(
        student=recipe.teacher,
        pretrained=recipe.teacher_pretrained and recipe.teacher_checkpoint is None,
        initial_checkpoint=recipe.teacher_checkpoint,
        use_ema=recipe.use_ema and recipe.teacher_checkpoint is not None,
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


def _checkpoint_gradients(model: nn.Module) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError("--grad-checkpointing: this model has none")
    model.set_grad_checkpointing(True)  # type: ignore[operator]
