"""The fold: one rounding, every zero where it was."""

from collections.abc import Callable
from fractions import Fraction
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spp_fx.adapters import fold as fold_module
from spp_fx.adapters.fold import FoldCounts, fold_matrix, round_once
from spp_fx.adapters.method import make_method
from spp_fx.adapters.spp import SPP
from spp_fx.errors import MaskError
from tests.effort import examples

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# dtype -> bits of the significand, exponent of the smallest normal number
FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}

seeds = st.integers(0, 2**32 - 1)


def exact_round(value: Fraction, dtype: torch.dtype) -> Fraction:
    """Round to nearest even, subnormals included, in integers; no overflow."""
    unit = ulp(value, dtype)
    return round(value / unit) * unit  # Fraction's round() goes to even


def ulp(value: Fraction, dtype: torch.dtype) -> Fraction:
    bits, least = FORMATS[dtype]
    exponent = least
    magnitude = abs(value)
    if magnitude >= Fraction(2) ** least:
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if Fraction(2) ** exponent > magnitude:
            exponent -= 1
    return Fraction(2) ** (exponent - bits + 1)


def fold(
    weight: Tensor, alpha: Tensor, beta: Tensor, *, scale=2.0, vanish="keep"
) -> tuple[Tensor, FoldCounts]:
    counts = FoldCounts()
    method = SPP(rank=alpha.shape[0], scale=scale)
    factors = {"spp_alpha": alpha, "spp_beta": beta}
    blocks = list(fold_matrix(method, weight, factors, vanish, counts, "site"))
    return torch.cat(blocks), counts


def draw(seed: int, m: int, n: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A half-empty weight of every magnitude that the dtype has room for, and factors that cancel at times."""
    generator = torch.Generator().manual_seed(seed)
    spread = 6 if dtype is torch.float16 else 40
    weight = torch.randn(m, n, generator=generator) * torch.exp2(
        torch.randint(-3 * spread, spread, (m, n), generator=generator).clamp(min=-120).float()
    )
    weight = (weight * (torch.rand(m, n, generator=generator) < 0.5)).to(dtype)
    alpha = torch.randn(r, n, generator=generator)
    beta = torch.randn(m, 1, generator=generator)
    beta[::3] = -0.5  # with scale 2 and alpha 1: cancels
    alpha[:, ::4] = 1
    return weight, alpha, beta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=seeds, m=st.integers(1, 4), r=st.integers(1, 3), n=st.integers(1, 9))
@examples(10)
def test_the_mask_of_the_fold_is_the_mask(dtype, seed, m, r, n):
    weight, alpha, beta = draw(seed, m * r, n, r, dtype)
    folded, _ = fold(weight, alpha, beta)
    assert folded.dtype == dtype
    assert torch.equal(folded != 0, weight != 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=seeds, scale=st.sampled_from([2.0, 0.1, -1.5, 1 / 3]))
@examples(7)
def test_every_element_is_the_formula_within_half_a_unit_in_the_last_place(dtype, seed, scale):
    weight, alpha, beta = draw(seed, 4, 6, 2, dtype)
    folded, _ = fold(weight, alpha, beta, scale=scale, vanish="allow")
    for i in range(4):
        for c in range(6):
            w = Fraction(weight[i, c].item())
            change = w * Fraction(scale) * Fraction(beta[i, 0].item()) * Fraction(alpha[i // 2, c].item())
            error = abs(Fraction(folded[i, c].item()) - (w + change))
            # float64 itself errs by at most four roundings of the terms.
            slack = 4 * Fraction(2) ** -53 * (abs(w) + abs(change))
            assert error <= ulp(w + change, dtype) / 2 + slack


Entry = Callable[[Fraction, list[Fraction], list[Fraction]], Fraction]
# What a weight w becomes, of a row of one factor and a column of the other, and their names.
LOW_RANK: dict[str, tuple[str, str, Entry]] = {
    "sqft": ("sqft_b", "sqft_a", lambda w, b, a: w + TWO_THIRDS * dot(b, a)),
    "lors": ("lors_a", "lors_b", lambda w, b, a: w + TWO_THIRDS * dot(b, a)),
    "lora-star": ("lora_star_b", "lora_star_a", lambda w, b, a: w + TWO_THIRDS * dot(b, a)),
    "hira": ("hira_b", "hira_a", lambda w, b, a: w * (1 + TWO_THIRDS * dot(b, a))),
    "scale-lora": ("scale_lora_b", "scale_lora_a", lambda w, b, a: w * dot(b, a)),
}
TWO_THIRDS = Fraction(2 / 3)  # the float64


def dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def fractions(matrix: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in matrix.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*LOW_RANK, "masked-full"])
def test_every_method_folds_to_within_half_a_unit_in_the_last_place(name, dtype):
    """Against the formula in exact fractions."""
    m, n, rank = 6, 10, 3
    options = {} if name == "masked-full" else {"rank": rank}
    options |= {} if name in ("masked-full", "scale-lora") else {"scale": 2 / 3}
    method, (weight, _, _) = make_method(name, **options), draw(0, m, n, 1, dtype)
    generator = torch.Generator().manual_seed(1)
    factors = {
        key: torch.randn(spec.shape, generator=generator) for key, spec in method.factors((m, n)).items()
    }
    (folded,) = fold_matrix(method, weight, factors, "allow", FoldCounts(), "site")
    if name == "masked-full":
        wanted = [
            [w + d for w, d in zip(*rows, strict=True)]
            for rows in zip(fractions(weight), fractions(factors["full_delta"]), strict=True)
        ]
    else:
        left, right, entry = LOW_RANK[name]
        b, a = fractions(factors[left]), fractions(factors[right].t())
        wanted = [
            [entry(w, b[i], a[c]) for c, w in enumerate(row)] for i, row in enumerate(fractions(weight))
        ]
    for w, got, value in zip(
        weight.flatten().tolist(), folded.flatten().tolist(), chain(*wanted), strict=True
    ):
        if w == 0:
            assert got == 0
            continue
        # float64 itself errs by a rounding of each of some ten terms, none larger than this.
        slack = 16 * Fraction(2) ** -53 * 30 * max(1, abs(Fraction(w)))
        assert abs(Fraction(got) - value) <= ulp(value, dtype) / 2 + slack


@pytest.mark.parametrize("name", ["hira", "lors"])
def test_arithmetic_in_bfloat16_makes_new_zeros_and_the_fold_makes_none(name):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    weight = (weight * (torch.rand(64, 128, generator=generator) < 0.5)).bfloat16()
    method = make_method(name, rank=4)
    factors = {
        key: torch.randn(spec.shape, generator=generator).bfloat16()
        for key, spec in method.factors((64, 128)).items()
    }
    assert int((method.effective_weight(weight, **factors) == 0).sum()) > int((weight == 0).sum())
    counts = FoldCounts()
    (folded,) = fold_matrix(method, weight, factors, "keep", counts, "site")
    assert torch.equal(folded != 0, weight != 0)
    assert counts.vanished == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        (
            "hira",
            [[1.0], [2.0]],
            [[-1.0, 1.0, -0.5, 0.25]],
        ),  # 1 + B A = 0 in the first column, and in the third
        ("lors", [[1.0], [2.0]], [[-0.5, 1.0, -0.25, 0.25]]),  # W = -A B there
    ],
)
def test_a_weight_that_a_low_rank_update_cancels_follows_vanish(name, rows, columns, dtype):
    weight = torch.tensor([[0.5, 0.0, -2.0, 1.0], [0.0, 3.0, 0.5, 1.0]], dtype=dtype)
    method = make_method(name, rank=1, scale=1.0)
    left, right, _ = LOW_RANK[name]
    factors = {left: torch.tensor(rows), right: torch.tensor(columns)}
    cancelled = torch.tensor([[True, False, False, False], [False, False, True, False]])
    for vanish in ("keep", "allow"):
        counts = FoldCounts()
        (folded,) = fold_matrix(method, weight, factors, vanish, counts, "site")
        assert counts.vanished == 2
        kept = torch.finfo(dtype).tiny if vanish == "keep" else 0.0
        assert folded[cancelled].tolist() == [kept, kept]
        assert torch.equal((folded != 0)[~cancelled], (weight != 0)[~cancelled])
    with pytest.raises(MaskError, match=r"site: row 0, column 0 would fold to zero, and at least 1 more"):
        list(fold_matrix(method, weight, factors, "error", FoldCounts(), "site"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beta_zero_folds_to_the_same_bits(dtype):
    weight, alpha, beta = draw(0, 6, 8, 2, dtype)
    folded, counts = fold(weight, alpha, torch.zeros_like(beta))
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(folded.view(integer), weight.view(integer))
    assert (counts.changed, counts.vanished) == (0, 0)


def test_changed_counts_the_elements_whose_value_changed():
    weight = torch.tensor([[1.0, 2.0, 0.0, 4.0]])
    folded, counts = fold(weight, torch.tensor([[1.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.5]]))
    assert folded.tolist() == [[2.0, 2.0, 0.0, 8.0]]
    assert counts == FoldCounts(vanished=0, changed=2)


CANCEL = torch.tensor([[3.0, 0.0, -5.0, 7.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.5]]), torch.tensor([[-0.5]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cancelled_weight_is_kept_as_the_smallest_normal_number_of_its_sign(dtype):
    weight, alpha, beta = CANCEL
    folded, counts = fold(weight.to(dtype), alpha, beta, vanish="keep")
    tiny = torch.finfo(dtype).tiny
    assert folded.tolist() == [[tiny, 0.0, -tiny, 3.5]]
    assert counts == FoldCounts(vanished=2, changed=3)


def test_a_cancelled_weight_is_an_error_that_names_it():
    weight, alpha, beta = CANCEL
    rows = torch.cat([torch.ones(1, 4), weight])
    with pytest.raises(MaskError, match=r"site: row 1, column 0 would fold to zero, and at least 1 more"):
        fold(rows, alpha, torch.cat([torch.zeros(1, 1), beta]), vanish="error")


def test_a_cancelled_weight_becomes_zero_where_that_is_allowed():
    weight, alpha, beta = CANCEL
    folded, counts = fold(weight, alpha, beta, vanish="allow")
    assert folded.tolist() == [[0.0, 0.0, 0.0, 3.5]]
    assert counts.vanished == 2


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)])
def test_underflow_counts_as_vanishing(dtype, least):
    weight = torch.tensor([[-least, 2 * least]], dtype=dtype)
    folded, counts = fold(weight, torch.ones(1, 2), torch.tensor([[-0.375]]))  # times 1/4
    assert weight[0, 0] != 0
    tiny = torch.finfo(dtype).tiny
    assert folded.tolist() == [[-tiny, tiny]]  # 1/4 and, by ties to even, 2/4 of the least round to zero
    assert counts.vanished == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_is_an_error_that_names_row_and_column(dtype):
    weight = torch.ones(3, 4, dtype=dtype)
    weight[2, 1] = torch.finfo(dtype).max
    with pytest.raises(MaskError, match=r"site: row 2, column 1 folds to inf .*nothing is written"):
        fold(weight, torch.ones(1, 4), torch.full((3, 1), 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["spp_alpha", "spp_beta"])
def test_a_factor_that_is_not_finite_is_an_error(bad, factor):
    alpha, beta = torch.ones(1, 4), torch.ones(2, 1)
    (alpha if factor == "spp_alpha" else beta)[0, 0] = bad
    with pytest.raises(MaskError, match="row 0, column 0 folds to"):
        fold(torch.ones(2, 4), alpha, beta)


def test_rows_are_named_from_the_start_of_the_weight_in_later_blocks(monkeypatch):
    monkeypatch.setattr(fold_module, "BLOCK_ELEMENTS", 8)
    weight = torch.ones(6, 4)
    beta = torch.zeros(6, 1)
    beta[5] = -0.5
    with pytest.raises(MaskError, match="row 5, column 0 would fold to zero, and at least 3 more"):
        fold(weight, torch.ones(2, 4), beta, vanish="error")


def test_both_zeros_keep_their_bits():
    weight = torch.tensor([[0.0, -0.0, 1.0]], dtype=torch.bfloat16)
    folded, _ = fold(weight, torch.ones(1, 3), torch.tensor([[-5.0]]))
    assert torch.signbit(folded).tolist() == [[False, True, True]]


@pytest.mark.parametrize("elements", [1, 9, 20, 27])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folding_by_rows_is_folding_at_once(dtype, elements, monkeypatch):
    weight, alpha, beta = draw(5, 12, 9, 3, dtype)
    whole, counts = fold(weight, alpha, beta)
    monkeypatch.setattr(fold_module, "BLOCK_ELEMENTS", elements)
    parts, again = fold(weight, alpha, beta)
    assert torch.equal(parts, whole)
    assert again == counts
    assert counts.vanished > 0


def test_the_blocks_are_bounded(monkeypatch):
    monkeypatch.setattr(fold_module, "BLOCK_ELEMENTS", 20)
    weight, alpha, beta = draw(5, 12, 9, 3, torch.float32)
    factors = {"spp_alpha": alpha, "spp_beta": beta}
    blocks = fold_matrix(SPP(rank=3), weight, factors, "keep", FoldCounts(), "site")
    assert [len(block) for block in blocks] == [2] * 6


def test_rows_from_the_middle_take_their_own_factors():
    weight, alpha, beta = draw(5, 12, 9, 3, torch.float16)
    whole, _ = fold(weight, alpha, beta)
    factors = {"spp_alpha": alpha, "spp_beta": beta}
    specs = SPP(rank=3).factors((12, 9))
    blocks = fold_matrix(
        SPP(rank=3), weight[3:7], factors, "keep", FoldCounts(), "site", specs=specs, first_row=3
    )
    assert torch.equal(torch.cat(list(blocks)), whole[3:7])


def test_a_transposed_weight_folds_to_the_same():
    weight, alpha, beta = draw(5, 12, 9, 3, torch.float16)
    assert torch.equal(fold(weight.t().contiguous().t(), alpha, beta)[0], fold(weight, alpha, beta)[0])


def test_the_weight_and_the_factors_are_left_alone():
    inputs = draw(5, 12, 9, 3, torch.float32)
    copies = [t.clone() for t in inputs]
    fold(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@st.composite
def near_ties(draw_, dtype):
    """A float64 beside (or on) the middle of two neighbours of a dtype, subnormals included."""
    bits, least = FORMATS[dtype]
    exponent = draw_(st.integers(least - 2, min(15, -least - 1)))
    significand = draw_(st.integers(2 ** (bits - 1), 2**bits - 1))
    middle = (Fraction(significand) + Fraction(1, 2)) * Fraction(2) ** (exponent - bits + 1)
    offset = draw_(st.integers(-3, 3)) * Fraction(2) ** (exponent - draw_(st.integers(20, 52)))
    return float(draw_(st.sampled_from([1, -1])) * (middle + offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@examples(75)
def test_round_once_is_the_exact_rounding_near_ties(dtype, data):
    value = data.draw(near_ties(dtype))
    got = round_once(torch.tensor([value], dtype=torch.float64), dtype)
    wanted = exact_round(Fraction(value), dtype)
    if abs(wanted) <= Fraction(torch.finfo(dtype).max):
        assert Fraction(got.item()) == wanted
    else:
        assert got.isinf()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_once_differs_from_rounding_twice_where_that_is_wrong(dtype):
    bits, _ = FORMATS[dtype]
    value = torch.tensor([1 + 2.0**-bits + 2.0**-50], dtype=torch.float64)  # above the tie: rounds up
    assert value.to(torch.float32).to(dtype).item() == 1.0
    assert round_once(value, dtype).item() == 1 + 2.0 ** (1 - bits)
    assert round_once(-value, dtype).item() == -1 - 2.0 ** (1 - bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_once_of_the_values_at_the_ends(dtype):
    top = torch.finfo(dtype).max
    value = torch.tensor([0.0, -0.0, top, -top, float("inf"), 2.0**200, 1e-300, -1e-300], dtype=torch.float64)
    got = round_once(value, dtype)
    assert got.tolist() == [0.0, 0.0, top, -top, float("inf"), float("inf"), 0.0, 0.0]
    assert torch.signbit(got).tolist() == [False, True, False, True, False, False, False, True]
    assert round_once(torch.tensor([float("nan")], dtype=torch.float64), dtype).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_once_keeps_every_number_of_the_dtype(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    own = (
        (patterns << 16).view(torch.float32)
        if dtype is torch.float32
        else patterns.to(torch.int16).view(dtype)
    )
    own = own[own.isfinite()]
    assert torch.equal(round_once(own.double(), dtype), own)
