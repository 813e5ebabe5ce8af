"""The comparison with the dense product: what is right passes in every dtype, the smallest fault is named."""

import pytest
import torch
from torch.nn.functional import linear

from spp_fx.runtime.trust import TOKENS, product_fault

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def weight(m: int = 48, k: int = 1056, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """More columns than unit vectors go into one product; 2:4."""
    value = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
    value.view(-1, 4)[:, :2] = 0
    return value.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_product_itself_passes(dtype):
    dense = weight(dtype=dtype)
    assert product_fault(lambda x: linear(x, dense), dense) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_of_accumulation_and_truncation_pass(dtype):
    """A library may add up from the last column to the first, and cut the result off where torch rounds."""
    dense = weight(dtype=dtype)

    def multiply(x):
        exact = linear(x.flip(1).float(), dense.flip(1).float())
        rounded = exact.to(dtype)
        larger = rounded.float().abs() > exact.abs()
        return torch.where(larger, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)

    assert product_fault(multiply, dense) is None


def test_tensor_cores_that_read_float32_as_tf32_pass():
    dense = weight(dtype=torch.float32)

    def cut(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    assert product_fault(lambda x: linear(cut(x), cut(dense)), dense) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_misplaced_entry_is_found_and_named(dtype):
    dense = weight(dtype=dtype)
    wrong = dense.clone()
    wrong[17, 1030], wrong[17, 1028] = dense[17, 1028], dense[17, 1030]
    fault = product_fault(lambda x: linear(x, wrong), dense)
    assert fault is not None
    assert "at row 17, column 1028" in fault
    assert "2 of " in fault


def test_the_least_wrong_bit_is_found_in_a_16_bit_weight():
    dense = weight()
    wrong = dense.clone()
    wrong.view(torch.int16)[3, 6] ^= 1
    assert "row 3, column 6" in (product_fault(lambda x: linear(x, wrong), dense) or "")


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_fault_at_one_token_count_alone_is_found(tokens):
    dense = weight()

    def multiply(x):
        y = linear(x, dense)
        if x.shape[0] == tokens:
            y[-1] += 0.5 * y.abs().max()
        return y

    assert f"with {tokens} tokens" in (product_fault(multiply, dense) or "")


def test_nan_is_a_fault():
    dense = weight()
    assert "nan" in (product_fault(lambda x: linear(x, dense) * torch.nan, dense) or "")


def test_a_product_of_another_shape_is_a_fault():
    dense = weight()
    fault = product_fault(lambda x: linear(x, dense)[:, :40], dense)
    assert fault == "a product has shape [1024, 40], expected [1024, 48]"
