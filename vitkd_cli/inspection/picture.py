"""Where the class token looks, teacher above student, over the images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vitkd_cli.errors import UserError
from vitkd_cli.vit.build import Built, build
from vitkd_cli.vit.names import resolve
from vitkd_cli.vit.spec import as_seen_by
from vitkd_cli.vit.taps import Tap, TappedViT


def attention_picture(
    models: Sequence[tuple[str, Path]], *, data: str, output: Path, images: int = 6
) -> Path:
    """Write a PNG: a column an image, under it each model's last-block attention.

    Args:
        models: (title, student folder) of models with a class token.
        data: where the images come from; the first of each of ``images`` classes is taken.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from vitkd_cli.data import open_split, val_view

    split = open_split(data, "validation")
    labels = split.labels()
    chosen = [labels.index(label) for label in sorted(set(labels))[:images]]
    loaded = [(title, build(resolve(f"local-dir:{folder}"), pretrained=True)) for title, folder in models]
    figure, axes = plt.subplots(
        1 + len(loaded), len(chosen), figsize=(1.5 * len(chosen), 1.65 * (1 + len(loaded))), dpi=150,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for row, (title, built) in enumerate(loaded, start=1):
        size = built.spec.input_size
        view = val_view(size, crop_pct=1.0, crop_mode="center", interpolation="bicubic")
        batch = torch.stack([view(split[index][0]) for index in chosen]).float() / 255
        for column, (picture, map_) in enumerate(zip(batch, class_attention(built, batch), strict=True)):
            axes[0, column].imshow(picture.permute(1, 2, 0))
            axes[row, column].imshow(picture.mean(0), cmap="gray", extent=(0, 1, 0, 1))
            axes[row, column].imshow(map_, cmap="magma", alpha=0.6, extent=(0, 1, 0, 1))
        axes[row, 0].set_ylabel(title)
    axes[0, 0].set_ylabel("image")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle("attention of the class token in the last block, mean over heads", fontsize=9)
    figure.savefig(output)
    plt.close(figure)
    return output


@torch.inference_mode()
def class_attention(built: Built, images: Tensor) -> Tensor:
    """Attention from the class token to the patches in the last block, mean over heads.

    Args:
        images: ``[B, C, H, W]`` in [0, 1].

    Returns:
        ``[B, rows, columns]``, each image's scaled to sum to 1.

    Raises:
        UserError: the model has no class token.
    """
    spec, last = built.spec, built.spec.depth - 1
    block = spec.blocks[last]
    if not block.num_prefix_tokens:
        raise UserError(f"{spec.name} has no class token whose attention could be drawn")
    tap = Tap("attention", last)
    maps = TappedViT(built.model.eval(), [tap], spec)(as_seen_by(spec, images))[tap]  # [B, heads, N, N]
    looks = maps.mean(1)[:, 0, block.num_prefix_tokens :].unflatten(1, block.grid)
    return looks / looks.sum((1, 2), keepdim=True)
