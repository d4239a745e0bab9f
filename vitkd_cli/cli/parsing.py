"""Click's parser with two-line errors, no flag given twice, guesses at a forgotten flag, and a short help."""

import difflib
import mimetypes
import os
import re
import shlex
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from vitkd_cli.errors import UserError, expanded
from vitkd_cli.terminal import Terminal

# Typer has carried its own Click for some versions: the base of that one's errors.
Refusal: type[Exception] = typer.BadParameter.__mro__[2]
_UNTESTED = ("mps", "xpu")
_VALUES = "vitkd_cli.values"  # what was typed, by parameter


class Command(TyperCommand):
    """A command that checks what was typed before Click converts it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            values, rest, order = self.make_parser(ctx).parse_args(list(args))
            ctx.meta[_VALUES] = values
            for parameter, times in Counter(order).items():
                if times > 1 and not parameter.multiple:
                    raise UserError(
                        f"{'/'.join(parameter.opts)} is given {times} times",
                        "it counts once: leave one of them out",
                    )
            for parameter in self.params:
                typed = values.get(parameter.name)
                if parameter.param_type_name == "option" and (typed == "" or typed == [""]):
                    raise UserError(
                        f"{'/'.join(parameter.opts)} is empty",
                        "is its variable unset? give it a value, or leave it out",
                    )
            typed = [values.get(p.name) for p in self.params if p.param_type_name == "argument"]
            words = list(chain.from_iterable([w] if isinstance(w, str) else w or () for w in typed))
            _guess(self, args, words, rest)
            if (
                values.get("device") in _UNTESTED
                and not values.get("quiet")
                and "WORLD_SIZE" not in os.environ
            ):
                said = (
                    f"note: --device {values['device']} is as Accelerate offers it; vitkd is untested there"
                )
                Terminal(stderr=True).say(said, style="yellow")
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show one spelling per switch, the one that changes something, so that flags fit into 80 columns."""
        option: Any
        for option in self.params:
            if option.secondary_opts:
                if option.default is True or getattr(option, "show_default", None) == "on":
                    option.opts = option.secondary_opts
                option.secondary_opts, option.show_default = [], False
        super().format_help(ctx, formatter)


def _guess(command: Any, args: list[str], words: list[str], rest: list[str]) -> None:
    """Refuse words that want a flag before them, with the whole command that would do.

    Args:
        words: those that the command takes.
        rest: those that it does not.
    """
    name = str(command.name)
    astray: dict[str, list[str]] = {}
    for word in [*words[bool(words) :], *rest]:  # the first is what the command is about
        if what := _kind(word):
            astray.setdefault(what, []).append(word)
    for what, found in astray.items():
        flag = _FLAGS.get((name, what)) or _FLAGS.get(("", what), "")
        flags = {spelling for parameter in command.params for spelling in parameter.opts}
        if flag in flags and flag not in args:
            kept = [arg for arg in args if arg not in found]
            whole = shlex.join(["vitkd", name, *kept, flag, *found])
            raise UserError(f"{found[0]} is {what}, and no flag says what for", f"did you mean: {whole}")
    if rest:
        takes = f"{len(words)} argument{'s' if len(words) > 1 else ''}" if words else "no argument"
        hint = "every value has a flag before it: --teacher NAME --student NAME --data FOLDER"
        raise UserError(
            f"vitkd {name} takes {takes}, not {rest[0]!r} too"
            if words
            else f"vitkd {name} takes no {rest[0]!r}",
            hint if name == "distill" else f"vitkd {name} --help",
        )


_FLAGS = {
    ("", "a folder of images"): "--data",
    ("", "an image"): "--images",
    ("", "a recipe"): "--recipe",
    ("distill", "a run"): "--resume",
    ("export", "a folder of images"): "--images",
    ("inspect-attention", "a folder of images"): "--images",
}


def _kind(word: str) -> str:
    """What a path is, where it is certainly no model's name."""
    path = expanded(word)
    if path.is_file():
        return "a recipe" if path.suffix == ".toml" else "an image" if _is_image(path) else ""
    if (path / "recipe.toml").is_file():
        return "a run"
    near = chain(path.glob("*"), path.glob("*/*"), path.glob("*/*/*"))
    return "a folder of images" if any(map(_is_image, islice(near, 5000))) else ""


def _is_image(path: Path) -> bool:
    return (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def in_our_words(error: Any) -> UserError:
    """What Click refuses, as a :class:`UserError`."""
    text = error.format_message()
    ctx: Any = getattr(error, "ctx", None)
    command = f"vitkd {ctx.info_name}" if ctx is not None and ctx.parent else "vitkd"
    hint = f"{command} --help"
    if hasattr(error, "possibilities"):
        flags = [spelling for p in ctx.command.params for spelling in (*p.opts, *p.secondary_opts)]
        near = difflib.get_close_matches(error.option_name, flags, 1, cutoff=0.7)
        more = "--help-all" if "--help-all" in flags else "--help"
        return UserError(
            f"{command} has no flag {error.option_name}",
            f"did you mean {near[0]}?" if near else f"{command} {more} lists them",
        )
    parameter = getattr(error, "param", None)
    if parameter is not None and error.message:
        value = ctx.meta.get(_VALUES, {}).get(parameter.name, "") if ctx else ""
        return UserError(f"{'/'.join(parameter.opts)} {value}: {_small(error.message)}", hint)
    text, _, better = text.partition(" Did you mean ")
    return UserError(_small(text), f"did you mean {better}" if better else hint)


def _small(sentence: str) -> str:
    """As part of our line: no capital, no full stop."""
    return re.sub(r"^[A-Z](?=[a-z])", lambda found: found[0].lower(), sentence.strip().rstrip("."))
