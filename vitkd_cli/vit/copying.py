"""Tensors of a weight file → a module's own memory, without a second copy of them in between."""

import contextlib
import ctypes
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

_DROP = getattr(mmap, "MADV_DONTNEED", None)


@torch.no_grad()
def copy_weights(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copy what a module has of these tensors, in the same shape, into its own memory.

    What is read of a mapped file counts as memory of the process, so the pages of each tensor are given
    back once it is copied; whoever looks at it again reads it again. The copy is aligned as every tensor,
    and stays what it is if the file is written over.

    Returns:
        The names of those that hold NaN or infinite values.
    """
    own, files, odd = net.state_dict(), _MappedFiles(), []
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            continue
        own[name].copy_(tensor)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            odd.append(name)
        files.forget(tensor)
    beside = {name: state[name] for name in own if name.endswith(_EXTRA_STATE_KEY_SUFFIX) and name in state}
    if beside:  # no memory of the module, but what it makes of it
        net.load_state_dict(beside, strict=False)
    return odd


class _MappedFiles:
    """The addresses at which this process sees files; none where the system does not tell."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
                addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
                if inode != "0":
                    start, _, end = addresses.partition("-")
                    self._ranges.append((int(start, 16), int(end, 16)))

    def forget(self, tensor: Tensor) -> None:
        """Give back the whole pages of a tensor, if a file stands behind them."""
        if _DROP is None or not tensor.is_contiguous():
            return
        first, after = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first, after = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, after // mmap.PAGESIZE * mmap.PAGESIZE
        if first < after and any(start <= first and after <= end for start, end in self._ranges):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(after - first), _DROP)
