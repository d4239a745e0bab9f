"""The application: its commands, its one ``except``, its exit codes."""

import os
import sys

import typer

from vitkd_cli import __version__
from vitkd_cli.cli.front import Front
from vitkd_cli.cli.parsing import Refusal, in_our_words
from vitkd_cli.cli.spelling import respell
from vitkd_cli.errors import UserError
from vitkd_cli.world import rank, speaks

app = typer.Typer(
    name="vitkd",
    cls=Front,
    help="Distil any timm vision transformer into a smaller one, with the evidence that it is better.\n\n"
    "Start with `vitkd demo`: a few minutes, nothing to download.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a bug of ours keeps its plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitkd {__version__}")
        raise typer.Exit


@app.callback()
def _callback(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_version, is_eager=True
    ),
) -> None: ...


def main() -> None:
    """Run the command line; the one place that turns exceptions into messages."""
    try:
        if {"VITKD_ERRORS", "VITKD_PARENT"} & os.environ.keys():  # somebody waits for this process
            from vitkd_cli.processes import end_with_parent

            end_with_parent()
        sys.argv[1:] = respell(sys.argv[1:] or ["--help"])
        sys.exit(app(prog_name="vitkd", standalone_mode=False))
    except UserError as error:
        sys.exit(_tell(error))
    except Refusal as refusal:
        sys.exit(_tell(in_our_words(refusal)))
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        from vitkd_cli.processes import connection_lost

        if problem := connection_lost(error):
            sys.exit(_tell(problem))
        raise


def _rank() -> int:
    """Which of several processes this is; 0 where that is what is wrong."""
    try:
        return rank()
    except UserError:
        return 0


def _talking() -> bool:
    """Have the processes found each other? Until then a wrong request is one in all of a machine."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _tell(error: UserError) -> int:
    number = _rank()
    if error.exit_code > 128 and number:
        return error.exit_code  # all stop together, and the first tells
    if "torch" in sys.modules:  # else nothing was launched, and nobody waits for our word
        from vitkd_cli.processes import tell_launcher

        if tell_launcher(error):
            return error.exit_code
    asked = error.told_by_another is not None or _talking()
    alike = number and error.exit_code == 2 and not (speaks() or asked)
    if error.told_by_another or alike:
        return error.exit_code
    from vitkd_cli.terminal import Terminal

    console = Terminal(stderr=True)
    which = f"rank {number}: " if number else ""
    console.say(f"error: {which}{error.message}", style="bold red")
    for line in error.details:
        console.say(f"  {line}")
    if error.hint:
        console.say(f"hint: {error.hint}")
    return error.exit_code
