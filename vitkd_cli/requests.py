"""What ``distill`` and ``sweep`` are asked beside the recipe, and what the other commands are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vitkd_cli.options import Option, Request


@dataclass(frozen=True)
class DistillRequest(Request):
    """A recipe to run, or a run to go on with.

    In Python ``recipe`` is a :class:`vitkd_cli.recipe.Recipe`.
    """

    panel = "Run folder and evidence"

    # fmt: off
    recipe: Annotated[Any, Option("A shipped recipe's name (vitkd recipes lists them), or a TOML file.", short=("-c",))] = None
    resume: Annotated[str | None, Option("Go on with this run folder; needs no other flag, and takes more --epochs, --seeds, --baseline or --against. auto: with --output if a run began there.")] = None
    dry_run: Annotated[bool, Option("Resolve and rehearse everything, say what would run, stop.")] = False
    overwrite: Annotated[bool, Option("Replace what the run folder holds.")] = False
    accept_changed_data: Annotated[bool, Option("Resume although images were added, removed or replaced; the classes must be the same.")] = False
    trust_plugin: Annotated[bool, Option("Run the code of the plugin that the recipe or the run names.")] = False
    # fmt: on


@dataclass(frozen=True)
class SweepRequest(Request):
    """A recipe to vary, or a sweep to go on with.

    In Python ``recipe`` is a :class:`vitkd_cli.recipe.Recipe`, whose formula may have ``{name}`` in it.
    """

    panel = "Sweep"

    # fmt: off
    recipe: Annotated[Any, Option("A shipped recipe's name (vitkd recipes lists them), or a TOML file, which may have the tables [vary] and [sweep].", short=("-c",))] = None
    vary: Annotated[tuple[str, ...], Option("A setting of the recipe, or a {name} of --loss, and its values; with --random also LOW..HIGH. A value with commas goes into brackets or quotes. May be repeated: all combinations are run.", metavar="KEY=V1,V2,…")] = ()
    output: Annotated[str | None, Option("The sweep's folder.", unset="sweeps/STUDENT-TIME")] = None
    random: Annotated[int | None, Option("Run this many combinations, drawn by --draw-seed, in place of all.", minimum=1)] = None
    draw_seed: Annotated[int, Option("Seed of the drawing.", minimum=0)] = 0
    halving: Annotated[tuple[float, ...] | None, Option("Epochs, as 10,30: at each, the worse half of the points stops.", above=0)] = None
    jobs: Annotated[int, Option("Points to run at once: one per GPU, or per share of the CPU's cores.", minimum=1, maximum=1024)] = 1
    resume: Annotated[str | None, Option("Go on with this sweep's folder: run what is missing.")] = None
    print_commands: Annotated[bool, Option("Print one command per point, for a scheduler, and stop; --resume then makes the table.", excludes=("halving",))] = False
    trust_plugin: Annotated[bool, Option("Run the code of the plugin that the recipe names.")] = False
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Weights(Request):
    """Which weights a model has, and the size at which it is built."""

    panel = "Model"

    # fmt: off
    checkpoint: Annotated[str | None, Option("Weights for MODEL in place of its own.")] = None
    use_ema: Annotated[bool, Option("Take the averaged weights of --checkpoint.")] = False
    pretrained: Annotated[bool, Option("Random weights in place of those that belong to the name.")] = True
    verify: Annotated[bool, Option("Take a folder although its files do not fit its manifest.")] = True
    img_size: Annotated[int | tuple[int, int] | None, Option("Side of the images, in pixels.", minimum=1, maximum=8192)] = None
    device: Annotated[str | None, Option("cpu or cuda, or untested: mps, xpu. Unset: cuda where there is one, else cpu.", panel="Machine")] = None
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Pictures(Request):
    """How picture files are decoded; unset, as the run of the model read its own."""

    panel = "Preprocessing"

    # fmt: off
    exif: Annotated[bool | None, Option("Turn photographs upright as their EXIF says. Unset: as the model's run does, else yes.")] = None
    alpha_fill: Annotated[str | None, Option("Colour behind what is transparent. Unset: as the model's run, else white.")] = None
    max_pixels: Annotated[int | None, Option("Refuse pictures of more pixels.", minimum=1)] = None
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Pictures):
    """How images are prepared; unset, as timm evaluates the model."""

    panel = "Preprocessing"

    # fmt: off
    use_train_size: Annotated[bool, Option("Use the training size in place of the test size that timm recommends for some models.")] = False
    crop_pct: Annotated[float | None, Option("Share of the image kept by the centre crop; above 1 with --crop-mode border alone.", above=0, maximum=10)] = None
    crop_mode: Annotated[Literal["center", "squash", "border"] | None, Option("How the crop is made.")] = None
    interpolation: Annotated[str | None, Option("Interpolation of the resize.")] = None
    mean: Annotated[tuple[float, ...] | None, Option("Mean, as 0.5,0.5,0.5.", minimum=0, maximum=1)] = None
    std: Annotated[tuple[float, ...] | None, Option("Standard deviation, as 0.5,0.5,0.5.", above=0, maximum=10)] = None
    test_time_pool: Annotated[bool, Option("Pool the map of a bigger image window by window, where timm does.")] = False
    # fmt: on


@dataclass(frozen=True)
class EvalRequest(Preprocessing, Weights):
    """Models to score on labelled images.

    In Python a model may also be one that was built, and files and folders may be ``Path``.
    """

    # fmt: off
    models: Annotated[tuple[Any, ...], Option("Timm names, run folders, local-dir:… or hf-hub:…", argument=True, metavar="MODEL")]
    data: Annotated[str | None, Option("Labelled folder or tars, wds:FOLDER or wds:PATTERN.tar, or a timm dataset. Unset: of a run its own, else $VITKD_DATA, else the sample.", panel="Data")] = None
    data_dir: Annotated[str | None, Option("Root folder of a timm dataset.", panel="Data")] = None
    split: Annotated[str, Option("Which split of the data.", panel="Data")] = "validation"
    teacher: Annotated[Any, Option("A model to compare each MODEL with: agreement and KL divergence.", metavar="MODEL", panel="Model")] = None
    batch_size: Annotated[int | None, Option("Images per process and step.", short=("-b",), minimum=1, unset="256 on a GPU, 32 on a CPU", panel="Machine")] = None
    workers: Annotated[int, Option("Loader processes, at most the cores there are.", short=("-j",), minimum=0, panel="Machine")] = 4
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], Option("Autocast.", panel="Machine")] = "no"
    num_processes: Annotated[int, Option("Share the images among this many processes.", minimum=1, panel="Machine")] = 1
    class_map: Annotated[str | None, Option("File with one class folder name per line.", panel="Data")] = None
    valid_labels: Annotated[str | None, Option("File with the model's index of each class of the data, one per line.", panel="Data")] = None
    ground_truth: Annotated[str | None, Option("File with the classes of a flat folder, where it is not found by itself.", panel="Data")] = None
    input_key: Annotated[str | None, Option("Column of the image; for a folder, the endings of files that count. Unset: as the run has it.", panel="Data")] = None
    target_key: Annotated[str | None, Option("Column of the label.", panel="Data")] = None
    remote_cache: Annotated[float | None, Option("GiB of local disk for copies of tars that are read over a network. Unset: as the run has it, else 64.", above=0, panel="Data")] = None
    knn: Annotated[bool, Option("Judge embeddings in place of heads: by the vote of 20 nearest training images.", panel="Embeddings")] = False
    linear: Annotated[bool, Option("Likewise: by a logistic regression on them, fitted to the training images.", panel="Embeddings")] = False
    few_shot: Annotated[tuple[int, ...], Option("Also with so many training images of each class, as 1,5,10: mean over 5 draws.", minimum=1, metavar="N,…", panel="Embeddings")] = ()
    bank: Annotated[str | None, Option("Folder or dataset of these training images. Unset: the training split of --data; without one, what is not scored of it.", panel="Embeddings")] = None
    train_split: Annotated[str | None, Option("Name of the training split. Unset: as the run has it, else train.", panel="Embeddings")] = None
    real_labels: Annotated[str | None, Option("ImageNet's reassessed labels too: their real.json, or timm for timm's copy.", panel="Data")] = None
    throughput: Annotated[bool, Option("Also time each model on noise: images/s, latency, memory.", panel="Results")] = False
    output: Annotated[str | None, Option("Folder for results and pictures; a second call with it skips the models that are finished.", panel="Results")] = None
    predictions: Annotated[str | None, Option("Write what each model said of each image: FILE.csv or FILE.parquet.", panel="Results")] = None
    # fmt: on


@dataclass(frozen=True)
class PredictRequest(Preprocessing, Weights):
    """A model, and images to name or to embed with it.

    In Python the model may also be one that was built, and files and folders may be ``Path``.
    """

    # fmt: off
    model: Annotated[Any, Option("A timm name, run folder, local-dir:… or hf-hub:…", argument=True, metavar="MODEL")]
    images: Annotated[tuple[str, ...], Option("Image files, or folders or tars of them.", metavar="PATH…", excludes=("data",), panel="Images")] = ()
    output: Annotated[str | None, Option("FILE.csv, .parquet or .safetensors. Unset: CSV on stdout.", short=("-o",), metavar="FILE", panel="Results")] = None
    data: Annotated[str | None, Option("A folder or dataset as eval takes it. Unset: of a run its own, else $VITKD_DATA, else the sample.", panel="Images")] = None
    data_dir: Annotated[str | None, Option("Root folder of a timm dataset.", panel="Images")] = None
    split: Annotated[str, Option("Which split of --data.", panel="Images")] = "validation"
    topk: Annotated[int, Option("So many classes of each image, at most those of the model.", minimum=1, panel="Results")] = 5
    embed: Annotated[bool, Option("Write embeddings in place of classes.", panel="Results")] = False
    skip_corrupt: Annotated[bool, Option("Go on without unreadable images, and list them.", panel="Images")] = False
    overwrite: Annotated[bool, Option("Replace --output.", panel="Results")] = False
    batch_size: Annotated[int | None, Option("Images per step.", short=("-b",), minimum=1, unset="256 on a GPU, 32 on a CPU", panel="Machine")] = None
    workers: Annotated[int, Option("Loader processes, at most the cores there are.", short=("-j",), minimum=0, panel="Machine")] = 4
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], Option("Autocast.", panel="Machine")] = "no"
    # fmt: on


@dataclass(frozen=True)
class ExportRequest(Pictures, Weights):
    """A model to write in the form that others load."""

    # fmt: off
    model: Annotated[Any, Option("A run folder, timm name, local-dir:… or hf-hub:…", argument=True)]
    to: Annotated[str, Option("timm, onnx, torch, features or state-dict.", panel="Form")]
    output: Annotated[str | None, Option("File or folder. Unset: beside the model's folder, or here.", short=("-o",), metavar="PATH", panel="Form")] = None
    data: Annotated[str | None, Option("Labelled images of the model's classes for the check. Unset: its run's own, else the sample.", excludes=("images",), panel="Check")] = None
    images: Annotated[tuple[str, ...], Option("Image file or folder for the check instead; may be repeated.", metavar="PATH", panel="Check")] = ()
    num_images: Annotated[int, Option("Images of the check; --int8 is calibrated on as many others.", minimum=1, panel="Check")] = 64
    batch_size: Annotated[int, Option("Images of the trace for onnx and torch; any number may be fed later.", short=("-b",), minimum=2, panel="Form")] = 2
    opset: Annotated[int | None, Option("Of onnx. Unset: the exporter's own.", minimum=1, panel="Form")] = None
    half: Annotated[bool, Option("onnx: weights in float16; inputs and outputs stay float32.", excludes=("int8",), panel="Form")] = False
    int8: Annotated[bool, Option("onnx: eight bits, calibrated on the images.", panel="Form")] = False
    preprocess: Annotated[bool, Option("onnx: uint8 images [B, H, W, C] in, probabilities out.", panel="Form")] = False
    prefix: Annotated[str, Option("state-dict: before every key, such as backbone.", panel="Form")] = ""
    push_to_hub: Annotated[str | None, Option("timm: upload the folder too.", metavar="ORG/NAME", panel="Form")] = None
    overwrite: Annotated[bool, Option("Replace an earlier export.", panel="Form")] = False
    check_forward: Annotated[bool, Option("Keep it without comparing it with the model on real images.", panel="Check")] = True
    # fmt: on


@dataclass(frozen=True)
class InspectRequest(Pictures, Weights):
    """One model, or a teacher and its student, and images to look at with it.

    In Python ``images`` may also be a dataset of :mod:`vitkd_cli.data`.
    """

    # fmt: off
    models: Annotated[tuple[Any, ...], Option("A timm name, run folder, local-dir:… or hf-hub:…; of two, first the teacher, then the student.", argument=True, metavar="MODEL [MODEL]")]
    images: Annotated[tuple[Any, ...], Option("Image files, or folders or tars of them. Unset: some of --data.", metavar="PATH…", panel="Images")] = ()
    output: Annotated[str | None, Option("Where pictures, page and numbers go.", metavar="DIR", unset="attention-TIME", panel="Results")] = None
    data: Annotated[str | None, Option("Labelled folder or tars, wds:FOLDER or wds:PATTERN.tar, or a timm dataset. Unset: of a run its own, else $VITKD_DATA, else the sample.", panel="Images")] = None
    split: Annotated[str, Option("Which split of the data.", panel="Images")] = "validation"
    layers: Annotated[str, Option("Layers to draw and dump: all, or 0,1,-1.", panel="Maps")] = "all"
    heads: Annotated[str, Option("Heads to draw and dump: mean, all, or 0,3.", panel="Maps")] = "mean"
    query: Annotated[str | None, Option("Whose attention to draw: cls, all, or ROW,COL of a patch.", unset="cls, or all without a class token", panel="Maps")] = None
    rollout: Annotated[bool, Option("Draw the attention rolled out through all layers, too.", panel="Maps")] = False
    teachers: Annotated[tuple[str, ...], Option("Compare these as teachers of MODEL instead, on labelled data.", metavar="MODEL…", panel="Images")] = ()
    dump: Annotated[str | None, Option("Write the maps as safetensors, with an index.json.", metavar="DIR", panel="Results")] = None
    num_images: Annotated[int, Option("Images to count.", minimum=1, panel="Images")] = 64
    num_pictures: Annotated[int, Option("The first of them to draw and dump.", minimum=1, panel="Images")] = 4
    overwrite: Annotated[bool, Option("Write into folders that hold something.", panel="Results")] = False
    batch_size: Annotated[int, Option("Images per step.", short=("-b",), minimum=1, panel="Images")] = 8
    # fmt: on


@dataclass(frozen=True)
class ReportRequest(Request):
    """Runs to tell of in one page.

    In Python a run may also be what ``distill`` returned.
    """

    panel = "Page"

    # fmt: off
    runs: Annotated[tuple[Any, ...], Option("Run folders, sweeps, or a folder of runs.", argument=True, metavar="RUN…")]
    output: Annotated[str | None, Option("The file. Unset: report.html in the run, or here for several; Markdown is printed.", short=("-o",), metavar="FILE")] = None
    markdown: Annotated[bool, Option("Markdown for a model card: verdict, table, commands.")] = False
    # fmt: on
