"""Output that appears whole or not at all: written beside its place, fsynced, then renamed into it."""

import fcntl
import logging
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from spp_fx.checkpoint.disk import explain, fsync_file, fsync_tree, remove_folder
from spp_fx.checkpoint.place import (
    check_target,
    confirm,
    make_parents,
    place_folder,
    remove_parents,
    remove_replaced,
    sibling,
    tidy,
)
from spp_fx.errors import SppFxError, UsageError

_LOG = logging.getLogger(__name__)


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
