"""What the paper says, as arms of the study."""

from typing import NamedTuple


class Row(NamedTuple):
    """A line of a table: what it is, its arm, and the gain that the paper has for it."""

    label: str
    arm: str
    paper: str


def _with(teacher: str, rows: list[Row]) -> list[Row]:
    return [row._replace(arm=f"{row.arm} ({teacher})", label=f"{row.label}, wider teacher") for row in rows]


_DEEP = [
    Row("mimic, linear layer", "mimic last", "−1.06"),
    Row("mimic, correlation matrix", "correlation last", "−2.05"),
    Row("generate, cross-attention", "generate last, cross-attention", "−0.65"),
    Row("generate, self-attention", "generate last, self-attention", "+0.19"),
    Row("generate, convolutions", "generate last", "+0.30"),
]
_SHALLOW = [
    Row("mimic, linear layer", "mimic 0 1", "+0.70"),
    Row("mimic, correlation matrix", "correlation 0 1", "+0.85"),
    Row("generate, convolutions", "generate 0 1", "+0.27"),
]
_MODULES = [Row("MHA-out", "mimic 0 1 mha", "+0.64"), Row("FFN-out", "mimic 0 1", "+0.70")]
_MAIN = [
    Row("KD, labels at half weight", "kd half", "+0.59"),
    Row("NKD", "nkd", "+1.06"),
    Row("ViTKD", "vitkd", "+0.98"),
    Row("ViTKD + NKD", "vitkd + nkd", "+1.76"),
]


def _renamed(rows: list[Row], papers: tuple[str, ...]) -> list[Row]:
    return [row._replace(paper=paper) for row, paper in zip(_with("wider", rows), papers, strict=True)]


TABLES: dict[str, list[Row]] = {
    "Table 1: mimicking the last block, the last half, all": [
        Row("last block", "mimic last", "−1.06"),
        Row("last half", "mimic last half", "−0.66"),
        Row("all blocks", "mimic all", "−0.18"),
    ],
    "Table 2: the deep layer": _DEEP
    + _renamed(_DEEP, ("−0.70", "−2.22", "−0.44", "+0.23", "+0.37")),
    "Table 3: the shallow layers": _SHALLOW + _renamed(_SHALLOW, ("+0.89", "+0.52", "+0.44")),
    "Table 4: MHA-out and FFN-out of the shallow layers": _MODULES + _renamed(_MODULES, ("+0.60", "+0.89")),
    "Table 5: whole methods": _MAIN + _renamed(_MAIN, ("+1.59", "+2.26", "+1.64", "+3.36")),
    "Table 7: which layers to mimic": [
        Row("block 0", "mimic 0", "+0.59"),
        Row("block 1", "mimic 1", "+0.55"),
        Row("a middle block (2; the paper's 6)", "mimic 2", "+0.30"),
        Row("0 and 1", "mimic 0 1", "+0.70"),
        Row("0, 1 and the middle", "mimic 0 1 2", "+0.72"),
    ],
    "Table 8: a teacher of another architecture, shallow layers": [
        Row("CaiT", "mimic 0 1 (cait)", "−1.30"),
        Row("ViT", "mimic 0 1", "+0.70"),
        Row("wider ViT", "mimic 0 1 (wider)", "+0.89"),
    ],
    "Table 9: both losses": [
        Row("mimic alone", "mimic 0 1", "+0.70"),
        Row("generate alone", "generate last", "+0.30"),
        Row("both", "vitkd", "+0.98"),
    ],
    "Figure 5: the weights of ViTKD": [
        *(Row(f"α = {a}e-5", f"alpha {a}" if a != 3 else "vitkd", "") for a in (2, 3, 4, 5, 6)),
        *(Row(f"β = {b}e-6", f"beta {b}" if b != 3 else "vitkd", "") for b in (2, 4, 5, 6)),
    ],
    "The weights of ViTKD, with teachers of three widths": [
        Row(f"{words}, {wide} wide", f"{arm}{end}", "")
        for wide, end in ((48, " (narrow)"), (96, ""), (192, " (wider)"))
        for words, arm in (
            ("sums, the paper's", "vitkd sum"),
            ("means", "vitkd"),
            ("means of standardised targets", "vitkd layer"),
            ("`balance=0.1`", "vitkd balance 0.1"),
            ("`balance=0.3`", "vitkd balance 0.3"),
        )
    ],
    "The methods since, and timm's own": [
        Row("`kd`", "kd", ""),
        Row("`kd(temperature=4)`", "kd T4", ""),
        Row("`9*kd(temperature=2, standardize=true)`", "kd standardised", ""),
        Row("`dist`", "dist", ""),
        Row("`dkd`", "dkd", ""),
        Row("`vkd`", "vkd", ""),
        Row("`0.2*spectral`", "spectral", ""),
        Row("`relations`", "relations", ""),
        Row("`features`", "features", ""),
        Row("timm's LogitDistillationTask", "timm, logits", ""),
        Row("timm's FeatureDistillationTask", "timm, features", ""),
    ],
}  # fmt: skip

# Each guideline, and the pairs of arms of which the first has to be better.
GUIDELINES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "G1": ("the deep layer: generation rather than mimicking", (("generate last", "mimic last"),)),
    "G2": (
        "the shallow layers: mimicking helps, and more than generation",
        (("mimic 0 1", "alone"), ("mimic 0 1", "generate 0 1")),
    ),
    "G3": ("FFN-out rather than MHA-out", (("mimic 0 1", "mimic 0 1 mha"),)),
}
