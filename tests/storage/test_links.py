"""Symbolic links: followed within a folder's tree and its Hugging Face cache; elsewhere only where allowed."""

import os
import shutil
from pathlib import Path

import pytest

from spp_fx.errors import FormatError, SppFxError
from spp_fx.parallel import in_order
from spp_fx.storage.folder import ModelFolder, within
from spp_fx.storage.links import links_allowed

REVISION = "0123abc"


def digest(number: int) -> str:
    return f"{number:064x}"


def snapshot_of(folder: Path, repository: Path, *, below: str = "", store: bool = False) -> Path:
    """A model as huggingface_hub keeps it: links into the repository's blobs, or into those that all share."""
    snapshot = repository / "snapshots" / REVISION / below
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / digest(number)
        if store:
            shared = repository.parent / "blobs" / digest(number)[:2] / digest(number)
            shared.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, shared)
            blob.symlink_to(os.path.relpath(shared, blob.parent))
        else:
            shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def same_model(folder: Path, as_in: Path) -> None:
    opened, expected = ModelFolder.open(folder), ModelFolder.open(as_in)
    assert opened.fingerprint() == expected.fingerprint()
    assert opened.other_files() == expected.other_files()


def refused(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        ModelFolder.open(folder).other_files()
    return str(caught.value)


@pytest.mark.parametrize("below", ["", "text_encoder", "a/b"])
@pytest.mark.parametrize("store", [False, True], ids=["blobs", "shared-blobs"])
def test_a_snapshot_of_the_hub_cache_opens(sharded: Path, tmp_path: Path, below: str, store: bool) -> None:
    snapshot = snapshot_of(sharded, tmp_path / "hub" / "models--a--b", below=below, store=store)
    same_model(snapshot, sharded)
    (tmp_path / "link").symlink_to(snapshot)
    same_model(tmp_path / "link", sharded)


def test_a_cache_that_is_itself_behind_a_link_opens(sharded: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(sharded, tmp_path / "disk" / "hub" / "models--a--b", store=True)
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    same_model(tmp_path / "home" / snapshot.relative_to(tmp_path / "disk"), sharded)


def test_a_cache_whose_name_is_not_the_hubs_opens(sharded: Path, tmp_path: Path) -> None:
    same_model(snapshot_of(sharded, tmp_path / "mine"), sharded)


def test_a_snapshot_that_links_to_another_one_opens(sharded: Path, tmp_path: Path) -> None:
    first = snapshot_of(sharded, tmp_path / "hub" / "models--a--b")
    second = first.parent / "fedcba"
    second.mkdir()
    for file in first.iterdir():
        (second / file.name).symlink_to(f"../{REVISION}/{file.name}")
    same_model(second, sharded)


@pytest.mark.parametrize("store", [False, True], ids=["blobs", "shared-blobs"])
def test_a_folder_of_links_into_one_cache_opens(sharded: Path, tmp_path: Path, store: bool) -> None:
    """What `hf download --local-dir` wrote for years, and what people make to change a config.json."""
    snapshot = snapshot_of(sharded, tmp_path / "hub" / "models--a--b", store=store)
    own = tmp_path / "own"
    own.mkdir()
    for file in snapshot.iterdir():
        (own / file.name).symlink_to(file)
    (own / "config.json").unlink()
    shutil.copy(sharded / "config.json", own)
    same_model(own, sharded)


def test_links_into_two_caches_are_refused(sharded: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(sharded, own)
    for number, name in enumerate(sorted(path.name for path in own.glob("*.safetensors"))[:2]):
        snapshot = snapshot_of(sharded, tmp_path / f"hub{number}" / "models--a--b")
        (own / name).unlink()
        (own / name).symlink_to(snapshot / name)
    assert "outside of the folder and of its Hugging Face cache" in refused(own)
    with links_allowed():
        same_model(own, sharded)


@pytest.mark.parametrize(
    "target", ["elsewhere", "blobs/elsewhere", "models--a--b/elsewhere", "blobs/00/short"]
)
def test_a_link_to_anywhere_else_is_refused_with_the_option(
    sharded: Path, tmp_path: Path, target: str
) -> None:
    shard = min(sharded.glob("*.safetensors"))
    elsewhere = tmp_path / "other" / target
    elsewhere.parent.mkdir(parents=True)
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    message = refused(sharded)
    assert f"{shard}: is a symbolic link to {elsewhere}" in message
    assert "--allow-links" in message
    with links_allowed(False), pytest.raises(FormatError, match="allow_links=True"):
        ModelFolder.open(sharded)
    with links_allowed(), links_allowed(False):  # what a verb allowed holds for all that it calls
        assert ModelFolder.open(sharded).names
    assert "outside" in refused(sharded)


def test_a_snapshot_does_not_lead_out_of_its_cache(sharded: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(sharded, tmp_path / "hub" / "models--a--b")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(sharded / "config.json")
    assert "outside of the folder" in refused(snapshot)
    stranger = snapshot_of(sharded, tmp_path / "hub2" / "models--a--b")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(stranger / "config.json")
    assert "outside of the folder" in refused(snapshot)


def test_links_within_the_folder_are_followed(sharded: Path) -> None:
    shard = min(sharded.glob("*.safetensors"))
    before = ModelFolder.open(sharded).fingerprint()
    (sharded / "data").mkdir()
    shard.rename(sharded / "data" / "0.bin")
    shard.symlink_to("data/0.bin")
    assert ModelFolder.open(sharded).fingerprint() == before


def test_linked_folders_within_the_folder_are_followed(single: Path) -> None:
    (single / "assets" / "deep").mkdir(parents=True)
    (single / "assets" / "deep" / "a.txt").write_text("x")
    (single / "more").symlink_to("assets")
    found = {path.as_posix() for path in ModelFolder.open(single).other_files()}
    assert found >= {"assets/deep/a.txt", "more/deep/a.txt"}


@pytest.mark.parametrize("target", [".", "assets", "assets/deep", "..", "loop"])
def test_a_link_in_a_circle_or_out_of_the_folder_is_an_error(single: Path, target: str) -> None:
    (single / "assets" / "deep").mkdir(parents=True)
    (single / "assets" / "deep" / "loop").symlink_to(single / target if target != "loop" else "loop")
    for allowed in (False, True):
        with links_allowed(allowed), pytest.raises(FormatError, match=r"assets|single"):
            ModelFolder.open(single).other_files()


def test_links_to_folders_do_not_multiply(single: Path) -> None:
    """Twelve folders, each with two links to the next: 4096 ways to the last."""
    for number in range(12):
        (single / f"d{number}").mkdir()
        for name in "ab" if number else "":
            (single / f"d{number - 1}" / name).symlink_to(f"../d{number}")
    with pytest.raises(FormatError, match="more than 1000 links to folders"):
        ModelFolder.open(single).other_files()


@pytest.mark.parametrize("target", ["absent", "folder", "pipe", "/dev/zero", "model.safetensors"])
def test_weights_that_are_a_link_to_no_file_are_an_error_even_where_links_are_allowed(
    single: Path, target: str
) -> None:
    (single / "model.safetensors").unlink()
    (single / "folder").mkdir()
    os.mkfifo(single / "pipe")
    (single / "model.safetensors").symlink_to(target)
    for allowed in (False, True):
        with links_allowed(allowed), pytest.raises(SppFxError, match=r"model\.safetensors"):
            ModelFolder.open(single)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors"])
def test_a_name_leads_out_of_no_folder_even_where_links_are_allowed(single: Path, name: str) -> None:
    with links_allowed(), pytest.raises(FormatError, match="leads out of the folder"):
        within(single, name)


def test_what_is_allowed_holds_on_the_threads_of_a_verb(single: Path, tmp_path: Path) -> None:
    (single / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")

    def look(name: str) -> Path:
        return within(single, name)

    with links_allowed():
        assert list(in_order(look, ["notes.txt"] * 4, 2)) == [single / "notes.txt"] * 4
    with pytest.raises(FormatError):
        list(in_order(look, ["notes.txt"] * 4, 2))
