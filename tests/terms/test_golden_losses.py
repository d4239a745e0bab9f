"""The published losses' own numbers: values and gradients of every term they have in common with us."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.vit.taps import FINAL, LOGITS, features

GOLDEN = Path(__file__).parents[1] / "golden"
# float64: a second implementation reaches 2e-15; float32: the reference itself is 6e-7 off
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 3e-6)}
PRECISIONS = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])

# ours: the reference's
PARAMETERS = {
    "mimic.align.0": "align2.0",
    "mimic.align.1": "align2.1",
    "generate.align": "align",
    "generate.mask_token": "mask_token",
    "generate.generator.conv1": "generation.0",
    "generate.generator.conv2": "generation.2",
}


def cases(method):
    paths = sorted(GOLDEN.glob(f"{method}_*.safetensors"))
    assert paths
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def read(path, dtype):
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["golden"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32 and not name.startswith(("out", "mask")):
            tensors[name] = tensor.to(dtype)
    return meta["hyperparameters"], tensors


def assert_loss(ours, golden):
    expected = golden.double()
    assert abs(ours.double() - expected) <= TOLERANCE[ours.dtype][0] * abs(expected)


def assert_gradient(ours, golden):
    worst = (ours.double() - golden.double()).abs().max() / golden.abs().max()
    assert worst <= TOLERANCE[ours.dtype][1]


def load(objective, tensors):
    """Give the terms the reference's weights; returns our parameters by the names of their gradients."""
    parameters = {}
    for name, parameter in objective.terms.named_parameters():
        [ours] = [prefix for prefix in PARAMETERS if f"{name}.".startswith(f"{prefix}.")]
        theirs = PARAMETERS[ours] + name.removeprefix(ours)
        parameter.data.copy_(tensors[f"param.{theirs}"])
        parameters[f"grad64.param.{theirs}"] = parameter
    return parameters


def logit_objective(formula, tensors, spec):
    # nkd refuses to be built for two classes; its formula holds there too
    classes = max(tensors["input.student_logits"].shape[1], 24)
    vit = spec(8, classes=classes)
    return Objective(formula, vit, vit)


def run_on_logits(formula, tensors, targets, spec):
    student = tensors["input.student_logits"].requires_grad_()
    signals = {LOGITS: tensors["input.teacher_logits"]} if "input.teacher_logits" in tensors else {}
    total, _ = logit_objective(formula, tensors, spec)({LOGITS: student}, signals, Batch(targets=targets))
    total.backward()
    assert_loss(total.detach(), tensors["out64.loss"])
    assert_gradient(student.grad, tensors["grad64.input.student_logits"])
    return total


def targets_of(tensors):
    return tensors.get("input.mixed_labels", tensors["input.labels"])


@PRECISIONS
@cases("nkd")
def test_nkd(path, dtype, spec):
    given, tensors = read(path, dtype)
    formula = f"nkd(gamma={given['gamma']}, temperature={given['temp']})"
    run_on_logits(formula, tensors, targets_of(tensors), spec)


@PRECISIONS
@cases("nkd")
def test_nkd_without_gamma_is_its_first_part(path, dtype, spec):
    given, tensors = read(path, dtype)
    objective = logit_objective(f"nkd(gamma=0, temperature={given['temp']})", tensors, spec)
    teacher, student = tensors["input.teacher_logits"], tensors["input.student_logits"]
    total, _ = objective({LOGITS: student}, {LOGITS: teacher}, Batch(targets=targets_of(tensors)))
    assert_loss(total, tensors["out64.target"])


@PRECISIONS
@cases("kd")
def test_kd(path, dtype, spec):
    given, tensors = read(path, dtype)
    run_on_logits(f"kd(temperature={given['temperature']})", tensors, None, spec)


@PRECISIONS
@cases("kd-clskd")
def test_kd_as_soft_cross_entropy(path, dtype, spec):
    given, tensors = read(path, dtype)
    formula = f"{given['alpha']}*kd(temperature={given['temp']}, soft_ce=true)"
    run_on_logits(formula, tensors, None, spec)


@PRECISIONS
@cases("labels-clskd")
def test_labels(path, dtype, spec):
    given, tensors = read(path, dtype)
    run_on_logits(f"labels(smoothing={given['label_smooth_val']})", tensors, targets_of(tensors), spec)


@dataclass(frozen=True)
class DrawnBatch(Batch):
    """A batch whose noise is the reference's, so that the mask is made here."""

    noise: torch.Tensor | None = None

    def rand(self, size, columns):
        assert self.noise.shape == (size, columns)
        return self.noise


@PRECISIONS
@pytest.mark.parametrize("masking", ["handed in", "drawn from the same noise"])
@cases("vitkd")
def test_vitkd(path, masking, dtype, spec):
    given, tensors = read(path, dtype)
    grid = tuple(given["grid"])
    alpha, beta = given["alpha_vitkd"], given["beta_vitkd"]
    objective = Objective(
        f"vitkd(alpha={alpha}, beta={beta}, mask={given['lambda_vitkd']})",
        spec(given["student_dims"], grid=grid),
        spec(given["teacher_dims"], grid=grid),
    ).to(dtype)
    gradients = load(objective, tensors)

    # the reference's inputs may hold a class token first; taps hold patch tokens only
    low, high = (tensors[f"input.student_{x}"].requires_grad_() for x in ("low", "high"))
    first = given["prefix_tokens"]
    signals = [
        {features(0): low[:, 0, first:], features(1): low[:, 1, first:], FINAL: high[:, first:]}
        for low, high in (
            (low, high),
            (tensors["input.teacher_low"], tensors["input.teacher_high"]),
        )
    ]
    drawn = DrawnBatch(noise=tensors["mask.noise"])
    batch = Batch(mask=tensors["mask.mask"]) if masking == "handed in" else drawn
    total, raw = objective(*signals, batch)
    total.backward()

    assert_loss(total.detach(), tensors["out64.loss"])
    assert_loss(raw["mimic"].detach(), tensors["out64.mimic_raw"])
    assert_loss(raw["generate"].detach(), tensors["out64.generate_raw"])
    gradients |= {"grad64.input.student_low": low, "grad64.input.student_high": high}
    assert {name for name in tensors if name.startswith("grad64")} == set(gradients)
    for name, tensor in gradients.items():
        assert_gradient(tensor.grad, tensors[name])


@cases("vitkd")
def test_each_half_of_vitkd_has_the_gradients_of_its_own_tensors(path, spec):
    given, tensors = read(path, torch.float64)
    grid, first = tuple(given["grid"]), given["prefix_tokens"]
    student, teacher = spec(given["student_dims"], grid=grid), spec(given["teacher_dims"], grid=grid)
    batch = Batch(mask=tensors["mask.mask"])

    mimic = Objective(f"{given['alpha_vitkd']}*mimic", student, teacher).double()
    load(mimic, tensors)
    low, target = tensors["input.student_low"].requires_grad_(), tensors["input.teacher_low"]
    taps = [{features(i): x[:, i, first:] for i in (0, 1)} for x in (low, target)]
    total, _ = mimic(*taps, batch)
    total.backward()
    assert_gradient(low.grad, tensors["grad64.input.student_low"])

    weight, mask = given["beta_vitkd"], given["lambda_vitkd"]
    generate = Objective(f"{weight}*generate(mask={mask})", student, teacher).double()
    load(generate, tensors)
    high, target = tensors["input.student_high"].requires_grad_(), tensors["input.teacher_high"]
    total, _ = generate({FINAL: high[:, first:]}, {FINAL: target[:, first:]}, batch)
    total.backward()
    assert_gradient(high.grad, tensors["grad64.input.student_high"])


def signals_of(vit, images):
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


@PRECISIONS
@cases("e2e")
def test_images_to_gradients_of_the_whole_student(path, dtype, spec):
    given, tensors = read(path, dtype)
    vits, specs = {}, {}
    for who in ("student", "teacher"):
        made = given[f"timm_{who}"]
        vits[who] = VisionTransformer(**made).to(dtype)
        weights = {n.removeprefix(f"{who}."): t for n, t in tensors.items() if n.startswith(f"{who}.")}
        vits[who].load_state_dict(weights)
        specs[who] = spec(made["embed_dim"], depth=made["depth"], classes=made["num_classes"])
    objective = Objective("labels + vitkd + nkd", specs["student"], specs["teacher"]).to(dtype)
    gradients = load(objective, tensors)
    gradients |= {f"grad64.student.{name}": p for name, p in vits["student"].named_parameters()}

    images = tensors["input.images"]
    with torch.no_grad():
        teacher = signals_of(vits["teacher"].eval(), images)
    batch = Batch(targets=targets_of(tensors), mask=tensors["mask.mask"])
    total, raw = objective(signals_of(vits["student"], images), teacher, batch)
    total.backward()

    assert_loss(total.detach(), tensors["out64.total"])
    assert_loss(raw["labels"].detach(), tensors["out64.ori_loss"])
    assert_loss(raw["nkd"].detach(), tensors["out64.loss_nkd"])
    weighted = 3e-5 * raw["mimic"] + 3e-6 * raw["generate"]
    assert_loss(weighted.detach(), tensors["out64.loss_vitkd"])

    # Of the largest entry of all gradients: the smallest ones are rounding noise in float32.
    expected = torch.cat([tensors[name].flatten() for name in sorted(gradients)])
    ours = torch.cat([gradients[name].grad.flatten() for name in sorted(gradients)])
    assert {name for name in tensors if name.startswith("grad64")} == set(gradients)
    assert_gradient(ours, expected)
    if dtype == torch.float64:
        for name, parameter in gradients.items():
            assert_gradient(parameter.grad, tensors[name])
