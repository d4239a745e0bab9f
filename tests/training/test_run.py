"""The main job, end to end, on the built-in digits."""

from __future__ import annotations

import gc
import json
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import vitkd_cli as vitkd
from vitkd_cli.balance import Balance
from vitkd_cli.evaluation import Metrics
from vitkd_cli.objective import parse
from vitkd_cli.report.curves import curves
from vitkd_cli.report.tables import closing, plan_tables, verdict
from vitkd_cli.training import Reporter, checkpoint, costs, models, plan, validation
from vitkd_cli.training.arms import without_teacher
from vitkd_cli.training.learner import Learner
from vitkd_cli.training.signals import Stopped
from vitkd_cli.training.trainer import Trainer
from vitkd_cli.vit.taps import TappedViT


@pytest.fixture
def quiet() -> Reporter:
    return Reporter(silent=True)


def run(values, folder, quiet, **options):
    return vitkd.distill(vitkd.Recipe(**values, output=str(folder)), reporter=quiet, **options)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    values = {**tiny, "epochs": 3, "log_grads": 5, "log_interval": 2}
    return vitkd.distill(vitkd.Recipe(**values, output=str(folder)), reporter=Reporter(silent=True))


def test_the_run_folder(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert {"recipe.toml", "log.jsonl", "checkpoints", "student", "run.json", "result.json"} <= names
    assert [name for name in names if name.startswith(".")] == [".lock"]  # nothing half written
    again = vitkd.Recipe.from_toml(finished.folder / "recipe.toml")
    assert again == finished.recipe


def test_what_was_fitted_to_the_data_goes_with_the_run(finished):
    stored = vitkd.Recipe.from_toml(finished.folder / "recipe.toml")
    assert stored.lr == finished.recipe.lr_for(128) == finished.recipe.lr


def test_the_log(finished):
    lines = [json.loads(line) for line in (finished.folder / "log.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "event" not in line]
    assert [line["update"] for line in updates] == list(range(1, 16))  # a short run: every one
    for line in updates:
        weighted = sum(value for key, value in line.items() if key.endswith("/weighted"))
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)
        assert line["generate/weighted"] == pytest.approx(3e-6 * line["generate"])
        assert line["clip_factor"] == pytest.approx(min(1, 5 / (line["grad_norm"] + 1e-6)))
    shares = [line for line in lines if line.get("event") == "gradients"]
    assert [line["update"] for line in shares] == [5, 10, 15]
    for line in shares:
        total = sum(value for key, value in line.items() if key.endswith("grad_share"))
        assert total == pytest.approx(1)
    assert [line["epoch"] for line in lines if line.get("event") == "validation"] == [1, 2, 3]


def test_a_weight_over_time_is_logged_and_resumes(tiny, tmp_path, quiet, monkeypatch, read_log):
    values = {**tiny, "loss": "labels + 2*kd*linear(1, 0) + mimic*until(epoch=1)*3e-5"}
    run(values, tmp_path / "whole", quiet)
    updates = [line for line in read_log(tmp_path / "whole") if "event" not in line]
    assert [line["kd/weight"] for line in updates] == pytest.approx([2 * (1 - u / 9) for u in range(10)])
    assert [line["mimic/weight"] for line in updates] == pytest.approx([3e-5] * 5 + [0] * 5)
    for line in updates:
        assert "labels/weight" not in line
        assert line["kd/weighted"] == pytest.approx(line["kd/weight"] * line["kd"])

    real = Trainer.agreed

    def stopped(trainer, *rest):
        found = real(trainer, *rest)
        trainer.stop = 15 if trainer.progress.update == 7 else 0
        return found

    monkeypatch.setattr(Trainer, "agreed", stopped)
    with pytest.raises(Stopped):
        run(values, tmp_path / "stopped", quiet)
    vitkd.distill(resume=tmp_path / "stopped", reporter=quiet)
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "whole")


def test_the_baseline_keeps_labels_at_full_weight():
    formula = without_teacher(parse("0.5*labels*cosine(1, 0) + kd"))
    assert str(formula) == "labels"


def test_the_student_loads_with_timm_alone_to_the_bit(finished):
    student = timm.create_model(f"local-dir:{finished.student}", pretrained=True).eval()
    with safe_open(finished.student / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["vitkd"])
        assert set(file.keys()) == set(student.state_dict())  # no teacher, no projector
    assert about["class_names"] == [str(digit) for digit in range(10)]
    assert about["weights"] == "raw" and about["selected"] == "last"
    assert about["objective"].startswith("labels + 3e-05*mimic") or "mimic" in about["objective"]
    assert about["preprocessing"]["input_size"] == [3, 32, 32]
    assert about["metrics"]["top1"] == finished.results[0].top1
    assert vitkd.Recipe(**_toml(about["recipe"])) == finished.recipe.public()
    assert student.pretrained_cfg["label_names"] == about["class_names"]
    images = torch.rand(3, 3, 32, 32)
    twin = timm.create_model(f"local-dir:{finished.student}", pretrained=True).eval()
    assert torch.equal(student(images), twin(images))
    card = (finished.student / "README.md").read_text()
    assert "library_name: timm" in card and "vit_tiny_patch16_224" in card


def _toml(text):
    import tomllib

    values = tomllib.loads(text)
    del values["schema"]
    return values


def test_transformers_loads_the_student_to_the_bit(finished):
    transformers = pytest.importorskip("transformers", reason="an extra of the tests")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(finished.student).eval()
    ours = timm.create_model(f"local-dir:{finished.student}", pretrained=True).eval()
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(theirs(images).logits, ours(images))
    assert theirs.config.id2label[3] == "3"


def test_training_is_training(tiny, tmp_path, quiet):
    """A student that learns from all scans for a few epochs is far above chance."""
    values = {**tiny, "loss": "labels", "teacher": None, "shots": None, "epochs": 8, "batch_size": 64}
    values |= {
        "model_kwargs": tiny["teacher_kwargs"].removesuffix(",num_classes=10"),
        "lr": 3e-3,
        "mixup": 0.0,
        "cutmix": 0.0,
        "aa": "none",
        "hflip": 0.0,
        "reprob": 0.0,
    }
    values |= {"scale": (0.7, 1.0), "log_interval": 20, "val_interval": 8, "crop_pct": 1.0}
    result = run(values, tmp_path / "run", quiet).results[0]
    assert result.arm == "student"
    assert result.top1 > 30, result  # chance is 10


def test_a_teacher_is_fine_tuned_first_and_the_arms_are_compared(tiny, tmp_path, quiet):
    values = {**tiny, "finetune_teacher": 1, "baseline": True, "seeds": 2, "epochs": 1}
    values["teacher_kwargs"] = values["teacher_kwargs"].replace(",num_classes=10", "")
    plans = []
    run(values, tmp_path / "run", quiet, dry_run=True, show_plan=plans.append)
    finished = run(values, tmp_path / "run", quiet)
    assert [(r.arm, r.seed) for r in finished.results] == [
        ("distilled", 42),
        ("alone", 42),
        ("distilled", 43),
        ("alone", 43),
    ]
    # The dry run has counted all of them, and the disk that they leave.
    costs = plans[0].costs
    assert [cost.title for cost in costs] == [
        "fine-tuning the teacher",
        "scoring the teacher",
        *(f"{r.arm} ({r.seed})" for r in finished.results),
    ]
    assert all(cost.validation > 0 for cost in costs)
    left = sum(file.stat().st_size for file in finished.folder.rglob("*.safetensors"))
    assert sum(cost.kept for cost in costs) == pytest.approx(left, rel=0.2)
    assert not list(finished.folder.rglob("*.pt"))
    said = _text(plan_tables(plans[0]))
    assert "fine-tuning the teacher" in said and "4 students" in said and "validation" in said
    teacher = timm.create_model(f"local-dir:{finished.folder / 'teacher' / 'student'}", pretrained=True)
    assert teacher.num_classes == 10 and finished.teacher.top1 is not None
    log = (finished.folder / "teacher" / "log.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["update"] == 64  # all 1,297 scans, not the students' 100
    assert finished.student.joinpath("model.safetensors").is_file()
    assert "means of 2 seeds" in _text(closing(finished)) and finished.results[0].images == 500
    assert "on these 500 images; 2 seeds show too little to claim" in verdict(finished)
    assert curves(finished).stat().st_size > 10_000
    # The baseline starts from the same weights and sees the same images.
    for seed in (42, 43):
        logs = [finished.folder / f"{arm}-{seed}" / "log.jsonl" for arm in ("distilled", "alone")]
        ours, theirs = (json.loads(log.read_text().splitlines()[0]) for log in logs)
        assert ours["labels"] == pytest.approx(theirs["labels"], rel=1e-6)
    # A second look at the finished run finds every figure again.
    assert vitkd.distill(resume=finished.folder, reporter=quiet).results == finished.results


@pytest.mark.parametrize(("seeds", "baseline", "students"), [(1, False, 1), (1, True, 2)])
def test_each_student_is_built_and_rehearsed_once(
    tiny, tmp_path, quiet, monkeypatch, seeds, baseline, students
):
    calls = []
    for module, name in ((plan, "rehearse"), (models, "build")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, _real=real, **kwargs: calls.append(_real) or _real(*args, **kwargs)
        )
    run({**tiny, "steps": 1, "seeds": seeds, "baseline": baseline}, tmp_path / "run", quiet)
    names = [call.__name__ for call in calls]
    assert names.count("rehearse") == students
    assert names.count("build") == students + 1  # and the teacher


def test_a_teacher_is_fine_tuned_in_batches_for_its_own_images(tiny, tmp_path, quiet, read_log):
    """Of 1,297 scans, where its student has 100."""
    values = {**tiny, "batch_size": None, "finetune_teacher": 1, "steps": 1, "loss": "labels + kd"}
    finished = run(values, tmp_path / "run", quiet)
    assert finished.recipe.batch == 4
    assert read_log(tmp_path / "run" / "teacher")[-1]["update"] == 1297 // 64


def _text(renderables):
    from rich.console import Console

    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


def test_a_dry_run_writes_nothing_and_says_what_would_run(tiny, tmp_path, quiet):
    plans = []
    assert run(tiny, tmp_path / "run", quiet, dry_run=True, show_plan=plans.append) is None
    assert not (tmp_path / "run").exists()
    text = _text(plan_tables(plans[0]))
    for words in ("vit_tiny_patch16_224", "MMACs", "4×4", "features(0) 24 → 48", "final", "global batch 20"):
        assert words in text, text
    for words in ("updates  10", "MiB at most", "while rehearsing", "an epoch", "0.000125 peak"):
        assert words in text, text


@pytest.mark.parametrize("select", ["last", "best", "ema"])
def test_which_weights_become_the_student(tiny, tmp_path, quiet, select):
    values = {**tiny, "model_ema": True, "model_ema_decay": 0.5, "select": select}
    finished = run(values, tmp_path / "run", quiet)
    with safe_open(finished.student / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["vitkd"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    newest = sorted((finished.folder / "checkpoints").glob("update-*"))[-1]
    stored = {}
    for name in ("learner", "ema"):
        with safe_open(newest / f"{name}.safetensors", "pt") as file:
            stored[name] = {
                key.removeprefix("student.model."): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118
            }
    assert about["selected"] == select
    assert about["weights"] == ("raw" if select == "last" else "average")
    same = {name: all(torch.equal(weights[k], stored[name][k]) for k in weights) for name in stored}
    assert same["learner"] == (select == "last")
    if select == "ema":
        assert same["ema"]


SWIN = "img_size=32,window_size=4,depths=(1,1),embed_dim=12,num_heads=(1,2)"


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "vitkd", "mixup": 0.0, "cutmix": 0.0},
        {"loss": "labels + mimic(blocks=(0,-1), reduce='mean') + kd(temperature=2)"},
        {"clip_mode": "agc"},
        {"clip_mode": "value", "layer_decay": 0.7},
        {"grad_checkpointing": True, "loss": "labels + relations + relations(what='attention')"},
        {"mixed_precision": "bf16", "terms_dtype": "bf16"},
        {"aug_repeats": 2},
        {"opt": "lamb", "sched": "step", "channels_last": True},
        {"student": "swin_tiny", "model_kwargs": SWIN},
        {"student": "deit_tiny_distilled"},
        {"student": "cait_xxs24"},
    ],
    ids=str,
)
def test_options_run(tiny, tmp_path, quiet, changes):
    finished = run({**tiny, "steps": 2, **changes}, tmp_path / "run", quiet)
    lines = [json.loads(line) for line in (finished.folder / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (finished.student / "model.safetensors").is_file()


def test_terms_in_bf16_go_with_models_in_bf16(tiny, tmp_path, quiet):
    with pytest.raises(
        vitkd.UserError, match="--terms-dtype bf16, and the models compute in float32"
    ) as refused:
        run({**tiny, "terms_dtype": "bf16"}, tmp_path / "run", quiet)
    assert "--mixed-precision bf16" in refused.value.hint


@pytest.mark.slow
def test_compiled_training_is_the_same_training(tiny, tmp_path, quiet, monkeypatch, read_log):
    def compile(self):  # graph capture without inductor, which takes minutes
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    monkeypatch.setattr(Balance, "due", lambda self, update: update == 1)  # after an ordinary update
    values = {**tiny, "steps": 3, "loss": "labels + nkd + vitkd(balance=0.2)"}
    plain = run(values, tmp_path / "plain", quiet)
    compiled = run({**values, "torchcompile": True}, tmp_path / "compiled", quiet)
    for ours, theirs in zip(read_log(plain.folder), read_log(compiled.folder), strict=True):
        assert ours.pop("event", None) == theirs.pop("event", None)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_compiled_teacher_stops_as_early_as_a_plain_one(tiny, tmp_path, quiet):
    """Its work is counted, for blocks that are passed over cost nothing."""
    work, values = [], {**tiny, "loss": "labels + 3e-5*mimic(blocks=0)", "torchcompile": True}
    for compiled in (False, True):
        recipe = vitkd.Recipe(**{**values, "torchcompile": compiled}, output=str(tmp_path / "run"))
        plans: list[vitkd.training.Plan] = []
        vitkd.distill(recipe, reporter=quiet, dry_run=True, show_plan=plans.append)
        with FlopCounterMode(display=False) as counter:
            plans[0].tapped(torch.rand(2, 3, 32, 32))
        work.append(counter.get_total_flops())
    assert work[0] == work[1]


@pytest.mark.slow
def test_arms_and_seeds_leave_no_hooks_on_their_teacher_and_no_models_in_memory(
    tiny, tmp_path, quiet, monkeypatch
):
    fit, alive, teachers = Trainer.fit, [], []

    def counted(self, resume):
        gc.collect()
        alive.append(
            sum(issubclass(type(each), (TappedViT, torch.optim.Optimizer)) for each in gc.get_objects())
        )
        return fit(self, resume)

    monkeypatch.setattr(Trainer, "fit", counted)
    arms = ("labels + mimic(balance=0.1)", "labels + relations", "kd")
    values = {**tiny, "shots": 2, "steps": 1, "epochs": 1, "seeds": 2, "against": arms}
    run(values, tmp_path / "run", quiet, show_plan=lambda plan: teachers.append(plan.teacher.net))
    [teacher] = teachers
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in teacher.modules())
    assert len(alive) == 8 and set(alive[1:]) == {alive[1]}


@pytest.mark.parametrize(
    ("right", "student", "said"),
    [
        (60, 0, "the teacher is at chance: its top-1 is 12.00"),
        (300, 310, "the teacher's top-1 is 60.00, and the student begins at 62.00"),
        (300, 290, None),
    ],
)
def test_a_teacher_that_has_little_to_teach_is_noted(
    tiny, tmp_path, quiet, monkeypatch, right, student, said
):
    """Of 500 validation images; the student's weights are a file's, so that it begins with something."""
    recipe = vitkd.Recipe(**tiny, output=str(tmp_path / "run"))
    labels = torch.arange(500) % 10

    def scored(count):
        named = torch.where(torch.arange(500) < count, labels, (labels + 1) % 10)
        return Metrics(labels, named[:, None])

    monkeypatch.setattr(validation.Validation, "of", lambda *_: lambda *_: scored(student))
    started = recipe.but(initial_checkpoint="weights.pth")
    note = validation.doubt_about(scored(right), SimpleNamespace(net=None), None, started, None)
    assert note is None if said is None else said in note
    assert validation.doubt_about(scored(300), None, None, recipe, None) is None


def test_a_random_teacher_is_noted_and_a_single_run_ends_with_the_baseline(
    tiny, tmp_path, quiet, monkeypatch
):
    notes = []
    monkeypatch.setattr(quiet, "warn", notes.append)
    finished = run({**tiny, "steps": 1}, tmp_path / "run", quiet)
    assert any("the teacher is at chance" in note for note in notes), notes
    last = closing(finished)[-1]
    assert last.endswith(f"vitkd distill --resume {tmp_path / 'run'} --baseline --seeds 5")
    compared = vitkd.distill(resume=tmp_path / "run", machine={"baseline": True, "seeds": 2}, reporter=quiet)
    assert "2 seeds show too little" in verdict(compared)


def test_what_no_term_reaches_is_frozen_and_named(tiny, tmp_path, quiet, monkeypatch):
    notes = []
    monkeypatch.setattr(quiet, "warn", notes.append)
    finished = run({**tiny, "loss": "vitkd", "steps": 1}, tmp_path / "run", quiet)
    assert any("no term reaches" in note and "head.weight" in note for note in notes), notes
    assert finished is not None


# What can go wrong while it runs ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_term_and_checkpoint(tiny, tmp_path, quiet, monkeypatch):
    from vitkd_cli.terms.labels import Labels

    real, calls = Labels.forward, []

    def forward(self, pairs, batch):
        calls.append(batch.update)
        return real(self, pairs, batch) * (float("nan") if batch.update >= 6 else 1)

    monkeypatch.setattr(Labels, "forward", forward)
    with pytest.raises(vitkd.UserError) as stopped:
        run({**tiny, "epochs": 3, "recovery_interval": 2}, tmp_path / "run", quiet)
    error = stopped.value
    assert "the loss at update 7 (term labels) is not finite" in error.message
    assert error.exit_code == 3
    # The weights of update 6 are those that went wrong; update 6 was finite with those of update 5.
    weights = tmp_path / "run" / "checkpoints" / "update-00000005" / "learner.safetensors"
    assert "the last good checkpoint is" in error.message and "update-00000005" in error.message
    assert f"--initial-checkpoint {weights} --lr" in error.hint
    assert not (tmp_path / "run" / "student").exists()


def test_out_of_memory_names_batch_models_and_cures(tiny, tmp_path, quiet, monkeypatch):
    def forward(self, *_):
        torch.empty(2**55)  # the allocator's own message

    monkeypatch.setattr(Learner, "__call__", forward)
    monkeypatch.setattr("vitkd_cli.training.plan.rehearse", _no_rehearsal)
    with pytest.raises(vitkd.UserError) as stopped:
        run(tiny, tmp_path / "run", quiet)
    error = stopped.value
    assert "out of memory with 20 images a process through vit_tiny" in error.message
    assert "--batch-size 10 --grad-accum-steps 2" in error.hint and error.exit_code == 3


def _no_rehearsal(*_args, **_options):
    from vitkd_cli.training.rehearsal import Rehearsal

    return Rehearsal((), 0, 2)


def test_a_full_disk_in_the_run_names_the_last_good_checkpoint(tiny, tmp_path, quiet, monkeypatch):
    real, saves = checkpoint.save_file, []

    def save_file(*args, **options):
        saves.append(args)
        if len(saves) > 3:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(vitkd.UserError, match=r"the disk is full .* checkpoint is .*update-0") as full:
        run({**tiny, "recovery_interval": 1}, tmp_path / "run", quiet)
    assert full.value.exit_code == 3


def test_a_bug_keeps_its_traceback(tiny, tmp_path, quiet, monkeypatch):
    from vitkd_cli.terms.labels import Labels

    monkeypatch.setattr(Labels, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tiny, tmp_path / "run", quiet)


@pytest.mark.parametrize("an_image", [1e-4, 0.03, 0.3, 0.9, 5.0])
def test_images_per_second_take_two_seconds_once_an_architecture(an_image, monkeypatch):
    now, passes = [100.0], []

    class Clocked(torch.nn.Module):
        def forward(self, images):
            passes.append(len(images))
            now[0] += an_image * len(images)
            return images

    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])
    spec = SimpleNamespace(mean=(0.5,), input_size=(4, 4), depth=1)
    session = SimpleNamespace(speeds={}, device=torch.device("cpu"), dtype=torch.float32)
    built = SimpleNamespace(spec=spec)
    speed, batch = costs.images_per_second(Clocked(), built, session)
    assert speed == pytest.approx(1 / an_image) and batch in (1, 2, 4, 8, 16, 32)
    assert now[0] - 100 <= max(2.0, an_image)
    assert batch == 32 or an_image > 1e-4
    count = len(passes)
    assert costs.images_per_second(Clocked(), built, session) == (speed, batch) and len(passes) == count
