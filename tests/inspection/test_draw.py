"""Pictures: what is bright is what is looked at, in the place where it is."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from kinds import BLANK, every_kind, hot, layer, over_image, real, softmax
from PIL import Image

from vitkd_cli.errors import UserError
from vitkd_cli.inspection.draw import Row, draw, draw_matrix, draw_numbers, laid_out, over_cells
from vitkd_cli.inspection.kinds import mosaic
from vitkd_cli.inspection.maps import ImageAttention, parse_heads, parse_query

GREY = BLANK[0, 0].mean() / 255
MAGMA = matplotlib.colormaps["magma"]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def box(picture, colour):
    """Top, bottom, left, right of what has this colour, in [0, 1]."""
    found = np.abs(picture - 255 * np.asarray(colour)).max(-1) <= 1
    assert found.any()
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def over_grey(share):
    return 0.3 * GREY + 0.7 * np.asarray(MAGMA(share)[:3])


def cell_of(picture):
    """The first map of a picture, which stands beside the image in a gap of six pixels."""
    top, bottom, left, right = box(picture, BLANK[0, 0] / 255)
    return picture[top:bottom, right + 6 : right + 6 + right - left]


# --- places -----------------------------------------------------------------------------------------------


def test_the_class_tokens_row_and_a_patchs():
    look = real("vit")
    [_, map_] = look.maps
    np.testing.assert_array_equal(over_image(look, 1, "cls").reshape(3, -1), map_[:, 0, 1:])
    at = parse_query("2,5", [look.layers])
    np.testing.assert_array_equal(over_image(look, 1, at).reshape(3, -1), map_[:, 1 + 2 * 8 + 5, 1:])
    everyone = map_[:, 1:, 1:].astype(np.float32).mean(1)
    np.testing.assert_allclose(over_image(look, 1, "all").reshape(3, -1), everyone, rtol=1e-5)
    assert [look.layers[1].query_name(q) for q in ("cls", "all", at)] == [
        "class token", "mean over patch queries", "patch 2,5"
    ]  # fmt: skip


@pytest.mark.parametrize("registers", [0, 2])
def test_without_a_class_token_the_mean_over_patches(registers):
    look = real("vit", class_token=False, global_pool="avg", reg_tokens=registers)
    assert look.layers[0].prefix == registers
    np.testing.assert_array_equal(over_image(look, 0, "cls"), over_image(look, 0, "all"))
    assert look.layers[0].query_name("cls") == "mean over patch queries"


def test_windows_are_put_back():
    look = every_kind()
    for index in (2, 3):
        map_, places = look.maps[index].astype(np.float32), look.layers[index].windows.numpy()
        whole = np.zeros((3, 64, 64), np.float32)  # as if every patch asked every one
        for window, own in enumerate(places):
            for token, patch in enumerate(own):
                for key in np.flatnonzero(own >= 0):
                    whole[:, patch, own[key]] += map_[:, window, token, key] * (patch >= 0)
        asking = (places >= 0).sum()
        np.testing.assert_allclose(
            over_image(look, index, "cls").reshape(3, -1), whole.sum(1) / asking, rtol=1e-5
        )
        seen = over_image(look, index, parse_query("5,6", [look.layers])).reshape(3, -1)
        own = places[(places == 5 * 8 + 6).any(1)][0]
        assert set(np.flatnonzero(~np.isnan(seen[0]))) == set(own[own >= 0])
        np.testing.assert_allclose(np.nan_to_num(seen), whole[:, 5 * 8 + 6], rtol=1e-5)


def test_a_patch_in_no_window_sees_nothing(tmp_path):
    look = every_kind()
    assert np.isnan(over_image(look, 2, parse_query("0,0", [look.layers]))).all()
    draw([look], tmp_path, query="0,0")


def test_a_query_finds_its_place_in_another_grid():
    fine, coarse = real("fine"), real("coarse", patch_size=16)
    at = parse_query("7,2", [fine.layers, coarse.layers])
    assert fine.layers[0].query_name(at) == "patch 7,2"
    assert coarse.layers[0].query_name(at) == "patch 3,1"


def test_what_was_mistyped():
    look = real("vit")
    for text, message in {
        "token": "--query token: neither cls, all nor ROW,COL",
        "3,8": "--query 3,8: the grid of patches ends at 7,7",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_query(text, [look.layers])
    for text, message in {
        "first": "--heads first: neither mean, all nor numbers",
        "0,3": "--heads 0,3: the last head is 2",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_heads(text, [look.layers])
    assert (
        parse_heads("all", [look.layers]),
        parse_heads("2,0", [look.layers]),
        parse_heads("mean", [look.layers]),
    ) == (
        (0, 1, 2),
        (2, 0),
        (),
    )


# --- over the image ---------------------------------------------------------------------------------------


def test_what_is_looked_at_is_bright(tmp_path):
    look = hot("tokens", (4, 4), (4, 4), query=0, key=1 * 4 + 2)
    layers, _ = draw([look], tmp_path, query="0,0")
    cell = cell_of(pixels(layers))
    side = len(cell)
    assert box(cell, over_grey(1.0)) == (side // 4, side // 2, side // 2, 3 * side // 4)
    assert box(cell, (0, 0.9, 1)) == (0, side // 4, 0, side // 4)  # the query


def test_reduced_keys_keep_their_own_grid(tmp_path):
    layers, _ = draw([hot("reduced", (8, 8), (2, 2), query=9, key=3)], tmp_path, query="1,1")
    cell = cell_of(pixels(layers))
    side = len(cell)
    assert box(cell, over_grey(1.0)) == (side // 2, side, side // 2, side)


def test_outside_its_window_is_the_image_alone():
    look = every_kind()
    cells = over_cells(look, parse_query("5,6", [look.layers]), 160)
    grey = np.full(3, GREY)
    straight, shifted = (255 * cells[1 + index].picture for index in (2, 3))
    assert (np.abs(straight[:80] - 255 * grey) < 1).all()  # rows 0 to 3 are other windows
    assert (np.abs(straight[80:, 80:] - 255 * grey) > 1).any(-1).all()
    inside = (np.abs(shifted - 255 * grey) > 1).any(-1)  # rolled by two: rows 2 to 5, columns 6, 7, 0 and 1
    wanted = np.zeros((8, 8), bool)
    wanted[2:6, [6, 7, 0, 1]] = True
    np.testing.assert_array_equal(inside, wanted.repeat(20, 0).repeat(20, 1))


def test_a_row_a_layer_and_a_column_a_head(tmp_path):
    look = replace(real("vit"), image=BLANK)
    for heads, columns in (("all", 4), ("0,2", 3)):
        drawn, _ = draw([look], tmp_path, heads=heads)
        inked = pixels(drawn).min(-1) < 250
        assert len(stretches(inked[inked.sum(1).argmax()])) == columns
        assert len(stretches(inked[:, inked.sum(0).argmax()])) == len(look.layers)


def stretches(line):
    """Where a line through cells is inked, longer than print is."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(int), [0]])))
    return [length for length in edges[1::2] - edges[::2] if length > 40]


def test_channels_are_matrices_and_no_image(tmp_path):
    look = every_kind()
    cell = over_cells(look, "cls", 160)[1 + 4]
    assert "over channels" in cell.below
    tiles = mosaic(look.maps[4])
    assert tiles.shape == (13, 20) and np.isnan(tiles[6]).all() and np.isnan(tiles[7:, 14:]).all()
    np.testing.assert_array_equal(tiles[7:, 7:13], look.maps[4][4])
    height = round(160 * 13 / 20)
    brightest = np.unravel_index(np.nanargmax(tiles), tiles.shape)
    y, x = (round((place + 0.5) * 8) for place in brightest)
    np.testing.assert_allclose(cell.picture[y, x], MAGMA(1.0)[:3], atol=1e-6)
    assert (cell.picture[height:] == 1).all()


def test_windows_that_pool_their_queries_have_no_place(tmp_path):
    pooled = layer("blocks.1.attn", 1, "windows", 2, (8, 8), (8, 8))
    map_ = softmax(2, 4, 4, 16)
    look = ImageAttention(BLANK, (pooled,), (map_,))
    [_, cell] = over_cells(look, "cls", 165)
    assert "in windows, queries pooled" in cell.below
    tiles = mosaic(map_.mean(1, dtype=np.float32))
    y, x = np.unravel_index(np.nanargmax(tiles), tiles.shape)
    np.testing.assert_allclose(cell.picture[5 * y + 2, 5 * x + 2], MAGMA(1.0)[:3], atol=1e-6)
    draw([look], tmp_path, heads="0", query="1,1")


def test_where_there_is_no_map_it_says_why():
    _, prints = laid_out([Row(over_cells(every_kind(), "cls", 160))])
    assert "it attends linearly" in [text for _, _, text, _ in prints]


# --- maps of tokens, rollout, names -----------------------------------------------------------------------


def test_maps_of_tokens_teacher_above_student(tmp_path):
    teacher = hot("tokens", (4, 4), (4, 4), query=3, key=12)
    student = replace(teacher, title="student", maps=(np.eye(16, dtype=np.float16)[None],))
    _, tokens = draw([teacher, student], tmp_path)
    picture = pixels(tokens)
    dark = picture.max(-1) < 5  # magma's zero
    rows = np.flatnonzero(dark.sum(1) > 100)
    assert rows[-1] - rows[0] > 240  # both
    top, _, left, _ = box(picture[rows[20] :], MAGMA(0.0)[:3])
    eye = picture[rows[20] + top :][:, left:]
    bright = box(eye[:240, :240], MAGMA(1.0)[:3])
    assert bright[1] - bright[0] > 200  # the diagonal goes from end to end


def test_every_kind_has_its_own_picture(tmp_path):
    written = draw([every_kind()], tmp_path, query="3,3")
    assert [path.name for path in written] == ["plain-layers.png", "plain-tokens.png"]
    teacher, student = real("teacher"), real("student", patch_size=16, depth=3)
    written = draw([teacher, student], tmp_path, rollout=True)
    assert [path.name for path in written] == [
        "astronaut.png-layers.png", "astronaut.png-rollout.png", "astronaut.png-tokens.png"
    ]  # fmt: skip
    assert all(pixels(path).std() > 10 for path in written)


def test_rollout_is_drawn_from_its_own_matrix(tmp_path):
    look = replace(real("vit"), image=BLANK)
    rollout = np.zeros((65, 65), np.float32)
    rollout[0, 1 + 6 * 8 + 1] = 1
    look = replace(look, rollout=rollout)
    _, picture, _ = draw([look], tmp_path, rollout=True)
    cell = cell_of(pixels(picture))
    side = len(cell)
    assert box(cell, over_grey(1.0)) == (6 * side // 8, 7 * side // 8, side // 8, 2 * side // 8)
    with pytest.raises(ValueError, match="no rollout"):
        every_kind().rolled_out()


def test_names_do_no_harm(tmp_path):
    look = replace(
        hot("tokens", (2, 2), (2, 2), 0, 0), name="../$a_$/</script><img>.png", title="$x$ & $\\frac"
    )
    for path in draw([look, look], tmp_path / "here", heads="all"):
        assert path.parent == tmp_path / "here" and path.exists()


# --- numbers ----------------------------------------------------------------------------------------------


def test_a_matrix_of_pairs(tmp_path):
    values = np.array([[1.0, 0.0, np.nan], [0.5, np.nan, 0.25]])
    picture = pixels(
        draw_matrix(values, tmp_path / "cka.png", title="CKA", rows="teacher", columns="$student")
    )
    hatched = np.abs(picture - 0xE4).max(-1) == 0
    bright = box(picture, MAGMA(1.0)[:3])
    assert hatched.sum() > 500
    middle = box(picture, MAGMA(0.5)[:3])
    assert middle[0] > bright[0] and middle[2] <= bright[2] + 60  # one row below, the same column
    draw_matrix(np.full((2, 2), np.nan), tmp_path / "none.png", title="", rows="", columns="", note="none")


def test_numbers_by_layer(tmp_path):
    def lines(*entropies, distance=None):
        return [
            {
                "layer": 0,
                "block": 0,
                "head": head,
                "entropy": entropy,
                "distance": distance,
                "prefix_share": None,
            }
            for head, entropy in enumerate(entropies)
        ]

    viridis = matplotlib.colormaps["viridis"]
    one = pixels(draw_numbers([("vit", lines(1.0, 3.0))], tmp_path / "one.png"))

    def height(head):
        colour = 0.8 * 255 * np.asarray(viridis(float(head))[:3]) + 0.2 * 255
        return np.flatnonzero((np.abs(one - colour).max(-1) <= 2).any(1)).mean()

    assert height(1) < height(0)  # the head of more entropy stands above
    two = pixels(draw_numbers([("a", lines(1.0, distance=4.0)), ("b", lines(9.0))], tmp_path / "two.png"))
    assert two.shape[0] > one.shape[0] and two.shape[1] > one.shape[1]


def test_no_label_of_a_matrix_is_cut(tmp_path):
    name = "teacher " + "a_long_name/" * 12
    picture = pixels(
        draw_matrix(np.eye(3), tmp_path / "x.png", title=name[:60], rows=name, columns=name, note="n " * 60)
    )
    for edge in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
        assert (edge == 255).all()
