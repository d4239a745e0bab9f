"""The teachers of a run: each is built, fine-tuned and scored once, for all the arms that share it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from vitkd_cli.data.images import ImageData
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Metrics
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session
from vitkd_cli.training.arms import WrittenArm, formula_of
from vitkd_cli.training.folder import Result
from vitkd_cli.training.models import origin, teacher_of, tuned, tuning_of, with_classes_of
from vitkd_cli.training.plan import Arm
from vitkd_cli.training.sharding import shared
from vitkd_cli.training.validation import Validation
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import Resolved, better_tags, published_top1, resolve, teacher_tag_for

TELLS_TEACHERS_APART = (
    *("teacher", "teacher_checkpoint", "teacher_pretrained", "teacher_img_size", "teacher_kwargs"),
    *("finetune_teacher", "use_ema"),
)


@dataclass
class RunTeacher:
    """A teacher, and the arms that it teaches.

    Attributes:
        recipe: the run's, with this teacher.
        title: ``teacher``; of any but the first with its arm's name.
        folder: where it is fine-tuned, and its answers are kept.
        uses: whether its logits are read, of each arm: where they are, it has its own image size.
        models: by whether its logits are read; none while models are fine-tuned, whose memory is wanted.
        unscored: why it has no accuracy.
    """

    recipe: Recipe
    name: Resolved
    title: str
    folder: Path
    uses: set[bool] = field(default_factory=set)
    models: dict[bool, Model] = field(default_factory=dict)
    unscored: str = ""
    result: Result | None = None
    metrics: Metrics | None = None

    @property
    def model(self) -> Model:
        """As it is scored: where it can, with its logits read."""
        return self.models[max(self.uses)]

    def build(self, student: Model, data: ImageData, session: Session) -> None:
        """Build it; one that knows the data's classes answers with these alone.

        One whose weights will be shared is built by the first process.
        """
        if self.recipe.shard_teacher and not session.accelerator.is_main_process:
            return
        for reads_logits in sorted(self.uses, reverse=True):
            model = teacher_of(self.recipe, reads_logits, self.name, student, data)
            if self.models and model.spec.input_size == self.model.spec.input_size:
                model = self.model
            elif data.labelled and not self.recipe.finetune_teacher:
                try:
                    model = with_classes_of(data, model, session.reporter)
                except UserError as problem:
                    if reads_logits:
                        raise
                    self.unscored = "" if self.models else problem.message
            self.models[reads_logits] = model

    def share(self, session: Session) -> None:
        """Leave each process its part of the weights, if the recipe says so; all together."""
        if self.recipe.shard_teacher:
            self.models = shared(self.models, session)
            [self.unscored] = broadcast_object_list([self.unscored])  # the first process built it alone

    def tuning(self, data: ImageData) -> Arm | None:
        """The arm of ``--finetune-teacher``: the teacher with a new head, on all training images."""
        images = data.train_all or data.train
        if not self.recipe.finetune_teacher or not images or not data.train:
            return None
        recipe = tuning_of(self.recipe, len(data.train), len(images))
        return Arm(WrittenArm(self.title, formula_of(recipe), {}), self.name, recipe, self.folder, images)

    def tuned(self, student: Path) -> None:
        """From now on it is what was fine-tuned."""
        self.recipe = tuned(self.recipe, str(student))
        self.name = resolve(str(student))

    def validation(self, data: ImageData, session: Session) -> tuple[Validation | None, str]:
        """What scores it; or why nothing can."""
        classes = self.model.spec.num_classes
        score = None if self.unscored else Validation.of(self.model, data, self.recipe, session)
        why = self.unscored or "it has no classes"
        if data.val is None:
            why = "there is no validation split"
        elif classes and not self.unscored:
            why = f"its {classes} classes are not the data's {data.num_classes}"
        return score, why


class Teachers:
    """All teachers of a run, by what tells them apart; the first is the run's own.

    Args:
        num_classes: of the data; 0 where it has no labels.
        arms: neither order nor number may change what teaches one of them: a run can be resumed with more.
    """

    def __init__(self, recipe: Recipe, arms: list[WrittenArm], folder: Path, num_classes: int) -> None:
        by_settings: dict[tuple[Any, ...], RunTeacher] = {}
        self._of: dict[str, RunTeacher] = {}
        for arm in arms:
            if not arm.formula.uses_teacher:
                continue
            own = recipe.but(**{k: v for k, v in arm.changes.items() if k in TELLS_TEACHERS_APART})
            name, logits = resolve(own.teacher or "", role="teacher"), arm.formula.reads_teacher_logits
            if logits and num_classes and not own.finetune_teacher:
                name = teacher_tag_for(name, num_classes)
            if name.name.startswith("local-dir:"):
                own = own.but(teacher_pretrained=True)  # a folder of weights is never emptied
            title = f"teacher of {arm.name}" if by_settings else "teacher"
            place = folder / (f"{arm.place}-teacher" if by_settings else "teacher")
            key = (name.name, *(getattr(own, key) for key in TELLS_TEACHERS_APART))
            one = self._of[arm.name] = by_settings.setdefault(key, RunTeacher(own, name, title, place))
            one.uses.add(logits)
        self._all = tuple(by_settings.values())

    def __iter__(self) -> Iterator[RunTeacher]:
        return iter(self._all)

    def of(self, arm: WrittenArm) -> RunTeacher | None:
        """The teacher of an arm; None if it has none."""
        return self._of.get(arm.name)

    def model_of(self, arm: WrittenArm) -> Model | None:
        """The same, built at the size at which that arm reads it."""
        teacher = self.of(arm)
        return teacher.models[arm.formula.reads_teacher_logits] if teacher else None

    @property
    def first(self) -> RunTeacher | None:
        return next(iter(self), None)

    def introduce(self, say: Callable[[str], None]) -> None:
        """Say which weights each has."""
        for one in self:
            recipe, said = one.recipe, "" if one.title == "teacher" else f" ({one.title})"
            say(f"teacher  {origin(one.name, recipe.teacher_pretrained, recipe.teacher_checkpoint)}{said}")
            own = recipe.teacher_pretrained and recipe.teacher_checkpoint is None
            if own and (better := better_tags(one.name)):
                top1 = published_top1(one.name.name)
                others = ", ".join(f".{tag} ({value:.2f})" for tag, value in better[:3])
                say(f"         published top-1 {top1:.2f}; better tags of it: {others}")
