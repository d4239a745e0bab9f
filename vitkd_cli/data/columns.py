"""Which columns of a Hugging Face dataset hold image and label: timm's names for them, else by their type."""

from typing import Any

from vitkd_cli.data.walk import in_order
from vitkd_cli.errors import UserError
from vitkd_cli.text import listed

_TEXT = ("string", "large_string")


def with_columns(data: str, split: str, options: dict[str, Any]) -> dict[str, Any]:
    """``create_dataset``'s arguments with the columns that were found, and the classes of a label in words.

    Args:
        data: ``hfds/NAME`` or ``hfids/NAME``.
    """
    import datasets

    name, cache = data.partition("/")[2], options["root"]
    features: Any = datasets.load_dataset_builder(name, cache_dir=cache).info.features
    stream = data.lower().startswith("hfids/")
    table: Any = None  # of the largest split: a few rows do not show whether words recur
    if not stream and not _of(features or {}, datasets.ClassLabel):
        table = max(datasets.load_dataset(name, cache_dir=cache).values(), key=len)
        features = table.features
    if features is None:  # a stream that says nothing of itself
        return options
    image = options["input_key"] or _only(data, features, _of(features, datasets.Image), "image", "input")
    target = options["target_key"] or _target(data, features, table, _of(features, datasets.ClassLabel))
    for flag, key in (("--input-key", image), ("--target-key", target)):
        if key not in features and not {",", "/"} & set(key):  # timm's: several, or one inside another
            raise UserError(f"--data {data} has no column {key!r}", f"{flag} NAME, of {_shown(features)}")
    found = {**options, "input_key": image, "target_key": target}
    if getattr(features.get(target), "dtype", "") in _TEXT and not options["class_map"]:
        if stream:
            raise UserError(
                f"--data {data} has text in {target!r}, and a stream does not say which classes there are",
                "--class-map FILE",
            )
        words = datasets.load_dataset(name, split=split, cache_dir=cache).unique(target)
        classes = in_order(word for word in words if word is not None)
        found["class_map"] = {None: -1, **{word: index for index, word in enumerate(classes)}}
    return found


def _of(features: Any, kind: type) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, kind)]


def _target(data: str, features: Any, table: Any, classes: list[str]) -> str:
    """The column of the label: by name, or the only one with classes or with words that recur."""
    if not classes and "label" not in features and table is not None:
        texts = [name for name, feature in features.items() if getattr(feature, "dtype", "") in _TEXT]
        classes = [name for name in texts if len(table.unique(name)) <= len(table) / 2]
    return _only(data, features, classes, "label", "target")


def _only(data: str, features: Any, found: list[str], usual: str, what: str) -> str:
    if usual in features:
        return usual
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"--data {data} does not say which column holds the {usual}: "
        f"{listed(found) if found else _shown(features)}",
        f"--{what}-key NAME",
    )


def _shown(features: Any) -> str:
    """``img (Image), fine_label (100 classes)``."""
    kinds = {
        name: f"{len(feature.names)} classes"
        if hasattr(feature, "names")
        else feature.dtype
        if type(feature).__name__ == "Value"
        else type(feature).__name__
        for name, feature in features.items()
    }
    return listed([f"{name} ({kind})" for name, kind in kinds.items()])
