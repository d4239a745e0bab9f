"""docs/study.md and its pictures, of what benchmarks/study.jsonl holds."""

import json
from pathlib import Path

import numpy as np

from study_parts.plan import ARMS, CURVE, DATA, EQUAL_TIME, SEEDS, TASKS
from study_parts.results import COSTS, Cell, Key, known, scores
from study_parts.tables import GUIDELINES, TABLES, Row
from vitkd_cli.evaluation.contrasts import BETTER, WORSE, Contrast, contrast, corrected
from vitkd_cli.evaluation.statistics import spread

DOCS = Path(__file__).resolve().parents[2] / "docs"
Cells = dict[Key, Cell]


def beside(cells: Cells, data: str, arm: str, other: str, longer: int = 1) -> Contrast | None:
    """The difference arm − other, which learned ``longer`` times as long; None where no seed has both."""
    updates = DATA[data].updates
    return contrast(
        arm, other, scores(cells, data, updates, arm), scores(cells, data, longer * updates, other)
    )


def compared(
    cells: Cells, data: str, pairs: list[tuple[str, str]], longer: int = 1
) -> dict[tuple[str, str], Contrast]:
    """Pairs of arms that some seed has both of, with p corrected for all of them."""
    found = (beside(cells, data, *pair, longer) for pair in pairs)
    return {(one.first, one.second): one for one in corrected([one for one in found if one])}


def table(cells: Cells, data: str, rows: list[Row], longer: int = 1) -> list[str]:
    """A table of the paper on this data, beside the student alone that learned ``longer`` times as long."""
    updates = DATA[data].updates
    trained = {key[2] for key in cells if key[:2] == (data, updates)}
    missing = "; ".join(row.label for row in rows if row.arm in DATA[data].arms and row.arm not in trained)
    rows = [row for row in rows if row.arm in trained]
    found = compared(cells, data, [(row.arm, "alone") for row in rows], longer)
    rows = [row for row in rows if (row.arm, "alone") in found]
    if not rows:
        return []
    alone = "alone" if longer == 1 else f"alone for {longer * updates:,} updates"
    lines = [
        f"| | top-1 | − {alone}, 95 % interval | p (Holm) | verdict | seeds | gradient | the paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one = found[row.arm, "alone"]
        own = [cell for key, cell in cells.items() if key[:3] == (data, updates, row.arm)]
        (mean,), (reach,) = spread([[cell.top1 for cell in own]])
        top1 = f"{mean:.2f} ± {reach:.2f}" if reach else f"{mean:.2f}"
        interval = f" ({one.found.low:+.2f} to {one.found.high:+.2f})" if one.claims else ""
        p = f"{one.p:.3f}" if one.claims else "–"
        shares = [1 - cell.shares["labels"] for cell in own if "labels" in cell.shares]
        share = f"{100 * float(np.mean(shares)):.0f} %" if shares else "–"
        lines.append(
            f"| {row.label} | {top1} | {one.found.mean:+.2f}{interval} | {p} | "
            f"{one.verdict or '–'} | {one.found.n} | {share} | {row.paper} |"
        )
    return [*lines, *(["", f"Not trained yet: {missing}."] if missing else [])]


def equal_time(cells: Cells, data: str) -> list[str]:
    """The methods beside a student alone with at least as much time: twice the updates."""
    found = table(cells, data, [Row(arm, arm, "") for arm in EQUAL_TIME], longer=2)
    if not found:
        return []
    costs = json.loads(COSTS.read_text())
    low, high = min(costs[arm] for arm in EQUAL_TIME), max(costs.values())
    words = (
        f"An update of these arms costs {low} to {high} times what it costs the student alone (CPU time, "
        "`python benchmarks/study.py --costs`); here it learns twice as long."
    )
    return ["### At equal time", "", words, "", *found, ""]


def judged(cells: Cells, data: str) -> dict[str, tuple[str, str]]:
    """Of each guideline a word, and the differences that it rests on."""
    every = compared(cells, data, [pair for _, pairs in GUIDELINES.values() for pair in pairs])
    judgements = {}
    for name, (_, pairs) in GUIDELINES.items():
        found = [every.get(pair) for pair in pairs]
        said = [
            f"{first} − {second} {one.found.mean:+.2f} ({one.found.low:+.2f} to {one.found.high:+.2f})"
            for (first, second), one in zip(pairs, found, strict=True)
            if one and one.claims
        ]
        verdicts = [one.verdict if one else "" for one in found]
        word = "NOT SHOWN" if said else "NOT TRAINED YET"
        if all(verdict == BETTER for verdict in verdicts):
            word = "HOLDS HERE"
        elif WORSE in verdicts:
            word = "DOES NOT HOLD HERE"
        judgements[name] = word, "; ".join(said)
    return judgements


def guidelines(cells: Cells, data: str) -> list[str]:
    """Each guideline in a sentence."""
    words = judged(cells, data)
    return [
        f"- **{name} ({claim}): {words[name][0]}.** {words[name][1]}".rstrip()
        for name, (claim, _) in GUIDELINES.items()
    ]


def in_short(cells: Cells) -> str:
    """A table of the guidelines on every data set, and of the arm that gains most."""
    sets = {about.about: (data, judged(cells, data)) for data, about in DATA.items()}
    lines = [f"| | {' | '.join(sets)} |", "|---" * (1 + len(sets)) + "|"]
    for name, (claim, _) in GUIDELINES.items():
        lines.append(f"| {name}: {claim} | {' | '.join(words[name][0] for _, words in sets.values())} |")
    best = []
    for data, _ in sets.values():
        found = [one for arm in (*ARMS, *TASKS) if (one := beside(cells, data, arm, "alone")) and one.claims]
        one = max(found, key=lambda one: one.found.mean, default=None)
        best.append(f"{one.first} {one.found.mean:+.2f}" if one else "–")
    return "\n".join([*lines, f"| the most above the student alone | {' | '.join(best)} |"])


def curve(cells: Cells, data: str, path: Path) -> bool:
    """The picture of top-1 by length of training; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from vitkd_cli.plots import COLOURS

    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    drawn = False
    for colour, arm in zip(COLOURS, CURVE, strict=False):
        groups: dict[int, list[float]] = {}
        for (name, updates, own, _), cell in sorted(cells.items()):
            if (name, own) == (data, arm):
                groups.setdefault(updates, []).append(cell.top1)
        if len(groups) > 1:
            means, reach = spread(list(groups.values()))
            axes.errorbar(list(groups), means, reach, color=colour, marker="o", capsize=3, label=arm)
            drawn = True
    about = DATA[data]
    axes.set(
        xscale="log", xlabel=f"updates, {about.batch} images each", ylabel="top-1 (%)", title=about.about
    )
    axes.grid(alpha=0.25)
    if drawn:
        axes.legend(frameon=False)
        figure.savefig(path)
    plt.close(figure)
    return drawn


def forest(cells: Cells, data: str, path: Path) -> bool:
    """The picture of every arm's difference from the student alone, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [arm for arm in [*ARMS, *TASKS] if arm != "alone"]
    pairs = [(arm, beside(cells, data, arm, "alone")) for arm in names]
    shown = sorted(
        ((arm, one.found) for arm, one in pairs if one and one.claims), key=lambda pair: pair[1].mean
    )
    if not shown:
        return False
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.2 * len(shown)), dpi=130, layout="constrained")
    for place, (_, found) in enumerate(shown):
        colour = "#0072b2" if found.low > 0 else "#d55e00" if found.high < 0 else "#777777"
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
        axes.plot(found.mean, place, "o", color=colour, markersize=4)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [arm for arm, _ in shown], fontsize=7)
    axes.set(xlabel="points of top-1 above the student alone, 95 % interval", title=DATA[data].about)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path)
    plt.close(figure)
    return True


def section(cells: Cells, data: str) -> list[str]:
    """What was found on one data set."""
    about, own = DATA[data], [cell for key, cell in cells.items() if key[0] == data]
    if not own:
        on = "" if about.device == "cpu" else f"; it takes a GPU: `python benchmarks/study.py --only {data}`"
        return [f"## {about.about}", "", f"Not trained yet{on}.", ""]
    done = {cell.arm for cell in own if cell.updates == about.updates}
    hours = sum(cell.seconds for cell in own) / 3600
    lines = [
        f"## {about.about}",
        "",
        f"{len(own)} students, {len(done)} of {len(about.arms)} arms; in the tables each learns for "
        f"{about.updates:,} updates of {about.batch} images, to whole epochs. "
        f"{own[0].images} validation images. {hours:.1f} hours of one core, which had other work.",
        "",
    ]
    for draw, name, words in (
        (forest, "forest", "Every arm beside the student alone"),
        (curve, "curve", "Top-1 by length of training"),
    ):
        if draw(cells, data, DOCS / "images" / f"study-{name}-{data}.png"):
            lines += [f"![{words}](images/study-{name}-{data}.png)", ""]
    lines += ["### The guidelines", "", *guidelines(cells, data), ""]
    for title, rows in TABLES.items():
        if found := table(cells, data, rows):
            lines += [f"### {title}", "", *found, ""]
    return lines + equal_time(cells, data)


def write() -> None:
    """Write docs/study.md."""
    cells = known()
    text = (Path(__file__).parent / "study.md").read_text()
    trained = sum(key[3] in SEEDS for key in cells)
    body = "\n".join(line for data in DATA for line in section(cells, data))
    (DOCS / "study.md").write_text(
        text.format(trained=trained, seeds=len(SEEDS), short=in_short(cells)) + body.rstrip() + "\n"
    )
    print(f"docs/study.md: {trained} students")
