"""What only a GPU can show; on other machines these are skipped."""

from __future__ import annotations

import gc
import json
import math

import pytest
import torch
from torch import Tensor
from zoo import SMALL, noise, small

import vitkd_cli as vitkd
from vitkd_cli.evaluation.cost import measure_cost
from vitkd_cli.inspection.maps import attend, attention_layers
from vitkd_cli.training import Reporter
from vitkd_cli.vit.build import open_model

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

QUIET = Reporter(silent=True)


@pytest.fixture
def little_memory():
    """A GPU on which 1.5 GB are free."""
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.memory_allocated() + 1.5e9
    torch.cuda.set_per_process_memory_fraction(free / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_the_gpu(tiny, tmp_path, precision):
    values = {**tiny, "device": "cuda", "mixed_precision": precision, "steps": 6, "model_ema": True}
    recipe = vitkd.Recipe(**values, output=str(tmp_path / "run"))
    run = vitkd.distill(recipe, reporter=QUIET)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert run.results[0].images_per_second > 0


def test_the_gpu_follows_the_cpu(tiny, tmp_path, read_log):
    logs = []
    for device in ("cpu", "cuda"):
        values = {**tiny, "device": device, "mixed_precision": "no", "model_dtype": "float64", "steps": 5}
        recipe = vitkd.Recipe(**values, output=str(tmp_path / device))
        logs.append(read_log(vitkd.distill(recipe, reporter=QUIET).folder))
    for ours, theirs in zip(*logs, strict=True):
        if "event" not in ours:
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_compiled_run_follows_the_plain_one(tiny, tmp_path, read_log):
    logs = []
    for compiled in (False, True):
        values = {**tiny, "device": "cuda", "mixed_precision": "no", "steps": 4, "torchcompile": compiled}
        recipe = vitkd.Recipe(**values, output=str(tmp_path / str(compiled)))
        logs.append(read_log(vitkd.distill(recipe, reporter=QUIET).folder))
    for ours, theirs in zip(*logs, strict=True):
        if "event" not in ours:
            assert ours == pytest.approx(theirs, rel=1e-2)


def test_a_resumed_run_goes_on_where_it_was(tiny, tmp_path, read_log, at_step):
    def killed() -> None:
        raise KeyboardInterrupt

    values = {**tiny, "device": "cuda", "mixed_precision": "fp16", "steps": 6, "recovery_interval": 3}
    whole = vitkd.distill(vitkd.Recipe(**values, output=str(tmp_path / "whole")), reporter=QUIET)
    at_step(5, killed)
    with pytest.raises(vitkd.UserError, match="second SIGINT"):
        vitkd.distill(vitkd.Recipe(**values, output=str(tmp_path / "parts")), reporter=QUIET)
    parts = vitkd.distill(resume=tmp_path / "parts", reporter=QUIET)
    for ours, theirs in zip(read_log(whole.folder), read_log(parts.folder), strict=True):
        if "event" not in ours:
            assert ours == pytest.approx(theirs, rel=1e-3)


def test_more_processes_than_gpus_are_refused(tiny, tmp_path, photos, cli):
    many = torch.cuda.device_count() + 1
    recipe = vitkd.Recipe(**{**tiny, "device": None, "num_processes": many}, output=str(tmp_path / "run"))
    with pytest.raises(vitkd.UserError, match=f"{many} processes for the {many - 1} GPUs"):
        vitkd.distill(recipe, reporter=QUIET)
    code, _, err = cli("eval", "vit_tiny", "--data", str(photos), "--num-processes", str(many))
    assert code == 2 and "start at most one process a GPU" in err


def test_memory_stays_flat(tiny, tmp_path):
    peaks = []
    for steps in (4, 4, 40):
        torch.cuda.reset_peak_memory_stats()
        values = {**tiny, "device": "cuda", "steps": steps}
        vitkd.distill(vitkd.Recipe(**values, output=str(tmp_path / str(len(peaks)))), reporter=QUIET)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] == pytest.approx(peaks[1], rel=0.02)


def test_too_big_a_batch_is_one_line(tiny, tmp_path, little_memory):
    values = {**tiny, "model_kwargs": None, "teacher_kwargs": "num_classes=10", "batch_size": 100}
    recipe = vitkd.Recipe(**{**values, "device": "cuda"}, output=str(tmp_path / "run"))
    with pytest.raises(vitkd.UserError, match="out of memory with 100 images") as problem:
        vitkd.distill(recipe, reporter=QUIET)
    assert "--batch-size 50 --grad-accum-steps 2" in problem.value.hint


def test_a_batch_that_does_not_fit_is_not_timed(little_memory):
    built = open_model("vit_base_patch16_224", pretrained=False)
    built.net.cuda()
    cost = measure_cost(built)
    weights = sum(p.nbytes for p in built.net.parameters())
    assert cost.peak_memory is not None and weights < cost.peak_memory < 1.5e9
    assert cost.images_per_second > 0


def test_eval_answers_as_on_a_cpu(tiny, tmp_path):
    values = {**tiny, "steps": 6, "output": str(tmp_path / "run")}
    vitkd.distill(vitkd.Recipe(**values), reporter=QUIET)
    on_cpu, on_gpu = (
        vitkd.evaluate(str(tmp_path / "run"), "digits", device=device).metrics for device in ("cpu", "cuda")
    )
    assert on_gpu.count == on_cpu.count and on_gpu.top1 == on_cpu.top1
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)


def test_the_command_draws_on_the_gpu(tmp_path, photos, cli):
    code, out, err = cli(
        "inspect-attention", "vit_tiny_patch16_224", "--no-pretrained", "--images", str(photos / "cat"),
        "--num-images", "4", "--output", str(tmp_path / "maps"), "--device", "cuda",
    )  # fmt: skip
    assert code == 0, out + err
    assert list((tmp_path / "maps").rglob("*.png"))


@pytest.mark.parametrize("to", ["timm", "onnx", "torch", "features", "state-dict"])
def test_exports_pass_their_check(tiny, tmp_path, to, monkeypatch):
    from vitkd_cli.export import check, export

    timed = check.timed

    def exactly(*args, **options):  # every forward of the check
        assert not torch.backends.cudnn.allow_tf32
        return timed(*args, **options)

    monkeypatch.setattr(check, "timed", exactly)

    values = {**tiny, "steps": 4, "output": str(tmp_path / "run")}
    vitkd.distill(vitkd.Recipe(**values), reporter=QUIET)
    done = export(str(tmp_path / "run"), to, output=tmp_path / "out", num_images=24, device="cuda")
    assert done.found.count == 24 and done.found.difference <= 1e-4 * done.found.scale


@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_maps_of_a_gpu_are_those_of_a_cpu(name, dtype):
    built = small(name, noise=0.05, dtype=torch.double)
    layers, images = attention_layers(built), noise(built)
    found: list[dict[str, Tensor]] = []
    for device, kind in (("cpu", torch.double), ("cuda", dtype)):
        built.net.to(device, kind)
        found.append({})
        seen = images.to(device, kind)
        logits = attend(built, layers, seen, lambda layer, map_: found[-1].update({layer.path: map_.cpu()}))
        assert torch.equal(logits, built.net(seen))
    assert found[0].keys() == found[1].keys()
    if dtype == torch.double:  # the others drift apart with depth
        for path, map_ in found[0].items():
            torch.testing.assert_close(found[1][path], map_, atol=1e-5, rtol=0, check_dtype=False)
