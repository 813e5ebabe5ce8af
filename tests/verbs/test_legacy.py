"""Folders of compressed-tensors' dropped sparse-24-bitmask: named as what they are, decoded, made plain."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spp_fx.errors import FormatError
from spp_fx.exporters.legacy import LegacyFolder, is_legacy, without_sparsity
from spp_fx.storage.folder import ModelFolder
from spp_fx.verbs.unpack import unpack
from spp_fx.verbs.verify import verify
from tests.command import command, must, one_line, tensors
from tests.effort import examples

Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
SPARSITY = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}


def compress(weight: Tensor) -> dict[str, Tensor]:
    """The parts of a weight, by loops: of four entries the two of the largest magnitude, zeros too."""
    m, k = weight.shape
    kept = torch.zeros(m, k, dtype=torch.bool)
    values = []
    for row in range(m):
        for start in range(0, k, 4):
            group = weight[row, start : start + 4].double().abs()
            for place in sorted(group.argsort(descending=True, stable=True)[:2].tolist()):
                kept[row, start + place] = True
                values.append(weight[row, start + place])
    bits = np.packbits(kept.numpy(), axis=-1, bitorder="little")
    return {
        "shape": torch.tensor([[m], [k]]),
        "compressed": torch.stack(values).reshape(m, k // 2),
        "bitmask": torch.from_numpy(bits),
    }


def legacy(model: Path, target: Path, place: str = "quantization_config") -> Path:
    """The folder as llm-compressor of that time wrote it."""
    shutil.copytree(model, target)
    values: dict[str, Tensor] = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        if "_proj" in name:
            layer = name.removesuffix(".weight")
            values |= {f"{layer}.{part}": value for part, value in compress(tensor).items()}
        else:
            values[name] = tensor
    save_file(values, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config[place] = CONFIG | {"sparsity_config": SPARSITY}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def folder(made) -> Path:
    """The merged model of the small world in the legacy form, its lock beside it."""
    return legacy(made / "merged", made.parent / "legacy")


def test_verify_names_it_checks_it_and_fails(folder, made):
    data = command("verify", folder, "--json", "-q")
    assert data.code == 1
    verdict = data.json
    assert not verdict["ok"]
    assert verdict["kind"] == "compressed-tensors"
    assert verdict["summary"]["failed"] == 0
    assert f"{Q}.weight" in {site["name"] for site in verdict["sites"]}
    assert all(site["mask_equal"] for site in verdict["sites"])
    (problem,) = verdict["problems"]
    assert "random weights" in problem
    assert "spp-fx unpack" in problem
    assert must("verify", made / "merged", "--json", "-q").json["problems"] == []


def test_the_other_outputs_say_it_too(folder, tmp_path):
    result = command("verify", folder, "--junit", tmp_path / "r.xml", "--github", "-q")
    assert result.code == 1
    assert "FAIL compressed-tensors: " in result.out
    assert "::error title=compressed-tensors::" in result.out
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    failed = [case for case in suite if case.find("failure") is not None]
    assert suite.get("failures") == "1" == str(len(failed))
    assert suite.get("tests") == str(len(suite))
    assert "random weights" in failed[0][0].get("message", "")


def test_it_is_held_to_a_pattern_and_to_another_model(folder, made, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "sparsity.lock.json").unlink()
    held = verify(bare, pattern="2:4", against=made / "merged")
    assert held.sites
    assert all(site.ok and site.mask_equal for site in held.sites)
    other = verify(bare, against=made / "half")
    assert any(not site.ok for site in other.sites)


def test_a_mask_that_changed_is_found(folder, tmp_path):
    bad = shutil.copytree(folder, tmp_path / "bad")
    values = load_file(bad / "model.safetensors")
    values[f"{Q}.compressed"][3, 5] = 0
    save_file(values, bad / "model.safetensors", {"format": "pt"})
    assert [site.name for site in verify(bad).sites if not site.ok] == [f"{Q}.weight"]


def test_unpack_makes_it_plain(folder, made, tmp_path):
    result = must("unpack", folder, "-o", tmp_path / "plain")
    assert "quantization_config.sparsity_config" in result.err
    ours, theirs = tensors(tmp_path / "plain"), tensors(made / "merged")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain, original = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "plain", made / "merged")
    )
    assert plain == original
    must("verify", tmp_path / "plain")
    must("verify", tmp_path / "plain", "--pattern", "2:4", "--against", made / "merged")


def test_without_a_lock_and_in_shards(folder, made, tmp_path):
    """The parts of one weight may lie in two files."""
    model = shutil.copytree(folder, tmp_path / "m")
    (model / "sparsity.lock.json").unlink()
    values = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {name: values[name] for name in sorted(values)[number - 1 :: 2]}
        save_file(part, model / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert verify(model, pattern="2:4").kind == "compressed-tensors"
    done = unpack(model, tmp_path / "plain")
    assert done.checks == {"tensors_equal": len(tensors(made / "merged"))}
    assert sorted(path.name for path in (tmp_path / "plain").glob("model*")) == ["model.safetensors"]


@pytest.mark.parametrize("place", ["quantization_config", "compression_config"])
def test_it_is_known_by_its_config_alone(made, tmp_path, place):
    model = shutil.copytree(made / "merged", tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {place: CONFIG | {"sparsity_config": SPARSITY}}))
    verdict = verify(model)
    assert (verdict.kind, verdict.ok) == ("compressed-tensors", False)
    assert "but the weights are plain" in verdict.problems[0]
    unpack(model, tmp_path / "plain")
    assert verify(tmp_path / "plain").ok


def test_and_by_its_tensors_alone(folder, made, tmp_path):
    model = shutil.copytree(folder, tmp_path / "m")
    shutil.copy(made / "merged" / "config.json", model)
    assert not verify(model).ok
    unpack(model, tmp_path / "plain")
    assert verify(tmp_path / "plain").ok


def part(name: str):
    return f"{Q}.{name}"


def set_bit(values):
    values[part("bitmask")][2, 1] ^= 1


DAMAGE = {
    "a group of another count": (set_bit, r"q_proj\.bitmask: row 2, columns 8-11 keep [13] entries"),
    "no shape": (lambda v: v.pop(part("shape")), r"q_proj\.shape: is missing.*random"),
    "no values": (lambda v: v.pop(part("compressed")), r"q_proj\.compressed: is missing.*random"),
    "both forms": (lambda v: v.update({f"{Q}.weight": torch.ones(2, 2)}), r"q_proj\.weight: is stored twice"),
    "another shape": (lambda v: v[part("shape")].mul_(2), r"q_proj\.compressed: is F32 .* expected F32"),
    "a shape below zero": (lambda v: v[part("shape")].neg_(), r"q_proj\.shape: says -"),
    "a shape of one number": (lambda v: v.update({part("shape"): torch.tensor([4])}), r"q_proj\.shape: is I64"),
    "a mask of other bytes": (
        lambda v: v.update({part("bitmask"): v[part("bitmask")][:, :-1].contiguous()}), r"q_proj\.bitmask: is U8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("verb", ["verify", "unpack"])
def test_damage_is_named_in_one_line(folder, tmp_path, name, verb):
    edit, message = DAMAGE[name]
    bad = shutil.copytree(folder, tmp_path / "bad")
    values = load_file(bad / "model.safetensors")
    edit(values)
    save_file(values, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=message):
        verify(bad) if verb == "verify" else unpack(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_file_is_a_clean_failure(folder, tmp_path):
    bad = shutil.copytree(folder, tmp_path / "bad")
    path = bad / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = command("verify", bad, "-q")
    assert result.code == 1
    assert "truncated" in one_line(result.err)


@examples(10)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 6),
    groups=st.integers(1, 9),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int8]),
    shape=st.booleans(),
)
def test_decoding_is_the_inverse_of_the_format(tmp_path_factory, seed, m, groups, dtype, shape):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (m, 4 * groups), generator=generator).to(dtype)
    weight.view(-1, 4).scatter_(1, torch.rand(m * groups, 4, generator=generator).argsort(1)[:, :2], 0)
    parts = compress(weight)
    parts["shape"] = parts["shape"] if shape else parts["shape"].reshape(-1)
    folder = tmp_path_factory.mktemp("one")
    (folder / "config.json").write_text("{}")
    save_file({f"a.{name}": value for name, value in parts.items()}, folder / "model.safetensors")
    model = ModelFolder.open(folder)
    assert is_legacy(model)
    decoded = LegacyFolder.open(model).read("a.weight")
    assert decoded.dtype == dtype
    assert torch.equal(decoded, weight)


def test_what_quantizes_as_well_keeps_its_config():
    groups = {
        "config_groups": {"group_0": {}},
        "quant_method": "compressed-tensors",
        "sparsity_config": SPARSITY,
    }
    config, removed = without_sparsity(
        {"a": 1, "quantization_config": groups, "sparsity_config": {"format": "x"}}
    )
    assert config == {"a": 1, "quantization_config": {key: groups[key] for key in list(groups)[:2]}}
    assert removed == ["sparsity_config", "quantization_config.sparsity_config"]
    assert without_sparsity({"a": 1, "quantization_config": {"quant_method": "awq"}})[1] == []
