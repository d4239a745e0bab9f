"""What holds for every term there is, the one included whose author has not written a test yet."""

import re
import sys

import pytest
import torch

from vitkd_cli.objective import Objective
from vitkd_cli.options import declared
from vitkd_cli.terms import Batch, registered_terms
from vitkd_cli.vit.taps import DISTILL_LOGITS, LOGITS

EVERY_TERM = pytest.mark.parametrize("name", registered_terms())
HARD = torch.tensor([3, 0, 23, 7])
MIXED = 0.7 * torch.nn.functional.one_hot(HARD, 24) + 0.3 * torch.nn.functional.one_hot(HARD.flip(0), 24)


@pytest.fixture
def vits(spec):
    return spec(48, classes=24, distilled=True), spec(64, depth=4, classes=24)


def signal(vit, tap, dtype=torch.float32):
    """A random tensor of the shape that the tap has; four images."""
    block = vit.blocks[tap.block or 0]
    tokens = block.grid[0] * block.grid[1]
    every = tokens + block.num_prefix_tokens
    shape = {
        "logits": (4, vit.num_classes),
        "distill_logits": (4, vit.num_classes),
        "embedding": (4, vit.embed_dim),
        "final": (4, tokens, vit.final_dim),
        "final_prefix": (4, vit.num_prefix_tokens, vit.final_dim),
        "prefix": (4, block.num_prefix_tokens, block.dim),
        "attention": (4, block.heads, every, every),
        "qkv": (3, 4, block.heads, every, block.dim // block.heads),
    }.get(tap.kind, (4, tokens, block.dim))
    tensor = torch.randn(shape)
    return (tensor.softmax(-1) if tap.kind == "attention" else tensor).to(dtype)


def build(name, vits, dtype=torch.float32):
    torch.manual_seed(0)
    objective = Objective(name, *vits)
    student = {tap: signal(vits[0], tap, dtype).requires_grad_() for tap in objective.student_taps}
    teacher = {tap: signal(vits[1], tap, dtype) for tap in objective.teacher_taps}
    return objective, student, teacher


def batch(targets=HARD):
    return Batch(targets, generator=torch.Generator().manual_seed(5))


@EVERY_TERM
@pytest.mark.parametrize("targets", [HARD, MIXED], ids=["hard", "mixed"])
def test_it_is_a_finite_scalar_whose_gradient_reaches_everything(name, targets, vits):
    objective, student, teacher = build(name, vits)
    total, raw = objective(student, teacher, batch(targets))
    assert total.shape == () and total.isfinite() and list(raw) == [name]
    total.backward()
    for reached in [*student.values(), *objective.parameters()]:
        assert reached.grad is not None and reached.grad.isfinite().all() and reached.grad.any()


@EVERY_TERM
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_signals_are_compared_in_float32(name, dtype, vits):
    objective, student, teacher = build(name, vits, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, raw = objective(student, teacher, batch())
    assert total.dtype == raw[name].dtype == torch.float32 and total.isfinite()
    total.backward()
    exact, _ = objective(
        {tap: x.float() for tap, x in student.items()},
        {tap: x.float() for tap, x in teacher.items()},
        batch(),
    )
    torch.testing.assert_close(total, exact, rtol=1e-6, atol=0)
    for tensor in student.values():
        assert tensor.grad.dtype == dtype and tensor.grad.isfinite().all()


@pytest.mark.parametrize("name", [*registered_terms(), "generate(masked_only=false)"])
def test_products_in_bf16_have_nearly_the_same_gradients(name, vits):
    gradients = []
    for bf16 in (False, True):
        objective, student, teacher = build(name, vits)
        objective.bf16 = bf16
        objective(student, teacher, batch())[0].backward()
        gradients.append([one.grad for one in (*student.values(), *objective.parameters())])
    for exact, close in zip(*gradients, strict=True):
        assert (exact - close).norm() <= 0.01 * exact.norm()


@EVERY_TERM
def test_double_precision_stays(name, vits):
    objective, student, teacher = build(name, vits, torch.float64)
    total, _ = objective.double()(student, {tap: x.float() for tap, x in teacher.items()}, batch())
    assert total.dtype == torch.float64


@EVERY_TERM
def test_logit_gaps_of_a_thousand_give_finite_losses_and_gradients(name, vits):
    objective, student, teacher = build(name, vits)
    read = [logits for tap, logits in student.items() if tap in (LOGITS, DISTILL_LOGITS)]
    if not read:
        pytest.skip("reads no logits")
    [logits] = read
    with torch.no_grad():
        logits.copy_(torch.linspace(-500, 500, 24).expand(4, 24))
        if LOGITS in teacher:
            teacher[LOGITS].copy_(torch.linspace(500, -500, 24).expand(4, 24))
    total, _ = objective(student, teacher, batch())
    total.backward()
    assert total.isfinite() and total > 1
    assert logits.grad.isfinite().all()


@EVERY_TERM
def test_it_cites_its_paper_and_explains_its_options(name):
    term = registered_terms()[name]
    for text in (term.__doc__, sys.modules[term.__module__].__doc__):
        assert re.search(r"arXiv:\d{4}\.\d{4,5}", text) and re.search(r"\b(19|20)\d\d\b", text)
    assert term.__module__ == f"vitkd_cli.terms.{name}"
    for option in declared(term).values():
        assert option.option.help.endswith("."), option.name


@EVERY_TERM
def test_it_says_beforehand_whether_it_uses_a_teacher(name, vits):
    term = registered_terms()[name]
    objective, *_ = build(name, vits)
    assert term.uses_teacher == bool(objective.teacher_taps)
    reads = any(tap.kind == "logits" for tap in objective.teacher_taps)
    assert term.reads_teacher_logits == reads == objective.needs_teacher_logits


@EVERY_TERM
def test_it_needs_labels_only_if_it_says_so(name, vits):
    objective, student, teacher = build(name, vits)
    if objective.uses_labels:
        with pytest.raises(AssertionError):
            objective(student, teacher, batch(None))
    else:
        total, _ = objective(student, teacher, batch(None))
        assert total.isfinite()


def test_the_terms_of_the_paper_are_there():
    assert {"labels", "kd", "nkd", "mimic", "generate"} <= set(registered_terms())
