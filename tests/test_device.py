"""Where models run, and how exactly; a GPU's switches can be set without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vitkd_cli import UserError
from vitkd_cli.device import check_gpus, device_named, loader_workers, tensor_float32
from vitkd_cli.processes import launch

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def switches():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("allowed", "wanted"), [(True, ("high", True)), (False, ("highest", False))])
def test_tensor_float32_is_put_back(allowed, wanted):
    before = switches()
    with pytest.raises(KeyError), tensor_float32(GPU, allowed):
        assert switches() == wanted
        raise KeyError
    assert switches() == before
    with tensor_float32(CPU, allowed):
        assert switches() == before


def test_whoever_used_the_newer_switches_has_decided():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has no newer switches")
    code = (
        "import torch; from vitkd_cli.device import tensor_float32\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "with tensor_float32(torch.device('cuda'), False): pass\n"
        "print(torch.backends.cuda.matmul.fp32_precision)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "tf32\n", done.stderr


@pytest.mark.parametrize(
    ("asked", "processes", "place", "workers"),
    [
        (None, 1, "cuda", 15),
        (None, 8, "cuda", 1),
        (None, 1, "cpu", 4),
        (None, 8, "cpu", 2),
        (40, 1, "cuda", 16),
    ],
)
def test_workers_share_the_cores(monkeypatch, asked, processes, place, workers):
    monkeypatch.setattr("vitkd_cli.device.cores", lambda: 16)
    assert loader_workers(asked, processes, torch.device(place)) == workers


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(GPU, 2)
    check_gpus(CPU, 8)
    with pytest.raises(UserError, match="3 processes for the 2 GPUs of this machine"):
        check_gpus(GPU, 3)


def test_processes_of_a_cpu_see_no_gpu(monkeypatch):
    seen = []

    def start(config, command):
        return lambda *arguments: seen.append({**os.environ})

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    before = {**os.environ}
    launch(2, ["eval"], "cpu")
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "" and seen[0]["OMP_NUM_THREADS"]
    assert {**os.environ} == before


def test_more_processes_than_cores_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("vitkd_cli.device.cores", lambda: 2)
    with pytest.raises(UserError, match="3 processes for the 2 cores of this machine"):
        launch(3, ["distill"], "cpu")


@pytest.mark.parametrize(("name", "place"), [("mps", torch.backends.mps), ("xpu", torch.xpu)])
def test_devices_that_accelerate_offers_are_taken_and_called_untested(monkeypatch, cli, name, place):
    monkeypatch.setattr(place, "is_available", lambda: True)
    assert device_named(name).type == name
    monkeypatch.setattr(place, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU that torch can use"):
        device_named(name)
    code, _, err = cli("eval", "deit_tiny", "--no-pretrained", "--device", name)
    assert code == 2 and "untested" in err.splitlines()[0]


def test_env_prints_what_a_bug_report_needs_and_no_path(cli, monkeypatch):
    monkeypatch.setenv("VITKD_DATA", "/home/me/secret")
    code, out, err = cli("env")
    assert code == 0, err
    for word in (
        "vitkd",
        "Python",
        "torch ",
        "timm",
        "accelerate",
        "torch's build",
        "GPUs",
        "cores",
        "memory",
    ):
        assert word in out
    assert "secret" not in out and os.getcwd() not in out
