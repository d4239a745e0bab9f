"""``vitkd inspect-attention``: what a model looks at, or a teacher and its student."""

import json
import sys
from typing import Any

from vitkd_cli.cli.flags import Shown, command_of, progress, waking
from vitkd_cli.requests import InspectRequest


def _inspect_attention(request: InspectRequest, shown: Shown) -> None:
    """Draw and count what a model looks at, alone or beside its student.

    - `vitkd inspect-attention deit3_small --images cat.jpg dog.jpg`

    - `vitkd inspect-attention runs/x/teacher/student runs/x/student --data ~/flowers`

    - `vitkd inspect-attention deit_tiny --teachers deit3_small cait_s24 --data ~/imagenet`

    Writes PNGs, attention.html, numbers.json and numbers.csv. docs/attention.md says what they mean.
    """
    with waking(shown.quiet):
        from vitkd_cli.inspection.run import inspect_attention

    with progress("inspect", silent=shown.quiet) as told:
        seen = inspect_attention(request, progress=told)
    if shown.as_json:
        print(json.dumps(seen.as_json()))
        for note in seen.notes if request.teachers else ():  # their JSON is a list of teachers
            print(f"note: {note}", file=sys.stderr)
    elif request.teachers:
        _print_teachers(seen)
    else:
        _print_numbers(seen)


_TITLES = {
    "entropy": "entropy",
    "distance": "distance",
    "prefix_share": "to prefix",
    "class_prefix_share": "class to prefix",
    "redundancy": "redundancy",
}


def _print_numbers(seen: Any) -> None:
    from vitkd_cli.terminal import Fitted, Terminal

    console = Terminal()
    for name, rows in zip(seen.models, seen.rows, strict=True):
        shown = []
        for row in (row for row in rows if row["head"] is None):
            heads = sum(other["layer"] == row["layer"] for other in rows) - 1
            cells = (_with_error(row, key) for key in _TITLES)
            shown.append((str(row["layer"]), row["path"], row["kind"], str(heads or "–"), *cells))
        titles = ("layer", "module", "maps", "heads", *_TITLES.values())
        spare = ("module", "maps", "heads", "redundancy", "class to prefix")
        console.print(Fitted(titles, shown, title=f"{name}, {seen.images} images", spare=spare))
    console.print("entropy in nats, distance in pixels; ± is the standard error over images", style="dim")
    for note in seen.notes:
        console.say(f"note: {note}", style="yellow")
    for path in seen.files:
        console.say(str(path))


def _with_error(row: dict[str, Any], key: str) -> str:
    value, error = row[key], row[f"{key}_se"]
    if value is None:
        return "–"
    return f"{value:.3g}" + ("" if error is None else f" ± {error:.2g}")


def _print_teachers(seen: Any) -> None:
    from vitkd_cli.terminal import Fitted, Terminal

    console = Terminal()
    titles = ("teacher", "top-1", "attention similarity", "of its blocks", "CKA, last block", "parameters")
    rows = [
        (
            one.model,
            f"{one.top1:.2f}",
            "–" if one.similarity is None else f"{one.similarity:.3f}",
            str(one.pairs),
            "–" if one.cka is None else f"{one.cka:.3f}",
            f"{one.parameters / 1e6:.2f} M, {one.larger:.1f} ×",
            f"{one.multiply_adds / 1e6:,.1f} M, {one.dearer:.1f} ×",
        )
        for one in seen.candidates
    ]
    about = f"teachers for {seen.student}, the most accurate first"
    spare = ("of its blocks", "parameters", "multiply-adds", "CKA, last block")
    console.print(Fitted((*titles, "multiply-adds"), rows, title=about, spare=spare))
    for note in seen.notes:
        console.say(f"note: {note}", style="yellow")


command = command_of("inspect-attention", _inspect_attention, InspectRequest, Shown)
