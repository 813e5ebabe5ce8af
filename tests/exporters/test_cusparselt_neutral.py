"""cusparselt exports hold each weight once: packed where the order is public, neutral where it is not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from spp_fx.errors import UsageError
from spp_fx.exporters import packed
from spp_fx.exporters.cusparselt_layout import Sm
from spp_fx.exporters.cusparselt_reader import neutral_form, unpack
from spp_fx.exporters.format import ExportSettings, find_format
from spp_fx.sparsity.packing import pack_2_4
from spp_fx.verbs.export import Exported, export
from tests.effort import examples
from tests.exporters.packing import bare_folder, bits_of, random_sparse, without_kernels

OTHERS = {"norm": torch.ones(7, dtype=torch.bfloat16)}


def exported(
    folder,
    sites: dict[str, Tensor],
    sm: int,
    transposed: frozenset[str] = frozenset(),
    dtype: str | None = None,
) -> Exported:
    model = bare_folder(folder / "m", sites, OTHERS, transposed)
    return export(model, folder / "out", "cusparselt", ExportSettings(sm=sm, dtype=dtype))


@pytest.mark.parametrize("sm", [80, 90])
def test_a_pack_is_stored_alone(tmp_path, sm: Sm):
    weight = random_sparse(256, 384, torch.float16, 1)
    done = exported(tmp_path, {"a.weight": weight}, sm)
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
    done = exported(tmp_path, {"a.weight": random_sparse(128, 128, torch.float16, 1)}, sm)
    requirements = done.manifest.requirements
    assert requirements["sm"] == sm
    assert requirements["alg_id"] == 0
    assert requirements["layout_documented_for"] == "cuSPARSELt 0.6 to 0.8"
    assert str(requirements["order"]).startswith(order)
    (record,) = done.manifest.tensors
    assert (record.dtype, record.shape) == ("F16", [128, 128])


def test_other_gpus_get_the_neutral_form_with_the_reason(tmp_path):
    done = exported(tmp_path, {"a.weight": random_sparse(128, 128, torch.float16, 1)}, 100)
    (record,) = done.manifest.tensors
    assert record.layout == "neutral"
    assert (
        record.reason == "the metadata order of sm100 is not public (sm80 and sm90 are known): packed at load"
    )
    assert done.checks["neutral"] == done.checks["bit_exact"] == 1


def test_an_sm_below_70_is_a_wrong_option(tmp_path):
    with pytest.raises(UsageError, match="--sm takes a compute capability from 70 up"):
        exported(tmp_path, {"a.weight": random_sparse(128, 128, torch.float16, 1)}, 61)


def test_what_has_no_public_pack_is_neutral_and_says_why(tmp_path):
    sites = {
        "b.weight": random_sparse(64, 64, torch.float32, 2),
        "c.weight": random_sparse(64, 80, torch.bfloat16, 3),
        "d.weight": random_sparse(3, 12, torch.bfloat16, 4),
        "e.weight": random_sparse(128, 128, torch.bfloat16, 5),
        "f.weight": random_sparse(8, 8, torch.float64, 6),
    }
    done = exported(tmp_path, sites, 80)
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
    done = exported(tmp_path, {"a.weight": random_sparse(128, 128, torch.bfloat16, 1)}, 80, dtype="float32")
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
    monkeypatch.setattr(packed, "BAND_BYTES", 1 if bands else 1 << 21)
    sites = {f"{i}.weight": random_sparse(*shape, dtype, seed + i) for i, dtype in enumerate(dtypes)}
    if kernels:
        done = exported(folder, sites, sm, frozenset({"0.weight"}))
    else:
        with without_kernels():
            done = exported(folder, sites, sm, frozenset({"0.weight"}))
    decode = find_format("cusparselt").decode
    assert decode is not None
    decoded = decode(folder / "out", done.manifest)
    stored = load_file(folder / "m" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == decoded.shapes
    for name, value in stored.items():
        assert torch.equal(bits_of(decoded.read(name)), bits_of(value))


@pytest.mark.parametrize("format", ["cusparselt", "cutlass"])
@pytest.mark.parametrize(
    ("site", "other"),
    [(torch.float8_e4m3fn, None), (torch.float8_e5m2, None), (torch.int8, None), (torch.uint8, None),
     (torch.int16, None), (torch.bfloat16, torch.float8_e4m3fn), (torch.float16, torch.int8)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_quantized_model_is_refused_where_no_loader_would_take_the_export(
    tmp_path, format, site, other, dtype
):
    weight = random_sparse(128, 128, torch.float32 if site.is_floating_point else site, 1).to(site)
    others = OTHERS if other is None else OTHERS | {"head.weight": torch.ones(4, 8).to(other)}
    model = bare_folder(tmp_path / "m", {"a.weight": weight}, others, frozenset())
    with pytest.raises(UsageError, match="--dtype does not round it") as refused:
        export(model, tmp_path / "out", format, ExportSettings(dtype=dtype))
    assert ("a.weight" if other is None else "head.weight") in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty_matrices_are_given_back(tmp_path, shape):
    sites = {"a.weight": torch.zeros(shape), "b.weight": random_sparse(8, 8, torch.float32, 1)}
    done = exported(tmp_path, sites, 80)
    assert done.checks["bit_exact"] == 2
    decode = find_format("cusparselt").decode
    assert decode is not None
    assert decode(tmp_path / "out", done.manifest).read("a.weight").shape == shape
