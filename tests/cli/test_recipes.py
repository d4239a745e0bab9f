"""``vitkd recipes`` lists what is shipped and prints it as it is."""

from __future__ import annotations

import json

from vitkd_cli.recipe import shipped_recipes, summary_of


def test_it_lists_every_recipe_with_what_it_is_for(cli):
    code, out, err = cli("recipes")
    assert (code, err) == (0, "")
    rows = dict(line.strip().split(maxsplit=1) for line in out.splitlines() if line.startswith(" "))
    for name, path in shipped_recipes().items():
        assert rows[name] == summary_of(path)
    assert "vitkd distill --recipe NAME" in out


def test_it_prints_one_as_it_is_shipped(cli, tmp_path):
    code, out, _ = cli("recipes", "finetune")
    assert code == 0 and out == shipped_recipes()["finetune"].read_text()
    (tmp_path / "mine.toml").write_text(out)
    _, mine, _ = cli("distill", "--recipe", str(tmp_path / "mine.toml"), "--data", "x", "--print-recipe")
    assert "layer_decay" in mine and "0.75" in mine and "mine.toml" in mine


def test_json_has_the_values_of_the_base_too(cli):
    listed = json.loads(cli("recipes", "--json")[1])
    assert [recipe["name"] for recipe in listed] == list(shipped_recipes())
    one = json.loads(cli("recipes", "paper/deit-s_deit-t", "--json")[1])
    assert one in listed
    assert one["values"]["teacher"] == "deit_small_patch16_224.fb_in1k"
    assert one["values"]["warmup_epochs"] == 20 and "base" not in one["values"]


def test_print_recipe_names_the_base(cli):
    _, out, _ = cli("distill", "--recipe", "paper/deit-s_deit-t", "--data", "x", "--print-recipe")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["teacher"][-2:] == ["recipe", "paper/deit-s_deit-t"]
    assert rows["min_lr"] == ["1e-05", "recipe", "paper/deit3-s_deit-t"]


def test_mistakes(cli, tmp_path):
    code, out, err = cli("recipes", "paper")
    assert (code, out) == (2, "") and "did you mean paper/cait-s24_deit-t or " in err
    code, _, err = cli("recipes", "finetun")
    assert code == 2 and "did you mean finetune?" in err
    (tmp_path / "weights").write_bytes(b"\xff\xfe")
    code, _, err = cli("recipes", str(tmp_path / "weights"))
    assert code == 2 and "is not TOML" in err
