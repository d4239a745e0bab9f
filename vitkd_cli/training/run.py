"""A run, from a recipe to trained students."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from vitkd_cli.data.census import summary
from vitkd_cli.data.images import ImageData
from vitkd_cli.data.keyed import lost_worker
from vitkd_cli.device import tensor_float32
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Metrics
from vitkd_cli.evaluation.images import still_there
from vitkd_cli.evaluation.statistics import MIN_SEEDS
from vitkd_cli.export.timm_folder import save_student
from vitkd_cli.files import CannotWrite, write_text
from vitkd_cli.objective import Formula
from vitkd_cli.options import takes
from vitkd_cli.processes import connection_lost, how_to_resume, is_launched, is_main_process
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe, recipe_of
from vitkd_cli.requests import DistillRequest
from vitkd_cli.session import Session
from vitkd_cli.terms import load_plugins
from vitkd_cli.text import plain, resuming
from vitkd_cli.training.costs import TUNING, cost_of, images_per_second, scoring_seconds, stages
from vitkd_cli.training.data import Readable, data_of, readable, warn_of_leaks, warn_of_small_data
from vitkd_cli.training.folder import (
    Result,
    Run,
    check_data,
    check_folder,
    is_run,
    new_folder,
    open_folder,
    sole_writer,
)
from vitkd_cli.training.models import (
    classes_of_teacher,
    origin,
    student_of,
    teacher_of,
    tuned,
    tuning_of,
    with_classes_of,
)
from vitkd_cli.training.plan import Arm, Estimate, Plan, rehearsed
from vitkd_cli.training.start import (
    DATA,
    anchored,
    begun,
    formula_of,
    launched,
    resumed,
    with_data,
    without_teacher,
)
from vitkd_cli.training.trainer import Trainer, diverged
from vitkd_cli.training.validation import Validation, doubt_about
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import Resolved, better_tags, published_top1, resolve, teacher_tag_for
from vitkd_cli.vit.taps import LOGITS


@takes(DistillRequest)
def distill(
    asked: DistillRequest,
    *,
    machine: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    show_plan: Callable[[Plan], None] = lambda plan: None,
) -> Run | None:
    """Train the recipe's student, with the recipe's teacher if its objective reads one.

    ``distill(recipe, dry_run=True)`` is ``distill(DistillRequest(recipe, dry_run=True))``.

    Args:
        asked: the recipe to run, or ``resume``, a run folder to go on with, with its own recipe; ``auto``:
            the recipe's output folder, if a run began there. ``dry_run`` resolves and rehearses everything,
            shows the plan and stops.
        machine: fields of the recipe that are other on resume, such as ``workers``, or more (``epochs``); a
            plugin that it names is trusted.
        show_plan: is handed the rehearsed plan before training begins.

    Returns:
        What the run left; None for a dry run.
    """
    reporter, changes = reporter or Reporter(silent=not is_main_process()), machine or {}
    recipe, stored, begun_in = asked.recipe, None, begun(asked)
    if begun_in:
        stored = recipe_of(begun_in)
        recipe = resumed(stored, changes, begun_in)
        if finished := Run.read(begun_in, recipe, reporter.warn):
            reporter.say(f"{begun_in} is finished; nothing to do. Its student: {finished.student}")
            return None if asked.dry_run else finished
        for place in (recipe.data, recipe.val_data):
            still_there(place, begun_in)
    if recipe is None:
        raise UserError("there is no recipe to run", "give a Recipe, or a run folder to resume")
    moved = stored is not None and any(getattr(recipe, key) != getattr(stored, key) for key in DATA)
    recipe = with_data(recipe)
    load_plugins(recipe.plugin, trusted=asked.trust_plugin or "plugin" in changes, tell=reporter.say)
    if recipe.student is None:
        raise UserError("no student is named", "--student NAME, such as --student deit_tiny")
    formula = formula_of(recipe)
    if formula.uses_teacher and recipe.teacher is None:
        raise UserError(
            f"the loss reads a teacher ({formula}), and none is named",
            "--teacher NAME, or --loss labels to train without one",
        )
    if stored is None or moved:
        recipe = anchored(recipe)
    recipe = recipe.but(output=str(Path(recipe.output or new_folder(recipe))))
    if recipe.num_processes > 1 and not is_launched():
        launched(recipe, asked, stored is not None, reporter.silent)
        return None if asked.dry_run else Run.read(Path(str(recipe.output)), recipe, reporter.warn)
    session = Session(recipe, reporter)
    (output,) = broadcast_object_list([recipe.output])  # named by the clock: all must have one name
    recipe = session.recipe.but(output=output)
    if stored is not None:
        recipe = session.keep_global_batch(stored.global_batch, recipe)
    with tensor_float32(session.device, allowed=True), ExitStack() as held:
        run = Distillation(recipe, formula, asked, session, stored is not None, moved, held)
        try:
            return run.run(show_plan)
        except CannotWrite as problem:
            hint = f"see to the disk, then: {resuming(output)}"
            raise CannotWrite(problem.message, hint if is_run(run.folder) else problem.hint) from None
        except RuntimeError as problem:
            if told := lost_worker(problem, how_to_resume(output)) or connection_lost(problem, output):
                raise told from None
            raise


class Distillation:
    """The life of a run; what it leaves is a :class:`Run`.

    Args:
        resume: it goes on with the run that its folder holds.
        moved: its data is read from another place than before.
        held: keeps the lock on the folder.
    """

    data: ImageData
    arms: list[Arm]
    student: Model
    plan: Plan | None  # of the first arm, until it is trained
    teacher: Model | None = None
    teacher_name: Resolved | None = None
    teacher_result: Result | None = None
    teacher_metrics: Metrics | None = None

    def __init__(
        self,
        recipe: Recipe,
        formula: Formula,
        asked: DistillRequest,
        session: Session,
        resume: bool,
        moved: bool,
        held: ExitStack,
    ) -> None:
        self.recipe, self.formula, self.asked, self.session = recipe, formula, asked, session
        self.resume, self.moved, self.held = resume, moved, held
        self.folder = Path(str(recipe.output))
        self.say, self.warn = session.reporter.say, session.reporter.warn

    def run(self, show_plan: Callable[[Plan], None]) -> Run | None:
        """Resolve, build, rehearse, fine-tune the teacher, train every arm with every seed, report."""
        session, dry_run = self.session, self.asked.dry_run
        if not dry_run:
            session.main_process_first(self._lock if self.resume else self._check_folder)
        self._find_images()
        self._resolve()
        self._build()
        plan = self.plan = self._rehearse(show_plan)
        looked_at = readable(self.recipe, self.data, self.folder, session)
        self.data = looked_at.data
        if dry_run:
            session.end()
            return None
        session.main_process_first(lambda: self._open(looked_at))
        session.start_trackers()
        tuning = self._tuning()
        session.reporter.stages = stages(plan, self.arms, tuning)
        del plan
        if tuning:
            self._finetune(tuning)
        self._score_teacher()
        results = []
        for number, arm in enumerate(self.arms, 1 if tuning else 0):
            session.reporter.stage = number
            results.append(self._train(arm))
        return self._finish(results)

    # Before training ------------------------------------------------------------------------------------

    def _lock(self) -> None:
        self.held.enter_context(sole_writer(self.folder, self.recipe.lock_timeout, self.warn))

    def _check_folder(self) -> None:
        check_folder(self.folder, self.asked.overwrite, self.recipe)

    def _find_images(self) -> None:
        """Find the images, and fit to them what the recipe leaves open."""
        recipe = self.recipe
        with self.session.reporter.bar("looking for images", 0):
            self.data = data_of(recipe, self.formula, self.folder if self.resume else None)
        assert self.data.train is not None
        if self.resume:
            changed = check_data(self.folder, self.data, self.asked.accept_changed_data, self.moved)
            if changed:
                self.warn(changed)
        for note in self.data.notes:
            self.warn(note)
        if not self.resume:  # a resumed run has its values
            self.recipe, fitted = recipe.fitted(len(self.data.train))
            for note in fitted:
                self.warn(note)
        warn_of_small_data(self.recipe, self.data, self.warn)

    def _resolve(self) -> None:
        """Settle which models are trained on what, and say so."""
        recipe, formula, say = self.recipe, self.formula, self.say
        formulas = {"distilled" if formula.uses_teacher else "student": formula}
        if recipe.baseline and formula.uses_teacher:
            formulas["alone"] = without_teacher(formula)
            if recipe.seeds < MIN_SEEDS:
                self.warn(f"--baseline claims a difference from {MIN_SEEDS} seeds on: --seeds 5")
        elif recipe.baseline:
            self.warn("--baseline adds nothing: this loss reads no teacher")
        name = resolve(recipe.student or "", role="student")
        say(f"student  {origin(name, recipe.pretrained, recipe.initial_checkpoint)}")
        if formula.uses_teacher:
            self._resolve_teacher()
        say(f"data     {self.data.description}")
        for number, line in enumerate(summary(self.data)):
            say(f"{'         ' if number else 'classes  '}{line}")
        warn_of_leaks(self.data, self.session)
        if self.data.by_neighbours and self.data.bank is None:
            say("         no validation: --val-data FOLDER with class folders scores its nearest neighbours")
        # A run of one student keeps it in its own folder, and may be resumed with more of them.
        began = any((self.folder / name).exists() for name in ("checkpoints", "result.json"))
        of_one = len(formulas) == self.recipe.seeds == 1 or (self.resume and began)
        assert self.data.train is not None
        self.arms = []
        for seed in range(recipe.seed, recipe.seed + recipe.seeds):
            for arm, loss in formulas.items():
                own = self.folder if of_one and not self.arms else self.folder / f"{arm}-{seed}"
                seeded = self.recipe.but(seed=seed)
                self.arms.append(Arm(arm, name, seeded, loss, own, self.data.train))

    def _resolve_teacher(self) -> None:
        recipe, data, formula = self.recipe, self.data, self.formula
        name = resolve(recipe.teacher or "", role="teacher")
        if formula.reads_teacher_logits and data.num_classes and not recipe.finetune_teacher:
            name = teacher_tag_for(name, data.num_classes)
        if name.name.startswith("local-dir:"):
            recipe = self.recipe = recipe.but(teacher_pretrained=True)  # a folder of weights is never emptied
        self.say(f"teacher  {origin(name, recipe.teacher_pretrained, recipe.teacher_checkpoint)}")
        own = recipe.teacher_pretrained and recipe.teacher_checkpoint is None
        if own and (better := better_tags(name)):
            top1 = published_top1(name.name)
            others = ", ".join(f".{tag} ({value:.2f})" for tag, value in better[:3])
            self.say(f"         published top-1 {top1:.2f}; better tags of it: {others}")
        if not data.labelled and formula.reads_teacher_logits and recipe.num_classes is None:
            self.data = replace(data, num_classes=classes_of_teacher(recipe, name))
        self.teacher_name = name

    def _build(self) -> None:
        """Build the models; a teacher that knows the data's classes answers with these alone."""
        recipe, formula, data = self.recipe, self.formula, self.data
        with self.session.reporter.bar("building the models", 0):
            self.student = student_of(self.arms[0].recipe, self.arms[0].model, data)
            if self.teacher_name:
                self.teacher = teacher_of(recipe, formula, self.teacher_name, self.student, data)
        self.unscored = ""
        if self.teacher and data.labelled and not recipe.finetune_teacher:
            try:
                self.teacher = with_classes_of(data, self.teacher, self.session.reporter)
            except UserError as problem:
                if formula.reads_teacher_logits:
                    raise
                self.unscored = problem.message

    def _rehearse(self, show_plan: Callable[[Plan], None]) -> Plan:
        """Rehearse the first arm, and say what is odd about it."""
        recipe, student, teacher, dry_run = self.recipe, self.student, self.teacher, self.asked.dry_run
        images = min(recipe.batch, 8) if dry_run else 2
        with self.session.reporter.bar("rehearsing", 0):
            plan = rehearsed(self.arms[0], student, teacher, self.data, self.session, images=images)
            if dry_run:
                plan = replace(plan, costs=self._costs(plan))
        show_plan(plan)
        objective = plan.learner.objective
        for note in (*student.notes, *(teacher.notes if teacher else ()), *objective.warnings):
            self.warn(note)
        for note in recipe.pointless(plan.arm.updates_per_epoch, plan.arm.updates):
            self.warn(note)
        if self.data.labelled and student.spec.num_classes and LOGITS not in objective.student_taps:
            left = "its head stays as it began; --num-classes 0 leaves it out"
            self.warn(f"no term reads the student's logits: {left}")
        if frozen := plan.rehearsal.frozen:
            self.warn(f"no term reaches {', '.join(frozen[:4])}: frozen")
        if teacher and teacher.parameters < student.parameters:
            self.warn(f"the teacher ({teacher.spec.name}) is smaller than the student ({student.spec.name})")
        return plan

    def _costs(self, first: Plan) -> tuple[Estimate, ...]:
        """What each model costs that the run trains, in their order, and the teacher's score."""
        session, costs, images = self.session, [], first.rehearsal.images
        if tuning := self._tuning():
            model = student_of(tuning.recipe, tuning.model, self.data)
            plan = rehearsed(tuning, model, None, self.data, session, images=images)
            costs.append(cost_of(plan, session, TUNING))
        if self.teacher:
            seconds = scoring_seconds(self.teacher, self.data, session)
            costs.append(Estimate("scoring the teacher", validation=seconds))
        plans = {first.arm.name: cost_of(first, session, "")}
        for arm in self.arms:
            if arm.name not in plans:
                plan = rehearsed(arm, self.student, None, self.data, session, images=images)
                plans[arm.name] = cost_of(plan, session, "")
            costs.append(replace(plans[arm.name], title=f"{arm.name} ({arm.recipe.seed})"))
        return tuple(costs)

    def _open(self, looked_at: Readable) -> None:
        """Take the run folder. Only now: what was refused leaves nothing that a second try would find."""
        if not self.resume:
            self._lock()
            self._check_folder()  # somebody may have been here since
        open_folder(self.folder, self.recipe, self.data, self.resume)
        looked_at.keep(self.folder)

    # The teacher ----------------------------------------------------------------------------------------

    def _tuning(self) -> Arm | None:
        """The arm of ``--finetune-teacher``: the teacher with a new head, on all training images."""
        images, data = self.data.train_all or self.data.train, self.data
        if not self.recipe.finetune_teacher or not self.teacher_name or not images or not data.train:
            return None
        recipe = tuning_of(self.recipe, len(data.train), len(images))
        return Arm("teacher", self.teacher_name, recipe, formula_of(recipe), self.folder / "teacher", images)

    def _finetune(self, tuning: Arm) -> None:
        self.plan = self.teacher = None  # their memory is wanted
        recipe = tuning.recipe
        batches = f"{recipe.epochs} epochs, batches of {recipe.batch}"
        self.say(f"fine-tuning the teacher for {batches} → {tuning.folder}/student")
        folder = str(self._train(tuning).student)
        recipe = tuned(self.recipe, folder)
        self.teacher = teacher_of(recipe, self.formula, resolve(folder), self.student, self.data)

    def _score_teacher(self) -> None:
        """Say what the teacher is worth on this data, at the size at which it is used."""
        teacher, data, session = self.teacher, self.data, self.session
        if teacher is None:
            return
        spec = teacher.spec
        size = f"{spec.name} at {'×'.join(map(str, spec.input_size))}"
        score = None if self.unscored else Validation.of(teacher, data, self.recipe, session)
        if score is None:
            why = self.unscored or "it has no classes"
            if data.val is None:
                why = "there is no validation split"
            elif spec.num_classes and not self.unscored:
                why = f"its {spec.num_classes} classes are not the data's {data.num_classes}"
            self.say(f"teacher  {size}: no accuracy to report, {why}")
            return
        metrics = score(teacher.to(session.device, session.dtype).net)
        self.say(
            f"teacher  {size}: top-1 {metrics.top1:.2f}, top-5 {metrics.top5:.2f} "
            f"on {metrics.count:,} validation images"
        )
        place = self.folder / "teacher"
        self.teacher_result = self._result("teacher", self.recipe.seed, place, teacher, teacher.net, metrics)
        self.teacher_metrics = metrics
        if doubt := doubt_about(metrics, self.student, data, self.recipe, session):
            self.warn(doubt)

    # The students ---------------------------------------------------------------------------------------

    def _train(self, arm: Arm) -> Result:
        """Train one student in its own folder, score it and save it; the first one as it was rehearsed."""
        session, recipe, data = self.session, arm.recipe, self.data
        plan, self.plan = self.plan, None
        if self.resume and (done := Result.read(arm.folder, arm.updates, recipe.verify, self.warn)):
            self.say(f"{arm.name} (seed {done.seed}) is finished already")
            session.main_process_first(arm.strip)
            return done
        session.main_process_first(arm.open)
        teacher = self.teacher if arm.formula.uses_teacher else None
        if plan is None:
            with session.reporter.bar("rehearsing", 0):
                student = student_of(recipe, arm.model, data)
                plan = rehearsed(arm, student, teacher, data, session)
        student = plan.student
        validation = Validation.of(student, data, recipe, session)
        trainer = Trainer(plan, validation, session)
        chosen = trainer.fit(self.resume)
        metrics, progress = validation(chosen) if validation else None, trainer.progress
        if metrics and metrics.loss is not None and not math.isfinite(metrics.loss):
            raise diverged(arm, arm.updates, "the validation's loss")
        result = replace(
            self._result(arm.name, recipe.seed, arm.folder, student, chosen, metrics),
            skipped_images=sum(progress.skipped.values()),
            updates=arm.updates,
            history=tuple(progress.history),
        )
        session.main_process_first(lambda: self._save(plan, trainer, chosen, result))
        return result

    def _result(
        self, arm: str, seed: int, folder: Path, model: Model, net: nn.Module, metrics: Metrics | None
    ) -> Result:
        """The figures of a trained network, or of the teacher."""
        speed, batch = images_per_second(net, model, self.session)
        result = Result(
            arm,
            seed,
            str(folder),
            model.spec.name,
            model.parameters,
            images_per_second=speed,
            speed_batch=batch,
        )
        if metrics is None:
            return result
        taught, agreement = self.teacher_metrics, None
        if taught and len(metrics.predictions) == len(taught.predictions):
            agreement = metrics.agreement(taught)
        return replace(
            result,
            top1=metrics.top1,
            top5=metrics.top5,
            loss=metrics.loss,
            agreement=agreement,
            images=metrics.count,
        )

    def _save(self, plan: Plan, trainer: Trainer, chosen: nn.Module, result: Result) -> None:
        """Write a student's folder, then its figures."""
        arm, recipe = plan.arm, plan.recipe
        if skipped := sorted({*trainer.progress.skipped, *self.data.left_out}):
            write_text(arm.folder / "skipped.txt", "".join(f"{plain(path)}\n" for path in skipped))
        save_student(
            replace(plan.student, net=chosen, labels=self.data.class_names),
            arm.folder / "student",
            recipe=recipe,
            formula=str(arm.formula),
            teacher=plan.teacher,
            metrics={"top1": result.top1, "top5": result.top5, "loss": result.loss},
            images=self.data.record,
        )
        result.write()
        arm.strip()

    def _finish(self, results: list[Result]) -> Run:
        run = Run(self.folder, self.recipe, tuple(results), self.teacher_result)
        self.session.main_process_first(run.write)
        self.session.end()
        return run
