"""Evaluation gives timm's own numbers, each image once."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.utils import AverageMeter, accuracy

from vitkd_cli import UserError, evaluate
from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images
from vitkd_cli.evaluation import Evaluation, Evaluations, evaluate_all, measure, opening, reassessed
from vitkd_cli.evaluation import accuracy as accuracy_module
from vitkd_cli.evaluation.images import Provenance
from vitkd_cli.recipe import Recipe
from vitkd_cli.requests import Pictures
from vitkd_cli.vit.build import open_model
from vitkd_cli.vit.classes import Match

MODELS = {
    "vit_tiny_patch16_224": {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)},
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "eva02_tiny_patch14_224": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "edgenext_xx_small": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},  # has a test size of its own
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model of three classes in timm's own folder format."""
    from timm.models._hub import save_for_hf

    def save(name):
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=3, **MODELS[name])
        folder = tmp_path_factory.mktemp("model") / name
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        save_for_hf(model, str(folder), safe_serialization=True)
        return folder

    return save


def loader_of(model, data, batch_size, *, use_prefetcher=True, num_workers=1, **options):
    """timm's own loader, as its validate.py makes it."""
    config = resolve_input_data_config(model, options, use_test_size=True)
    return create_loader(
        create_dataset("", root=str(data), split="validation"),
        input_size=config["input_size"],
        batch_size=batch_size,
        use_prefetcher=use_prefetcher,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=num_workers,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device("cpu"),
    )


@torch.inference_mode()
def as_timm_validates(folder, data, **options):
    """What timm's validate.py does, with timm's own functions."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    loader = loader_of(model, data, 16, use_prefetcher=False, num_workers=0, **options)
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    for images, target in loader:
        output = model(images)
        first, fifth = accuracy(output, target, topk=(1, 3))
        top1.update(float(first), len(images))
        top5.update(float(fifth), len(images))
        loss.update(float(torch.nn.functional.cross_entropy(output, target)), len(images))
    return top1.avg, top5.avg, loss.avg, top1.count


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_timm(saved, photos, name):
    folder = saved(name)
    top1, _, loss, count = as_timm_validates(folder, photos)
    found = evaluate(f"local-dir:{folder}", str(photos), batch_size=10, workers=0)
    assert found.metrics.count == count == 72  # also with a ragged last batch
    assert found.metrics.top1 == pytest.approx(top1)
    assert found.metrics.loss == pytest.approx(loss, rel=1e-5)
    assert found.metrics.top5 == 100  # of three classes


def test_it_equals_timm_with_another_crop(saved, photos):
    folder = saved("vit_tiny_patch16_224")
    top1, _, loss, _ = as_timm_validates(folder, photos, crop_pct=0.6, interpolation="bilinear")
    found = evaluate(f"local-dir:{folder}", str(photos), crop_pct=0.6, interpolation="bilinear", workers=0)
    assert found.preprocessing["crop_pct"] == 0.6
    assert (found.metrics.top1, found.metrics.loss) == pytest.approx((top1, loss), rel=1e-5)


def test_two_processes_count_each_image_once(saved, photos, launcher):
    folder = saved("vit_tiny_patch16_224")
    arguments = ["eval", f"local-dir:{folder}", "--data", str(photos), "--json", "-j", "0", "-b", "7"]
    arguments += ["--device", "cpu"]
    one, two = (json.loads(launcher(*arguments, "--num-processes", n)[1]) for n in "12")
    assert one["count"] == two["count"] == 72
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert (one["top1"], one["top5"]) == (two["top1"], two["top5"])


def test_measure_keeps_the_dataset_s_order():
    scores = torch.tensor([[0.0, 1, 2], [3.0, 1, 2], [0.0, 5, 2]])
    labels = torch.tensor([2, 1, 1])
    images = torch.zeros(3, 3, 1, 1, dtype=torch.uint8)
    positions = torch.tensor([2, 0, 1])
    found = measure(lambda _: scores, [(images, labels, positions)], 3, device=torch.device("cpu"))
    assert found.predictions.tolist() == [0, 1, 2]
    assert found.top1 == pytest.approx(200 / 3) and found.count == 3
    assert found.agreement(found) == 100


def test_a_model_without_classes_is_refused(tmp_path, photos):
    from timm.models._hub import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    save_for_hf(model, str(tmp_path / "headless"), safe_serialization=True)
    with pytest.raises(UserError, match="has no classes to score"):
        evaluate(f"local-dir:{tmp_path / 'headless'}", str(photos))


def test_other_classes_are_refused(saved, tmp_path, photos):
    import shutil

    folder = saved("vit_tiny_patch16_224")
    shutil.copytree(photos, tmp_path / "more")
    shutil.copytree(photos / "cat", tmp_path / "more" / "dog")
    with pytest.raises(UserError, match=r"more has 4 classes, .* has 3"):
        evaluate(f"local-dir:{folder}", str(tmp_path / "more"))


def test_a_run_is_scored_on_the_images_that_it_set_aside(tiny, flags, cli, photos, tmp_path):
    kwargs = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=3")
    values = {**tiny, "data": str(photos), "shots": 5, "batch_size": 10, "steps": 1, "teacher_kwargs": kwargs}
    values["val_fraction"] = 0.25
    assert cli("distill", *flags(values), "--output", str(tmp_path / "run"))[0] == 0
    held_out = json.loads((tmp_path / "run" / "split.json").read_text())["validation"]
    for model in ("run", "run/student"):
        code, out, err = cli("eval", str(tmp_path / model), "--data", str(photos), "--json", "-j", "0", "-q")
        assert code == 0, err
        assert json.loads(out)["count"] == len(held_out) == 18


@torch.inference_mode()
def logits_of(folder, data):
    """By hand: PIL images through timm's own transform, and their classes."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_input_data_config(model, {}, use_test_size=True)
    transform = timm.data.create_transform(**config, is_training=False)
    dataset = create_dataset("", root=str(data), split="validation")
    images, labels = zip(*dataset, strict=True)
    scores = [model(transform(image)[None])[0] for image in images]
    return torch.stack(scores).double(), torch.tensor(labels)


def test_everything_is_what_the_logits_say(saved, photos):
    ours, guide = saved("vit_tiny_patch16_224"), saved("swin_tiny_patch4_window7_224")
    options = {"workers": 0, "batch_size": 50, "device": "cpu"}
    found = evaluate(f"{ours}", str(photos), teacher=str(guide), **options).metrics
    (scores, labels), (taught, _) = logits_of(ours, photos), logits_of(guide, photos)
    p, q = scores.softmax(1), taught.softmax(1)
    close = {"rtol": 1e-4, "atol": 1e-6}  # pixels reach the model by another road: /255, then mean and std
    torch.testing.assert_close(found.labels, labels)
    torch.testing.assert_close(found.ranked[:, :3], scores.argsort(1, descending=True))
    torch.testing.assert_close(found.confidence, p.amax(1), **close)
    torch.testing.assert_close(found.nll, -p.gather(1, labels[:, None])[:, 0].log(), **close)
    one_hot = torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(found.brier, ((p - one_hot) ** 2).sum(1), **close)
    torch.testing.assert_close(found.divergence, (q * (q / p).log()).sum(1), **close)


def test_many_models_are_scored_on_one_decoding(saved, photos, monkeypatch):
    """Two of them see the images alike, the third at another crop; each as if it were alone."""
    folders = [str(saved(name)) for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224")]
    alone = [evaluate(folder, str(photos), workers=0).metrics for folder in folders]
    decoded, views = [], []
    decode = Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda s, i: decoded.append(i) or decode(s, i))
    seen = accuracy_module.Views
    monkeypatch.setattr(accuracy_module, "Views", lambda v: views.append(len(v)) or seen(v))
    found = evaluate_all([*folders, folders[0]], str(photos), workers=0)
    assert sorted(decoded) == list(range(72)) and views == [1]
    for together, lone in zip(found.models, [*alone, alone[0]], strict=True):
        assert torch.equal(together.metrics.ranked, lone.ranked)
        torch.testing.assert_close(together.metrics.nll, lone.nll, rtol=1e-5, atol=1e-6)


def test_a_subset_is_scored_on_the_narrowed_logits(tmp_path, photos):
    """A 1000-class model on ten of ImageNet's classes, against numpy."""
    import shutil

    import numpy as np
    from timm.data import ImageNetInfo
    from timm.models._hub import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **MODELS["vit_tiny_patch16_224"])
    torch.nn.init.normal_(model.head.weight)
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    classes = sorted(np.random.default_rng(0).choice(1000, 10, replace=False).tolist())
    files = sorted(photos.rglob("*.jpg"))
    for index, c in enumerate(classes):
        folder = tmp_path / "ten" / ImageNetInfo("imagenet-1k").label_names()[c]
        folder.mkdir(parents=True)
        for file in files[index::10]:
            shutil.copy(file, folder / f"{file.parent.name}{file.name}")
    found = evaluate(str(tmp_path / "model"), str(tmp_path / "ten"), workers=0)
    assert found.classes == (10, 1000)
    scores, labels = logits_of(tmp_path / "model", tmp_path / "ten")
    narrow = scores.numpy()[:, classes]  # dataset's labels are the ten folders in order
    assert found.metrics.predictions.tolist() == narrow.argmax(1).tolist()
    assert found.metrics.top1 == pytest.approx(100 * (narrow.argmax(1) == labels.numpy()).mean())
    log_p = narrow - np.log(np.exp(narrow).sum(1, keepdims=True))
    assert found.metrics.loss == pytest.approx(-log_p[range(72), labels].mean(), rel=1e-4)

    listed = tmp_path / "valid.txt"  # timm's way to say it
    listed.write_text("".join(f"{c}\n" for c in classes))
    again = evaluate(str(tmp_path / "model"), str(tmp_path / "ten"), valid_labels=str(listed), workers=0)
    assert torch.equal(again.metrics.nll, found.metrics.nll)
    for text, message in (("1\n2\n", "lists 2 classes, the data has 10"), ("x", "cannot read")):
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            evaluate(str(tmp_path / "model"), str(tmp_path / "ten"), valid_labels=str(listed))


def test_reassessed_labels_are_timms(tmp_path):
    """timm's RealLabelsImagenet wants all 50,000 names; the images here are the last of them."""
    from timm.data import RealLabelsImagenet

    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 50001)]
    real = RealLabelsImagenet(names)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 1000, generator=generator)
    for row, name in zip(scores[:30], names[-60:], strict=False):  # else hardly one would be right
        row[real.real_labels[name][:1]] = 2
    real.sample_idx = 50000 - 60
    real.add_result(scores)
    metrics = measure(
        lambda _: scores,
        [(torch.zeros(60, 3, 1, 1, dtype=torch.uint8), torch.zeros(60, dtype=torch.int64), torch.arange(60))],
        60,
        device=torch.device("cpu"),
    )
    one = Evaluation(SimpleNamespace(), Match(None, ()), "d", metrics)
    found = Evaluations((one,), (), Images(names[-60:], [0] * 60))
    [scored] = reassessed(found, "timm")
    assert scored == pytest.approx((real.get_accuracy(1), real.get_accuracy(5)))
    with pytest.raises(UserError, match="under their own names"):
        reassessed(Evaluations((one,), (), Images(["a.jpg"] * 60, [0] * 60)), "timm")
    with pytest.raises(UserError, match="--real-labels: tench are no synsets"):
        reassessed(Evaluations((one,), ("tench", "n01443537"), found.images), "timm")
    with pytest.raises(UserError, match="--real-labels: cannot read"):
        reassessed(found, str(tmp_path / "none.json"))


def test_a_scoring_that_was_stopped_starts_anew_and_a_finished_model_is_skipped(saved, photos, tmp_path):
    folders = [str(saved(name)) for name in ("vit_tiny_patch16_224", "beit_base_patch16_224")]
    options = {"workers": 0, "batch_size": 10, "output": tmp_path / "out"}
    whole = evaluate_all(folders, str(photos), workers=0, batch_size=10)

    def stop(stage, done, total):
        if stage.startswith("scoring") and done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_all(folders, str(photos), progress=stop, **options)
    counted = []
    found = evaluate_all(
        folders, str(photos), progress=lambda stage, done, total: counted.append((stage, done)), **options
    )
    scoring = [done for stage, done in counted if stage == "scoring 2 models"]
    assert scoring == [10, 20, 30, 40, 50, 60, 70, 72]
    for one, other in zip(found.models, whole.models, strict=True):
        assert torch.equal(one.metrics.ranked, other.metrics.ranked) and one.metrics.count == 72
        torch.testing.assert_close(one.metrics.nll, other.metrics.nll, rtol=1e-5, atol=1e-6)
        assert not one.cached

    def never(stage, done, total):
        raise AssertionError("everything is known")

    assert all(one.cached for one in evaluate_all(folders, str(photos), progress=never, **options).models)
    # a third model is asked alone; another crop, or a teacher, makes other answers
    more = evaluate_all([*folders, str(saved("eva02_tiny_patch14_224"))], str(photos), **options)
    assert [one.cached for one in more.models] == [True, True, False]
    assert not evaluate_all(folders[:1], str(photos), crop_pct=0.5, **options).models[0].cached
    assert not evaluate_all(folders[:1], str(photos), teacher=folders[1], **options).models[0].cached


def test_test_time_pooling_is_timms(tmp_path):
    from timm.layers import apply_test_time_pool
    from timm.models._hub import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("mobilevit_xxs", num_classes=3)
    save_for_hf(model, str(tmp_path / "mobilevit"), safe_serialization=True)
    built = open_model(str(tmp_path / "mobilevit"))
    pooled = opening._test_pooled(built.prepared(img_size=320))
    assert (built.preprocessing["crop_pct"], pooled.preprocessing["crop_pct"]) == (0.9, 1.0)
    images = torch.rand(2, 3, 320, 320)
    with torch.inference_mode():
        plain = built.net.eval()(images)
        theirs, _ = apply_test_time_pool(built.net, {"input_size": (3, 320, 320)})
        assert torch.equal(pooled.net(images), theirs.eval()(images))
        assert not torch.allclose(pooled.net(images), plain)


def test_test_time_pooling_of_a_token_model_is_refused(saved, photos):
    with pytest.raises(UserError, match="test-time pooling does not fit"):
        evaluate(str(saved("vit_tiny_patch16_224")), str(photos), img_size=256, test_time_pool=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_precision": "int4"}, "mixed_precision must be one of no, fp16, bf16, not 'int4'"),
        ({"use_ema": True}, "takes the average out of a weight file"),
        ({"crop_pct": 1.2}, "--crop-pct 1.2 is more than the whole image"),
    ],
)
def test_requests_that_cannot_be(saved, photos, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(str(saved("vit_tiny_patch16_224")), str(photos), **options)


def test_labels_beyond_a_model_s_classes_are_refused(saved, photos, monkeypatch):
    pictures = sorted(photos.rglob("*.jpg"))[:4]
    unnamed = Images(map(str, pictures), (0, 2, 3, 1))
    monkeypatch.setattr("vitkd_cli.evaluation.images.named_split", lambda *_, **options: (unnamed, None))
    with pytest.raises(UserError, match="the data has a class 3, and "):
        evaluate(str(saved("vit_tiny_patch16_224")), str(photos), workers=0)


def test_one_weight_file_for_many_models_is_refused(saved, photos):
    folder = str(saved("vit_tiny_patch16_224"))
    with pytest.raises(UserError, match="--checkpoint gives weights to one model"):
        evaluate_all([folder, folder], str(photos), checkpoint=f"{folder}/model.safetensors")


def test_damaged_answers_are_asked_anew(saved, photos, tmp_path):
    options = {"workers": 0, "output": tmp_path / "out"}
    folder = saved("vit_tiny_patch16_224")
    first = evaluate(folder, str(photos), **options)
    (file,) = (tmp_path / "out" / "answers").iterdir()
    for place, flips in ((-80, 1), (40, 8), (0, 8)):  # in the answers; in the header
        content = bytearray(file.read_bytes())
        content[place] ^= flips
        file.write_bytes(content)
        again = evaluate(folder, str(photos), **options)
        assert not again.cached and torch.equal(again.metrics.ranked, first.metrics.ranked)
        assert evaluate(folder, str(photos), **options).cached


def test_logits_that_are_no_numbers_end_it(photos, saved):
    """Half precision that overflows would name any class, and nan is no JSON."""
    from safetensors.torch import load_file, save_file

    folder = saved("vit_tiny_patch16_224")
    state = load_file(folder / "model.safetensors")
    state["norm.bias"][0] = state["head.weight"][:, 0] = 1e30  # finite, as weights must be
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="are not numbers on 72 of 72 images"):
        evaluate(str(folder), str(photos), workers=0)


def test_a_teacher_of_the_same_name_keeps_answers_of_its_own(saved, photos, tmp_path):
    folder = saved("vit_tiny_patch16_224")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    options = {"checkpoint": str(tmp_path / "other.pth"), "teacher": str(folder), "workers": 0}
    for cached in (False, True):
        found = evaluate_all([str(folder)], str(photos), output=tmp_path / "out", **options)
        assert found.models[0].cached is cached


def test_a_border_has_the_colour_of_the_mean(saved, photos):
    folder = saved("vit_tiny_patch16_224")
    black = {"crop_mode": "border", "crop_pct": 1.5, "mean": (0.0, 0.0, 0.0)}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_input_data_config(model, black, use_test_size=True)
    loader = create_loader(
        create_dataset("", root=str(photos), split="validation"), batch_size=72, use_prefetcher=False,
        num_workers=0, device=torch.device("cpu"), **config,
    )  # fmt: skip
    [(images, target)] = loader
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model(images), target)
    found = evaluate(str(folder), str(photos), workers=0, **black)
    assert found.metrics.loss == pytest.approx(float(loss), rel=1e-6)


def test_a_teacher_of_other_classes_is_refused(saved, photos, tmp_path):
    """A class map may name fewer classes than a model has; then nothing of the data is amiss."""
    from timm.models._hub import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **MODELS["vit_tiny_patch16_224"])
    save_for_hf(model, str(tmp_path / "five"), safe_serialization=True)
    (tmp_path / "map.txt").write_text("astronaut\ncat\ncoffee\n")
    options = {"teacher": str(tmp_path / "five"), "class_map": str(tmp_path / "map.txt"), "workers": 0}
    with pytest.raises(UserError, match="is scored on 3 classes, the teacher on 5"):
        evaluate(str(saved("vit_tiny_patch16_224")), str(photos), **options)


def test_answers_about_images_that_were_replaced_are_not_kept(saved, photos, tmp_path):
    import shutil

    shutil.copytree(photos, tmp_path / "photos")
    ask = {"model": str(saved("vit_tiny_patch16_224")), "data": str(tmp_path / "photos"), "workers": 0}
    ask["output"] = tmp_path / "out"
    before = evaluate(**ask)
    assert evaluate(**ask).cached
    one, other = (tmp_path / "photos" / name / "00.jpg" for name in ("cat", "coffee"))
    shutil.copy(other, one)
    after = evaluate(**ask)
    assert not after.cached and not torch.equal(before.metrics.nll, after.metrics.nll)


def test_pictures_of_imagenet_lie_as_timm_has_them_and_others_stand_upright(saved, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    draw = np.random.default_rng(0)
    synsets = ("n01440764", "n01443537", "n01484850")
    folder = saved("vit_tiny_patch16_224")
    for root, names in ((tmp_path / "in1k", synsets), (tmp_path / "own", ("a", "b", "c"))):
        for name in names:
            (root / "validation" / name).mkdir(parents=True)
            for index in range(4):
                image = Image.fromarray(draw.integers(0, 256, (40, 64, 3), np.uint8)).resize((320, 200))
                image.save(root / "validation" / name / f"{index}.jpg", exif=turned)
    known = json.loads((folder / "config.json").read_text())
    known["pretrained_cfg"]["label_names"] = known["label_names"] = list(synsets)
    (folder / "config.json").write_text(json.dumps(known))
    found = evaluate_all([str(folder)], str(tmp_path / "in1k"), workers=0)
    theirs = as_timm_validates(folder, tmp_path / "in1k")
    ours = found.models[0].metrics
    assert (round(ours.top1, 3), round(ours.loss, 4)) == (round(theirs[0], 3), round(theirs[2], 4))
    assert any("12 of 12 files carry an EXIF turn" in note and "--exif" in note for note in found.notes)
    upright = evaluate_all([str(folder)], str(tmp_path / "in1k"), workers=0, exif=True)
    assert upright.models[0].metrics.loss != ours.loss
    assert not any("EXIF" in note for note in upright.notes)
    assert found.images[0][0].size == (320, 200) and upright.images[0][0].size == (200, 320)

    known["pretrained_cfg"]["label_names"] = known["label_names"] = ["a", "b", "c"]
    (folder / "config.json").write_text(json.dumps(known))
    own = evaluate_all([str(folder)], str(tmp_path / "own"), workers=0)
    assert own.images[0][0].size == (200, 320)


def test_pictures_are_decoded_as_the_models_runs_decode_theirs(tmp_path):
    for name, options in (("a", {"exif": False, "max_pixels": 10}), ("b", {"alpha_fill": "black"})):
        (tmp_path / name).mkdir()
        about = {"architecture": "vit_tiny_patch16_224", "vitkd": {"recipe": Recipe(**options).to_toml()}}
        (tmp_path / name / "config.json").write_text(json.dumps(about))
    a, b = str(tmp_path / "a"), f"local-dir:{tmp_path / 'b'}"  # wherever the student was moved to
    assert Provenance([a]).decoding() == Decoding(exif=False, max_pixels=10)
    assert Provenance([b]).decoding() == Decoding(alpha_fill="black")
    assert Provenance([a]).decoding(Pictures(exif=True)) == Decoding(max_pixels=10)
    with pytest.raises(UserError, match="read pictures with different exif"):
        Provenance([a, b]).decoding()
    assert Provenance([a, b]).decoding(Pictures(exif=True, alpha_fill="red")).alpha_fill == "red"
    assert Provenance(["vit_tiny"]).decoding() == Decoding()
    assert not Provenance(["vit_tiny"]).decoding(names=["n01440764", "n02102040"]).exif
    assert Provenance(["vit_tiny"]).decoding(names=["n01440764", "cat"]).exif
