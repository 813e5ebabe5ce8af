"""Output that appears whole or not at all: written beside its place, made durable, renamed into it."""

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
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spp_fx.errors import SppFxError, UsageError

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


@contextmanager
def atomic_folder(
    target: Path, force: bool = False, sources: Iterable[Path] = ()
) -> Generator[Path, None, None]:
    """A new folder beside `target` to write into; it takes the name of `target` when the block ends well.

    On any exception, KeyboardInterrupt and SystemExit among them, it is removed and an existing `target`
    stays as it was. A process that is killed outright leaves a hidden `.NAME.tmp-*` folder behind and no
    half-written `target`; the next run on `target` removes it.

    Args:
        target: the folder to appear; missing parents are created.
        force: replace an existing folder, as a whole and at the very end.
        sources: folders or files that are read meanwhile; `target` must not be or contain one of them.

    Raises:
        UsageError: before the block is entered: `target` exists (without `force`), is a file, a link, one
            of the sources or above one, the current folder or above it, or (with `force`) a non-empty
            folder that holds none of `OUR_FILES`.
        SppFxError: the disk is full, read-only or refuses to be written.
    """
    target, sources = Path(os.path.abspath(target)), tuple(sources)
    tidy(target, _LOG.warning)
    check_target(target, force, sources)
    replaced: Path | None = None
    with _beside(target, sources) as temporary:
        os.mkdir(temporary)
        held = os.open(temporary, os.O_RDONLY)
        try:
            with suppress(OSError):  # no locks there: the name still says whose it is
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            fsync_tree(temporary)
            replaced = place_folder(temporary, target, force)
        finally:
            os.close(held)
    confirm(target)
    if replaced is not None:
        remove_replaced(replaced)


@contextmanager
def atomic_file(target: Path, force: bool = False) -> Generator[Path, None, None]:
    """The path of a file yet to be written beside `target`; it takes its name when the block ends well.

    Args:
        target: the file to appear; missing parents are created.
        force: replace an existing regular file.

    Raises:
        UsageError: before the block is entered: `target` exists (without `force`), or is a folder.
        SppFxError: the block wrote no file; the disk is full, read-only or refuses to be written.
    """
    target = Path(os.path.abspath(target))
    if target.is_dir():
        raise UsageError(f"{target}: is a folder; give the name of a file")
    if os.path.lexists(target) and not (force and target.is_file()):
        raise UsageError(f"{target}: exists; give another -o or --force")
    tidy(target, _LOG.warning)
    with _beside(target) as temporary:
        yield temporary
        if not temporary.is_file():
            raise SppFxError(f"{target}: nothing was written")
        fsync_file(temporary)
        if not force and os.path.lexists(target):
            raise UsageError(f"{target}: appeared meanwhile; give another -o or --force")
        os.replace(temporary, target)
    confirm(target)


@contextmanager
def _beside(target: Path, sources: Iterable[Path] = ()) -> Generator[Path, None, None]:
    """A hidden name beside `target`, and no trace of it (or of parents made for it) after an exception."""
    made = make_parents(target.parent)
    temporary = sibling(target, "tmp")
    try:
        yield temporary
    except OSError as error:
        _discard(temporary, made)
        raise explain(target, error, "nothing was left behind", sources) from error
    except BaseException:
        _discard(temporary, made)
        raise


def _discard(temporary: Path, made: list[Path]) -> None:
    if temporary.is_dir():
        remove_folder(temporary)
    else:
        with suppress(OSError):  # a disk that turned read-only; what it refused is told
            temporary.unlink(missing_ok=True)
    remove_parents(made)
