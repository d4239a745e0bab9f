"""Views: uint8, equal to timm's own, and erased as timm erases."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform

from vitkd_cli.data.keyed import keyed_generators
from vitkd_cli.data.transforms import train_view, view_of
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Augmentation

PAPER = "rand-m9-mstd0.5-inc1"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_any_mode_becomes_uint8(mode: str, in_chans: int) -> None:
    image = picture(40, 50, mode)
    for view in (
        train_view((32, 24), Augmentation(aa=PAPER), MEAN[:in_chans], STD[:in_chans]),
        train_view((32, 24), Augmentation(no_aug=True), MEAN[:in_chans], STD[:in_chans]),
        view_of({"input_size": (in_chans, 32, 24)}),
    ):
        with keyed_generators(0):
            pixels = view(image)
        assert pixels.dtype == torch.uint8 and pixels.shape == (in_chans, 32, 24)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_view_is_timms(crop_mode: str, size: tuple[int, int]) -> None:
    options = {"crop_pct": 0.875, "crop_mode": crop_mode, "interpolation": "bicubic"}
    for image in (picture(60, 44), picture(8, 8, "L")):
        pixels = view_of({"input_size": (3, *size), **options})(image)
        raw = create_transform(size, **options, mean=(0, 0, 0), std=(1, 1, 1))(image.convert("RGB"))
        if crop_mode != "border":  # timm pads in the colour of the mean, which is 0 for raw
            assert torch.equal(pixels, (raw * 255).round().to(torch.uint8))
        native = create_transform(size, **options, mean=MEAN, std=STD)(image.convert("RGB"))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        torch.testing.assert_close((pixels / 255 - mean) / std, native)


def test_grey_view_is_timms_l_mode() -> None:
    image = picture(50, 40)
    native = create_transform((32, 32), crop_pct=0.9, interpolation="bilinear", normalize=False)(
        image.convert("L")
    )
    config = {"input_size": (1, 32, 32), "crop_pct": 0.9, "interpolation": "bilinear"}
    assert torch.equal(view_of(config)(image), native)


def test_without_erasing_train_view_is_timms() -> None:
    image = picture(50, 40)
    view = train_view((32, 32), Augmentation(aa="none", color_jitter=0.3, reprob=0), MEAN)
    native = create_transform(
        (32, 32), is_training=True, color_jitter=0.3, interpolation="bicubic", normalize=False, mean=MEAN
    )
    for key in range(5):
        with keyed_generators(key):
            ours = view(image)
        with keyed_generators(key):
            assert torch.equal(ours, native(image))


@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_erasing_is_timms_noise_in_grey_values(remode: str, in_chans: int) -> None:
    image = picture(48, 48)
    mean, std = (torch.tensor(values[:in_chans]).view(-1, 1, 1) for values in (MEAN, STD))
    view, plain = (
        train_view(
            (32, 32),
            Augmentation(aa="none", recount=2, remode=remode, reprob=reprob),  # type: ignore[arg-type]
            MEAN[:in_chans],
            STD[:in_chans],
        )
        for reprob in (1, 0)
    )
    with keyed_generators(3):
        erased = view(image)
    with keyed_generators(3):
        before = plain(image)
        normalised = (before / 255 - mean) / std
        after = RandomErasing(1, mode=remode, max_count=2, device="cpu")(normalised.clone())
    touched = after != normalised
    assert touched.any() and not touched.all()
    assert torch.equal(erased[~touched], before[~touched])
    expected = ((after * std + mean) * 255).round().clamp(0, 255)
    assert torch.equal(erased[touched], expected[touched].to(torch.uint8))


def test_erasing_happens_as_often_as_asked() -> None:
    view = train_view((32, 32), Augmentation(aa="none", hflip=0, scale=(1, 1), ratio=(1, 1)))
    image = Image.new("RGB", (32, 32))
    with keyed_generators(0):
        erased = sum(bool(view(image).any()) for _ in range(400))
    assert 70 < erased < 130


def test_papers_randaugment_survives_its_strongest_posterize() -> None:
    image, view = picture(32, 32), train_view((32, 32), Augmentation(aa=PAPER))
    with keyed_generators(0):
        assert {view(image).dtype for _ in range(200)} == {torch.uint8}
    # magnitude 10 asks for 0 bits every time it draws Posterize
    strongest = train_view((32, 32), Augmentation(aa="rand-m10-n8-p1-inc1", reprob=0))
    with keyed_generators(0):
        for _ in range(20):
            strongest(image)


@pytest.mark.parametrize("aa", ["v0", "originalr-mstd0.5", "augmix-m5", "rand-m9-t3aw", "none", ""])
def test_other_policies(aa: str) -> None:
    view = train_view((32, 32), Augmentation(aa=aa))
    with keyed_generators(0):
        assert view(picture(32, 32)).shape == (3, 32, 32)


def test_digits_grow_and_images_shrink() -> None:
    for height, width, size in ((8, 8, (32, 32)), (8, 8, (8, 8)), (200, 90, (16, 16))):
        with keyed_generators(0):
            assert train_view(size, Augmentation(aa=PAPER))(picture(height, width)).shape == (3, *size)
        assert view_of({"input_size": (3, *size)})(picture(height, width)).shape == (3, *size)


def test_no_aug_is_still() -> None:
    view, image = train_view((32, 32), Augmentation(no_aug=True, reprob=1)), picture(40, 40)
    first = view(image)
    random.seed(5)
    assert torch.equal(first, view(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aa": "rnad-m9"}, "aa: timm cannot read 'rnad-m9'"),
        ({"aa": "rand-x3"}, "aa: timm cannot read"),
        ({"train_interpolation": "cubic"}, "train_interpolation must be one of .*, not 'cubic'"),
        ({"remode": "noise"}, "remode must be one of .*, not 'noise'"),
    ],
)
def test_unknown_names(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_view((32, 32), Augmentation(**options))  # type: ignore[arg-type]


def test_channels_are_those_of_grey_or_colour() -> None:
    for act in (lambda: train_view((32, 32), mean=(0.5, 0.5)), lambda: view_of({"input_size": (2, 32, 32)})):
        with pytest.raises(UserError, match="in_chans is 2"):
            act()


def test_unknown_val_names() -> None:
    with pytest.raises(UserError, match="crop_mode: 'middle' is unknown"):
        view_of({"input_size": (3, 32, 32), "crop_mode": "middle"})
    with pytest.raises(UserError, match="interpolation: 'random' is unknown"):
        view_of({"input_size": (3, 32, 32), "interpolation": "random"})


@pytest.mark.parametrize("aa", ["rand-n100000-m9", "augmix-w3-d100000", "rand-m9-n999"])
def test_augmentation_that_looks_like_a_hang_is_refused(aa):
    with pytest.raises(UserError, match="more than 100 operations"):
        train_view(32, Augmentation(aa=aa))
