"""Loading takes the memory of the weights, and not that of a second copy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitkd_cli.vit.copying import copy_weights
from vitkd_cli.vit.weights import read_weights

MiB = 2**20
PEAK = """
import resource, sys
import psutil
from vitkd_cli.requests import Weights
from vitkd_cli.vit.build import build
from vitkd_cli.vit.names import resolve

def built(name, checkpoint=None, **options):
    return build(resolve(name), Weights(checkpoint=checkpoint, pretrained=False), **options).net

built("vit_tiny", kwargs="depth=1")  # whatever is imported on the way
before = psutil.Process().memory_info().rss
net = built("vit_base", sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((peak - before) / sum(p.nbytes for p in net.parameters()))
"""

ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def saved(state, path):
    if path.suffix == ".pth":
        torch.save({"model": state, "optimizer": [torch.ones(8)]}, path)
    else:
        save_file(state, path)
    return path


def resident(path):
    """Bytes of a mapped file that are in this process's memory."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    kib = [re.search(r"^Rss: +(\d+) kB", part, re.M)[1] for part in parts if f"{path}\n" in part]
    assert kib, "the file is not mapped"
    return sum(map(int, kib)) * 1024


@ONLY_LINUX
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_what_was_copied_out_of_a_file_leaves_memory(ending, tmp_path):
    torch.manual_seed(0)
    net, other = (nn.Sequential(*(nn.Linear(512, 512) for _ in range(16))) for _ in range(2))  # 16 MiB
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    path = saved(net.state_dict(), tmp_path / f"it{ending}")
    state = read_weights(path, own=before.keys()).tensors
    assert copy_weights(other, {**state, "beside": torch.tensor([0.0, torch.nan])}) == []
    assert resident(path) < 2 * MiB
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[key])
        assert torch.equal(tensor, state[key])  # which is read again
        assert tensor.data_ptr() % 64 == 0  # as torch aligns it, whatever the file does
    assert resident(path) > 15 * MiB


def test_what_is_not_finite_is_named():
    net = nn.Linear(2, 2)
    assert copy_weights(net, {"weight": torch.ones(2, 2), "bias": torch.tensor([0.0, torch.nan])}) == ["bias"]


def test_a_model_does_not_change_with_the_file_that_it_came_from(tmp_path):
    net = nn.Linear(64, 64)
    before = net.weight.detach().clone()
    path = saved(net.state_dict(), tmp_path / "it.safetensors")
    copy_weights(net, read_weights(path, own={"weight", "bias"}).tensors)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(net.weight, before)


@pytest.mark.slow
@ONLY_LINUX
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_loading_takes_hardly_more_than_the_weights(ending, tmp_path):
    import timm

    path = saved(timm.create_model("vit_base_patch16_224").state_dict(), tmp_path / f"it{ending}")
    told = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    assert float(told.stdout) < 1.2
