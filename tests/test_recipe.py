"""A recipe says what it means, however it was filled in."""

from __future__ import annotations

import dataclasses

import pytest
from timm.scheduler import create_scheduler_v2
from torch import nn, optim

from vitkd_cli import Recipe, UserError
from vitkd_cli.recipe import compose, options, read_toml, settle, shipped_recipes


def test_every_field_is_declared_with_help_and_panel():
    assert [field.name for field in options()] == [field.name for field in dataclasses.fields(Recipe)]
    for field in options():
        assert field.option.help.endswith("."), field.name
        assert field.option.panel, field.name
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
    assert (recipe.epochs, recipe.lr, recipe.scale, recipe.batch_size) == (7, 2e-3, (0.5, 1.0), 256)
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


def test_the_paper_s_learning_rate_curve():
    recipe = Recipe.from_toml(shipped_recipes()["paper"]).but(num_processes=4)
    assert recipe.global_batch == 1024 and recipe.peak_lr == pytest.approx(1e-3)
    per_epoch = 10
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=recipe.peak_lr)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.sched,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.final_lr,
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )

    def at(epoch):
        scheduler.step_update(epoch * per_epoch)
        return optimizer.param_groups[0]["lr"]

    assert at(0) == pytest.approx(1e-6)
    # timm joins the cosine at epoch 20: 1e-5 + 0.99e-3 (1 + cos(π 20/300)) / 2
    assert at(20) == pytest.approx(9.8918e-4, rel=1e-4)
    assert at(150) == pytest.approx((1e-3 + 1e-5) / 2)
    assert at(300) == pytest.approx(1e-5)
