"""A teacher whose weights are shared among the processes: PyTorch's FSDP2 gathers each block when it runs."""

import copy
import pickle
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.session import Session
from vitkd_cli.training.learner import Teacher
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.taps import LOGITS, features

Key = TypeVar("Key", bound=Hashable)


def shared(models: Mapping[Key, Model], session: Session) -> dict[Key, Model]:
    """Models that the first process built, each with its weights shared among all processes.

    The others have the modules without memory for weights until they get their parts, one tensor at a time.
    Every process must run each forward of such a model: blocks are gathered together.

    Args:
        models: those of the first process; what the others hand over is not looked at.
    """
    sent = [b""]

    def pack() -> None:
        outlines: dict[int, Model] = {}  # one that has several keys stays one
        for model in models.values():
            if id(model) not in outlines:
                outlines[id(model)] = _outline(model, session.accelerator.mixed_precision)
        try:
            sent[0] = pickle.dumps({key: outlines[id(model)] for key, model in models.items()})
        except Exception as problem:
            names = ", ".join(dict.fromkeys(model.spec.name for model in models.values()))
            raise UserError(
                f"--shard-teacher: {names} cannot be handed to other processes ({first_line(problem)})",
                "leave it out: each process holds the whole teacher",
            ) from None

    session.main_process_first(pack)
    found: dict[Key, Model] = pickle.loads(broadcast_object_list(sent)[0])
    mesh = init_device_mesh(session.device.type, (session.accelerator.num_processes,))
    done: set[int] = set()
    for key, model in found.items():
        if id(model) not in done:
            whole = models[key].net.state_dict() if session.accelerator.is_main_process else {}
            _shard(model, whole, mesh, session)
            done.add(id(model))
    return found


def _outline(model: Model, precision: str) -> Model:
    """The same model with parameters on the meta device; its buffers are its own.

    Weights that may be are rounded for the precision of the training, before they are shared.
    """
    macs, spec = model.multiply_adds, model.spec  # parts of weights cannot be counted
    if precision == "bf16":
        said = {features(spec.depth - 1), *([LOGITS] if spec.num_classes else [])}
        teacher, generator = Teacher(model, frozenset(said)), torch.Generator().manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            teacher.try_bf16(torch.rand(2, len(spec.mean), *spec.input_size, generator=generator))
        teacher.halve()
        teacher.tapped.release()
    blank = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in model.net.parameters()
    }
    outline = replace(model, net=copy.deepcopy(model.net, dict(blank)))
    vars(outline)["multiply_adds"] = macs
    return outline


def _shard(model: Model, whole: dict[str, Any], mesh: DeviceMesh, session: Session) -> None:
    """Leave this process its part of the weights.

    Args:
        whole: all weights, on the first process.
    """
    net, spec, device = model.net.eval(), model.spec, session.device
    with refused(spec.name):
        for block in spec.blocks:
            fully_shard(net.get_submodule(block.path), mesh=mesh)
        fully_shard(net, mesh=mesh)
    net._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, whole, options=options)
    for method in ("forward_features", "forward_head"):  # by which signals are read
        register_fsdp_forward_method(net, method)
    if session.dtype != torch.float32:
        net.to(session.dtype)
    blank = torch.zeros(1, len(spec.mean), *spec.input_size, device=device, dtype=session.dtype)
    with refused(spec.name), torch.no_grad(), session.accelerator.autocast():
        net(blank)


@contextmanager
def refused(name: str) -> Iterator[None]:
    """Refuse a teacher whose blocks have weights in common, or are read while they do not run."""
    try:
        yield
    except (RuntimeError, TypeError) as problem:
        if isinstance(problem, RuntimeError) and "DTensor" not in str(problem):
            raise
        raise UserError(
            f"--shard-teacher: the blocks of {name} cannot be gathered one by one",
            "leave it out, or take a teacher of another family",
        ) from None
