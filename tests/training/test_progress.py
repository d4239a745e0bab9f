"""The line that moves: every fact at 80 columns, the time left of the whole job, and what the log holds."""

from __future__ import annotations

import io
import re

import pytest
import torch

from vitkd_cli.progress import Pace, Reporter, Stage
from vitkd_cli.terminal import Terminal

STAGES = [Stage("teacher", 100, 3), *(Stage(f"student {n} of 10", 1000, 4) for n in range(1, 11))]


def drawn(reporter: Reporter) -> list[str]:
    """The lines of the bar as they stand."""
    console = Terminal(
        file=io.StringIO(), force_terminal=True, width=reporter.console.width, color_system=None
    )
    console.print(reporter._line())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def reporter(width: int = 80, height: int = 24) -> Reporter:
    console = Terminal(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    return Reporter(console)


TERMS = "labels 2.301  vitkd.mimic 0.1234  vitkd.generate 0.0311  nkd 1.234  lr 1.25e-04"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_every_fact_is_on_the_line(width):
    told = reporter(width)
    told.stages, told.stage = STAGES, 10
    with told.bar("distilled (seed 46)", 300_000, 298_000, per_epoch=1000, images=4096) as bar:
        told._bars[0].began -= 7 * 3600
        for update in (299_000, 299_100):
            bar.advance(update, TERMS, loss=torch.tensor(12.3456))
        first, second = drawn(told)
        assert "…" not in first + second and max(len(first), len(second)) <= width
        for fact in ("10", "epoch 300/300", "left", "loss 12.346", "/s"):
            assert fact in first
        assert len(re.findall("[━╸╺]", first)) >= 6
        assert second.startswith("labels 2.301  vitkd.mimic 0.1234")
        assert second in TERMS and (second == TERMS or len(second) > width - 25)


def test_the_line_moves_with_every_update_and_reads_the_loss_when_it_is_drawn():
    told, loss = reporter(), torch.zeros(())
    with told.bar("student", 1000, per_epoch=10, images=8) as bar:
        bar.advance(1, loss=loss)
        before = drawn(told)[0]
        loss.fill_(2.5)
        bar.advance(500)
        after = drawn(told)[0]
    assert "loss 0.000" in before and "epoch 1/100" in before
    assert "loss 2.500" in after and "epoch 51/100" in after and "50%" in after


def test_the_time_left_is_that_of_the_whole_job():
    told = reporter()
    told.stages, told.stage = STAGES, 0
    with told.bar("teacher", 100, per_epoch=10, images=8) as bar:
        told._bars[0].began -= 50  # seconds for 50 updates of cost 3
        bar.advance(50)
        assert told.left() == pytest.approx(50 + 10 * 1000 * 4 / 3, rel=0.01)
        with bar.bar("validation", 10) as inner:
            inner.advance(5)
            (line,) = drawn(told)
            assert line.startswith("teacher epoch 6/10 validation") and "50%" in line and "3:43:" in line
    told.stage = 10
    with told.bar("alone", 1000, per_epoch=10, images=8) as bar:
        told._bars[0].began -= 50
        bar.advance(50)
        assert told.left() == pytest.approx(950, rel=0.01)


def test_brackets_of_a_title_are_shown():
    told = reporter()
    with told.bar("[draft] eval", 10) as bar:
        bar.advance(3, "runs/[x]")
        assert "[draft] eval runs/[x]" in drawn(told)[0]


def test_a_short_run_has_twenty_lines(tiny, tmp_path, read_log, cli, flags):
    values = {**tiny, "epochs": 8, "log_interval": 50, "loss": "labels"}
    code, out, err = cli("distill", *flags(values), "--output", str(tmp_path / "run"))
    assert code == 0, err
    lines = [line for line in read_log(tmp_path / "run") if "event" not in line]
    assert len(lines) >= 20  # of 40 updates
    assert re.search(r"epoch +1  top-1 .*  loss \d\.\d+ train \d\.\d+", out)


def test_a_slow_run_has_a_line_a_minute(tiny, tmp_path, read_log, cli, flags, monkeypatch):
    clock = iter(range(0, 10**6, 61))
    monkeypatch.setattr("vitkd_cli.training.log.time.monotonic", lambda: float(next(clock)))
    values = {**tiny, "epochs": 9, "log_interval": 50, "loss": "labels", "val_interval": 9}
    assert cli("distill", *flags(values), "--output", str(tmp_path / "run"), "-q")[0] == 0
    lines = [line for line in read_log(tmp_path / "run") if "event" not in line]
    assert len(lines) == 45  # one an update: each took more than a minute


def test_waiting_for_images_is_counted_after_the_first_batch(monkeypatch):
    now = iter([0.0, 0.0, 5.0, 10.0, 13.0, 15.0, 15.0, 25.0])  # the first batch takes 5 s, the second 3
    monkeypatch.setattr("vitkd_cli.progress.time.perf_counter", lambda: next(now))
    pace, batches = Pace(), iter("ab")
    assert pace.share == 0.0
    assert pace.next(batches) == "a"
    assert pace.next(batches) == "b"
    pace.add(30)
    assert pace.told() == (2.0, 0.2)
    assert pace.share == 0.3 and pace.told() == (0.0, 0.0)
