"""The linear classifier against scikit-learn's, on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkd_cli.evaluation import linear
from vitkd_cli.evaluation.linear import fit_linear, fit_with


def features(count, seed, classes, width=12):
    """Clusters that overlap, far from 0, of unequal spread, with a column that does not vary."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    vectors = 0.8 * centres[labels] + torch.randn(count, width, generator=generator)
    vectors = 5 + vectors * torch.logspace(-2, 2, width)
    vectors[:, 3] = 0.1
    return vectors, labels


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_scikit_learn_gives_the_same_answer_to_every_image(classes):
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (bank, labels), (queries, truth) = features(700, 0, classes), features(400, 1, classes)
    model = fit_linear(bank, labels)
    assert model.converged
    theirs = make_pipeline(
        StandardScaler(), LogisticRegression(C=model.c, solver="newton-cholesky", tol=1e-9)
    )
    theirs.fit(bank.double().numpy(), labels.numpy())
    found = model.judge(queries, truth)
    assert found.predictions.tolist() == theirs.predict(queries.double().numpy()).tolist()
    assert 30 < found.top1 < 99
    sure = theirs.predict_proba(queries.double().numpy()).max(1)
    np.testing.assert_allclose(found.confidence.numpy(), sure, atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    bank, queries = features(300, 0, 5), features(100, 1, 5)
    whole = fit_linear(*bank)
    monkeypatch.setattr(linear, "_NUMBERS", 17 * 31)
    parts = fit_linear(*bank)
    assert parts.c == whole.c
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-5)
    one, other = (model.judge(*queries) for model in (whole, parts))
    assert torch.equal(one.predictions, other.predictions)


def test_c_is_the_one_that_suits_images_held_out():
    bank, labels = features(400, 0, 4)
    model = fit_linear(bank, labels)
    held = linear.draw_by_class(labels.tolist(), lambda n: n // 5, linear.SEED)
    rest = sorted({*range(400)} - {*held})

    def loss(c):
        fitted = fit_with(bank[rest], labels[rest], c, linear._Space.of(bank))
        return fitted.judge(bank[held], labels[held]).loss

    assert loss(model.c) <= min(loss(10.0**e) for e in range(-6, 6)) + 1e-9
    assert fit_linear(bank, labels).c == model.c


def test_one_image_per_class_leaves_nothing_to_choose_by():
    bank, labels = features(4, 0, 4)
    model = fit_linear(bank, labels)
    assert model.c == linear.UNCHOSEN and model.judge(bank, labels).top1 == 100


def test_classes_without_images_are_never_named():
    (bank, labels), (queries, truth) = features(200, 0, 3), features(60, 1, 3)
    found = fit_linear(bank, labels * 4).judge(queries, truth * 4)
    assert {*found.predictions.tolist()} == {0, 4, 8} and found.loss < 2
