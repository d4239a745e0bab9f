"""``vitkd eval``: timm's own numbers for any timm ViT, and what else one pass over the images can tell."""

import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any

from vitkd_cli.cli.flags import Shown, command_of, progress, told_of_stops, waking
from vitkd_cli.errors import expanded
from vitkd_cli.meeting import joined, refused_together
from vitkd_cli.options import Option
from vitkd_cli.requests import EvalRequest
from vitkd_cli.world import check_world, world_size


@dataclass(frozen=True, kw_only=True)
class ShownScores(Shown):
    """How the scores are shown."""

    as_json: Annotated[
        bool,
        Option("Print JSON, and nothing else on stdout.", flag="--json", excludes=("as_csv", "as_markdown")),
    ] = False
    as_csv: Annotated[
        bool, Option("Print CSV, and nothing else on stdout.", flag="--csv", excludes=("as_markdown",))
    ] = False
    as_markdown: Annotated[bool, Option("Print Markdown, and nothing else on stdout.", flag="--markdown")] = (
        False
    )
    calibration: Annotated[bool, Option("Print accuracy by confidence.")] = False


def _eval(request: EvalRequest, shown: ShownScores) -> None:
    """Score models on a labelled folder: each image once, with timm's own preprocessing.

    - `vitkd eval runs/x` on the images that the run held out

    - `vitkd eval runs/x/student --data ~/imagenet`

    - `vitkd eval deit_tiny --data ~/imagenet --crop-pct 0.875`

    - `vitkd eval runs/x/student runs/y/student --teacher deit3_small --data ~/imagenet --output scores`

    - `vitkd eval dinov2_small runs/x --data ~/flowers --knn --linear --few-shot 1,5,10`

    A folder with some of ImageNet's classes (Imagenette, ImageNet-A) is scored among these.
    """
    with refused_together():
        if world_size() > 1:  # else they are started below
            check_world(request.num_processes)
        with waking(shown.quiet):
            from vitkd_cli.evaluation.accuracy import check_request, evaluate_all
            from vitkd_cli.processes import is_launched, is_main_process, launch

        check_request(request)
    if request.num_processes > 1 and not is_launched():
        launch(request.num_processes, sys.argv[1:], request.device)
        return
    asked = replace(request, predictions=None)  # which are written when the scores have been shown
    silent = shown.quiet or not is_main_process()
    again = "start it again; models that --output FOLDER has the answers of are not run again"
    stops = told_of_stops("the scoring was stopped", again)
    with stops, joined(request.device) as accelerator, progress("eval", silent=silent) as tell:
        found = evaluate_all(asked, accelerator=accelerator, progress=tell)
    if is_main_process():
        _show(found, request, shown)
        if request.predictions is not None:
            found.write_predictions(expanded(request.predictions))
            print(f"wrote {request.predictions}", file=sys.stderr)


def _show(found: Any, request: EvalRequest, shown: ShownScores) -> None:
    from vitkd_cli.report import scores
    from vitkd_cli.terminal import Terminal

    records = [scores.record(one, found.names) for one in found.models]
    pairs, count = found.comparisons, found.models[0].metrics.count
    written = scores.write_folder(found, records, expanded(request.output)) if request.output else []
    if shown.as_json or shown.as_csv or shown.as_markdown:
        if shown.as_json:
            print(scores.json_text(records, pairs))
        else:
            print(
                scores.csv_text(records) if shown.as_csv else scores.markdown_text(records, pairs, count),
                end="",
            )
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        return
    console = Terminal()
    say = console.say
    for one in {one.model: one for one in found.models}.values():
        described = ", ".join(f"{key} {value}" for key, value in one.preprocessing.items())
        say(f"{one.model}: {described}" + ("; scored before, answers kept" if one.cached else ""))
        if not one.judge and one.classes[0] < one.classes[1]:
            say(f"{one.model}: scored on {one.classes[0]} of its {one.classes[1]} classes")
    console.print(scores.table(records))
    teacher = found.models[0].teacher
    beside = f"; agrees and KL: with {found.teacher}, top-1 {teacher.top1:.3f}" if teacher else ""
    say(f"{count:,} images of {found.about}{beside}", style="bold")
    for one in found.models if shown.calibration else ():
        if one.metrics.confidence is not None:
            console.print(scores.reliability(one))
    if len(records) == 1 and records[0].get("worst_classes"):
        worst, taken = records[0]["worst_classes"][:5], records[0]["confusions"][:5]
        say("worst classes: " + ", ".join(f"{row['class']} {row['accuracy']:.1f}" for row in worst))
        if taken:
            pairs_seen = (f"{row['class']} for {row['taken_for']} ({row['images']})" for row in taken)
            say("most often taken: " + ", ".join(pairs_seen))
    for pair in pairs:
        say(pair.sentence(count))
    if pairs:
        say(f"note: {scores.CAUTION}")
    for note in found.notes:
        say(f"note: {note}", style="yellow")
    for path in written:
        say(f"wrote {path}")


command = command_of("eval", _eval, EvalRequest, ShownScores)
