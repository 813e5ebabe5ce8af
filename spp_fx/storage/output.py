"""Outputs on disk: a file that appears whole, fsync, checks of a target before the work, disk errors explained."""

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from spp_fx.errors import SppFxError, UsageError

REPLACEABLE = ("config.json", "adapter_config.json", "export.json", "sparsity.lock.json", "teacher.json")
"""--force replaces a non-empty folder only if it holds one of these files."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_LOST = frozenset({errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT})
_LONGEST = 180  # bytes of a name that leave room for what hidden names add
_DAY = 24 * 3600


@contextmanager
def atomic_file(target: Path, force: bool = False) -> Generator[Path, None, None]:
    """A path beside `target` to write a file to; the file is renamed to `target` when the block ends well.

    A killed process leaves a hidden `.NAME.tmp-*`; a later call for the same target removes it after a day.

    Args:
        target: the file to appear; missing parents are created.
        force: replace an existing regular file.

    Raises:
        UsageError: `target` exists (without `force`), or is a folder.
        SppFxError: the block wrote no file; the disk is full, read-only or fails.
    """
    target = as_given(target)
    if target.is_dir():
        raise UsageError(f"{target}: is a folder; give the name of a file")
    if os.path.lexists(target) and not (force and target.is_file()):
        raise UsageError(f"{target}: exists; give another -o or --force")
    made = make_parents(target.parent)
    prefix = f"{hidden_name(target)}.tmp-"
    temporary = target.with_name(prefix + secrets.token_hex(8))
    try:
        _remove_leftovers(target.parent, prefix)
        yield temporary
        if not temporary.is_file():
            raise SppFxError(f"{target}: nothing was written")
        fsync_file(temporary)
        if not force and os.path.lexists(target):
            raise UsageError(f"{target}: appeared meanwhile; give another -o or --force")
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):  # the error of the block is the one to report
            temporary.unlink(missing_ok=True)
        remove_parents(made)
        if isinstance(error, OSError):
            raise explain(target, error, "nothing was left behind") from error
        raise
    confirm_name(target, made)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove temporary files of killed processes: those that nobody has written to for a day."""
    with suppress(OSError):  # the new file does not need it
        for entry in os.scandir(folder):
            if entry.name.startswith(prefix) and time.time() - entry.stat().st_mtime > _DAY:
                os.unlink(entry)


def as_given(target: Path) -> Path:
    """A path of an output as messages show it: relative where it was given so, unless its name is not in it."""
    short = Path(os.path.normpath(target))
    return Path(os.path.abspath(target)) if short.name in ("", "..") else short


def hidden_name(target: Path) -> str:
    """How hidden names beside `target` begin: '.NAME', or a short name that stands for a long one."""
    raw = os.fsencode(target.name)
    if len(raw) <= _LONGEST:
        return f".{target.name}"
    return f".{target.name[:40]}-{hashlib.blake2b(raw, digest_size=8).hexdigest()}"


def check_target(target: Path, force: bool, sources: Iterable[Path]) -> None:
    """UsageError if no folder may be written to `target`."""
    real = os.path.realpath(target)
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(real):
            raise UsageError(f"{target}: is the input {source} or contains it; give another -o")
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        raise UsageError(f"{target}: is a symbolic link; give the name of a folder as -o")
    if not target.is_dir():
        raise UsageError(f"{target}: is a file; give the name of a folder as -o")
    if not force:
        raise UsageError(f"{target}: exists; give another -o or --force")
    if Path.cwd().is_relative_to(real):
        raise UsageError(f"{target}: is the current folder or contains it; give another -o")
    if any(target.iterdir()) and not any((target / name).is_file() for name in REPLACEABLE):
        raise UsageError(
            f"{target}: --force does not replace it, since it holds none of {', '.join(REPLACEABLE)}; "
            "give another -o, or remove it yourself"
        )


def check_space(target: Path, folder: Path, need: int) -> None:
    """SppFxError if fewer than `need` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise SppFxError(
            f"{target}: needs {size_words(need)}, but only {size_words(free)} are free on its disk; "
            "free space, or give another -o"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def size_words(nbytes: int) -> str:
    """'1.5 GB', '12.0 kB', '7 bytes'."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes} bytes"


def explain(target: Path, error: OSError, left: str, sources: Iterable[Path] = ()) -> SppFxError:
    """The message for an OSError that stopped the writing of `target`.

    Args:
        left: what is on the disk now, as a clause.
        sources: the inputs, to tell an input that was lost from a fault of the output's disk.
    """
    about = f" ({error.filename})" if error.filename is not None else ""
    reason = f"{target}: was not written: {error.strerror or error}{about}; {left}. "
    if error.filename is not None and error.errno in _LOST and _within(error.filename, sources):
        return SppFxError(f"{reason}An input disappeared while it was read; restore it")
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


def make_parents(parent: Path) -> list[Path]:
    """Create missing folders; returns those created, the deepest first.

    Raises:
        SppFxError: one cannot be created.
    """
    missing: list[Path] = []
    path = parent
    while not path.exists() and path != path.parent:
        missing.append(path)
        path = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SppFxError(f"{parent}: cannot be created ({error.strerror}); give another -o") from error
    return missing


def remove_parents(made: Iterable[Path]) -> None:
    """Undo `make_parents`, except for folders that are in use by now."""
    for parent in made:
        with suppress(OSError):
            parent.rmdir()


def confirm_name(target: Path, made: Iterable[Path] = ()) -> None:
    """Make the new name `target` durable, and the names of the folders that were made for it.

    Raises:
        SppFxError: the disk does not confirm it.
    """
    try:
        for path in (target, *made):
            fsync_folder(path.parent)
    except OSError as error:
        raise SppFxError(
            f"{target}: is in place, but the disk did not confirm its name ({error.strerror}); check the disk"
        ) from error


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


def fsync_tree(folder: Path, durable: frozenset[Path]) -> None:
    """Make everything in a folder durable; files in `durable` already are."""
    for parent, _, files in os.walk(folder):
        for name in files:
            if (path := Path(parent, name)) not in durable:
                fsync_file(path)
        fsync_folder(Path(parent))
