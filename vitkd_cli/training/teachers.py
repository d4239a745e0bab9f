"""The teachers of a run: each is built, fine-tuned and scored once, for all the arms that share it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitkd_cli.data.images import ImageData
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Metrics
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session
from vitkd_cli.training.arms import WrittenArm, formula_of
from vitkd_cli.training.folder import Result
from vitkd_cli.training.models import origin, teacher_of, tuned, tuning_of, with_classes_of
from vitkd_cli.training.plan import Arm
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
        reads_logits: some formula reads its logits, so it has its own image size.
        model: None while models are fine-tuned, whose memory is wanted.
        unscored: why it has no accuracy.
    """

    recipe: Recipe
    name: Resolved
    title: str
    folder: Path
    reads_logits: bool
    model: Model | None = None
    unscored: str = ""
    result: Result | None = None
    metrics: Metrics | None = None

    def build(self, student: Model, data: ImageData, session: Session) -> None:
        """Build it; one that knows the data's classes answers with these alone."""
        recipe, name = self.recipe, self.name
        self.model = teacher_of(recipe, self.reads_logits, name, student, data)
        if not data.labelled or recipe.finetune_teacher:
            return
        try:
            self.model = with_classes_of(data, self.model, session.reporter)
        except UserError as problem:
            if self.reads_logits:
                raise
            self.unscored = problem.message

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
        assert self.model is not None
        classes = self.model.spec.num_classes
        score = None if self.unscored else Validation.of(self.model, data, self.recipe, session)
        why = self.unscored or "it has no classes"
        if data.val is None:
            why = "there is no validation split"
        elif classes and not self.unscored:
            why = f"its {classes} classes are not the data's {data.num_classes}"
        return score, why


class Teachers:
    """All teachers of a run, by what tells them apart; the first is the run's own."""

    def __init__(self, recipe: Recipe, arms: list[WrittenArm], folder: Path) -> None:
        self._by_settings: dict[tuple[Any, ...], RunTeacher] = {}
        for arm in arms:
            if not arm.formula.uses_teacher:
                continue
            key, logits = _key(recipe, arm.changes), arm.formula.reads_teacher_logits
            if (known := self._by_settings.get(key)) is not None:
                known.reads_logits |= logits
                continue
            own = recipe.but(**{k: v for k, v in arm.changes.items() if k in TELLS_TEACHERS_APART})
            first = not self._by_settings
            title = "teacher" if first else f"teacher of {arm.name}"
            place = folder / ("teacher" if first else f"{arm.place}-teacher")
            name = resolve(own.teacher or "", role="teacher")
            self._by_settings[key] = RunTeacher(own, name, title, place, logits)
        self._recipe = recipe

    def __iter__(self) -> Iterator[RunTeacher]:
        return iter(self._by_settings.values())

    def of(self, arm: WrittenArm) -> RunTeacher | None:
        """The teacher of an arm; None if it has none."""
        return self._by_settings[_key(self._recipe, arm.changes)] if arm.formula.uses_teacher else None

    @property
    def first(self) -> RunTeacher | None:
        return next(iter(self), None)

    def settle(self, num_classes: int, say: Callable[[str], None]) -> None:
        """Settle which weights each has for data of so many classes, and say so."""
        for one in self:
            if one.reads_logits and num_classes and not one.recipe.finetune_teacher:
                one.name = teacher_tag_for(one.name, num_classes)
            if one.name.name.startswith("local-dir:"):
                one.recipe = one.recipe.but(teacher_pretrained=True)  # a folder of weights is never emptied
            recipe, said = one.recipe, "" if one.title == "teacher" else f" ({one.title})"
            say(f"teacher  {origin(one.name, recipe.teacher_pretrained, recipe.teacher_checkpoint)}{said}")
            own = recipe.teacher_pretrained and recipe.teacher_checkpoint is None
            if own and (better := better_tags(one.name)):
                top1 = published_top1(one.name.name)
                others = ", ".join(f".{tag} ({value:.2f})" for tag, value in better[:3])
                say(f"         published top-1 {top1:.2f}; better tags of it: {others}")


def _key(recipe: Recipe, changes: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(changes.get(key, getattr(recipe, key)) for key in TELLS_TEACHERS_APART)
