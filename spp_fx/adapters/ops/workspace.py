"""Buffers that the kernels of one CPU thread share, call after call.

A fresh one of some megabytes comes as untouched pages, and touching them costs as much as a pass over W.
"""

import threading

import torch
from torch import Tensor

_LOCAL = threading.local()


def workspace(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (rows, columns) matrix with arbitrary content.

    On the CPU it is the thread's own buffer of that name, which the next call with the name hands out again:
    nothing of it may outlive the kernel that asked. It is as large as the largest that was asked for, so
    bounded as that is.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    size = rows * columns * dtype.itemsize
    held: Tensor | None = getattr(_LOCAL, name, None)
    if held is None or held.numel() < size:
        # Made in inference mode, it could never be written to outside of it.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        setattr(_LOCAL, name, held)
    return held[:size].view(dtype).view(rows, columns)
