"""Formulas, recipes, names and command lines at random: each is accepted, or refused in a line.

``python tests/reliability/fuzz.py --count 2000`` prints a table and the tracebacks; there must be none.
"""

from __future__ import annotations

import random
import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from outcome import ACCEPTED, REFUSED, TRACEBACK, asked, command, leave, outcome

NUMBERS = [
    "0",
    "-1",
    "1e308",
    "1e400",
    "nan",
    "-inf",
    "10**9",
    "9" * 400,
    "1e-400",
    "0x1f",
    "1j",
    "True",
    "None",
]
WORDS = [
    "labels",
    "kd",
    "nkd",
    "vitkd",
    "mimic",
    "generate",
    "dist",
    "dkd",
    "token",
    "vkd",
    "spectral",
    "print",
]
SEEDS = [
    "labels + vitkd + nkd",
    "0.5*labels + 0.5*kd(temperature=4)",
    "labels + 3e-5*mimic(blocks=(0,1)) + 3e-6*generate(block=-1, mask=0.5) + nkd(gamma=1)",
    "labels + kd*cosine(1, 0)*warmup(epochs=5)",
    "labels + dist(beta=1, gamma=1) + dkd(alpha=1)",
    "labels(smoothing=0.1) + relations(block=-1) + features + spectral(block=-2)",
]
NAMES = [
    "deit_tiny",
    "deit3_small",
    "vit_base_patch16_224.augreg",
    "ViT-B/16",
    "dinov2_vits14",
    "swin",
    "local-dir:x",
]
TEXT = string.printable + "éß猫\u200f\x00\x1b🙂"


def mangled(text: str, generator: random.Random, words: list[str]) -> str:
    """A text with one word exchanged for another, or with characters lost, doubled or put in."""
    if generator.random() < 0.5:
        parts = re.findall(r"\w+|\W", text)
        parts[generator.randrange(len(parts))] = generator.choice([*words, *NUMBERS, ""])
        return "".join(parts)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(text) + 1)
        end = min(len(text), at + generator.randint(0, 8))
        kept = generator.choice([at, end])
        odd = "".join(generator.choices(TEXT, k=generator.randint(1, 4)))
        piece = generator.choice(
            ["", text[at:end] * generator.randint(2, 40), "()*+,=-/:.#@\\"[kept % 13], odd]
        )
        text = text[:at] + piece + text[kept:]
    return text


@cache
def specs() -> tuple[Any, Any]:
    """Of a small student and a small teacher."""
    from timm import create_model

    from vitkd_cli.vit.spec import describe

    common = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 3, "num_classes": 10}
    return tuple(describe(create_model("vit_tiny_patch16_224", embed_dim=dim, **common)) for dim in (24, 48))  # type: ignore[return-value]


def formula(generator: random.Random, folder: Path) -> tuple[str, Callable[[], Any]]:
    from vitkd_cli.objective import Objective, parse

    text = mangled(generator.choice(SEEDS), generator, WORDS)
    if generator.random() < 0.02:
        text = "(" * 3000 + text + ")" * 3000
    return text, lambda: Objective(parse(text), *specs())


def recipe(generator: random.Random, folder: Path) -> tuple[str, Callable[[], Any]]:
    from vitkd_cli.recipe import Recipe, settings

    odd = [*NUMBERS[:5], '""', '"x"', "[]", "[1, 2]", "{}", "true", "2026-01-01", "-5", "9" * 20]
    usual = {
        int: ["1", "8", "224"],
        float: ["0.1", "1"],
        bool: ["true", "false"],
        str: ['"x"'],
        tuple: ['"0.5,1"'],
    }
    lines = []
    for field in generator.choices(settings(), k=generator.randint(1, 3)):
        values = usual.get(field.kind or str, odd) if generator.random() < 0.7 else odd
        lines.append(f"{field.name} = {generator.choice(values)}")
    text = "\n".join(lines)
    if generator.random() < 0.3:
        text = mangled(text, generator, [field.name for field in settings()])
    path = folder / "recipe.toml"
    noise = bytes(generator.choices(range(256), k=60))
    path.write_bytes(text.encode() if generator.random() < 0.9 else noise)
    return text, lambda: Recipe.from_toml(path)


def name(generator: random.Random, folder: Path) -> tuple[str, Callable[[], Any]]:
    from vitkd_cli.vit.names import resolve

    text = mangled(generator.choice(NAMES), generator, NAMES)
    return text, lambda: resolve(text)


def command_line(generator: random.Random, folder: Path) -> tuple[str, Callable[[], Any]]:
    from vitkd_cli.recipe import settings

    flags = [field.flag for field in settings()]
    values = [
        "0",
        "-1",
        "x",
        "",
        "1e308",
        "nan",
        "1,2",
        "deit_tiny",
        "deit_tiny,",
        "[bold]",
        "\x1b[31m",
        "none",
    ]
    start = generator.choice(
        [
            ["distill", "--print-recipe"],
            ["distill", "--print-recipe", "--recipe", generator.choice(["finetune", "papr", "", "."])],
            ["eval", mangled("deit_tiny", generator, NAMES), "--data", str(folder / "none")],
            [
                "export",
                mangled("deit_tiny", generator, NAMES),
                "--to",
                generator.choice(["timm", "onnx", "x"]),
            ],
            ["inspect-attention", str(folder / "none"), "--images", "none.jpg"],
            ["models", mangled("deit", generator, NAMES)],
            ["methods", mangled("mimic", generator, WORDS)],
            ["recipes", mangled("finetune", generator, WORDS)],
            [mangled("distill", generator, ["train", "evaluate"])],
        ]
    )
    more = [generator.choice([*flags, *values]) for _ in range(generator.randint(0, 4))]
    arguments = [word.replace("\x00", "") for word in [*start, *more]]

    def call() -> None:
        from vitkd_cli.errors import UserError

        code, said = command(arguments)
        if code is None:
            raise RuntimeError(said)
        if code:
            line = next((line for line in said.splitlines() if line.startswith("error: ")), "")
            assert line and len(said.strip().splitlines()) <= 3, f"exit {code} with: {said}"
            raise UserError(line)

    return " ".join(map(repr, arguments)), call


KINDS = (formula, recipe, name, command_line)


def run(count: int, seed: int = 0) -> tuple[dict[str, Counter[str]], list[str]]:
    """Try ``count`` inputs, in equal parts of each kind.

    Returns:
        Outcomes by kind, and a text for each traceback.
    """
    outcomes: dict[str, Counter[str]] = {}
    tracebacks = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            counter = outcomes.setdefault(kind.__name__, Counter())
            for index in range(count // len(KINDS)):
                text, call = kind(random.Random(f"{seed} {kind.__name__} {index}"), Path(folder))
                came, said = outcome(call)
                counter[came] += 1
                if came == TRACEBACK:
                    tracebacks.append(f"{kind.__name__} {index}: {text[:300]!r}\n{said[-1500:]}")
    return outcomes, tracebacks


def main() -> None:
    arguments = asked(__doc__, 2000)
    outcomes, tracebacks = run(arguments.count, arguments.seed)
    print(f"{'kind':14}{'tried':>8}{ACCEPTED:>10}{REFUSED:>10}{'tracebacks':>12}")
    for kind, counter in outcomes.items():
        row = counter[ACCEPTED], counter[REFUSED], counter[TRACEBACK]
        print(f"{kind:14}{sum(row):>8}{row[0]:>10}{row[1]:>10}{row[2]:>12}")
    leave(tracebacks)


if __name__ == "__main__":
    main()
