"""The page about a run: what it tells, in a browser and without script, and what it says is missing."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitkd_cli
from vitkd_cli.cli.front import command_called
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.cache import read_rows, write_rows
from vitkd_cli.evaluation.metrics import Metrics
from vitkd_cli.evaluation.statistics import spread
from vitkd_cli.files import read_sealed, write_sealed
from vitkd_cli.recipe import Recipe, settings, settle
from vitkd_cli.report.end import conclude
from vitkd_cli.report.facts import changes_of, command_of_run
from vitkd_cli.report.figures import drawn_curve
from vitkd_cli.report.found import FoundArm, found_runs
from vitkd_cli.report.logs import MOST, Curve, Line, curves_of
from vitkd_cli.report.page import write_report
from vitkd_cli.report.sections import section_of
from vitkd_cli.training import Reporter, Run, distill

SCRIPT, IMAGE = "<script>alert(1)", "<img src=x onerror=alert(2)>"
ARM = 'labels + 0.5*kd; name=<b>"kd" & $x_1$'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder whose name must not be told, with images of three classes, two of them of hostile names."""
    place = tmp_path_factory.mktemp("private-place")
    generator = np.random.default_rng(0)
    for label, name in enumerate((IMAGE, SCRIPT, "plain")):
        (place / "images" / name).mkdir(parents=True)
        for index in range(14):
            noise = generator.integers(0, 120, (24, 20, 3), np.uint8)
            noise[..., label] += 60
            Image.fromarray(noise).save(place / "images" / name / f"{index}.png")
    return place


@pytest.fixture(scope="module")
def run(tiny, place) -> Run:
    """Three arms of three seeds and a fine-tuned teacher."""
    recipe = Recipe(
        **{**tiny, "teacher_kwargs": str(tiny["teacher_kwargs"]).replace(",num_classes=10", "")},
    ).but(
        data=str(place / "images"), shots=None, val_fraction=0.3, finetune_teacher=1,
        loss="labels + kd + 3e-5*mimic", baseline=True,
        against=(ARM,), seeds=3, batch_size=6, log_grads=2, output=str(place / "run"),
    )  # fmt: skip
    finished = distill(recipe, reporter=Reporter(silent=True))
    assert finished is not None
    return finished


@pytest.fixture(scope="module")
def page(run) -> Path:
    drawn = write_report(run)
    assert drawn.path == run.folder / "report.html" and drawn.text == drawn.path.read_text()
    return drawn.path


@pytest.fixture
def moved(run, tmp_path) -> Path:
    """A copy of the run to spoil."""
    return Path(shutil.copytree(run.folder, tmp_path / "copy"))


def told(folder, *, pictures=True):
    [found] = found_runs([folder])
    return section_of(found, "", lambda stage, done, total: None, pictures=pictures)


# --- what it tells ----------------------------------------------------------------------------------------


def test_it_tells_of_everything(run, page):
    text = page.read_text()
    headings = re.findall(r'<h2 id="(\w+)">', text)
    assert headings == ["models", "differences", "curves", "calibration", "mistakes", "attention", "made"]
    titles = re.findall(r"<figcaption>([^<]+)</figcaption>\n<div class=\"plot\">", text)
    assert {
        "Top-1 on the validation images (%)", "Objective: all terms, weighted", "Learning rate",
        "Training images per second", "labels, raw and weighted", "mimic, raw", "mimic, weighted",
        "kd, share of the gradient",
    } <= set(titles)  # fmt: skip
    assert "kd, weighted" in titles  # one of two arms weights it
    for contrast in run.contrasts:
        assert contrast.verdict and f"{contrast.found.mean:+.2f} points" in text
    assert f"against &lt;b&gt;&#34;kd&#34; &amp; $x_1$, 3 seeds, {run.results[0].images} images" in text
    assert len(re.findall("<svg", text)) == len(titles)
    assert "24 pixels" not in text and "Pictures are 20 pixels wide and 24 high" in text


def test_models_stand_side_by_side(run):
    section = told(run.folder, pictures=False)
    teacher, distilled, *_ = section.rows
    assert [row.title for row in section.rows] == ["teacher", *run.arms]
    assert run.teacher is not None and teacher.number is None
    assert teacher.cells["parameters"] == f"{run.teacher.parameters / 1e6:.2f} M"
    for cell in ("multiply-adds", "weights", "latency", "images/s", "top-1 (95 %)", "ECE (chance)"):
        assert "–" not in (teacher.cells[cell][:1], distilled.cells[cell][:1])
    scores = [result.top1 for result in run.arms["distilled"]]
    assert distilled.cells["top-1 (95 %)"] == "{:.2f} ± {:.2f}".format(*(one for [one] in spread([scores])))
    size = (run.results[0].student / "model.safetensors").stat().st_size
    assert distilled.cells["weights"] == f"{size / 1e6:.2f} MB"


def test_mistakes_are_those_of_the_answers(run):
    section = told(run.folder)
    [distilled, *_] = section.mistakes
    kept = [Metrics.from_rows(read_rows(result.answers)) for result in run.arms["distilled"]]
    assert distilled.wrong == pytest.approx(np.mean([float((~one.right).sum()) for one in kept]))
    names = [IMAGE, SCRIPT, "plain"]
    for pair in distilled.pairs:
        true, said = names.index(pair.true), names.index(pair.said)
        counts = [int(((one.labels == true) & (one.predictions == said)).sum()) for one in kept]
        assert pair.count == pytest.approx(np.mean(counts)) and 0 < len(pair.pictures) <= 4
    theirs = Metrics.from_rows(read_rows(run.teacher.answers))
    alone = np.mean([float((one.right < theirs.right).sum()) for one in kept])
    assert distilled.differing.startswith(f"The teacher alone is right on {alone:.0f} images")
    assert len(section.attention) == 3
    _, looks = section.attention[0]
    assert [row.title.partition(":")[0] for row in looks] == ["teacher", "student"]
    assert all(len(row.pictures) == 4 for row in looks)  # the image and three blocks


@pytest.mark.parametrize("noted", [True, False])
def test_an_arm_stands_beside_its_own_teacher(moved, noted):
    """A teacher that two arms share is called after the first of them."""
    content = read_sealed(moved / "run.json")
    own, other = content["results"][:2]
    assert [own["taught_by"], other["taught_by"]] == ["teacher", None]
    shutil.copytree(moved / "teacher", moved / "other-teacher")
    rows = read_rows(moved / "teacher" / "answers.safetensors")
    rows[:, 1] = rows[:, 0]  # this one is always right
    write_rows(moved / "other-teacher" / "answers.safetensors", rows)
    content["more_teachers"] = [{**content["teacher"], "arm": "teacher of first", "folder": "other-teacher"}]
    arm = other["arm"]
    for result in content["results"]:
        if result["arm"] == arm and noted:
            result["taught_by"] = "teacher of first"
        elif not noted:
            del result["taught_by"]
    write_sealed(moved / "run.json", content)
    said = {one.title: one.differing for one in told(moved).mistakes}
    assert ("the student alone on 0;" in said[arm]) is noted


def test_a_relative_folder_is_not_told(moved, monkeypatch):
    monkeypatch.chdir(moved.parent.parent)
    folder = moved.relative_to(Path.cwd())
    (moved / "distilled-42" / "student" / "model.safetensors").write_bytes(b"damaged")
    content = read_sealed(moved / "run.json")
    content["results"] = [one for one in content["results"] if one["seed"] < 44]  # two seeds: no verdict
    write_sealed(moved / "run.json", content)
    drawn = write_report(folder)
    assert drawn.path == folder / "report.html" and "2 seeds show too little" in drawn.text
    assert folder.parts[0] not in drawn.text and "--resume" not in drawn.text


def test_the_command_makes_the_same_run(run):
    recipe = run.recipe.but(data_dir="/a/b c", crop_pct=0.9, scale=(0.5, 1.0))
    words = shlex.split(command_of_run(recipe).replace("\\\n", " "))
    assert words[:2] == ["vitkd", "distill"]
    given = command_called("distill").make_context("distill", words[2:]).params
    known = {field.name for field in settings()}
    parsed, _ = settle(
        {key: value for key, value in given.items() if key in known and value not in (None, [])}
    )
    assert parsed == recipe.public().but(report=True)
    changes = {name: (value, default) for name, value, default in changes_of(recipe)}
    assert changes["seeds"] == ("3", "1") and changes["data"] == ("images", "–") and "output" not in changes


def test_nothing_private_is_told(run, page, place):
    text = page.read_text() + write_report(run, markdown=True).text
    for hidden in (str(place), place.name, str(Path.home()), "/tmp"):
        assert hidden not in text
    assert not re.search(r"(?<![\w<.:/])/(?:root|home|tmp|usr|var)/", text)


def test_curves_are_means_over_seeds(run):
    [found] = found_runs([run.folder])
    curves = {curve.title: curve for curve in curves_of(found.arms)}
    line = curves["Top-1 on the validation images (%)"].lines[0]
    of_seeds = [[entry["top1"] for entry in result.history] for result in run.arms["distilled"]]
    assert line.x == [1, 2] and line.mean == pytest.approx(np.mean(of_seeds, 0))
    assert len(curves["kd, raw"].lines) == 2 and len(curves["labels, raw and weighted"].lines) == 3


def test_a_long_log_is_thinned_and_a_damaged_line_passed_over(tmp_path):
    lines = [json.dumps({"update": n, "epoch": n / 10, "loss": float(n), "lr": 0.1}) for n in range(1, 9001)]
    (tmp_path / "log.jsonl").write_text("\n".join(["{", *lines, "nonsense", '{"update": 1']))
    [loss, lr] = curves_of([FoundArm(0, "it", [], [tmp_path])])
    assert MOST < len(loss.lines[0].x) <= 2 * MOST
    assert loss.lines[0].mean == pytest.approx([10 * x for x in loss.lines[0].x])
    assert set(lr.lines[0].mean) == {0.1}


def test_other_numbers_of_a_log_have_figures_too(tmp_path):
    lines = [json.dumps({"update": n, "epoch": n, "loss": 1.0, "waiting_for_data": 0.2}) for n in (1, 2)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert [c.title for c in curves_of([FoundArm(0, "it", [], [tmp_path])])][1:] == ["waiting for data"]


@pytest.mark.parametrize("number", range(8))
def test_every_arm_has_a_colour_of_the_page(number):
    svg = drawn_curve(Curve("it", [Line(number, [0.0, 1.0], [1.0, 2.0], [0.1, 0.1])]), "it").svg
    assert svg.count(f'data-arm="{number}"') == 2 and svg.count(f"stroke: var(--arm{number % 7})") == 4
    assert svg.count(f"fill: var(--arm{number % 7})") == 3  # the band and two marks


# --- what lacks is said -----------------------------------------------------------------------------------


def test_images_that_are_gone(moved):
    recipe = (moved / "recipe.toml").read_text()
    (moved / "recipe.toml").write_text(recipe.replace("private-place", "gone"))
    section = told(moved)
    assert section.missing["data"].startswith("The images of this run cannot be shown: ")
    assert "private" not in section.missing["data"]
    assert section.mistakes and not section.mistakes[0].pairs[0].pictures  # the counts are told
    assert section.missing["attention"].startswith("Attention is not shown")
    assert any("29 training images" in line or "30 training images" in line for line in section.data.lines)


def test_images_that_changed(moved, place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    for image in (tmp_path / "images" / "plain").iterdir():
        Image.new("RGB", (5, 5)).save(image)
    text = (moved / "recipe.toml").read_text()
    (moved / "recipe.toml").write_text(text.replace(str(place / "images"), str(tmp_path / "images")))
    assert "cannot be shown: they changed since (" in told(moved, pictures=False).missing["data"]


def test_damaged_answers_and_students(moved):
    (moved / "distilled-42" / "answers.safetensors").write_bytes(b"damaged")
    (moved / "distilled-42" / "student" / "model.safetensors").write_bytes(b"damaged")
    section = told(moved)
    assert section.found.notes == ("the answers of distilled (seed 42) are damaged",)
    assert section.missing["models"].startswith(
        "The student was not opened: student is damaged or was changed"
    )
    assert section.mistakes[0].seeds == 2
    assert section.rows[1].cells["latency"] == "–" and section.rows[1].cells["top-1 (95 %)"] != "–"


@pytest.mark.parametrize("damage", [b"{", None])
def test_a_run_that_is_not_finished(moved, damage):
    if damage is None:
        (moved / "run.json").unlink()
    else:
        (moved / "run.json").write_bytes(damage)
    (moved / "alone-44" / "result.json").unlink()
    section = told(moved, pictures=False)
    assert section.found.state == "This run is not finished: 8 of 9 students are trained."
    assert [arm.title for arm in section.found.arms] == ["distilled", "alone", ARM.partition("name=")[2]]
    assert len(section.found.arms[1].folders) == 3 and len(section.found.arms[1].results) == 2
    assert section.verdict and section.rows[0].title == "teacher"
    assert bool(section.found.notes) is (damage is not None)
    for result in moved.rglob("result.json"):
        result.unlink()
    drawn = write_report(moved)
    assert "No student is trained yet." in drawn.text and "has figures yet" in drawn.text
    assert "Training images per second" in drawn.text  # the logs are there


@pytest.mark.parametrize("change", ["no teacher", "no validation", "neighbours"])
def test_other_kinds_of_runs(tiny, place, tmp_path, change):
    images = str(place / "images")
    changes = {
        "no teacher": {"loss": "labels", "teacher": None, "teacher_kwargs": None},
        "no validation": {
            "val_split": "none",
            "val_fraction": 0.0,
            "data": str(place / "images"),
            "shots": None,
        },
        "neighbours": {"num_classes": 0, "loss": "mimic", "val_data": images},
    }
    if change == "no validation":
        changes[change]["teacher_kwargs"] = str(tiny["teacher_kwargs"]).replace("=10", "=3")
    recipe = Recipe(**{**tiny, "loss": "labels + kd", **changes[change], "output": str(tmp_path / "run")})
    distill(recipe.but(epochs=1, batch_size=10), reporter=Reporter(silent=True))
    section = told(tmp_path / "run")
    titles = [row.title for row in section.rows]
    if change == "no teacher":
        assert titles == ["student"] and "no other arm was trained" in section.verdict
        assert not section.mistakes[0].differing and len(section.attention[0][1]) == 1
    elif change == "no validation":
        assert "nothing was scored" in section.verdict
        assert section.missing["images"].endswith("the run has none.")
        assert section.missing["mistakes"].startswith("No answers")
    else:
        assert section.mistakes and section.rows[-1].cells["ECE (chance)"] == "–"
        assert section.attention


# --- asked for --------------------------------------------------------------------------------------------


def test_several_runs_and_markdown(run, moved, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    drawn = vitkd_cli.write_report([run.folder, moved])
    assert drawn.path == Path("report.html") and "2 runs" in drawn.text
    assert 'data-switch="5"' in drawn.text and "copy: distilled" in drawn.text
    assert [one.name for one in found_runs([moved.parent])] == ["copy"]  # a folder of runs
    (tmp_path / "sweep").mkdir()
    moved.parent.joinpath("sweep/points").symlink_to(moved.parent)
    assert [one.name for one in found_runs([tmp_path / "sweep"])] == ["copy"]
    code, out, err = cli("report", str(run.folder), "--markdown", "-q")
    assert code == 0, err
    assert out.startswith("## vit_tiny, taught by vit")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert (
        len({line.replace("\\|", "").count("|") for line in table[:6]}) == 1 and "```sh\nvitkd distill" in out
    )
    code, out, _ = cli("report", str(run.folder), "--markdown", "--output", "card.md", "-q")
    assert code == 0 and out == "card.md\n" and Path("card.md").read_text().startswith("## ")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("nowhere",), "nowhere is no run folder"),
        (("{run}", "--output", "page.md"), "a file whose name ends in .html"),
        (("{run}", "--output", "page.html", "--markdown"), "a file whose name ends in .md"),
    ],
)
def test_what_cannot_be_asked_for(run, cli, asked, said):
    code, _, err = cli("report", *(word.format(run=run.folder) for word in asked))
    assert code == 2 and said in " ".join(err.split())
    with pytest.raises(UserError, match="no run to report on"):
        write_report(())


def test_a_run_ends_with_its_page_and_never_by_it(run, monkeypatch, capsys):
    page, kept = run.folder / "report.html", Recipe.but(run.recipe, report=True)
    finished = Run(run.folder, kept, run.results, run.teacher)
    page.unlink(missing_ok=True)
    conclude(Run(run.folder, run.recipe, run.results, run.teacher), Reporter())
    assert not page.exists() and "report.html" not in capsys.readouterr().out  # --no-report
    conclude(finished, Reporter())
    assert page.exists() and f"report   {page}" in capsys.readouterr().out

    def broken(*given, **settings):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("vitkd_cli.report.end.write_report", broken)
    conclude(finished, Reporter())
    out = capsys.readouterr().out
    assert "report.html was not drawn (ZeroDivisionError: a bug)" in out and "student  " in out


# --- in the browser ---------------------------------------------------------------------------------------


@pytest.fixture
def tab(browser, page):
    """The page on a wide screen; at the end, that it asked for nothing and had nothing to complain of."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.goto(page.as_uri())
    tab.wait_for_selector("body[data-ready]")
    yield tab
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert said == []
    tab.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_screen(tab, width):
    tab.set_viewport_size({"width": width, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    for chart in tab.locator(".chart svg").all():
        box = chart.bounding_box()
        assert box["width"] > 250 and box["x"] >= 0 and box["x"] + box["width"] <= width
    sizes = tab.evaluate(
        "[...document.querySelectorAll('.chart svg text')].map(text => text.getBoundingClientRect().height)"
    )
    assert min(sizes) > 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_its_figures_take_the_colours_of_the_page(browser, page, scheme):
    tab = browser.new_page(viewport={"width": 390, "height": 700}, color_scheme=scheme)
    tab.goto(page.as_uri())
    where = ("document.body).backgroundColor", "document.querySelector('.chart svg text')).fill")
    colours = [tab.evaluate(f"getComputedStyle({what}") for what in where]
    ground, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (ground > 380) == (scheme == "light") == (ink < 380)
    tab.close()


def test_arms_are_switched(tab):
    parts = tab.locator('[data-arm="1"]')
    kinds = {part.evaluate("part => part.tagName.toLowerCase()") for part in parts.all()}
    assert {"g", "tr", "div"} <= kinds
    button = tab.locator('[data-switch="1"]')
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not any(part.is_visible() for part in parts.all())
    assert tab.locator('[data-arm="0"]').first.is_visible()
    button.click()
    assert all(part.is_visible() for part in tab.locator('tr[data-arm="1"]').all())


def test_a_figure_tells_its_values(tab, run):
    figure, tip = tab.locator(".chart").filter(has_text="Top-1 on the validation"), tab.locator("#tip")
    assert tip.is_hidden()
    figure.scroll_into_view_if_needed()
    box = figure.locator(".plot").bounding_box()
    tab.mouse.move(box["x"] + 0.93 * box["width"], box["y"] + 0.5 * box["height"])
    mean = np.mean([result.history[-1]["top1"] for result in run.arms["distilled"]])
    shown = tip.inner_text()
    assert "epoch 2" in shown and ARM.partition("name=")[2] in shown
    assert float(re.search(r"distilled: ([\d.]+)", shown)[1]) == pytest.approx(mean, abs=0.01)
    tab.mouse.move(1, 1)
    assert tip.is_hidden()
    figure.focus()
    tab.keyboard.press("ArrowRight")
    assert "epoch 1" in tip.inner_text()
    tab.locator('[data-switch="0"]').click()
    figure.focus()
    tab.keyboard.press("ArrowRight")
    assert "distilled" not in tip.inner_text() and "alone" in tip.inner_text()


def test_names_are_text(tab, page):
    text = page.read_text()
    assert SCRIPT not in text and IMAGE not in text and "&lt;script&gt;alert(1)" in text
    assert text.count("</script>") == 1
    assert tab.get_by_text(SCRIPT, exact=True).count() and tab.get_by_text(IMAGE, exact=True).count()


def test_it_is_readable_without_script(browser, page):
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(page.as_uri())
    for words in ("Models side by side", "against alone, 3 seeds", "vitkd distill", "taken for"):
        assert tab.get_by_text(words).first.is_visible()
    assert tab.locator(".chart svg text").filter(has_text="epoch").first.is_visible()
    assert all(button.is_disabled() for button in tab.locator("#arms button").all())
    tab.context.close()
