"""Where models run, and how exactly; a GPU's switches can be set without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vitkd_cli import UserError
from vitkd_cli.device import check_gpus, tensor_float32
from vitkd_cli.training.launch import launch

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
