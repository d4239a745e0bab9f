"""Foreign spellings → ours, before parsing, so that help and suggestions never show them."""

from __future__ import annotations

from vitkd_cli.errors import UserError

_ALIASES = {
    "--batch": "--batch-size",
    "--config": "--recipe",
    "--data-path": "--data",
    "--dataset": "--data",
    "--imgsz": "--img-size",
    "--kd-model-name": "--teacher",
    "--learning-rate": "--lr",
    "--num-workers": "--workers",
    "--out": "--output",
    "--output-dir": "--output",
    "--per-device-train-batch-size": "--batch-size",
    "--num-train-epochs": "--epochs",
    "--gradient-accumulation-steps": "--grad-accum-steps",
    "--resume-from-checkpoint": "--resume",
    "--teacher-model": "--teacher",
    "--teacher-path": "--teacher-checkpoint",
    "--test-pool": "--test-time-pool",
}
_IN_THE_FORMULA = {
    "--kd-temperature": "kd(temperature=…)",
    "--distillation-tau": "kd(temperature=…)",
    "--distillation-alpha": "0.5*labels + 0.5*kd",
    "--kd-distill-type": "labels + kd",
    "--task-loss-weight": "0.5*labels + 0.5*kd",
    "--distill-loss-weight": "0.5*labels + 0.5*kd",
}
_SEVERAL = ("--images", "--teachers")  # a flag for every value is all that Typer can read
_WITH_COMMAS = ("--opt-betas", "--mean", "--std", "--scale", "--ratio")


def respell(arguments: list[str]) -> list[str]:
    """Command-line arguments with timm's, Hugging Face's and DeiT's spellings turned into ours.

    Raises:
        UserError: a flag that only the formula can say, or several values without commas.
    """
    result: list[str] = []
    amp_dtype = None
    several = None
    for position, argument in enumerate(arguments):
        if not argument.startswith("-"):
            if several and result[-1] != several:
                result.append(several)
            result.append(argument)
            continue
        several = None
        if not argument.startswith("--"):
            result.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-").lower() if "_" in flag else flag
        if flag in _IN_THE_FORMULA:
            raise UserError(f"{flag} is said in the formula here", f'--loss "{_IN_THE_FORMULA[flag]}"')
        if flag in _WITH_COMMAS and not equals:
            values = _numbers(arguments[position + 1 :])
            if len(values) > 1:
                raise UserError(f"{flag} takes one value with commas", f"{flag} {','.join(values)}")
        if flag == "--amp-dtype":
            amp_dtype = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
        several = flag if flag in _SEVERAL else None
        result.append(_ALIASES.get(flag, flag) + equals + value)
    return _amp(result, amp_dtype)


def _numbers(arguments: list[str]) -> list[str]:
    values = []
    for argument in arguments:
        try:
            float(argument)
        except ValueError:
            break
        values.append(argument)
    return values


def _amp(arguments: list[str], dtype: str | None) -> list[str]:
    """timm's ``--amp`` and ``--amp-dtype`` as ``--mixed-precision``."""
    if "--amp" not in arguments and dtype is None:
        return arguments
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument == "--amp" or argument.startswith("--amp-dtype"):
            skip = argument == "--amp-dtype"
            continue
        kept.append(argument)
    return [*kept, "--mixed-precision", "bf16" if dtype == "bfloat16" else "fp16"]
