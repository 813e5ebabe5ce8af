"""onnx exports: held to the model's own lock, whatever names the graph has for its weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.exporters import onnx
from spp_fx.exporters.onnx_sparse import save, sparsify
from spp_fx.exporters.onnx_weights import read_graph
from spp_fx.sparsity import load_lock
from spp_fx.workflows.export import export
from spp_fx.workflows.verify import verify
from tests.command import must
from tests.exporters.test_onnx_sparse import matmul_model, two_of_four
from tests.families import make_model

LOCK = "sparsity.lock.json"
STORED = {
    "gpt2-without-prefix": "h.0.attn.c_attn.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.1.w3.weight",
    "gpt-oss": "model.layers.0.mlp.experts.gate_up_proj",
}


def sparse_model(family: str, folder: Path) -> Path:
    make_model(family.removesuffix("-without-prefix")).save_pretrained(folder / "dense")
    if family.endswith("-without-prefix"):
        path = folder / "dense" / "model.safetensors"
        values = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
        save_file(values, path, {"format": "pt"})
    must("prune", folder / "dense", "-o", folder / "sparse")
    return folder / "sparse"


@pytest.fixture(scope="module", params=list(STORED))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def exported(family, tmp_path_factory) -> Path:
    """A folder with `sparse`, a model, and `onnx`, its export."""
    root = tmp_path_factory.mktemp(family)
    model = sparse_model(family, root)
    assert STORED[family] in load_lock(model / LOCK).by_name()
    done = export(model, root / "onnx", "onnx")
    assert done.checks["masks_equal"] == len(load_lock(model / LOCK).sites)
    return root


def test_the_lock_is_the_models_own(exported):
    assert (exported / "onnx" / LOCK).read_bytes() == (exported / "sparse" / LOCK).read_bytes()
    names = {
        record["name"] for record in json.loads((exported / "onnx" / "export.json").read_text())["tensors"]
    }
    assert names == set(load_lock(exported / "sparse" / LOCK).by_name())


@pytest.mark.parametrize("artifact", ["onnx", "onnx/model.onnx"])
def test_it_verifies_against_the_models_lock_and_the_model(exported, artifact):
    path = exported / artifact
    for verdict in (
        verify(path),
        verify(path, lock=exported / "sparse" / LOCK),
        verify(path, against=exported / "sparse"),
        verify(exported / "sparse", against=path),
    ):
        assert verdict.ok, next(site.reason for site in verdict.sites if not site.ok)
        assert all(site.mask_equal is True for site in verdict.sites)


def test_a_graph_without_its_manifest_keeps_its_own_names(exported, family, tmp_path):
    shutil.copy(exported / "onnx" / "model.onnx", tmp_path / "model.onnx")
    names = {site.name for site in verify(tmp_path / "model.onnx", pattern="50%").sites}
    assert (STORED[family] in names) == (family == "gpt-oss")


def test_a_weight_that_loading_changed_is_found(family, tmp_path, monkeypatch):
    model, right = sparse_model(family, tmp_path), onnx.load_model

    def wrong(*args, **kwargs):
        loaded = right(*args, **kwargs)
        weights = dict(loaded.named_parameters())
        name = next(n for n in weights if n.endswith(("0.attn.c_attn.weight", "0.mlp.experts.gate_up_proj")))
        with torch.no_grad():
            place = tuple((weights[name] == 0).nonzero()[-1])
            weights[name][place] = 1.0
        return loaded

    monkeypatch.setattr(onnx, "load_model", wrong)
    with pytest.raises(
        MaskError, match=r"other zeros than the lock's: row \d+, column \d+: zero in the lock"
    ):
        export(model, tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_site_of_the_lock_that_the_graph_has_not_is_found(tmp_path, monkeypatch):
    model, right = sparse_model("gpt2-without-prefix", tmp_path), onnx.bind

    def fewer(*args):
        binding = right(*args)
        binding.pieces.popitem()
        return binding

    monkeypatch.setattr(onnx, "bind", fewer)
    with pytest.raises(
        MaskError, match=r"0 more of the lock's 8 sites .* no linear of the loaded model reads it"
    ):
        export(model, tmp_path / "onnx", "onnx")


@pytest.mark.parametrize("family", ["mixtral"], indirect=True)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("initializer", "nothing", r"tensors\.\d+\.part\.initializer: model\.onnx holds no nothing"),
        ("expert", 99, r"tensors\.\d+\.part: expert 99, rows"),
        ("stop", 10**6, r"tensors\.\d+\.part: expert \d+, rows \d+ to 1000000"),
        ("expert", -1, r"tensors\.\d+\.part\.expert"),
    ],
)
def test_places_in_the_manifest_are_not_believed(exported, tmp_path, field, value, message):
    folder = shutil.copytree(exported / "onnx", tmp_path / "onnx")
    data = json.loads((folder / "export.json").read_text())
    experts = [
        record for record in data["tensors"] if record["part"] and record["part"]["expert"] is not None
    ]
    experts[0]["part"][field] = value
    if field == "initializer":  # of all its parts, or the others would be found
        for record in experts:
            record["part"][field] = value
    (folder / "export.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        verify(folder)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_place_of_a_nan_is_its_place_in_the_matrix(tmp_path, transposed, dtype):
    weight = two_of_four((64, 128))
    weight[17, 41] = np.nan
    weight[30, 2] = np.inf
    model, _ = sparsify(matmul_model(weight), ["W"])
    save(model, tmp_path / "m.onnx")
    scan = read_graph(tmp_path / "m.onnx").scan("W", transposed)
    assert scan.non_finite == 2
    assert scan.first_non_finite == ((41, 17) if transposed else (17, 41))


def test_a_large_double_is_finite(tmp_path):
    values = np.array([1e300, np.inf])
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(values, "D"),
        helper.make_tensor("", TensorProto.INT64, [2], [3, 9]),
        [4, 4],
    )
    model = matmul_model(two_of_four((8, 8)))
    model.graph.sparse_initializer.append(sparse)
    save(model, tmp_path / "m.onnx")
    scan = read_graph(tmp_path / "m.onnx").scan("D", False)
    assert (scan.non_finite, scan.first_non_finite) == (1, (2, 1))


def test_a_missing_file_is_a_wrong_request(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        verify(tmp_path / "nothere.onnx")
