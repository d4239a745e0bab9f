"""Named datasets and folders -> batches of uint8 images and labels, with randomness that is keyed."""

from vitkd_cli.data.census import in_training, summary
from vitkd_cli.data.datasets import (
    ImageData,
    has_split,
    named_split,
    open_data,
    open_split,
)
from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images, IterableImages, UnreadableImage, loose_images, spread
from vitkd_cli.data.keyed import (
    Deal,
    Keyed,
    Loader,
    TrainBatch,
    ValBatch,
    abandon_workers,
    keyed_generators,
    lost_worker,
    stream_loader,
    train_loader,
    updates_per_epoch,
    val_loader,
)
from vitkd_cli.data.mixing import Mixing, mixing
from vitkd_cli.data.transforms import TrainView, ValView, Views, train_view, val_view, view_of

__all__ = [
    "Deal",
    "Decoding",
    "ImageData",
    "Images",
    "IterableImages",
    "Keyed",
    "Loader",
    "Mixing",
    "TrainBatch",
    "TrainView",
    "UnreadableImage",
    "ValBatch",
    "ValView",
    "Views",
    "abandon_workers",
    "has_split",
    "in_training",
    "keyed_generators",
    "loose_images",
    "lost_worker",
    "mixing",
    "named_split",
    "open_data",
    "open_split",
    "spread",
    "stream_loader",
    "summary",
    "train_loader",
    "train_view",
    "updates_per_epoch",
    "val_loader",
    "val_view",
    "view_of",
]
