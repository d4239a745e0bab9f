"""The page, in a browser: what is clicked is shown, and nothing is fetched."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from kinds import BLANK, every_kind, over_image, real, softmax
from kinds import layer as layer_

from vitkd_cli.errors import UserError
from vitkd_cli.inspection import page as page_module
from vitkd_cli.inspection.kinds import OnImage, cells_of, shares
from vitkd_cli.inspection.maps import ImageAttention
from vitkd_cli.inspection.page import Page, packed

MAGMA = matplotlib.colormaps["magma"]
HARM = "</script><img src=x onerror='window.harmed=1'>"


def data_of(path):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    return json.loads(found[1])


def rows_of(stored):
    """``[n, keys]`` as the page reads them; NaN is what is not asked."""
    most, values = (np.frombuffer(b64decode(stored[k]), t) for k, t in (("most", "<f4"), ("values", "u1")))
    values = values.reshape(len(most), -1).astype(np.float32)
    return np.where(values == 255, np.nan, values / 254) * most[:, None]


# --- what is stored ---------------------------------------------------------------------------------------


def test_every_row_is_stored(tmp_path):
    look = real("vit")
    page = Page("attention", heads="0,2")
    page.add([look])
    [layer, _] = data_of(page.write(tmp_path / "page.html"))["images"][0]["looks"][0]["layers"]
    assert list(layer["rows"]) == ["mean", "0", "2"]
    map_ = look.maps[0].astype(np.float32)
    for name, of in {"mean": map_.mean(0), "0": map_[0], "2": map_[2]}.items():
        stored = layer["rows"][name]
        step = of[1:, 1:].max(1, keepdims=True) / 254
        assert (np.abs(rows_of(stored) - of[1:, 1:]) <= 0.51 * step).all()
        np.testing.assert_allclose(np.frombuffer(b64decode(stored["prefix"]), "<f4"), of[1:, 0], rtol=1e-5)
        still = layer["still"][name]
        assert (np.abs(rows_of(still) - of[:1, 1:]) <= 0.51 * of[0, 1:].max() / 254).all()
        np.testing.assert_allclose(np.frombuffer(b64decode(still["prefix"]), "<f4"), of[0, :1], rtol=1e-5)
    with pytest.raises(UserError, match="--heads 0,2: the last head is 1"):
        page.add([replace(look, layers=(replace(look.layers[0], heads=2),), maps=look.maps[:1])])


def test_a_large_grid_is_pooled(tmp_path):
    grid, cells = (30, 42), (15, 21)
    whole = layer_("blocks.0.attn", 0, "tokens", 1, grid, grid, 1, 1)
    map_ = softmax(1, 1 + 30 * 42, 1 + 30 * 42)
    page = Page("large")
    page.add([ImageAttention(BLANK, (whole,), (map_,))])
    [stored] = data_of(page.write(tmp_path / "page.html"))["images"][0]["looks"][0]["layers"]
    assert (stored["grid"], stored["keys"]) == ([*cells], [*cells])
    blocks = map_[0, 1:, 1:].astype(np.float32).reshape(15, 2, 21, 2, 15, 2, 21, 2)
    pooled = blocks.mean((1, 3)).sum((3, 5)).reshape(15 * 21, 15 * 21)  # queries: mean; keys: sum
    found = rows_of(stored["rows"]["mean"])
    assert (np.abs(found - pooled) <= 0.51 * pooled.max(1, keepdims=True) / 254).all()


@pytest.mark.parametrize("patches, side", [(37, 28), (5, 3), (4, 1)])
def test_cells_share_patches_that_they_cut(patches, side):
    [cells, _] = cells_of((patches, 1), side)
    shared = shares((patches, 1), (cells, 1))
    np.testing.assert_allclose(shared.sum(0), 1, rtol=1e-5)  # a patch is spent once
    np.testing.assert_allclose(shared.sum(1), patches / cells, rtol=1e-5)  # cells are equal


def test_large_windows_are_pooled_by_cell(monkeypatch, tmp_path):
    monkeypatch.setattr(page_module, "SIDE", 4)
    look = every_kind()
    page = Page("windows")
    page.add([look])
    stored = data_of(page.write(tmp_path / "page.html"))["images"][0]["looks"][0]["layers"][3]
    rows, row_of = rows_of(stored["rows"]["mean"]), np.frombuffer(b64decode(stored["row_of"]), "<i4")
    assert len(rows) == 16  # of 2 × 2 patches each
    places, mean = look.layers[3].windows.numpy(), look.maps[3].astype(np.float32).mean(0)
    cell = [6 * 8 + 2, 6 * 8 + 3, 7 * 8 + 2, 7 * 8 + 3]
    assert len({row_of[patch] for patch in cell}) == 1
    wanted = np.mean([mean[places == patch][0] for patch in cell], 0)
    np.testing.assert_allclose(rows[row_of[cell[0]]], wanted, atol=wanted.max() / 250)


def test_what_is_below_zero_is_stored_as_zero():
    stored = packed(np.array([[-0.25, 0.5, np.nan, 0.25]]))  # talking heads may give such
    np.testing.assert_allclose(rows_of(stored), [[0, 0.5, np.nan, 0.25]])


def test_it_stays_within_its_budget(monkeypatch, tmp_path):
    look = real("vit")

    def size():
        page = Page("attention")
        page.add([look])
        layers = data_of(page.write(tmp_path / "page.html"))["images"][0]["looks"][0]["layers"]
        return layers[0]["grid"], len(json.dumps(layers))

    assert size()[0] == [8, 8]
    monkeypatch.setattr(page_module, "BUDGET", 4000)
    grid, length = size()
    assert grid == [4, 4] and length * 3 / 4 < 4000


def test_four_images_of_two_deep_models_are_a_small_file(tmp_path):
    one = layer_("blocks.0.attn", 0, "tokens", 1, (14, 14), (14, 14), 1, 1)
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)  # no picture takes more
    look = ImageAttention(noise, (one,) * 12, (softmax(1, 197, 197),) * 12)
    page = Page("attention")
    for _ in range(4):
        page.add([look, look])
    assert page.write(tmp_path / "page.html").stat().st_size < 7e6


# --- in the browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    """Two images by a teacher and a student of another grid, over one colour; and every kind of layer."""
    size = {"patch_size": 16, "depth": 3, "num_heads": 2, "seed": 1}
    plain = [
        [replace(real("teacher", p), image=BLANK), replace(real("student", p, **size), image=BLANK)]
        for p in ("astronaut", "coffee")
    ]
    return [*plain, [every_kind()]]


@pytest.fixture
def opened(browser, pairs, tmp_path):
    """The page of ``pairs``; at the end, that it asked for nothing and had nothing to complain of."""
    page = Page("attention & <b>", heads="0")
    for looks in pairs:
        page.add(looks)
    path = page.write(tmp_path / "page.html")
    yield from _open(browser, path)


def _open(browser, path, **options):
    tab = browser.new_page(viewport={"width": 1200, "height": 800}, **options)
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-ready]")
    yield tab
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert said == []
    tab.close()


def click(tab, row, column):
    """The middle of a patch of the 8 × 8 that the image is cut into."""
    box = tab.locator("#image").bounding_box()
    tab.mouse.click(box["x"] + (column + 0.5) / 8 * box["width"], box["y"] + (row + 0.5) / 8 * box["height"])


def shows(tab, looks, query, head=None):
    """Every map on the page, in its colours at the middle of each key, is that of numpy."""
    canvases = tab.locator("figure canvas")
    wanted = [(look, i) for look in looks for i, map_ in enumerate(look.maps) if map_ is not None]
    assert canvases.count() == len(wanted)
    for number, (look, index) in enumerate(wanted):
        if not isinstance(look.layers[index], OnImage):
            continue
        maps = over_image(look, index, query)
        map_ = maps.mean(0) if head is None else maps[head]
        share = map_ / np.nanmax(map_)
        alpha = 178 / 255 * ~np.isnan(map_)[..., None]
        grey = BLANK[0, 0].mean()
        colours = (1 - alpha) * grey + alpha * 255 * np.asarray(MAGMA(np.nan_to_num(share))[..., :3])
        found = np.array(canvases.nth(number).evaluate(MIDDLES, list(map_.shape))).reshape(colours.shape)
        assert np.abs(found - colours).max() < 6, (look.title, index)
        row, column = map(int, canvases.nth(number).get_attribute("data-top").split(","))
        assert share[row, column] > 0.995


MIDDLES = """(canvas, [rows, columns]) => {
  const { width, height } = canvas, found = [];
  const copy = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
  copy.drawImage(canvas, 0, 0);
  const { data } = copy.getImageData(0, 0, width, height);
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const at = 4 * (Math.floor((y + .5) * height / rows) * width + Math.floor((x + .5) * width / columns));
    found.push(...data.slice(at, at + 3));
  }
  return found;
}"""


def middle(row, column):
    return (row + 0.5) / 8, (column + 0.5) / 8


def test_a_click_shows_where_that_patch_looks(opened, pairs):
    assert [opened.locator("h2").nth(i).inner_text() for i in (0, 1)] == ["teacher", "student"]
    left, right = (opened.locator("h2").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] < right["x"]
    for row, column in ((2, 5), (7, 0)):
        click(opened, row, column)
        shows(opened, pairs[0], middle(row, column))
        said = opened.locator("#said").inner_text()
        assert f"teacher, block 1: the patch at row {row}, column {column} looks most at row" in said
        assert f"student, block 2: the patch at row {row // 2}, column {column // 2} of 4 × 4 looks" in said
        last = opened.locator("figure canvas").last
        y, x = last.get_attribute("data-top").split(",")
        assert f"row {y}, column {x} of 4 × 4 (" in said.splitlines()[1]


def test_keys_move_the_patch(opened, pairs):
    click(opened, 6, 6)
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp"):  # the edge stops it
        opened.keyboard.press(key)
    shows(opened, pairs[0], middle(6, 5))


def test_other_images_queries_and_heads(opened, pairs):
    pictures = opened.get_by_role("navigation").get_by_role("button")
    assert pictures.count() == 3
    click(opened, 1, 1)
    pictures.nth(1).click()
    assert pictures.nth(1).get_attribute("aria-pressed") == "true"
    shows(opened, pairs[1], middle(1, 1))
    opened.get_by_role("button", name="class token").click()
    shows(opened, pairs[1], "cls")
    assert "teacher, block 1: the class token looks most" in opened.locator("#said").inner_text()
    opened.get_by_label("heads").select_option("0")
    shows(opened, pairs[1], "cls", head=0)
    click(opened, 3, 4)  # goes back to patches
    shows(opened, pairs[1], middle(3, 4), head=0)


def test_rollout_of_class_token_and_patch(opened, pairs):
    click(opened, 4, 2)
    opened.get_by_role("button", name="rollout").click()
    tops = [canvas.get_attribute("data-top") for canvas in opened.locator("figure canvas").all()]
    for look, (of_class, of_patch) in zip(pairs[0], (tops[:2], tops[2:]), strict=True):
        grid = look.layers[0].grid
        patch = 4 * grid[0] // 8 * grid[1] + 2 * grid[1] // 8
        for top, query in ((of_class, 0), (of_patch, 1 + patch)):
            row, column = map(int, top.split(","))
            weights = look.rollout[query, 1:]
            assert weights[row * grid[1] + column] > 0.995 * weights.max()


def test_every_kind_in_its_own_geometry(opened, pairs):
    opened.get_by_role("navigation").get_by_role("button").nth(2).click()
    assert opened.get_by_role("button", name="rollout").is_disabled()
    click(opened, 5, 6)
    shows(opened, pairs[2], middle(5, 6))
    captions = [caption.inner_text() for caption in opened.locator("figcaption").all()]
    for caption, layer in zip(captions, pairs[2][0].layers, strict=True):
        assert {"channels": "over channels", "none": "no map"}.get(layer.kind, layer.kind) in caption
    assert "it attends linearly" in opened.locator("figure").nth(5).inner_text()
    channels = opened.locator("figure canvas").nth(4)
    [width, height] = channels.evaluate("canvas => [canvas.width, canvas.height]")
    assert height == round(width * 13 / 20)  # five squares of 6 × 6, a line between them
    opened.get_by_role("button", name="class token").click()
    shows(opened, pairs[2], "cls")


def test_a_map_under_the_pointer_is_enlarged(opened):
    figure, lens = opened.locator("figure").nth(3), opened.locator("#lens")
    for reach, leave in (
        (figure.hover, lambda: opened.mouse.move(5, 5)),
        (figure.focus, lambda: opened.locator("#image").focus()),
    ):
        assert lens.is_hidden()
        reach()
        assert lens.bounding_box()["width"] > 1.5 * figure.bounding_box()["width"]
        assert "student, block 1" in lens.inner_text()
        leave()
    assert lens.is_hidden()


def test_it_can_be_read_aloud(opened):
    assert opened.locator("#said").get_attribute("aria-live") == "polite"
    figures = opened.locator("figure").all()
    assert all("looks most at" in figure.get_attribute("aria-label") for figure in figures)
    assert "arrow keys" in opened.locator("#image").get_attribute("aria-label")
    assert opened.get_by_role("button", name="astronaut.png").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser, pairs, tmp_path, scheme):
    page = Page("attention")
    page.add(pairs[0])
    for tab in _open(browser, page.write(tmp_path / "page.html"), color_scheme=scheme):
        tab.set_viewport_size({"width": 360, "height": 640})
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")


def test_names_do_no_harm(browser, tmp_path):
    look = replace(every_kind(), name=HARM, title=HARM)
    layers = [replace(layer, path=HARM, why=HARM if layer.why else "") for layer in look.layers]
    page = Page(HARM)
    page.add([replace(look, layers=tuple(layers))])
    path = page.write(tmp_path / "page.html")
    assert path.read_text().count("</script>") == 2  # the data's and the program's
    for tab in _open(browser, path):
        click(tab, 1, 1)
        assert tab.title() == HARM and tab.locator("h2").inner_text() == HARM
        assert tab.locator("img").count() == 1  # of the picker
        assert tab.evaluate("window.harmed") is None


@pytest.mark.parametrize("query", ["cls", (0.1, 0.9)])
def test_it_opens_with_the_query_asked_for(browser, pairs, tmp_path, query):
    page = Page("opening", query=query)
    page.add(pairs[0])
    for tab in _open(browser, page.write(tmp_path / "opening.html")):
        shows(tab, pairs[0], query)
