import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spp_fx.errors import SppFxError, UsageError
from spp_fx.storage import output as place
from spp_fx.storage.output import atomic_file, atomic_folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An earlier output."""
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("old")
    (tmp_path / "out" / "sub" / "x").write_text("old")
    return tmp_path / "out"


def test_the_folder_appears_whole_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "out"
    with atomic_folder(target) as folder:
        assert folder.parent == target.parent
        assert folder.name.startswith(f".out.tmp-{os.getpid()}-")
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert tree(tmp_path) == {"new/parents/out/sub/a": b"1"}
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit, UsageError, GeneratorExit])
def test_an_exception_leaves_nothing_and_passes_through(stop: type[BaseException], tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "new" / "out") as folder:
            (folder / "a").write_text("1")
            raise stop("stopped")

    with pytest.raises(stop):
        interrupted()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder_whole(force: bool, stop: type[BaseException], old: Path) -> None:
    before = tree(old.parent)

    def interrupted() -> None:
        with atomic_folder(old, force=force) as folder:
            (folder / "a").write_text("1")
            raise stop("stopped")

    with pytest.raises(stop if force else UsageError):
        interrupted()
    assert tree(old.parent) == before
    assert os.listdir(old.parent) == ["out"]


def test_an_existing_folder_is_refused_before_any_work(old: Path) -> None:
    with pytest.raises(UsageError, match="out: exists; give another -o or --force"), atomic_folder(old):
        pytest.fail("the block was entered")


@pytest.mark.parametrize(
    "marker", ["config.json", "adapter_config.json", "export.json", "sparsity.lock.json", ""]
)
def test_force_replaces_the_folder_whole(marker: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    if marker:  # else an empty folder
        (target / marker).write_text("old")
    with atomic_folder(target, force=True) as folder:
        (folder / "a").write_text("1")
        assert os.listdir(target) == ([marker] if marker else [])
    assert tree(tmp_path) == {"out/a": b"1"}


def test_force_does_not_touch_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with (
        pytest.raises(UsageError, match=r"not replaced by force, for it holds none of config\.json"),
        atomic_folder(tmp_path / "thesis", force=True),
    ):
        pytest.fail("the block was entered")
    assert tree(tmp_path) == {"thesis/chapter1.tex": b"years of work"}


@pytest.mark.parametrize("force", [False, True])
def test_targets_that_are_never_written_to(
    force: bool, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(old)
    (tmp_path / "dangling").symlink_to("absent")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    for target, sources, fault in [
        (old, [old], "is the input .* or holds it"),
        (tmp_path / "x" / ".." / "out", [old], "is the input .* or holds it"),
        (old, [tmp_path / "link"], "is the input .* or holds it"),
        (old, [old / "sub" / "x"], "is the input .* or holds it"),
        (tmp_path, [old], "is the input .* or holds it"),
        (tmp_path / "file", [], "is a file"),
        (tmp_path / "link", [], "is a symbolic link"),
        (tmp_path / "dangling", [], "is a symbolic link"),
        (Path(), [], "current folder" if force else "exists"),
        (tmp_path, [], "current folder" if force else "exists"),
    ]:
        with pytest.raises(UsageError, match=fault), atomic_folder(target, force, sources):
            pytest.fail("the block was entered")
    assert tree(tmp_path) == before


def test_a_target_inside_of_the_input_is_fine(old: Path) -> None:
    with atomic_folder(old / "merged", sources=[old]) as folder:
        (folder / "a").write_text("1")
    assert tree(old / "merged") == {"a": b"1"}


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def raced() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "b").write_text("theirs")

    with pytest.raises(UsageError, match="appeared meanwhile"):
        raced()
    assert tree(tmp_path) == {"out/b": b"theirs"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_brings_the_old_folder_back(
    failing: int, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real, calls = tree(old.parent), os.rename, 0

    def rename(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    def work() -> None:
        with atomic_folder(old, force=True) as folder:
            (folder / "a").write_text("1")

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(place, "_rename", lambda *_: False)  # a system that cannot exchange two folders
    with pytest.raises(SppFxError, match="out: was not written: Input/output error"):
        work()
    assert tree(old.parent) == before
    assert os.listdir(old.parent) == ["out"]


def test_an_old_folder_that_cannot_be_removed_is_only_a_warning(
    old: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def rmtree(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("spp_fx.storage.output.shutil.rmtree", rmtree)
    with caplog.at_level(logging.WARNING), atomic_folder(old, force=True) as folder:
        (folder / "a").write_text("1")
    assert tree(old) == {"a": b"1"}
    assert "could not be removed (Permission denied)" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_said_in_plain_words(code: int, tmp_path: Path) -> None:
    def full() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            raise OSError(code, os.strerror(code), str(folder / "a"))

    with pytest.raises(SppFxError, match=f"out: was not written: {os.strerror(code)}") as caught:
        full()
    assert isinstance(caught.value.__cause__, OSError)
    assert not list(tmp_path.iterdir())


def test_a_parent_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SppFxError, match="cannot be created"), atomic_folder(tmp_path / "file" / "a" / "out"):
        pytest.fail("the block was entered")


def test_everything_is_fsynced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
    names = [str(folder), str(folder / "sub" / "a"), str(folder / "sub"), str(tmp_path)]
    assert synced == names
    synced.clear()
    with atomic_file(tmp_path / "a.json") as file:
        file.write_text("1")
    assert synced == [str(file), str(tmp_path)]


KILLED = """
import signal, sys
from pathlib import Path
from spp_fx.storage.output import atomic_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
with atomic_folder(Path(sys.argv[1]), force=True) as folder:
    (folder / "config.json").write_text("half of it")
    print("working", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_the_old_folder_whole(kill: signal.Signals, old: Path) -> None:
    before = tree(old)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(old)], stdout=-1, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    process.send_signal(kill)
    process.wait(600)
    process.stdout.close()
    assert tree(old) == before
    others = [name for name in os.listdir(old.parent) if name != "out"]
    assert len(others) == (1 if kill == signal.SIGKILL else 0)
    assert all(name.startswith(".out.tmp-") for name in others)


def leave(target: Path, kind: str, content: str) -> Path:
    """What a killed run leaves beside its target."""
    path = place.sibling(target, kind)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = path.with_name(path.name.replace(f"{kind}-{os.getpid()}-", f"{kind}-{dead.pid}-"))
    path.mkdir()
    (path / "config.json").write_text(content)
    return path


def test_what_a_killed_run_left_is_removed_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left, other = leave(tmp_path / "out", "tmp", "x"), leave(tmp_path / "out2", "tmp", "x")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "out"])
    assert f"{left}: left by a killed run, removed" in caplog.text


def test_what_a_living_run_writes_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with atomic_folder(tmp_path / "out") as first:
        (first / "a").write_text("1")
        with atomic_folder(tmp_path / "out") as second:
            assert first.is_dir()
            (second / "a").write_text("2")
        (tmp_path / "out" / "a").unlink()
        (tmp_path / "out").rmdir()
    assert tree(tmp_path) == {"out/a": b"1"}
    assert f"{first}: another run on out writes there" in caplog.text


def test_a_folder_that_a_killed_run_put_aside_comes_back(tmp_path: Path) -> None:
    leave(tmp_path / "out", "old", "precious")
    with pytest.raises(UsageError, match="exists"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block was entered")
    assert tree(tmp_path) == {"out/config.json": b"precious"}


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "lock.json"
    with atomic_file(target) as file:
        file.write_text("1")
        assert not target.exists()
    with pytest.raises(UsageError, match="exists; give another"), atomic_file(target):
        pytest.fail("the block was entered")
    with atomic_file(target, force=True) as file:
        file.write_text("2")
        assert target.read_text() == "1"
    assert tree(tmp_path) == {"new/lock.json": b"2"}


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "lock.json"
    target.write_text("1")

    def interrupted(stop: BaseException | None) -> None:
        with atomic_file(target, force=True) as file:
            if stop is not None:
                file.write_text("2")
                raise stop

    with pytest.raises(KeyboardInterrupt):
        interrupted(KeyboardInterrupt())
    with pytest.raises(SppFxError, match="was not written: No space left"):
        interrupted(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(SppFxError, match="nothing was written"):
        interrupted(None)
    with pytest.raises(UsageError, match="is a folder"), atomic_file(tmp_path, force=True):
        pytest.fail("the block was entered")
    assert tree(tmp_path) == {"lock.json": b"1"}


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def raced() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write_text("mine")
            (tmp_path / "a").write_text("theirs")

    with pytest.raises(UsageError, match="appeared meanwhile"):
        raced()
    assert tree(tmp_path) == {"a": b"theirs"}
