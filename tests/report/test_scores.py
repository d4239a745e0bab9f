"""What ``vitkd eval`` prints and writes."""

from __future__ import annotations

import csv
import io
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from vitkd_cli.data.datasets import named_split
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Evaluation, Evaluations, Metrics
from vitkd_cli.report import scores
from vitkd_cli.vit.classes import Match

QUICK = ("--data", "digits", "-j", "0", "-q")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models of the digits, tiny and told apart by their seeds."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3,
            num_classes=10,
        )  # fmt: skip
        torch.nn.init.normal_(model.head.weight)
        arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
        about = {"label_names": [str(digit) for digit in range(10)]}
        save_for_hf(
            model, str(root / name), model_config=about, model_args=arguments, safe_serialization=True
        )
    return str(root / "one"), str(root / "two")


def test_one_model(models, cli):
    code, out, err = cli("eval", models[0], *QUICK)
    assert code == 0, err
    facts = json.loads(cli("eval", models[0], *QUICK, "--json")[1])
    assert facts["count"] == 500 and "500 images" in out
    assert f"{facts['top1']:.3f} ({facts['top1_low']:.1f}–{facts['top1_high']:.1f})" in out
    assert f"{facts['ece']:.2f} (up to {facts['ece_by_chance']:.2f})" in out
    worst = facts["worst_classes"][0]
    assert f"worst classes: {worst['class']} {worst['accuracy']:.1f}" in out
    assert facts["confusions"][0]["images"] >= facts["confusions"][1]["images"]
    assert facts["parameters"] == sum(
        p.numel() for p in timm.create_model(f"local-dir:{models[0]}").parameters()
    )
    assert facts["multiply_adds"] > facts["parameters"]  # each weight is used by 17 tokens


def test_two_models_are_compared_in_words(models, cli):
    code, out, err = cli("eval", *models, *QUICK, "--teacher", models[1], "--calibration")
    assert code == 0, err
    found = json.loads(cli("eval", *models, *QUICK, "--json", "--teacher", models[1])[1])
    [pair] = found["comparisons"]
    first, second = found["models"]
    assert (first["top1"] - second["top1"]) * 5 == pytest.approx(pair["only_first"] - pair["only_second"])
    assert scores.CAUTION in out
    better = "is better than" if pair["p_holm"] < 0.05 else "cannot be told apart"
    assert better in out and f"p = {pair['p_holm']:.2g}" in out
    assert second["agreement"] == 100 and second["divergence"] == pytest.approx(0, abs=1e-12)
    assert first["agreement"] < 100 and first["divergence"] > 0
    assert f"with {models[1]}" in out
    assert out.count("calibration of") == 2


def test_a_narrow_terminal_loses_nothing(models, cli):
    found = [json.loads(cli("eval", model, *QUICK, "--json")[1]) for model in models]
    from rich.console import Console

    def shown(width: int) -> str:
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(scores.table(found))
        return console.export_text()

    wide, narrow = shown(300).splitlines(), shown(80)
    assert wide[0].split()[0] == "model" and len(wide) == 3
    assert {"top-5", "loss", "Brier"} <= {line.split()[0] for line in narrow.splitlines() if line.strip()}
    text = "".join(narrow.split())
    for one in found:
        assert f"{one['top1']:.3f}" in text and f"{one['loss']:.4f}" in text


def test_a_stop_is_told_and_finished_models_are_skipped(models, cli, tmp_path, monkeypatch):
    from vitkd_cli.evaluation import accuracy

    statistics, calls = accuracy.per_image, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return statistics(*arguments)

    call = ("eval", *QUICK, "-b", "100", "--output", str(tmp_path / "out"))
    assert cli(*call, models[0])[0] == 0
    monkeypatch.setattr(accuracy, "per_image", stop)
    code, _, err = cli(*call, *models)
    assert code == 130 and "the scoring was stopped" in err and "are not run again" in err
    calls.clear()
    monkeypatch.setattr(accuracy, "per_image", lambda *given: calls.append(given) or statistics(*given))
    code, out, _ = cli(*call, *models)
    assert code == 0 and len(calls) == 5  # the batches of the second
    assert out.count("scored before, answers kept") == 1


def test_a_class_map_does_not_reorder_a_model_that_knows_the_names(models, cli, tmp_path):
    from PIL import Image

    for c in range(10):
        (tmp_path / "data" / str(c)).mkdir(parents=True)
        for index in range(4):
            image = Image.new("L", (8, 8), 20 * c)
            image.putpixel((index, c % 8), 255)
            image.save(tmp_path / "data" / str(c) / f"{index}.png")
    (tmp_path / "map.txt").write_text("".join(f"{c}\n" for c in reversed(range(10))))
    call = ("eval", models[0], "--data", str(tmp_path / "data"), "-j", "0", "-q", "--json")
    plain, mapped = (
        json.loads(cli(*call, *more)[1]) for more in ((), ("--class-map", str(tmp_path / "map.txt")))
    )
    assert mapped["top1"] == plain["top1"] and mapped["loss"] == pytest.approx(plain["loss"])


def test_csv_and_markdown(models, cli):
    rows = list(csv.DictReader(io.StringIO(cli("eval", *models, *QUICK, "--csv")[1])))
    facts = json.loads(cli("eval", *models, *QUICK, "--json")[1])["models"]
    for row, one in zip(rows, facts, strict=True):
        assert row["model"] == one["model"] and float(row["top1"]) == one["top1"]
        assert row["crop_pct"] == str(one["preprocessing"]["crop_pct"])
    lines = cli("eval", *models, *QUICK, "--markdown")[1].splitlines()
    assert lines[0].startswith("| model |") and lines[1].startswith("| --- |")
    assert all(len(line.split("|")) == len(lines[0].split("|")) for line in lines[1:4])
    code, _, err = cli("eval", models[0], *QUICK, "--csv", "--json")
    assert code == 2 and "--json and --csv exclude each other" in err


def test_a_folder_of_results(models, cli, tmp_path):
    arguments = ("eval", *models, *QUICK, "--output", str(tmp_path / "scores"))
    code, _, err = cli(*arguments)
    assert code == 0, err
    written = {path.name for path in (tmp_path / "scores").iterdir()}
    assert written == {
        "answers", "classes.csv", "reliability.png", "results.csv", "results.json", "results.md"
    }  # fmt: skip
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    classes = list(csv.DictReader((tmp_path / "scores" / "classes.csv").open()))
    for one in results["models"]:
        own = [row for row in classes if row["model"] == one["model"]]
        assert sum(int(row["images"]) for row in own) == 500
        assert sum(int(row["right"]) for row in own) / 5 == pytest.approx(one["top1"])
    again = cli(*arguments)[1]
    assert again.count("scored before, answers kept") == 2
    assert json.loads((tmp_path / "scores" / "results.json").read_text()) == results


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_answers_image_by_image(models, cli, tmp_path, suffix):
    path = tmp_path / f"answers{suffix}"
    code, out, err = cli("eval", *models, *QUICK, "--json", "--predictions", str(path))
    assert code == 0, err
    if suffix == ".csv":
        rows = list(csv.DictReader(path.open()))
    else:
        from pyarrow import parquet

        rows = parquet.read_table(path).to_pylist()
    assert len(rows) == 1000
    first = json.loads(out)["models"][0]
    own = [row for row in rows if row["model"] == models[0]]
    assert sum(str(row["right"]) == "True" for row in own) / 5 == pytest.approx(first["top1"])
    assert all((str(row["label"]) == str(row["prediction"])) == (str(row["right"]) == "True") for row in rows)
    assert rows[0]["label_name"] == str(rows[0]["label"]) and rows[0]["image"].startswith("digits[")
    assert 0 < float(rows[0]["label_probability"]) <= float(rows[0]["confidence"]) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--predictions", "answers.txt"), "is no .csv or .parquet"),
        (("--output", "{file}/below"), "--output: cannot write"),
        (("--predictions", "{file}/answers.csv"), "--predictions: cannot write"),
        (("--predictions", "{file}.csv"), "--predictions: cannot write"),
    ],
)
def test_places_that_cannot_be_written(models, cli, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "file.csv").mkdir()
    given = [argument.format(file=tmp_path / "file") for argument in arguments]
    code, out, err = cli("eval", models[0], *QUICK, *given)
    assert (code, out) == (2, "") and message in err and "hint:" in err


def test_a_missing_package_gives_the_line_to_type(models, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("vitkd_cli.errors.find_spec", lambda name: None)
    code, _, err = cli("eval", models[0], *QUICK, "--predictions", str(tmp_path / "a.parquet"))
    assert code == 2 and "needs the package pyarrow" in err and 'pip install "vitkd[parquet]"' in err


def test_throughput(models, cli, monkeypatch):
    monkeypatch.setattr("vitkd_cli.evaluation.cost._SECONDS", 0.1)
    code, out, err = cli("eval", models[0], *QUICK, "--json", "--throughput")
    assert code == 0, err
    facts = json.loads(out)
    assert 0 < facts["latency_p50_ms"] <= facts["latency_p95_ms"]
    assert 0 < facts["batch_latency_p50_ms"] <= facts["batch_latency_p95_ms"]
    assert facts["images_per_second"] >= 1000 / facts["latency_p50_ms"]
    assert facts["peak_memory"] is None or facts["peak_memory"] > 4 * facts["parameters"]


def evaluation(name, metrics, config):
    """Of a model that was not built."""
    facts = {"parameters": 10, "multiply_adds": None, "preprocessing": config}
    return Evaluation(
        SimpleNamespace(spec=SimpleNamespace(name=name, num_classes=3), **facts),
        Match(None, ()),
        "d",
        metrics,
    )


def test_columns_that_nobody_fills_are_left_out():
    metrics = Metrics(
        labels=torch.tensor([0, 1]),
        ranked=torch.tensor([[0, 1], [0, 1]]),
        confidence=torch.tensor([0.9, 0.6]),
        nll=torch.tensor([0.1, 0.9]),
        brier=torch.tensor([0.0, 1.0]),
    )
    config = {"input_size": (3, 8, 8), "crop_pct": 1.0, "interpolation": "bicubic", "mean": (0,), "std": (1,)}
    one = evaluation("m", metrics, config)
    facts = scores.record(one)
    assert (facts["top1"], facts["top5"]) == (50, 100)
    titles = scores.table([facts]).titles
    assert "KL" not in titles and "images/s" not in titles and "GMACs" not in titles
    assert Evaluations((one,), (), None).comparisons == []


def test_a_corrupt_image_is_named(models, cli, tmp_path):
    from PIL import Image

    for c in range(10):
        (tmp_path / str(c)).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / str(c) / "a.png")
    (tmp_path / "3" / "a.png").write_bytes(b"no image")
    code, _, err = cli("eval", models[0], "--data", str(tmp_path), "-j", "0", "-q")
    assert code == 3 and "1 of 10 image files cannot be read" in err and "3/a.png: not a picture" in err
    (tmp_path / "3" / "a.png").unlink()
    (tmp_path / "x").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "x" / "a.png")
    code, _, err = cli("eval", models[0], "--data", str(tmp_path), "-j", "0", "-q")
    assert code == 2 and "lacks: x" in err


def test_require_and_writable(tmp_path):
    from vitkd_cli.errors import require, writable

    require("test", "json", purpose="nothing")
    with pytest.raises(UserError, match="this needs the package no_such_package"):
        require("x", "no_such_package", purpose="this")
    assert writable(tmp_path / "a" / "b", "--output") == tmp_path / "a" / "b"
    assert list((tmp_path / "a").iterdir()) == []


def test_a_class_that_the_data_has_no_name_for(models, cli, tmp_path):
    """A class map of fewer classes than the model's leaves it free to name others."""
    (tmp_path / "map.txt").write_text("\n".join("abcdefg"))
    images = named_split(data="digits")[0]
    for index in range(0, 500, 5):
        image, label = images[index]
        if label < 7:
            (tmp_path / "seven" / "abcdefg"[label]).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "seven" / "abcdefg"[label] / f"{index}.png")
    data = ("--data", str(tmp_path / "seven"), "--class-map", str(tmp_path / "map.txt"), "-j", "0", "-q")
    code, out, err = cli("eval", models[0], *data, "--json")
    assert code == 0, err
    assert {row["taken_for"] for row in json.loads(out)["confusions"]} & {"class 7", "class 8", "class 9"}


HOSTILE = ["=1+1", "a\n\x1b[2J", "<script>|*b*"]


def test_hostile_names_stay_text_in_every_file(tmp_path):
    """Cells that a spreadsheet would compute, line breaks, ESC, HTML and Markdown, as classes and images."""
    from markdown_it import MarkdownIt

    from vitkd_cli.data.images import Images
    from vitkd_cli.text import plain

    scored = torch.eye(3).double()
    metrics = Metrics(
        labels=torch.arange(3), ranked=torch.tensor([[0, 1], [1, 2], [0, 2]]), confidence=scored.amax(1),
        nll=scored.sum(1), brier=scored.sum(1),
    )  # fmt: skip
    config = dict.fromkeys(("input_size", "crop_pct", "interpolation", "mean", "std"))
    models = [evaluation(name, metrics, config) for name in HOSTILE]
    found = Evaluations(tuple(models), tuple(HOSTILE), Images(HOSTILE, [0] * len(HOSTILE)))
    records = [scores.record(one, found.names) for one in models]
    scores.write_folder(found, records, tmp_path)
    found.write_predictions(tmp_path / "predictions.csv")
    safe = ["'=1+1", r"a\n\x1b[2J", "<script>|*b*"]
    for file, column in (
        ("classes.csv", "name"),
        ("results.csv", "model"),
        ("predictions.csv", "label_name"),
    ):
        with (tmp_path / file).open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert list(dict.fromkeys(row[column] for row in rows)) == safe
        assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "@"))]
    assert {
        one["class"] for one in json.loads((tmp_path / "results.json").read_text())["models"][0]["confusions"]
    }
    page = (tmp_path / "results.md").read_text()
    assert "\x1b" not in page
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    cells = [
        child.content for t in tokens if t.type == "inline" for child in [t.children or []] for child in child
    ]
    assert {plain(name) for name in HOSTILE} <= set(cells)
    assert not [t for t in tokens if t.type == "html_block"]
    assert sum(t.type == "tr_open" for t in tokens) == 1 + len(HOSTILE)
