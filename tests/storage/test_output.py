"""A file that appears whole or not at all, and the targets that no folder is written to."""

import errno
import os
import time
from pathlib import Path

import pytest

from spp_fx.errors import SppFxError, UsageError
from spp_fx.storage.output import atomic_file, check_target


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("days", [0, 2])
def test_temporary_files_of_killed_processes_are_removed_after_a_day(days: int, tmp_path: Path) -> None:
    left, other = tmp_path / ".a.json.tmp-0123", tmp_path / ".b.json.tmp-0123"
    for path in (left, other):
        path.write_text("half")
        then = time.time() - days * 86_400 - 60
        os.utime(path, (then, then))
    with atomic_file(tmp_path / "a.json") as file:
        file.write_text("1")
    assert tree(tmp_path).keys() == {"a.json", other.name, *([left.name] if days == 0 else [])}


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


def test_a_file_is_fsynced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_file(tmp_path / "a.json") as file:
        file.write_text("1")
    assert synced == [str(file), str(tmp_path)]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An earlier output."""
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("old")
    (tmp_path / "out" / "sub" / "x").write_text("old")
    return tmp_path / "out"


def test_force_does_not_touch_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"--force does not replace it, since it holds none of config\.json"):
        check_target(tmp_path, True, [])


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
    for target, sources, fault in [
        (old, [old], "is the input .* or contains it"),
        (tmp_path / "x" / ".." / "out", [old], "is the input .* or contains it"),
        (old, [tmp_path / "link"], "is the input .* or contains it"),
        (old, [old / "sub" / "x"], "is the input .* or contains it"),
        (tmp_path, [old], "is the input .* or contains it"),
        (tmp_path / "file", [], "is a file"),
        (tmp_path / "link", [], "is a symbolic link"),
        (tmp_path / "dangling", [], "is a symbolic link"),
        (Path(), [], "current folder" if force else "exists"),
        (tmp_path, [], "current folder" if force else "exists"),
    ]:
        with pytest.raises(UsageError, match=fault):
            check_target(target, force, sources)
