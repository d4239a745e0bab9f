"""What one of several processes is refused before they are joined, all are."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from vitkd_cli import UserError, meeting
from vitkd_cli.evaluation.accuracy import evaluate_all
from vitkd_cli.processes import LostProcess

FACTS = {"message": "no such run", "hint": "name another", "exit_code": 2, "details": []}
FINE = {"refused": None, "finds": "no run", "host": "a"}


@pytest.fixture
def meets(monkeypatch):
    """One of two processes, whose store the other one has written into; what it says itself."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(meeting.platform, "node", lambda: "a")
    monkeypatch.setattr(meeting, "_stores", [])

    def begin(number, written):
        store = torch.distributed.HashStore()
        store.set_timeout(timedelta(seconds=0.1))
        own = torch.distributed.PrefixStore("vitkd/0/0", store)
        for key, value in written.items():
            own.set(key, json.dumps(value))
        monkeypatch.setattr(
            sys.modules["torch.distributed.rendezvous"],
            "rendezvous",
            lambda *_, **__: iter([(store, number, 2)]),
        )
        return own

    return begin


def test_the_first_process_hears_what_another_is_refused(meets):
    refused = {**FINE, "refused": FACTS, "host": "b"}
    store = meets(0, {"1": refused, "1 heard": ""})
    with pytest.raises(UserError, match=r"no such run \(on b, and not on a\)") as refusal:
        meeting.meet("no run", 9)
    assert refusal.value.told_by_another and refusal.value.hint == "name another"
    assert json.loads(store.get("verdict"))[0] == 1


@pytest.mark.parametrize("teller", [0, 1])
def test_one_of_those_that_are_refused_says_it(meets, teller):
    meets(1, {"verdict": [teller, FACTS]})
    with pytest.raises(UserError, match="no such run") as refusal, meeting.refused_together():
        raise UserError("mine")
    assert refusal.value.told_by_another is (teller == 0)


def test_processes_that_find_other_runs_are_refused(meets):
    meets(0, {"1": {**FINE, "host": "b"}, "1 heard": ""})
    with pytest.raises(UserError, match="on a, finds a finished run, and process 1, on b, no run"):
        meeting.meet("a finished run", 9)
    meeting._stores.clear()
    meets(0, {"1": FINE, "1 heard": ""})
    meeting.meet("no run", 9)  # both find the same


def test_where_the_others_do_not_come_a_refusal_is_said_all_the_same(meets):
    meets(0, {})
    with pytest.raises(UserError, match=r"^mine$"), meeting.refused_together():
        raise UserError("mine")
    meeting._stores.clear()
    with pytest.raises(LostProcess, match="waited 9 s for the other processes") as lost:
        meeting.meet("no run", 9)
    assert lost.value.exit_code == 3


def test_a_process_alone_meets_nobody():
    meeting.meet("no run", 9)
    with pytest.raises(UserError, match="mine") as refusal, meeting.refused_together():
        raise UserError("mine")
    assert refusal.value.told_by_another is None


@pytest.mark.parametrize("teller", [0, 1])
def test_what_several_processes_cannot_score_is_said_once(meets, cli, teller):
    meets(1, {"verdict": [teller, FACTS]})
    code, _, err = cli("eval", "vit_tiny", "deit_tiny", "--checkpoint", "weights.pth")
    assert code == 2 and ("no such run" in err) is (teller == 1)


def test_a_model_that_one_of_several_processes_lacks_is_refused_by_all(monkeypatch):
    told = iter((None, FACTS))
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [next(told), *mine])
    two = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cpu"))
    with pytest.raises(UserError, match="no model") as refused:
        evaluate_all(["no model"], accelerator=two)
    assert not refused.value.told_by_another
    with pytest.raises(UserError, match="no such run") as refused:
        evaluate_all(["no model"], accelerator=two)
    assert refused.value.told_by_another


@pytest.mark.slow
def test_a_run_folder_that_one_machine_lacks_is_refused_by_both(tmp_path):
    for node in "01":
        (tmp_path / node).mkdir()
    (tmp_path / "0" / "run").mkdir()
    (tmp_path / "0" / "run" / "recipe.toml").write_text(
        'schema = 1\nteacher = "deit3_small"\nstudent = "deit_tiny"\n'
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "vitkd_cli", "distill", "--resume", "run"],
            cwd=tmp_path / node,
            env={**os.environ, **world, "RANK": node, "LOCAL_RANK": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in "01"
    ]
    said = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [2, 2], said
    assert said[0] == ""
    assert said[1].startswith("error: rank 1: run is no run folder: it has no recipe.toml")
