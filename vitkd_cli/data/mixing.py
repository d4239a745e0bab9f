"""Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899), by timm.

x' = λ x + (1 − λ) flip(x)      y' = λ y + (1 − λ) flip(y)

In CutMix λ is the share of the image that is kept. There is one λ for each update. flip reverses the batch;
``keyed.BatchSampler`` takes mirrored pairs, so mixing every local batch equals mixing the global one.
"""

from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn.functional import one_hot

from vitkd_cli.data.keyed import keyed_generators
from vitkd_cli.recipe import Augmentation


class Mixing:
    """timm's batch-mode mixup and cutmix, drawn from a key instead of a running generator.

    Args:
        num_classes: K, the width of the targets.
    """

    def __init__(self, aug: Augmentation, num_classes: int) -> None:
        self.num_classes = num_classes
        # Smoothing belongs to the term `labels`; here it would reach every term.
        self.mixup = Mixup(
            aug.mixup,
            aug.cutmix,
            prob=aug.mixup_prob,
            switch_prob=aug.mixup_switch_prob,
            label_smoothing=0.0,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, labels: Tensor | None, *, key: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Mix a batch.

        Args:
            images: ``[B, C, H, W]``, floating, in [0, 1]; left as they are.
            labels: ``[B]`` int64; None mixes the images only.
            key: (seed, update): every process and every accumulation step of an update draws the same.

        Returns:
            Images ``[B, C, H, W]`` and targets ``[B, K]`` that sum to 1, or None; in the images' dtype.
        """
        mixed = images.clone()  # timm mixes in place
        with keyed_generators(*key):
            # not Mixup.__call__, whose targets are float32 whatever the images are
            lam = self.mixup._mix_batch(mixed)
        if labels is None:
            return mixed, None
        target = one_hot(labels, self.num_classes).to(images.dtype)  # [B, K]
        return mixed, lam * target + (1 - lam) * target.flip(0)


def mixing(aug: Augmentation, num_classes: int) -> Mixing | None:
    """A :class:`Mixing`, or None where there is nothing to mix."""
    return Mixing(aug, num_classes) if aug.mixup_prob and (aug.mixup or aug.cutmix) else None
