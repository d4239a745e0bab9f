"""The model card of a folder, as the Hub expects it."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from timm.models import get_pretrained_cfg

from vitkd_cli import __version__
from vitkd_cli.text import code, markdown, plain

_VITKD = """@article{yang2022vitkd,
  title = {ViTKD: Practical Guidelines for ViT feature knowledge distillation},
  author = {Yang, Zhendong and Li, Zhe and Zeng, Ailing and Li, Zexian and Yuan, Chun and Li, Yu},
  journal = {arXiv preprint arXiv:2209.02432},
  year = {2022},
}"""


def card(config: dict[str, Any], about: dict[str, Any], hub: str | None = None) -> str:
    """A model card, as the Hub expects it.

    Args:
        config: ``config.json``'s content.
        about: what is known of the model, without places.
        hub: the repository that it goes to.
    """
    recipe, told = about.get("recipe"), about.get("metrics") or {}
    metrics = {name: value for name, value in told.items() if isinstance(value, (int, float))}
    origin, teacher = code(about.get("origin")), "none"
    if about.get("teacher"):
        further = f", trained further on {markdown(of)}" if (of := about.get("teacher_data")) else ""
        licence = markdown(about.get("teacher_licence") or "not known")
        teacher = f"{code(about['teacher'])}{further} (licence: {licence})"
    rows = {
        "licence": markdown(about.get("licence") or "not known"),
        "trained on": markdown(about.get("data")),
        "began as": f"random weights, {origin}" if about.get("random") else origin,
        "teacher": teacher,
        "objective": code(about.get("objective")),
        "classes": str(config["num_classes"] or "none: its output is an embedding"),
        "image size": "×".join(map(str, about["preprocessing"]["input_size"][1:])),
        "validation": ", ".join(f"{markdown(name)} {value:.2f}" for name, value in metrics.items()) or "none",
        "weights": f"{markdown(about.get('weights'))}, selected: {markdown(about.get('selected'))}",
    }
    of_any_model = ("licence", "classes", "image size")
    address = f"hf-hub:{hub}" if hub else "local-dir:PATH/TO/THIS/FOLDER"
    lines = [
        f"---\n{_metadata(config, about, metrics).to_yaml()}\n---",
        f"# {code(config['architecture'])}, {'trained' if recipe else 'exported'} with vitkd",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items() if recipe or name in of_any_model),
        "",
        f'```python\nimport timm\n\nmodel = timm.create_model("{address}", pretrained=True).eval()\n```',
        "",
    ]
    if recipe:
        cited = [f"@software{{vitkd,\n  title = {{vitkd}},\n  version = {{{__version__}}},\n}}"]
        if re.search("mimic|generate|vitkd", str(about.get("objective"))):
            cited.append(_VITKD)
        lines += [
            f"<details><summary>Recipe</summary>\n\n```toml\n{recipe.strip()}\n```\n\n</details>",
            "",
            "## Citation",
            "",
            "```bibtex",
            *cited,
            "```",
            "",
        ]
    return "\n".join(lines)


def _metadata(config: dict[str, Any], about: dict[str, Any], metrics: dict[str, float]) -> ModelCardData:
    """What the Hub reads of a card."""
    licence, data = about.get("licence"), plain(about.get("data") or "")
    known = licence and re.fullmatch(r"[a-z0-9.-]+", licence)
    task = "image-classification" if config["num_classes"] else "image-feature-extraction"
    models = filter(None, map(_on_the_hub, (about.get("origin"), about.get("teacher"))))
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.removeprefix("hfds/"),
            dataset_name=data,
            dataset_split="validation",
            metric_type="loss" if name == "loss" else "accuracy",
            metric_name=name if name == "loss" else f"{name}, percent",
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "vitkd"],
        license=licence if known else "other" if licence else None,
        license_name=plain(licence) if licence and not known else None,
        base_model=list(dict.fromkeys(models)) or None,
        datasets=[data.removeprefix("hfds/")] if data else None,
        model_name=config["architecture"],
        eval_results=results if data and results else None,
    )


def _on_the_hub(name: Any) -> str | None:
    """The repository of pretrained weights: ``NAME.TAG`` of timm, or ``hf-hub:…``."""
    if not isinstance(name, str):
        return None
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:").partition("@")[0]
    config = get_pretrained_cfg(name, allow_unregistered=True) if "." in name else None
    hub_id: str | None = config.hf_hub_id if config else None
    return f"{hub_id}{name}" if hub_id == "timm/" else hub_id
