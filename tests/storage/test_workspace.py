"""The folder that a long run works in: what it keeps, what it gives up, and what it never does."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage import workspace as module
from spp_fx.storage.workspace import Workspace, workspace
from tests.command import listing

PLAN = {"verb": "test", "shape": (2, 4)}
WHOLE = {"a": "first", "b": "second", "config.json": "{}"}


class Runs:
    """Runs that write files `a` and `b`, journaled, and a configuration that is not."""

    def __init__(self, target: Path) -> None:
        self.target, self.said, self.written = target, list[str](), list[str]()

    def __call__(
        self, stop: BaseException | None = None, after: str = "b", plan: Any = PLAN, **options: Any
    ) -> None:
        self.said.clear()
        self.written.clear()
        with workspace(self.target, plan, say=self.said.append, **options) as work:
            self.write(work, stop, after)

    def write(self, work: Workspace, stop: BaseException | None, after: str) -> None:
        if stop is not None and after == "":
            raise stop
        for name in ("a", "b"):
            if work.finished(name) is None:
                self.written.append(name)
                (work.folder / name).write_text(WHOLE[name])
                work.finish(name, letters=len(WHOLE[name]))
            if stop is not None and name == after:
                (work.folder / "torn").write_text("half of")
                raise stop
        (work.folder / "config.json").write_text(WHOLE["config.json"])

    @property
    def store(self) -> Path:
        return self.target.with_name(f".{self.target.name}.work")

    def is_whole(self) -> bool:
        found = {path.name: path.read_text() for path in self.target.iterdir()}
        return found == WHOLE and os.listdir(self.target.parent) == [self.target.name]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "new" / "out")


def test_the_folder_appears_whole_and_nothing_is_left_beside_it(runs: Runs) -> None:
    runs()
    assert runs.is_whole()
    assert runs.said == []


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), SystemExit(143), MemoryError(), OSError(errno.EIO, "bad")]
)
def test_a_stopped_run_goes_on_after_what_it_finished(runs: Runs, stop: BaseException) -> None:
    with pytest.raises(SppFxError if isinstance(stop, OSError) else type(stop)) as caught:
        runs(stop, after="a")
    assert not runs.target.exists()
    kept = f"{runs.store} keeps 1 file (5 bytes): the same command continues there; --fresh, or removing it"
    assert kept in (str(caught.value) if isinstance(stop, OSError) else caught.value.__notes__[-1])
    runs()
    assert runs.written == ["b"]
    assert runs.said == [f"{runs.store}: holds 1 file (5 bytes) of this work; continuing"]
    assert runs.is_whole()


@pytest.mark.parametrize(
    "stop",
    [
        KeyboardInterrupt(),
        SystemExit(),
        GeneratorExit(),
        ValueError(),
        OSError(errno.EIO, "bad"),
        FormatError("bad"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_finished_nothing_leaves_what_was_there(
    runs: Runs, stop: BaseException, old: bool
) -> None:
    if old:
        old_output(runs.target)
    with pytest.raises(SppFxError if isinstance(stop, OSError) else type(stop)):
        runs(stop, after="", force=old)
    assert listing(runs.target).keys() == {"config.json"} if old else not runs.target.parent.exists()
    assert not runs.store.exists()


def test_a_verdict_would_come_again_and_keeps_nothing(runs: Runs) -> None:
    with pytest.raises(FormatError, match=r"^model: bad$"):
        runs(FormatError("model: bad"))
    assert not runs.target.parent.exists()


def test_an_error_that_a_disk_caused_is_no_verdict(runs: Runs) -> None:
    error = SppFxError("x: failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SppFxError, match=r"^x: failed; .*\.out\.work keeps 2 files"):
        runs(error)
    runs()
    assert runs.is_whole()


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "Free space on its disk"),
        (errno.EDQUOT, "Free space on its disk"),
        (errno.EROFS, "on a disk you may write to"),
        (errno.EACCES, "on a disk you may write to"),
        (errno.EIO, "Check the disk"),
    ],
)
def test_a_disk_error_comes_with_its_fix(runs: Runs, code: int, fix: str) -> None:
    with pytest.raises(SppFxError, match=f"out: was not written: {os.strerror(code)}.*keeps 2 files.*{fix}"):
        runs(OSError(code, os.strerror(code)))


def test_an_input_that_is_lost_is_named(runs: Runs, tmp_path: Path) -> None:
    lost = tmp_path / "model" / "model.safetensors"
    lost.parent.mkdir()
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(lost))
    with pytest.raises(SppFxError, match=rf"{lost}\).*An input disappeared while it was read; restore it"):
        runs(error, sources=[lost.parent])


def test_another_plan_starts_over_and_says_so(runs: Runs) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    runs(plan={**PLAN, "shape": [1, 2]})
    assert runs.written == ["a", "b"]
    assert runs.said == [f"{runs.store}: holds the work of another command (shape); starting over"]
    assert runs.is_whole()


def test_fresh_starts_over_and_says_so(runs: Runs) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    runs(fresh=True)
    assert runs.written == ["a", "b"]
    assert runs.said == [f"{runs.store}: holds the work of an earlier run; starting over"]
    assert runs.is_whole()


def cut_last_line(store: Path) -> None:
    journal = store / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])


def garble_first_line(store: Path) -> None:
    journal = store / "journal.jsonl"
    journal.write_bytes(b"\0" * 30 + journal.read_bytes()[30:])


def lengthen(store: Path) -> None:
    (store / "out" / "b").write_text("second and more")


def lose(store: Path) -> None:
    (store / "out" / "b").unlink()


@pytest.mark.parametrize(
    ("damage", "again"),
    [(cut_last_line, ["b"]), (garble_first_line, ["a", "b"]), (lengthen, ["b"]), (lose, ["b"])],
)
def test_only_what_the_journal_proves_is_kept(
    runs: Runs, damage: Callable[[Path], None], again: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    damage(runs.store)
    runs()
    assert runs.written == again
    assert runs.is_whole()


def test_a_journal_that_was_cut_is_written_on_as_whole_lines(runs: Runs) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    cut_last_line(runs.store)
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    lines = (runs.store / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line).get("file") for line in lines] == [None, "out/a", "out/b"]


def test_a_file_is_finished_when_its_journal_line_is_on_the_disk(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, synced = runs.store / "journal.jsonl", list[str]()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(journal):
            synced.append(journal.read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    with workspace(runs.target, PLAN) as work:
        (work.folder / "a").write_text("first")
        work.finish("a")
        assert synced[-1] == journal.read_text() != ""


def test_a_journal_line_that_fails_is_taken_back(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, real = runs.store / "journal.jsonl", os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(journal) and '"out/b"' in journal.read_text():
            refuse()
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(SppFxError, match="Read-only file system"):
            runs()
    lines = journal.read_text().splitlines()
    assert [json.loads(line).get("file") for line in lines] == [None, "out/a"]
    runs()
    assert runs.written == ["b"]
    assert runs.is_whole()


def test_a_journal_that_cannot_be_opened_costs_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    cut_last_line(runs.store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(SppFxError, match=r"Read-only file system; .* keeps what an earlier run finished"):
            runs()
    runs()
    assert runs.written == ["b"]
    assert runs.is_whole()


def refuse(*_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_facts_come_back(runs: Runs) -> None:
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    with workspace(runs.target, PLAN) as work:
        assert work.finished("a") == {"letters": 5}
        assert work.finished("c") is None


def test_a_finished_file_of_another_size_is_removed_and_written_again(tmp_path: Path) -> None:
    def write(work: Workspace) -> None:
        (work.folder / "big").write_bytes(b"12345678")
        work.finish("big")
        (work.folder / "big").write_bytes(b"1234567890")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), workspace(tmp_path / "out", PLAN) as work:
        write(work)
    with workspace(tmp_path / "out", PLAN) as work:
        assert work.finished("big") is None
        assert not (work.folder / "big").exists()
        (work.folder / "big").write_bytes(b"12")


def test_files_are_finished_from_many_threads(tmp_path: Path) -> None:
    with workspace(tmp_path / "out", PLAN) as work:

        def one(number: int) -> None:
            (work.folder / f"f{number}").write_text(str(number))
            work.finish(f"f{number}", number=number)

        threads = [Thread(target=one, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [work.finished(f"f{number}") for number in range(16)] == [{"number": n} for n in range(16)]
        assert len((work.store / "journal.jsonl").read_text().splitlines()) == 17


def test_a_second_run_on_the_same_output_is_refused(runs: Runs, tmp_path: Path) -> None:
    with workspace(runs.target, PLAN) as work:
        with pytest.raises(UsageError, match=r"out: another process is writing it; wait for it"):
            runs()
        (work.folder / "a").write_text("mine")
    assert listing(runs.target).keys() == {"a"}


def old_output(target: Path, name: str = "config.json") -> None:
    target.mkdir(parents=True)
    if name != "none":
        (target / name).write_text("old")


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(
    "marker", ["config.json", "adapter_config.json", "export.json", "sparsity.lock.json", "none"]
)
def test_force_replaces_the_folder_whole(
    runs: Runs, marker: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    old_output(runs.target, marker)
    with pytest.raises(UsageError, match="exists"):
        runs()
    assert listing(runs.target.parent).keys() == ({"out", f"out/{marker}"} if marker != "none" else {"out"})
    runs(force=True)
    assert runs.is_whole()


def test_a_target_inside_of_the_input_is_fine(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "merged")
    runs(sources=[tmp_path])
    assert runs.is_whole()


def test_a_parent_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SppFxError, match="cannot be created"):
        Runs(tmp_path / "file" / "a" / "out")()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_brings_the_old_folder_back(
    runs: Runs, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.rename, 0

    def rename(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    old_output(runs.target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(module, "_exchange", lambda *_: False)
        with pytest.raises(SppFxError, match=r"out: was not written: Input/output error.*keeps 2 files"):
            runs(force=True)
    assert listing(runs.target).keys() == {"config.json"}
    runs(force=True)
    assert runs.written == []
    assert runs.is_whole()


def test_an_old_folder_that_cannot_be_removed_is_only_a_warning(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_output(runs.target)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        runs(force=True)
    assert runs.said == [f"{runs.store}: could not be removed; remove it"]
    assert listing(runs.target).keys() == WHOLE.keys()
    runs(force=True)  # the next run removes it
    assert runs.is_whole()


def test_everything_is_fsynced_before_the_rename(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        synced.append("renamed")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    runs()
    before, after = synced[: synced.index("renamed")], synced[synced.index("renamed") + 1 :]
    files = [str(runs.store / "out" / name) for name in WHOLE]
    assert {*files, str(runs.store / "out")} <= set(before)
    assert before[-1] == str(runs.store / "journal.jsonl")  # with the inode
    assert after[0] == str(runs.target.parent)


def test_an_output_that_appears_meanwhile_is_kept_and_so_is_the_work(runs: Runs) -> None:
    def raced() -> None:
        with workspace(runs.target, PLAN) as work:
            runs.write(work, None, "")
            old_output(runs.target)

    with pytest.raises(UsageError, match=r"out: exists; give another -o or --force; .* keeps 2 files"):
        raced()
    assert (runs.target / "config.json").read_text() == "old"
    runs(force=True)
    assert runs.written == []
    assert runs.is_whole()


def test_an_output_that_does_not_fit_is_refused_with_both_numbers(runs: Runs) -> None:
    with pytest.raises(
        SppFxError, match=r"out: needs 9,000,000\.0 GB, but only [\d.,]+ .B are free on its disk"
    ):
        runs(need=9 * 10**15)
    assert not runs.target.parent.exists()


def test_a_folder_of_somebody_else_is_not_touched(runs: Runs) -> None:
    runs.store.mkdir(parents=True)
    (runs.store / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.tex, which spp-fx did not write; move it away"):
        runs()
    assert (runs.store / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("left", [[], ["lock"], ["journal.jsonl", "lock"]])
def test_a_store_without_a_plan_is_removed_even_if_the_output_is_refused(runs: Runs, left: list[str]) -> None:
    runs()
    runs.store.mkdir()
    for name in left:
        (runs.store / name).touch()
    with pytest.raises(UsageError, match="exists"):
        runs()
    assert runs.is_whole()


def test_a_link_in_the_place_of_the_work_is_refused(runs: Runs, tmp_path: Path) -> None:
    runs.target.parent.mkdir()
    runs.store.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is a symbolic link"):
        runs()


def test_long_names_have_room_for_the_work(tmp_path: Path) -> None:
    runs = Runs(tmp_path / ("n" * 250))
    runs()
    assert runs.is_whole()


KILLED = """
import os, signal, sys
from pathlib import Path
from spp_fx.storage import workspace as module

where, target = sys.argv[1], Path(sys.argv[2])
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if where == "before":
    module._exchange = os.rename = die
elif where == "after":
    module.confirm_name = die
elif where == "aside":  # between the two renames of a system that cannot exchange folders
    module._exchange = lambda *_: False
    rename = os.rename
    def one(source, to):
        rename(source, to)
        die()
    os.rename = one
with module.workspace(target, {"verb": "test", "shape": (2, 4)}, force=True) as work:
    for name, text in {"a": "first", "b": "second", "config.json": "{}"}.items():
        (work.folder / name).write_text(text)
        if where == "writing":
            die()
        if name != "config.json":
            work.finish(name, letters=len(text))
        if name == "b" and where in ("SIGTERM", "SIGINT"):
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), getattr(signal, where))
"""


def killed(where: str, target: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(target)], capture_output=True, check=False
    )
    return done.returncode


def test_a_run_killed_while_it_writes_leaves_the_old_folder_whole(runs: Runs) -> None:
    old_output(runs.target)
    assert killed("writing", runs.target) == -signal.SIGKILL
    assert listing(runs.target).keys() == {"config.json"}
    runs(force=True)
    assert runs.written == ["a", "b"]
    assert runs.is_whole()


@pytest.mark.parametrize("old", [True, False])
def test_a_run_killed_before_its_name_is_given_only_has_to_give_it(runs: Runs, old: bool) -> None:
    if old:
        old_output(runs.target)
    assert killed("before", runs.target) == -signal.SIGKILL
    assert listing(runs.target).keys() == {"config.json"} if old else not runs.target.exists()
    runs(force=old)
    assert runs.written == []
    assert runs.is_whole()


@pytest.mark.parametrize("old", [True, False])
def test_a_run_killed_after_its_name_is_given_is_not_taken_for_unfinished(runs: Runs, old: bool) -> None:
    if old:
        old_output(runs.target)
    assert killed("after", runs.target) == -signal.SIGKILL
    assert {path.name: path.read_text() for path in runs.target.iterdir()} == WHOLE
    assert runs.store.is_dir()
    with pytest.raises(UsageError, match="exists"):
        runs()
    assert runs.is_whole()


def test_a_folder_put_aside_by_a_run_that_was_killed_comes_back(runs: Runs) -> None:
    old_output(runs.target)
    assert killed("aside", runs.target) == -signal.SIGKILL
    assert not runs.target.exists()
    with pytest.raises(UsageError, match="exists"):
        runs()
    assert (runs.target / "config.json").read_text() == "old"
    assert f"{runs.target}: restored; a run was killed while it replaced this folder" in runs.said
    runs(force=True)
    assert runs.written == []
    assert runs.is_whole()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_terminated_run_keeps_what_it_finished(runs: Runs, name: str) -> None:
    assert killed(name, runs.target) != 0
    assert not runs.target.exists()
    runs()
    assert runs.written == []
    assert runs.is_whole()


def test_a_full_disk_keeps_what_fits_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """A real one, of a megabyte, where the test may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    try:
        (disk / "ballast").write_bytes(bytes(600_000))

        def write() -> list[str]:
            written: list[str] = []
            with workspace(disk / "out", PLAN) as work:
                for name in "abc":
                    if work.finished(name) is None:
                        written.append(name)
                        (work.folder / name).write_bytes(bytes(200_000))
                        work.finish(name)
            return written

        with pytest.raises(
            SppFxError, match=r"No space left on device.*keeps \d files? .*Free space on its disk"
        ):
            write()
        assert not (disk / "out").exists()
        (disk / "ballast").unlink()
        assert write() == ["c"]
        assert listing(disk / "out").keys() == {"a", "b", "c"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_work_that_was_moved_behind_a_link_is_not_touched(runs: Runs, tmp_path: Path) -> None:
    """Somebody moved `out/` to another disk: what lies there is theirs."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("years")
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    shutil.rmtree(runs.store / "out")
    (runs.store / "out").symlink_to(elsewhere)
    with pytest.raises(UsageError, match="is a symbolic link"):
        runs()
    assert (elsewhere / "thesis.tex").read_text() == "years"
    assert not runs.target.exists()
