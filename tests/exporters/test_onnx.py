"""onnx exports: checked against the model's own lock, whatever names the graph has for its weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.exporters.onnx import encodings, graph_parameters
from spp_fx.exporters.onnx.graph_weights import read_graph
from spp_fx.sparsity.lock import load_lock
from spp_fx.verbs.export import export
from spp_fx.verbs.verify import verify
from tests.command import must
from tests.exporters.onnx_files import two_of_four, write_sparse
from tests.families import make_model

LOCK = "sparsity.lock.json"
STORED = {
    "gpt2-without-prefix": "h.0.attn.c_attn.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.1.w3.weight",
    "gpt-oss": "model.layers.0.mlp.experts.gate_up_proj",
}
CASES = {
    "gpt2-without-prefix": "onnx-packed",
    "mixtral": "onnx",
    "mixtral-packed": "onnx-packed",
    "gpt-oss": "onnx-dense",
}


def sparse_model(family: str, folder: Path) -> Path:
    make_model(family.removesuffix("-without-prefix"), one_layer=True).save_pretrained(folder / "dense")
    if family.endswith("-without-prefix"):
        path = folder / "dense" / "model.safetensors"
        values = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
        save_file(values, path, {"format": "pt"})
    must("prune", folder / "dense", "-o", folder / "sparse")
    return folder / "sparse"


@pytest.fixture(scope="module", params=list(CASES))
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(case) -> str:
    return case.removesuffix("-packed")


@pytest.fixture(scope="module")
def exported(case, family, tmp_path_factory) -> Path:
    """A folder with `sparse`, a model, and `onnx`, its export."""
    root = tmp_path_factory.mktemp(case)
    model = sparse_model(family, root)
    assert STORED[family] in load_lock(model / LOCK).by_name()
    done = export(model, root / "onnx", CASES[case])
    assert done.checks["masks_equal"] == len(load_lock(model / LOCK).sites)
    return root


def test_the_lock_is_the_models_own(exported):
    assert (exported / "onnx" / LOCK).read_bytes() == (exported / "sparse" / LOCK).read_bytes()
    names = {
        record["name"] for record in json.loads((exported / "onnx" / "export.json").read_text())["tensors"]
    }
    assert names == set(load_lock(exported / "sparse" / LOCK).by_name())


def test_it_verifies_against_the_models_lock_and_the_model(exported, case):
    folder, model = exported / "onnx", exported / "sparse"
    paths = [folder, folder / "model.onnx"]
    if list(CASES).index(case) % 2:  # each way to compare meets both forms of the export
        paths.reverse()
    for verdict in (
        verify(paths[0]),
        verify(paths[1], lock=model / LOCK),
        verify(paths[0], against=model),
        verify(model, against=paths[1]),
    ):
        assert verdict.ok, next(site.reason for site in verdict.sites if not site.ok)
        assert all(site.mask_equal is True for site in verdict.sites)


def test_a_graph_without_its_manifest_keeps_its_own_names(exported, case, tmp_path):
    shutil.copy(exported / "onnx" / "model.onnx", tmp_path / "model.onnx")
    names = {site.name for site in verify(tmp_path / "model.onnx", pattern="50%").sites}
    assert {
        "gpt2-without-prefix": "transformer.h.0.attn.c_attn.weight",
        "mixtral": "model.layers.0.mlp.experts.gate_up_proj",
        "mixtral-packed": "model.layers.0.mlp.experts.gate_up_proj",
        "gpt-oss": "model.layers.0.mlp.experts.gate_up_proj",
    }[case] in names


def test_a_weight_that_was_written_wrong_is_found(tmp_path, monkeypatch):
    make_model("llama", one_layer=True).save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse")
    right = encodings.encode_groups

    def wrong(*args):
        values, codes, cleared = right(*args)
        values[-1, -1] ^= 1  # the last bit of one number
        return values, codes, cleared

    monkeypatch.setattr(encodings, "encode_groups", wrong)
    with pytest.raises(MaskError, match="decoded from the export, it is not the model's weight"):
        export(tmp_path / "sparse", tmp_path / "onnx", "onnx-packed")
    assert not (tmp_path / "onnx").exists()


def test_a_site_of_the_lock_that_the_graph_has_not_is_found(tmp_path, monkeypatch):
    model, right = sparse_model("gpt2-without-prefix", tmp_path), graph_parameters.bind

    def other_names(*args):
        binding = right(*args)
        for name, matrices in binding.matrices.items():
            if name.endswith("0.mlp.c_proj.weight"):
                binding.matrices[name] = tuple(
                    matrix.model_copy(update={"tensor": matrix.tensor + "x"}) for matrix in matrices
                )
        return binding

    monkeypatch.setattr(graph_parameters, "bind", other_names)
    with pytest.raises(MaskError, match=r"0 more of the lock's 4 sites .* the graph reads no parameter"):
        export(model, tmp_path / "onnx", "onnx")


@pytest.mark.parametrize("case", ["mixtral"], indirect=True)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_place_of_a_nan_is_its_place_in_the_matrix(tmp_path, dtype):
    weight = two_of_four((64, 128), dtype)
    weight[17, 41] = torch.nan
    weight[30, 2] = torch.inf
    weight[0, 1] = 1e300 if dtype == torch.float64 else 1.0
    write_sparse(tmp_path / "m.onnx", weight)
    scan = read_graph(tmp_path / "m.onnx").scan("W", True)  # the product knows better
    assert scan.non_finite == 2
    assert scan.first_non_finite == (17, 41)


def test_a_missing_file_is_a_wrong_request(tmp_path):
    with pytest.raises(UsageError, match="there is no such file"):
        verify(tmp_path / "nothere.onnx")
