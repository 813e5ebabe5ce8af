"""Arrays as the raw addresses that kernels take."""

from typing import Any

from numpy.typing import NDArray


def address(array: NDArray[Any], size: int, *, write: bool = False) -> int:
    """Where the array begins, once it is sure that a kernel may use `size` bytes from there.

    Raises:
        ValueError: the array is shorter, not contiguous, or read-only though the kernel writes.
    """
    interface: dict[str, Any] = array.__array_interface__
    start, read_only = interface["data"]
    if interface["strides"] is not None or array.nbytes < size or (write and read_only):
        kind = "writable " if write else ""
        raise ValueError(
            f"a kernel takes a {kind}contiguous array of at least {size} bytes, not one of {array.nbytes} "
            f"bytes, shape {array.shape} and strides {array.strides}"
        )
    return start
