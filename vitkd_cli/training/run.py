"""A run, from a recipe to trained students."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from vitkd_cli.data.census import summary
from vitkd_cli.data.images import ImageData
from vitkd_cli.data.keyed import lost_worker
from vitkd_cli.device import cores, tensor_float32
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Metrics
from vitkd_cli.evaluation.cache import write_rows
from vitkd_cli.evaluation.images import still_there
from vitkd_cli.evaluation.statistics import MIN_SEEDS
from vitkd_cli.export.timm_folder import save_student
from vitkd_cli.files import CannotWrite, write_text
from vitkd_cli.meeting import meet, refused_together
from vitkd_cli.options import takes
from vitkd_cli.processes import connection_lost, how_to_resume, is_launched, is_main_process
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe, recipe_of
from vitkd_cli.requests import DistillRequest
from vitkd_cli.session import Session
from vitkd_cli.terms import load_plugins
from vitkd_cli.text import plain, resuming
from vitkd_cli.training import checkpoint
from vitkd_cli.training.arms import WrittenArm, checked_arms, written_arms
from vitkd_cli.training.cache import Cache, check_disk, together
from vitkd_cli.training.cached import cache_of
from vitkd_cli.training.costs import TUNING, cost_of, images_per_second, scoring_seconds, stages
from vitkd_cli.training.data import Readable, data_of, plan_cache, readable, warn_of_leaks, warn_of_small_data
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
from vitkd_cli.training.models import classes_of_teacher, origin, student_of
from vitkd_cli.training.plan import Arm, Estimate, Plan, rehearsed
from vitkd_cli.training.sharding import gathered
from vitkd_cli.training.start import DATA, MACHINE, anchored, begun, launched, otherwise, resumed, with_data
from vitkd_cli.training.teachers import RunTeacher, Teachers
from vitkd_cli.training.trainer import Trainer, diverged
from vitkd_cli.training.validation import Validation, doubt_about
from vitkd_cli.vit.copying import copy_weights
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import resolve
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
    reporter = reporter or Reporter(silent=not is_main_process())
    with refused_together():
        start = _started(asked, machine or {}, reporter)
    recipe, stored = start.recipe, start.stored
    if start.finished:
        meet(start.finds, recipe.dist_timeout)
        student = start.finished.student
        reporter.say(f"{recipe.output} is finished; nothing to do. Its student: {student}")
        return None if asked.dry_run else start.finished
    if recipe.num_processes > 1 and not is_launched():
        launched(recipe, asked, stored is not None, reporter.silent)
        return None if asked.dry_run else Run.read(Path(str(recipe.output)), recipe, reporter.warn)
    session = Session(recipe, reporter, start.finds)
    (output,) = broadcast_object_list([recipe.output])  # named by the clock: all must have one name
    recipe = session.recipe.but(output=output)
    alike = {*asdict(recipe)} - {*MACHINE} | {"shard", "shard_teacher"}
    session.check_same({key: getattr(recipe, key) for key in sorted(alike)})
    if not asked.dry_run:
        session.check_shared(Path(output))
        if recipe.answers_folder:
            session.check_shared(Path(recipe.answers_folder), read_only=True)
    if stored is not None:
        recipe = session.keep_global_batch(stored.global_batch, recipe)
    with tensor_float32(session.device, allowed=True), ExitStack() as held:
        run = Distillation(recipe, start, asked, session, held)
        try:
            return run.run(show_plan)
        except CannotWrite as problem:
            hint = f"see to the disk, then: {resuming(output)}"
            raise CannotWrite(problem.message, hint if is_run(run.folder) else problem.hint) from None
        except RuntimeError as problem:
            if told := lost_worker(problem, how_to_resume(output)) or connection_lost(problem, output):
                raise told from None
            raise


@dataclass(frozen=True)
class _Start:
    """What a process makes of a request by itself, before it has met the others.

    Attributes:
        stored: the recipe of the run to go on with.
        moved: its data is read from another place than before.
        finished: that run, if nothing is left to do.
    """

    recipe: Recipe
    stored: Recipe | None = None
    moved: bool = False
    arms: list[WrittenArm] = field(default_factory=list)
    finished: Run | None = None

    @property
    def finds(self) -> str:
        """What the run folder holds, in words."""
        if self.stored is None:
            return "no run to go on with"
        return f"a run that is {'finished' if self.finished else 'not finished'} in {self.recipe.output}"


def _started(asked: DistillRequest, changes: Mapping[str, Any], reporter: Reporter) -> _Start:
    """Read the run that there is, if any, and settle the recipe."""
    recipe, stored, begun_in = asked.recipe, None, begun(asked)
    if begun_in:
        stored = recipe_of(begun_in)
        # With --resume auto the folder may hold another recipe's run.
        wanted = otherwise(recipe.but(**changes), stored, changes) if recipe else changes
        recipe = resumed(stored, wanted, begun_in)
        if finished := Run.read(begun_in, recipe, reporter.warn):
            return _Start(recipe, stored, finished=finished)
        for place in (recipe.data, recipe.val_data):
            still_there(place, begun_in)
    if recipe is None:
        raise UserError("there is no recipe to run", "give a Recipe, or a run folder to resume")
    moved = stored is not None and any(getattr(recipe, key) != getattr(stored, key) for key in DATA)
    recipe = with_data(recipe)
    load_plugins(recipe.plugin, trusted=asked.trust_plugin or "plugin" in changes, tell=reporter.say)
    if stored is None or moved:
        recipe = anchored(recipe)
    arms = checked_arms(recipe)
    return _Start(recipe.but(output=str(Path(recipe.output or new_folder(recipe)))), stored, moved, arms)


_ALONE: dict[str, Any] = {"baseline": False, "against": ()}


class Distillation:
    """The life of a run; what it leaves is a :class:`Run`.

    Args:
        recipe: as its processes share it.
        held: keeps the lock on the folder.

    Attributes:
        resume: it goes on with the run that its folder holds.
    """

    data: ImageData
    arms: list[Arm]
    teachers: Teachers
    student: Model
    plan: Plan | None  # of the first arm, until it is trained

    def __init__(
        self,
        recipe: Recipe,
        start: _Start,
        asked: DistillRequest,
        session: Session,
        held: ExitStack,
    ) -> None:
        self.recipe, self.written, self.asked, self.session = recipe, start.arms, asked, session
        self.resume, self.moved, self.held = start.stored is not None, start.moved, held
        self.folder = Path(str(recipe.output))
        self.keeps = True  # what a teacher says, if the recipe has it kept
        self.say, self.warn = session.reporter.say, session.reporter.warn

    def run(self, show_plan: Callable[[Plan], None]) -> Run | None:
        """Resolve, build, rehearse, fine-tune the teachers, train every arm with every seed, report."""
        session, dry_run = self.session, self.asked.dry_run
        if not dry_run:
            session.main_process_first(self._lock if self.resume else self._check_folder)
        session.all_together(self._find_images)
        session.all_together(self._resolve)
        warn_of_leaks(self.data, session)
        session.all_together(self._build)
        session.all_together(self._share)
        plan = self.plan = self._rehearse(show_plan)
        looked_at = readable(self.recipe, self.data, self.folder, session)
        self.data = looked_at.data
        if dry_run:
            train = self.data.train
            assert train is not None
            session.all_together(lambda: plan_cache(self.recipe, train, session))
            session.end()
            return None
        session.main_process_first(lambda: self._open(looked_at))
        session.start_trackers()
        tunings = self._tunings()
        session.reporter.stages = stages(plan.student, self.arms, self.teachers, tunings)
        del plan
        self._finetune(tunings)
        for teacher in self.teachers:
            self._score(teacher)
        results = []
        for number, arm in enumerate(self.arms, len(tunings)):
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
        recipe = self.recipe = self.recipe.decoded_on(self.session.device.type)
        with self.session.reporter.bar("looking for images", 0):
            labelled = any(arm.formula.uses_labels for arm in self.written) or bool(recipe.finetune_teacher)
            self.data = data_of(recipe, labelled, self.folder if self.resume else None)
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
        # What was settled may be what an arm asks for: it would be the run's own, and so on resume.
        self.written = written_arms(self.recipe)
        warn_of_small_data(self.recipe, self.data, self.warn)

    def _resolve(self) -> None:
        """Settle which models are trained on what, and say so."""
        recipe, say, written = self.recipe, self.say, self.written
        if len(written) > 1 and recipe.seeds < MIN_SEEDS:
            self.warn(f"a difference between arms is claimed from {MIN_SEEDS} seeds on: --seeds 5")
        if recipe.baseline and not written[0].formula.uses_teacher:
            self.warn("--baseline adds nothing: this loss reads no teacher")
        name = resolve(recipe.student or "", role="student")
        say(f"student  {origin(name, recipe.pretrained, recipe.initial_checkpoint)}")
        self.teachers = Teachers(recipe, written, self.folder, self.data.num_classes)
        self.teachers.introduce(say)
        if recipe.shard_teacher and self.teachers.first is None:
            self.warn("--shard-teacher changes nothing: no arm has a teacher")
        if not self.data.labelled and recipe.num_classes is None:
            for one in self.teachers:
                if True in one.uses:
                    self.data = replace(self.data, num_classes=classes_of_teacher(one.recipe, one.name))
        say(f"data     {self.data.description}")
        decoder = "torchvision" if recipe.decodes_fast(self.session.device.type) else "pillow"
        workers = self.session.workers
        each = f"worker{'s' if workers != 1 else ''} per process"
        say(f"loading  {workers} {each}, on {cores()} cores, by {decoder}")
        for number, line in enumerate(summary(self.data)):
            say(f"{'         ' if number else 'classes  '}{line}")
        if self.data.by_neighbours and self.data.bank is None:
            say("         no validation: --val-data FOLDER with class folders scores its nearest neighbours")
        # A run of one student keeps it in its own folder, and may be resumed with more of them.
        began = any((self.folder / name).exists() for name in ("checkpoints", "result.json"))
        of_one = len(written) == self.recipe.seeds == 1 or (self.resume and began)
        assert self.data.train is not None
        self.arms = []
        for seed in range(recipe.seed, recipe.seed + recipe.seeds):
            for arm in written:
                own = self.folder if of_one and not self.arms else self.folder / f"{arm.place}-{seed}"
                # Its own, so that what its student tells of it makes it again.
                own_loss = {} if arm is written[0] else {"loss": str(arm.formula), **_ALONE}
                seeded = self.recipe.but(**arm.changes, **own_loss, seed=seed)
                self.arms.append(Arm(arm, name, seeded, own, self.data.train))

    def _build(self) -> None:
        with self.session.reporter.bar("building the models", 0):
            self.student = student_of(self.arms[0].recipe, self.arms[0].model, self.data)
            for teacher in self.teachers:
                teacher.build(self.student, self.data, self.session)

    def _share(self) -> None:
        for teacher in self.teachers:
            teacher.share(self.session)

    def _rehearse(self, show_plan: Callable[[Plan], None]) -> Plan:
        """Rehearse every arm once, before hours are spent on the first, and say what is odd about them."""
        dry_run = self.asked.dry_run
        images = min(self.recipe.batch, 8) if dry_run else 2
        with self.session.reporter.bar("rehearsing", 0):
            plan = self._rehearsed(self.arms[0], self.student, images)
            self._check_head(plan)
            said, caches = self._odd(plan), {plan.arm.name: plan.cache}
            for arm in self.arms[1 : len(self.written)]:
                if arm.name != "alone":  # its terms are among the first one's
                    other = self._rehearsed(arm, student_of(arm.recipe, arm.model, self.data))
                    self._check_head(other)
                    caches[arm.name] = other.cache
                    said += [f"{arm.name}: {note}" for note in self._odd(other) if note not in said]
                    other.release()
            others = tuple(self.arms[1 : len(self.written)])
            plan = replace(plan, others=others, caches=self._checked(caches))
            if dry_run:
                plan = replace(plan, costs=self._costs(plan))
        show_plan(plan)
        for note in said:
            self.warn(note)
        return plan

    def _rehearsed(self, arm: Arm, student: Model, images: int = 2) -> Plan:
        teacher, model = self.teachers.of(arm.written), self.teachers.model_of(arm.written)
        plan = rehearsed(arm, student, model, self.data, self.session, images=images)
        tuned_in = str(teacher.folder) if teacher and teacher.recipe.finetune_teacher else ""
        return replace(plan, cache=cache_of(plan, self.session, tuned_in))

    def _checked(self, found: Mapping[str, Cache | None]) -> tuple[Cache, ...]:
        """The caches of the arms by name, once it is sure that they can be used, and fit on the disk."""
        caches = together(
            {name: replace(cache, done=self._done(name, cache)) for name, cache in found.items() if cache}
        )
        for cache in caches:
            cache.check_place()
            if cache.place.resolve().is_relative_to(self.folder.resolve()):
                raise UserError(
                    f"--teacher-cache {cache.place} is in the run's own folder, and would go with it",
                    "name another folder, which runs can share",
                )
            cache.check_others()
        try:
            check_disk(caches)
        except UserError as problem:
            if any(cache.tuned_in for cache in caches):
                self.warn(f"{problem.message}, unless the fine-tuned teacher was asked before")
            elif self.resume or (caches[0].place.is_dir() and not os.access(caches[0].place, os.W_OK)):
                # the students so far are worth more than the cache, and one to be read takes no more
                self.keeps = False
                self.warn(
                    f"{problem.message}: the run reads what is there, and runs the teacher for the rest"
                )
            else:
                raise
        return tuple(caches)

    def _done(self, name: str, cache: Cache) -> int:
        """How many updates a resumed run is past, with all seeds of an arm, and sees no more."""
        arms = [arm for arm in self.arms if arm.name == name]
        if not self.resume or arms[0].updates > cache.updates:
            return 0
        return min(cache.updates, *(checkpoint.newest(arm.checkpoints) for arm in arms))

    def _leaves_head(self, plan: Plan) -> bool:
        """Is there a head that would be scored, and no term that trains it?"""
        taps = plan.learner.objective.student_taps
        return bool(self.data.labelled and plan.student.spec.num_classes and LOGITS not in taps)

    def _check_head(self, plan: Plan) -> None:
        """Refuse to compare an arm by the answers of a head that nothing trains."""
        if len(self.written) > 1 and self._leaves_head(plan):
            raise UserError(
                f"no term of {plan.arm.name} ({plan.arm.formula}) trains the student's head, by whose "
                "answers arms are compared",
                "add labels or kd to it, or score all by nearest neighbours: --num-classes 0",
            )

    def _odd(self, plan: Plan) -> list[str]:
        """What a person should know of an arm before it is trained."""
        student, teacher, objective = plan.student, plan.teacher, plan.learner.objective
        said = [*student.notes, *(teacher.notes if teacher else ()), *objective.warnings]
        said += plan.recipe.pointless(plan.arm.updates_per_epoch, plan.arm.updates)
        own = self.arms[0]
        if plan.arm.updates != own.updates:
            said.append(f"trained for {plan.arm.updates:,} updates, {own.name} for {own.updates:,}")
        said += plan.cache.odd(self.session.device.type) if plan.cache else ()
        if self._leaves_head(plan):
            left = "its head stays as it began; --num-classes 0 leaves it out"
            said.append(f"no term reads the student's logits: {left}")
        batch_norm = any(isinstance(layer, _BatchNorm) for layer in student.net.modules())
        if self.session.recipe.num_processes > 1 and not plan.recipe.sync_bn and batch_norm:
            said.append("its BatchNorm layers see each process's own images; --sync-bn, on GPUs: all")
        if frozen := plan.rehearsal.frozen:
            said.append(f"no term reaches {', '.join(frozen[:4])}: frozen")
        if teacher and teacher.parameters < student.parameters:
            names = f"the teacher ({teacher.spec.name}) is smaller than the student ({student.spec.name})"
            said.append(names)
        return said

    def _costs(self, first: Plan) -> tuple[Estimate, ...]:
        """What each model costs that the run trains, in their order, and the teachers' scores."""
        session, costs, images = self.session, [], first.rehearsal.images
        for _, tuning in self._tunings():
            model = student_of(tuning.recipe, tuning.model, self.data)
            plan = rehearsed(tuning, model, None, self.data, session, images=images)
            costs.append(cost_of(plan, session, TUNING))
        for teacher in self.teachers:
            seconds = 0.0 if teacher.unscored else scoring_seconds(teacher.model, self.data, session)
            costs.append(Estimate("scoring the teacher", validation=seconds))
        plans = {first.arm.name: cost_of(first, session, "")}
        for arm in self.arms:
            if arm.name not in plans:
                student = student_of(arm.recipe, arm.model, self.data)
                plan = self._rehearsed(arm, student, images)
                plans[arm.name] = cost_of(plan, session, "")
                plan.release()
            costs.append(replace(plans[arm.name], title=f"{arm.name} ({arm.recipe.seed})"))
        return tuple(costs)

    def _open(self, looked_at: Readable) -> None:
        """Take the run folder. Only now: what was refused leaves nothing that a second try would find."""
        if not self.resume:
            self._lock()
            self._check_folder()  # somebody may have been here since
        open_folder(self.folder, self.recipe, self.data, self.resume)
        looked_at.keep(self.folder)

    # The teachers ---------------------------------------------------------------------------------------

    def _tunings(self) -> list[tuple[RunTeacher, Arm]]:
        tunings = ((teacher, teacher.tuning(self.data)) for teacher in self.teachers)
        return [(teacher, arm) for teacher, arm in tunings if arm is not None]

    def _finetune(self, tunings: list[tuple[RunTeacher, Arm]]) -> None:
        if not tunings:
            return
        self.plan = None  # its memory is wanted, and that of the models
        for teacher, _ in tunings:
            teacher.models.clear()
        for number, (teacher, arm) in enumerate(tunings):
            self.session.reporter.stage = number
            batches = f"{arm.recipe.epochs} epochs, batches of {arm.recipe.batch}"
            self.say(f"fine-tuning the {teacher.title} for {batches} → {arm.folder}/student")
            teacher.tuned(self._train(arm).student)
        for teacher, _ in tunings:
            teacher.build(self.student, self.data, self.session)
        self.session.all_together(self._share)

    def _score(self, teacher: RunTeacher) -> None:
        """Say what a teacher is worth on this data, at the size at which it is used."""
        session, model = self.session, teacher.model
        size = f"{model.spec.name} at {'×'.join(map(str, model.spec.input_size))}"
        score, why = teacher.validation(self.data, session)
        if score is None:
            self.say(f"{teacher.title}  {size}: no accuracy to report, {why}")
            return
        if not isinstance(model.net, FSDPModule):  # which is in its place
            model.to(session.device, session.dtype)
        metrics = teacher.metrics = score(model.net)
        self.say(
            f"{teacher.title}  {size}: top-1 {metrics.top1:.2f}, top-5 {metrics.top5:.2f} "
            f"on {metrics.count:,} validation images"
        )
        teacher.result = self._result(
            teacher.title, self.recipe.seed, teacher.folder, model, model.net, metrics
        )
        session.main_process_first(partial(write_rows, teacher.result.answers, metrics.rows))
        if doubt := doubt_about(metrics, self.student, self.data, teacher.recipe, session):
            self.warn(doubt)

    # The students ---------------------------------------------------------------------------------------

    def _train(self, arm: Arm) -> Result:
        """Train one student in its own folder, score it and save it; the first one as it was rehearsed."""
        session, recipe, data = self.session, arm.recipe, self.data
        plan, self.plan = self.plan, None
        own = self.teachers.of(arm.written)
        taught_by = own.title if own else None
        if self.resume and (done := Result.read(arm.folder, arm.updates, recipe.verify, self.warn)):
            self.say(f"{arm.name} (seed {done.seed}) is finished already")
            session.main_process_first(arm.strip)
            return replace(done, taught_by=taught_by)
        session.main_process_first(arm.open)
        if plan is None:
            with session.reporter.bar("rehearsing", 0):
                plan = self._rehearsed(arm, student_of(recipe, arm.model, data))
        if plan.cache:
            plan = replace(plan, cache=replace(plan.cache, keeps=self.keeps))
        student = plan.student
        validation = Validation.of(student, data, recipe, session)
        trainer = Trainer(plan, validation, session)
        chosen = trainer.fit(self.resume)
        waited = trainer.pace.share
        metrics, progress = validation(chosen) if validation else None, trainer.progress
        if metrics and metrics.loss is not None and not math.isfinite(metrics.loss):
            raise diverged(arm, arm.updates, "the validation's loss")
        taught = own or self.teachers.first
        said = taught.metrics if taught else None
        result = replace(
            self._result(arm.name, recipe.seed, arm.folder, student, chosen, metrics),
            agreement=metrics.agreement(said) if metrics and said and metrics.count == said.count else None,
            skipped_images=sum(progress.skipped.values()),
            updates=arm.updates,
            history=tuple(progress.history),
            taught_by=taught_by,
            data_wait=waited,
        )
        if recipe.shard:
            chosen = self._whole(arm, chosen)
        session.main_process_first(lambda: self._save(plan, trainer, chosen, result, metrics))
        plan.release()
        return result

    def _whole(self, arm: Arm, shared: nn.Module) -> nn.Module:
        """A student's network with all of its weights, in host memory; on the first process alone."""
        state = gathered(shared.state_dict(), self.session)
        if not self.session.accelerator.is_main_process:
            return shared
        net = student_of(arm.recipe, arm.model, self.data).net.to(self.session.dtype)
        copy_weights(net, state)
        return net

    def _result(
        self, arm: str, seed: int, folder: Path, model: Model, net: nn.Module, metrics: Metrics | None
    ) -> Result:
        """The figures of a trained network, or of the teacher."""
        shared = isinstance(net, FSDPModule)  # such a one has no speed of its own
        speed, batch = (None, None) if shared else images_per_second(net, model, self.session)
        figures: dict[str, Any] = {"images_per_second": speed, "speed_batch": batch}
        if metrics:
            figures |= {"images": metrics.count, **metrics.figures}
        return Result(arm, seed, str(folder), model.spec.name, model.parameters, **figures)

    def _save(
        self, plan: Plan, trainer: Trainer, chosen: nn.Module, result: Result, metrics: Metrics | None
    ) -> None:
        """Write a student's folder and answers, then its figures."""
        arm, recipe = plan.arm, plan.recipe
        if metrics:
            write_rows(result.answers, metrics.rows)
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
        scored = [teacher.result for teacher in self.teachers if teacher.result]
        main = self.teachers.first
        first, more = (scored[0], scored[1:]) if main and main.result else (None, scored)
        run = Run(self.folder, self.recipe, tuple(results), first, tuple(more))
        self.session.main_process_first(run.write)
        self.session.end()
        return run
