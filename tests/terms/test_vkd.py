import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch
from vitkd_cli.terms.vkd import VkD
from vitkd_cli.training.checkpoint import Progress, save
from vitkd_cli.vit.taps import FINAL, Tap, features

WIDTHS = pytest.mark.parametrize("width", [6, 8], ids=["narrower", "as wide"])


def loss_of(term, student, teacher):
    return term([(student, teacher)], Batch())


@WIDTHS
def test_loss_and_gradient_are_those_of_the_equation(width, spec):
    torch.manual_seed(0)
    term = VkD(spec(width, grid=(2, 3)), spec(8, grid=(3, 3))).double()
    student = (4 * torch.randn(5, 6, width, dtype=torch.float64)).requires_grad_()
    teacher = torch.randn(5, 9, 8, dtype=torch.float64)
    loss = loss_of(term, student, teacher)
    loss.backward()

    s, t = student.detach().numpy().mean(1), teacher.numpy().mean(1)
    projection = term.project.weight.detach().numpy()
    t = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, keepdims=True) + 1e-5)
    error = s @ projection.T - t
    assert (np.abs(error) < 1).any() and (np.abs(error) > 1).any()  # both branches
    expected = np.where(np.abs(error) < 1, error**2 / 2, np.abs(error) - 0.5).mean()
    assert abs(loss.item() - expected) <= 1e-12 * expected
    gradient = np.clip(error, -1, 1) @ projection / error.size / 6  # of the mean over 6 tokens
    worst = np.abs(student.grad.numpy() - gradient[:, None]).max() / np.abs(gradient).max()
    assert worst <= 1e-12


@WIDTHS
def test_training_turns_the_projection_and_leaves_it_orthonormal(width, spec):
    torch.manual_seed(0)
    term = VkD(spec(width), spec(8))
    student = torch.randn(64, 1, width).expand(-1, 16, -1)
    turn, _ = torch.linalg.qr(torch.randn(8, width))  # what there is to find
    teacher = student @ turn.T
    optimizer = torch.optim.AdamW(term.parameters(), lr=0.02, weight_decay=0.05)
    losses = []
    for _ in range(60):
        losses.append(loss_of(term, student, teacher))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    weight = term.project.weight.detach()
    torch.testing.assert_close(weight.T @ weight, torch.eye(width), atol=1e-5, rtol=0)


def test_the_teacher_s_scale_and_offset_do_not_matter(spec):
    torch.manual_seed(0)
    term = VkD(spec(6), spec(8))
    student, teacher = torch.randn(3, 16, 6), torch.randn(3, 16, 8)
    once, again = loss_of(term, student, 10 * teacher), loss_of(term, student, 1000 * teacher + 3)
    torch.testing.assert_close(once, again, rtol=1e-4, atol=0)


def test_a_wider_student_is_refused(spec):
    with pytest.raises(UserError, match="big is 9 wide and small 8"):
        VkD(spec(9, name="big"), spec(8, name="small"))


def test_the_last_block_of_each_is_read_by_the_rule_of_all(spec):
    student, teacher = spec(6, depth=2), spec(8, depth=5)
    assert VkD(student, teacher).compares == [(FINAL, FINAL)]
    assert VkD(student, teacher, norm="raw").compares == [(features(1), features(4))]
    assert VkD(student, teacher, at="mha").compares == [
        (Tap("attention_output", 1), Tap("attention_output", 4))
    ]


@WIDTHS
def test_a_checkpoint_and_a_copy_hold_the_same_projection(width, spec, tmp_path):
    torch.manual_seed(0)
    term, other = VkD(spec(width), spec(8)), VkD(spec(width), spec(8))
    twin = copy.deepcopy(term)
    assert not torch.equal(term.project.weight, other.project.weight)
    path = save(tmp_path, Progress(), {"term": term.state_dict()}, {}, keep=1)
    other.load_state_dict(load_file(path / "term.safetensors"))  # strictly
    assert torch.equal(term.project.weight, other.project.weight)
    assert torch.equal(term.project.weight, twin.project.weight)


@pytest.mark.parametrize("teacher", ["deep", "oblong", "registers", "tokenless", "swin"])
@pytest.mark.parametrize("options", ["", '(at="mha")'])
def test_models_of_every_shape_teach(teacher, options, learn):
    _, learner = learn(f"vkd{options}", "flat", teacher)
    [projection] = learner.objective.parameters()
    groups = learner.optimizer_groups(0.05, None)
    assert sum(any(p is projection for p in group["params"]) for group in groups) == 1


def test_a_hierarchical_student_learns_from_a_flat_teacher(learn):
    _, learner = learn("vkd", "swin", "deep")
    assert learner.objective.student_taps == {FINAL}
