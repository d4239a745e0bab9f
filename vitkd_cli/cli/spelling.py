"""Flags of timm, Hugging Face and DeiT → ours, before parsing: help and suggestions never show them.

Click's ``token_normalize_func`` renames single flags; some of these need the value behind them, too.
"""

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
    "--report-to": "--log-with",
    "--wd": "--weight-decay",
}
_SWITCHES = {  # timm's and Hugging Face's, which take no value
    "--bf16": ["--mixed-precision", "bf16"],
    "--fp16": ["--mixed-precision", "fp16"],
    "--log-wandb": ["--log-with", "wandb"],
}
_NOT_HERE = {
    "--gpu": ("which GPUs a run may use is said outside", "CUDA_VISIBLE_DEVICES=0 vitkd …, or --device cpu"),
    "--gpus": ("how many GPUs a run uses is its number of processes", "--num-processes 4"),
    "--patience": ("no run stops early: its schedule has an end", "fewer --epochs, or --select best"),
}
_IN_THE_FORMULA = {
    "--kd-temperature": "kd(temperature=…)",
    "--distillation-tau": "kd(temperature=…)",
    "--distillation-alpha": "0.5*labels + 0.5*kd",
    "--kd-distill-type": "labels + kd",
    "--task-loss-weight": "0.5*labels + 0.5*kd",
    "--distill-loss-weight": "0.5*labels + 0.5*kd",
}
_COMMANDS = {
    "train": "vitkd distill; its --help begins with examples",
    "val": "vitkd eval MODEL --data FOLDER",
}
_SEVERAL = ("--images", "--teachers")  # a flag for every value is all that Typer can read
_WITH_COMMAS = ("--opt-betas", "--mean", "--std", "--scale", "--ratio", "--halving")


def respell(arguments: list[str]) -> list[str]:
    """Command-line arguments with others' spellings turned into ours."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command == "help":
        return [*arguments[1:], "--help"]
    if command in _COMMANDS:
        raise UserError(f"there is no command {command!r}", f"did you mean {_COMMANDS[command]}?")
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
        if flag in _NOT_HERE:
            raise UserError(f"{flag}: {_NOT_HERE[flag][0]}", _NOT_HERE[flag][1])
        if flag in _SWITCHES:
            result += _SWITCHES[flag]
            continue
        if flag == "--model":
            if command == "distill":
                flag = "--student"
            else:  # an argument elsewhere
                result += [value] if value else []
                continue
        if flag == "--input-size":
            sides = [value] if value else _numbers(arguments[position + 1 :])
            if len(sides) > 1:  # timm's: channels, height, width
                raise UserError(f"{flag} {' '.join(sides)} is one number here", f"--img-size {sides[-1]}")
            flag = "--img-size"
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
