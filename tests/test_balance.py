"""Weights that hold terms at their shares of the gradient."""

from __future__ import annotations

import math

import pytest
import torch

from vitkd_cli.balance import EVERY, Balance


def shares(weights, norms):
    total = sum(abs(weights[name]) * norm for name, norm in norms.items())
    return {name: abs(weights[name]) * norm / total for name, norm in norms.items()}


def test_after_an_estimate_the_shares_are_those_asked_for():
    """For gradients as they were then, whatever the other terms' weights, the maximised one's included."""
    norms = {"labels": 2.0, "mimic": 5e3, "kd": 0.3, "generate": 1e-6}
    balance, asked = (
        Balance(["mimic", "generate"]),
        {"labels": 1.0, "mimic": 0.1, "kd": -4.0, "generate": 0.3},
    )
    assert balance.weights(asked) == {"mimic": 0, "generate": 0}  # nothing is known before the first estimate
    assert balance.estimate(norms, asked | balance.weights(asked)) == []
    reached = shares(asked | balance.weights(asked), norms)
    assert reached["mimic"] == pytest.approx(0.1) and reached["generate"] == pytest.approx(0.3)
    # A schedule moves the shares between estimates, with no new one.
    later = asked | {"mimic": 0.05, "generate": 0.5}
    reached = shares(later | balance.weights(later), norms)
    assert reached["mimic"] == pytest.approx(0.05) and reached["generate"] == pytest.approx(0.5)


def test_one_odd_batch_moves_a_weight_by_half_of_its_factor():
    balance, norms, weights = Balance(["kd"]), {"labels": 1.0, "kd": 1.0}, {"labels": 1.0, "kd": 0.2}
    balance.estimate(norms, weights)
    before = balance.weights(weights)["kd"]
    balance.estimate(norms | {"kd": 1 / 16}, weights)
    assert balance.weights(weights)["kd"] == pytest.approx(4 * before)
    for _ in range(7):  # what lasts is followed
        balance.estimate(norms | {"kd": 1 / 16}, weights)
    assert balance.weights(weights)["kd"] == pytest.approx(16 * before, rel=0.02)


def test_estimates_are_due_in_the_first_update_and_now_and_then():
    balance = Balance(["kd"])
    assert balance.due(0) and balance.due(1)
    balance.estimate({"labels": math.inf, "kd": 1.0}, {"labels": 1.0, "kd": 0.0})  # a scaler's overflow
    assert balance.due(1)
    balance.estimate({"labels": 1.0, "kd": 1.0}, {"labels": 1.0, "kd": 0.0})
    assert [update for update in range(3 * EVERY) if balance.due(update)] == [0, EVERY, 2 * EVERY]
    balance.estimate({"labels": math.nan, "kd": 1.0}, {"labels": 1.0, "kd": 0.0})
    assert balance.weights({"kd": 0.5}) == {"kd": 1.0}


def test_where_there_is_no_gradient_the_weight_is_left_and_it_is_said():
    balance, weights = Balance(["kd", "mimic"]), {"labels": 1.0, "kd": 0.2, "mimic": 0.2}
    [said] = balance.estimate({"labels": 1.0, "kd": 0.0, "mimic": 1.0}, weights)
    assert said.startswith("kd has no gradient")
    assert balance.weights(weights) == {"kd": 0, "mimic": pytest.approx(1 / 3)}
    assert not balance.due(1)  # it costs no more than other terms
    assert balance.estimate({"labels": 1.0, "kd": 1.0, "mimic": 1.0}, weights) == []
    assert balance.weights(weights)["kd"] == pytest.approx(1 / 3)
    [said] = balance.estimate({"labels": 0.0, "kd": 1.0, "mimic": 1.0}, weights)
    assert "to balance others against" in said
    assert balance.weights(weights)["kd"] == pytest.approx(1 / 3)


def test_its_state_is_a_tensor_that_restores_it_to_the_bit():
    balance, other = Balance(["kd", "mimic"]), Balance(["kd", "mimic"])
    balance.ratios = {"kd": 1 / 3, "mimic": math.nan}
    state = balance.state_dict()
    assert all(isinstance(value, torch.Tensor) and value.shape == (2,) for value in state.values())
    other.load_state_dict(state)
    assert other.ratios["kd"] == 1 / 3 and math.isnan(other.ratios["mimic"])
