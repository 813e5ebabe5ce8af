"""CPU tensors as numpy arrays that share their memory."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_array(tensor: Tensor) -> Any:
    """The same memory as a numpy array; half precision as unsigned integers: numpy has no bfloat16.

    Through DLPack: `Tensor.numpy` would forbid the storage to be resized, and FSDP resizes what it gathers.
    """
    tensor = tensor.detach()
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return np.from_dlpack(tensor.view(torch.uint16) if half else tensor)
