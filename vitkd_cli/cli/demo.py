"""``vitkd demo``: the main job on the built-in data, in a few minutes."""

import time
from dataclasses import dataclass
from typing import Annotated

from vitkd_cli.cli.flags import command_of
from vitkd_cli.options import Option, Request
from vitkd_cli.requests import DistillRequest

_NEXT = """next, on your own images (a folder with one folder per class):
  vitkd distill --teacher deit3_small --student deit_tiny --recipe small \\
      --data PATH/TO/IMAGES
what it would do, without doing it: add --dry-run"""


@dataclass(frozen=True, kw_only=True)
class DemoRequest(Request):
    """What of the demo may be other."""

    # fmt: off
    output: Annotated[str | None, Option("The run folder.", unset="runs/demo-TIME")] = None
    overwrite: Annotated[bool, Option("Replace what it holds.")] = False
    seeds: Annotated[int | None, Option("Seeds to repeat with.", minimum=1, unset="5")] = None
    epochs: Annotated[int | None, Option("Epochs of the students.", minimum=1, unset="200")] = None
    finetune_teacher: Annotated[int | None, Option("Epochs of the teacher.", minimum=1, unset="30")] = None
    quiet: Annotated[bool, Option("Print errors only.", short=("-q",))] = False
    # fmt: on


def _demo(request: DemoRequest) -> None:
    """Distil a small ViT on built-in scans of handwritten digits: no network, no GPU, a few minutes.

    It is `vitkd distill --recipe tiny-cpu`: a teacher sees every training scan, its students see five of
    each digit, alone and distilled, with five seeds.
    """
    from vitkd_cli.cli.distill import reporter_for, run
    from vitkd_cli.cli.flags import progress, waking

    quiet = request.quiet
    with waking(quiet):
        from vitkd_cli.inspection.run import inspect_attention
        from vitkd_cli.recipe import settle
        from vitkd_cli.terminal import Terminal

    own = ("seeds", "epochs", "finetune_teacher")
    given = {key: value for key in own if (value := getattr(request, key)) is not None}
    given["output"] = request.output or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"
    recipe, _ = settle(given, "tiny-cpu")
    asked = DistillRequest(recipe, overwrite=request.overwrite)
    finished = run(asked, given, reporter_for(quiet))
    if finished is None:
        return
    console = Terminal(quiet=quiet)
    attention, models = finished.folder / "attention", (finished.folder / "teacher/student", finished.student)
    with progress("attention", silent=quiet) as told:
        inspect_attention(models, output=attention, overwrite=True, num_pictures=3, progress=told)
    console.say(f"attention {attention / 'attention.html'}")
    console.print(_NEXT, soft_wrap=True)


command = command_of("demo", _demo, DemoRequest)
