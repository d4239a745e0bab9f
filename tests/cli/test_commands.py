"""The commands as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import vitkd_cli
from vitkd_cli.cli.front import COMMANDS, command_called
from vitkd_cli.cli.spelling import respell
from vitkd_cli.recipe import Recipe


def test_help_teaches(cli):
    code, out, _ = cli("--help")
    assert code == 0
    for command in ("distill", "eval", "methods", "demo"):
        assert command in out
    code, out, _ = cli("distill", "--help")
    assert "vitkd distill --teacher deit3_small --student deit_tiny" in out
    _, out, _ = cli("distill", "--help-all")
    for flag in ("--teacher", "-b", "-vb", "-j", "--opt-betas", "--no-teacher-pretrained", "--log-grads"):
        assert flag in out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_front_page_says_of_a_command_what_its_own_does(name):
    help = " ".join(command_called(name).help.split())
    assert help.startswith(COMMANDS[name])


def test_the_front_page_reads_no_command(cli):
    code = (
        "import sys; from vitkd_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "read = {'vitkd_cli.requests', 'vitkd_cli.recipe', 'rich.markdown'} & set(sys.modules)\n"
        "assert not read, read"
    )
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True)


def test_version(cli):
    assert cli("--version")[1].strip() == f"vitkd {vitkd_cli.__version__}"


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "vitkd_cli", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"vitkd {vitkd_cli.__version__}"


def test_what_the_imports_left_is_collected_at_the_end():
    code = (
        "import atexit, gc; from vitkd_cli.cli.flags import waking\n"
        "with waking(quiet=True): pass\n"
        "assert gc.isenabled() and gc.get_freeze_count()\n"
        "atexit._run_exitfuncs(); assert not gc.get_freeze_count()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("--learning-rate 1e-3", "--lr 1e-3"),
        ("--batch_size=8", "--batch-size=8"),
        ("--output_dir x", "--output x"),
        ("--kd-model-name deit3_small", "--teacher deit3_small"),
        ("--dataset hfds/x --data-dir y", "--data hfds/x --data-dir y"),
        ("--num-workers 2 --imgsz 64", "--workers 2 --img-size 64"),
        ("--amp --lr 1", "--lr 1 --mixed-precision fp16"),
        ("--amp --amp-dtype bfloat16", "--mixed-precision bf16"),
        ("--mean 0.5,0.5,0.5", "--mean 0.5,0.5,0.5"),
    ],
)
def test_foreign_spellings(foreign, ours):
    assert respell(foreign.split()) == ours.split()


def test_print_recipe_says_where_each_value_comes_from(cli, tmp_path):
    toml = tmp_path / "my.toml"
    toml.write_text('data = "digits"\nepochs = 7\nlr = 1e-3\n')
    code, out, _ = cli("distill", "--recipe", str(toml), "--lr", "2e-3", "--print-recipe")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert code == 0
    assert rows["lr"] == ["0.002", "--lr"]
    assert rows["epochs"][0] == "7" and rows["epochs"][1].endswith("my.toml")
    assert (rows["batch_size"], rows["batch_base"]) == (["–", "default"], ["256", "default"])


def test_print_recipe_of_a_run_is_the_runs(cli, tmp_path):
    (tmp_path / "recipe.toml").write_text(Recipe(epochs=7).to_toml())
    code, out, _ = cli("distill", "--resume", str(tmp_path), "--print-recipe")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["epochs"] == ["7", str(tmp_path / "recipe.toml")]


def test_no_data_means_the_sample_and_says_so(cli):
    _, out, _ = cli("distill", "--print-recipe")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["data"] == ["digits", "recipe", "sample"]
    assert int(rows["epochs"][0]) <= 30
    code, out, err = cli("distill", "--teacher", "deit3_small", "--student", "deit_tiny", "--dry-run")
    assert "no --data given: running on the built-in sample" in out
    assert code == 2 and "deit3_small_patch16_224.fb_in1k" in err  # the weights are not here


def test_dry_run(cli, flags, tiny, tmp_path):
    code, out, err = cli("distill", *flags(tiny), "--output", str(tmp_path / "run"), "--dry-run")
    assert code == 0, err
    for words in ("models", "objective", "features(0) 24 → 48", "global batch 20 = 1 process × 20 × 1"):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_few_images_from_scratch_point_to_finetune(cli, flags, tiny, tmp_path):
    values = {**tiny, "epochs": 300}
    _, out, _ = cli("distill", *flags(values), "--output", str(tmp_path / "run"), "--dry-run")
    assert "--recipe finetune is meant for such data" in out


def test_quiet_and_plain_lines(cli, flags, tiny, tmp_path):
    values = {**tiny, "steps": 1}
    code, out, err = cli("distill", *flags(values), "--output", str(tmp_path / "a"), "--quiet")
    assert (code, out, err) == (0, "", "")
    code, out, err = cli("distill", *flags(values), "--output", str(tmp_path / "b"))
    assert "\x1b" not in out and "update 1/1" in out  # no terminal: no colours, no bar


def test_eval_of_a_run_folder(cli, flags, tiny, tmp_path):
    run = tmp_path / "run"
    assert cli("distill", *flags({**tiny, "steps": 2}), "--output", str(run))[0] == 0
    wanted = json.loads((run / "result.json").read_text())
    for model in (str(run), str(run / "student"), f"local-dir:{run / 'student'}"):
        code, out, err = cli("eval", model, "--data", "digits", "--json", "-j", "0", "--quiet")
        assert code == 0, err
        found = json.loads(out)
        assert found["count"] == 500
        assert (found["top1"], found["top5"]) == pytest.approx((wanted["top1"], wanted["top5"]))
    code, out, _ = cli("eval", str(run), "--data", "digits", "-j", "0")
    assert "input_size (3, 32, 32)" in out and "500 images" in out


def test_demo_is_distill_with_a_recipe(cli, tmp_path):
    run = tmp_path / "demo"
    code, out, err = cli(
        "demo", "--output", str(run), "--seeds", "1", "--epochs", "1", "--finetune-teacher", "1"
    )
    assert code == 0, err
    assert "distilled − alone" in out and "next, on your own images" in out
    pictures = [run / "curves.png", *(run / "attention").glob("*-layers.png")]
    assert len(pictures) == 4 and all(file.read_bytes().startswith(b"\x89PNG") for file in pictures)
    assert "teacher" in (run / "attention" / "attention.html").read_text()
    assert "shots = 5" in (run / "recipe.toml").read_text()


@pytest.mark.parametrize("auto", [(), ("--resume", "auto")], ids=" ".join)
def test_a_recipe_s_warm_up_is_cut_to_a_quarter_and_said(cli, flags, tiny, tmp_path, auto):
    (tmp_path / "long.toml").write_text("epochs = 30\nwarmup_epochs = 3\n")
    recipe = ("--recipe", str(tmp_path / "long.toml"), "--output", str(tmp_path / "run"), "--dry-run")
    _, out, _ = cli("distill", *flags(tiny), *recipe, *auto)
    assert "warm-up is cut to 0.5 epochs, a quarter of this run" in out
    assert "images are few: a peak learning rate of 0.000125" in out
