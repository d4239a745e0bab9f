"""Every golden file as an objective is asked it: its formulas, its signals, and how far off we are.

The tests and the table in docs/golden.md both read this. A published loss is added by one function that
turns its hyperparameters into the formula of each of its outputs.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import DISTILL_LOGITS, FINAL, FINAL_PREFIX, LOGITS, Tap, features

GOLDEN = Path(__file__).parents[1] / "golden"

# our parameters, and the reference's name for them where a file has it
PARAMETERS = [
    (r"mimic\.align\.(\d)", r"align2.\1"),
    (r"mimic\.align\.0", "projection"),
    (r"generate\.align", "align"),
    (r"generate\.mask_token", "mask_token"),
    (r"generate\.(?:\w+\.)?conv1", "generation.0"),
    (r"generate\.(?:\w+\.)?conv2", "generation.2"),
]

# published losses that no term computes: number of files, why
CONVOLUTIONAL = "made for convolutional networks; newer methods came first"
NOT_BUILT = {
    "at": (5, CONVOLUTIONAL),
    "deit-one-head_hard": (1, "hard targets for the class head: `kd` has soft ones, `token` its own head"),
    "mgd-clskd": (3, "masks whole channels of a feature map; `generate` masks tokens"),
    "minivit-hidden_relation": (1, "Gram matrices of unit tokens; `correlation` is near it"),
    "pkt": (1, CONVOLUTIONAL),
    "rkd": (3, CONVOLUTIONAL),
    "sp": (1, CONVOLUTIONAL),
    "wsld-clskd": (2, "weighs images by both models' label losses; undefined for mixed labels"),
}

Given = dict[str, Any]  # a file's hyperparameters, and its number of classes
Tensors = dict[str, Tensor]
Spec = Callable[..., ViTSpec]  # conftest.py's


class Posed(NamedTuple):
    """What an objective is handed for a golden file."""

    specs: tuple[ViTSpec, ViTSpec]
    student: dict[Tap, Tensor]
    teacher: dict[Tap, Tensor]
    batch: Batch
    weights: Tensors | None = None  # the student's own, by the names of their gradients


class Deviation(NamedTuple):
    """How far we are from a file: the worst of its outputs, relative; gradients by their largest entry."""

    loss: float
    gradient: float  # of all tensors taken together
    gradients: float  # of the worst one by itself


@dataclass(frozen=True)
class Case:
    """A golden file, and what our formulas are for its outputs: first that which is differentiated."""

    path: Path
    method: str
    formulas_of: Callable[[Given], dict[str, str]]
    pose: Callable[[Given, Tensors, Spec], Posed]

    @cached_property
    def given(self) -> Given:
        with safe_open(self.path, "pt") as file:
            given = json.loads(file.metadata()["golden"])["hyperparameters"]
            if "input.student_logits" in file.keys():  # noqa: SIM118
                given["classes"] = file.get_slice("input.student_logits").get_shape()[1]
        return given

    @cached_property
    def formulas(self) -> dict[str, str]:
        return self.formulas_of(self.given)

    @property
    def formula(self) -> str:
        return next(iter(self.formulas.values()))

    def read(self, dtype: torch.dtype) -> Tensors:
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32 and not name.startswith(("out", "mask")):
                tensors[name] = tensor.to(dtype)
            if name.startswith("input.") and f"grad64.{name}" in tensors:
                tensors[name].requires_grad_()
        return tensors

    def deviation(self, dtype: torch.dtype, spec: Spec) -> Deviation:
        tensors = self.read(dtype)
        posed = self.pose(self.given, tensors, spec)
        expected = {name: tensor for name, tensor in tensors.items() if name.startswith("grad64.")}
        losses = []
        for output, formula in reversed(self.formulas.items()):
            total, leaves = ask(formula, posed, tensors, dtype)
            losses.append(off(total, tensors[f"out64.{output}"]))
        total.backward()
        assert leaves.keys() == expected.keys()
        ours = {name: leaves[name].grad for name in expected}
        return Deviation(
            max(losses),
            off(*(torch.cat([x.flatten() for x in gradients.values()]) for gradients in (ours, expected))),
            max(off(ours[name], expected[name]) for name in expected),
        )


def ask(formula: str, posed: Posed, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensors]:
    """A formula's value with the reference's weights, and what it depends on by the gradients' names."""
    objective = Objective(formula, *posed.specs).to(dtype)
    leaves = {f"grad64.{name}": tensor for name, tensor in tensors.items() if tensor.requires_grad}
    for name, parameter in objective.terms.named_parameters():
        named = [re.sub(f"^{ours}", f"param.{theirs}", name) for ours, theirs in PARAMETERS]
        [theirs] = tensors.keys() & set(named)
        parameter.data.copy_(tensors[theirs])
        leaves[f"grad64.{theirs}"] = parameter
    total, _ = objective(posed.student, posed.teacher, posed.batch)
    return total, leaves | (posed.weights or {})


def off(ours: Tensor, golden: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((ours.detach().double() - golden.double()).abs().max() / golden.double().abs().max())


# From a file's tensors to signals ---------------------------------------------------------------------


def on_logits(given: Given, tensors: Tensors, spec: Spec) -> Posed:
    # nkd refuses to be built for two classes; its formula holds there too
    vit = spec(8, classes=max(given["classes"], 24), distilled=True)
    student = {LOGITS: tensors["input.student_logits"]}
    if (distilled := tensors.get("input.student_distill_logits")) is not None:
        student[DISTILL_LOGITS] = distilled
    teacher = tensors.get("input.teacher_logits")
    return Posed((vit, vit), student, {} if teacher is None else {LOGITS: teacher}, labelled(tensors))


def on_pooled_tokens(given: Given, tensors: Tensors, spec: Spec) -> Posed:
    """Pooled features are the class token after the final norm, as in a plain ViT."""
    ours, theirs = (tensors[f"input.{who}_features"] for who in ("student", "teacher"))  # [B, D] each
    student, teacher = (replace(spec(x.shape[1]), class_token=True) for x in (ours, theirs))
    signals = {LOGITS: tensors["input.student_logits"], FINAL_PREFIX: ours[:, None]}
    return Posed((student, teacher), signals, {FINAL_PREFIX: theirs[:, None]}, labelled(tensors))


def on_tokens(given: Given, tensors: Tensors, spec: Spec) -> Posed:
    # the reference's inputs may hold a class token first; taps hold patch tokens only
    grid, first = tuple(given["grid"]), given["prefix_tokens"]
    signals = {}
    for who in ("student", "teacher"):
        low, high = tensors[f"input.{who}_low"], tensors[f"input.{who}_high"]
        signals[who] = {
            features(0): low[:, 0, first:],
            features(1): low[:, 1, first:],
            FINAL: high[:, first:],
        }
    specs = spec(given["student_dims"], grid=grid), spec(given["teacher_dims"], grid=grid)
    return Posed(specs, **signals, batch=Batch(mask=tensors["mask.mask"]))


def on_qkv(given: Given, tensors: Tensors, spec: Spec) -> Posed:
    """``[layers, 3, B, N, C]``, of one attention head: their number does not matter."""
    signals = [
        {Tap("qkv", i): layer[:, :, None] for i, layer in enumerate(tensors[f"input.{who}_qkv"])}
        for who in ("student", "teacher")
    ]
    return Posed((spec(12), spec(20)), *signals, batch=Batch())


def on_hidden(given: Given, tensors: Tensors, spec: Spec) -> Posed:
    """Block outputs ``[layers, B, N, C]``."""
    hidden = [tensors[f"input.{who}_hidden"] for who in ("student", "teacher")]
    vit = spec(hidden[0].shape[-1], depth=len(hidden[0]) + 1)
    return Posed(
        (vit, vit), *({features(i): x for i, x in enumerate(each)} for each in hidden), batch=Batch()
    )


def on_images(given: Given, tensors: Tensors, spec: Spec) -> Posed:
    signals, specs, weights = {}, [], {}
    for who in ("student", "teacher"):
        made = given[f"timm_{who}"]
        vit = VisionTransformer(**made).to(tensors["input.images"].dtype)
        vit.load_state_dict(
            {name.removeprefix(f"{who}."): x for name, x in tensors.items() if name.startswith(f"{who}.")}
        )
        signals[who] = signals_of(vit, tensors["input.images"])
        specs.append(spec(made["embed_dim"], depth=made["depth"], classes=made["num_classes"]))
        if who == "student":
            weights = {f"grad64.student.{name}": p for name, p in vit.named_parameters()}
    batch = replace(labelled(tensors), mask=tensors["mask.mask"])
    return Posed((specs[0], specs[1]), **signals, batch=batch, weights=weights)


def signals_of(vit: VisionTransformer, images: Tensor) -> dict[Tap, Tensor]:
    """Taps by hand: the outputs of blocks 0 and 1, the final tokens, the logits; no class token."""
    taps = {}
    hooks = [
        vit.blocks[i].register_forward_hook(lambda _m, _i, out, i=i: taps.update({features(i): out[:, 1:]}))
        for i in (0, 1)
    ]
    final = vit.forward_features(images)
    for hook in hooks:
        hook.remove()
    return taps | {FINAL: final[:, 1:], LOGITS: vit.forward_head(final)}


def labelled(tensors: Tensors) -> Batch:
    return Batch(targets=tensors.get("input.mixed_labels", tensors["input.labels"]))


# From a file's hyperparameters to formulas ------------------------------------------------------------

CASES: list[Case] = []


def golden(*methods: str, on: Callable[[Given, Tensors, Spec], Posed] = on_logits) -> Callable[..., None]:
    """Register the formulas of the golden files ``METHOD_*``: one for each output that is compared."""

    def register(formulas_of: Callable[[Given], dict[str, str]]) -> None:
        for method in methods:
            paths = sorted(GOLDEN.glob(f"{method}_*.safetensors"))
            CASES.extend(Case(path, method, formulas_of, on) for path in paths)

    return register


@golden("vitkd", on=on_tokens)
def _vitkd(given: Given) -> dict[str, str]:
    alpha, beta, mask = (given[f"{name}_vitkd"] for name in ("alpha", "beta", "lambda"))
    return {
        "loss": f"vitkd(alpha={alpha:g}, beta={beta:g}, mask={mask:g})",
        "mimic_raw": "mimic",
        "generate_raw": f"generate(mask={mask:g})",
    }


@golden("e2e", on=on_images)
def _e2e(given: Given) -> dict[str, str]:
    return {
        "total": "labels + vitkd + nkd",
        "ori_loss": "labels",
        "loss_vitkd": "vitkd",
        "loss_nkd": "nkd",
    }


@golden("labels-clskd")
def _labels(given: Given) -> dict[str, str]:
    return {"loss": f"labels(smoothing={given['label_smooth_val']:g})"}


@golden("kd")
def _kd(given: Given) -> dict[str, str]:
    return {"loss": f"kd(temperature={given['temperature']:g})"}


@golden("kd-clskd")
def _kd_clskd(given: Given) -> dict[str, str]:
    return {"loss": f"{given['alpha']:g}*kd(temperature={given['temp']:g}, soft_ce=true)"}


@golden("minivit-soft")
def _minivit_soft(given: Given) -> dict[str, str]:
    temperature = given["temperature"]
    return {"loss": f"kd(temperature={temperature:g}, soft_ce=true)/{temperature**2:g}"}


@golden("minivit-qkv", on=on_qkv)
def _minivit_qkv(given: Given) -> dict[str, str]:
    return {"loss": f"relations(blocks={tuple(range(given['layers']))}, heads={given['Ar']:g})"}


@golden("minivit-hidden", on=on_hidden)
def _minivit_hidden(given: Given) -> dict[str, str]:
    return {"loss": f'mimic(blocks={tuple(range(given["layers"]))}, reduce="mean")'}


@golden("kd-standardised")
def _kd_standardised(given: Given) -> dict[str, str]:
    weight = f"{given['extra_weight']:g}*" if "extra_weight" in given else ""
    standardize = ", standardize=true" if given.get("logit_stand", True) else ""
    return {"loss": f"{weight}kd(temperature={given['temperature']:g}{standardize})"}


@golden("nkd")
def _nkd(given: Given) -> dict[str, str]:
    temperature = f"temperature={given['temp']:g}"
    return {
        "loss": f"nkd(gamma={given['gamma']:g}, {temperature})",
        "target": f"nkd(gamma=0, {temperature})",
    }


@golden("dkd", "dkd-clskd", "dkd-standardised")
def _dkd(given: Given) -> dict[str, str]:
    alpha, beta = given["alpha"], given["beta"]
    options = f"temperature={given.get('temperature', given.get('temp')):g}"
    if given.get("logit_stand"):
        return {"loss": f"dkd(alpha={alpha:g}, beta={beta:g}, {options}, standardize=true)"}
    return {
        "loss": f"dkd(alpha={alpha:g}, beta={beta:g}, {options})",
        "target": f"dkd(alpha={alpha:g}, beta=0, {options})",
        "nontarget": f"dkd(alpha=0, beta={beta:g}, {options})",
    }


@golden("dist")
def _dist(given: Given) -> dict[str, str]:
    beta, gamma, tau = given["beta"], given["gamma"], given["tau"]
    options = "temperature=1" if isinstance(tau, str) else f"temperature={tau:g}"  # one version has none
    return {
        "loss": f"dist(beta={beta:g}, gamma={gamma:g}, {options})",
        "inter": f"dist(beta={beta:g}, gamma=0, {options})",
        "intra": f"dist(beta=0, gamma={gamma:g}, {options})",
    }


@golden("deit")
def _deit(given: Given) -> dict[str, str]:
    token = _token(given["distillation_type"], given["tau"])
    return _deits(given, token if token == "token" else f"{token}/{given['classes']}")


@golden("deit-one-head")
def _deit_one_head(given: Given) -> dict[str, str]:
    return _deits(given, f"kd(temperature={given['tau']:g})/{given['classes']}")


@golden("timm-logit")
def _timm_logit(given: Given) -> dict[str, str]:
    return _timm(given, f"kd(temperature={given['temperature']:g})")


@golden("timm-token")
def _timm_token(given: Given) -> dict[str, str]:
    return _timm(given, _token(given["distill_type"], given["temperature"]))


@golden("timm-feature", on=on_pooled_tokens)
def _timm_feature(given: Given) -> dict[str, str]:
    return _timm(given, 'mimic(blocks=-1, tokens="class", reduce="mean")')


def _token(kind: str, temperature: float) -> str:
    return "token" if kind == "hard" else f'token(kind="soft", temperature={temperature:g})'


def _deits(given: Given, distill: str) -> dict[str, str]:
    return _weighted(1 - given["alpha"], _labels_of(given["base"]), given["alpha"], distill, "base")


def _timm(given: Given, distill: str) -> dict[str, str]:
    task, weight = given["task_loss_weight"], given["distill_loss_weight"]
    if weight is None:
        weight = 1 if task is None else 1 - task
    return _weighted(1 if task is None else task, _labels_of(given["criterion"]), weight, distill, "task")


def _labels_of(criterion: str) -> str:
    smoothed = criterion.partition("(")[2].removesuffix(")")
    return f"labels(smoothing={smoothed or 0})"


def _weighted(ours: float, labels: str, theirs: float, distill: str, base: str) -> dict[str, str]:
    first, second = ("" if weight == 1 else f"{weight:g}*" for weight in (ours, theirs))
    return {"loss": f"{first}{labels} + {second}{distill}", base: labels, "distill": distill}
