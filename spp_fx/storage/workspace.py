"""Output folders that appear whole or not at all; a run that was stopped continues where it was.

Beside the output NAME lies `.NAME.work` while a run writes it:

    lock            locked by the run; the system releases it when the process dies
    journal.jsonl   the plan of the run, a line for each finished file, and the inode of out/ before it is renamed
    out/            the files of the output; renamed to NAME at the end
    old/            the folder that was NAME, on file systems that cannot exchange two folders
    ...             what else the run keeps
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, cast

from spp_fx.errors import SppFxError, UsageError, WriteError
from spp_fx.storage.output import (
    as_given,
    check_space,
    check_target,
    confirm_name,
    explain,
    fsync_file,
    fsync_folder,
    fsync_tree,
    hidden_name,
    make_parents,
    remove_parents,
    size_words,
)
from spp_fx.version import VERSION

_JOURNAL, _LOCK, _OUT, _OLD = "journal.jsonl", "lock", "out", "old"
_EXCHANGE, _AT_FDCWD = 2, -100  # of linux/fs.h
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

Say = Callable[[str], None]


@dataclass(frozen=True)
class Workspace:
    """Where a run writes, and what it, or an earlier run with the same plan, has finished.

    Attributes:
        folder: for the files of the output.
        store: for files and folders that are not output, under names that the workspace does not use.
        journal: of both.
    """

    folder: Path
    store: Path
    journal: "Journal"

    def finished(self, name: str) -> dict[str, Any] | None:
        """The facts of a finished file of the output; None if it has to be written, from its start.

        Args:
            name: its path in `folder`.
        """
        return self.kept(f"{_OUT}/{name}")

    def finish(self, name: str, **facts: Any) -> None:
        """Make a file of the output durable and record it in the journal. Thread-safe.

        Args:
            name: its path in `folder`.
            facts: what `finished` returns in a later run; JSON.
        """
        self.keep(f"{_OUT}/{name}", **facts)

    def kept(self, name: str) -> dict[str, Any] | None:
        """As `finished`, for a file of `store`."""
        size, facts = self.journal.files.get(name, (None, {}))
        return facts if size is not None and _size(self.store / name) == size else None

    def keep(self, name: str, **facts: Any) -> None:
        """As `finish`, for a file of `store`."""
        path = self.store / name
        fsync_file(path)
        fsync_folder(path.parent)
        self.journal.append({"file": name, "size": path.stat().st_size, "facts": facts})


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
    say: Say = lambda line: None,
) -> Generator[Workspace, None, None]:
    """A folder to write `target` in; it is renamed to `target`, whole and durable, when the block ends well.

    A run that is killed, interrupted or stopped by a disk error leaves `target` absent, or the old one whole. Its
    finished files stay in `.NAME.work`, and the next run with the same plan continues there. After any other
    SppFxError, which would occur again, nothing is kept.

    Args:
        target: the folder to appear; missing parents are created.
        plan: what the result depends on beside `inputs`, as JSON; the version of spp-fx is added.
        force: replace an existing folder, as a whole and at the very end.
        fresh: start over even if an earlier run had the same plan.
        sources: folders or files that are read meanwhile; `target` must not be or contain one of them.
        inputs: files of which every byte counts: size and modification time are part of the plan, and must be
            the same at the end.
        need: bytes of the whole output, where that is known.
        say: called with what is kept of an earlier run, or why it is not.

    Raises:
        UsageError: another process writes `target`, or what `check_output` refuses.
        SppFxError: the disk is full, read-only or fails, or an input was lost; names what is kept, and where.
    """
    target, sources = as_given(target), tuple(sources)
    check_output(target, force, sources, say)
    made = make_parents(target.parent)
    try:
        with _locked_journal(target, sources) as journal:
            store = _store(target)
            work = Workspace(store / _OUT, store, journal)
            try:
                stamps = {str(path): _stamp(path) for path in inputs}
                done = _prepare(work, {"spp_fx": VERSION, **_plain(plan), "inputs": stamps}, fresh, say)
                check_space(target, store, need - done)
                yield work
                _check_inputs(target, stamps)
                _place(work, target, force, sources)
            except BaseException as error:
                _fail(work, target, sources, error)
                raise
            confirm_name(target, made)
            if not _remove(store, journal):
                say(f"{store}: could not be removed; remove it")
    except BaseException:
        remove_parents(made)
        raise


def check_output(
    target: Path, force: bool, sources: Iterable[Path] = (), say: Say = lambda line: None
) -> None:
    """Raise before long work what `workspace` would; first complete what killed runs left beside `target`.

    Raises:
        UsageError: `target` exists (without `force`), is a file, a link, one of the sources or above one, the
            current folder or above it, or (with `force`) a non-empty folder that holds none of `REPLACEABLE`;
            another process writes it.
    """
    target, sources = as_given(target), tuple(sources)
    store = _store(target)
    if store.is_symlink():
        raise UsageError(f"{store}: is a symbolic link; remove it, or give another -o")
    held = _names(store)
    if foreign := sorted(held - {_LOCK}) if _JOURNAL not in held else []:
        raise UsageError(f"{store}: holds {foreign[0]}, which spp-fx did not write; move it away")
    if store.is_dir():
        with _locked_journal(target, sources) as journal:
            _settle(target, journal, say)
    check_target(target, force, sources)


def _settle(target: Path, journal: "Journal", say: Say) -> None:
    """Complete what a run was doing when it was killed: remove a store of no use, put a folder back."""
    store, placed = _store(target), _is_placed(_store(target), journal)
    if not placed and (store / _OLD).is_dir() and not os.path.lexists(target):
        os.rename(store / _OLD, target)
        say(f"{target}: restored; a run was killed while it replaced this folder")
    if placed or journal.plan is None:
        _remove(store, journal)


def _prepare(work: Workspace, plan: dict[str, Any], fresh: bool, say: Say) -> int:
    """Make the store hold what its journal says, or nothing if it is of another plan.

    Returns:
        How many bytes of the output are finished.
    """
    journal = work.journal
    if journal.plan != plan or fresh:
        if (known := journal.plan) is not None:
            other = sorted(key for key in {*known, *plan} if known.get(key) != plan.get(key))
            whose = f"another command ({', '.join(other)})" if other else "an earlier run"
            say(f"{work.store}: holds the work of {whose}; starting over")
        journal.clear()
        _empty(work.store)
        journal.append({"plan": plan})
    if work.folder.is_symlink():
        raise UsageError(f"{work.folder}: is a symbolic link; remove it, or give another -o")
    work.folder.mkdir(exist_ok=True)
    for name, (size, _) in list(journal.files.items()):
        if _size(work.store / name) != size:
            del journal.files[name]
    done = 0
    for parent, _, names in os.walk(work.folder):
        for path in (Path(parent, name) for name in names):
            if (name := path.relative_to(work.store).as_posix()) in journal.files:
                done += journal.files[name][0]
            else:
                path.unlink()
    if journal.files:
        say(f"{work.store}: holds {_count(journal)} of this work; continuing")
    return done


def _check_inputs(target: Path, stamps: Mapping[str, list[int]]) -> None:
    """An input that changed meanwhile may be in the output in two versions."""
    for path, before in stamps.items():
        if _stamp(Path(path)) != before:
            raise SppFxError(
                f"{path}: changed while {target} was written from it; nothing was written. Run it again"
            )


def _place(work: Workspace, target: Path, force: bool, sources: Iterable[Path]) -> None:
    """Make all files durable and rename the folder; one that was there before is in the store then."""
    fsync_tree(work.folder, frozenset(work.store / name for name in work.journal.files))
    try:
        check_target(target, force, sources)
    except UsageError as error:  # not the fault of the work: it is kept, as after a disk error
        raise UsageError(str(error)) from FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    work.journal.append({"inode": os.lstat(work.folder).st_ino})
    if not os.path.lexists(target):
        os.rename(work.folder, target)  # fails if a folder with something in it appears now
    elif not _exchange(work.folder, target):
        old = work.store / _OLD
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        try:
            os.rename(work.folder, target)
        except BaseException:
            os.rename(old, target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders by Linux' renameat2; False where the C library or the file system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _is_placed(store: Path, journal: "Journal") -> bool:
    """Whether out/ was renamed: it was about to be, and is another folder now, or none."""
    if journal.inode is None:
        return False
    try:
        return os.lstat(store / _OUT).st_ino != journal.inode
    except FileNotFoundError:
        return True


def _fail(work: Workspace, target: Path, sources: Iterable[Path], error: BaseException) -> None:
    """Keep the finished files where another run may end well, else remove the store; raise or note what is kept."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    store, left = work.store, None
    final = cause is None and isinstance(error, SppFxError)
    if final or not work.journal.files or _is_placed(store, work.journal):
        _remove(store, work.journal)
    else:
        left = (
            f"{store} keeps {_count(work.journal)}: the same command continues there; "
            "--fresh, or removing it, starts over"
        )
    if cause is not None and isinstance(error, (OSError, WriteError)):
        raise explain(target, cause, left or "nothing was left behind", sources) from error
    if left is not None and isinstance(error, SppFxError):
        raise type(error)(f"{error}; {left}") from error
    if left is not None:
        error.add_note(left)


class Journal:
    """A file of JSON lines, each durable once it is written: the plan, finished files, an inode.

    Attributes:
        plan: of the run; None if there is none.
        files: size and facts of each finished file, by its path in the store; a later line replaces an earlier one.
        inode: of the folder that is about to be renamed.
    """

    def __init__(self, path: Path) -> None:
        """Open or create a journal; a line that a crash cut off, and what follows it, is dropped."""
        self._reset()
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o666)
        try:
            self._read(path.read_bytes())
            fsync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def _reset(self) -> None:
        self.plan: dict[str, Any] | None = None
        self.files: dict[str, tuple[int, dict[str, Any]]] = {}
        self.inode: int | None = None

    def _read(self, content: bytes) -> None:
        whole = 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n") or not self._take(line):
                break
            whole += len(line)
        if whole < len(content):
            os.ftruncate(self._file, whole)

    def _take(self, line: bytes) -> bool:
        try:
            content = json.loads(line)
        except ValueError:
            return False
        match content:
            case {"plan": dict(plan)}:
                self.plan = cast("dict[str, Any]", plan)
            case {"file": str(name), "size": int(size), "facts": dict(facts)} if self.plan is not None:
                self.files[name] = size, cast("dict[str, Any]", facts)
            case {"inode": int(inode)} if self.plan is not None:
                self.inode = inode
            case _:
                return False
        return True

    def append(self, content: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns, or taken back if that fails. Thread-safe."""
        line = json.dumps(content).encode() + b"\n"
        with self._lock:
            start = os.fstat(self._file).st_size
            try:
                done = 0
                while done < len(line):
                    done += os.write(self._file, line[done:])
                os.fsync(self._file)
            except BaseException:
                os.ftruncate(self._file, start)
                raise
            self._take(line)

    def clear(self) -> None:
        """Remove every line; nothing counts as finished when this returns."""
        os.ftruncate(self._file, 0)
        os.fsync(self._file)
        self._reset()

    def close(self) -> None:
        os.close(self._file)


def _store(target: Path) -> Path:
    return target.with_name(f"{hidden_name(target)}.work")


@contextmanager
def _locked_journal(target: Path, sources: Iterable[Path]) -> Generator[Journal, None, None]:
    """The journal of a store that no other process has within the block; both are created where missing."""
    store = _store(target)
    with ExitStack() as stack:
        try:
            stack.callback(os.close, _lock(target, store))
            journal = Journal(store / _JOURNAL)
            stack.callback(journal.close)
        except OSError as error:
            known = _JOURNAL in _names(store)
            left = f"{store} keeps what an earlier run finished" if known else "nothing was left behind"
            raise explain(target, error, left, sources) from error
        yield journal


def _lock(target: Path, store: Path) -> int:
    """A descriptor that holds the lock of the store while it is open."""
    while True:
        with suppress(FileExistsError):
            store.mkdir()
        try:
            lock = os.open(store / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # another run ended and removed the store between these lines
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(store / _LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise UsageError(
                    f"{target}: another process is writing it; wait for it, or give another -o"
                ) from error
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            with suppress(OSError):
                (store / _LOCK).unlink()
                store.rmdir()
            raise UsageError(
                f"{target}: its file system has no locks (flock: {error.strerror}), so two runs could write it "
                "at once; give another -o and copy the output there"
            ) from error
        os.close(lock)


def _remove(store: Path, journal: Journal) -> bool:
    """Remove a store, first the journal's entries of finished files; False if some of it stays.

    An empty journal stays with it, so that the next run on the same target tries again.
    """
    try:
        journal.clear()
        _empty(store)
        if _names(store) != {_LOCK, _JOURNAL}:
            return False
        (store / _JOURNAL).unlink()
        (store / _LOCK).unlink()
    except OSError:
        return False
    with suppress(OSError):  # another run has begun in it
        store.rmdir()
    return True


def _empty(store: Path) -> None:
    for path in store.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (_LOCK, _JOURNAL):
            path.unlink()


def _names(store: Path) -> set[str]:
    try:
        return set(os.listdir(store))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _stamp(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _size(path: Path) -> int | None:
    """Size of a regular file; None if there is none."""
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        return None
    return state.st_size if S_ISREG(state.st_mode) else None


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return json.loads(json.dumps(dict(content)))


def _count(journal: Journal) -> str:
    files = "1 file" if len(journal.files) == 1 else f"{len(journal.files)} files"
    return f"{files} ({size_words(sum(size for size, _ in journal.files.values()))})"
