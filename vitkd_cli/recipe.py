"""Everything that decides the outcome of a run, written down once.

Each field is declared in one place with its type, range and help; the command line's flags, the
TOML format and the table in docs/recipes.md are all read off this dataclass. Names, formulas and
folders are resolved where they are used, not here.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from vitkd_cli.errors import UserError, expanded
from vitkd_cli.options import Field, Option, Request, declared
from vitkd_cli.text import folder_in, last_name, without_places

SCHEMA_VERSION = 1
SAMPLE = "digits"
WDS = "wds:"  # before the tars of a WebDataset
# Fields that may name a file or folder: what is read as it is, and models.
READS = ("data", "val_data", "data_dir", "teacher_checkpoint", "initial_checkpoint", "class_map")
PLACES = (*READS, "teacher", "student")
FEW_IMAGES = 2_000  # below, batch and learning rate that nobody gave are fitted to the data
A_QUARTER = "a quarter of the epochs"  # where a recipe's warm-up is from that is long for the run
UPDATES_WANTED = 20  # an epoch
SMALL_BATCH = 128
LARGE_BATCH = 4_096
# Those that were seen to do the same with parts of weights as with whole ones, to round-off.
SHARED_OPTIMISERS = ("adamw", "adam", "nadamw", "sgd", "momentum", "lamb", "lion")
SWEEP_TABLES = ("vary", "sweep")  # of a recipe's file, which are for ``vitkd sweep``
Range2 = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Models(Request):
    """The teacher, the student, and where their weights come from."""

    panel = "Models"

    # fmt: off
    teacher: Annotated[str | None, Option("Any timm ViT: short name, name.tag, hf-hub:…, local-dir:…, or a run folder. Needed if the loss reads a teacher.")] = None
    student: Annotated[str | None, Option("The model to train, named the same way.")] = None
    teacher_checkpoint: Annotated[str | None, Option("Weights for the teacher: .safetensors, or .pth read without executing pickle.")] = None
    teacher_pretrained: Annotated[bool, Option("The teacher's pretrained weights; without them it is random, on purpose.")] = True
    teacher_img_size: Annotated[int | None, Option("Side of the images the teacher sees, in pixels. Unset: its own size where its logits are read, else the size that gives the student's grid.", minimum=1, maximum=8192)] = None
    teacher_kwargs: Annotated[str | None, Option("k=v,… handed to the teacher's constructor.")] = None
    finetune_teacher: Annotated[int, Option("First fine-tune the teacher on the data, with a new head, for this many epochs.", minimum=0)] = 0
    pretrained: Annotated[bool, Option("Start the student from its pretrained weights.")] = False
    initial_checkpoint: Annotated[str | None, Option("Start the student from this weight file.")] = None
    use_ema: Annotated[bool, Option("Take the averaged weights of these weight files (model_ema, state_dict_ema), not the raw ones.")] = False
    model_kwargs: Annotated[str | None, Option("k=v,… handed to the student's constructor.")] = None
    img_size: Annotated[int | None, Option("Side of the images the student sees, in pixels; unset: the model's own.", minimum=1, maximum=8192)] = None
    in_chans: Annotated[int | None, Option("Image channels; unset: the model's own.", minimum=1, maximum=1024)] = None
    drop_path: Annotated[float | None, Option("Stochastic depth of the student; unset: 0, or 0.1 from 80 M parameters. The teacher never drops.", minimum=0, maximum=0.9)] = None
    verify: Annotated[bool, Option("--no-verify: take a folder whose files do not fit its manifest.")] = True
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Loss(Request):
    """What is minimised."""

    panel = "Objective"

    # fmt: off
    loss: Annotated[str, Option("The formula that is minimised, literally: no term is implied.")] = "labels + vitkd + nkd"
    plugin: Annotated[str | None, Option("Python files that add terms to the formula's words, comma-separated.")] = None
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Data(Request):
    """Which images, and how they are read."""

    panel = "Data"

    # fmt: off
    data: Annotated[str | None, Option("Image folder (train/ + val/, or class folders), tars of them, wds:FOLDER or wds:PATTERN.tar with WebDataset's tars, or a timm dataset such as hfds/timm/imagenet-1k. Unset: $VITKD_DATA, else the built-in sample.")] = None
    data_dir: Annotated[str | None, Option("Root folder of a timm dataset; alone it means --data.")] = None
    train_split: Annotated[str, Option("Name of the training split.")] = "train"
    val_split: Annotated[str, Option("Name of the validation split.")] = "validation"
    val_fraction: Annotated[float, Option("Stratified, seeded share set aside where the data has no validation split.", minimum=0.0, maximum=0.9)] = 0.1
    val_data: Annotated[str | None, Option("Labelled folder or dataset to validate on in place of --data's own split. A student without a head is scored by its nearest neighbours there.")] = None
    shots: Annotated[int | None, Option("Use only this many training images of each class; a teacher fine-tuned here still sees them all.", minimum=1)] = None
    class_map: Annotated[str | None, Option("File with one class folder name a line, in label order.")] = None
    num_classes: Annotated[int | None, Option("Classes; unset: counted in the data. 0: a student without a head.", minimum=0)] = None
    dataset_download: Annotated[bool, Option("Let timm download a torch/tfds/hfds dataset.")] = False
    input_key: Annotated[str | None, Option("Field that holds the image (hfds, tfds); for files, the endings that count.")] = None
    target_key: Annotated[str | None, Option("Field that holds the label.")] = None
    shuffle_block: Annotated[int | None, Option("Shuffle tars, and images within so many tars at a time: an update then reads from few of them. Unset: all images at once.", minimum=1)] = None
    remote_cache: Annotated[float | None, Option("GiB of local disk for copies of tars that are read over a network; the one that was used longest ago goes first.", above=0, unset="64")] = None
    skip_corrupt: Annotated[bool, Option("Go on without unreadable images: in training another of the class takes the place, validation leaves them out; each is counted and listed.")] = False
    exif: Annotated[bool, Option("Turn photographs upright as their EXIF says; --no-exif: timm's way.")] = True
    alpha_fill: Annotated[str, Option("Colour behind what is transparent: a name, or #rrggbb.")] = "white"
    max_pixels: Annotated[int, Option("Refuse pictures of more pixels before they are decoded; in memory, a pixel takes 4 bytes.", minimum=1)] = 120_000_000
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Augmentation(Request):
    """What training and validation make of an image."""

    panel = "Augmentation"

    # fmt: off
    aa: Annotated[str, Option("timm's auto-augment string; 'none' switches it off.")] = "rand-m9-mstd0.5-inc1"
    reprob: Annotated[float, Option("Random erasing: probability.", minimum=0, maximum=1)] = 0.25
    remode: Annotated[Literal["const", "rand", "pixel"], Option("Random erasing: what the rectangle is filled with.")] = "pixel"
    recount: Annotated[int, Option("Random erasing: rectangles.", minimum=1, maximum=100)] = 1
    mixup: Annotated[float, Option("Mixup alpha; 0 switches it off.", minimum=0, maximum=100)] = 0.8
    cutmix: Annotated[float, Option("CutMix alpha; 0 switches it off.", minimum=0, maximum=100)] = 1.0
    mixup_prob: Annotated[float, Option("Probability of mixing a batch at all.", minimum=0, maximum=1)] = 1.0
    mixup_switch_prob: Annotated[float, Option("Probability of CutMix rather than Mixup.", minimum=0, maximum=1)] = 0.5
    mixup_off_epoch: Annotated[int, Option("Mix no more from this epoch on; 0: never stop.", minimum=0)] = 0
    smoothing: Annotated[float, Option("Label smoothing of the labels term.", minimum=0, maximum=0.99)] = 0.1
    hflip: Annotated[float, Option("Probability of a horizontal flip.", minimum=0, maximum=1)] = 0.5
    scale: Annotated[Range2, Option("Share of the image's area that a crop may take, as LOW,HIGH.", minimum=0, maximum=1)] = (0.08, 1.0)
    ratio: Annotated[Range2, Option("Aspect ratio of a crop, as LOW,HIGH.", above=0, maximum=100)] = (0.75, 4 / 3)
    color_jitter: Annotated[float, Option("Colour jitter; unused where --aa is set.", minimum=0, maximum=10)] = 0.0
    train_interpolation: Annotated[Literal["bicubic", "bilinear", "random"], Option("Interpolation of training crops.")] = "bicubic"
    aug_repeats: Annotated[int, Option("Repeated augmentation: copies of each image in an epoch; 0: off.", minimum=0, maximum=100)] = 0
    no_aug: Annotated[bool, Option("Train on plain resized crops.")] = False
    crop_pct: Annotated[float | None, Option("Validation: share of the image kept by the centre crop; unset: the model's own.", above=0, maximum=1)] = None
    interpolation: Annotated[str | None, Option("Validation: interpolation; unset: the model's own.")] = None
    mean: Annotated[tuple[float, ...] | None, Option("Student's mean, one value a channel; unset: the model's own.", minimum=0, maximum=1)] = None
    std: Annotated[tuple[float, ...] | None, Option("Student's standard deviation; unset: the model's own.", above=0, maximum=10)] = None
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Optimisation(Request):
    """How long, how fast and by which rule the student learns."""

    panel = "Optimisation"

    # fmt: off
    epochs: Annotated[int, Option("Passes over the training images.", minimum=1)] = 300
    steps: Annotated[int | None, Option("Stop after this many updates.", minimum=1)] = None
    batch_size: Annotated[int | None, Option("Images per process and step; unset: --batch-base, and below 2,000 images no more than give an epoch 20 updates.", short=("-b",), minimum=1)] = None
    batch_base: Annotated[int, Option("Images per process and step where --batch-size is unset.", minimum=1)] = 256
    validation_batch_size: Annotated[int | None, Option("The same for validation.", short=("-vb",), minimum=1)] = None
    grad_accum_steps: Annotated[int, Option("Batches per update.", minimum=1)] = 1
    global_batch_size: Annotated[int | None, Option("Images per update over all processes and steps, however many processes there are: --batch-size is then the most that a process takes at once, and the batches per update follow.", flag="--global-batch", minimum=1)] = None
    opt: Annotated[str, Option("timm optimiser.")] = "adamw"
    opt_betas: Annotated[tuple[float, ...] | None, Option("Optimiser's betas, as 0.9,0.999; unset: its own (AdamW's are these).", minimum=0, below=1)] = None
    opt_eps: Annotated[float | None, Option("Optimiser's epsilon; unset: its own (AdamW's is 1e-8).", minimum=0, maximum=1)] = None
    weight_decay: Annotated[float, Option("Weight decay; none on biases, norms and position embeddings.", minimum=0, maximum=100)] = 0.05
    lr: Annotated[float | None, Option("Peak learning rate; unset: --lr-base × global batch / --lr-base-size, and below 2,000 images that of 128 at least.", above=0, maximum=1000)] = None
    lr_base: Annotated[float, Option("Learning rate at --lr-base-size images.", above=0, maximum=1000)] = 5e-4
    lr_base_size: Annotated[int, Option("Global batch that --lr-base is for.", minimum=1)] = 512
    lr_base_scale: Annotated[Literal["linear", "sqrt"], Option("How the learning rate grows with the batch.")] = "linear"
    layer_decay: Annotated[float | None, Option("Learning rate shrinks by this factor a layer, from the head down.", above=0, maximum=1)] = None
    sched: Annotated[str, Option("timm scheduler, stepped per update.")] = "cosine"
    warmup_epochs: Annotated[float | None, Option("Epochs of warm-up; unset: 20 of 300, in proportion for shorter runs. Where a run is shorter than its recipe's: a quarter of it at most.", minimum=0)] = None
    warmup_lr: Annotated[float, Option("Learning rate at the start of the warm-up.", minimum=0, maximum=1000)] = 1e-6
    min_lr: Annotated[float, Option("Learning rate at the end.", minimum=0, maximum=1000)] = 1e-5
    cooldown_epochs: Annotated[int, Option("Epochs at --min-lr after the schedule.", minimum=0)] = 0
    clip_grad: Annotated[float, Option("Gradient clipping over student and projectors together; 0: off.", minimum=0)] = 5.0
    clip_mode: Annotated[Literal["norm", "value", "agc"], Option("How gradients are clipped.")] = "norm"
    sync_bn: Annotated[bool, Option("BatchNorm layers of the student take the statistics of all processes' images, not of each process's own; on GPUs.")] = False
    model_ema: Annotated[bool, Option("Keep an exponential moving average of the student.")] = False
    model_ema_decay: Annotated[float, Option("Its decay per update.", minimum=0, below=1)] = 0.9998
    model_ema_warmup: Annotated[bool, Option("Let its decay grow from 0.")] = False
    seed: Annotated[int, Option("Every random draw of the run is keyed by it.", minimum=0)] = 42
    view_seed: Annotated[int | None, Option("Keys what images are seen when, and how: order, crops, mixing. Unset: --seed. One for all --seeds leaves the student's start, masks and drops to vary.", minimum=0)] = None
    cached_epochs: Annotated[int | None, Option("See the views of the first so many epochs over and over, so that --teacher-cache holds no more. Unset: each epoch has views of its own.", minimum=1)] = None
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Machine(Request):
    """Where a run computes, and how exactly."""

    panel = "Machine"

    # fmt: off
    workers: Annotated[int | None, Option("Loader processes per process, at most the cores there are. Unset: beside a GPU all of its share of the cores but one, on a CPU its share, at most 4.", short=("-j",), minimum=0)] = None
    input_backend: Annotated[Literal["auto", "torchvision", "pillow"], Option("Who decodes and crops training images. pillow: timm's pixels, to the bit. torchvision: faster, the crop within one grey level. auto: torchvision for a GPU, pillow for a CPU.")] = "auto"
    cache_images: Annotated[str, Option("Keep training images decoded: in a folder that may serve other runs, too, or in ram, which all processes of this machine share. off: decode them in every epoch.")] = "off"
    cache_side: Annotated[int | None, Option("Reduce cached images to this many rows or columns, whichever are fewer; unset: keep them whole, and every pixel of a view as it is.", minimum=32)] = None
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], Option("auto: bf16 on a capable GPU, else no: float32, on a GPU in TF32.")] = "auto"
    model_dtype: Annotated[Literal["float32", "float64"], Option("Type of weights and losses.")] = "float32"
    terms_dtype: Annotated[Literal["float32", "bf16"], Option("In what the terms multiply. bf16, beside --mixed-precision bf16: faster, and what the terms' layers put out is rounded by up to 0.4 %.")] = "float32"
    grad_checkpointing: Annotated[bool, Option("Trade time for memory in the student.")] = False
    channels_last: Annotated[bool, Option("channels_last memory layout of the student.")] = False
    teacher_cache: Annotated[str | None, Option("Keep what the teacher says in this folder, and read it where it is there: other arms, seeds and runs with the same teacher, images and views do not run it again. off: a resumed run goes on without.")] = None
    cache_dtype: Annotated[Literal["exact", "fp16", "bf16"], Option("Type of what is kept: the teacher's own (exact), or of 2 bytes, off by up to 0.05 % (fp16) or 0.4 % (bf16).")] = "exact"
    shard_teacher: Annotated[bool, Option("Share the teacher's weights among the processes: each holds its part, and the whole of one block at a time (FSDP2). For a teacher that does not fit.")] = False
    shard: Annotated[bool, Option("Share the student's weights, gradients and optimizer among the processes: each holds its part, and the whole of one block at a time (FSDP2). For a student that does not fit.")] = False
    torchcompile: Annotated[bool, Option("Compile student and teacher.")] = False
    device: Annotated[str | None, Option("cpu or cuda, or untested: mps, xpu; unset: cuda where there is one, else cpu.")] = None
    num_processes: Annotated[int, Option("Start this many processes.", minimum=1)] = 1
    dist_timeout: Annotated[int, Option("Seconds that a process waits for another before it gives the run up.", minimum=1)] = 600
    lock_timeout: Annotated[int, Option("Seconds to wait for another run to leave the run folder.", minimum=0)] = 0
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Evidence(Request):
    """What a run leaves, and what it proves."""

    panel = "Run folder and evidence"

    # fmt: off
    output: Annotated[str | None, Option("The run folder; unset: runs/TEACHER-STUDENT-TIME.")] = None
    select: Annotated[Literal["last", "best", "ema"], Option("Which weights become the student; 'best' is selected on the validation split.")] = "last"
    baseline: Annotated[bool, Option("Also train the same student without a teacher: --against what --loss is without the teacher's terms.")] = False
    against: Annotated[tuple[str, ...], Option('Also train the same student by another formula or with other settings, and compare: "labels + kd", "lr=1e-3", or both, as "labels + kd; lr=1e-3; name=kd". May be repeated.', metavar="ARM")] = ()
    seeds: Annotated[int, Option("Repeat every arm with this many seeds, and compare the arms seed by seed.", minimum=1, maximum=1000)] = 1
    checkpoint_hist: Annotated[int, Option("Checkpoints kept.", minimum=1)] = 2
    keep_checkpoints: Annotated[bool, Option("Keep checkpoints and optimizer of a finished run, for more --epochs.")] = False
    recovery_interval: Annotated[int, Option("Updates between checkpoints; one is also written after each epoch's validation.", minimum=1)] = 1000
    log_interval: Annotated[int, Option("Updates between log lines.", minimum=1)] = 50
    val_interval: Annotated[int, Option("Epochs between validations; the last epoch always has one.", minimum=1)] = 1
    eval_metric: Annotated[Literal["top1", "top5", "loss"], Option("What 'best' means.")] = "top1"
    log_with: Annotated[str | None, Option("Trackers by Accelerate's names: tensorboard, wandb, … comma-separated.")] = None
    report: Annotated[bool, Option("--no-report: leave out report.html, the page about the run.")] = True
    log_grads: Annotated[int, Option("Log each term's share of the student's gradient every N updates; 0: off.", minimum=0)] = 0
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Recipe(Evidence, Machine, Optimisation, Augmentation, Data, Loss, Models):
    """A run, written down. Defaults are the ViTKD paper's recipe (docs/recipes.md).

    Its settings are declared in parts, so that a function takes the part that it reads; flags and TOML keys
    are flat. Of several bases a dataclass takes the fields of the last one first.
    """

    panel = ""

    def __new__(cls, *_: Any, **values: Any) -> Recipe:
        if strange := values.keys() - {field.name for field in settings()}:
            raise _unknown(min(strange))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        for low_high in ("scale", "ratio"):
            low, high = getattr(self, low_high)
            if low > high or high <= 0:
                told = f"{low_high} must be LOW,HIGH with LOW ≤ HIGH, not {low:g},{high:g}"
                raise UserError(told, "the smaller value first, such as 0.3,1.0")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise UserError(
                f"warmup_epochs = {self.warmup_epochs:g} is beyond the {self.epochs} epochs of the run",
                "fewer, or leave it unset: in proportion to the run",
            )
        if self.select == "ema" and not self.model_ema:
            raise UserError("select = 'ema' needs an average to select", "add --model-ema")
        if self.use_ema and not (self.teacher_checkpoint or self.initial_checkpoint):
            raise UserError(
                "--use-ema takes the average out of a weight file, and none is given",
                "--teacher-checkpoint FILE or --initial-checkpoint FILE, or leave it out",
            )
        if self.answers_folder and self.seeds > 1 and self.view_seed is None:
            raise UserError(
                f"--teacher-cache: each of the {self.seeds} seeds has views of its own, and none could read "
                "what another one kept",
                f"--view-seed {self.seed} shows all seeds the same views",
            )
        if self.shard_teacher and (self.answers_folder or self.torchcompile):
            raise UserError(
                f"--shard-teacher does not go with --{'teacher-cache' if self.answers_folder else 'torchcompile'}",
                "leave one of them out",
            )
        self._check_shard()
        epochs = self.epochs + self.cooldown_epochs
        if self.cached_epochs and self.cached_epochs < epochs and 0 < self.mixup_off_epoch < epochs:
            raise UserError(
                f"the same views come again after {self.cached_epochs} epochs (cached_epochs), mixed before "
                f"epoch {self.mixup_off_epoch} (mixup_off_epoch) and unmixed from there on",
                "leave one of them out",
            )
        if self.cache_side is not None and self.cache_images == "off":
            raise UserError("--cache-side reduces cached images, and none are cached", "--cache-images ram")
        if self.cache_side is not None and self.input_backend == "pillow":
            raise UserError("--input-backend pillow crops whole images", "leave out --cache-side")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise UserError("mean and std must have as many values as each other", "one value per channel")

    def _check_shard(self) -> None:
        """Refuse what was not made to work with parts of weights."""
        if not self.shard:
            return
        others = {
            "torchcompile": self.torchcompile,
            "sync-bn": self.sync_bn,
            "channels-last": self.channels_last,
            "log-grads": self.log_grads,
            "clip-mode agc": self.clip_mode == "agc",
            "mixed-precision fp16": self.mixed_precision == "fp16",
        }
        if other := next((name for name, given in others.items() if given), None):
            raise UserError(f"--shard does not go with --{other}", "leave one of them out")
        if self.opt.lower() not in SHARED_OPTIMISERS:
            raise UserError(
                f"--shard does not go with --opt {self.opt}", f"one of {', '.join(SHARED_OPTIMISERS)}"
            )

    def decodes_fast(self, device: str) -> bool:
        """Are training images torchvision's to decode, for a device of this type?"""
        if self.input_backend == "auto":
            return device != "cpu" or self.cache_side is not None
        return self.input_backend == "torchvision"

    def decoded_on(self, device: str) -> Recipe:
        """The recipe with ``input_backend`` settled for a device of this type."""
        return self.but(input_backend="torchvision" if self.decodes_fast(device) else "pillow")

    @property
    def answers_folder(self) -> str | None:
        """Where what the teacher says is kept; None where it is not."""
        return None if self.teacher_cache == "off" else self.teacher_cache

    @property
    def own_val_fraction(self) -> float:
        """The share of its training data that it holds out; nothing where nobody would score it."""
        return 0.0 if self.val_data or self.num_classes == 0 else self.val_fraction

    @property
    def views_key(self) -> int:
        """Seed of the images' order, views and mixing."""
        return self.seed if self.view_seed is None else self.view_seed

    @property
    def batch(self) -> int:
        """Images per process and step."""
        return self.batch_size or self.batch_base

    @property
    def device_batch(self) -> int:
        """Images per update and process."""
        return self.batch * self.grad_accum_steps

    @property
    def global_batch(self) -> int:
        """Images per update, over processes and accumulation."""
        return self.device_batch * self.num_processes

    def shared_among(self, processes: int) -> Recipe:
        """The recipe on so many processes: batch and accumulation make up ``global_batch_size``, if it is set."""
        recipe = replace(self, num_processes=processes)
        if (wanted := self.global_batch_size) is None:
            return recipe
        share, left = divmod(wanted, processes)
        if left or not share:
            raise UserError(
                f"--global-batch {wanted} cannot be shared evenly among {processes} processes",
                "a multiple of the number of processes",
            )
        steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= self.batch)
        return replace(recipe, batch_size=share // steps, grad_accum_steps=steps)

    @property
    def peak_lr(self) -> float:
        """DeiT's rule (Touvron et al. 2021): 5e-4 × global batch / 512, unless ``lr`` is given."""
        if self.lr is not None:
            return self.lr
        return self.lr_for(self.global_batch)

    def lr_for(self, images: int) -> float:
        """The peak for that many images an update, where ``lr`` is not given."""
        growth = images / self.lr_base_size
        return float(self.lr_base * (growth if self.lr_base_scale == "linear" else growth**0.5))

    @property
    def final_lr(self) -> float:
        """``min_lr``, or the peak where a small batch puts that below it: the schedule never rises."""
        return min(self.min_lr, self.peak_lr)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up: 20 of 300, in proportion where a shorter run leaves it unset."""
        return min(20.0, self.epochs / 15) if self.warmup_epochs is None else self.warmup_epochs

    def but(self, **changes: Any) -> Recipe:
        """The same recipe with some values changed."""
        if self.warmup_epochs is not None and changes.get("epochs", self.epochs) < self.epochs:
            changes = {"warmup_epochs": min(self.warmup_epochs, changes["epochs"] / 4), **changes}
        return replace(self, **changes)

    def fitted(self, images: int) -> tuple[Recipe, list[str]]:
        """What few training images want of the values that nobody gave, and a line about each.

        Small batches take many updates from few images, and a learning rate that shrank with the batch
        would not use them.
        """
        if images >= FEW_IMAGES:
            return self, []
        said = []
        recipe = self
        if self.batch_size is None:
            share = images // (UPDATES_WANTED * self.grad_accum_steps * self.num_processes)
            recipe = self.but(batch_size=min(self.batch_base, max(2, share // 2 * 2)))  # mixup mixes in pairs
            if recipe.batch < self.batch_base:
                said.append(
                    f"{images:,} images are few: batches of {recipe.batch} in place of {self.batch_base} "
                    "(--batch-size)"
                )
        least = recipe.lr_for(SMALL_BATCH)
        if recipe.lr is None and recipe.peak_lr < least:
            recipe = recipe.but(lr=least)
            said.append(
                f"{images:,} images are few: a peak learning rate of {least:.3g}, that of {SMALL_BATCH} "
                "images an update (--lr)"
            )
        return recipe, said

    def refitted(self, images: int, others: int) -> Recipe:
        """The recipe, which was :meth:`fitted` to some images, fitted to others; what a person gave stays.

        A value counts as given unless it is the one that fits ``images``: a run that goes on knows no more.
        """
        given = self
        for key in ("batch_size", "lr"):
            unset = self.but(**{key: None})
            if getattr(unset.fitted(images)[0], key) == getattr(self, key):
                given = given.but(**{key: None})
        return given.fitted(others)[0]

    def pointless(self, per_epoch: int, updates: int) -> list[str]:
        """What is legal in a run of that many updates, and changes nothing or hardly anything."""
        said = []
        if self.min_lr > self.peak_lr:
            said.append(
                f"min_lr = {self.min_lr:g} is above the peak, so the learning rate ends at {self.final_lr:g}"
            )
        if updates <= self.warmup * per_epoch:
            said.append(f"all {updates} updates are warm-up: the peak learning rate is never reached")
        if self.model_ema and not self.model_ema_warmup and (start := self.model_ema_decay**updates) > 0.1:
            said.append(
                f"{start:.0%} of the average are the weights it began with: model_ema_decay = "
                f"{self.model_ema_decay:g} is long for {updates} updates"
            )
        if self.lr is None and self.global_batch > LARGE_BATCH:
            said.append(
                f"the peak learning rate of {self.peak_lr:.3g} follows from {self.global_batch:,} images an "
                f"update: beyond {LARGE_BATCH:,} few have tried it (--lr, --lr-base-scale sqrt)"
            )
        if self.mixup_off_epoch > self.epochs:
            said.append(f"mixup_off_epoch = {self.mixup_off_epoch} is beyond the run")
        if self.cache_dtype != "exact" and not self.answers_folder:
            said.append(f"cache_dtype = {self.cache_dtype} is unused without teacher_cache")
        if self.color_jitter and self.aa not in ("", "none") and not self.no_aug:
            said.append(f"color_jitter = {self.color_jitter:g} is unused beside aa = {self.aa!r}")
        return said

    def to_toml(self) -> str:
        """The recipe as TOML; unset values are left out."""
        import tomli_w

        values = {f.name: getattr(self, f.name) for f in settings() if getattr(self, f.name) is not None}
        return tomli_w.dumps({"schema": SCHEMA_VERSION, **values})

    def public(self) -> Recipe:
        """The recipe as others may see it: files and folders by their last name, and no run folder."""
        return Recipe(**public({f.name: getattr(self, f.name) for f in settings()}))

    @property
    def places(self) -> Iterator[tuple[str, str]]:
        """Every setting and value that may name a file or folder, those of ``against`` among them."""
        own = ((key, getattr(self, key)) for key in PLACES)
        arms = (part for text in self.against for part in parts_of(text))
        return ((key, value) for key, value in (*own, *arms) if key in PLACES and value)

    def with_places(self, change: Callable[[str, str], str]) -> Recipe:
        """The recipe with each of its :attr:`places` changed: setting and value → value."""
        own = {key: value and change(key, value) for key in PLACES for value in [getattr(self, key)]}
        arms = in_arms(self.against, lambda key, value: change(key, value) if key in PLACES else value)
        return self.but(**own, against=arms)

    @classmethod
    def from_toml(cls, path: Path) -> Recipe:
        """Read a recipe that :meth:`to_toml` or a person wrote."""
        return compose(*layers_of(path))[0]


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values as others may see them: files and folders by their last name, and no run folder."""

    def shown(key: str, value: Any) -> Any:
        if key == "against" and not isinstance(value, str):
            return in_arms(value, shown)
        if not isinstance(value, str):
            return value
        if key == "plugin":
            return ",".join(map(last_name, value.split(",")))
        return last_name(value) if key in PLACES else without_places(value)

    return {key: shown(key, value) for key, value in values.items() if key != "output"}


def parts_of(text: str) -> Iterator[tuple[str, str]]:
    """The parts of an arm of ``--against``: setting and value, the formula as ``loss``."""
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = part.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        yield (key, value.strip()) if equals and key.isidentifier() else ("loss", part)


def in_arms(arms: Iterable[str], change: Callable[[str, str], str]) -> tuple[str, ...]:
    """Arms with each of their parts changed: setting and value → value."""

    def changed(text: str) -> str:
        parts = [(key, change(key, value)) for key, value in parts_of(str(text))]
        for _, value in parts:
            if ";" in value:
                raise UserError(f"an arm cannot name {value}: it holds a semicolon", "give it another name")
        return "; ".join(value if key == "loss" else f"{key}={value}" for key, value in parts)

    return tuple(map(changed, arms))


def settings() -> tuple[Field, ...]:
    """Every setting of the recipe, in the order in which it is declared."""
    return tuple(declared(Recipe).values())


def recipe_of(run: Path) -> Recipe:
    """A run's recipe; where the run was moved with what it reads, a place that is gone is sought beside it."""
    before = {"input_backend": "pillow"}  # of what was written before there was a choice
    stored, _ = compose(("", before), *layers_of(run / "recipe.toml"))

    def found(_: str, value: str) -> str:
        source, place = folder_in(value)
        if os.path.isabs(place) and os.path.isabs(stored.output or "") and not Path(place).exists():
            moved = (run.resolve() / os.path.relpath(place, stored.output)).resolve()
            if moved.exists():
                return f"{source}{moved}"
        return value

    return stored.with_places(found)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's values; hyphens in keys count as underscores.

    Raises:
        UserError: the file is missing or is not TOML.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors begin with a mark
    except OSError as problem:
        raise UserError(f"cannot read the recipe {path}: {problem.strerror}", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is not TOML: {problem}", "write key = value, text in quotes") from None
    values = {key.replace("-", "_"): value for key, value in values.items()}
    if "arm" in values:
        tables, arms = values.pop("arm"), values.get("against", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise UserError(f"{path}: arm must be tables", '[[arm]], and below it loss = "labels + kd"')
        arms = arms if isinstance(arms, list) else [arms]
        values["against"] = [*arms, *(_arm_in_words(table, path) for table in tables)]
    schema = values.pop("schema", SCHEMA_VERSION)
    if schema != SCHEMA_VERSION:
        raise UserError(
            f"{path} has recipe schema {schema}; this vitkd reads {SCHEMA_VERSION}",
            "run it with the version that wrote it, or print it anew with --print-recipe",
        )
    return values


def _arm_in_words(table: Mapping[str, Any], path: Path) -> str:
    """A table ``[[arm]]`` as ``--against`` writes it."""

    def shown(key: str, value: Any) -> str:
        numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
        if not numbers and (not isinstance(value, str | int | float) or ";" in str(value)):
            raise UserError(
                f"{path}: an arm's {key} cannot be {value!r}", "a text without semicolon, a number or numbers"
            )
        if isinstance(value, list):
            return ",".join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    written = {key: shown(key, value) for key, value in table.items()}
    formula = written.pop("loss", "")
    return "; ".join([*filter(None, [formula]), *(f"{key}={value}" for key, value in written.items())])


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that comes with the package, such as ``finetune``."""
    folder = Path(str(resources.files("vitkd_cli") / "recipes"))
    return {
        str(path.relative_to(folder).with_suffix("")).replace("\\", "/"): path
        for path in sorted(folder.rglob("*.toml"))
    }


def summary_of(path: Path) -> str:
    """What a recipe is for: the comment on its first line, if there is one."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def layers_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """A recipe's values and their origin, after those of the shipped recipe that it names as its ``base``.

    Raises:
        UserError: the file cannot be read, or its base is not shipped.
    """
    shipped = shipped_recipes()
    values = read_toml(path)
    base = values.pop("base", None)
    if base not in (None, *shipped):
        raise UserError(f"base must be a shipped recipe, not {base!r} ({path})", ", ".join(shipped))
    origin = next((f"recipe {name}" for name, file in shipped.items() if file == path), str(path))
    return [*(layers_of(shipped[base]) if base else []), (origin, values)]


def find_recipe(name: str) -> Path:
    """The TOML file that ``--recipe`` means: a shipped recipe's name, or a path.

    Raises:
        UserError: there is none, with the nearest shipped name.
    """
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = expanded(name)
    if path.is_dir() and (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    if path.is_file():
        return path
    if within := [known for known in shipped if known.startswith(f"{name}/")]:
        raise UserError(f"{name!r} is a folder of recipes", f"did you mean {' or '.join(within)}?")
    near = difflib.get_close_matches(name, shipped, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"there is no recipe {name!r}", f"{hint}shipped: {', '.join(shipped)}; or give a file")


def compose(*layers: tuple[str, Mapping[str, Any]]) -> tuple[Recipe, dict[str, str]]:
    """Layers of values over the defaults, the last one on top.

    Args:
        layers: (origin, values by field name): a file's name, or "" for the flags that were given.

    Returns:
        The recipe, and for each field where its value came from.

    Raises:
        UserError: unknown key, wrong type or impossible value, naming key, file and the nearest key.
    """
    known = {field.name: field for field in settings()}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    for origin, given in layers:
        where = f" ({origin})" if origin else ""
        epochs = values.get("epochs", known["epochs"].default)
        for model, file in (("teacher", "teacher_checkpoint"), ("student", "initial_checkpoint")):
            if model in given and values.get(model) not in (None, given[model]):
                values.pop(file, None)  # weights of the model that was named before
                origins[file] = "default"
        for key, value in given.items():
            if key not in known:
                raise _unknown(key, where)
            try:
                values[key] = known[key].check(value, key if origin else known[key].flag)
            except UserError as problem:
                raise UserError(f"{problem.message}{where}", problem.hint) from None
            origins[key] = origin or known[key].flag
        warmup = None if "warmup_epochs" in given else values.get("warmup_epochs")
        if warmup is not None and values.get("epochs", epochs) < epochs and warmup > values["epochs"] / 4:
            values["warmup_epochs"], origins["warmup_epochs"] = values["epochs"] / 4, A_QUARTER
    return Recipe(**values), origins


def _unknown(key: str, where: str = "") -> UserError:
    near = difflib.get_close_matches(key, [field.name for field in settings()], 1)
    hint = f"did you mean {near[0]}?" if near else "`vitkd distill --help-all` lists the keys"
    hint = "did you mean [[arm]]?" if key in ("arms", "[[arms]]") else hint
    return UserError(f"there is no recipe key {key!r}{where}", hint)


def settle(
    flags: Mapping[str, Any],
    recipe: str | None = None,
    environ: Mapping[str, str] = MappingProxyType({}),
    without: Sequence[str] = (),
) -> tuple[Recipe, dict[str, str]]:
    """What a command line means: flags over ``--recipe`` over the defaults.

    Where nobody names data, it is ``$VITKD_DATA``; without that the built-in sample, with the short
    schedule of the shipped recipe ``sample`` beneath everything else.

    Args:
        flags: those that were given, by field name.
        recipe: a shipped recipe's name, or a file.
        environ: the environment.
        without: keys that the file may have for somebody else.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [("", flags)]
    if recipe is not None:
        read = layers_of(find_recipe(recipe))
        layers[:0] = [
            (origin, {k: v for k, v in values.items() if k not in without}) for origin, values in read
        ]
    if not any({"data", "data_dir"} & set(values) for _, values in layers):
        if environ.get("VITKD_DATA"):
            layers.insert(0, ("$VITKD_DATA", {"data": environ["VITKD_DATA"]}))
        else:
            layers[:0] = layers_of(shipped_recipes()["sample"])
    return compose(*layers)
