"""docs/paper.md says what can be said: its formulas are read off the page, built and run."""

import re
from pathlib import Path

import pytest
import timm
import torch

from vitkd_cli.objective import Objective, parse
from vitkd_cli.terms import Batch
from vitkd_cli.training.gradients import TermGradients
from vitkd_cli.training.learner import Learner, Teacher
from vitkd_cli.training.log import gradient_shares
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import describe
from vitkd_cli.vit.taps import TappedViT, features

PAGE = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()


def section(title):
    return re.split(r"^## ", PAGE.partition(f"## {title}\n")[2], flags=re.M)[0]


def rows(title):
    """The cells of the section's table, its two lines of heading left out."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def code(text):
    return re.findall(r"`([^`]+)`", text)


TABLES = [
    (where, formula) for where, _, cell, _ in rows("Tables and figures as formulas") for formula in code(cell)
]
DIFFERENCES = rows("Where the paper's text and its code differ")
IN_THE_TEXTS_WAY = [formula for *_, cell in DIFFERENCES for formula in code(cell)]
[WHOLE_TEXT] = re.findall(
    r"^```\n(.*?)\n```$", section("Where the paper's text and its code differ"), re.M | re.S
)


def test_every_table_that_compares_objectives_is_there():
    wanted = {f"Table {number}" for number in (1, 2, 3, 4, 5, 7, 8, 9)} | {"Fig. 5a", "Fig. 5b"}
    assert wanted <= {where for where, _ in TABLES}
    assert len(TABLES) > 30 and len(IN_THE_TEXTS_WAY) == 6


@pytest.fixture(scope="module")
def vits():
    """A student of 12 blocks, and teachers of 12 and of 24; real, and small."""

    def make(name, **sizes):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=24, **sizes).eval()
        return model, describe(model)

    return (
        make("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=8, num_heads=2, depth=12),
        make("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, num_heads=3, depth=12),
        make("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=12, num_heads=3, depth=24),
    )


@pytest.mark.parametrize(
    "formula", dict.fromkeys([*(formula for _, formula in TABLES), *IN_THE_TEXTS_WAY, WHOLE_TEXT])
)
def test_every_formula_trains_with_teachers_of_12_and_24_blocks(formula, vits):
    (student, ours), *teachers = vits
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([3, 7])
    for teacher, theirs in teachers:
        objective = Objective(formula, ours, theirs)
        with torch.no_grad():
            target = TappedViT(teacher, objective.teacher_taps, theirs)(images)
        signals = TappedViT(student, objective.student_taps, ours)(images)
        batch = Batch(labels, generator=torch.Generator().manual_seed(0))
        total, raw = objective(signals, target, batch)
        assert total.isfinite() and all(value > 0 for value in raw.values())
        student.zero_grad()
        total.backward()
        assert student.get_parameter("patch_embed.proj.weight").grad.any()


def test_every_term_of_a_row_moves_the_student():
    """Each has a share of the student's gradient that is neither nothing nor all of it."""
    torch.manual_seed(0)
    student, teacher = (
        timm.create_model(f"deit_{size}_patch16_224", img_size=64, num_classes=100)
        for size in ("tiny", "small")
    )
    ours, theirs = describe(student), describe(teacher)
    images, labels = torch.rand(2, 3, 64, 64), torch.tensor([3, 70])
    said = {row: code(cell)[0] for _, row, cell, _ in rows("Tables and figures as formulas")}
    for formula in (said["last 6 layers"], said["last 6 layers, as PKD itself would"]):
        learner = Learner(student, Objective(formula, ours, theirs), ours)
        signals = Teacher(Model(teacher, theirs, "random"), learner.objective.teacher_taps)(images)
        raw = learner(images, signals, Batch(labels))[1]
        weights = {summand.name: summand.weight.number for summand in parse(formula).summands}
        gradients = TermGradients(learner.student)
        gradients.add(raw)
        shares = gradient_shares(gradients.norms(), weights, 0)
        assert 0.01 < shares["mimic/grad_share"] < 0.5, (formula, shares)


def test_one_formula_stands_for_the_rows_that_share_a_number():
    """The paper reports one run in several tables: 73.36, 75.12, 74.72 and 75.40 with the DeiT-S teacher."""
    said = {}
    for where, row, cell, _ in rows("Tables and figures as formulas"):
        said[where, row] = str(parse(code(cell)[0]))
    assert said["Table 1", "last layer"] == said["Table 2", "linear layer"]
    shallow = {("Table 3", "linear layer"), ("Table 4", "FFN"), ("Table 7", "layers 0 and 1")}
    assert len({said[row] for row in shallow}) == 1
    assert said["Table 2", "convolutional projector"] == said["Table 9", "generation"]
    assert said["Table 9", "both"] == said["Table 5", "Ours"]


def test_the_whole_text_is_all_its_ways_together(vits):
    [(_, ours), (_, theirs), _] = vits
    whole = {summand.name: dict(summand.options) for summand in parse(WHOLE_TEXT).summands}
    default = {summand.name: dict(summand.options) for summand in parse("labels + vitkd").summands}
    for summand in (each for formula in IN_THE_TEXTS_WAY for each in parse(formula).summands):
        if summand.name in ("mimic", "generate"):
            for option in summand.written:
                said = dict(summand.options)[option]
                assert said == whole[summand.name][option] != default[summand.name][option]
    text, code = (Objective(formula, ours, theirs) for formula in (WHOLE_TEXT, "labels + vitkd"))
    assert text.student_taps - code.student_taps == {features(11)}
    assert text.weights == code.weights


# Table 4: any feature term may read after the attention ------------------------------------------------


def residual_after_attention(model, images, block):
    """By hand: the stream through whole blocks, and then through one's attention alone."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    for each in model.blocks[:block]:
        x = each(x)
    last = model.blocks[block]
    return (x + last.ls1(last.attn(last.norm1(x))))[:, model.num_prefix_tokens :]


@pytest.mark.parametrize(
    "term",
    [
        'mimic(at="mha", blocks="0, 1.0")',
        'correlation(at="mha", blocks="0, 1.0")',
        'generate(at="mha")',
        'generate(at="mha", generator="cross_attention", block="1:3")',
        'generate(at="mha", generator="self_attention", masking="bernoulli")',
    ],
)
def test_attention_outputs_of_models_that_differ_in_everything(term):
    torch.manual_seed(0)
    student, teacher = (
        timm.create_model(name, img_size=32, num_classes=0, **sizes).eval()
        for name, sizes in (
            ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 3}),
            (
                "vit_small_patch14_reg4_dinov2",
                {"patch_size": 4, "embed_dim": 36, "num_heads": 3, "depth": 5},
            ),
        )
    )
    objective = Objective(term, describe(student), describe(teacher))
    images = torch.rand(2, 3, 32, 32)
    assert {tap.kind for tap in objective.student_taps} == {"attention_output"}

    def value(signals, target):
        return objective(signals, target, Batch(generator=torch.Generator().manual_seed(0)))[0]

    tapped = value(
        TappedViT(student, objective.student_taps)(images), TappedViT(teacher, objective.teacher_taps)(images)
    )
    by_hand = value(
        *(
            {tap: residual_after_attention(model, images, tap.block) for tap in taps}
            for model, taps in ((student, objective.student_taps), (teacher, objective.teacher_taps))
        )
    )
    torch.testing.assert_close(tapped, by_hand)
    tapped.backward()
    assert student.get_parameter("patch_embed.proj.weight").grad.any()
    assert all(parameter.grad is not None for parameter in objective.parameters())
