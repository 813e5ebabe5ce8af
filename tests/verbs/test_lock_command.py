"""lock: a lock for a sparse model that has none; what is not sparse is left out with its reason or refused."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp_fx.errors import UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.sparsity.lock import load_lock
from spp_fx.sparsity.pattern import NM
from spp_fx.verbs.write_lock import lock, make_lock
from spp_fx.verification.model_sites import find_sites, tensors_of
from tests.command import command, listing, must, one_line, rewrite
from tests.families import make_model, prune_2_4

SITE = "layers.0.up_proj.weight"


@pytest.fixture
def weights(tmp_path):
    """A .safetensors file without a model: two 2:4 matrices, a dense one, an embedding, a vector."""
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(16, 32, generator=generator)
        for name in (SITE, "layers.0.q_proj.weight", "layers.0.k_proj.weight", "embed_tokens.weight")
    }
    for name in (SITE, "layers.0.q_proj.weight"):
        prune_2_4(values[name])
    path = tmp_path / "w" / "weights.safetensors"
    path.parent.mkdir()
    save_file(values | {"norm.weight": torch.ones(32)}, path)
    return path


def change(path, values):
    """Put tensors in place of others in a file."""
    rewrite(path, lambda stored: stored.update(values))


def unlocked(made, tmp_path, name="sparse"):
    """A copy of a sparse model folder without lock and history."""
    folder = shutil.copytree(made / name, tmp_path / name)
    (folder / "sparsity.lock.json").unlink()
    (folder / "sparsity.provenance.json").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("name", ["sparse", "sharded", "half"])
def test_the_lock_of_a_model_is_the_one_that_prune_wrote(made, tmp_path, name):
    folder = unlocked(made, tmp_path, name)
    before = listing(folder)
    done = must("lock", folder, "--json", "-q").json
    pattern = "50%" if name == "half" else "2:4"
    assert done["summary"] == {"sites": 14, "patterns": {pattern: 14}, "sparsity": 0.5}
    theirs = (made / name / "sparsity.lock.json").read_bytes()
    assert (folder / "sparsity.lock.json").read_bytes() == theirs
    after = listing(folder)
    assert sorted(after.keys() - before.keys()) == ["sparsity.lock.json", "sparsity.provenance.json"]
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("gpt2", {"conv1d"}), ("mixtral", {"linear", "experts"}), ("gpt-oss", {"linear", "experts"})],
)
def test_every_weight_is_looked_at_in_its_own_orientation(tmp_path, family, kinds):
    make_model(family, one_layer=True).save_pretrained(tmp_path)
    found = find_sites(open_model(tmp_path))
    matrices = tensors_of(matrix for matrices in found.matrices.values() for matrix in matrices)
    values = load_file(tmp_path / "model.safetensors")
    for name, matrix in matrices.items():
        prune_2_4(values[name], transposed=matrix.transposed)
    change(tmp_path / "model.safetensors", values)
    made = make_lock(found, pattern=NM(2, 4))
    assert {entry.kind for entry in made.lock.sites} == kinds
    assert all(entry.transposed == matrices[entry.name].transposed for entry in made.lock.sites)
    assert make_lock(found).lock.by_name().items() >= made.lock.by_name().items()


def test_a_tied_head_is_not_locked_as_a_weight_of_its_own(tmp_path):
    make_model("llama-tied").save_pretrained(tmp_path)
    left_out = make_lock(find_sites(open_model(tmp_path))).left_out
    assert left_out["lm_head.weight"] == "tied to the embedding model.embed_tokens.weight"


def test_a_sparse_head_is_locked_although_no_pass_would_train_it(made, tmp_path):
    folder = unlocked(made, tmp_path)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    prune_2_4(head)
    change(folder / "model.safetensors", {"lm_head.weight": head})
    assert make_lock(find_sites(open_model(folder))).lock.by_name()["lm_head.weight"]


def test_export_makes_the_same_lock_for_a_model_without_one(made, tmp_path):
    folder = unlocked(made, tmp_path)
    must("export", folder, "-o", tmp_path / "out", "--format", "safetensors", "-q")
    assert (tmp_path / "out" / "sparsity.lock.json").read_text() == make_lock(
        find_sites(open_model(folder))
    ).lock.dumps()


def test_another_place_leaves_the_model_folder_as_it_is(made, tmp_path):
    folder = unlocked(made, tmp_path)
    before = listing(folder)
    lock(folder, tmp_path / "locks" / "m.lock.json", pattern="2:4")
    assert listing(folder) == before
    assert must("verify", folder, "--lock", tmp_path / "locks" / "m.lock.json", "-q").out.startswith("ok")


@pytest.mark.parametrize("name", ["packed", "adapter"])
def test_a_folder_whose_lock_is_a_part_of_it_is_refused(made, name):
    ran = command("lock", made / name, "--force", "-q")
    assert ran.code == 2
    assert "has a lock of its own" in one_line(ran.err)


def test_a_file_without_a_model_is_locked_by_the_names_of_its_matrices(weights):
    done = must("lock", weights, "--json", "-q").json
    assert [site["name"] for site in done["sites"]] == ["layers.0.q_proj.weight", SITE]
    assert done["left_out"] == {
        "embed_tokens.weight": "is an embedding, by its name; name it with --targets to lock it",
        "layers.0.k_proj.weight": "dense, 0.0% zeros",
    }
    assert must("verify", weights, "-q").out.startswith("ok: safetensors")


def test_nothing_is_left_where_the_history_cannot_be_written(made, tmp_path):
    """Otherwise the next run would find a lock."""
    folder = unlocked(made, tmp_path)
    odd = folder / "onnx" / os.fsdecode(b"caf\xe9.onnx")
    odd.parent.mkdir()
    odd.touch()
    before = sorted(folder.rglob("*"))
    ran = command("lock", folder, "-q")
    assert ran.code == 1
    assert "caf" in one_line(ran.err)
    assert sorted(folder.rglob("*")) == before
    odd.unlink()
    must("lock", folder, "-q")


@pytest.mark.parametrize("break_", [lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere")])
def test_a_broken_history_is_refused_before_the_lock_is_written(made, tmp_path, break_):
    folder = unlocked(made, tmp_path)
    break_(folder / "sparsity.provenance.json")
    ran = command("lock", folder, "-q")
    assert ran.code != 0
    assert "sparsity.provenance.json" in one_line(ran.err)
    assert not (folder / "sparsity.lock.json").exists()


def test_an_empty_matrix_is_left_out(weights):
    values = load_file(weights)
    save_file(values | {"layers.0.void.weight": torch.ones(0, 8)}, weights)
    done = must("lock", weights, "--json", "-q").json
    assert done["left_out"]["layers.0.void.weight"] == "is empty"
    assert done["summary"]["sparsity"] == 0.5


def test_a_file_of_a_model_is_refused(made, tmp_path):
    ran = command("lock", unlocked(made, tmp_path) / "model.safetensors", "-q")
    assert ran.code == 2
    assert "lock that folder" in one_line(ran.err)


def test_a_site_that_breaks_the_pattern_is_named_with_row_and_columns(weights):
    broken = load_file(weights)[SITE]
    broken[5, 8:12] = 1.0
    change(weights, {SITE: broken})
    ran = command("lock", weights, "--pattern", "2:4", "--targets", "up_proj,q_proj", "-q")
    assert ran.code == 1
    assert f"{SITE} (weights.safetensors): row 5, columns 8-11 hold 4 non-zeros" in one_line(ran.err)
    assert [path.name for path in weights.parent.iterdir()] == ["weights.safetensors"]


def test_a_pattern_is_asked_of_dense_sites_too(weights):
    assert "layers.0.k_proj.weight" in one_line(command("lock", weights, "--pattern", "2:4", "-q").err)


def test_only_the_targets_are_locked_and_asked(weights):
    done = must("lock", weights, "--pattern", "2:4", "--targets", "up_proj", "--json", "-q").json
    assert [site["name"] for site in done["sites"]] == [SITE]
    assert done["left_out"]["layers.0.k_proj.weight"] == "not among the targets"


def test_an_unknown_target_is_a_wrong_command(weights):
    with pytest.raises(UsageError, match="no matrix named nowhere"):
        lock(weights, targets=["nowhere"])


def test_nan_is_not_locked(weights):
    broken = load_file(weights)[SITE]
    row, column = broken.nonzero()[9].tolist()
    broken[row, column] = float("nan")
    change(weights, {SITE: broken})
    ran = command("lock", weights, "-q")
    assert ran.code == 1
    assert f"row {row}, column {column} is NaN" in one_line(ran.err)


def test_a_dense_file_has_nothing_to_lock(weights):
    save_file({SITE: torch.ones(8, 8)}, weights)
    ran = command("lock", weights, "-q")
    assert ran.code == 1
    assert "spp-fx prune" in one_line(ran.err)
    assert [path.name for path in weights.parent.iterdir()] == ["weights.safetensors"]


def test_a_lock_that_exists_is_kept_without_force(weights):
    (weights.parent / "sparsity.lock.json").write_text("mine")
    ran = command("lock", weights, "-q")
    assert ran.code == 2
    assert "--force" in one_line(ran.err)
    assert (weights.parent / "sparsity.lock.json").read_text() == "mine"


def test_force_lists_the_masks_that_differ_from_the_old_lock(weights):
    must("lock", weights, "-q")
    changed = load_file(weights)[SITE]
    changed[tuple(changed.nonzero()[0])] = 0
    new = torch.zeros(4, 8)
    new[:, ::2] = 1
    change(weights, {SITE: changed, "o_proj.weight": new})
    done = must("lock", weights, "--force", "--json", "-q").json
    assert done["replaced"] == {"added": ["o_proj.weight"], "removed": [], "changed": [SITE]}
    assert command("verify", weights, "-q").code == 0


def test_force_replaces_a_damaged_lock_and_reports_it(weights):
    (weights.parent / "sparsity.lock.json").write_text("{")
    assert "replacing it" in must("lock", weights, "--force").err
    assert command("verify", weights, "-q").code == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_weights_of_any_type_with_a_zero_are_locked(tmp_path, dtype):
    weight = torch.ones(8, 16)
    weight[:, ::2] = 0
    save_file({SITE: weight.to(dtype)}, tmp_path / "w.safetensors")
    must("lock", tmp_path / "w.safetensors", "--pattern", "2:4", "-q")
    (entry,) = load_lock(tmp_path / "sparsity.lock.json").sites
    assert (entry.nnz, entry.shape) == (64, (8, 16))
