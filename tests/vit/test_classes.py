"""A teacher of many classes serves some of them, found by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.models._hub import save_for_hf

from vitkd_cli import UserError
from vitkd_cli.requests import Weights
from vitkd_cli.vit.build import build
from vitkd_cli.vit.classes import known_names, match_classes
from vitkd_cli.vit.names import resolve

TINY = "img_size=32,patch_size=8,embed_dim=24,depth=2,num_heads=3"
SLIM = "depths=(1,1,1,1),embed_dim=12,num_heads=(1,2,2,2),img_size=64"
MODELS = {
    "vit_tiny": TINY,
    "deit_tiny_distilled_patch16_224": TINY,
    "swin_tiny": SLIM,
    "levit_128s": "depth=(1,1,1)",
}


def of(num_classes, name="vit_tiny", kwargs=TINY):
    torch.manual_seed(0)
    return build(resolve(name), Weights(pretrained=False), num_classes=num_classes, kwargs=kwargs)


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Ten class folders by wnid, not in the teacher's order by their index alone."""
    root = tmp_path_factory.mktemp("ten")
    synsets = ImageNetInfo().label_names()[3:1000:100]
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 2)):
        for synset in synsets:
            (root / split / synset).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / synset / f"{index}.png")
    return root


@pytest.mark.parametrize("name", MODELS)
def test_narrowed_logits_are_some_of_the_logits(name):
    built = of(20, name, MODELS[name])
    images = torch.randn(2, 3, *built.spec.input_size)
    with torch.no_grad():
        full = built.net.eval()(images).numpy()
        fewer = built.with_classes([13, 2, 7], ["a", "b", "c"])
        few = fewer.net(images).numpy()
    np.testing.assert_allclose(few, full[:, [13, 2, 7]], rtol=0, atol=1e-6)
    assert fewer.spec.num_classes == fewer.net.num_classes == 3 and fewer.class_names == ("a", "b", "c")


def test_both_heads_of_a_distilled_model_are_narrowed():
    built = of(20, "deit_tiny_distilled_patch16_224")
    head = built.net.head_dist.weight.detach().clone()
    built.with_classes([5, 0])
    assert torch.equal(built.net.head_dist.weight, head[[5, 0]])
    assert built.net.head.out_features == built.net.head_dist.out_features == 2


def test_a_head_without_a_row_a_class_is_refused():
    built = of(20)
    built.net.head = torch.nn.Sequential(torch.nn.Linear(24, 20))
    with pytest.raises(UserError, match="no layer with one row per class") as refused:
        built.with_classes([1])
    assert "--finetune-teacher" in refused.value.hint


def named(*names, sure=True):
    """A model of so many classes; it knows their names, or nobody does."""
    built = of(len(names))
    return replace(built, labels=names) if sure else built


@pytest.mark.parametrize(
    ("model", "names", "mapped", "rows", "kept"),
    [
        (named("1", "2", "10"), ["1", "2", "10"], False, None, ["1", "2", "10"]),
        (named("10", "1", "2"), ["1", "2", "10"], False, (1, 2, 0), ["1", "2", "10"]),
        (named("cafe\u0301", "b"), ["caf\u00e9", "b"], False, None, ["caf\u00e9", "b"]),
        (named("b", "a", "c"), ["c"], False, (2, 1, 0), ["c", "a", "b"]),  # all three may still be answered
        (named("b", "a", "c"), ["c", "b"], True, (2, 0), ["c", "b"]),  # narrowed as a map asks
        (named("b", "a", "c"), ["x", "y", "z"], True, None, ["x", "y", "z"]),  # a map's order is the model's
        (named("a", "plane"), ["a", "airplane"], True, None, ["a", "airplane"]),
        (of(1000), ["n01443537", "n01440764"], False, (1, 0), ["n01443537", "n01440764"]),
        (named("a", "b", sure=False), ["x", "y"], False, None, ["x", "y"]),
        (named("a", "b", sure=False), None, False, None, []),
    ],
)  # fmt: skip
def test_classes_are_matched_by_name(model, names, mapped, rows, kept):
    found = match_classes(model, names, "data", mapped=mapped)
    assert (found.indices, list(found.names)) == (rows, kept)


@pytest.mark.parametrize(
    ("model", "names", "note"),
    [
        (named("a", "b", sure=False), ["x", "y"], "its 2 classes are taken to be x, y, in this order"),
        (named("a", "b"), ["a"], "data has 1 of the 2 classes of"),
        (named("a", "b"), None, "data names no classes"),
    ],
)
def test_what_names_alone_cannot_settle_is_told(model, names, note):
    assert note in match_classes(model, names, "data").note


@pytest.mark.parametrize(
    ("model", "names", "mapped", "message"),
    [
        (named("coffee", "rocket"), ["cafe", "rakete"], False, "cafe, rakete; its own are coffee, rocket"),
        (named("airplane", "car"), ["car", "plane"], False, "lacks: plane; its own are airplane, car"),
        (named("airplane", "car"), ["car", "plane"], True, "lacks: plane; its own are airplane, car"),
        (named("a", "b", sure=False), ["x", "y", "z"], False, "data has 3 classes, vit_tiny"),
        (of(1000), ["tench", "n01440764"], False, "are one class of vit_tiny_patch16_224: tench, n01440764"),
        (replace(named("a", "b"), labels=("a",)), ["a"], False, "and its label_names are 1: a"),
    ],
)  # fmt: skip
def test_classes_are_never_matched_by_order_in_the_place_of_names(model, names, mapped, message):
    with pytest.raises(UserError, match=message) as refused:
        match_classes(model, names, "data", mapped=mapped)
    assert "--class-map" in refused.value.hint or "label_names" in refused.value.hint


def test_label_names_that_are_not_those_of_the_head_are_refused(tmp_path):
    """As a folder has them that was given a new head elsewhere."""
    save_for_hf(of(3).net, str(tmp_path), model_config={"label_names": ["a", "b"]}, safe_serialization=True)
    with pytest.raises(UserError, match="has 3 classes, and its label_names are 2: a, b"):
        build(resolve(f"local-dir:{tmp_path}"), Weights()).class_names  # noqa: B018


def test_imagenet_s_classes_by_synset_and_description():
    known = known_names(of(1000))
    names = ["n01443537", "tench", "golden_retriever", "great white shark", "tench, Tinca tinca"]
    assert [known[name] for name in names] == [1, 0, 207, 2, 0]
    assert "cat" not in known and "crane" not in known  # a crane is a bird or a machine
    assert known_names(of(21841))["n01443537"] == ImageNetInfo("imagenet-22k").label_names().index(
        "n01443537"
    )
    assert not known_names(of(37))


def test_a_model_s_own_labels_come_before_imagenet_s(tmp_path):
    labels = [f"thing {index}" for index in range(998)] + ["n01440764", "ox"]
    described = {"thing 3": "a third thing, the other one"}
    save_for_hf(
        of(1000).net,
        str(tmp_path / "saved"),
        model_config={"label_names": labels, "label_descriptions": described},
        safe_serialization=True,
    )
    known = known_names(build(resolve(f"local-dir:{tmp_path / 'saved'}"), Weights()))
    names = ["thing 7", "n01440764", "tench", "the other one", "a_third_thing"]
    assert [known[name] for name in names] == [7, 998, 998, 3, 3]
    assert "n01443537" not in known


def test_a_teacher_of_imagenet_serves_a_ten_class_subset(ten, cli, flags, tiny, tmp_path):
    values = {**tiny, "data": str(ten), "loss": "labels + kd", "shots": 4, "steps": 2}
    values["teacher_kwargs"] = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=1000")
    code, out, err = cli("distill", *flags(values), "--output", str(tmp_path / "run"))
    assert code == 0, err
    assert "teacher  its 1000 classes narrowed to the data's 10 by synset" in out
    assert "top-1" in out  # the teacher's accuracy on these ten
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["agreement"] is not None


def test_as_many_classes_in_another_order_are_put_in_order(cli, flags, tiny, photos, tmp_path):
    (tmp_path / "classes.txt").write_text("coffee\ncat\nastronaut\n")
    three = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=3")
    values = {**tiny, "data": str(photos), "shots": 5, "batch_size": 10, "steps": 1, "teacher_kwargs": three}
    assert cli("distill", *flags(values), "--output", str(tmp_path / "teacher"))[0] == 0
    values |= {"teacher": str(tmp_path / "teacher"), "teacher_pretrained": True}
    del values["teacher_kwargs"]
    reordered = ["--class-map", str(tmp_path / "classes.txt"), "--output", str(tmp_path / "run")]
    code, out, err = cli("distill", *flags(values), *reordered)
    assert code == 0, err
    assert "its 3 classes put into the data's order by name" in out


def test_a_teacher_is_scored_on_its_own_classes_or_not_at_all(cli, flags, tiny, photos, tmp_path):
    """Features need no common classes; an accuracy by the order of the folders would be chance."""
    save_for_hf(
        of(3).net,
        str(tmp_path / "teacher"),
        model_config={"label_names": ["astronaut", "cat", "coffee"]},
        safe_serialization=True,
    )
    for name in ("astronaut", "cat", "coffee"):
        shutil.copytree(photos / name, tmp_path / "renamed" / name[::-1])
    values = {key: value for key, value in tiny.items() if not key.startswith("teacher")}
    values |= {"teacher": str(tmp_path / "teacher"), "loss": "labels + mimic", "shots": 4, "steps": 1}
    values |= {"batch_size": 4}
    for data, words in ((photos, "top-1"), (tmp_path / "renamed", "no accuracy to report")):
        output = str(tmp_path / f"run-{data.name}")
        code, out, err = cli("distill", *flags({**values, "data": str(data)}), "--output", output)
        assert code == 0, err
        [line] = [line for line in out.splitlines() if line.startswith("teacher  ") and " at 32×32" in line]
        assert words in line
    assert "eeffoc" in line and "its own are astronaut, cat, coffee" in line


def test_a_folder_that_the_teacher_does_not_know(cli, flags, tiny, photos):
    values = {**tiny, "data": str(photos), "loss": "labels + kd", "shots": 4, "batch_size": 6}
    values["teacher_kwargs"] = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=1000")
    code, _, err = cli("distill", *flags(values), "--dry-run")
    assert (
        code == 2
        and "has classes that vit_tiny_patch16_224 lacks: astronaut, cat, coffee; its own are n01440764"
        in err
    )
    assert "--finetune-teacher" in err and "labels + vitkd" in err and "--class-map" in err
    values["loss"] = "labels + vitkd"  # features need no common classes
    assert cli("distill", *flags(values), "--dry-run")[0] == 0


def test_a_teacher_without_a_head_under_a_logit_term(cli, flags, tiny):
    values = {**tiny, "loss": "labels + kd", "teacher_kwargs": tiny["model_kwargs"] + ",num_classes=0"}
    code, _, err = cli("distill", *flags(values), "--dry-run")
    assert code == 2 and "kd reads the teacher's logits, and vit_tiny_patch16_224 has no classes" in err
    assert "--finetune-teacher" in err and "labels + vitkd" in err


def test_a_subset_is_scored_on_its_classes_alone(ten, cli, tmp_path):
    torch.manual_seed(0)
    model = of(1000).net.eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_for_hf(model, str(tmp_path / "teacher"), safe_serialization=True)
    arguments = ["eval", f"local-dir:{tmp_path / 'teacher'}", "--data", str(ten), "-j", "0", "-q"]
    code, out, err = cli(*arguments, "--crop-pct", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["classes"], found["model_classes"]) == (10, 1000)
    names = sorted(path.name for path in (ten / "validation").iterdir())
    index = [ImageNetInfo().label_names().index(name) for name in names]
    losses, hits = [], []
    for label, name in enumerate(names):
        for path in sorted((ten / "validation" / name).iterdir()):
            pixels = torch.from_numpy(np.asarray(Image.open(path)) / 255.0).float().permute(2, 0, 1)[None]
            with torch.no_grad():
                scores = model((pixels - 0.5) / 0.5).double().numpy()[0, index]
            losses.append(np.log(np.exp(scores).sum()) - scores[label])
            hits.append(scores.argmax() == label)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["top1"] == pytest.approx(100 * np.mean(hits))
    assert found["parameters"] == sum(p.numel() for p in of(1000).net.parameters())
    assert "scored on 10 of its 1000 classes" in cli(*arguments)[1]
