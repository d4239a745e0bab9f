"""``vitkd export``: a model in the form that others load, checked before it is kept."""

import json

from vitkd_cli.cli.flags import Shown, command_of, progress, waking
from vitkd_cli.requests import ExportRequest


def _export(request: ExportRequest, shown: Shown) -> None:
    """Write a model in a form that others load, and check it against the model itself.

    - `vitkd export runs/x --to timm` for timm and transformers

    - `vitkd export runs/x --to onnx --preprocess` for ONNX Runtime, fed with plain images

    - `vitkd export runs/x --to torch` for torch alone

    - `vitkd export runs/x --to features` for detection and segmentation

    - `vitkd export runs/x --to state-dict --prefix backbone.` for a model of your own
    """
    with waking(shown.quiet):
        from vitkd_cli.export import export
    from vitkd_cli.terminal import Terminal

    with progress("export", silent=shown.quiet) as each:
        done = export(request, each=each)
    found = done.found
    if shown.as_json:
        seen = ("difference", "scale", "agreement", "top1", "images_per_second")
        facts = {**vars(done), "output": str(done.output), "images": found.count if found else 0}
        del facts["found"]
        print(json.dumps(facts | {key: getattr(found, key, None) for key in seen}))
        return
    console = Terminal()
    rows = [
        (
            name,
            f"{size / 2**20:.2f}",
            f"{found.top1[place]:.2f}" if found and found.top1 else "–",
            f"{found.images_per_second[place]:.0f}" if found else "–",
        )
        for place, (name, size) in enumerate((("model", done.model_bytes), (done.to, done.bytes)))
    ]
    console.table(("", "MiB", "top-1", "images/s"), rows)
    if found:
        agree = f", the same class on {found.agreement:.2f} %" if found.agreement is not None else ""
        console.say(
            f"{found.count} images of {done.sample}: largest difference {found.difference:.1e} "
            f"of {found.scale:.3g}{agree}; speed in batches of {found.batch}"
        )
    else:
        console.say("not checked: --check-forward compares it with the model")
    for line in (*done.notes, *([f"pushed to {done.pushed}"] if done.pushed else [])):
        console.say(line)
    console.say(str(done.output), style="bold")


command = command_of("export", _export, ExportRequest, Shown)
