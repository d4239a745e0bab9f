"""What a run will do and what it has shown, as tables and in words."""

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from vitkd_cli.data.datasets import STREAMS
from vitkd_cli.data.decoded import OFF
from vitkd_cli.data.listing import root_of
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.contrasts import BETTER, NOT_SHOWN, WORSE, Contrast, too_few
from vitkd_cli.evaluation.statistics import MIN_SEEDS, spread
from vitkd_cli.objective import Objective, parse
from vitkd_cli.options import literal
from vitkd_cli.recipe import SAMPLE, Recipe, settings
from vitkd_cli.terminal import Fitted
from vitkd_cli.text import in_bytes, resuming
from vitkd_cli.training import Plan, Result, Run
from vitkd_cli.training.arms import without_teacher
from vitkd_cli.training.costs import TUNING
from vitkd_cli.training.folder import known
from vitkd_cli.training.plan import Estimate
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import Tap

WAIT_WORTH_SAYING = 0.1  # of a training's time


def plan_tables(plan: Plan) -> list[Table | str]:
    """Both models, each term with its pairs, and what it will cost."""
    models = Table("", "model", "", "reads", title="models", box=None)
    for role, built in (("teacher", plan.teacher), ("student", plan.student)):
        if built is not None:
            spec = built.spec
            parameters = built.parameters / 1e6
            models.add_row(
                role,
                spec.name,
                f"{parameters:.2f} M parameters, {in_macs(built.multiply_adds)}MACs",
                f"{_cross(spec.input_size)} px as {_cross(spec.final_grid)} patches, "
                f"{spec.depth} blocks, {spec.final_dim} wide",
            )
    terms = Table("term", "weight", "options", "student → teacher", title="objective", box=None)
    for row in term_rows(plan.learner.objective):
        terms.add_row(*row)
    recipe = plan.recipe
    train = len(plan.data.train) if plan.data.train is not None else 0
    processes = f"{recipe.num_processes} process{'es' if recipe.num_processes > 1 else ''}"
    epochs = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}"
    lines = [
        f"images   {train:,} training, {len(plan.data.val) if plan.data.val is not None else 0:,} validation",
        f"batch    global batch {recipe.global_batch} = {processes} × {recipe.batch} × "
        f"{recipe.grad_accum_steps}",
        f"updates  {plan.arm.updates:,}: {plan.arm.updates_per_epoch:,} an epoch × {epochs}"
        + (f", stopped by --steps {recipe.steps}" if recipe.steps else ""),
        f"lr       {recipe.peak_lr:.3g} peak after {recipe.warmup:.2g} epochs of warm-up, then {recipe.sched}"
        f" to {recipe.final_lr:.3g}{_rule(recipe)}",
        *_teacher_s_weights(plan),
        f"memory   {plan.rehearsal.peak_memory / 2**20:,.0f} MiB at most while rehearsing "
        f"{plan.rehearsal.images} images",
    ]
    lines += [f"cache    {cache}" for cache in plan.caches]
    if plan.costs:
        lines += _costs(plan.costs)
    lines.append(f"output   {recipe.output}")
    return [models, terms, *([_arms(plan)] if plan.others else []), "\n".join(lines)]


def _teacher_s_weights(plan: Plan) -> list[str]:
    """What they take in memory, in a line."""
    if (teacher := plan.tapped) is None:
        return []
    line = f"teacher  its weights take {in_bytes(teacher.bytes)}"
    if plan.recipe.shard_teacher:
        processes = plan.recipe.num_processes
        line += f", shared by {processes} processes (about {in_bytes(teacher.bytes / processes)} each)"
    if teacher.rounded:
        line += ", linear and convolutional layers in bf16: its signals are the same to the bit"
    return [line]


def _arms(plan: Plan) -> Table:
    """The run's further arms: what each minimises, what else is its own, and what a student of it takes."""
    table = Table("arm", "objective", "its own settings", "updates", title="compared with", box=None)
    if plan.costs:
        table.add_column("time", no_wrap=True)
    fields = {field.name: field for field in settings()}
    for arm in plan.others:
        changed = (f"{key}={fields[key].spelled(value)}" for key, value in arm.written.changes.items())
        row = [arm.name, str(arm.formula), ", ".join(changed) or "–", f"{arm.updates:,}"]
        row += [
            _duration(cost.training) for cost in plan.costs if cost.title == f"{arm.name} ({arm.recipe.seed})"
        ]
        table.add_row(*row)
    return table


def term_rows(objective: Objective) -> list[tuple[str, str, str, str]]:
    """One row per term: its name, weight, options and pairs, such as ``features(0) 192 → 384``."""
    rows = []
    for (name, term), summand in zip(objective.named(), objective.formula.summands, strict=True):
        options = ", ".join(f"{key}={literal(value)}" for key, value in summand.options)
        pairs = ", ".join(_pair(objective, *pair) for pair in term.compares)
        rows.append((name, str(summand.weight), options, pairs))
    return rows


def _pair(objective: Objective, ours: Tap, theirs: Tap | None) -> str:
    """Both taps with their widths, and with both grids where they differ."""
    width, grid = _extent(objective.student, ours)
    if theirs is None or objective.teacher is None:
        return f"{ours} {width}"
    their_width, their_grid = _extent(objective.teacher, theirs)
    name = str(ours) if str(ours) == str(theirs) else f"{ours} ← {theirs}"
    grids = "" if grid == their_grid else f" ({_cross(grid)} ← {_cross(their_grid)})"
    return f"{name} {width} → {their_width}{grids}"


def _extent(vit: ViTSpec, tap: Tap) -> tuple[int, tuple[int, int] | None]:
    """Width of a signal, or heads of an attention map; and the grid of its patch tokens."""
    if tap.block is not None:
        block = vit.blocks[tap.block]
        widths = {"attention": block.heads, "attention_output": block.attention_dim}
        return widths.get(tap.kind, block.dim), block.grid
    if tap.kind in ("final", "final_prefix"):
        return vit.final_dim, vit.final_grid if tap.kind == "final" else None
    return (vit.embed_dim if tap.kind == "embedding" else vit.num_classes), None


def _rule(recipe: Recipe) -> str:
    """Where the peak learning rate comes from, if nobody gave it."""
    if recipe.lr is not None:
        return ""
    growth = f"{recipe.global_batch} / {recipe.lr_base_size}"
    return f" ({recipe.lr_base:g} × {f'√({growth})' if recipe.lr_base_scale == 'sqrt' else growth})"


def _costs(costs: tuple[Estimate, ...]) -> list[str]:
    """Disk and time of everything that a run trains and scores."""
    before = [sum(cost.kept for cost in costs[:index]) for index in range(len(costs))]
    most = max(kept + cost.disk for kept, cost in zip(before, costs, strict=True))
    students = [cost for cost in costs if cost.disk and cost.title != TUNING]
    parts = [
        (TUNING, sum(cost.training for cost in costs if cost.title == TUNING)),
        (
            f"{len(students)} students" if len(students) > 1 else "the student",
            sum(c.training for c in students),
        ),
        ("validation", sum(cost.validation for cost in costs)),
    ]
    told = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts if seconds)
    whole, left = sum(seconds for _, seconds in parts), sum(cost.kept for cost in costs)
    return [
        f"disk     {most / 2**20:.0f} MiB at most, {left / 2**20:.0f} MiB at the end",
        f"time     about {_duration(students[0].epoch)} an epoch, {_duration(whole)} in all "
        f"({told}), without reading the images",
    ]


def closing(run: Run) -> list[Fitted | Table | str]:
    """Teacher and students side by side, and in words whether distilling helped."""
    arms = run.arms
    teachers = [(one.arm, [one]) for one in (run.teacher, *run.more_teachers) if one]
    rows = [
        (
            name,
            f"{results[0].parameters / 1e6:.2f} M",
            top1_cell(results),
            mean_cell(results, "top5"),
            mean_cell(results, "agreement"),
            speed_cell(results[0]),
        )
        for name, results in [*teachers, *arms.items()]
    ]
    titles = ("", "parameters", "top-1", "top-5", "agrees with teacher", "images/s")
    # Turned, a table of many arms is too wide as well.
    spare = ("images/s", "parameters", "agrees with teacher") if len(rows) > 3 else ()
    shown: list[Fitted | Table | str] = [Fitted(titles, rows, title=_title(run), spare=spare)]
    if len(run.contrasts) > 1:
        shown.append(contrast_table(run))
    said = (_waiting(run), verdict(run), _more_seeds(run), _weak_teacher(run, arms), _baseline(run, arms))
    words = [words for words in said if words]
    if skipped := sum(result.skipped_images for result in run.results):
        words.append(f"{skipped} times an unreadable image was replaced; skipped.txt lists them")
    return [*shown, *words]


def _weak_teacher(run: Run, arms: dict[str, list[Result]]) -> str:
    """A note where the students are as accurate as the teacher."""
    scores = known(arms.get("distilled", []))
    if not scores or run.teacher is None or run.teacher.top1 is None or run.teacher.top1 > fmean(scores):
        return ""
    return (
        f"note: the teacher (top-1 {run.teacher.top1:.2f}) is no better than the student that it taught "
        f"({fmean(scores):.2f}): a better one may teach more"
    )


def _waiting(run: Run) -> str:
    """How long the device waited for images, where that is worth a cure."""
    recipe, shares = run.recipe, known(run.results, "data_wait")
    if not shares or (share := max(shares)) < WAIT_WORTH_SAYING:
        return ""
    cures = ["more --workers, where there are cores"] if recipe.workers is not None else []
    data = recipe.data or SAMPLE
    if recipe.input_backend == "pillow" and data.partition("/")[0].lower() not in STREAMS:
        cures.append("--input-backend torchvision")
    if recipe.cache_images == OFF and root_of(data, recipe.data_dir).is_dir():  # image files
        cures.append("--cache-images ram")
    return (
        f"note: the device waited for images {share:.0%} of the time"
        + (": " if cures else "")
        + ", or ".join(cures)
    )


def _more_seeds(run: Run) -> str:
    """The command that adds seeds, where there are too few for a verdict."""
    few = bool(run.contrasts) and all(one.found.n < MIN_SEEDS for one in run.contrasts)
    return f"with more seeds: {resuming(run.folder, '--seeds 5')}" if few else ""


def _baseline(run: Run, arms: dict[str, list[Result]]) -> str:
    """The command that shows whether distilling helped, where nothing has yet."""
    if not arms.get("distilled") or len(arms) > 1 or run.results[0].top1 is None:
        return ""
    try:
        without_teacher(parse(run.recipe.loss))
    except UserError:
        return ""
    return (
        f"whether distilling helped: {resuming(run.folder, f'--baseline --seeds {max(5, run.recipe.seeds)}')}"
    )


def _title(run: Run) -> str:
    by_neighbours = any(r.top1 is not None and r.loss is None for r in run.results)
    of = f"on the validation {'images, by their nearest neighbours' if by_neighbours else 'split'}"
    seeds = max(map(len, run.arms.values()))
    if seeds >= MIN_SEEDS:
        return f"{of}: ± 95 % over {seeds} seeds, (95 %) over images"
    return f"{of}: {f'means of {seeds} seeds, ' if seeds > 1 else ''}(95 %) over images"


def contrast_table(run: Run) -> Table:
    """The run's own arm beside each of the others, two lines for one: these images, and others like them."""
    found = run.contrasts
    table = Table(f"{found[0].first} −", box=None, title=f"differences seed by seed on {found[0].on_these}")
    for title in ("top-1", "95 % interval", "p (Holm)", "verdict"):
        table.add_column(title, no_wrap=True)
    for one in found:
        table.add_row(
            one.second, f"{one.found.mean:+.2f}", one.interval, one.significance, one.verdict or "–"
        )
        if one.on_others:
            table.add_row("  on other images", "", one.on_others, "", "")
    return table


def verdict(run: Run) -> str:
    """In words, without a place: is the run's own arm better than the others, seed by seed?"""
    found = run.contrasts
    if len(found) <= 1:
        return _in_words(found[0]) if found else ""
    claimed, first = [one for one in found if one.claims], found[0].first
    if not claimed and all(one.found.n < MIN_SEEDS for one in found):
        return too_few(min(one.found.n for one in found))
    said = []
    for word, words in ((BETTER, "BETTER than"), (WORSE, "WORSE than"), (NOT_SHOWN, f"{NOT_SHOWN} from")):
        if others := [one.second for one in found if one.verdict == word]:
            said.append(f"{words} {', '.join(others)}")
    if silent := [f"{one.second} ({_why_nothing(one)})" for one in found if not one.claims]:
        said.append(f"nothing can be said of {', '.join(silent)}")
    words = f"{first}: {'; '.join(said)}"
    if not claimed:
        return words
    seeds, least = min(one.found.n for one in claimed), max(one.found.detectable for one in claimed)
    compared = f"{len(claimed)} comparison{'s' if len(claimed) > 1 else ''}"
    return (
        f"{words}; over {seeds} seeds, p corrected for {compared}; as many seeds find a difference of "
        f"{least:.2f} points in four cases of five"
    )


def _why_nothing(one: Contrast) -> str:
    if one.found.n >= MIN_SEEDS:
        return "no spread"
    return "one seed" if one.found.n == 1 else f"{one.found.n} seeds"


def _in_words(one: Contrast) -> str:
    said = f"{one.first} − {one.second}: {one.sentence()}"
    if not one.claims:
        return said
    wider = f" ({one.on_others} on other images like these)" if one.on_others else ""
    least = f"{one.found.detectable:.2f} points in four cases of five"
    return f"{said}{wider}: {one.verdict}; as many seeds find a difference of {least}"


def in_macs(count: int) -> str:
    """Multiply-adds, in thousands of millions (G) or in millions (M)."""
    return f"{count / 1e9:.2f} G" if count >= 1e8 else f"{count / 1e6:.1f} M"


def _cross(size: tuple[int, int] | None) -> str:
    return "×".join(map(str, size or ()))


def mean_cell(results: Sequence[Result], figure: str = "top1", unit: str = "") -> str:
    """A figure's mean, with half its 95 % interval where there are seeds enough for one."""
    if not (values := known(results, figure)):
        return "–"
    [mean], [reach] = spread([values])
    return f"{mean:.2f}" + (f" ± {reach:.2f}" if len(values) >= MIN_SEEDS else "") + unit


def top1_cell(results: Sequence[Result]) -> str:
    """Top-1 over seeds; of a single model in the interval for images like these."""
    interval = results[0].top1_interval
    if len(results) > 1 or interval is None:
        return mean_cell(results)
    return f"{results[0].top1:.2f} ({interval[0]:.1f}–{interval[1]:.1f})"


def speed_cell(result: Result) -> str:
    if result.images_per_second is None:
        return "–"
    batch = f" at {result.speed_batch}" if result.speed_batch else ""
    return f"{result.images_per_second:,.0f}{batch}"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
