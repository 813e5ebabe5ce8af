"""A report never overwrites an artifact, a lock or the policy."""

import os
import shutil
from pathlib import Path

import pytest

from spp_fx.sparsity.pattern import NM
from tests.command import command, listing, one_line
from tests.handmade import lock_of, save_model, sparse

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """models/a and models/b with their locks, alone/w.safetensors, a policy of all; the current folder."""
    weights = {NAME: sparse(8, 16)}
    for name in ("models/a", "models/b"):
        save_model(tmp_path / name, [weights])
        (tmp_path / name / "sparsity.lock.json").write_text(lock_of(weights, NM(2, 4)).dumps())
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "models" / "a" / "model.safetensors", tmp_path / "alone" / "w.safetensors")
    shutil.copy(tmp_path / "models" / "a" / "sparsity.lock.json", tmp_path / "alone" / "sparsity.lock.json")
    shutil.copy(tmp_path / "models" / "a" / "sparsity.lock.json", tmp_path / "some.lock.json")
    (tmp_path / "link").symlink_to("models")
    (tmp_path / "spp-fx.toml").write_text(
        '[[verify.artifact]]\npath = "models/a"\n'
        '[[verify.artifact]]\npath = "models/b"\nlock = "some.lock.json"\n'
        '[[verify.artifact]]\npath = "alone/w.safetensors"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = {
    "the weights": "--junit models/a/model.safetensors",
    "the weights by a link": "--junit link/a/model.safetensors",
    "the weights by dots": "--sarif alone/../models/a/model.safetensors",
    "the lock beside": "--sarif models/a/sparsity.lock.json",
    "a new file of an artifact": "--junit models/a/model.safetensors.index.json",
    "a new folder of an artifact": "--sarif models/b/deep/config.json",
    "a report of another kind": "--sarif models/a/r.xml",
    "a lock": "--junit some.lock.json",
    "the policy": "--sarif spp-fx.toml",
    "a single file": "--junit alone/w.safetensors",
    "the lock beside a single file": "--junit alone/sparsity.lock.json",
    "the other artifact": "models/a --against models/b --junit models/b/config.json",
    "one file twice": "--junit r --sarif ./r",
    "one file twice by a link": "--junit models/r.xml --sarif link/r.xml",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_report_that_would_overwrite_an_input_is_an_error_before_anything_is_checked(repository, name):
    before = listing(repository)
    result = command("verify", *REFUSED[name].split(), "-q")
    assert result.code == 2
    assert result.out == ""
    assert one_line(result.err).startswith("spp-fx: --")
    assert listing(repository) == before


@pytest.mark.parametrize(
    "line", ["--junit r", "--junit alone/new", "--junit models/a.xml --sarif models/out.json"]
)
def test_any_other_place_is_written_to(repository, line):
    assert command("verify", *line.split(), "-q").code == 0
    assert all(Path(word).is_file() for word in line.split()[1::2])


def test_the_current_folder_may_be_the_artifact(repository, monkeypatch):
    monkeypatch.chdir("models/a")
    for _ in range(2):
        assert command("verify", "--junit", "spp-fx-junit.xml", "--sarif", "r/spp-fx.sarif", "-q").code == 0


def test_a_pipe_is_not_opened_for_a_report(repository):
    os.mkfifo("pipe")
    result = command("verify", "models/a", "--junit", "pipe", "-q")
    assert result.code == 1
    assert result.out.startswith("ok: ")
    assert "pipe: the report was not written: the path is a pipe" in one_line(result.err)
    assert "--force" not in result.err
