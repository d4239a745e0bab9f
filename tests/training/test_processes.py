"""The number of processes and of accumulation steps changes nothing but the time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitkd_cli import UserError, distill, session
from vitkd_cli import processes as launch
from vitkd_cli.data.keyed import lost_worker
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session
from vitkd_cli.training import start

# Mixup, cutmix, erasing and random masks are all on by default; the global batch is 20 in each. Terms that
# compare images see those of all processes, but not those of several steps. Gradients of terms are
# those of the global batch.
SPLITS = {
    "two processes": {"num_processes": 2, "loss": f"{Recipe.loss} + dist(balance=0.1)"},
    "two steps": {"grad_accum_steps": 2, "loss": f"{Recipe.loss} + mimic(blocks=-1, balance=0.1)"},
}

LONG = {"num_processes": 2, "batch_size": 10, "epochs": 300}


@pytest.fixture(scope="module")
def curve(tiny, read_log, tmp_path_factory):
    def run(**changes):
        folder = tmp_path_factory.mktemp("processes") / "run"
        values = {**tiny, "epochs": 3, "steps": 12, "log_grads": 4, **changes}
        distill(Recipe(**values, output=str(folder)), reporter=Reporter(silent=True))
        return read_log(folder)

    return run


def assert_same(ours, theirs, rel):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        numbers = [{k: v for k, v in line.items() if k != "event"} for line in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=rel, abs=1e-9)


@pytest.mark.parametrize(
    ("dtype", "rel"), [("float64", 1e-9), pytest.param("float32", 2e-3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_the_loss_curve_is_that_of_one_process(curve, split, dtype, rel):
    alone = curve(loss=split["loss"], model_dtype=dtype)
    assert len(alone) > 12  # updates and validations
    assert sum(line.get("event") == "gradients" for line in alone) == 4
    assert_same(alone, curve(**split, batch_size=10, model_dtype=dtype), rel)


@pytest.mark.parametrize(
    ("batch", "processes", "shared"), [(20, 2, (10, 1)), (10, 4, (5, 1)), (8, 5, (4, 1)), (3, 1, (2, 10))]
)
def test_as_many_images_an_update_on_any_number_of_processes(batch, processes, shared):
    recipe = Recipe(batch_size=batch, num_processes=processes)
    session = SimpleNamespace(accelerator=SimpleNamespace())
    found = Session.keep_global_batch(session, 20, recipe)
    assert (found.batch_size, found.grad_accum_steps) == shared
    assert session.accelerator.gradient_accumulation_steps == shared[1]
    with pytest.raises(UserError, match="an update has 20 images, which 3 processes cannot share"):
        Session.keep_global_batch(session, 20, recipe.but(num_processes=3))


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one(tiny, curve, at_step, read_log, tmp_path):
    values = {
        **tiny,
        "epochs": 3,
        "steps": 12,
        "log_grads": 4,
        "loss": "labels + kd",
        "model_dtype": "float64",
    }
    run = Recipe(**values, recovery_interval=3, output=str(tmp_path / "run"))
    at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match="SIGTERM"):
        distill(run, reporter=Reporter(silent=True))
    distill(resume=tmp_path / "run", machine={"num_processes": 2}, reporter=Reporter(silent=True))
    assert_same(curve(loss="labels + kd", model_dtype="float64"), read_log(tmp_path / "run"), 1e-9)


def test_what_one_of_several_processes_says_reaches_the_user_once(tiny, flags, launcher, tmp_path):
    values = {**tiny, "num_processes": 2, "loss": "labels + nkdd"}
    code, _, err = launcher("distill", *flags(values), "--output", str(tmp_path / "run"))
    assert code == 2
    assert err.count("error:") == 1
    assert "no term is called 'nkdd'" in err


def begun(folder):
    """Has this run done some updates?"""
    log = folder / "log.jsonl"
    return log.exists() and len(log.read_text().splitlines()) >= 4


@pytest.fixture
def once_begun():
    """Do something, from a thread, once a run of this process has done some updates."""
    over = threading.Event()

    def watch(folder, act):
        def wait():
            while not begun(folder):
                if over.wait(0.05):
                    return
            act()

        threading.Thread(target=wait).start()

    yield watch
    over.set()


@pytest.fixture
def started(tiny, flags, tmp_path):
    """A run that would take long, in a session of its own, once it has done some updates."""
    processes = []

    def start(folder, **changes):
        values = {**tiny, **LONG, **changes}
        process = subprocess.Popen(
            [sys.executable, "-m", "vitkd_cli", "distill", *flags(values), "--output", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
            start_new_session=True,
        )
        processes.append(process)
        while not begun(folder):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def children(launcher):
    """Rank → process, of a launcher's number; loader workers and helpers are None."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == launcher:
                environ = (stat.parent / "environ").read_bytes()
                rank = re.search(rb"\0RANK=(\d+)\0", environ)
                found[int(rank[1]) if rank else None] = int(stat.parent.name)
    return found


ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@ONLY_LINUX
@pytest.mark.slow
def test_a_killed_rank_is_named_with_its_signal(tiny, flags, launcher, once_begun, tmp_path):
    run, killed = tmp_path / "run", []

    def kill():
        killed.append(children(os.getpid())[1])
        os.kill(killed[0], signal.SIGKILL)

    once_begun(run, kill)
    code, _, err = launcher("distill", *flags({**tiny, **LONG}), "--output", str(run))
    assert code == 3, err
    where = (
        rf"error: rank 1 \(process {killed[0]}\) was ended by SIGKILL, last heard of at (update|a validation)"
    )
    assert re.match(where, err), err
    assert f"vitkd distill --resume {run}" in err
    assert err.count("\n") == 2


@ONLY_LINUX
@pytest.mark.slow
def test_a_stopped_rank_is_named_when_the_others_have_waited_long_enough(started, tmp_path):
    process = started(tmp_path / "run", dist_timeout=10)
    os.kill(children(process.pid)[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert err.startswith("error: no answer from rank 1, last heard of at")
    assert err.count("\n") == 2


@ONLY_LINUX
@pytest.mark.slow
def test_the_processes_end_with_the_one_that_started_them(started, tmp_path):
    process = started(tmp_path / "run")
    ranks = [pid for rank, pid in children(process.pid).items() if rank is not None]
    assert len(ranks) == 2
    process.kill()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert list((tmp_path / "run" / "checkpoints").glob("update-*"))  # they saved first


@ONLY_LINUX
@pytest.mark.slow
def test_a_killed_loader_worker_is_a_line(started, tmp_path):
    process = started(tmp_path / "run", num_processes=1, workers=1)
    os.kill(children(process.pid)[None], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert re.match(r"error: loader worker \(process \d+\) was ended", err)
    assert f"vitkd distill --resume {tmp_path / 'run'}" in err


def test_what_torch_says_of_a_worker_and_of_a_connection_is_put_in_words(monkeypatch, tmp_path):
    told = lost_worker(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "again")
    assert told.message == "loader worker (process 7) was ended: Killed"
    assert told.exit_code == 3
    assert lost_worker(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "again")
    assert lost_worker(RuntimeError("shapes do not fit"), "again") is None
    peer = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert launch.connection_lost(peer) is None  # a process alone has no others
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = tmp_path / "my run"
    assert launch.connection_lost(peer, run).hint == "start again"  # nothing began there
    run.mkdir()
    (run / "recipe.toml").touch()
    assert launch.connection_lost(peer, run).hint.endswith(f"--resume '{run}'")
    assert launch.connection_lost(RuntimeError("shapes do not fit")) is None
    unheard = launch.connection_lost(
        RuntimeError("Gloo connectFullMesh failed with [/gloo/pair.cc:152]"), run
    )
    assert unheard.hint.startswith("GLOO_SOCKET_IFNAME=NAME")


def test_whatever_hangs_on_a_refusal_its_words_reach_the_launcher(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("VITKD_ERRORS", str(tmp_path))
    refusal = UserError("no such data", "name another", 3, ["a", "b"])
    refusal.added_by_a_library = object()
    assert launch.tell_launcher(refusal)
    told = json.loads((tmp_path / "0001.json").read_text())
    assert told == {"message": "no such data", "hint": "name another", "exit_code": 3, "details": ["a", "b"]}


@pytest.mark.parametrize(
    ("own_name", "ways_out", "network"),
    [
        ("127.0.1.1", ["10.0.0.7"], "eth1"),
        ("127.0.1.1", ["127.0.1.1", "10.0.0.7"], "eth1"),  # the first machine itself
        ("10.0.0.7", ["10.0.0.7"], None),  # gloo finds it
        ("127.0.1.1", ["127.0.0.1", "127.0.0.1"], None),  # no network
    ],
)
def test_machines_find_each_other_whatever_their_own_names_lead_to(monkeypatch, own_name, ways_out, network):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    probe = SimpleNamespace(connect=lambda _: None, getsockname=lambda: (ways_out.pop(0), 7))
    monkeypatch.setattr(launch.socket, "gethostbyname", lambda _: own_name)
    monkeypatch.setattr(launch.socket, "socket", lambda *_: contextlib.nullcontext(probe))
    networks = {"lo": ["127.0.0.1"], "eth0": ["192.168.0.7"], "eth1": ["fe80::1", "10.0.0.7"]}
    told = {name: [SimpleNamespace(address=one) for one in own] for name, own in networks.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: told)
    launch.be_found()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == network


def test_a_leftover_world_size_is_told(monkeypatch, cli):
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = cli("distill", "--teacher", "deit3_small", "--student", "deit_tiny")
    assert code == 2
    assert "WORLD_SIZE is set without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in err
    assert "unset WORLD_SIZE" in err


def test_a_dry_run_prints_no_results(tiny, flags, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "launch", lambda *_args, **_options: None)
    values = {**tiny, "steps": 1, "shots": 4}
    assert cli("distill", *flags(values), "--output", str(tmp_path / "run"))[0] == 0
    drawn = (tmp_path / "run" / "curves.png").stat().st_mtime_ns
    dry = flags({**values, "num_processes": 2})
    for of in ([*dry, "--output"], ["--resume"]):  # of several processes; of a finished run
        code, out, err = cli("distill", "--dry-run", *of, str(tmp_path / "run"))
        assert code == 0, err
        assert "student  " not in out
        assert (tmp_path / "run" / "curves.png").stat().st_mtime_ns == drawn


@pytest.mark.slow
def test_two_processes_stop_together_and_can_go_on(tiny, flags, launcher, once_begun, tmp_path):
    run = tmp_path / "run"
    once_begun(run, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = launcher("distill", *flags({**tiny, **LONG}), "--output", str(run))
    assert code == 143, err
    assert "stopped by SIGTERM after update" in err and f"--resume {run}" in err
    assert list((run / "checkpoints").glob("update-*"))


def test_another_world_than_was_asked_for_is_refused(tiny):
    with pytest.raises(UserError, match="--num-processes 3 was asked for, and 1 started"):
        Session(Recipe(**{**tiny, "num_processes": 3}), None)


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "--grad-accum-steps 4"),
        ("MIXED_PRECISION", "bf16", "--mixed-precision bf16"),
        ("DYNAMO_BACKEND", "INDUCTOR", "--torchcompile"),
        ("USE_FSDP", "true", "vitkd does not train with it"),
        ("USE_DEEPSPEED", "true", "vitkd does not train with it"),
    ],
)
def test_a_configuration_of_accelerate_does_not_overrule_the_recipe(tiny, monkeypatch, name, value, cure):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=f"ACCELERATE_{name}={value} is not what the recipe says") as refused:
        Session(Recipe(**tiny), None)
    assert cure in refused.value.hint


def test_a_configuration_of_accelerate_that_says_the_same_is_none_of_our_business(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    told = {"grad_accum_steps": 4, "mixed_precision": "bf16"}
    assert Session(Recipe(**{**tiny, **told}), None).accelerator.gradient_accumulation_steps == 4


def test_a_global_batch_is_accumulated_on_one_process(tiny):
    session = Session(Recipe(**{**tiny, "global_batch_size": 60, "batch_size": 20}), None)
    assert session.accelerator.gradient_accumulation_steps == session.recipe.grad_accum_steps == 3


@pytest.fixture
def second_of_two(tiny, monkeypatch):
    """The second of two processes: what the first one said to it, and what it says to all."""

    def made(first, *broadcast):
        ours, heard = Session(Recipe(**tiny), None), iter(broadcast)
        ours.accelerator = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False)
        monkeypatch.setattr(session, "broadcast_object_list", lambda _mine: [next(heard)])
        monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [first, *mine])
        return ours

    return made


def test_a_folder_that_not_all_machines_share_is_refused_at_once(second_of_two, tmp_path):
    (tmp_path / ".vitkd-7").touch()
    ours = second_of_two(None, None, (1, ".vitkd-7", True), None, (1, ".vitkd-8", True))
    ours.check_shared(tmp_path / "run")  # it is there
    with pytest.raises(UserError, match="run is another folder on") as refused:
        ours.check_shared(tmp_path / "run")
    assert not refused.value.told_by_another
    assert [path.name for path in tmp_path.iterdir()] == [".vitkd-7"]  # the first one removes its own


def test_a_cache_on_a_disk_to_read_is_known_by_what_lies_there(tiny, tmp_path, monkeypatch):
    first = Session(Recipe(**tiny), None)
    first.accelerator = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    said = []
    monkeypatch.setattr(session, "broadcast_object_list", lambda mine: said.extend(mine) or mine)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: mine)

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(UserError, match="the disk is read-only"):
        first.check_shared(tmp_path, read_only=True)  # it holds nothing
    (tmp_path / "deit-224-0123").mkdir()
    first.check_shared(tmp_path, read_only=True)
    assert said[-1] == (0, "deit-224-0123", False) and (tmp_path / "deit-224-0123").is_dir()
    with pytest.raises(UserError, match="the disk is read-only"):
        first.check_shared(tmp_path)  # a run's own folder


def test_what_one_process_is_refused_all_are_and_one_says_it(second_of_two):
    def act():
        raise UserError("no such data", "name another", 3, ["a"])

    told = {"message": "no such model", "hint": "", "exit_code": 2, "details": ()}
    with pytest.raises(UserError, match="no such model") as refused:
        second_of_two(told).all_together(lambda: None)
    assert refused.value.told_by_another
    with pytest.raises(UserError, match="no such data") as refused:
        second_of_two(None).all_together(act)
    assert (refused.value.exit_code, refused.value.details) == (3, ("a",))
    assert not refused.value.told_by_another


def test_the_others_wait_for_the_run_folder_as_long_as_the_first(tiny, monkeypatch):
    real, waits = session.InitProcessGroupKwargs, []
    monkeypatch.setattr(
        session, "InitProcessGroupKwargs", lambda timeout: waits.append(timeout) or real(timeout=timeout)
    )
    Session(Recipe(**tiny, dist_timeout=10, lock_timeout=3600), None)
    assert waits[0].total_seconds() == 3610
