"""Balanced terms in a run, and the gradients that their weights follow from."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

import pytest
import torch
from heard import Heard
from torch import nn

import vitkd_cli as vitkd
from vitkd_cli import balance
from vitkd_cli.progress import Reporter
from vitkd_cli.terms import Term, term
from vitkd_cli.training import trainer
from vitkd_cli.training.gradients import TermGradients
from vitkd_cli.vit.taps import LOGITS

# Half of vitkd's share is generate's; features asks for a second view of the images.
LOSS = "labels + vitkd(balance=0.2) + features(balance=0.3) + kd*linear(0.5, 1)"


@pytest.fixture(scope="module")
def run(tiny, read_log, tmp_path_factory):
    def run(reporter=None, **changes):
        folder = tmp_path_factory.mktemp("balance") / "run"
        recipe = vitkd.Recipe(**{**tiny, "loss": LOSS, **changes}, output=str(folder))
        vitkd.distill(recipe, reporter=reporter or Reporter(silent=True))
        lines = read_log(folder)
        gradients = [line for line in lines if line.get("event") == "gradients"]
        return [line for line in lines if "event" not in line], gradients

    return run


def test_the_shares_are_reached_and_held_and_the_log_says_so(run, monkeypatch):
    monkeypatch.setattr(balance, "EVERY", 4)
    updates, gradients = run(epochs=6, log_grads=1)
    assert len(updates) == len(gradients) == 30
    assert gradients[0]["mimic/grad_share"] == gradients[0]["features/grad_share"] == 0
    asked = {"mimic": 0.1, "generate": 0.1, "features": 0.3}
    for name, share in asked.items():
        held = [line[f"{name}/grad_share"] for line in gradients[8:]]
        assert fmean(held) == pytest.approx(share, rel=0.3), name  # one batch scatters by a factor of 1.5
        weights = [line[f"{name}/weight"] for line in updates]
        assert weights[0] == 0 < weights[1]
        moved = [n for n, (one, other) in enumerate(pairwise(weights), 1) if one != other]
        assert moved == list(range(1, 30, 4))  # after the updates that estimate, and at no other time
    for line in updates:
        assert line["features/weighted"] == pytest.approx(line["features"] * line["features/weight"])
        weighted = sum(value for key, value in line.items() if key.endswith("/weighted"))
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)


def test_terms_that_drown_the_others_are_told_once(run, monkeypatch):
    heard = Heard()
    monkeypatch.setattr(trainer, "_TELLING", 5)
    _, [gradients] = run(heard, steps=6, loss="labels + 100*mimic")
    assert gradients["update"] == 1
    [line] = [line for line in heard.lines if "of the student's gradient" in line]
    assert "at update 1 100.0% of the student's gradient is that of mimic" in line


@pytest.mark.parametrize(
    ("changes", "rel"),
    [({"grad_checkpointing": True}, 1e-5), ({"model_ema": True}, 0), ({"mixed_precision": "bf16"}, 0.05)],
    ids=str,
)
def test_what_changes_no_gradient_changes_no_weight(run, changes, rel):
    values = {"steps": 2, "shots": 4}
    plain, other = run(**values), run(**values, **changes)
    weights = [{k: v for k, v in lines[0][1].items() if k.endswith("/weight")} for lines in (plain, other)]
    assert weights[0]["features/weight"] > 0
    assert weights[0] == pytest.approx(weights[1], rel=rel)


def test_a_term_without_a_gradient_at_the_student_is_told_once(run, registry, monkeypatch):
    @term("apart")
    class Apart(Term):
        compares = ((LOGITS, None),)
        uses_teacher = False

        def __init__(self, student, teacher):
            super().__init__()
            self.own = nn.Parameter(torch.ones(2))

        def forward(self, pairs, batch):
            return self.own.square().sum()

    told: list[str] = []
    monkeypatch.setattr(balance, "EVERY", 2)
    monkeypatch.setattr(Reporter, "warn", lambda self, line: told.append(line))
    updates, gradients = run(loss="labels + apart(balance=0.5)", epochs=3, shots=4)
    assert len(gradients) == 3 and all(line["apart/grad_share"] == 0 for line in gradients)
    assert all(line["apart/weight"] == 0 for line in updates)
    assert [line for line in told if "no gradient" in line] == [
        "student: at update 1 apart has no gradient at the student: its weight is left"
    ]


def test_gradients_are_those_of_the_sum_over_micro_batches():
    torch.manual_seed(0)
    net, images = nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    net.bias.requires_grad_(False)

    def terms(part):
        return {"one": net(part).square().mean(), "other": (7 * net(part)).mean(), "none": part.sum()}

    whole, parts = TermGradients(net), TermGradients(net, steps=3)
    whole.add(terms(images))
    for part in images.chunk(3):
        parts.add(terms(part))
    assert whole.norms() == pytest.approx(parts.norms(), rel=1e-12)
    [expected] = torch.autograd.grad(terms(images)["one"], net.weight)
    assert whole.norms() == {
        "one": pytest.approx(float(expected.norm()), rel=1e-12),
        "other": pytest.approx(7 * float(images.mean(0).norm()) / 3**0.5, rel=1e-12),
        "none": 0,
    }
    assert net.weight.grad is None


def test_small_and_large_terms_keep_their_gradients_in_float16():
    """1e-9 is 0 there and 1e9 infinite; a scaler alone, which is one for all terms, would lose them."""
    torch.manual_seed(0)
    net, images = nn.Linear(4, 3), torch.randn(6, 4)
    halves = nn.Linear(4, 3).half()
    halves.load_state_dict(net.state_dict())

    def terms(out):
        value = out.float().square().mean()
        return {"small": 1e-9 * value, "one": value, "large": 1e9 * value, "zero": 0 * value}

    exact, scaled = TermGradients(net), TermGradients(halves, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    exact.add(terms(net(images)))
    scaled.add(terms(halves(images.half())))
    assert exact.norms() == pytest.approx(scaled.norms(), rel=0.01)
