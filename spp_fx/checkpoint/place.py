"""Giving a finished folder its name, and what killed runs left beside it."""

import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from spp_fx.checkpoint.disk import fsync_folder
from spp_fx.errors import SppFxError, UsageError

_LOG = logging.getLogger(__name__)

OUR_FILES = ("config.json", "adapter_config.json", "export.json", "sparsity.lock.json")
"""A non-empty folder is replaced by force only when it holds one of these."""

_NO_REPLACE, _EXCHANGE = 1, 2  # of linux/fs.h
_AT_FDCWD = -100
_NOT_KNOWN = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_LONGEST = 180  # bytes of a name that leave room for what is put around it


def check_target(target: Path, force: bool, sources: Iterable[Path]) -> None:
    """What no folder will be written to, to be known before long work; raises UsageError."""
    real = os.path.realpath(target)
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(real):
            raise UsageError(f"{target}: is the input {source} or holds it; give another -o")
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        raise UsageError(f"{target}: is a symbolic link; give the name of a folder as -o")
    if not target.is_dir():
        raise UsageError(f"{target}: is a file; give the name of a folder as -o")
    if not force:
        raise UsageError(f"{target}: exists; give another -o or --force")
    if Path.cwd().is_relative_to(real):
        raise UsageError(f"{target}: is the current folder or holds it; give another -o")
    if any(target.iterdir()) and not any((target / name).is_file() for name in OUR_FILES):
        raise UsageError(
            f"{target}: is not replaced by force, for it holds none of {', '.join(OUR_FILES)}; "
            "give another -o, or remove it yourself"
        )


def place_folder(new: Path, target: Path, force: bool) -> Path | None:
    """Give the folder `new` the name of `target`, in one step where the system can.

    Returns:
        Where the folder that had the name lies now, for the caller to remove; None if there was none.

    Raises:
        UsageError: `target` appeared meanwhile, and there is no `force`.
        OSError: the system refuses; both folders are where they were.
    """
    if not os.path.lexists(target):
        try:
            if not _rename(new, target, _NO_REPLACE):
                os.rename(new, target)
            return None
        except FileExistsError:
            pass  # somebody was faster
    if not force:
        raise UsageError(f"{target}: appeared meanwhile; give another -o or --force")
    if _rename(new, target, _EXCHANGE):
        return new
    aside = sibling(target, "old")
    try:
        os.rename(target, aside)
        os.rename(new, target)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.rename(aside, target)
        raise
    return aside


def confirm(target: Path, made: Iterable[Path] = ()) -> None:
    """Make the name of something just placed durable, and those of the folders that were made for it.

    Raises:
        SppFxError: the disk does not say that it is.
    """
    try:
        for folder in (target, *made):
            fsync_folder(folder.parent)
    except OSError as error:
        raise SppFxError(
            f"{target}: is in place, but the disk did not confirm its name ({error.strerror}); check the disk"
        ) from error


def remove_replaced(folder: Path) -> None:
    """Remove a folder that was replaced; the new one is in place, so that a failure is only a warning."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _LOG.warning("%s: the replaced folder could not be removed (%s); remove it", folder, error.strerror)


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
    """Undo `make_parents`, but for folders that somebody else uses by now."""
    for parent in made:
        with suppress(OSError):
            parent.rmdir()


def stem(target: Path) -> str:
    """What hidden names beside `target` begin with: its own name, or a short one that stands for it."""
    raw = os.fsencode(target.name)
    if len(raw) <= _LONGEST:
        return f".{target.name}"
    return f".{target.name[:40]}-{hashlib.blake2b(raw, digest_size=8).hexdigest()}"


def sibling(target: Path, kind: str) -> Path:
    """A new hidden name beside `target` that says which process of which machine made it."""
    name = f"{stem(target)}.{kind}-{os.getpid()}-{_host()}-{secrets.token_hex(4)}"
    return target.with_name(name)


def tidy(target: Path, say: Callable[[str], None]) -> None:
    """Clear up what killed runs left beside `target`: temporary folders, and a folder being replaced.

    Only what a process of this machine left that is no more; anything else is named and stays.

    Args:
        target: the output that is about to be written.
        say: told what was done.
    """
    for path, kind, dead in _leftovers(target):
        if not dead:
            say(f"{path}: another run on {target.name} writes there, or one on another machine left it")
        elif kind == "old" and not os.path.lexists(target):
            with suppress(FileNotFoundError):  # another run tidies too
                os.rename(path, target)
                say(f"{target}: a killed run was about to replace it; it is back")
        else:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            say(f"{path}: left by a killed run, removed")


def _leftovers(target: Path) -> Iterator[tuple[Path, str, bool]]:
    """Path, kind ('tmp', 'old') and whether whoever made it is surely no more."""
    form = re.compile(rf"{re.escape(stem(target))}\.(tmp|old)-(\d+)-([\w-]+)-[0-9a-f]{{8}}")
    try:
        names = sorted(os.listdir(target.parent))
    except OSError:  # it is yet to be made, or will be complained of by who writes there
        return
    for name in names:
        if found := form.fullmatch(name):
            path = target.with_name(name)
            here = found[3] == _host() and not path.is_symlink()
            yield path, found[1], here and not _alive(int(found[2])) and not _is_locked(path)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks there: the process is all there is to ask
        return False
    finally:
        os.close(descriptor)
    return False


def _host() -> str:
    return re.sub(r"[^\w-]", "-", platform.node(), flags=re.ASCII)[:24] or "host"


def _rename(source: Path, target: Path, flag: int) -> bool:
    """renameat2 of Linux; False where the C library or the file system does not know it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_KNOWN:
        return False
    raise OSError(code, os.strerror(code), str(target))
