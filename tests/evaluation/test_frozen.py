"""Embeddings are judged on images that are in no bank, as scikit-learn would judge them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models._hub import save_for_hf

from vitkd_cli import UserError, evaluate, evaluate_all
from vitkd_cli.data.datasets import draw_by_class, named_split
from vitkd_cli.evaluation import frozen
from vitkd_cli.evaluation.images import Provenance
from vitkd_cli.requests import EvalRequest

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models: one without a head, one with three classes."""
    folders = []
    for name, classes in (("bare", 0), ("three", 3)):
        torch.manual_seed(len(name))
        net = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **KWARGS)
        folders.append(tmp_path_factory.mktemp("models") / name)
        save_for_hf(net, str(folders[-1]), safe_serialization=True)
    return [f"local-dir:{folder}" for folder in folders]


@pytest.fixture(scope="module")
def judged(models, tmp_path_factory):
    """Both on the digits, by both judges, and where their embeddings are kept."""
    kept = tmp_path_factory.mktemp("kept")
    asked = {"knn": True, "linear": True, "few_shot": (1, 5), "workers": 0, "device": "cpu", "output": kept}
    return evaluate_all(models, "digits", **asked), kept, asked


def kept_features(kept, model):
    one, other = (load_file(file)["rows"] for file in kept.glob(f"embeddings/*{model}*"))
    return (one, other) if len(one) > len(other) else (other, one)


def test_scikit_learn_gives_the_same_answer_to_every_image(judged):
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found, kept, _ = judged
    labels = named_split(data="digits", split="train")[0].labels()
    for by_vote, by_fit in (found.models[:2], found.models[2:]):
        bank, queries = (part.double().numpy() for part in kept_features(kept, by_vote.model.split("/")[-1]))
        vote = KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07)
        )
        linear = make_pipeline(
            StandardScaler(), LogisticRegression(C=by_fit.judge.c, solver="newton-cholesky", tol=1e-9)
        )
        for ours, theirs in ((by_vote, vote), (by_fit, linear)):
            theirs.fit(bank, labels)
            assert ours.metrics.predictions.tolist() == theirs.predict(queries).tolist()
            assert ours.metrics.count == 500 and 30 < ours.metrics.top1 < 100


def test_draws_are_the_same_for_all_models(judged):
    found, kept, _ = judged
    labels = torch.tensor(named_split(data="digits", split="train")[0].labels())
    truth = torch.tensor(named_split(data="digits")[0].labels())
    for one in found.models[::2]:
        bank, queries = kept_features(kept, one.model.split("/")[-1])
        for shots in (1, 5):
            draws = [draw_by_class(labels.tolist(), lambda n, shots=shots: shots, seed) for seed in range(5)]
            assert all(labels[drawn].bincount().tolist() == [shots] * 10 for drawn in draws)
            expected = [frozen.vote(bank[d], labels[d], queries, truth).top1 for d in draws]
            assert one.judge.few_shot[shots] == expected and len(set(expected)) > 1
            assert one.judge.shots(shots)[0] == pytest.approx(np.mean(expected))


def test_what_is_kept_is_not_run_again(judged, models, monkeypatch):
    found, _, asked = judged
    monkeypatch.setattr(
        "vitkd_cli.evaluation.opening.val_loader", lambda *_, **__: pytest.fail("the images are read again")
    )
    again = evaluate_all(models[:1], "digits", **{**asked, "few_shot": ()})
    assert again.models[0].cached and not found.models[0].cached
    for one, other in zip(again.models, found.models, strict=False):
        assert torch.equal(one.metrics.ranked, other.metrics.ranked)


def test_models_are_compared_by_the_same_judge_only(judged):
    pairs = judged[0].comparisons
    assert [(pair.first[-6:], pair.second[-6:]) for pair in pairs] == [("(k-NN)",) * 2, ("inear)",) * 2]


@pytest.mark.slow
def test_every_form_of_the_table_has_the_judges(judged, models, cli, tmp_path):
    found, kept, _ = judged
    flags = ["eval", models[0], "--data", "digits", "--knn", "--linear", "--few-shot", "1,5", "-q"]
    flags += ["--output", str(kept), "--device", "cpu"]
    code, out, err = cli(*flags, "--json", "--predictions", str(tmp_path / "said.csv"))
    assert code == 0, err
    vote, linear = json.loads(out)["models"]
    assert (vote["judged_by"], linear["judged_by"]) == ("k-NN", "linear")
    assert vote["top1"] == found.models[0].metrics.top1 and vote["bank"] == 1297
    assert "ece" not in vote and linear["ece"] > 0 and linear["c"] == found.models[1].judge.c
    assert vote["few_shot"]["5"] == found.models[0].judge.few_shot[5]
    assert "bare (k-NN),digits[" in (tmp_path / "said.csv").read_text()
    for form in ("--csv", "--markdown"):
        code, out, err = cli(*flags, form)
        assert code == 0 and "k-NN" in out and f"{vote['top1_of_5']:.2f}"[:4] in out
    code, out, _ = cli(*flags, "--calibration")
    assert (
        "judged by" in out and "top-1, 5 a class" in out and "judged by 1,297 of digits, train split" in out
    )
    assert "k-NN" in (kept / "results.md").read_text()


@pytest.mark.slow
def test_two_processes_judge_alike(models, launcher, judged):
    flags = ["eval", models[0], "--data", "digits", "--knn", "--json", "-j", "0", "--device", "cpu"]
    two = json.loads(launcher(*flags, "--num-processes", "2", "-b", "100")[1])
    assert two["top1"] == judged[0].models[0].metrics.top1


def splits_of(request):
    asked, bank = Provenance([str(model) for model in request.models]).beside_a_bank(request)
    parts = [{part.images.path(i) for i in range(len(part.images))} for part in (asked, bank)]
    return asked, bank, *parts


def test_a_plain_folder_is_divided(models, photos):
    asked, bank, scored, known = splits_of(EvalRequest((models[0],), str(photos), knn=True))
    assert (len(scored), len(known)) == (6, 66) and not scored & known
    assert asked.names == bank.names and "10% of every class" in asked.about


def test_a_run_is_judged_by_the_images_it_trained_on(tiny, photos, tmp_path):
    from vitkd_cli import Recipe, distill
    from vitkd_cli.data.listing import read_split
    from vitkd_cli.progress import Reporter

    shutil.copytree(photos, tmp_path / "data")
    fields = {key: value for key, value in tiny.items() if "teacher" not in key and key != "shots"}
    fields |= {"data": str(tmp_path / "data"), "loss": "labels", "steps": 1, "val_fraction": 0.25}
    run = tmp_path / "run"
    distill(Recipe(**fields | {"output": str(run)}), reporter=Reporter(silent=True))
    split = read_split(run / "split.json")
    shutil.copytree(run / "student", tmp_path / "student")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    for model, data in ((run, None), (run, tmp_path / "data"), (tmp_path / "student", tmp_path / "moved")):
        request = EvalRequest((str(model),), None if data is None else str(data), knn=True)
        asked, _, scored, known = splits_of(request)
        root = data or tmp_path / "data"
        assert sorted(scored) == sorted(str(root / name) for name in split["validation"])
        assert sorted(known) == sorted(str(root / name) for name in split["train"])
        assert not [note for note in asked.notes if "left out" in note]
    everything = EvalRequest((str(run),), knn=True, bank=str(tmp_path / "data"))
    asked, _, scored, known = splits_of(everything)
    assert (len(scored), len(known)) == (18, 54) and not scored & known
    assert [note for note in asked.notes if note.startswith("18 images") and "left out" in note]


def test_a_bank_may_lie_elsewhere_and_holds_no_judged_image(models, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "more")
    shutil.rmtree(tmp_path / "more" / "cat")
    request = EvalRequest((models[0],), str(photos), knn=True, bank=str(tmp_path / "more"))
    with pytest.raises(UserError, match="has no class cat"):
        splits_of(request)
    (tmp_path / "more" / "cat").mkdir()
    for file in [*(photos / "cat").iterdir()][:5]:
        shutil.copy(file, tmp_path / "more" / "cat")
    (tmp_path / "more" / "apple").mkdir()  # classes that are only in the bank change the order of all
    shutil.copy(file, tmp_path / "more" / "apple")
    asked, bank, scored, known = splits_of(request)
    assert (len(scored), len(known)) == (72, 54) and asked.names == ["apple", "astronaut", "cat", "coffee"]
    for part in (asked, bank):
        for index, label in enumerate(part.images.labels()):
            assert f"/{part.names[label]}/" in part.images.path(index)
    found = evaluate_all(models, str(photos), knn=True, bank=str(tmp_path / "more"), workers=0)
    assert any("72 of 72 validation images are in training, too" in note for note in found.notes) is False
    assert any("validation images are in training, too" in note for note in found.notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"few_shot": (1,)}, "--few-shot is about embeddings"),
        ({"bank": "x"}, "--bank is about embeddings"),
        ({"knn": True, "teacher": "deit_tiny"}, "--teacher is about heads"),
        ({"linear": True, "real_labels": "timm"}, "--linear judges embeddings, and --real-labels"),
        ({"knn": True, "few_shot": (0,)}, "few_shot must be at least 1"),
        ({"knn": True, "split": "train"}, "--split train is what the images are judged by"),
        ({}, "has no classes to score"),
    ],
)
def test_what_does_not_fit_is_refused(models, settings, message):
    with pytest.raises(UserError, match=message):
        evaluate_all(models[:1], "digits", **settings)


def test_data_that_cannot_judge_is_refused_or_said(models, photos, tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    for file in (photos / "cat").iterdir():
        shutil.copy(file, tmp_path / "flat")
        shutil.copy(file, tmp_path / "one" / "cat")
    with pytest.raises(UserError, match="no class folders"):
        evaluate(models[0], str(tmp_path / "flat"), knn=True)
    with pytest.raises(UserError, match="one class only"):
        evaluate(models[0], str(tmp_path / "one"), knn=True)
    found = evaluate(models[0], str(photos), knn=True, workers=0)
    assert found.metrics.count == 6
    with pytest.raises(UserError, match="no class has so many"):
        evaluate_all(models[:1], str(photos), linear=True, few_shot=(3, 23), workers=0)
    uneven = tmp_path / "uneven"
    shutil.copytree(photos, uneven)
    for file in sorted((uneven / "cat").iterdir())[10:]:
        file.unlink()
    notes = evaluate_all(models[:1], str(uneven), linear=True, few_shot=(3, 20), workers=0).notes
    assert [note for note in notes if note.startswith("1 of 3 classes have fewer than 20 training images")]
    with pytest.raises(UserError, match="two evaluations"):
        evaluate(models[0], str(photos), knn=True, linear=True)


def test_a_head_that_is_lacking_names_the_cure(models, cli):
    code, _, err = cli("eval", models[0], "--data", "digits")
    assert code == 2 and "hint: --knn or --linear judges its embedding" in err
