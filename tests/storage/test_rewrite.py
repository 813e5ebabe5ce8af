"""Files written again span by span: the changes are where they belong, every other byte is the source's."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage import writer as module
from spp_fx.storage.safetensors import Shard
from spp_fx.storage.writer import Change, rewrite
from tests.effort import examples


@pytest.fixture
def shard(tmp_path) -> Shard:
    path = tmp_path / "a.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            f"t{i}": torch.randint(0, 256, (997 * i,), dtype=torch.uint8, generator=generator)
            for i in range(5)
        },
        path,
    )
    return Shard.open(path)


def invert(before: np.ndarray, after: np.ndarray) -> int:
    after[:] = ~before
    return before.size


@examples(12)
@given(cuts=st.lists(st.integers(0, 9970), max_size=12, unique=True), copy=st.sampled_from([100, 64 << 20]))
def test_changed_spans_change_and_all_else_is_copied(tmp_path_factory, cuts, copy):
    folder = tmp_path_factory.mktemp("rewrite")
    data = torch.randint(0, 256, (9970,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    save_file({"t": data}, folder / "a.safetensors")
    source = Shard.open(folder / "a.safetensors")
    edges = sorted(source.header.data_start + cut for cut in cuts)
    changes = [Change(a, b, invert) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_COPY", copy)
        made = list(rewrite(source, folder / "b.safetensors", changes))
    expected = np.fromfile(source.path, np.uint8)
    for change in changes:
        expected[change.start : change.stop] ^= 0xFF
    assert made == [change.stop - change.start for change in changes]
    assert np.array_equal(np.fromfile(folder / "b.safetensors", np.uint8), expected)


def test_a_file_that_exists_is_not_written_over(shard):
    with pytest.raises(UsageError, match="exists"):
        list(rewrite(shard, shard.path, []))


@pytest.mark.parametrize("stop_early", [False, True])
def test_nothing_is_left_of_a_rewrite_that_fails(shard, tmp_path, stop_early):
    def fail(before, after):
        raise FormatError("no")

    start = shard.header.data_start
    changes = [Change(start, start + 8, invert), Change(start + 8, start + 16, fail)]
    steps = rewrite(shard, tmp_path / "b.safetensors", changes)
    if stop_early:
        next(steps)
        steps.close()
    else:
        with pytest.raises(FormatError, match="no"):
            list(steps)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_source_that_shrank_is_named(shard, tmp_path):
    os.truncate(shard.path, shard.header.data_start + 100)
    for changes in ([], [Change(shard.header.data_start, shard.header.data_end, invert)]):
        with pytest.raises(FormatError, match=r"a\.safetensors: shrank"):
            list(rewrite(shard, tmp_path / "b.safetensors", changes))


def test_a_full_disk_is_known_before_anything_is_computed(shard, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    called: list[int] = []

    def note(before, after):
        called.append(before.size)
        return 0

    with pytest.raises(SppFxError, match="No space left"):
        list(
            rewrite(
                shard,
                tmp_path / "b.safetensors",
                [Change(shard.header.data_start, shard.header.data_end, note)],
            )
        )
    assert not called
    assert not Path(tmp_path / "b.safetensors").exists()


def test_the_same_bytes_without_copies_in_the_kernel(shard, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range")
    list(rewrite(shard, tmp_path / "b.safetensors", []))
    assert (tmp_path / "b.safetensors").read_bytes() == shard.path.read_bytes()
