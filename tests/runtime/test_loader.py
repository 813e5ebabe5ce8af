"""load: the exported model is the plain folder's model, on a CPU to the bit; on a GPU as the libraries allow."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

import spp_fx.runtime
from spp_fx.errors import FormatError, PatternError, UsageError
from spp_fx.exporters.format import FORMATS
from spp_fx.exporters.manifest import MANIFEST, sha256
from spp_fx.runtime import PackWarning, load, loader, trust
from spp_fx.runtime.loader import decode, load_with
from tests.effort import covering, nightly
from tests.families import FAMILIES, OTHER_TASKS, make_model
from tests.runtime.exports import exported, logits, reference, save_sparse, wide_model
from tests.runtime.libraries import Refuses, Right, WrongOrder

CPU = torch.device("cpu")
UP = "model.layers.0.mlp.up_proj.weight"
DECODED = [name for name, format in FORMATS.items() if not format.program]


@pytest.fixture(autouse=True)
def _nothing_known():
    trust.DECIDED.clear()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A 2:4 Llama in half precision."""
    folder = save_sparse(tmp_path_factory.mktemp("wide") / "model", wide_model())
    GenerationConfig(max_new_tokens=9, do_sample=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(wide):
    return exported(wide, "safetensors")


@pytest.fixture(scope="module")
def packed(wide):
    """For sm80."""
    return exported(wide, "cusparselt", sm=80)


def same_model(loaded, plain):
    mine, theirs = loaded.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        assert torch.equal(mine[name], value), name
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


# The wide models below are plain exports of the other families.
@pytest.mark.parametrize("family", [f if f in ("falcon", "gpt-oss") else nightly(f) for f in FAMILIES])
def test_a_plain_export_is_what_transformers_loads(family, tmp_path):
    folder = save_sparse(tmp_path / "model", make_model(family, one_layer=True))
    loaded, plain = load(exported(folder, "safetensors")), reference(folder)
    same_model(loaded, plain)
    assert torch.equal(logits(loaded), logits(plain))
    reasons = {(each.form, each.reason) for each in loaded.spp_fx_sites.values()}
    assert reasons == {("dense", "it is stored as dense, which no library multiplies by")}


@pytest.mark.parametrize(
    ("format", "scale", "tied"),
    [("safetensors", 1.5, False), ("cusparselt", 1.5, False), ("safetensors", 1, True)],
)
def test_a_stored_head_is_tied_as_transformers_ties_it(format, scale, tied, tmp_path):
    folder = save_sparse(tmp_path / "model", wide_model("llama-tied"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}, path, {"format": "pt"}
    )
    loaded, plain = load(exported(folder, format)), reference(folder)
    same_model(loaded, plain)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(logits(loaded), logits(plain))


@pytest.mark.parametrize("format", DECODED)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_every_format_decodes_to_what_transformers_loads(format, family, tmp_path):
    folder = save_sparse(tmp_path / "model", wide_model(family))
    loaded, plain = load(exported(folder, format)), reference(folder)
    same_model(loaded, plain)
    assert torch.equal(logits(loaded), logits(plain))


@pytest.mark.parametrize("format", DECODED)
@pytest.mark.parametrize("dtype", [nightly(torch.float16), torch.bfloat16])
def test_packed_weights_decode_to_the_bit(format, dtype, tmp_path):
    folder = save_sparse(tmp_path / "model", wide_model(dtype=dtype))
    loaded, plain = load(exported(folder, format)), reference(folder)
    same_model(loaded, plain)
    assert torch.equal(logits(loaded), logits(plain))


def test_it_generates_as_the_plain_model_does(wide, plain):
    ids = torch.tensor([[5, 6, 7]])
    written = load(plain).generate(ids)
    assert written.shape == (1, 12)
    assert torch.equal(written, reference(wide).generate(ids))


def test_modules_that_transformers_keeps_in_float32_are(tmp_path):
    folder = save_sparse(tmp_path / "model", make_model("gpt-oss", dtype=torch.float16, one_layer=True))
    loaded = load(exported(folder, "safetensors"))
    same_model(loaded, reference(folder))
    assert {p.dtype for p in loaded.parameters()} == {torch.float16, torch.float32}


def test_a_config_without_a_dtype_takes_the_weights(tmp_path):
    folder = save_sparse(tmp_path / "model", make_model("llama", dtype=torch.bfloat16, one_layer=True))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(exported(folder, "safetensors"))
    assert loaded.dtype == torch.bfloat16
    same_model(loaded, reference(folder))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_stored_twice(tmp_path, equal):
    folder = save_sparse(tmp_path / "model", make_model("llama-tied", one_layer=True))
    path = folder / "model.safetensors"
    values = load_file(path)
    head = values["model.embed_tokens.weight"].clone() * (1 if equal else 2)
    save_file(values | {"lm_head.weight": head}, path, {"format": "pt"})
    loaded, plain = load(exported(folder, "safetensors")), reference(folder)
    assert torch.equal(logits(loaded), logits(plain))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == equal


def test_a_tensor_that_the_export_lacks_is_named(plain, monkeypatch):
    def without(folder, manifest):
        found = decode(folder, manifest)
        return replace(found, shapes={name: shape for name, shape in found.shapes.items() if name != UP})

    monkeypatch.setattr(loader, "decode", without)
    with pytest.raises(FormatError, match=rf"{UP}: the checkpoint holds no tensor for it"):
        load(plain)


def test_a_changed_file_is_refused_before_anything_is_read(plain, tmp_path):
    out = shutil.copytree(plain, tmp_path / "out")
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(FormatError, match=r"model\.safetensors: has changed since it was exported"):
        load(out)


def test_what_is_no_export_is_refused(wide, tmp_path):
    with pytest.raises(UsageError, match=r"has no export\.json; export it"):
        load(wide)
    with pytest.raises(UsageError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_a_program_is_refused_with_what_runs_it(tmp_path):
    out = exported(
        save_sparse(tmp_path / "model", make_model("llama", one_layer=True)), "onnx", compare_logits=False
    )
    with pytest.raises(
        UsageError, match=r"program of its own: run .*/model\.onnx with onnxruntime, or export"
    ):
        load(out)


def test_a_device_that_is_not_there_is_refused(packed):
    with pytest.raises(UsageError, match="device 'gpu'"):
        load(packed, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="sees no CUDA device; use device='cpu'"):
            load(packed, device="cuda")


def with_library(folder, library):
    return load_with(folder, CPU, lambda layout: library)


def test_on_a_cpu_packs_are_decoded_and_it_says_why(packed):
    forms = load(packed).spp_fx_sites
    assert len(forms) == 7
    assert {(each.form, each.reason) for each in forms.values()} == {("dense", "cpu has no 2:4 product")}


def test_packs_are_used_as_they_are_stored(packed, wide):
    library = Right()
    loaded = with_library(packed, library)
    assert {each.form for each in loaded.spp_fx_sites.values()} == {"packed"}
    assert "repack" not in library.calls
    assert library.calls.count("wrap") == 7 + 3  # every site, and one of each of three shapes before
    assert torch.equal(logits(loaded), logits(reference(wide)))


def test_packs_are_found_in_every_file_of_an_export(tmp_path):
    plain = reference(save_sparse(tmp_path / "one", wide_model()))
    plain.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    out = exported(tmp_path / "model", "cusparselt", sm=80)
    assert len(list(out.glob("packed-*-of-*.safetensors"))) > 1
    loaded = with_library(out, Right())
    assert {each.form for each in loaded.spp_fx_sites.values()} == {"packed"}
    assert torch.equal(logits(loaded), logits(plain))


@pytest.mark.parametrize(("library", "form"), [(WrongOrder(), "repacked"), (Refuses(), "dense")])
def test_packs_that_are_not_trusted_do_not_run(packed, wide, library, form):
    with pytest.warns(PackWarning) as caught:
        loaded = with_library(packed, library)
    assert len(caught) == 3
    assert {each.form for each in loaded.spp_fx_sites.values()} == {form}
    assert all(each.reason for each in loaded.spp_fx_sites.values())
    assert torch.equal(logits(loaded), logits(reference(wide)))


@pytest.mark.parametrize(
    ("family", "site", "reason"),
    [
        ("llama-tied", "lm_head.weight", "it is shared by model.embed_tokens.weight and lm_head.weight"),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", "its module is a Conv1D, not a plain linear"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight", "it is part of a stack"),
    ],
)
def test_what_is_no_linear_of_its_own_runs_dense(family, site, reason, tmp_path):
    folder = save_sparse(tmp_path / "model", wide_model(family), also=("embed",))
    path = folder / "model.safetensors"
    values = load_file(path)
    if family == "llama-tied":  # stored under the other of its two names
        values["lm_head.weight"] = values.pop("model.embed_tokens.weight")
    save_file(values, path, {"format": "pt"})
    loaded = with_library(exported(folder, "cusparselt", sm=80), Right())
    form = loaded.spp_fx_sites[site]
    assert (form.form, (form.reason or "")[: len(reason)]) == ("dense", reason)
    assert torch.equal(logits(loaded), logits(reference(folder)))


def test_a_pack_of_another_dtype_than_the_models_runs_dense(packed, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    config = json.loads((out / "config.json").read_text()) | {"dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config))
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"]["config.json"] = sha256(out / "config.json")
    (out / MANIFEST).write_text(json.dumps(manifest))
    loaded = with_library(out, Right())
    assert loaded.spp_fx_sites[UP].form == "dense"
    assert loaded.spp_fx_sites[UP].reason == "it is packed as F16, the model computes in bfloat16"


def test_importing_the_package_does_not_import_torch():
    code = "import spp_fx.runtime, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = spp_fx.runtime.unload


@covering(
    1,
    format=["cusparselt", "cutlass"],
    shape=[(36, 20), (32, 64), (64, 12)],
    dtype=[
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
    ],
)
def test_whatever_export_writes_is_loaded_with_the_same_weights(tmp_path, format, shape, dtype):
    hidden, wide = shape
    config = LlamaConfig(
        vocab_size=50, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=wide,
        head_dim=6,
    )  # fmt: skip
    plain = dtype if dtype.itemsize > 1 else torch.bfloat16
    model = save_sparse(tmp_path / "model", AutoModelForCausalLM.from_config(config, dtype=plain))
    if dtype != plain:
        values = load_file(model / "model.safetensors")
        stored = {name: value.to(dtype) if "proj" in name else value for name, value in values.items()}
        save_file(stored, model / "model.safetensors", {"format": "pt"})
    if dtype == plain and (format == "cusparselt" or (shape, dtype) == ((32, 64), torch.bfloat16)):
        same_model(load(exported(model, format)), reference(model))
        return
    with pytest.raises((UsageError, PatternError)):
        exported(model, format)


@pytest.mark.parametrize("family", ["llava", "whisper", "vit", *map(nightly, ("bert", "t5"))])
def test_models_of_other_tasks_are_loaded_as_what_they_are(tmp_path, family):
    torch.manual_seed(0)
    model = OTHER_TASKS[family]().to(torch.bfloat16).eval()
    folder = save_sparse(tmp_path / "model", model, ("dense.", "wi."))
    for format in ("cusparselt", "sparse-bitmask"):
        loaded = load(exported(folder, format))
        assert type(loaded) is type(model)
        same_model(loaded, type(model).from_pretrained(folder))
