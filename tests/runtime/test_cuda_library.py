"""PyTorch's own classes, built from our bytes, as far as a CPU shows them."""

import inspect

import pytest
import torch
from torch import nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from spp_fx.errors import FormatError
from spp_fx.exporters.cusparselt_layout import pack
from spp_fx.runtime.cuda_library import CuSparseLt, Cutlass, version_text
from spp_fx.sparsity.packing import pack_2_4
from tests.families import prune_2_4

CPU = torch.device("cpu")
HALVES = [torch.float16, torch.bfloat16]


def weight(dtype: torch.dtype) -> torch.Tensor:
    value = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    prune_2_4(value)
    return value


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cusparselt_pack_becomes_torchs_tensor_without_a_copy(dtype):
    dense = weight(dtype)
    packed = pack(dense, 90)
    made = CuSparseLt(CPU).wrap({"packed": packed}, (128, 256))
    assert isinstance(made, SparseSemiStructuredTensorCUSPARSELT)
    assert made.packed is packed
    assert made.alg_id_cusparselt == 0
    assert (tuple(made.shape), made.dtype) == ((128, 256), dtype)
    assert torch.equal(made.values(), pack_2_4(dense).values)


@pytest.mark.parametrize("dtype", [*HALVES, torch.int8])
def test_a_cutlass_pack_becomes_torchs_tensor_and_decodes(dtype):
    dense = weight(torch.float32).mul(40).to(dtype)
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    made = Cutlass(CPU).wrap({"packed": packed, "meta": meta}, (128, 256))
    assert isinstance(made, SparseSemiStructuredTensorCUTLASS)
    assert made.packed is packed
    assert made.meta is meta
    assert torch.equal(made.to_dense(), dense)


def test_both_can_be_parameters_of_a_linear():
    dense = weight(torch.float16)
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    for made in (
        CuSparseLt(CPU).wrap({"packed": pack(dense, 80)}, (128, 256)),
        Cutlass(CPU).wrap({"packed": packed, "meta": meta}, (128, 256)),
    ):
        layer = nn.Linear(256, 128, bias=False, device="meta")
        layer.weight = nn.Parameter(made, requires_grad=False)
        assert isinstance(layer.weight, nn.Parameter)
        assert isinstance(layer.weight, SparseSemiStructuredTensor)
        assert layer.weight.device == CPU


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_linear_asks_of_them_reaches_the_librarys_product(monkeypatch, mode):
    """3-D activations with and without bias end in `_mm` of the class, which a CPU has not."""
    asked = []

    def product(self, B, *, bias=None, should_transpose_dense=False, **rest):
        # torch 2.11 pads the activations and hands them over transposed; later the product does both.
        tokens = B if should_transpose_dense else B.t()
        assert tokens.shape[0] >= 6
        asked.append((tokens.shape[1], bias is not None))
        out = torch.zeros(tokens.shape[0], self.shape[0], dtype=B.dtype)
        return out if should_transpose_dense else out.t()

    monkeypatch.setattr(SparseSemiStructuredTensorCUSPARSELT, "_mm", product)
    library, dense = CuSparseLt(CPU), weight(torch.float16)
    made = nn.Parameter(library.wrap({"packed": pack(dense, 80)}, (128, 256)), requires_grad=False)
    x = torch.ones(2, 3, 256, dtype=torch.float16)
    with mode():
        assert library.multiply(x, made).shape == (2, 3, 128)
        assert nn.functional.linear(x, made, torch.zeros(128).half()).shape == (2, 3, 128)
    assert asked == [(256, False), (256, True)]


def test_parts_of_another_shape_or_type_are_refused():
    dense = weight(torch.float16)
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    with pytest.raises(FormatError, match=r"packed is torch\.float16 \[128, 144\].* \[128, 72\]"):
        CuSparseLt(CPU).wrap({"packed": pack(dense, 80)}, (128, 128))
    with pytest.raises(FormatError, match=r"meta is torch\.int32 .* torch\.int16 \[128, 16\]"):
        Cutlass(CPU).wrap({"packed": packed, "meta": meta.int()}, (128, 256))
    with pytest.raises(FormatError, match=r"hold no torch\.float64"):
        Cutlass(CPU).wrap({"packed": packed.double(), "meta": meta}, (128, 256))


def test_torchs_constructor_takes_what_is_given_by_name():
    names = set(inspect.signature(SparseSemiStructuredTensor.__new__).parameters)
    assert {
        "shape", "packed", "meta", "packed_t", "meta_t", "compressed_swizzled_bitmask",
        "fuse_transpose_cusparselt", "alg_id_cusparselt", "requires_grad",
    } <= names  # fmt: skip


@pytest.mark.parametrize(
    ("built", "version", "said"),
    [
        (False, None, "is built without cuSPARSELt"),
        (True, 502, "for cuSPARSELt 0.6.0 and later, this is cuSPARSELt 0.5.2"),
        (True, 602, None),
        (True, 801, None),
    ],
)
def test_the_librarys_presence_and_version_are_looked_at(monkeypatch, built, version, said):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: built)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    found = CuSparseLt(CPU).refusal()
    assert found is None if said is None else said in (found or "")


def test_a_librarys_version_in_words():
    assert [version_text(number) for number in (602, 801, 1203)] == ["0.6.2", "0.8.1", "1.2.3"]


def test_the_capability_of_the_gpu_is_one_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert Cutlass(torch.device("cuda:1")).sm == 90
    assert Cutlass(torch.device("cuda:1")).device == "NVIDIA H200 (cuda:1)"


def test_packing_anew_asks_for_nothing_that_the_oldest_torch_lacks(monkeypatch):
    """torch 2.11 has no `alg_id` here."""
    monkeypatch.setattr(
        "spp_fx.runtime.cuda_library.to_sparse_semi_structured",
        lambda original_tensor, transposed=False: original_tensor,
    )
    dense = weight(torch.float16)
    assert CuSparseLt(CPU).repack(dense) is dense
