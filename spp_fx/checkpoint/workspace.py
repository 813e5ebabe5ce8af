"""The folder that a long run works in: what is finished stays finished when the run is killed."""

import errno
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from spp_fx.checkpoint.disk import check_space, explain, fsync_file, fsync_folder, fsync_tree, size_words
from spp_fx.checkpoint.journal import Entry, Journal
from spp_fx.checkpoint.place import (
    check_target,
    confirm,
    make_parents,
    place_folder,
    remove_parents,
    remove_replaced,
    stem,
    tidy,
)
from spp_fx.checkpoint.store import (
    EARLIER,
    JOURNAL,
    OUT,
    empty,
    is_placed,
    locked,
    read_plan,
    remove,
    remove_placed,
    strangers,
    tidy_placed,
    write_plan,
)
from spp_fx.errors import SppFxError, UsageError, WriteError
from spp_fx.version import VERSION


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

    def part(self, name: str) -> tuple[int, dict[str, Any]] | None:
        """How many bytes of an unfinished file of the output are there, and the facts; None to begin anew.

        The file has just these bytes when the block begins.
        """
        entry = self.journal.entries.get(f"{OUT}/{name}")
        return None if entry is None or not entry.part else (entry.size, entry.facts)

    def keep_part(self, name: str, size: int, **facts: Any) -> None:
        """Say that the first `size` bytes of a file of the output are durable; its writer has fsynced it."""
        fsync_folder((self.folder / name).parent)
        self.journal.enter(f"{OUT}/{name}", Entry(size, _plain(facts), part=True))

    def _known(self, path: str) -> dict[str, Any] | None:
        entry = self.journal.entries.get(path)
        whole = entry is not None and not entry.part and _size(self.store / path) == entry.size
        return entry.facts if entry is not None and whole else None

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
    if known is None and (odd := strangers(job.store)):
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
    """Hold `out/` to the journal: what is not in it goes, a part is cut to what is durable of it.

    Returns:
        How many bytes of the output are there.
    """
    entries, found = work.journal.entries, 0
    if work.folder.is_symlink():
        raise UsageError(f"{work.folder}: is a symbolic link; remove it, or give another -o")
    work.folder.mkdir(exist_ok=True)
    for path in _files(work.folder):
        name = path.relative_to(work.store).as_posix()
        entry, size = entries.get(name), _size(path)
        if entry is None or size is None or size < entry.size or (size > entry.size and not entry.part):
            path.unlink()
            continue
        if size > entry.size:
            os.truncate(path, entry.size)
        found += entry.size
    for name in [name for name, entry in entries.items() if _size(work.store / name) != entry.size]:
        del entries[name]
    return found


def _place(job: _Job, work: Workspace, force: bool) -> Path | None:
    """Make all durable and give it its name; returns where the replaced folder lies, if there was one."""
    whole = {name for name, entry in work.journal.entries.items() if not entry.part}
    fsync_tree(work.folder, frozenset(work.store / name for name in whole))
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
        if not strangers(job.store):
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
