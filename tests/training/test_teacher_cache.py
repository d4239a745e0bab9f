"""A cached teacher says what the live one says, whatever happened while the cache was written."""

from __future__ import annotations

import pytest
import torch

from vitkd_cli import Recipe, UserError, distill
from vitkd_cli.progress import Reporter
from vitkd_cli.training.learner import Learner


def test_the_views_of_the_cached_epochs_come_again(tiny, tmp_path, monkeypatch):
    seen, real = [], Learner.forward

    def forward(self, images, signals, batch):
        if len(images) == 20:  # rehearsals have fewer
            seen.append((images.clone(), batch.targets, batch.generator.initial_seed()))
        return real(self, images, signals, batch)

    monkeypatch.setattr(Learner, "forward", forward)
    values = {**tiny, "teacher": None, "loss": "labels", "steps": 12, "epochs": 3, "cached_epochs": 2}
    distill(Recipe(**values, output=str(tmp_path / "run")), reporter=Reporter(silent=True))
    assert len(seen) == 12  # five updates an epoch
    for update, (images, targets, masks) in enumerate(seen):
        for earlier in range(update):
            again = update - earlier == 10
            assert torch.equal(images, seen[earlier][0]) is again
            assert torch.equal(targets, seen[earlier][1]) is again
            assert masks != seen[earlier][2]


def test_views_cannot_come_again_in_another_mixing():
    with pytest.raises(UserError, match="mixed before epoch 5"):
        Recipe(epochs=10, cached_epochs=2, mixup_off_epoch=5)
    Recipe(epochs=10, cached_epochs=10, mixup_off_epoch=5)
