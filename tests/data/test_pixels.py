"""The fast input: Pillow's pixels when decoded, within one grey level when cropped; else Pillow itself."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import photo, saved, views
from PIL import Image

from vitkd_cli.data import pixels
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images
from vitkd_cli.data.pixels import FastDecoding, Pixels, decoded_fast
from vitkd_cli.data.transforms import train_view
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Augmentation, Recipe


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(24):
        options = {"quality": 85 + index % 10, "progressive": index % 5 == 0, "subsampling": index % 3}
        saved(folder / str(index % 2), f"{index}.jpg", photo(index), **options)
    train = open_data(data=str(folder), val_fraction=0).train
    assert isinstance(train, Images)
    return train


def test_a_jpeg_is_decoded_to_pillows_pixels(photos: Images) -> None:
    fast = decoded_fast(photos)
    for index in range(len(photos)):
        (image, label), (pixels, same) = photos[index], fast[index]
        assert isinstance(pixels, Pixels) and label == same and pixels.size == image.size[::-1]
        assert np.array_equal(np.asarray(pixels.image()), np.asarray(image))


@pytest.mark.parametrize("options", [{}, {"train_interpolation": "random"}, {"scale": (1, 1), "hflip": 0}])
def test_views_are_timms_within_one_grey_level(photos: Images, options: dict[str, object]) -> None:
    # Erasing draws after crop and flip: equal rectangles and noise show that all drew alike.
    aug = Augmentation(aa="none", reprob=0.5, **options)  # type: ignore[arg-type]
    ours, timms = views(decoded_fast(photos), aug).int(), views(photos, aug).int()
    apart = (ours - timms).abs()
    assert (apart <= 1).float().mean() >= 0.999 and apart.max() <= 8
    assert (apart > 0).any()  # or it was Pillow's


def test_operations_are_timms_on_the_fast_crop(photos: Images) -> None:
    aug = Augmentation(aa="rand-m9-n3-p1-mstd0.5-inc1")
    ours, timms = views(decoded_fast(photos), aug).int(), views(photos, aug).int()
    apart = (ours - timms).abs()  # a level may become several: posterize, solarize, equalize
    assert (apart <= 1).float().mean() >= 0.9 and apart.float().mean() < 0.5
    still = Augmentation(no_aug=True)
    assert torch.equal(views(decoded_fast(photos), still), views(photos, still))


def test_grey_models_and_other_sizes(photos: Images) -> None:
    image, pixels = photos[0][0], decoded_fast(photos)[0][0]
    view = train_view((32, 48), Augmentation(aa="none", reprob=0, hflip=0, scale=(1, 1)), [0.5], [0.5])
    torch.manual_seed(0)
    assert view(pixels).shape == (1, 32, 48) and (view(pixels).int() - view(image).int()).abs().max() <= 2


def test_what_is_no_plain_jpeg_stays_pillows(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    others = {
        "png": saved(tmp_path, "a.png", photo(0)),
        "cmyk": saved(tmp_path, "b.jpg", photo(1, "CMYK")),
        "turned": saved(tmp_path, "c.jpg", photo(2), exif=turned),
        "webp": saved(tmp_path, "d.webp", photo(3)),
    }
    for name, file in others.items():
        found = FastDecoding()(file)
        assert isinstance(found, Image.Image), name
        assert np.array_equal(np.asarray(found), np.asarray(Decoding()(file))), name
    grey = saved(tmp_path, "e.jpg", photo(4, "L"))
    with_exif = saved(tmp_path, "f.jpg", photo(5), exif=upright)
    as_it_lies = FastDecoding(exif=False)
    for decoding, file in (
        (FastDecoding(), grey),
        (FastDecoding(), with_exif),
        (as_it_lies, others["turned"]),
    ):
        found = decoding(file)
        assert isinstance(found, Pixels)
        plain = Decoding(exif=decoding.exif)(file)
        assert np.array_equal(np.asarray(found.image()), np.asarray(plain))
    with open(grey, "rb") as opened:
        assert isinstance(FastDecoding()(io.BytesIO(opened.read())), Pixels)


def test_a_damaged_jpeg_is_pillows_to_judge(tmp_path: Path) -> None:
    file = Path(saved(tmp_path / "a", "0.jpg", photo(0)))
    whole = file.read_bytes()
    saved(tmp_path / "b", "0.jpg", photo(1))
    for content in (
        whole[: len(whole) // 2],
        whole[:-2],
        b"",
        whole[:20],
        whole[:400] + bytes(64) + whole[464:],
    ):
        file.write_bytes(content)
        train = open_data(data=str(tmp_path), val_fraction=0).train
        assert isinstance(train, Images)
        told: list[str] = []
        for images in (train, decoded_fast(train)):
            try:
                image = images[0][0]
                pixels = np.asarray(image.image() if isinstance(image, Pixels) else image)
                told.append(pixels.tobytes().hex())
            except UserError as error:
                told.append(error.message)
        assert told[0] == told[1]
    with pytest.raises(UserError, match="too large"):
        file.write_bytes(whole)
        train.decode_by(Decoding(max_pixels=100))
        decoded_fast(train)[0]


def test_simplejpeg_decodes_the_same(photos: Images) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    for index in range(len(photos)):
        content = Path(photos.path(index)).read_bytes()
        assert np.array_equal(simplejpeg.decode_jpeg(content), np.asarray(photos[index][0]))


def test_without_a_decoder_of_its_own_it_is_pillow_that_decodes(
    photos: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [values for values, _ in (decoded_fast(photos)[index][0] for index in range(4))]
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    monkeypatch.setattr(pixels, "_decoder", pixels._decoder.__wrapped__)
    found = [values for values, _ in (decoded_fast(photos)[index][0] for index in range(4))]
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_a_gpu_decodes_fast_by_itself() -> None:
    auto = Recipe()
    assert auto.decodes_fast("cuda") and not auto.decodes_fast("cpu")
    assert auto.but(input_backend="torchvision").decodes_fast("cpu")
    assert not auto.but(input_backend="pillow").decodes_fast("cuda")
    for begun, other in (("cuda", "cpu"), ("cpu", "cuda")):
        assert auto.decoded_on(begun).decodes_fast(other) == auto.decodes_fast(begun)
