"""An export is asked what its model is asked: no site is left out because the lock does not name it."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.exporters.onnx.onnx_file import OnnxFile
from spp_fx.verbs.export import export
from spp_fx.verbs.verify import verify
from tests.command import must
from tests.families import make_model
from tests.runtime.exports import wide_model


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A folder with `model`, whose q_proj alone are 2:4, wide enough for every layout."""
    root = tmp_path_factory.mktemp("half")
    make_model("llama", one_layer=True).bfloat16().save_pretrained(root / "dense")
    must("prune", root / "dense", "-o", root / "model", "--targets", "q_proj")
    return root


@pytest.fixture(scope="module")
def expected(half) -> set[str]:
    """What is wrong with the model itself."""
    return failing(half / "model")


def quick(format_: str) -> dict[str, bool]:
    """Logits are compared in other tests."""
    return {"compare_logits": False} if format_.startswith("onnx") else {}


def failing(path) -> set[str]:
    return {site.name for site in verify(path, pattern="2:4").sites if not site.ok}


@pytest.mark.parametrize(
    "format_", ["cusparselt", "onnx-dense", "onnx-packed", "safetensors", "sparse-bitmask"]
)
def test_the_same_sites_fail_in_every_format(half, expected, format_, tmp_path):
    out = export(half / "model", tmp_path / "out", format_, **quick(format_)).out
    assert failing(out) == expected
    assert len(expected) == 6
    assert verify(out).ok  # the lock speaks of its own sites


@pytest.mark.parametrize("format_", ["cusparselt", "sparse-bitmask"])
def test_transformers_does_not_fill_an_export_with_random_numbers(half, format_, tmp_path):
    out = export(half / "model", tmp_path / "out", format_).out
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(SppFxError, match="is an export"):
        export(out, tmp_path / "again", "safetensors")


@pytest.mark.parametrize("format_", ["cusparselt", "onnx-dense"])
def test_an_export_with_its_manifest_is_exported_again(half, format_, tmp_path):
    """The plain export is a model; what it brings along of its own stays behind."""
    plain = export(half / "model", tmp_path / "plain", "safetensors").out
    again = export(str(plain), str(tmp_path / "again"), format_, **quick(format_))
    assert again.checks["masks_equal"] == 1
    assert again.manifest.format == format_
    assert verify(again.out, against=half / "model").ok


def test_bfloat16_is_said_to_need_another_dtype_on_a_cpu(half, tmp_path):
    lines: list[str] = []
    export(half / "model", tmp_path / "out", "onnx-packed", **quick("onnx-packed"), say=lines.append)
    assert any("no bfloat16 on a CPU" in line and "--dtype float16" in line for line in lines)


@pytest.mark.parametrize("format_", ["cutlass", "onnx-packed", "sparse-bitmask"])
def test_a_file_of_an_export_is_verified_with_its_folder(half, format_, tmp_path):
    model = half / "model"
    if format_ == "cutlass":
        wide_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
        model = tmp_path / "sparse"
        must("prune", tmp_path / "dense", "-o", model)
    out = export(model, tmp_path / "out", format_, **quick(format_)).out
    if format_ == "onnx-packed":
        path = out / "model.onnx"
        assert verify(path).ok
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(FormatError, match="has changed since it was exported"):
            verify(path)
        return
    (file,) = out.rglob("*.safetensors")
    with pytest.raises(UsageError, match="is part of the export"):
        verify(file)


def test_rounding_keeps_the_entries_of_sites_and_counts_them(tmp_path):
    model = make_model("llama", one_layer=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, :2] = 1e-9
        model.model.embed_tokens.weight[3, 0] = 1e-9
    model.save_pretrained(tmp_path / "dense")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse", "--pattern", "3:4")
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    tiny = sum(int(((w != 0) & (w.half() == 0)).sum()) for n, w in stored.items() if "proj" in n)
    lines: list[str] = []
    done = export(
        tmp_path / "sparse",
        tmp_path / "out",
        "onnx-dense",
        dtype="float16",
        compare_logits=False,
        say=lines.append,
    )
    assert done.checks["kept_from_zero"] == tiny > 0
    assert any(f"{tiny} values would round to zero" in line for line in lines)
    graph = OnnxFile(done.out / "model.onnx")
    assert graph.read("model.embed_tokens.weight")[3, 0] == 0
