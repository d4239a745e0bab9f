"""Models whose weights are shared among the processes: PyTorch's FSDP2 gathers each block when it runs.

Every process must run each forward of such a model: blocks are gathered together.
"""

import copy
import pickle
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.objective import Objective
from vitkd_cli.session import Session
from vitkd_cli.training.learner import Learner, Teacher
from vitkd_cli.vit.copying import copy_weights
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import LOGITS, features

Key = TypeVar("Key", bound=Hashable)


def shared(models: Mapping[Key, Model], session: Session) -> dict[Key, Model]:
    """Models that the first process built, each with its weights shared among all processes.

    The others have the modules without memory for weights until they get their parts, one tensor at a time.

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
    mesh = _mesh(session)
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
        _by_block(net, spec, mesh)
    net._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, whole, options=options)
    if session.dtype != torch.float32:
        net.to(session.dtype)
    blank = torch.zeros(1, len(spec.mean), *spec.input_size, device=device, dtype=session.dtype)
    with refused(spec.name), torch.no_grad(), session.accelerator.autocast():
        net(blank)


def share(learner: Learner, session: Session) -> None:
    """Leave this process its part of a learner that each process has built: of the first one's weights."""
    _check(learner.objective)
    mesh, spec = _mesh(session), learner.spec
    # Detached: parameters themselves would be moved, whole, and be kept until the last one is shared.
    whole = {name: parameter.detach() for name, parameter in learner.named_parameters()}
    with refused(spec.name, "student"):
        _by_block(learner.student.model, spec, mesh)
        fully_shard(learner, mesh=mesh, reshard_after_forward=True)
    learner.to(session.device)
    with torch.no_grad():
        for name, own in learner.named_parameters():
            own.copy_(_like(own, whole[name], source=0))
        for buffer in learner.buffers():
            torch.distributed.broadcast(buffer, 0)


def share_net(net: nn.Module, spec: ViTSpec, session: Session) -> None:
    """Leave this process its part of a network that each process has built alike."""
    _by_block(net, spec, _mesh(session))
    net.to(session.device)


@torch.no_grad()
def restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a module; where its weights are shared, each process its part of them."""
    if not isinstance(module, FSDPModule):
        copy_weights(module, state)
        return
    for name, own in module.state_dict().items():
        own.copy_(_like(own, state[name]))


def gathered(content: Any, session: Session) -> Any:
    """Nested containers with whole tensors, in host memory, in place of parts, on the first process.

    All processes take part; the others hold one whole tensor at a time, and get none.
    """
    first = session.accelerator.is_main_process

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        tensor = leaf.full_tensor()
        return tensor.cpu() if first else None

    return tree_map(whole, content)


def as_parted(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors → the same, each tensor as the parameter that it is of."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    own = dict(zip(indices, parameters, strict=True))
    parts = {
        index: {
            key: _like(own[index], value) if getattr(value, "shape", None) == own[index].shape else value
            for key, value in of_one.items()
        }
        for index, of_one in state["state"].items()
    }
    return {**state, "state": parts}


def _check(objective: Objective) -> None:
    """Refuse a formula that parts of weights cannot be trained by."""
    if objective.balance:  # by gradients of which each process has a part
        raise UserError("--shard does not go with balance in a formula", "give these terms weights")
    # Weights are gathered anew for the backward when a gradient arrives at what their module puts out.
    ends = {tap.view for tap in objective.student_taps if tap.block is None}
    if not {tap.view for tap in objective.student_taps} <= ends:
        raise UserError(
            "--shard: no term reads the student's end, and its gradient is what gathers weights",
            "add a term that does, such as labels",
        )


def _like(own: Tensor, tensor: Tensor, source: int | None = None) -> Tensor:
    """A whole tensor, or this process's part of it where ``own`` is shared among processes.

    Args:
        source: the process whose tensor it is a part of; None: of its own, so none waits for another.
    """
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=source)


def _mesh(session: Session) -> DeviceMesh:
    return init_device_mesh(session.device.type, (session.accelerator.num_processes,))


def _by_block(net: nn.Module, spec: ViTSpec, mesh: DeviceMesh) -> None:
    """Have each block gathered when it runs, and what is outside of blocks when the model does."""
    for block in spec.blocks:
        fully_shard(net.get_submodule(block.path), mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    for method in ("forward_features", "forward_head"):  # by which signals are read
        register_fsdp_forward_method(net, method)


@contextmanager
def refused(name: str, role: str = "teacher") -> Iterator[None]:
    """Refuse a model whose blocks have weights in common, or are read while they do not run."""
    try:
        yield
    except (RuntimeError, TypeError) as problem:
        if isinstance(problem, RuntimeError) and "DTensor" not in str(problem):
            raise
        flag = "--shard-teacher" if role == "teacher" else "--shard"
        raise UserError(
            f"{flag}: the blocks of {name} cannot be gathered one by one",
            f"leave it out, or take a {role} of another family",
        ) from None
