"""What a file system is asked to make durable, and its refusals in words a reader can act on."""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from spp_fx.errors import SppFxError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_LOST = frozenset({errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT})


def fsync_file(path: Path) -> None:
    """Make the bytes of a file durable, whoever wrote them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable, on file systems that can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path, durable: frozenset[Path] = frozenset()) -> None:
    """Make everything in a folder durable, folder by folder; files in `durable` already are."""
    for parent, _, files in os.walk(folder):
        for name in files:
            if (path := Path(parent, name)) not in durable:
                fsync_file(path)
        fsync_folder(Path(parent))


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, as far as that can be done: what is left does no harm."""
    shutil.rmtree(folder, ignore_errors=True)


def check_space(target: Path, folder: Path, need: int) -> None:
    """Refuse what cannot fit on the disk of `folder`.

    Raises:
        SppFxError: fewer than `need` bytes are free; says both numbers.
    """
    free = shutil.disk_usage(folder).free
    if need > free:
        raise SppFxError(
            f"{target}: needs {size_words(need)}, {size_words(free)} are free on its disk; "
            "free space, or give another -o"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def size_words(nbytes: int) -> str:
    """A number of bytes as a reader would say it."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes} bytes"


def explain(target: Path, error: OSError, left: str, sources: Iterable[Path] = ()) -> SppFxError:
    """What went wrong while `target` was written, what is left of it and how to mend it.

    Args:
        target: the output.
        error: what the system said.
        left: what lies on the disk now, as the middle of a sentence.
        sources: the inputs: a fault of one of their files is told from one of the output's disk.
    """
    about = f" ({error.filename})" if error.filename is not None else ""
    reason = f"{target}: was not written: {error.strerror or error}{about}; {left}. "
    if error.filename is not None and error.errno in _LOST and _within(error.filename, sources):
        return SppFxError(f"{reason}The input was lost while it was read: bring it back")
    if error.errno in _FULL:
        return SppFxError(f"{reason}Free space on its disk, or give another -o")
    if error.errno in _FORBIDDEN:
        return SppFxError(f"{reason}Give another -o on a disk you may write to")
    return SppFxError(f"{reason}Check the disk, or give another -o")


def _within(path: str | bytes | int, folders: Iterable[Path]) -> bool:
    if isinstance(path, int):
        return False
    real = Path(os.path.realpath(os.fsdecode(path)))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
