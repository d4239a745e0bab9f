"""ImageNet's validation images as people have them: flat, with a file of classes; in tars."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from vitkd_cli.data.datasets import named_split, open_data
from vitkd_cli.errors import UserError

SYNSETS = ImageNetInfo("imagenet-1k").label_names()
TRUTH = [SYNSETS[i] for i in (7, 2, 7, 999)]  # of images 1 to 4
NAMES = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 5)]


def jpeg(index):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 40 * index, np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def flat(tmp_path):
    """Kaggle's layout, without its file of classes."""
    folder = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    folder.mkdir(parents=True)
    for index, name in enumerate(NAMES):
        (folder / f"{name}.JPEG").write_bytes(jpeg(index))
    return folder


def kaggle(folder):
    boxes = "85 1 499 272 131 0 499 254"
    lines = [f"{name},{synset} {boxes} " for name, synset in zip(NAMES, TRUTH, strict=True)]
    path = folder.parents[2] / "LOC_val_solution.csv"
    path.write_text("ImageId,PredictionString\n" + "\n".join(reversed(lines)) + "\n")
    return path


def devkit(folder):
    """Its numbers follow no alphabet; its ``meta.mat`` is a structured array."""
    from scipy.io import savemat

    place = folder / "ILSVRC2012_devkit_t12" / "data"
    place.mkdir(parents=True)
    ids = {SYNSETS[7]: 1, SYNSETS[2]: 1000, SYNSETS[999]: 31}
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    table = np.array([(number, synset, "words") for synset, number in ids.items()], dtype=kinds)
    savemat(place / "meta.mat", {"synsets": table.reshape(-1, 1)})
    path = place / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("".join(f"{ids[synset]}\n" for synset in TRUTH))
    return path


def synset_labels(folder):
    path = folder.parent / "imagenet_2012_validation_synset_labels.txt"
    path.write_text("\n".join(TRUTH) + "\n")
    return path


def name_and_index(folder):
    path = folder.parent / "val.txt"
    pairs = zip(NAMES, TRUTH, strict=True)
    path.write_text("".join(f"{name}.JPEG {SYNSETS.index(synset)}\n" for name, synset in pairs))
    return path


@pytest.mark.parametrize("write", [kaggle, devkit, synset_labels, name_and_index])
def test_a_flat_folder_with_a_file_of_classes(flat, write):
    if write is devkit:
        write(flat.parent)
    else:
        write(flat)
    for root in (flat, flat.parent):
        images, names = named_split(data=str(root))
        found = {images.path(i).split("/")[-1].split(".")[0]: names[images[i][1]] for i in range(4)}
        assert found == dict(zip(NAMES, TRUTH, strict=True))
        assert images.labels() == [images[i][1] for i in range(4)]


def test_a_mark_at_the_beginning_is_no_part_of_a_name(flat, tmp_path):
    path = tmp_path / "truth.txt"
    path.write_text("\n".join(TRUTH), encoding="utf-8-sig")
    assert named_split(data=str(flat), ground_truth=path)[1] == sorted(set(TRUTH))


def test_numbers_of_another_kit_are_refused(flat):
    devkit(flat.parent).write_text("1\n1000\n31\n7\n")
    with pytest.raises(UserError, match="has a class 7, and"):
        named_split(data=str(flat))


def test_a_file_that_lies_elsewhere(flat, tmp_path):
    path = synset_labels(flat).rename(tmp_path / "somewhere.txt")
    images, names = named_split(data=str(flat), ground_truth=path)
    assert [names[label] for label in images.labels()] == TRUTH


def test_training_on_class_folders_beside_it(flat):
    kaggle(flat)
    for synset in SYNSETS[:8] + SYNSETS[998:]:
        (flat.parent / "train" / synset).mkdir(parents=True)
        (flat.parent / "train" / synset / "a.jpg").write_bytes(jpeg(1))
    data = open_data(data=str(flat.parent))
    assert len(data.train) == 10 and len(data.val) == 4 and data.num_classes == 10
    assert [data.class_names[label] for label in data.val.labels()] == TRUTH
    (flat.parent / "train" / SYNSETS[7] / "a.jpg").unlink()
    with pytest.raises(UserError, match=f"has classes that .* lacks: {SYNSETS[7]}"):
        open_data(data=str(flat.parent))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\n", "lists 1 classes, and there are 4 images"),
        ("a\nb\nc\nd\n", "is no list of classes"),
        ("1\n2\n3\n4\n", "meta.mat is not beside it"),
        ("x.JPEG n01440764\n", "does not name 4 of the images, the first is ILSVRC2012_val_00000001"),
        ("\ufeffn01440764\nn01440764\nn01440764\nn0144\n", "is no list of classes"),
        (b"\xff\xfe\x00", "truth.txt cannot be read"),
        (None, "there is no file"),
    ],
)
def test_files_that_do_not_serve(flat, tmp_path, text, message):
    path = tmp_path / "truth.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        named_split(data=str(flat), ground_truth=path)


def test_a_file_of_classes_beside_class_folders_is_refused(photos, tmp_path):
    (tmp_path / "truth.txt").write_text("1\n")
    with pytest.raises(UserError, match="--ground-truth lists the classes of a flat folder"):
        named_split(data=str(photos), ground_truth=tmp_path / "truth.txt")
    with pytest.raises(UserError, match="and digits has its own"):
        named_split(data="digits", ground_truth=tmp_path / "truth.txt")


def test_without_any_file_the_hint_names_the_flag(flat):
    with pytest.raises(UserError, match="no class folders") as caught:
        named_split(data=str(flat))
    assert "--ground-truth" in caught.value.hint


def in_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_tars(flat, tmp_path):
    folders = in_tar(tmp_path / "val.tar", {f"{c}/{i}.jpg": jpeg(i) for c in ("10", "2") for i in range(3)})
    images, names = named_split(data=str(folders))
    assert names == ["2", "10"] and images.labels() == [0, 0, 0, 1, 1, 1]
    image, label = images[4]
    assert image.size == (8, 8) and label == 1 and "10/1.jpg" in images.path(4)

    (tmp_path / "many" / "validation").mkdir(parents=True)
    for c in ("b", "a"):
        in_tar(tmp_path / "many" / "validation" / f"{c}.tar", {f"{i}.jpg": jpeg(i) for i in range(2)})
    images, names = named_split(data=str(tmp_path / "many"))
    assert names == ["a", "b"] and sorted(images.labels()) == [0, 0, 1, 1]

    kaggle(flat)
    path = in_tar(flat.parent / "img_val.tar", {f"{n}.JPEG": jpeg(i) for i, n in enumerate(NAMES)})
    images, names = named_split(data=str(path))
    assert [names[label] for label in images.labels()] == TRUTH
    assert not list(tmp_path.rglob("*.pickle"))


def test_tars_that_do_not_serve(tmp_path):
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match="cannot be read as a tar"):
        named_split(data=str(tmp_path / "broken.tar"))
    path = in_tar(tmp_path / "flat.tar", {"a.jpg": jpeg(1)})
    with pytest.raises(UserError, match="holds images without class folders"):
        named_split(data=str(path))


@pytest.mark.parametrize(
    ("damage", "read"),
    [
        (lambda content, second: content[: second + 200], 1),  # in a header
        (lambda content, second: content[: second + 700], 1),  # in what the last file holds
        (lambda content, second: content[:second], 1),  # between two files
        (lambda content, second: content[: 3 * second] + bytes(100), 3),  # the end mark alone
        (lambda content, second: content[: second + 50] + b"?" + content[second + 51 :], 1),  # one byte
    ],
    ids=["in a header", "in a file", "between files", "before the end mark", "a damaged header"],
)
@pytest.mark.parametrize("nested", [False, True], ids=["tar", "tar in a tar"])
def test_half_a_tar_is_refused_with_what_was_read(tmp_path, damage, read, nested):
    files = {f"{c}/{c}.jpg": jpeg(i).ljust(1000, b"\0") for i, c in enumerate("abc")}
    path = in_tar(tmp_path / "x.tar", files)
    assert len(named_split(data=str(path))[0]) == 3
    content = damage(path.read_bytes(), second=512 + 1024)
    path.write_bytes(content)
    if nested:
        path = in_tar(tmp_path / "outer.tar", {"x.tar": content})
    with pytest.raises(UserError, match=rf"x\.tar is cut or damaged: {read} files can be read, and at byte"):
        named_split(data=str(path))


def test_a_class_map_orders_a_flat_folder_too(flat, tmp_path):
    kaggle(flat)
    order = tmp_path / "order.txt"
    order.write_text(f"{SYNSETS[999]}\n{SYNSETS[7]}\n")  # one of the three is left out
    images, names = named_split(data=str(flat), class_map=str(order))
    assert names == [SYNSETS[999], SYNSETS[7]]
    assert images.labels() == [1, 1, 0] and [images[i][1] for i in range(3)] == [1, 1, 0]
