"""What the study trains: data, teachers, and the arms of the paper's tables.

The paper sums over tokens and channels of DeiT-S, N = 196 and D = 384, and weighs the sums by α = 3e-5
and β = 3e-6. Here N = 16 and D is 96 or 192. A mean in place of a sum is independent of both, so every weight
here is the paper's, on a mean: α · 2 · N · D = 4.52 for two blocks, 2.26 for one, β · N · D = 0.226.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitkd_cli.recipe import Recipe, find_recipe

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2, 3, 4, 5)
SMALL = "img_size=32,patch_size=8,num_heads=3"
EIGHTHS = "img_size=32,patch_size=4"
ALPHA, BETA, N, D = 3e-5, 3e-6, 196, 384  # the paper's, and DeiT-S at 224 pixels
ONE_BLOCK, GENERATED = ALPHA * N * D, BETA * N * D  # 2.258 and 0.2258, on means


@dataclass(frozen=True)
class DataSet:
    """Images, and how long a student learns on them.

    Attributes:
        source: ``digits`` or ``glyphs``.
        shots: images of each class that a student sees; None: all.
        updates: of a student.
        lengths: other numbers of updates, of the arms of ``CURVE``; twice ``updates`` is for equal time.
        batch: images of an update.
        whole: every arm is trained here; elsewhere those of ``MAIN``.
        student: name and keyword arguments.
        teacher: of all arms, in place of their own.
        device: that it is sized for.
    """

    source: str
    shots: int | None
    about: str
    updates: int = 1600
    lengths: tuple[int, ...] = (3200,)
    batch: int = 25
    whole: bool = False
    student: tuple[str, str] = ("vit_tiny_patch16_224", f"{SMALL},depth=4,embed_dim=48")
    teacher: str | None = None
    device: str = "cpu"

    def teacher_of(self, arm: str) -> str:
        """Of ``TEACHERS``."""
        return self.teacher or (ARMS[arm].teacher if arm in ARMS else "wide")

    @property
    def classes(self) -> int:
        """Of its source."""
        return 10 if self.source == "digits" else 47

    @property
    def images(self) -> int:
        """That a student sees in an epoch."""
        everything = 1297 if self.source == "digits" else 2444
        return everything if self.shots is None else self.shots * self.classes

    @property
    def arms(self) -> list[str]:
        """The arms that are trained on it."""
        return [*ARMS, *TASKS] if self.whole else list(MAIN)


DATA = {
    "digits-10": DataSet(
        "digits", 10, "100 scans of digits, 10 of each", lengths=(100, 200, 400, 800, 3200), whole=True
    ),
    # In batches of 25 the student alone has 50 % after 6,400 updates; of 94, in that time, 61 % after 3,200.
    "glyphs-10": DataSet(
        "glyphs", 10, "470 letters, 10 of each of 47 classes", 1600, (400, 800, 3200), batch=94
    ),
    "digits-25": DataSet("digits", 25, "250 scans of digits, 25 of each"),
    "digits-all": DataSet("digits", None, "all 1,297 scans of digits"),
    # The paper's shapes, 12 blocks of DeiT-S and DeiT-Ti, on 8 × 8 tokens: `--only glyphs-deep --minutes 9
    # --jobs 5` on one GPU, a seed in each process. At some 20 ms an update the teacher takes a minute and
    # the ten students of a seed five, after one another.
    "glyphs-deep": DataSet(
        *("glyphs", None, "all 2,444 letters, DeiT-S and DeiT-Ti"),
        lengths=(),
        batch=94,
        student=("deit_tiny_patch16_224", EIGHTHS),
        teacher="deep",
        device="cuda",
    ),
}

# The guidelines and the methods that the paper compares: trained on every data set.
MAIN = (
    *("alone", "mimic last", "generate last", "mimic 0 1", "generate 0 1", "mimic 0 1 mha"),
    *("vitkd", "nkd", "vitkd + nkd", "kd"),
)
TASKS = ("timm, logits", "timm, features")  # timm's own, in a plain loop
# Compared with a student alone of twice the updates, too.
EQUAL_TIME = (
    "vitkd",
    "nkd",
    "vitkd + nkd",
    "mimic last",
    "kd",
    "kd standardised",
    "dist",
    "dkd",
    "relations",
)


CURVE = ("alone", "vitkd + nkd")  # until when do they improve? Trained with other lengths, too


@dataclass(frozen=True)
class TeacherModel:
    """A teacher, trained on all training images of a source.

    Attributes:
        stands_for: the paper's.
        epochs: on the digits, until it learns no more; on the glyphs four times as many.
    """

    name: str
    kwargs: str
    stands_for: str
    epochs: int = 40
    device: str = "cpu"


TEACHERS = {
    "narrow": TeacherModel("vit_tiny_patch16_224", f"{SMALL},depth=4,embed_dim=48", "the student", 80),
    "wide": TeacherModel("vit_tiny_patch16_224", f"{SMALL},depth=4,embed_dim=96", "DeiT-S"),
    "wider": TeacherModel("vit_tiny_patch16_224", f"{SMALL},depth=4,embed_dim=192", "DeiT III-S", 120),
    "cait": TeacherModel("cait_xxs24_224", f"{SMALL},depth=4,embed_dim=96", "CaiT-S24", 120),
    "deep": TeacherModel("deit_small_patch16_224", EIGHTHS, "DeiT-S", 20, "cuda"),
}


def mimic(*blocks: int, **options: Any) -> str:
    """The paper's linear mimicking at its weight: the mean over blocks, so as many times that of one."""
    more = "".join(f', {key}="{value}"' for key, value in options.items())
    return f'{ONE_BLOCK * len(blocks):.4g}*mimic(blocks={blocks!r}, reduce="mean"{more})'


def correlation(width: int, *blocks: int) -> str:
    """The correlation matrix at the paper's weight, for a teacher of this width.

    A sum over N × N correlations of tokens over √D, which grow with √D: squares grow with N² · D.
    """
    return f"{ALPHA * (N / 16) ** 2 * D / width:.3g}*correlation(blocks={blocks!r})"


def generate(block: int = -1, **options: Any) -> str:
    more = "".join(f', {key}="{value}"' for key, value in options.items())
    return f'{GENERATED:.4g}*generate(block={block}, reduce="mean"{more})'


def vitkd(alpha: float = ALPHA, beta: float = BETA) -> str:
    """ViTKD on means."""
    shallow = f'{2 * alpha * N * D:.4g}*mimic(blocks=(0, 1), reduce="mean")'
    return f'{shallow} + {beta * N * D:.4g}*generate(block=-1, reduce="mean")'


@dataclass(frozen=True)
class ArmOf:
    """An arm of the study.

    Attributes:
        loss: its formula.
        teacher: of ``TEACHERS``.
    """

    loss: str
    teacher: str = "wide"


def _weighed(teacher: str) -> dict[str, ArmOf]:
    """ViTKD with its weights on sums, as the paper has them, on standardised targets, and as shares.

    Its weights on means are the arm ``vitkd`` of the teacher.
    """
    forms = {
        "vitkd sum": "vitkd",
        "vitkd layer": f"{mimic(0, 1, target_norm='layer')} + {generate(target_norm='layer')}",
        "vitkd balance 0.1": "vitkd(balance=0.1)",
        "vitkd balance 0.3": "vitkd(balance=0.3)",
    }
    if teacher == "narrow":
        forms["vitkd"] = vitkd()
    end = "" if teacher == "wide" else f" ({teacher})"
    return {f"{name}{end}": ArmOf(f"labels + {loss}", teacher) for name, loss in forms.items()}


def _shared(teacher: str) -> dict[str, ArmOf]:
    """What the paper trains with several teachers."""
    end, width = ("", 96) if teacher == "wide" else (f" ({teacher})", 192)
    losses = {
        "mimic last": mimic(-1),
        "correlation last": correlation(width, -1),
        "generate last, cross-attention": generate(generator="cross_attention"),
        "generate last, self-attention": generate(generator="self_attention"),
        "generate last": generate(),
        "mimic 0 1": mimic(0, 1),
        "correlation 0 1": correlation(width, 0, 1),
        "generate 0 1": f"{generate(0)} + {generate(1)}",
        "mimic 0 1 mha": mimic(0, 1, at="mha"),
        "vitkd": vitkd(),
        "vitkd + nkd": f"{vitkd()} + nkd",
        "nkd": "nkd",
    }
    arms = {f"{name}{end}": ArmOf(f"labels + {loss}", teacher) for name, loss in losses.items()}
    arms[f"kd half{end}"] = ArmOf("0.5*labels + 0.5*kd", teacher)
    return arms


ARMS: dict[str, ArmOf] = {
    "alone": ArmOf("labels"),
    **_shared("wide"),
    "mimic last half": ArmOf(f"labels + {mimic(2, 3)}"),
    "mimic all": ArmOf(f"labels + {mimic(0, 1, 2, 3)}"),
    "mimic 0": ArmOf(f"labels + {mimic(0)}"),
    "mimic 1": ArmOf(f"labels + {mimic(1)}"),
    "mimic 2": ArmOf(f"labels + {mimic(2)}"),
    "mimic 0 1 2": ArmOf(f"labels + {mimic(0, 1, 2)}"),
    # The methods since.
    "kd": ArmOf("labels + kd"),
    "kd T4": ArmOf("labels + kd(temperature=4)"),
    "kd standardised": ArmOf("labels + 9*kd(temperature=2, standardize=true)"),
    "dist": ArmOf("labels + dist"),
    "dkd": ArmOf("labels + dkd"),
    "vkd": ArmOf("labels + vkd"),
    "spectral": ArmOf("labels + 0.2*spectral"),
    "relations": ArmOf("labels + relations"),
    "features": ArmOf("labels + features"),
    # Fig. 5.
    **{f"alpha {a}": ArmOf(f"labels + {vitkd(alpha=a * 1e-5)}") for a in (2, 4, 5, 6)},
    **{f"beta {b}": ArmOf(f"labels + {vitkd(beta=b * 1e-6)}") for b in (2, 4, 5, 6)},
    **_shared("wider"),
    "mimic 0 1 (cait)": ArmOf(f"labels + {mimic(0, 1)}", "cait"),
    # The weights, at three widths of the teacher.
    **{name: arm for teacher in ("narrow", "wide", "wider") for name, arm in _weighed(teacher).items()},
}


def student_recipe(data: DataSet, place: str, seed: int, updates: int) -> Recipe:
    """The student trained alone; the arms change its formula."""
    epochs = max(1, round(updates / (data.images // data.batch)))
    return Recipe.from_toml(find_recipe("tiny-cpu")).but(
        data=place,
        shots=data.shots,
        student=data.student[0],
        model_kwargs=data.student[1],
        teacher_kwargs=None,
        teacher_pretrained=True,
        finetune_teacher=0,
        baseline=False,
        seeds=1,
        seed=seed,
        batch_size=data.batch,
        epochs=epochs,
        warmup_epochs=epochs / 20,
        val_interval=10_000,
        recovery_interval=100_000,
        log_interval=200,
        log_grads=400,
        device=data.device,
    )


def teacher_recipe(source: str, place: str, model: TeacherModel) -> Recipe:
    return Recipe.from_toml(find_recipe("tiny-cpu")).but(
        data=place,
        shots=None,
        student=model.name,
        model_kwargs=model.kwargs,
        teacher=None,
        teacher_kwargs=None,
        finetune_teacher=0,
        baseline=False,
        seeds=1,
        loss="labels",
        epochs=model.epochs * (4 if source == "glyphs" else 1),
        warmup_epochs=3,
        batch_size=64,
        val_interval=20,
        log_interval=500,
        device=model.device,
    )
