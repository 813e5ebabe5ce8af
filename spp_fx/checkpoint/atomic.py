"""Output that appears whole or not at all: written beside its place, fsynced, then renamed into it."""

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from spp_fx.errors import SppFxError, UsageError

_LOG = logging.getLogger(__name__)

OUR_FILES = ("config.json", "adapter_config.json", "export.json", "sparsity.lock.json")
"""A non-empty folder is replaced by force only when it holds one of these."""


@contextmanager
def atomic_folder(
    target: Path, force: bool = False, sources: Iterable[Path] = ()
) -> Generator[Path, None, None]:
    """A new folder beside `target` to write into; it takes the name of `target` when the block ends well.

    On any exception, KeyboardInterrupt and SystemExit among them, it is removed and an existing `target`
    stays as it was. A process that is killed outright leaves a hidden `.NAME.tmp-*` folder behind and no
    half-written `target`.

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
    target = Path(os.path.abspath(target))
    check_target(target, force, sources)
    with _beside(target) as temporary:
        os.mkdir(temporary)
        yield temporary
        _fsync_tree(temporary)
        _replace_folder(temporary, target, force)


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
    with _beside(target) as temporary:
        yield temporary
        if not temporary.is_file():
            raise SppFxError(f"{target}: nothing was written")
        _fsync_file(temporary)
        if not force and os.path.lexists(target):
            raise UsageError(f"{target}: appeared meanwhile; give another -o or --force")
        os.replace(temporary, target)


@contextmanager
def _beside(target: Path) -> Generator[Path, None, None]:
    """A hidden name beside `target`, and no trace of it (or of parents made for it) after an exception."""
    made = _make_parents(target.parent)
    temporary = _sibling(target, "tmp")
    try:
        yield temporary
    except OSError as error:
        _discard(temporary, made)
        raise _plain(target, error) from error
    except BaseException:
        _discard(temporary, made)
        raise
    _confirm(target)


def check_target(target: Path, force: bool, sources: Iterable[Path]) -> None:
    """What `atomic_folder` will refuse, to be known before long work; raises UsageError."""
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


def _replace_folder(new: Path, target: Path, force: bool) -> None:
    """Give `new` the name of `target`; what had it is put aside first and brought back if that fails."""
    if not os.path.lexists(target):
        os.rename(new, target)
        return
    if not force:
        raise UsageError(f"{target}: appeared meanwhile; give another -o or --force")
    aside = _sibling(target, "old")
    try:
        os.rename(target, aside)
        os.rename(new, target)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.rename(aside, target)
        raise
    try:
        shutil.rmtree(aside)
    except OSError as error:  # the new folder is in place: no reason to fail
        _LOG.warning("%s: the replaced folder could not be removed (%s); remove it", aside, error.strerror)


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name[:60]}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def _make_parents(parent: Path) -> list[Path]:
    """Create missing folders; returns those created, the deepest first."""
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


def _discard(temporary: Path, made: list[Path]) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)
    for parent in made:
        with suppress(OSError):  # somebody else uses it by now
            parent.rmdir()


def _plain(target: Path, error: OSError) -> SppFxError:
    about = f" ({error.filename})" if error.filename is not None else ""
    return SppFxError(
        f"{target}: was not written: {error.strerror or error}{about}; nothing was left behind. "
        "Free space, or give another -o on a disk you may write to"
    )


def _fsync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _fsync_file(Path(parent, name))
        _fsync_folder(Path(parent))


def _fsync_folder(path: Path) -> None:
    """Make the names in a folder durable, on file systems that can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def _confirm(target: Path) -> None:
    try:
        _fsync_folder(target.parent)
    except OSError as error:
        raise SppFxError(
            f"{target}: is in place, but the disk did not confirm its name ({error.strerror}); check the disk"
        ) from error


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
