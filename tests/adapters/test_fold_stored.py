"""The fold of stored numbers gives the bits of its definition, by whichever way it is computed."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp_fx.adapters import fold as fold_module
from spp_fx.adapters.fold import FLOATING, FoldCounts, StoredFold, fold_matrix
from spp_fx.adapters.method import make_method
from spp_fx.adapters.spp import SPP
from spp_fx.errors import MaskError
from tests.effort import examples, nightly

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
COMPILED = pytest.mark.parametrize(
    ("dtype", "transposed"),
    [
        each if each in {("BF16", True), ("F16", False), ("F32", True), ("F64", False)} else nightly(*each)
        for each in product(FLOATING, (False, True))
    ],
)
"""Each pair is a compilation of two seconds."""
HELD = {2: torch.uint16, 4: torch.float32, 8: torch.float64}


def any_weight(dtype: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Every finite value that the dtype has is as likely as any other, zeros of both signs among them."""
    random = np.random.default_rng(seed)
    width = TORCH[dtype].itemsize
    words = random.integers(0, 1 << (8 * width), (rows, columns), dtype=f"u{width}", endpoint=False)
    words[random.random((rows, columns)) < 0.3] &= np.array(1 << (8 * width - 1), dtype=f"u{width}")
    weight = torch.from_numpy(words).view(TORCH[dtype])
    return torch.where(weight.isfinite(), weight, torch.zeros_like(weight))


def factors(rows: int, columns: int, rank: int, seed: int, decades: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    beta = torch.randn(rows, 1, generator=random, dtype=torch.float64)
    beta *= 10.0 ** torch.randint(-decades, 1, (rows, 1), generator=random)
    return {
        "spp_alpha": torch.rand(rank, columns, generator=random, dtype=torch.float64) - 0.5,
        "spp_beta": beta,
    }


def stored(weight: torch.Tensor) -> np.ndarray:
    return weight.contiguous().view(HELD[weight.itemsize]).numpy()


def by_definition(weight, both, vanish, first_row=0):
    counts = FoldCounts()
    method, shape = SPP(rank=4, scale=1.7), (len(both["spp_beta"]), weight.shape[1])
    specs = method.factors(shape)
    blocks = fold_matrix(method, weight, both, vanish, counts, "site", specs=specs, first_row=first_row)
    return torch.cat(list(blocks)), counts


def by_stored(weight, both, vanish, dtype, *, transposed=False, first_row=0, step=3):
    values, shape = {k: v.numpy() for k, v in both.items()}, (len(both["spp_beta"]), weight.shape[1])
    fold = StoredFold(SPP(rank=4, scale=1.7), shape, values, dtype, vanish, "site", first_row)
    words = stored(weight.t() if transposed else weight)
    out = np.empty_like(words)
    source, target = (words.T, out.T) if transposed else (words, out)
    counts = FoldCounts()
    for start in range(0, weight.shape[0], step):
        stop = start + step
        counts.add(fold.rows(source[start:stop], target[start:stop], start))
    return torch.from_numpy(target.copy()).view(TORCH[dtype]), counts


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return np.array_equal(stored(a).view(f"u{a.itemsize}"), stored(b).view(f"u{a.itemsize}"))


@pytest.fixture(params=["compiled", "without numba"])
def way(request, monkeypatch):
    if request.param != "compiled":
        monkeypatch.setattr(SPP, "fold_kernel", lambda self, factors, dtype: None)
    else:
        pytest.importorskip("numba")
    return request.param


@pytest.mark.parametrize("dtype", FLOATING)
@examples(10)
@given(seed=st.integers(0, 2**32 - 1), decades=st.integers(0, 12), columns=st.sampled_from([1, 4, 31, 128]))
def test_kernels_give_the_bits_of_the_definition(dtype, seed, decades, columns):
    weight, both = any_weight(dtype, 8, columns, seed), factors(8, columns, 4, seed, decades)
    try:
        expected, counted = by_definition(weight, both, "keep")
    except MaskError:  # something overflows: the stored fold must say so, too
        with pytest.raises(MaskError, match="folds to"):
            by_stored(weight, both, "keep", dtype)
        return
    folded, counts = by_stored(weight, both, "keep", dtype)
    assert same_bits(folded, expected)
    assert counts == counted


@pytest.mark.parametrize("dtype", ["BF16", nightly("F16"), "F32", nightly("F64")])
def test_a_transposed_matrix_folds_to_the_same(dtype, way):
    weight, both = any_weight(dtype, 8, 12, 0) / 1024, factors(8, 12, 4, 0, 1)
    folded, counts = by_stored(weight, both, "keep", dtype, transposed=True, step=8)
    expected, counted = by_definition(weight, both, "keep")
    assert same_bits(folded, expected)
    assert counts == counted


@pytest.mark.parametrize("first_row", [0, 4])
def test_a_part_of_a_site_takes_its_own_rows_of_the_factors(first_row, way):
    weight, both = torch.ones(4, 6), factors(8, 6, 4, 1, 0)
    folded, _ = by_stored(weight, both, "keep", "F32", first_row=first_row)
    expected, _ = by_definition(weight, both, "keep", first_row=first_row)
    assert same_bits(folded, expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("vanish", "kept"), [("keep", True), ("allow", False)])
def test_a_value_that_cancels_is_counted_and_kept_or_not(dtype, vanish, kept, way):
    weight = torch.full((4, 8), -3.0, dtype=TORCH[dtype])
    both = {
        "spp_alpha": torch.zeros(4, 8, dtype=torch.float64),
        "spp_beta": torch.ones(4, 1, dtype=torch.float64),
    }
    both["spp_alpha"][2, 5] = -1 / 1.7
    assert 1 + 1.7 * both["spp_alpha"][2, 5] == 0
    folded, counts = by_stored(weight, both, vanish, dtype)
    assert counts.vanished == 1
    assert folded[2, 5] == (-torch.finfo(TORCH[dtype]).tiny if kept else 0)
    assert (folded != 0).sum() == 31 + kept


def test_errors_name_row_and_column_of_the_stored_tensor(way):
    weight = torch.full((6, 8), 60000.0, dtype=torch.float16)
    both = {
        "spp_alpha": torch.zeros(4, 8, dtype=torch.float64),
        "spp_beta": torch.ones(12, 1, dtype=torch.float64),
    }
    both["spp_alpha"][3, 7] = 1.0  # rows 9 to 11 of the site are rows 3 to 5 of this part
    with pytest.raises(MaskError, match="site: row 3, column 7 folds to inf"):
        by_stored(weight, both, "keep", "F16", first_row=6)


@COMPILED
@pytest.mark.parametrize("name", ["sqft", "lors", "hira", "scale-lora"])
def test_kernels_of_low_rank_updates_give_the_bits_of_the_definition(name, dtype, transposed, monkeypatch):
    monkeypatch.setattr(fold_module, "BLOCK_ELEMENTS", 5 * 70)
    method, weight = make_method(name, rank=3), any_weight(dtype, 33, 70, seed=1)
    # Of a size at which the sum stays finite.
    weight = torch.where(weight.abs() < torch.finfo(weight.dtype).max / 1e3, weight, torch.ones_like(weight))
    random = torch.Generator().manual_seed(2)
    values = {
        key: torch.randn(spec.shape, generator=random, dtype=torch.float64).numpy()
        for key, spec in method.factors((33, 70)).items()
    }
    words = stored(weight.t() if transposed else weight)
    source = words.T if transposed else words
    both = []
    for way in ("kernel", "definition"):
        fold, out = StoredFold(method, (33, 70), values, dtype, "keep", "site"), np.empty_like(words)
        assert fold.method.fold_kernel(values, dtype) is not None
        if way == "definition":
            monkeypatch.setattr(type(method), "fold_kernel", lambda *_: None)
        counts = fold.rows(source, out.T if transposed else out, 0)
        both.append((out.tobytes(), counts))
    assert both[0] == both[1]
    assert both[0][1].changed > 0
