"""Numbers against the formulas they are named after, written out."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from kinds import layer as layer_
from small import small
from torch import Tensor

from vitkd_cli.inspection.kinds import AttentionLayer
from vitkd_cli.inspection.maps import attention_layers
from vitkd_cli.inspection.numbers import (
    CKA,
    Divergences,
    Mean,
    Numbers,
    divergence,
    of_map,
    rough_cka,
    survey,
    unbiased_hsic,
)

RANDOM = np.random.default_rng(0)


def softmaxed(*shape: int) -> Tensor:
    return torch.from_numpy(RANDOM.standard_normal(shape)).mul(2).softmax(-1)


def distances(grid: tuple[int, int], key_grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    def centre(index: int, grid: tuple[int, int]) -> tuple[float, float]:
        row, column = divmod(index, grid[1])
        return (row + 0.5) * size[0] / grid[0], (column + 0.5) * size[1] / grid[1]

    return np.array(
        [
            [math.dist(centre(i, grid), centre(j, key_grid)) for j in range(key_grid[0] * key_grid[1])]
            for i in range(grid[0] * grid[1])
        ]
    )


@pytest.mark.parametrize("key_grid", [(4, 4), (2, 2)])
def test_a_map_of_tokens(key_grid):
    spec = small("deit_tiny_distilled_patch16_224").spec  # two prefix tokens before 4×4 patches of 8 pixels
    kind = "tokens" if key_grid == (4, 4) else "reduced"
    layer = layer_("a", 0, kind, 3, (4, 4), key_grid, 2, 2)
    map_ = softmaxed(2, 3, 18, 2 + key_grid[0] * key_grid[1])
    found = {key: value.numpy() for key, value in of_map(layer, map_, spec.input_size).items()}
    rows = map_.numpy()
    np.testing.assert_allclose(found["entropy"], -(rows * np.log(rows)).sum(-1).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found["prefix_share"], rows[:, :, 2:, :2].sum(-1).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found["class_prefix_share"], rows[:, :, 0, :2].sum(-1), rtol=1e-5)
    patches = rows[:, :, 2:, 2:] / rows[:, :, 2:, 2:].sum(-1, keepdims=True)
    by_hand = (patches * distances((4, 4), key_grid, (32, 32))).sum(-1).mean(-1)
    np.testing.assert_allclose(found["distance"], by_hand, rtol=1e-5)
    for image in range(2):
        for head in range(3):
            flat = rows[image].reshape(3, -1)
            others = [
                flat[head] @ flat[other] / np.linalg.norm(flat[head]) / np.linalg.norm(flat[other])
                for other in range(3)
                if other != head
            ]
            assert found["redundancy"][image, head] == pytest.approx(np.mean(others), rel=1e-5)


def test_what_is_known_beforehand():
    spec = small("vit_tiny_patch16_224").spec
    layer = layer_("a", 0, "tokens", 2, (4, 4), (4, 4), 1, 1)
    itself = of_map(layer, torch.eye(17).expand(1, 2, 17, 17), spec.input_size)
    assert itself["entropy"].tolist() == itself["distance"].tolist() == [[0, 0]]
    assert itself["prefix_share"].tolist() == [[0, 0]] and itself["class_prefix_share"].tolist() == [[1, 1]]
    torch.testing.assert_close(itself["redundancy"], torch.ones(1, 2))
    everything = of_map(layer, torch.full((1, 2, 17, 17), 1 / 17), spec.input_size)
    torch.testing.assert_close(everything["entropy"], torch.full((1, 2), math.log(17)))
    torch.testing.assert_close(everything["prefix_share"], torch.full((1, 2), 1 / 17))


def test_windows_where_they_lie():
    spec = small("vit_tiny_patch16_224").spec
    windows = torch.tensor([[5, 6, -1], [7, 4, 3], [0, -1, 1], [2, 8, -1]])
    windows = torch.cat([windows, torch.tensor([[9, 10, 11], [12, 13, 14], [15, -1, -1]])])
    layer = layer_("a", 0, "windows", 2, (4, 4), (4, 4), windows=windows)
    map_ = softmaxed(1, 2, 7, 3, 3)
    found = of_map(layer, map_, spec.input_size)
    pixels = distances((4, 4), (4, 4), (32, 32))
    asked = []
    for head in range(2):
        rows, entropies = [], []
        for window, tokens in enumerate(windows.tolist()):
            for place, query in enumerate(tokens):
                if query < 0:
                    continue
                row = map_[0, head, window, place].numpy()
                entropies.append(-(row * np.log(row)).sum())
                weights = np.array([w for w, key in zip(row, tokens, strict=True) if key >= 0])
                keys = [key for key in tokens if key >= 0]
                rows.append((weights / weights.sum() * pixels[query, keys]).sum())
        asked.append((np.mean(rows), np.mean(entropies)))
    np.testing.assert_allclose(found["distance"][0], [d for d, _ in asked], rtol=1e-5)
    np.testing.assert_allclose(found["entropy"][0], [e for _, e in asked], rtol=1e-5)
    unknown = of_map(layer_("a", 0, "windows", 2, (4, 4), (4, 4)), map_, spec.input_size)
    assert "distance" not in unknown and "entropy" in unknown


@pytest.mark.parametrize("kind", ["channels", "class"])
def test_what_a_kind_does_not_have_is_left_out(kind):
    spec = small("vit_tiny_patch16_224").spec
    queries = 1 if kind == "class" else 17
    layer = layer_("a", None, kind, 1, (4, 4), (4, 4), 1, 1)
    found = of_map(layer, softmaxed(1, 1, queries, 17), spec.input_size)
    assert found.keys() == {"entropy"} | ({"class_prefix_share"} if kind == "class" else set())


def test_mean_and_error_over_images():
    values = torch.from_numpy(RANDOM.standard_normal((10, 3)))
    mean = Mean()
    for batch in values.split(4):
        mean.add(batch)
    np.testing.assert_allclose(mean.mean, values.numpy().mean(0))
    np.testing.assert_allclose(mean.error, values.numpy().std(0, ddof=1) / math.sqrt(10))
    one = Mean()
    one.add(values[:1])
    assert np.isnan(one.error).all()


def test_rows_of_every_layer_and_head():
    built = small("cait_xxs24_224")
    layers = attention_layers(built)
    numbers = Numbers(layers, built.spec.input_size)
    first = [softmaxed(4, 3, 16, 16), softmaxed(4, 3, 16, 16)]
    for map_ in first:
        numbers.add(layers[0], map_)
    rows = numbers.rows()
    assert [(row["layer"], row["head"]) for row in rows] == [
        (layer, head) for layer in range(3) for head in (0, 1, 2, None)
    ]
    whole = of_map(layers[0], torch.cat(first), built.spec.input_size)["entropy"]
    assert rows[1]["entropy"] == pytest.approx(float(whole[:, 1].mean()))
    assert rows[3]["entropy"] == pytest.approx(float(whole.mean()))
    assert rows[3]["entropy_se"] == pytest.approx(float(whole.mean(1).std()) / math.sqrt(8), rel=1e-4)
    assert rows[0]["prefix_share"] is None and rows[4]["entropy"] is None


# Two models -----------------------------------------------------------------------------------------------


def test_divergence_is_symmetric_and_bounded():
    p, q = softmaxed(5, 7).numpy(), softmaxed(5, 7).numpy()
    middle = (p + q) / 2
    by_hand = ((p * np.log(p / middle)).sum(-1) + (q * np.log(q / middle)).sum(-1)) / 2
    found = divergence(torch.from_numpy(p), torch.from_numpy(q))
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)
    torch.testing.assert_close(found, divergence(torch.from_numpy(q), torch.from_numpy(p)))
    apart = divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert float(apart) == pytest.approx(math.log(2))


def test_only_maps_of_the_same_patches_are_compared():
    def layer(kind: str, side: int, prefix: int) -> AttentionLayer:
        return layer_("a", 0, kind, 2, (side, side), (side, side), prefix, prefix)

    first = [layer("tokens", 4, 1), layer("windows", 4, 0), layer("tokens", 2, 1)]
    second = [layer("tokens", 4, 2), layer("class", 4, 1)]
    compared = Divergences((first, second))
    theirs, ours = softmaxed(3, 2, 17, 17), softmaxed(3, 2, 18, 18)
    compared.add(0, first[0], theirs)
    compared.add(0, first[2], softmaxed(3, 2, 5, 5))
    compared.add(1, second[0], ours)
    p, q = (m.mean(1)[:, k:, k:] for m, k in ((theirs, 1), (ours, 2)))
    p, q = (m / m.sum(-1, keepdim=True) for m in (p, q))
    values = compared.values()
    assert values.shape == (3, 2)
    assert values[0, 0] == pytest.approx(float(divergence(p, q).mean()), rel=1e-5)
    assert np.isnan(values).sum() == 5
    assert compared.left_out.startswith("5 pairs left out")
    chosen = Divergences((first, first), [(0, 0), (0, 1)])
    chosen.add(0, first[0], theirs)
    chosen.add(1, first[0], theirs)
    assert chosen.values()[0, 0] == 0 and np.isnan(chosen.values()).sum() == 8


def hsic_by_sums(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The U-statistic: means over distinct indices, in O(n^4)."""
    n = len(k)
    pairs = triples = quadruples = 0.0
    for i in range(n):
        for j in set(range(n)) - {i}:
            pairs += k[i, j] * l[i, j]
            for q in set(range(n)) - {i, j}:
                triples += k[i, j] * l[i, q]
                for r in set(range(n)) - {i, j, q}:
                    quadruples += k[i, j] * l[q, r]
    two, three = n * (n - 1), n * (n - 1) * (n - 2)
    return pairs / two - 2 * triples / three + quadruples / (three * (n - 3))


def test_hsic_is_the_mean_over_distinct_images():
    x, y = RANDOM.standard_normal((2, 7, 3))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    found = unbiased_hsic(torch.from_numpy(k)[None], torch.from_numpy(l)[None])
    assert float(found) == pytest.approx(hsic_by_sums(k, l))


def cka(x: np.ndarray, y: np.ndarray, batch: int = 8, minibatch: int = 64) -> float:
    counted = CKA(minibatch)
    for start in range(0, len(x), batch):
        counted.add(
            [torch.from_numpy(x[start : start + batch])], [torch.from_numpy(y[start : start + batch])]
        )
    assert counted.count == len(x)
    return float(counted.values()[0, 0])


def test_cka_knows_no_rotation_scale_or_shift():
    x = RANDOM.standard_normal((150, 12))
    rotation = np.linalg.qr(RANDOM.standard_normal((12, 12)))[0]
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, 3 * x @ rotation) == pytest.approx(1)
    assert cka(x, x + 5) == pytest.approx(1)


def test_cka_of_independent_noise_is_near_zero():
    assert abs(cka(RANDOM.standard_normal((640, 20)), RANDOM.standard_normal((640, 20)))) < 0.05


@pytest.mark.parametrize("noise", [0, 1e-8])
@pytest.mark.parametrize("level", [0, 0.1, 37.7])
def test_cka_of_constant_features_is_undefined(level, noise):
    constant = level * (1 + noise * RANDOM.standard_normal((150, 6)))
    varied = RANDOM.standard_normal((150, 6))
    for pair in ((constant, varied), (varied, constant), (constant, constant)):
        assert np.isnan(cka(*pair))
    assert "undefined" in rough_cka(600, undefined=True) and not rough_cka(600)


def test_cka_averages_minibatches_before_it_divides():
    x, y = RANDOM.standard_normal((150, 6)), RANDOM.standard_normal((150, 5))
    y[:, :3] += x[:, :3]
    parts = [(x[:64], y[:64]), (x[64:], y[64:])]  # the last takes what is left

    def mean(a: int, b: int) -> float:
        grams = [
            (torch.from_numpy(p[a] @ p[a].T)[None], torch.from_numpy(p[b] @ p[b].T)[None]) for p in parts
        ]
        return float(np.mean([float(unbiased_hsic(k, l)) for k, l in grams]))  # noqa: E741

    by_hand = mean(0, 1) / math.sqrt(mean(0, 0) * mean(1, 1))
    assert cka(x, y) == pytest.approx(by_hand)
    assert cka(x, y, batch=50) == pytest.approx(by_hand)
    assert np.isnan(cka(x[:3], y[:3]))


def batches(built, count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield [(torch.rand(2, 3, *one.spec.input_size, generator=generator) * 255).byte() for one in built]


def test_one_pass_counts_both_models():
    models = [small("deit_tiny_distilled_patch16_224"), small("vit_tiny_patch16_224")]
    for built in models:
        built.net.float()
    both = [(built, attention_layers(built)) for built in models]
    told: list[int] = []
    numbers, divergences, cka_ = survey(both, batches(models, 3), progress=told.append)
    assert told == [2, 4, 6]
    assert divergences is not None and cka_ is not None and cka_.count == 6
    assert divergences.values().shape == cka_.values().shape == (2, 2)
    assert np.isfinite(divergences.values()).all()
    alone, none, nothing = survey(both[:1], ([views[0]] for views in batches(models, 3)))
    assert none is nothing is None
    assert alone[0].rows() == numbers[0].rows()
    itself = [both[1], (models[1], attention_layers(models[1]))]
    same = ([views[0]] * 2 for views in batches([models[1]], 3))
    _, divergences, cka_ = survey(itself, same)
    assert divergences is not None and cka_ is not None
    np.testing.assert_allclose(divergences.values().diagonal(), 0, atol=1e-9)
    np.testing.assert_allclose(cka_.values().diagonal(), 1)


@pytest.mark.parametrize("images", [1, 6])
def test_one_map_lives_at_a_time_whatever_the_number_of_images(images, monkeypatch):
    built = small("vit_tiny_patch16_224")
    built.net.float()
    layers = attention_layers(built)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    add = Numbers.add

    def watched(self: Numbers, layer: AttentionLayer, map_: Tensor) -> None:
        nonlocal most
        add(self, layer, map_)
        alive.append(weakref.ref(map_))
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))

    monkeypatch.setattr(Numbers, "add", watched)
    survey([(built, layers)], batches([built], images))
    gc.collect()
    assert most == 1 and len(alive) == images * len(layers)
    assert not any(one() is not None for one in alive)
