"""Object files from disk are executed: only whole ones, from a trusted hand, under their own key."""

import os
import stat
from pathlib import Path

import pytest

from spp_fx.native import object_cache

KEY, NAME, CODE = "a" * 64, "kernels.o", b"machine code"

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")


@pytest.fixture
def stored(tmp_path) -> Path:
    object_cache.store([tmp_path], NAME, KEY, CODE)
    return tmp_path / NAME


def loaded(path: Path, key: str = KEY) -> bytes | None:
    return object_cache.load([path.parent], path.name, key)


def test_what_was_stored_is_loaded(stored):
    assert loaded(stored) == CODE
    assert [path.name for path in stored.parent.iterdir()] == [NAME], "no temporary file stays"
    assert stat.S_IMODE(stored.stat().st_mode) == 0o644


@pytest.mark.parametrize("at", [0, 31, 32, -1])
def test_a_changed_byte_is_found(stored, at):
    content = bytearray(stored.read_bytes())
    content[at] ^= 1
    stored.write_bytes(content)
    assert loaded(stored) is None


@pytest.mark.parametrize("size", [0, 10, 32, 40])
def test_a_file_cut_short_is_found(stored, size):
    stored.write_bytes(stored.read_bytes()[:size])
    assert loaded(stored) is None


def test_code_of_another_key_is_not_loaded(stored):
    assert loaded(stored, "b" * 64) is None


@pytest.mark.parametrize("mode", [0o646, 0o664, 0o666])
def test_a_file_that_others_may_write_is_not_loaded(stored, mode):
    stored.chmod(mode)
    assert loaded(stored) is None


def test_another_users_file_is_not_loaded(stored, monkeypatch):
    if os.geteuid() == 0:
        os.chown(stored, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert loaded(stored) is None


def test_roots_file_is_loaded_by_anyone():
    status = os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    assert object_cache._trusted(status)


def test_a_link_is_not_followed(stored):
    link = stored.with_name("link.o")
    link.symlink_to(stored)
    assert loaded(link) is None


def test_a_pipe_in_the_way_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / NAME)
    assert loaded(tmp_path / NAME) is None


def test_the_next_folder_is_taken_where_one_cannot_be_written(tmp_path):
    (tmp_path / "a file").touch()
    folders = [tmp_path / "a file", tmp_path / "new" / "folder"]
    object_cache.store(folders, NAME, KEY, CODE)
    assert (folders[1] / NAME).exists()
    assert object_cache.load(folders, NAME, KEY) == CODE


def test_a_file_that_is_not_trusted_hides_none_behind_it(stored, tmp_path):
    stored.chmod(0o666)
    behind = tmp_path / "behind"
    object_cache.store([behind], NAME, KEY, CODE)
    assert object_cache.load([tmp_path, behind], NAME, KEY) == CODE


def test_no_folder_at_all_is_no_error(tmp_path):
    (tmp_path / "a file").touch()
    object_cache.store([tmp_path / "a file"], NAME, KEY, CODE)
    assert object_cache.load([tmp_path / "a file"], NAME, KEY) is None


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    object_cache.store([tmp_path], NAME, KEY, CODE)
    assert list(tmp_path.iterdir()) == []


def test_the_folders_are_the_byte_codes_and_the_users(tmp_path, monkeypatch):
    source = tmp_path / "package" / "module.py"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert object_cache.folders(source) == [
        tmp_path / "package" / "__pycache__",
        tmp_path / "cache" / "spp-fx",
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert object_cache.folders(source) == [tmp_path / "package" / "__pycache__"]
