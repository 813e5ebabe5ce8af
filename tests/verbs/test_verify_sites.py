"""Every site is checked: of any dtype, stored or not, in either orientation."""

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spp_fx.exporters.onnx.graph_weights import GRAPH
from spp_fx.sparsity.lock import Lock, LockEntry, load_lock, make_entry
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import NM
from spp_fx.sparsity.scan import Scan, scan_stored
from spp_fx.sparsity.weights import sites_by_name
from spp_fx.verbs.verify import Check, run_check, verify
from spp_fx.verification import artifact as artifact_module
from spp_fx.verification.artifact import open_artifact
from spp_fx.verification.policy import Requirements
from tests.command import must, rewrite
from tests.families import make_model, prune_2_4
from tests.handmade import lock_of, save, sparse

Q, UP, DOWN = (
    f"model.layers.0.{word}.weight" for word in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
)


def failures(verdict) -> dict[str, str]:
    return {site.name: site.findings[0].rule for site in verdict.failed}


def unlocked(folder: Path) -> Path:
    (folder / "sparsity.lock.json").unlink()
    return folder


def as_dtype(folder: Path, name: str, dtype: torch.dtype) -> None:
    """A weight that is dense and stored in another dtype than the rest."""
    rewrite(folder / "model.safetensors", lambda v: v.update({name: torch.ones(v[name].shape).to(dtype)}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("asked", [{"pattern": "2:4"}, {"coverage": "all"}])
def test_a_dense_site_is_seen_in_every_dtype_that_has_a_zero(world, dtype, asked):
    folder = unlocked(world / "sparse")
    as_dtype(folder, Q, dtype)
    assert set(failures(verify(folder, **asked))) == {Q}


def test_a_dense_site_of_another_dtype_is_not_the_same_as_a_sparse_one(world):
    other = unlocked(shutil.copytree(world / "sparse", world / "other"))
    as_dtype(unlocked(world / "sparse"), Q, torch.int8)
    assert failures(verify(world / "sparse", against=other)) == {Q: "mask-changed"}


def test_a_site_without_a_zero_that_could_be_read_fails(world):
    folder = unlocked(world / "sparse")
    as_dtype(folder, Q, torch.complex64)
    verdict = run_check(Check(folder, Requirements.of("2:4")))
    assert failures(verdict) == {Q: "artifact-damaged"}
    assert "C64" in (verdict.failed[0].reason or "")


@pytest.mark.parametrize("asked", [{"pattern": "2:4"}, {"coverage": "all"}, {"require": ["up_proj"]}])
@pytest.mark.parametrize("locked", [True, False])
def test_a_site_of_the_model_that_is_not_there_fails(world, asked, locked):
    if not locked:
        unlocked(world / "sparse")
    rewrite(world / "sparse" / "model.safetensors", lambda values: values.pop(UP))
    assert failures(verify(world / "sparse", **asked)) == {UP: "missing-weight"}


def test_a_renamed_site_fails_in_the_only_file_of_a_model_too(world):
    path = unlocked(world / "sparse") / "model.safetensors"
    rewrite(path, lambda values: values.update({"renamed.weight": values.pop(UP)}))
    assert failures(verify(path, pattern="2:4")) == {UP: "missing-weight"}


def test_a_model_without_any_site_fails_site_by_site(world):
    path = unlocked(world / "sparse") / "model.safetensors"
    rewrite(path, lambda values: [values.pop(name) for name in list(values) if "_proj" in name])
    assert set(failures(verify(world / "sparse", pattern="2:4")).values()) == {"missing-weight"}


def test_a_site_of_another_shape_than_the_model_has_fails_and_can_be_allowed(world):
    folder = unlocked(world / "sparse")
    rewrite(folder / "model.safetensors", lambda v: v.update({UP: v[UP][:-4].contiguous()}))
    (site,) = run_check(Check(folder, Requirements.of("2:4"))).failed
    assert (site.name, site.findings[0].rule) == (UP, "artifact-damaged")
    assert "the model expects [64, 32]" in (site.reason or "")
    assert verify(folder, pattern="2:4", allow_dense=["model.layers.0.mlp.up_proj"]).ok


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_nothing_that_a_model_stores_in_its_own_way_is_missing(tmp_path, family):
    make_model(family, one_layer=True).save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", "-q")
    assert verify(tmp_path / "sparse", pattern="2:4", coverage="all").ok


def test_an_expert_that_is_missing_fails_its_stack(tmp_path):
    make_model("mixtral", one_layer=True).save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", "-q")
    unlocked(tmp_path / "sparse")
    path = tmp_path / "sparse" / "model.safetensors"
    rewrite(
        path, lambda values: values.pop(next(name for name in values if "layers.0" in name and "w2" in name))
    )
    (site,) = run_check(Check(tmp_path / "sparse", Requirements.of("2:4"))).failed
    assert site.findings[0].rule == "artifact-damaged"
    assert "layers.0" in site.name


def test_an_export_lacks_what_its_model_has(shallow):
    """Its files and its manifest agree with each other; its configuration says more."""
    out = shallow / "out"
    must("export", shallow / "sparse", "-o", out, "--format", "onnx-dense", "-q")
    config = json.loads((out / "config.json").read_text()) | {"num_hidden_layers": 2}
    (out / "config.json").write_text(json.dumps(config))
    manifest = json.loads((out / "export.json").read_text())
    manifest["files"].pop("config.json", None)
    (out / "export.json").write_text(json.dumps(manifest))
    for path in (out, out / GRAPH):
        failed = failures(verify(path, pattern="2:4"))
        assert len(failed) == 7
        assert set(failed.values()) == {"missing-weight"}
        assert all("layers.1" in name for name in failed)


@pytest.mark.parametrize("lock", [True, False])
def test_what_the_other_artifact_has_and_this_one_lacks_fails(tmp_path, lock):
    tensors = {f"layers.{number}.weight": sparse(8, 16, seed=number) for number in range(3)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save(tmp_path / "a" / "w.safetensors", dict(list(tensors.items())[:2]))
    save(tmp_path / "b" / "w.safetensors", tensors)
    if lock:
        (tmp_path / "b" / "sparsity.lock.json").write_text(lock_of(tensors).dumps())
    here, there = tmp_path / "a" / "w.safetensors", tmp_path / "b" / "w.safetensors"
    assert failures(verify(here, against=there)) == {"layers.2.weight": "missing-weight"}
    assert failures(verify(there, against=here)) == {"layers.2.weight": "missing-weight"}


def test_a_shard_is_compared_for_its_own_sites_only(world):
    shard = sorted((world / "sharded").glob("*.safetensors"))[-1]
    verdict = verify(shard, against=world / "sparse")
    assert verdict.ok
    assert 0 < len(verdict.sites) < 14
    stray = shutil.copy(shard, world / "sharded" / "stray.safetensors")
    assert not verify(stray, against=world / "sparse").ok


def test_a_file_without_its_model_is_read_as_the_model_it_is_compared_with_stores_it(tmp_path):
    make_model("gpt2", one_layer=True).save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", "-q")
    (tmp_path / "alone").mkdir()
    path = shutil.copy(tmp_path / "sparse" / "model.safetensors", tmp_path / "alone")
    assert verify(path, against=tmp_path / "sparse").ok
    assert verify(tmp_path / "sparse", against=path).ok


IN_A_FILE = {
    "layers.0.mlp.experts.gate_up_proj": (3, 8, 16),
    "layers.0.experts.w1.weight": (3, 8, 16),
    "layers.0.normal_proj.weight": (8, 16),
}
NO_SITES = {
    "model.embed_tokens.weight": (8, 16),
    "lm_head.weight": (8, 16),
    "layers.0.q_norm.weight": (8, 16),
    "layers.0.input_layernorm2.weight": (8, 16),
    "h.wte.weight": (8, 16),
    "layers.0.conv1d.weight": (8, 1, 4),
    "layers.0.mlp.experts.down_proj_scales": (3, 8, 16),
    "layers.0.mlp.experts.down_proj_bias": (3, 16),
    "layers.0.norm.weight": (16,),
}


def test_sites_of_a_file_are_found_by_name_and_shape():
    assert sites_by_name(IN_A_FILE).transposed.keys() == IN_A_FILE.keys()
    assert not sites_by_name(NO_SITES).transposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("name", IN_A_FILE)
def test_a_dense_weight_of_a_file_without_a_model_fails(tmp_path, name, dtype):
    good = torch.ones(8, 16)
    prune_2_4(good)
    save_file({"good.weight": good, name: torch.ones(IN_A_FILE[name]).to(dtype)}, tmp_path / "w.safetensors")
    assert set(failures(verify(tmp_path / "w.safetensors", pattern="2:4"))) == {name}


def test_stacks_of_a_file_are_locked_and_dtypes_without_zeros_are_left_out(tmp_path):
    stack = torch.randn(3, 8, 16)
    prune_2_4(stack)
    values = {
        "experts.up_proj": stack,
        "experts.down_proj": torch.ones(3, 8, 16),
        "odd.weight": torch.ones(4, 4, dtype=torch.complex64),
        "deep.weight": torch.ones(2, 2, 4, 4),
    }
    save_file(values, tmp_path / "w.safetensors")
    done = must("lock", tmp_path / "w.safetensors", "--json", "-q").json
    (entry,) = load_lock(tmp_path / "sparsity.lock.json").sites
    assert (entry.name, entry.kind, entry.shape) == ("experts.up_proj", "experts", (3, 8, 16))
    assert done["left_out"].keys() == values.keys() - {"experts.up_proj"}
    assert "C64" in done["left_out"]["odd.weight"]
    assert verify(tmp_path / "w.safetensors").ok


def relock(folder: Path, change) -> None:
    """Make the lock of a folder anew, of what lies there, with some entries changed."""
    artifact = open_artifact(folder)
    assert artifact.lock is not None

    def entry(old: LockEntry) -> LockEntry:
        pattern, transposed = change(old)
        mask = artifact.weights.scan(old.name, transposed).mask
        return make_entry(old.name, old.kind, mask, pattern, transposed)

    (folder / "sparsity.lock.json").write_text(Lock.of(map(entry, artifact.lock.sites)).dumps())


def test_a_lock_cannot_turn_a_site_to_hide_the_wrong_dimension(tmp_path):
    """2:4 along the dimension that is stored last, which is not the one that a Conv1D sums over."""
    make_model("gpt2", one_layer=True).save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", "-q")
    folder = tmp_path / "sparse"
    names = [entry.name for entry in load_lock(folder / "sparsity.lock.json").sites]

    def turn(values: dict[str, torch.Tensor]) -> None:
        for name in names:
            values[name] = torch.ones_like(values[name])
            prune_2_4(values[name])

    rewrite(folder / "model.safetensors", turn)
    relock(folder, lambda entry: (NM(2, 4), False))
    verdict = verify(folder, pattern="2:4")
    assert {site.name for site in verdict.failed} == set(names)
    (problem,) = verdict.problems
    assert re.search(
        r"the lock has transformer\S+ stored \(out, in\).* the model stores it \(in, out\)", problem
    )


def test_a_lock_without_a_pattern_does_not_cover_a_dense_site(world):
    folder = world / "sparse"
    rewrite(folder / "model.safetensors", lambda values: values[UP].fill_(1))
    relock(folder, lambda old: (None if old.name == UP else old.parsed_pattern(), old.transposed))
    assert verify(folder).ok
    assert failures(verify(folder, coverage="all")) == {UP: "dense-site"}
    assert verify(folder, coverage="all", allow_dense=["up_proj"]).ok


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_mask_lives_longer_than_the_check_of_its_site(tmp_path, monkeypatch, jobs):
    """What verify holds is a mask a job, whatever the number of sites."""
    masks: list[weakref.ref[PackedMask]] = []

    def scan(shard, name, *, transposed) -> Scan:
        found = scan_stored(shard, name, transposed=transposed)
        masks.append(weakref.ref(found.mask))
        assert sum(mask() is not None for mask in masks) <= jobs
        return found

    monkeypatch.setattr(artifact_module, "scan_stored", scan)
    save(tmp_path / "w.safetensors", {f"layers.{n}.weight": sparse(32, 64, seed=n) for n in range(9)})
    verdict = verify(tmp_path / "w.safetensors", pattern="2:4", jobs=jobs)
    assert verdict.ok
    assert len(masks) == 9
    assert not any(mask() for mask in masks)


def test_the_file_of_a_graphs_weight_is_the_one_that_holds_its_numbers(shallow):
    import onnx

    out = shallow / "out"
    must("export", shallow / "sparse", "-o", out, "--format", "onnx-dense", "-q")
    (shallow / "graph").mkdir()
    model = onnx.load(out / GRAPH)
    onnx.save(
        model,
        shallow / "graph" / "g.onnx",
        save_as_external_data=True,
        location="g.onnx.data",
        size_threshold=6000,
    )
    files = {site.name: site.file for site in verify(shallow / "graph" / "g.onnx", pattern="2:4").sites}
    assert files[UP] == "g.onnx.data"
    assert set(files.values()) == {"g.onnx", "g.onnx.data"}
