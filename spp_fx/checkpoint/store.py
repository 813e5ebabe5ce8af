"""The hidden folder beside an output in which a run works: its lock, its plan, and its end.

Beside the output NAME lies `.NAME.work` while a run writes it:

    lock            held by the run; the lock dies with its process
    plan.json       everything that the result depends on
    journal.jsonl   the files that are finished
    out/            the output's own files; renamed to NAME at the end
    ...             what else the run wants to keep
"""

import errno
import fcntl
import json
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spp_fx.checkpoint.disk import explain, fsync_file, fsync_folder, remove_folder
from spp_fx.checkpoint.journal import Journal
from spp_fx.errors import UsageError

JOURNAL, OUT = "journal.jsonl", "out"
EARLIER = "what an earlier run finished"
_LOCK, _PLAN, _DRAFT = "lock", "plan.json", "plan.tmp"
_OWN = frozenset({_LOCK, _PLAN, _DRAFT, JOURNAL, OUT})


def read_plan(store: Path) -> dict[str, Any] | None:
    """The plan of the run that the store is of; None before it has one, empty if it cannot be read."""
    try:
        plan = json.loads((store / _PLAN).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return plan if isinstance(plan, dict) else {}


def write_plan(store: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan, whole or not at all."""
    draft = store / _DRAFT
    draft.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    fsync_file(draft)
    os.replace(draft, store / _PLAN)
    fsync_folder(store)


def strangers(store: Path) -> list[str]:
    """What makes a folder without a plan look like no store at all."""
    return [] if (store / _PLAN).is_file() else sorted({*os.listdir(store)} - _OWN)


@contextmanager
def locked(target: Path, store: Path, sources: Iterable[Path]) -> Generator[None, None, None]:
    """Nobody else has the store within the block; it is there when the block begins."""
    try:
        lock = _lock(target, store)
    except OSError as error:
        raise explain(target, error, "nothing was left behind", sources) from error
    try:
        yield
    finally:
        os.close(lock)


def _lock(target: Path, store: Path) -> int:
    """A descriptor that holds the lock of the store while it is open."""
    while True:
        if store.is_symlink():
            raise UsageError(f"{store}: is a symbolic link; remove it, or give another -o")
        with suppress(FileExistsError):
            store.mkdir()
        try:
            lock = os.open(store / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # somebody finished and removed the store between these lines
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(store / _LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(lock)
            raise UsageError(
                f"{target}: another process is writing it; wait for it, or give another -o"
            ) from error
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            remove(store)
            raise UsageError(
                f"{target}: its file system has no locks (flock: {error.strerror}), so that two runs could write it "
                "at once; give another -o and copy the output there"
            ) from error
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def is_placed(store: Path, journal: Journal) -> bool:
    """Whether `out/` got its name: it was about to, and is another folder now, or none."""
    return journal.mark is not None and _inode(store / OUT) != journal.mark


def tidy_placed(target: Path, store: Path, sources: Iterable[Path]) -> None:
    """Remove the store of a run that was killed when its output was in place.

    Raises:
        UsageError: another process works in it.
        SppFxError: its journal cannot be read.
    """
    if not (store / JOURNAL).is_file() and not _is_bare(store):
        return
    with locked(target, store, sources):
        if _is_bare(store):  # it was killed, or another run ended, between its journal and its lock
            remove(store)
            return
        try:
            journal = Journal(store / JOURNAL)
        except OSError as error:
            raise explain(target, error, f"{store} keeps {EARLIER}") from error
        placed = is_placed(store, journal)
        journal.close()
        if placed:
            remove_placed(store)


def _is_bare(store: Path) -> bool:
    """Whether a store has a lock at most: no plan that says what it is of, no journal, no work."""
    return store.is_dir() and not store.is_symlink() and {*os.listdir(store)} <= {_LOCK, _DRAFT}


def empty(store: Path) -> None:
    """Remove what is in a store, but for lock and plan; first of all what says that something is finished."""
    (store / JOURNAL).unlink(missing_ok=True)
    fsync_folder(store)
    for path in store.iterdir():
        if path.name not in (_LOCK, _PLAN):
            remove_folder(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove(store: Path) -> None:
    """Remove a store whose work is not wanted any more."""
    with suppress(OSError):  # what cannot be removed is begun anew by the next run
        empty(store)
        (store / _PLAN).unlink(missing_ok=True)
        (store / _LOCK).unlink(missing_ok=True)
        store.rmdir()


def remove_placed(store: Path) -> None:
    """Remove a store whose output is in place; its journal, which says so, is the last to go."""
    remove_folder(store / OUT)
    with suppress(OSError):  # the output is whole; the next run on it tries again
        for path in store.iterdir():
            if path.name not in _OWN:
                remove_folder(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in (_DRAFT, _PLAN, JOURNAL, _LOCK):
            (store / name).unlink(missing_ok=True)
        store.rmdir()


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None
