"""A buffer that the kernels of one CPU thread share, call after call.

A fresh one of some megabytes comes as untouched pages, and touching them costs as much as a pass over W.
"""

import threading

import torch
from torch import Tensor

_LOCAL = threading.local()


def workspace(rows: int, columns: int, like: Tensor) -> Tensor:
    """A (rows, columns) matrix of like's dtype and device with arbitrary content.

    On the CPU it is the thread's own buffer, which the next call hands out again: nothing of it may outlive
    the kernel that asked. It is as large as the largest that was asked for, so bounded as that is.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    size = rows * columns * like.element_size()
    held: Tensor | None = getattr(_LOCAL, "buffer", None)
    if held is None or held.numel() < size:
        # Made in inference mode, it could never be written to outside of it.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=torch.uint8)
        _LOCAL.buffer = held
    return held[:size].view(like.dtype).view(rows, columns)
