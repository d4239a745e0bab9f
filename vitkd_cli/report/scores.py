"""What an evaluation has shown: a table, files, pictures, and the differences in words."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from vitkd_cli.evaluation import Evaluation, Evaluations
from vitkd_cli.evaluation.statistics import Comparison, by_class, confusions, share_interval
from vitkd_cli.evaluation.writing import as_csv
from vitkd_cli.files import write_text
from vitkd_cli.plots import figure_in
from vitkd_cli.terminal import Fitted
from vitkd_cli.text import markdown, plain

CAUTION = (
    "this is about these checkpoints on these images; that one method is better than another needs several "
    "seeds of each (vitkd distill --baseline --seeds 5)"
)
_MOST = 10  # classes and confusions that are listed


def record(one: Evaluation, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """All that is known of one model, under the names that ``--json`` prints.

    Args:
        names: of the classes; with them the worst classes and the confusions are told.
    """
    metrics, judge = one.metrics, one.judge
    low, high = share_interval(int(metrics.right.sum()), metrics.count)
    facts: dict[str, Any] = {
        "model": one.model,
        "data": one.data,
        "count": metrics.count,
        "top1": metrics.top1,
        "top1_low": low,
        "top1_high": high,
        "top5": metrics.top5,
        "loss": metrics.loss,
        "classes": one.classes[0],
        "model_classes": one.classes[1],
        "parameters": one.parameters,
        "multiply_adds": one.built.multiply_adds,
        "preprocessing": one.preprocessing,
    }
    if judge is not None:
        facts |= {"judged_by": judge.name, "bank": judge.bank}
        facts |= {} if judge.c is None else {"c": judge.c}
        for shots, draws in judge.few_shot.items():
            facts[f"top1_of_{shots}"], facts[f"top1_of_{shots}_half"] = judge.shots(shots)
            facts.setdefault("few_shot", {})[shots] = list(draws)
    if metrics.brier is not None:  # nearest neighbours have no probabilities
        sure = metrics.calibration
        facts |= {"brier": float(metrics.brier.mean()), "ece": sure.ece, "ece_by_chance": sure.by_chance}
    if one.teacher is not None and metrics.divergence is not None:
        facts["agreement"] = metrics.agreement(one.teacher)
        facts["divergence"] = float(metrics.divergence.mean())
    if one.real is not None:
        facts["real_top1"], facts["real_top5"] = one.real
    if (cost := one.cost) is not None:
        facts |= {
            "images_per_second": cost.images_per_second,
            "best_batch": cost.batch,
            "latency_p50_ms": cost.latency[0],
            "latency_p95_ms": cost.latency[1],
            "batch_latency_p50_ms": cost.latency_at_batch[0],
            "batch_latency_p95_ms": cost.latency_at_batch[1],
            "peak_memory": cost.peak_memory,
        }

    def name(c: int) -> str:
        return names[c] if c < len(names) else f"class {c}"  # of the model, and not of the data

    if names:
        facts["worst_classes"] = [
            {"class": name(c), "images": images, "accuracy": 100 * right / images}
            for c, images, right in by_class(metrics.labels.numpy(), metrics.predictions.numpy())[:_MOST]
        ]
        facts["confusions"] = [
            {"class": name(c), "taken_for": name(taken), "images": images}
            for c, taken, images in confusions(metrics.labels.numpy(), metrics.predictions.numpy())[:_MOST]
        ]
    return facts


# Columns of every table: title, keys that it needs, how it is written.
_COLUMNS: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("model", ("model",), str),
    ("judged by", ("judged_by",), str),
    ("M", ("parameters",), lambda n: f"{n / 1e6:.2f}"),
    ("GMACs", ("multiply_adds",), lambda n: f"{n / 1e9:.2f}" if n >= 1e8 else f"{n / 1e9:.2g}"),
    ("top-1 (95 %)", ("top1", "top1_low", "top1_high"), lambda x, a, b: f"{x:.3f} ({a:.1f}–{b:.1f})"),
    ("top-5", ("top5",), lambda x: f"{x:.3f}"),
    ("ReaL", ("real_top1",), lambda x: f"{x:.3f}"),
    ("C", ("c",), lambda c: f"{c:.2g}"),
    ("loss", ("loss",), lambda x: f"{x:.4f}"),
    ("Brier", ("brier",), lambda x: f"{x:.4f}"),
    ("ECE (by chance)", ("ece", "ece_by_chance"), lambda x, most: f"{x:.2f} (up to {most:.2f})"),
    ("agrees", ("agreement",), lambda x: f"{x:.2f} %"),
    ("KL", ("divergence",), lambda x: f"{x:.4f}"),
    ("images/s", ("images_per_second", "best_batch"), lambda x, b: f"{x:,.0f} at {b}"),
    ("ms, p50 / p95", ("latency_p50_ms", "latency_p95_ms"), lambda a, b: f"{a:.1f} / {b:.1f}"),
    (
        "at the best batch",
        ("batch_latency_p50_ms", "batch_latency_p95_ms"),
        lambda a, b: f"{a:.0f} / {b:.0f}",
    ),
    ("MiB", ("peak_memory",), lambda n: f"{n / 2**20:,.0f}"),
)


def _cells(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows, without the columns that no model has anything for."""
    counts = dict.fromkeys(shots for r in records for shots in r.get("few_shot", {}))
    few = [
        (
            f"top-1, {shots} a class",
            (f"top1_of_{shots}", f"top1_of_{shots}_half"),
            lambda x, half: f"{x:.2f} ± {half:.2f}",
        )
        for shots in counts
    ]
    shown = [c for c in (*_COLUMNS, *few) if any(r.get(key) is not None for r in records for key in c[1])]
    rows = [
        [
            "–" if any(r.get(k) is None for k in keys) else write(*(r[k] for k in keys))
            for _, keys, write in shown
        ]
        for r in records
    ]
    return [title for title, _, _ in shown], rows


def table(records: list[dict[str, Any]]) -> Fitted:
    """One row per model; where these are longer than a terminal's line, one column per model."""
    return Fitted(*_cells(records))


def markdown_text(records: list[dict[str, Any]], pairs: list[Comparison], count: int) -> str:
    """The table and the sentences in Markdown."""
    titles, rows = _cells(records)
    lines = [titles, ["---"] * len(titles), *([markdown(cell) for cell in row] for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = [f"- {markdown(pair.sentence(count))}" for pair in pairs]
    return "\n".join([text, "", f"{count:,} images", *(["", *said, "", CAUTION] if said else [])]) + "\n"


def csv_text(records: list[dict[str, Any]]) -> str:
    """One line per model, with every figure in full."""
    flat = [
        {key: value for key, value in r.items() if not isinstance(value, (dict, list))}
        | {key: r["preprocessing"][key] for key in ("input_size", "crop_pct", "interpolation", "mean", "std")}
        for r in records
    ]
    return as_csv(flat)


def json_text(records: list[dict[str, Any]], pairs: list[Comparison]) -> str:
    """One object; of several models their list and the comparisons."""
    if len(records) == 1:
        return json.dumps(records[0])
    return json.dumps({"models": records, "comparisons": [vars(pair) for pair in pairs]})


def reliability(one: Evaluation) -> Table:
    """Confidence and accuracy of each bin, with bars."""
    found = one.metrics.calibration
    shown = Table("confidence", "accuracy", "", "images", box=None, title=f"calibration of {one.called}")
    for sure, right, images in zip(found.confidence, found.accuracy, found.counts, strict=True):
        filled, mark = round(30 * right), min(29, round(30 * sure))
        bar = ["█" if i < filled else "·" for i in range(30)]
        bar[mark] = "│"  # where the bar would end, were the model as often right as it is sure
        shown.add_row(f"{100 * sure:.1f}", f"{100 * right:.1f}", "".join(bar), f"{images:,}")
    return shown


def reliability_picture(found: Evaluations, path: Path) -> Path:
    """Write a PNG: accuracy over confidence, one line per model, and where they would be equal."""
    with figure_in(path, (5, 4.6)) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color="#888888", linestyle="--", linewidth=1)
        for one in found.models:
            if one.metrics.confidence is not None:
                bins = one.metrics.calibration
                chance = f"(by chance up to {bins.by_chance:.2f})"
                label = f"{plain(one.called)}: ECE {bins.ece:.2f} {chance}"
                x, y = 100 * bins.confidence, 100 * bins.accuracy
                axes.plot(x, y, marker="o", markersize=4, label=label)
        axes.set(
            xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100), aspect="equal",
            title="reliability, in bins of equal mass",
        )  # fmt: skip
        axes.legend(frameon=False, fontsize=7, loc="upper left")
        axes.grid(alpha=0.25)
    return path


def write_folder(found: Evaluations, records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """``results.json``, ``.csv`` and ``.md``, ``classes.csv`` and ``reliability.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.json": json_text(records, found.comparisons) + "\n",
        "results.csv": csv_text(records),
        "results.md": markdown_text(records, found.comparisons, found.models[0].metrics.count),
        "classes.csv": _classes_csv(found),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    written = [folder / name for name in texts]
    if any(one.metrics.confidence is not None for one in found.models):
        written.append(reliability_picture(found, folder / "reliability.png"))
    return written


def _classes_csv(found: Evaluations) -> str:
    lines = []
    for one in found.models:
        rows = by_class(one.metrics.labels.numpy(), one.metrics.predictions.numpy())
        for c, images, right in sorted(rows):
            name = found.names[c] if c < len(found.names) else ""
            counted = {"images": images, "right": right, "accuracy": f"{100 * right / images:.2f}"}
            lines.append({"model": one.called, "class": c, "name": name, **counted})
    return as_csv(lines)
