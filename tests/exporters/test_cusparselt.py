"""cusparselt exports: packed where the order is public, neutral where it is not; what is counted was decoded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from spp_fx.errors import FormatError, MaskError, PatternError, UsageError
from spp_fx.exporters import cusparselt_layout
from spp_fx.exporters import format as source
from spp_fx.exporters import packed as packed_exports
from spp_fx.exporters.cusparselt_layout import Sm, neutral_form, unpack
from spp_fx.exporters.format import FORMATS
from spp_fx.sparsity.lock import Lock
from spp_fx.sparsity.packing import pack_2_4
from spp_fx.verbs.export import Exported, export
from spp_fx.verbs.verify import verify
from tests.command import command
from tests.effort import covering, examples
from tests.exporters.packing import bare_folder, bits_of, random_sparse, without_kernels
from tests.families import make_model, prune_2_4


def model_folder(
    folder: Path, pattern: str = "2:4", dtype: torch.dtype = torch.float32, **extra: Tensor
) -> Path:
    """A small Llama, its projections of the first layer pruned to 2:4 (or 4:8), with `extra` tensors."""
    model = make_model("llama", dtype=dtype)
    for name, weight in model.named_parameters():
        if "layers.0" in name and weight.ndim == 2:
            if pattern == "2:4":
                prune_2_4(weight)
            else:
                with torch.no_grad():
                    weight.view(-1, 8)[:, :4] = 0
    model.save_pretrained(folder)
    if extra:
        path = folder / "model.safetensors"
        save_file(load_file(path) | extra, path, {"format": "pt"})
    return folder


def change(folder: Path, edit) -> None:
    """Edit the tensors of a model folder."""
    path = folder / "model.safetensors"
    values = load_file(path)
    edit(values)
    save_file(values, path, {"format": "pt"})


def exported(
    model: Path, *, sm: int = 90, dtype: str | None = None, lines: list[str] | None = None
) -> Exported:
    said = [] if lines is None else lines
    out = model.parent / "out"
    return export(model, out, "cusparselt", sm=sm, dtype=dtype, say=said.append)


def test_sites_and_other_tensors_are_counted_as_compared(tmp_path):
    done = exported(model_folder(tmp_path / "m"))
    assert done.checks["bit_exact"] == done.checks["masks_equal"] == len(done.manifest.tensors) == 7
    assert done.checks["signs_of_zeros_lost"] == 0
    with safe_open(str(tmp_path / "m" / "model.safetensors"), "pt") as file:
        assert done.checks["tensors_equal"] == len(list(file.keys())) - 7


def test_a_lost_sign_of_a_zero_is_not_called_bit_exact(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = model_folder(tmp_path / "m")

    def add_negative_zeros(values):
        values[name][3] = torch.where(values[name][3] == 0, -0.0, values[name][3])

    change(folder, add_negative_zeros)
    lines: list[str] = []
    done = exported(folder, lines=lines)
    assert done.checks["bit_exact"] == 6
    assert done.checks["signs_of_zeros_lost"] == 1
    assert any(f"{name}: 16 zeros of negative sign were written as +0" in line for line in lines)


def test_a_fault_of_the_writers_order_is_found(tmp_path, monkeypatch):
    """The order that is read back by is another one than the one that is written by."""
    model = make_wide(tmp_path / "m")
    right = cusparselt_layout.fill_sm90

    def swapped(positions, meta):
        right(positions, meta)
        meta.copy_(meta.flip(-1).clone())

    monkeypatch.setattr(cusparselt_layout, "fill_sm90", swapped)
    with pytest.raises(MaskError, match="decoded from the export, it is not the model's weight"):
        exported(model, dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def make_wide(folder: Path) -> Path:
    """A model that has 64 x 64 projections, which sm90 takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "layers" in name and weight.ndim == 2:
            prune_2_4(weight)
    model.save_pretrained(folder)
    return folder


def test_a_fault_in_a_copied_tensor_is_found(tmp_path, monkeypatch):
    folder, right = model_folder(tmp_path / "m"), source.Source.stored

    def wrong(self, name):
        value = right(self, name)
        return value + 1 if name == "model.norm.weight" else value

    monkeypatch.setattr(source.Source, "stored", wrong)
    with pytest.raises(FormatError, match=r"model.norm.weight: byte \d+ differs"):
        exported(folder)


def test_each_site_is_packed_once(tmp_path, monkeypatch):
    packed: list[int] = []
    right = packed_exports.pack_rows

    def counted(rows, values, positions, first_row, *rest, **options):
        packed.append(len(rows))
        return right(rows, values, positions, first_row, *rest, **options)

    monkeypatch.setattr(packed_exports, "pack_rows", counted)
    ticked: list[str] = []
    model = make_wide(tmp_path / "m")
    done = export(
        model,
        tmp_path / "out",
        "cusparselt",
        sm=90,
        dtype="bfloat16",
        tick=lambda what, _: ticked.append(what),
    )
    names = sorted(tensor.name for tensor in done.manifest.tensors)
    assert done.checks["cusparselt"] == len(names)
    assert sum(packed) == sum(tensor.shape[0] for tensor in done.manifest.tensors)
    assert sorted(ticked) == names


def test_a_model_without_2_4_weights_is_an_error(tmp_path):
    with pytest.raises(
        PatternError, match=r"takes only 2:4 matrices, and the lock has 4:8: it is not 2:4 \(7 of 7\)"
    ):
        exported(model_folder(tmp_path / "m", "4:8"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "sm", "hint"),
    [
        (torch.float32, 90, "--dtype bfloat16 would pack 7 of them"),
        (torch.bfloat16, 80, "--sm 90 would pack 7 of them"),
        (torch.float32, 80, "--dtype bfloat16 --sm 90 would pack 7 of them"),
    ],
)
def test_the_hint_is_what_would_help(tmp_path, dtype, sm, hint):
    model = make_wide(tmp_path / "m")
    if dtype is torch.bfloat16:
        change(model, lambda values: values.update({k: v.bfloat16() for k, v in values.items()}))
    lines: list[str] = []
    exported(model, sm=sm, lines=lines)
    assert lines[0].endswith(f"(7 of 7 have the layout neutral); {hint}")


def test_no_hint_where_nothing_would_help(tmp_path):
    lines: list[str] = []
    exported(model_folder(tmp_path / "m"), lines=lines)
    assert lines[0].endswith("(7 of 7 have the layout neutral)")


def test_float64_is_rounded_once(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = model_folder(tmp_path / "m")
    # Just above the middle of two bfloat16 numbers; float32 rounds it to the middle, which goes to even: 1.
    value = 1 + 2.0**-8 + 2.0**-40

    def widen(values):
        values[name] = values[name].double()
        values[name][values[name] != 0] = value
        values["model.norm.weight"] = torch.full_like(values["model.norm.weight"], value, dtype=torch.float64)

    change(folder, widen)
    exported(folder, dtype="bfloat16")
    written = load_file(tmp_path / "out" / "packed.safetensors")
    assert written["model.norm.weight"].unique().tolist() == [1 + 2.0**-7]
    assert written[f"{name}.values"].unique().tolist() == [1 + 2.0**-7]


def test_quantized_and_integer_tensors_are_not_rounded(tmp_path):
    extra = {
        "f8": torch.arange(0, 120, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "e8": torch.arange(0, 120, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "f4": torch.arange(0, 120, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "i64": torch.arange(7),
        "bool": torch.tensor([True, False]),
    }
    exported(model_folder(tmp_path / "m", **extra), dtype="bfloat16")
    written = load_file(tmp_path / "out" / "packed.safetensors")
    assert written["model.norm.weight"].dtype == torch.bfloat16
    for name, value in extra.items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name].view(torch.uint8), value.view(torch.uint8))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good")
    exported(make_wide(root / "m"), dtype="bfloat16")
    return root / "out"


def set_first(field, value):
    return lambda data: data["tensors"][0].__setitem__(field, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_first("shape", [4]), r"export\.json: tensors\.0\.shape: List should have at least 2"),
        (set_first("shape", [64, -64]), r"export\.json: tensors\.0\.shape\.1"),
        (
            set_first("shape", [64, 192]),
            r"export\.json: tensors\.0\.shape: \[64, 192\], sparsity\.lock\.json has",
        ),
        (set_first("layout", "foo"), r"export\.json: tensors\.0\.layout: 'foo', expected one of cusparselt"),
        (set_first("dtype", "F99"), r"export\.json: tensors\.0\.dtype"),
        (set_first("dtype", "F32"), r"export\.json: tensors\.0\.layout: 'cusparselt', which is not possible"),
        (set_first("transposed", True), r"export\.json: tensors\.0\.transposed"),
        (set_first("name", "other"), r"export\.json: tensors\.0\.name: other"),
        (lambda data: data["tensors"].pop(), r"export\.json: tensors: .* is missing"),
        (lambda data: data["tensors"].append(data["tensors"][0]), r"tensors\.7\.name: .* is listed twice"),
        (lambda data: data.update(files={}), r"export\.json: files: packed\.safetensors has no digest"),
        (lambda data: data["files"].pop("sparsity.lock.json"), r"files: sparsity\.lock\.json has no digest"),
        (lambda data: data["requirements"].update(sm="8"), r"export\.json: requirements\.sm: '8'"),
        (lambda data: data["requirements"].update(sm=70), r"layout: 'cusparselt', .* sm70 is not public"),
        (
            set_first("layout", "neutral"),
            r"packed\.safetensors: holds no tensor .*\.values, export\.json says",
        ),
        (set_first("layout", "dense"), r"packed\.safetensors: holds no tensor .*export\.json says it does"),
    ],
)
def test_export_json_is_not_believed(tmp_path, good, edit, message):
    folder = shutil.copytree(good, tmp_path / "out")
    path = folder / "export.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        verify(folder)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("cusparselt", r"v_proj\.weight: is not in the export"),
        ("safetensors", "the lock of the export is not the model's"),
    ],
)
def test_a_site_that_lock_and_manifest_lack_is_an_error(tmp_path, monkeypatch, format, message):
    """An export is checked against the model's own lock, not against one that the writer made."""
    right = source.Source.finish

    def fewer(self, folder, format, records, **fields):
        right(replace(self, lock=Lock.of(self.lock.sites[:-1])), folder, format, records[:-1], **fields)

    monkeypatch.setattr(source.Source, "finish", fewer)
    with pytest.raises(MaskError, match=message):
        export(model_folder(tmp_path / "m"), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_the_verb_reports_it(tmp_path):
    model = model_folder(tmp_path / "m", "4:8")
    ran = command("export", model, "--format", "cusparselt", "-o", tmp_path / "out")
    assert ran.code == 1
    assert "takes only 2:4 matrices" in ran.err


OTHER_TENSORS = {"norm": torch.ones(7, dtype=torch.bfloat16)}


def bare_export(
    folder,
    sites: dict[str, Tensor],
    sm: int,
    transposed: frozenset[str] = frozenset(),
    dtype: str | None = None,
) -> Exported:
    model = bare_folder(folder / "m", sites, OTHER_TENSORS, transposed)
    return export(model, folder / "out", "cusparselt", sm=sm, dtype=dtype)


@pytest.mark.parametrize("sm", [80, 90])
def test_a_pack_is_stored_alone(tmp_path, sm: Sm):
    weight = random_sparse(256, 384, torch.float16, 1)
    done = bare_export(tmp_path, {"a.weight": weight}, sm)
    written = load_file(tmp_path / "out" / "packed.safetensors")
    assert set(written) == {"a.weight.packed", "norm"}
    assert torch.equal(bits_of(unpack(written["a.weight.packed"], (256, 384), sm)), bits_of(weight))
    sizes = done.manifest.sizes
    assert sizes["sites_bytes"] == 0.5625 * sizes["dense_bytes"] == 0.5625 * weight.nbytes
    assert sizes["file_bytes"] < 0.57 * weight.nbytes
    neutral = neutral_form(written["a.weight.packed"], (256, 384), sm)
    assert torch.equal(neutral.positions, pack_2_4(weight).positions)


@pytest.mark.parametrize(
    ("sm", "order"),
    [(80, "that of PyTorch's public kernels"), (90, "that of torchao's kernels"), (100, "unknown: ")],
)
def test_a_pack_says_what_it_is_tied_to(tmp_path, sm: int, order: str):
    done = bare_export(tmp_path, {"a.weight": random_sparse(128, 128, torch.float16, 1)}, sm)
    requirements = done.manifest.requirements
    assert requirements["sm"] == sm
    assert requirements["alg_id"] == 0
    assert requirements["layout_documented_for"] == "cuSPARSELt 0.6 to 0.8"
    assert str(requirements["order"]).startswith(order)
    (record,) = done.manifest.tensors
    assert (record.dtype, record.shape) == ("F16", [128, 128])


def test_other_gpus_get_the_neutral_form_with_the_reason(tmp_path):
    done = bare_export(tmp_path, {"a.weight": random_sparse(128, 128, torch.float16, 1)}, 100)
    (record,) = done.manifest.tensors
    assert record.layout == "neutral"
    assert (
        record.reason == "the metadata order of sm100 is not public (sm80 and sm90 are known): packed at load"
    )
    assert done.checks["neutral"] == done.checks["bit_exact"] == 1


def test_an_sm_below_70_is_a_wrong_option(tmp_path):
    with pytest.raises(UsageError, match="cusparselt: sm must be a compute capability from 70 up"):
        bare_export(tmp_path, {"a.weight": random_sparse(128, 128, torch.float16, 1)}, 61)


def test_what_has_no_public_pack_is_neutral_and_says_why(tmp_path):
    sites = {
        "b.weight": random_sparse(64, 64, torch.float32, 2),
        "c.weight": random_sparse(64, 80, torch.bfloat16, 3),
        "d.weight": random_sparse(3, 12, torch.bfloat16, 4),
        "e.weight": random_sparse(128, 128, torch.bfloat16, 5),
        "f.weight": random_sparse(8, 8, torch.float64, 6),
    }
    done = bare_export(tmp_path, sites, 80)
    found = {tensor.name[0]: (tensor.layout, tensor.reason or "") for tensor in done.manifest.tensors}
    assert found["e"] == ("cusparselt", "")
    assert {name: layout for name, (layout, _) in found.items() if name != "e"} == dict.fromkeys(
        "bcdf", "neutral"
    )
    assert "float32 is 1:2 sparse" in found["b"][1]
    assert "multiples of 128: packed at load" in found["c"][1]
    assert "multiples of 16 (dense at load)" in found["d"][1]
    assert found["f"][1] == "float64 is not taken by PyTorch's cuSPARSELt class (dense at load)"
    assert done.checks["bit_exact"] == done.checks["masks_equal"] == 5


def test_rounding_to_float32_takes_the_neutral_form(tmp_path):
    done = bare_export(
        tmp_path, {"a.weight": random_sparse(128, 128, torch.bfloat16, 1)}, 80, dtype="float32"
    )
    assert done.checks["neutral"] == 1
    assert load_file(tmp_path / "out" / "packed.safetensors")["a.weight.values"].dtype == torch.float32


@examples(5)
@given(
    sm=st.sampled_from([80, 90, 120]),
    dtypes=st.lists(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), min_size=1, max_size=3
    ),
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(128, 128), (64, 192), (12, 20), (384, 64)]),
    kernels=st.booleans(),
    bands=st.booleans(),
)
def test_decode_gives_back_what_the_model_stores(
    tmp_path_factory, monkeypatch, sm, dtypes, seed, shape, kernels, bands
):
    folder = tmp_path_factory.mktemp("law")
    monkeypatch.setattr(packed_exports, "BAND_BYTES", 1 if bands else 1 << 21)
    sites = {f"{i}.weight": random_sparse(*shape, dtype, seed + i) for i, dtype in enumerate(dtypes)}
    if kernels:
        done = bare_export(folder, sites, sm, frozenset({"0.weight"}))
    else:
        with without_kernels():
            done = bare_export(folder, sites, sm, frozenset({"0.weight"}))
    decode = FORMATS["cusparselt"].decode
    assert decode is not None
    decoded = decode(folder / "out", done.manifest)
    stored = load_file(folder / "m" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == decoded.shapes
    for name, value in stored.items():
        assert torch.equal(bits_of(decoded.read(name)), bits_of(value))


QUANTIZED = [
    (torch.float8_e4m3fn, None), (torch.float8_e5m2, None), (torch.int8, None), (torch.uint8, None),
    (torch.int16, None), (torch.bfloat16, torch.float8_e4m3fn), (torch.float16, torch.int8),
]  # fmt: skip
"""The dtype of a site, and that of another weight where it is that one which is quantized."""


@covering(2, format=["cusparselt", "cutlass"], stored=QUANTIZED, dtype=[None, "bfloat16"])
def test_a_quantized_model_is_refused_where_no_loader_would_take_the_export(tmp_path, format, stored, dtype):
    site, other = stored
    weight = random_sparse(128, 128, torch.float32 if site.is_floating_point else site, 1).to(site)
    others = OTHER_TENSORS if other is None else OTHER_TENSORS | {"head.weight": torch.ones(4, 8).to(other)}
    model = bare_folder(tmp_path / "m", {"a.weight": weight}, others, frozenset())
    with pytest.raises(UsageError, match="--dtype does not round it") as refused:
        export(model, tmp_path / "out", format, dtype=dtype)
    assert ("a.weight" if other is None else "head.weight") in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty_matrices_are_given_back(tmp_path, shape):
    sites = {"a.weight": torch.zeros(shape), "b.weight": random_sparse(8, 8, torch.float32, 1)}
    done = bare_export(tmp_path, sites, 80)
    assert done.checks["bit_exact"] == 2
    decode = FORMATS["cusparselt"].decode
    assert decode is not None
    assert decode(tmp_path / "out", done.manifest).read("a.weight").shape == shape
