"""A recipe says what it means, however it was filled in."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from vitkd_cli import Recipe, UserError, distill
from vitkd_cli.objective import Objective, parse
from vitkd_cli.recipe import compose, find_recipe, read_toml, settings, settle, shipped_recipes, summary_of
from vitkd_cli.requests import Weights
from vitkd_cli.training import Plan, Reporter
from vitkd_cli.training.learner import Learner
from vitkd_cli.training.plan import optimizer_of
from vitkd_cli.vit.build import build
from vitkd_cli.vit.names import resolve


def test_every_field_is_declared_with_help_and_panel():
    assert [field.name for field in settings()] == [field.name for field in dataclasses.fields(Recipe)]
    for field in settings():
        assert field.option.help.endswith("."), field.name
        assert field.panel, field.name
        assert field.check(field.default) == field.default, field.name


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(teacher="a", lr=1e-3, scale=(0.5, 1)), *map(
    Recipe.from_toml, shipped_recipes().values())])  # fmt: skip
def test_toml_and_back(recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.from_toml(tmp_path / "recipe.toml") == recipe


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1
    assert Recipe().but(lr=1.0).lr == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "no recipe key 'epoch'.*did you mean epochs"),
        ({"epochs": "3"}, "epochs must be a whole number, not '3'"),
        ({"epochs": 3.5}, "epochs must be a whole number"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"reprob": 1.5}, "reprob must be at most 1, not 1.5"),
        ({"lr": float("inf")}, "lr must be a finite number"),
        ({"pretrained": "yes"}, "pretrained must be true or false"),
        ({"remode": "pixle"}, "remode must be one of const, rand, pixel.*did you mean pixel"),
        ({"scale": [0.1]}, "scale must be 2 numbers"),
        ({"opt_betas": "0.9 0.999"}, "opt_betas must be numbers.*with commas"),
        ({"scale": [0.9, 0.1]}, "LOW ≤ HIGH"),
        ({"select": "ema"}, "needs an average"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "as many values"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message) as refused:
        compose(("my.toml", values))
    if len(values) == 1 and "scale" not in values and "select" not in values:
        assert "(my.toml)" in refused.value.message


def test_flags_over_file_over_default():
    recipe, origins = compose(("my.toml", {"epochs": 7, "lr": 1e-3}), ("", {"lr": 2e-3, "scale": "0.5,1"}))
    assert (recipe.epochs, recipe.lr, recipe.scale, recipe.batch) == (7, 2e-3, (0.5, 1.0), 256)
    assert (origins["epochs"], origins["lr"], origins["batch_size"]) == ("my.toml", "--lr", "default")


def test_a_file_may_use_hyphens_and_must_be_of_our_schema(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("batch-size = 8\n")
    assert read_toml(path) == {"batch_size": 8}
    path.write_text("schema = 99\n")
    with pytest.raises(UserError, match="recipe schema 99"):
        read_toml(path)
    with pytest.raises(UserError, match="cannot read the recipe"):
        read_toml(tmp_path / "none.toml")


def test_without_data_it_is_the_environment_s_or_the_sample():
    recipe, origins = settle({}, None, {})
    assert recipe.data == "digits" and origins["epochs"] == "recipe sample" and recipe.epochs < 50
    recipe, origins = settle({"epochs": 3}, None, {})
    assert recipe.epochs == 3  # the sample lies beneath everything else
    recipe, origins = settle({}, None, {"VITKD_DATA": "/data"})
    assert (recipe.data, recipe.epochs, origins["data"]) == ("/data", 300, "$VITKD_DATA")
    assert settle({"data": "x"}, None, {"VITKD_DATA": "/data"})[0].data == "x"
    assert settle({"data_dir": "x"}, None, {})[0].data is None


def test_the_learning_rate_follows_the_global_batch():
    assert Recipe(batch_size=256, num_processes=4).peak_lr == pytest.approx(1e-3)
    assert Recipe(batch_size=64, grad_accum_steps=2).peak_lr == pytest.approx(5e-4 * 128 / 512)
    assert Recipe(batch_size=2048, lr_base_scale="sqrt").peak_lr == pytest.approx(1e-3)
    assert Recipe(lr=0.1).peak_lr == 0.1
    assert Recipe(batch_size=2).final_lr == Recipe(batch_size=2).peak_lr < 1e-5  # it never rises
    assert [Recipe(epochs=e).warmup for e in (300, 600, 30, 1)] == pytest.approx([20, 20, 2, 1 / 15])
    assert Recipe(epochs=30, warmup_epochs=5).warmup == 5


# --- the shipped recipes ---------------------------------------------------------------------------------

EVERY_RECIPE = pytest.mark.parametrize("name", shipped_recipes())
PAPER = {
    "paper/deit-s_deit-t": ("deit_small_patch16_224.fb_in1k", "deit_tiny_patch16_224"),
    "paper/deit-b_deit-t": ("deit_base_patch16_224.fb_in1k", "deit_tiny_patch16_224"),
    "paper/deit3-s_deit-t": ("deit3_small_patch16_224.fb_in22k_ft_in1k", "deit_tiny_patch16_224"),
    "paper/deit3-b_deit-s": ("deit3_base_patch16_224.fb_in22k_ft_in1k", "deit_small_patch16_224"),
    "paper/deit3-l_deit-b": ("deit3_large_patch16_224.fb_in22k_ft_in1k", "deit_base_patch16_224"),
    "paper/cait-s24_deit-t": ("cait_s24_224.fb_dist_in1k", "deit_tiny_patch16_224"),
}
SMALL = "depth=2,embed_dim=48,num_heads=3"


def shipped(name: str) -> Recipe:
    return Recipe.from_toml(shipped_recipes()[name])


@EVERY_RECIPE
def test_it_says_what_it_is_for(name):
    summary = summary_of(shipped_recipes()[name])
    assert 30 < len(summary) < 120 and summary.endswith(".")


@EVERY_RECIPE
def test_its_names_and_formula_are_read(name):
    recipe = shipped(name)
    for model in filter(None, (recipe.teacher, recipe.student)):
        assert resolve(model).architecture == model.partition(".")[0]
    assert parse(str(parse(recipe.loss))) == parse(recipe.loss)


@EVERY_RECIPE
def test_it_is_rehearsed_with_random_weights(name, photos):
    """At the real image sizes, with models of the same families that are two blocks deep and narrow."""
    recipe = shipped(name)
    recipe = recipe.but(
        data=recipe.data or str(photos),
        teacher=recipe.teacher or "deit3_small",
        student=recipe.student or "deit_tiny",
        teacher_pretrained=False,
        pretrained=False,
        teacher_kwargs=recipe.teacher_kwargs or SMALL,
        model_kwargs=recipe.model_kwargs or SMALL,
        batch_size=8,
        global_batch_size=None,
        workers=0,
        device="cpu",
    )
    plans: list[Plan] = []
    assert distill(recipe, dry_run=True, reporter=Reporter(silent=True), show_plan=plans.append) is None
    (plan,) = plans
    assert plan.rehearsal.frozen == ()  # every parameter of the student learns from it
    assert plan.teacher is not None and plan.teacher.spec.name.startswith(recipe.teacher.partition(".")[0])
    if name in PAPER:
        assert plan.teacher.spec.input_size == plan.student.spec.input_size == (224, 224)


def test_the_six_pairs_of_the_paper():
    assert {name for name in shipped_recipes() if name.startswith("paper/")} == set(PAPER)
    first = shipped("paper/deit3-s_deit-t")
    for name, (teacher, student) in PAPER.items():
        recipe = shipped(name)
        assert (recipe.teacher, recipe.student) == (teacher, student)
        assert resolve(teacher).tag_was_typed
        processes = 16 if name == "paper/deit3-l_deit-b" else 4
        assert recipe.shared_among(processes).batch == recipe.batch  # theirs
        for number in (1, processes, 64):
            assert recipe.shared_among(number).global_batch == 1024
            assert recipe.shared_among(number).peak_lr == pytest.approx(1e-3)
        changed = {f.name for f in settings() if getattr(recipe, f.name) != getattr(first, f.name)}
        base = {"batch_size", "drop_path", "model_ema", "model_ema_decay", "select"}
        assert changed <= {"teacher", "student", "loss"} | (base if processes == 16 else set())
    big = shipped("paper/deit3-l_deit-b")
    assert (big.drop_path, big.model_ema_decay, big.select) == (0.1, 0.99996, "best")


@pytest.mark.parametrize(
    ("wanted", "at_most", "processes", "batch", "steps"),
    [
        (1024, None, 1, 256, 4),
        (1024, 256, 8, 128, 1),
        (1024, 100, 2, 64, 8),
        (96, 40, 1, 32, 3),
        (14, 4, 2, 1, 7),
        (None, 10, 3, 10, 2),
    ],
)
def test_a_global_batch_is_that_of_any_number_of_processes(wanted, at_most, processes, batch, steps):
    recipe = Recipe(global_batch_size=wanted, batch_size=at_most, grad_accum_steps=2).shared_among(processes)
    assert (recipe.batch, recipe.grad_accum_steps, recipe.num_processes) == (batch, steps, processes)
    assert recipe.global_batch == wanted or wanted is None


def test_a_global_batch_that_cannot_be_shared_is_refused():
    for processes in (3, 2048):
        with pytest.raises(UserError, match="--global-batch 1024 cannot be shared evenly"):
            Recipe(global_batch_size=1024).shared_among(processes)


def test_the_paper_s_objectives():
    combined, shallow = parse("labels + vitkd + nkd"), parse("labels + 3e-5*mimic(blocks=(0, 1))")
    for name in PAPER:
        only_shallow = name in ("paper/deit-b_deit-t", "paper/cait-s24_deit-t")
        assert parse(shipped(name).loss) == (shallow if only_shallow else combined), name


def test_the_defaults_are_the_paper_s_settings():
    """But for what the defaults leave to the models, the machine and the seed."""
    paper, defaults = shipped("paper/deit3-s_deit-t"), Recipe()
    changed = {f.name for f in settings() if getattr(paper, f.name) != getattr(defaults, f.name)}
    left_open = {
        "batch_size",
        "global_batch_size",
        "drop_path",
        "opt_betas",
        "opt_eps",
        "warmup_epochs",
        "crop_pct",
        "interpolation",
    }
    assert changed - left_open == {"teacher", "student", "loss", "mixed_precision"}
    assert parse(paper.loss) == parse(defaults.loss)
    assert (paper.warmup, paper.batch) == (defaults.warmup, defaults.batch)


EPOCHS, WARMUP, PER_EPOCH = 300, 20, 1_281_167 // 1024  # 1251 updates
PEAK, START, END = 1e-3, 1e-6, 1e-5


def cosine(epoch: float) -> float:
    return END + (PEAK - END) * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2


def timm_s(epoch: float) -> float:
    """A straight line, then the cosine where it is by then."""
    return START + (PEAK - START) * epoch / WARMUP if epoch < WARMUP else cosine(epoch)


def authors(epoch: float) -> float:
    """The cosine from the first update, times a factor that rises from a thousandth to 1."""
    return cosine(epoch) * (1 - max(0.0, 1 - epoch / WARMUP) * (1 - 1e-3))


def test_the_paper_s_learning_rate_curve():
    recipe = shipped("paper/deit3-s_deit-t").but(num_processes=4)
    student = build(
        resolve("vit_tiny"), Weights(pretrained=False), num_classes=10, kwargs=f"img_size=32,{SMALL}"
    )
    learner = Learner(student.net, Objective("labels", student.spec, None), student.spec)
    optimizer, scheduler = optimizer_of(recipe, learner, PER_EPOCH)

    def at(epoch: float) -> float:
        scheduler.step_update(round(epoch * PER_EPOCH))
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        return rate

    for epoch in (0, 1, 10, 19, 20, 21, 150, 299, 300):
        assert at(epoch) == pytest.approx(timm_s(epoch), rel=1e-9), epoch
    assert at(0) == pytest.approx(1e-6)
    assert at(150) == pytest.approx((PEAK + END) / 2)
    assert at(300) == pytest.approx(1e-5)
    assert at(20 - 1 / PER_EPOCH) == pytest.approx(PEAK, rel=1e-4)  # from there it drops onto the cosine
    assert at(20) == pytest.approx(9.8918e-4, rel=1e-5)
    assert at(1 + 1 / PER_EPOCH) > at(1)  # by update


def test_both_curves_are_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for epoch in (0, 10, 20, 150, 300):
        theirs, ours = (f"{rate:.3e}".replace("e-0", "e-") for rate in (authors(epoch), timm_s(epoch)))
        assert f"| {epoch} | {theirs} | {ours} |" in page


# --- recipes that build on another -----------------------------------------------------------------------


def test_base_lies_beneath_and_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "paper/deit3-l_deit-b"\nepochs = 7\n')
    recipe, origins = settle({"lr": 1e-3, "data": "x"}, str(path))
    assert (recipe.epochs, recipe.lr, recipe.batch_size, recipe.weight_decay) == (7, 1e-3, 64, 0.05)
    assert [origins[key] for key in ("epochs", "lr", "batch_size", "weight_decay", "no_aug")] == [
        str(path), "--lr", "recipe paper/deit3-l_deit-b", "recipe paper/deit3-s_deit-t", "default"
    ]  # fmt: skip
    assert Recipe.from_toml(path) == recipe.but(lr=None, data=None)


@pytest.mark.parametrize("base", ['"finetun"', '"mine.toml"', "3", '["finetune"]', '""'])
def test_base_is_a_shipped_recipe(base, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f"base = {base}\n")
    with pytest.raises(UserError, match=r"base must be a shipped recipe, not .*mine\.toml") as refused:
        Recipe.from_toml(path)
    assert "finetune" in refused.value.hint


def test_names_of_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'paper' is a folder of recipes") as refused:
        find_recipe("paper")
    assert all(name in refused.value.hint for name in PAPER)
    for typed in ("deit3-s_deit-t", "paper/deit3-s_deit_t", "papers/deit3-s_deit-t"):
        with pytest.raises(UserError) as refused:
            find_recipe(typed)
        assert "did you mean paper/deit3-s_deit-t?" in refused.value.hint
    (tmp_path / "paper").write_text("epochs = 1\n")  # a file of that name is meant, not the folder
    assert find_recipe("paper").read_text() == "epochs = 1\n"


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        ("crop_pct", 87.5, "at most 1"),
        ("crop_pct", 1e9, "at most 1"),
        ("crop_pct", 0, "above 0"),
        ("lr", 0, "above 0"),
        ("lr", 1e38, "at most 1000"),
        ("lr_base", 1e38, "at most 1000"),
        ("layer_decay", 0, "above 0"),
        ("mean", "5,5,5", "at most 1"),
        ("std", "-1,-1,-1", "above 0"),
        ("std", "0,1", "above 0"),
        ("scale", "5,10", "at most 1"),
        ("ratio", "0,1", "above 0"),
        ("model_ema_decay", 1, "below 1"),
        ("opt_betas", "0.9,1", "below 1"),
        ("img_size", 2**64, "at most 8192"),
        ("epochs", 10**400, "at most .* not a number of 401 digits"),
        ("seeds", 10**9, "at most 1000"),
        ("recount", 10**9, "at most 100"),
        ("weight_decay", 1e308, "at most 100"),
        ("reprob", float("nan"), "finite"),
    ],
)
def test_nonsense_is_out_of_range(field, value, wrong):
    with pytest.raises(UserError, match=rf"{field} must be .*{wrong}"):
        Recipe(**{field: value})


def test_a_warm_up_ends_within_the_run(tmp_path):
    with pytest.raises(UserError, match="warmup_epochs = 40 is beyond the 30 epochs of the run"):
        Recipe(epochs=30, warmup_epochs=40)
    # A recipe's warm-up is that of its own length: a shorter run has a quarter at most.
    recipe, origins = settle({"epochs": 4}, "finetune")
    assert (recipe.warmup, origins["warmup_epochs"]) == (1, "a quarter of the epochs")
    assert settle({"epochs": 4, "warmup_epochs": 3.0}, "finetune")[0].warmup == 3


def test_a_run_that_is_no_shorter_keeps_its_warm_up(tmp_path):
    recipe = Recipe(epochs=4, warmup_epochs=3)
    assert recipe.but(epochs=4) == recipe and recipe.but(epochs=8).warmup == 3
    (tmp_path / "mine.toml").write_text(recipe.to_toml())
    kept, origins = settle({"epochs": 4}, str(tmp_path / "mine.toml"))
    assert (kept.warmup, origins["warmup_epochs"]) == (3, str(tmp_path / "mine.toml"))
    assert settle({"epochs": 20}, "finetune")[0].warmup == 3
    assert shipped("finetune").but(epochs=8).warmup == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_lr": 1e-2}, "min_lr = 0.01 is above the peak"),
        ({"warmup_epochs": 30, "epochs": 30}, "all 100 updates are warm-up"),
        ({"model_ema": True}, "98% of the average are the weights it began with"),
        ({"mixup_off_epoch": 400}, "beyond the run"),
        ({"color_jitter": 0.4}, "unused beside aa"),
    ],
)
def test_what_is_legal_and_pointless_is_said(changes, said):
    assert Recipe(epochs=300).pointless(per_epoch=5, updates=1500) == []
    (line,) = Recipe(**{"warmup_epochs": 1, **changes}).pointless(per_epoch=10, updates=100)
    assert said in line


@pytest.mark.parametrize(
    ("images", "given", "batch", "lr"),
    [
        (1999, {}, 98, 1.25e-4),
        (2000, {}, 256, 2.5e-4),  # the recipe's own
        (400, {}, 20, 1.25e-4),
        (30, {}, 2, 1.25e-4),
        (1000, {"batch_base": 64, "lr_base_size": 1024}, 50, 6.25e-5),
        (1000, {"grad_accum_steps": 5}, 10, 1.25e-4),
        (400, {"batch_size": 64}, 64, 1.25e-4),
        (400, {"batch_size": 256}, 256, 2.5e-4),
        (400, {"lr": 1e-5}, 20, 1e-5),
        (400, {"batch_size": 2, "lr": 1e-5}, 2, 1e-5),
    ],
)
def test_few_images_get_small_batches_and_no_smaller_steps(images, given, batch, lr):
    recipe, said = Recipe(**given).fitted(images)
    assert (recipe.batch, recipe.peak_lr) == (batch, pytest.approx(lr))
    if recipe.batch_size != given.get("batch_size") or recipe.lr != given.get("lr"):
        assert said and all("images are few" in line for line in said)
    else:
        assert not said
    if not given and images >= 40:
        assert images // recipe.global_batch >= (20 if images < 2000 else 7)
    assert recipe.fitted(images) == (recipe, [])  # a run that is resumed keeps its values


@pytest.mark.parametrize(
    ("given", "batch", "lr"),
    [
        ({}, 64, 1.25e-4),  # both are those of 1,297 images again
        ({"batch_size": 20}, 20, 1.25e-4),
        ({"lr": 0.5}, 64, 0.5),
    ],
)
def test_a_recipe_that_was_fitted_to_few_images_is_fitted_to_more(given, batch, lr):
    recipe, _ = Recipe(**given).fitted(100)
    again = recipe.refitted(100, 1297)
    assert (again.batch, again.peak_lr) == (batch, pytest.approx(lr))
    large = recipe.refitted(100, 5000)
    assert large.batch_size == given.get("batch_size") and large.lr == given.get("lr")


def test_small_is_sized_for_a_cpu():
    recipe = shipped("small")
    assert 64 <= recipe.img_size == recipe.teacher_img_size <= 96
    assert recipe.pretrained and recipe.finetune_teacher and recipe.epochs <= 10
    fitted, said = recipe.fitted(900)
    assert (fitted.batch, fitted.peak_lr, len(said)) == (44, 1.25e-4, 2)
