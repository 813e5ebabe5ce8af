"""The hidden folder beside an output that a long run works in: its lock, plan, journal of finished files, and end.

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
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, cast

from spp_fx.errors import SppFxError, UsageError, WriteError
from spp_fx.storage.output import (
    check_space,
    check_target,
    confirm,
    explain,
    fsync_file,
    fsync_folder,
    fsync_tree,
    make_parents,
    place_folder,
    remove_folder,
    remove_parents,
    remove_replaced,
    size_words,
    stem,
    tidy,
)
from spp_fx.version import VERSION


@dataclass(frozen=True)
class Entry:
    """A file that is durable.

    Attributes:
        size: of the file in bytes.
        facts: what its writer wants to know of it when it goes on.
    """

    size: int
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


class Journal:
    """The journal of one folder. A later line on a file takes the place of an earlier one.

    Attributes:
        entries: by the file's path in the folder.
        mark: the last mark that was set: a number whose meaning is the caller's.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that was cut off by a crash, and what follows it, is dropped."""
        self.entries: dict[str, Entry] = {}
        self.mark: int | None = None
        self._append = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        try:
            self._read(path.read_bytes())
            fsync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def _read(self, content: bytes) -> None:
        whole = 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n") or not self._take(line):
                break
            whole += len(line)
        if whole < len(content):
            os.ftruncate(self._descriptor, whole)

    def close(self) -> None:
        os.close(self._descriptor)

    def enter(self, name: str, entry: Entry) -> None:
        """Say that a file is durable. Thread-safe; on the disk when it returns."""
        self._write({"file": name, "size": entry.size, "facts": entry.facts})

    def set_mark(self, mark: int) -> None:
        """Write a mark. On the disk when it returns."""
        self._write({"mark": mark})

    def _write(self, content: dict[str, Any]) -> None:
        line = json.dumps(content).encode() + b"\n"
        with self._append:
            start = os.fstat(self._descriptor).st_size
            try:
                done = 0
                while done < len(line):
                    done += os.write(self._descriptor, line[done:])
                os.fsync(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, start)
                raise
            self._take(line)

    def _take(self, line: bytes) -> bool:
        try:
            content = json.loads(line)
        except ValueError:
            return False
        match content:
            case {"file": str(name), "size": int(size), "facts": dict(facts)}:
                self.entries[name] = Entry(size, cast("dict[str, Any]", facts))
            case {"mark": int(mark)}:
                self.mark = mark
            case _:
                return False
        return True


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


def foreign_entries(store: Path) -> list[str]:
    """Entries of a folder without a plan that no run of spp-fx makes: the folder is not a store."""
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


@dataclass(frozen=True)
class Workspace:
    """Where a run writes, and what it, or an earlier run with the same plan, has finished.

    Attributes:
        folder: for the output's files.
        store: for work that is no output: files directly in it, of names that the workspace does not use.
        journal: of both.
    """

    folder: Path
    store: Path
    journal: Journal

    def finished(self, name: str) -> dict[str, Any] | None:
        """The facts of a finished file of the output; None if it is still to be written, from its start.

        Args:
            name: its path in `folder`.
        """
        return self._known(f"{OUT}/{name}")

    def finish(self, name: str, *, synced: bool = False, **facts: Any) -> None:
        """Make a file of the output durable and say so in the journal. Thread-safe.

        Args:
            name: its path in `folder`.
            synced: its bytes were fsynced after the last was written.
            facts: what `finished` gives in a later run; JSON.
        """
        self._enter(f"{OUT}/{name}", synced, facts)

    def kept(self, name: str) -> dict[str, Any] | None:
        """As `finished`, for a file of `store`."""
        return self._known(name)

    def keep(self, name: str, *, synced: bool = False, **facts: Any) -> None:
        """As `finish`, for a file of `store`."""
        self._enter(name, synced, facts)

    def _known(self, path: str) -> dict[str, Any] | None:
        entry = self.journal.entries.get(path)
        return entry.facts if entry is not None and _size(self.store / path) == entry.size else None

    def _enter(self, path: str, synced: bool, facts: Mapping[str, Any]) -> None:
        file = self.store / path
        if not synced:
            fsync_file(file)
        fsync_folder(file.parent)
        self.journal.enter(path, Entry(file.stat().st_size, _plain(facts)))


def stamp(path: Path) -> list[int]:
    """Size and time of the last change of a file, for a plan."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


@contextmanager
def workspace(
    target: Path,
    plan: Mapping[str, Any],
    *,
    force: bool = False,
    fresh: bool = False,
    sources: Iterable[Path] = (),
    inputs: Iterable[Path] = (),
    need: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Generator[Workspace, None, None]:
    """A folder to write `target` in; it takes that name, whole and durable, when the block ends well.

    A run that is killed, interrupted or meets a fault of a disk leaves `target` absent, or the old one
    whole, and its finished files in `.NAME.work`: the next run with the same plan goes on with them. A
    verdict (an SppFxError that no OSError caused) would come again, so that nothing is kept.

    Args:
        target: the folder to appear; missing parents are created.
        plan: everything that the result depends on beside `inputs`, as JSON: fingerprints, options. The version
            of spp-fx is added to it.
        force: replace an existing folder, as a whole and at the very end.
        fresh: begin anew even if the plan is that of an earlier run.
        sources: folders or files that are read meanwhile; `target` must not be or contain one of them.
        inputs: files whose every byte counts: their stamps are part of the plan, and must be the same at the end.
        need: bytes that the whole output will take, where that is known.
        say: told where the work begins, and what is kept of it.

    Raises:
        UsageError: another process works on the same output; or what `atomic_folder` refuses.
        SppFxError: the disk is full, read-only or refuses to be written, or an input was lost; says what is
            kept, and where.
    """
    target, sources = Path(os.path.abspath(target)), tuple(sources)
    store = check_output(target, force, sources, say)
    made = make_parents(target.parent)
    try:
        with locked(target, store, sources):
            stamps = {str(path): stamp(path) for path in inputs}
            job = _Job(target, store, sources, {"spp_fx": VERSION, **_plain(plan), "inputs": stamps}, say)
            yield from _work(job, force, fresh, need)
            confirm(target, made)
            remove_placed(store)
    except BaseException:
        remove_parents(made)
        raise


def check_output(
    target: Path, force: bool, sources: Iterable[Path] = (), say: Callable[[str], None] = lambda line: None
) -> Path:
    """What `workspace` will refuse, to be known before long work, once what killed runs left is cleared up.

    Returns:
        Where the work on `target` lies.

    Raises:
        UsageError: as `workspace`.
    """
    target, sources = Path(os.path.abspath(target)), tuple(sources)
    store = target.with_name(f"{stem(target)}.work")
    tidy_placed(target, store, sources)
    tidy(target, say)
    check_target(target, force, sources)
    return store


@dataclass(frozen=True)
class _Job:
    """What one run is about."""

    target: Path
    store: Path
    sources: tuple[Path, ...]
    plan: dict[str, Any]
    say: Callable[[str], None]


def _work(job: _Job, force: bool, fresh: bool, need: int) -> Generator[Workspace, None, None]:
    """From what an earlier run left to the target in its place; the store is locked."""
    work: Workspace | None = None
    try:
        _prepare(job, fresh)
        work = Workspace(job.store / OUT, job.store, Journal(job.store / JOURNAL))
        done = _restore(work)
        if work.journal.entries:
            job.say(f"{job.store}: holds {_count(work)} of this work, going on")
        check_space(job.target, job.store, need - done)
        yield work
        _check_inputs(job)
        replaced = _place(job, work, force)
    except BaseException as error:
        fault = _fault(error)
        left = _leave(job, work, keep=fault is not None or not isinstance(error, SppFxError))
        if fault is not None and isinstance(error, (OSError, WriteError)):
            raise explain(job.target, fault, left or "nothing was left behind", job.sources) from error
        if left is not None and isinstance(error, SppFxError):
            raise type(error)(f"{error}; {left}") from error
        if left is not None:
            error.add_note(left)
        raise
    finally:
        if work is not None:
            work.journal.close()
    if replaced is not None and replaced.parent != job.store:  # what lies there goes with the store
        remove_replaced(replaced)


def _check_inputs(job: _Job) -> None:
    """What was read must be what is there: a file that changed meanwhile may be in the output in parts."""
    for path, before in job.plan["inputs"].items():
        if stamp(Path(path)) != before:
            raise SppFxError(
                f"{path}: changed while {job.target} was made of it; nothing was written. Run it again"
            )


def _prepare(job: _Job, fresh: bool) -> None:
    """A store with the plan of this run, emptied if it had another."""
    known = read_plan(job.store)
    if known is None and (odd := foreign_entries(job.store)):
        raise UsageError(f"{job.store}: holds {odd[0]}, which no run of spp-fx left; move it away")
    if known == job.plan and not fresh:
        return
    if known is not None:
        other = sorted(key for key in {*known, *job.plan} if known.get(key) != job.plan.get(key))
        reason = f"holds the work of another command ({', '.join(other)})" if other else "was begun before"
        job.say(f"{job.store}: {reason}; starting over")
    empty(job.store)
    write_plan(job.store, job.plan)


def _restore(work: Workspace) -> int:
    """Make `out/` what the journal says: files that are not in it, or not of the size that it says, are removed.

    Returns:
        How many bytes of the output are there.
    """
    entries, found = work.journal.entries, 0
    if work.folder.is_symlink():
        raise UsageError(f"{work.folder}: is a symbolic link; remove it, or give another -o")
    work.folder.mkdir(exist_ok=True)
    for path in _files(work.folder):
        name = path.relative_to(work.store).as_posix()
        entry = entries.get(name)
        if entry is None or _size(path) != entry.size:
            path.unlink()
        else:
            found += entry.size
    for name in [name for name, entry in entries.items() if _size(work.store / name) != entry.size]:
        del entries[name]
    return found


def _place(job: _Job, work: Workspace, force: bool) -> Path | None:
    """Make all durable and give it its name; returns where the replaced folder lies, if there was one."""
    fsync_tree(work.folder, frozenset(work.store / name for name in work.journal.entries))
    try:
        check_target(job.target, force, job.sources)
        work.journal.set_mark(os.lstat(work.folder).st_ino)
        return place_folder(work.folder, job.target, force)
    except UsageError as error:  # not the fault of the work: it is kept, as after a fault of the disk
        raise UsageError(str(error)) from FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def _leave(job: _Job, work: Workspace | None, keep: bool) -> str | None:
    """Keep what is finished, or remove the store; returns what is kept, and how to go on, in words."""
    if work is None:
        if (job.store / JOURNAL).is_file():
            return f"{job.store} keeps {EARLIER}"
        if not foreign_entries(job.store):
            remove(job.store)
    elif is_placed(job.store, work.journal):
        remove_placed(job.store)
    elif not keep or not work.journal.entries:
        remove(job.store)
    else:
        return (
            f"{job.store} keeps {_count(work)}: the same command goes on there; "
            "--fresh, or removing it, starts again"
        )
    return None


def _fault(error: BaseException) -> OSError | None:
    """The fault of a disk behind an error: another try may end otherwise. A verdict has none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read from JSON."""
    return json.loads(json.dumps(dict(content)))


def _count(work: Workspace) -> str:
    entries = work.journal.entries.values()
    files = "1 file" if len(entries) == 1 else f"{len(entries)} files"
    return f"{files} ({size_words(sum(entry.size for entry in entries))})"


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _size(path: Path) -> int | None:
    """Size of a regular file; None if it is none."""
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        return None
    return state.st_size if S_ISREG(state.st_mode) else None
