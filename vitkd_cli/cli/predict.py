"""``vitkd predict``: the classes of images, or their embeddings, as CSV, Parquet or safetensors."""

import sys

from vitkd_cli.cli.flags import Silent, command_of, progress, told_of_stops, waking
from vitkd_cli.requests import PredictRequest


def _predict(request: PredictRequest, shown: Silent) -> None:
    """Name images, or embed them.

    - `vitkd predict runs/x --images photo.jpg holidays/`

    - `vitkd predict deit3_small --images photos/ --topk 3 --output answers.csv`

    - `vitkd predict dinov2_small --images photos/ --embed --output features.safetensors`

    A call with --output that was killed goes on where it was when it is started again.
    """
    with waking(shown.quiet):
        from vitkd_cli.evaluation.predictions import check_predict, predict
        from vitkd_cli.evaluation.writing import print_csv
    from vitkd_cli.terminal import Terminal

    check_predict(request)
    again = "start it again: it goes on from there" if request.output else "with --output FILE it could go on"
    with told_of_stops("the predicting was stopped", again), progress("predict", silent=shown.quiet) as tell:
        found = predict(request, progress=tell)
    console = Terminal(stderr=True)
    if request.output is None:
        print_csv(sys.stdout, found.columns(), found.rows())
    for note in found.notes:
        console.say(f"note: {note}", style="yellow")
    if found.left_out:
        console.say(f"note: {len(found.left_out):,} files cannot be read and are left out:", style="yellow")
        for file, why in found.left_out.items():
            console.say(f"  {file}: {why}")
    if request.output is not None:
        before = f", {found.resumed:,} of them by a call that was stopped" if found.resumed else ""
        Terminal().say(f"wrote {request.output}: {len(found.images):,} images{before}")


command = command_of("predict", _predict, PredictRequest, Silent)
