"""Mixing: timm's numbers, exact targets, and the same whether one process mixes or several."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from vitkd_cli.data.keyed import BatchSampler, keyed_generators
from vitkd_cli.data.mixing import Mixing, mixing
from vitkd_cli.recipe import Augmentation

CLASSES = 5


def batch(size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, 16, 16, generator=generator, dtype=dtype)
    return images, torch.randint(CLASSES, (size,), generator=generator)


MIXUP = Mixing(Augmentation(mixup=0.8, cutmix=0), CLASSES)
CUTMIX = Mixing(Augmentation(mixup=0, cutmix=1), CLASSES)


@pytest.mark.parametrize("mix", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
@pytest.mark.parametrize(("batch_size", "world", "accum"), [(4, 2, 1), (2, 2, 2), (4, 1, 2)])
def test_local_mixing_is_global_mixing(mix: Mixing, batch_size: int, world: int, accum: int) -> None:
    images, labels = batch(8)
    key = (42, 3)
    expected, expected_targets = mix(images, labels, key=key)
    assert not torch.equal(expected, images)
    got, got_targets = torch.full_like(expected, torch.nan), torch.full_like(expected_targets, torch.nan)
    for rank in range(world):
        sampler = BatchSampler(8, batch_size, world=world, accum=accum, rank=rank, seed=0)
        for keys in sampler.epoch(0):
            rows = torch.tensor([position for _, position, _ in keys])
            got[rows], got_targets[rows] = mix(images[rows], labels[rows], key=key)
    assert torch.equal(got, expected) and torch.equal(got_targets, expected_targets)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_it_is_timms_mixup(mixup: float, cutmix: float) -> None:
    images, labels = batch(6, torch.float32)
    ours = Mixing(Augmentation(mixup=mixup, cutmix=cutmix, mixup_prob=0.9), CLASSES)
    timms = Mixup(mixup, cutmix, prob=0.9, switch_prob=0.5, label_smoothing=0.0, num_classes=CLASSES)
    for update in range(20):
        mixed, targets = ours(images, labels, key=(1, update))
        with keyed_generators(1, update):
            theirs, their_targets = timms(images.clone(), labels)
        assert torch.equal(mixed, theirs)
        torch.testing.assert_close(targets, their_targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_are_exact_in_the_images_type(dtype: torch.dtype) -> None:
    images, labels = batch(6, dtype)
    for update in range(5):
        mixed, targets = MIXUP(images, labels, key=(0, update))
        with keyed_generators(0, update):
            np.random.rand()  # mixed at all?
            lam = float(np.random.beta(0.8, 0.8))
        onehot = torch.eye(CLASSES, dtype=dtype)[labels]
        assert mixed.dtype == targets.dtype == dtype
        assert torch.equal(targets, lam * onehot + (1 - lam) * onehot.flip(0))
        torch.testing.assert_close(mixed, lam * images + (1 - lam) * images.flip(0))
        torch.testing.assert_close(targets.sum(1), torch.ones(6, dtype=dtype))


def test_key_decides_and_nothing_else_changes() -> None:
    images, labels = batch(4)
    original = images.clone()
    np.random.seed(0)
    state = np.random.get_state()[1].tolist()  # type: ignore[index]
    first = MIXUP(images, labels, key=(0, 1))[1]
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]
    assert torch.equal(images, original)
    assert torch.equal(first, MIXUP(images, labels, key=(0, 1))[1])
    assert not torch.equal(first, MIXUP(images, labels, key=(0, 2))[1])
    assert not torch.equal(first, MIXUP(images, labels, key=(1, 1))[1])


def test_unmixed_updates_keep_hard_targets() -> None:
    images, labels = batch(4)
    rare = Mixing(Augmentation(mixup=0.8, cutmix=1, mixup_prob=0.5), CLASSES)
    results = [rare(images, labels, key=(0, update)) for update in range(20)]
    untouched = [targets for mixed, targets in results if torch.equal(mixed, images)]
    assert 3 < len(untouched) < 17
    assert all(torch.equal(targets, torch.eye(CLASSES, dtype=torch.float64)[labels]) for targets in untouched)


def test_nothing_to_mix() -> None:
    assert mixing(Augmentation(mixup=0, cutmix=0), CLASSES) is None
    assert mixing(Augmentation(mixup=0.8, cutmix=1, mixup_prob=0), CLASSES) is None
    assert isinstance(mixing(Augmentation(mixup=0.8, cutmix=0), CLASSES), Mixing)
