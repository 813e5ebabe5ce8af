"""The compiled loops, held to torch's expressions: SPP's over a bfloat16 weight, and those of low-rank tiles."""

from dataclasses import replace

import pytest
import torch

from spp_fx import parallel
from spp_fx.adapters import cpu, low_rank, low_rank_kernels, op
from spp_fx.adapters.rows import DenseRows
from tests.adapters.adapted import LOW_RANK, SHAPES, in_torch, make, make_low_rank, ranges, with_factors
from tests.effort import covering, nightly


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("storage", ["dense", "2:4", "bitmask"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tile_and_pullback_are_those_of_torch(shape, storage, dtype, monkeypatch):
    in_torch(monkeypatch)
    adapted = make(*shape, torch.bfloat16, storage)
    m, n, r = shape
    assert cpu.takes(adapted, dtype)
    for start, stop in ranges(m, r):
        for base in (0.0, 1.0):
            expected, got = (torch.full((stop - start + 1, n), 7.0, dtype=dtype) for _ in range(2))
            adapted.build(start, stop, base, expected)
            cpu.tile(adapted, start, stop, base, got[: stop - start])
            # A product may be rounded once where torch rounds it twice; where 1 + f cancels, that is seen.
            rtol = 8e-3 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(got, expected, rtol=rtol, atol=2e-6)
        g = torch.randn(stop - start, n, generator=torch.Generator().manual_seed(3)).to(dtype)
        got, expected = ({k: torch.ones_like(v) for k, v in adapted.factors.items()} for _ in range(2))
        adapted.pull_back(g, start, stop, expected)
        cpu.pullback(adapted, g, start, stop, got)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_every_bfloat16_is_read_and_written_as_it_is():
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(256, 256)
    adapted = with_factors(DenseRows(weight), torch.zeros(4, 256), torch.zeros(256, 1))
    got = torch.empty_like(weight)
    cpu.tile(adapted, 0, 256, 1.0, got)
    finite = weight.isfinite()
    assert torch.equal(got[finite], weight[finite])
    assert bool(got[weight.isnan()].isnan().all())


def test_rounding_is_to_nearest_ties_to_even():
    torch.manual_seed(0)
    weight = torch.ones(64, 512, dtype=torch.bfloat16)
    # 1 + f has 16 bits below those that bfloat16 keeps: ties, just above and just below them.
    ties = (torch.randint(0, 128, (64, 512)) * 2 + 1) * 2.0**-8 + torch.randint(-1, 2, (64, 512)) * 2.0**-20
    adapted = with_factors(DenseRows(weight), ties, torch.ones(64, 1))
    got = torch.empty_like(weight)
    cpu.tile(adapted, 0, 64, 1.0, got)
    assert torch.equal(got, (1 + ties).to(torch.bfloat16))


def test_a_weight_stored_the_other_way_round():
    adapted = make(64, 300, 4, torch.bfloat16, "dense")
    turned = replace(adapted, rows=DenseRows(adapted.rows.take(0, 64).t().contiguous().t()))
    expected, got = (torch.empty(64, 300, dtype=torch.bfloat16) for _ in range(2))
    cpu.tile(adapted, 0, 64, 1.0, expected)
    cpu.tile(turned, 0, 64, 1.0, got)
    assert torch.equal(got, expected)


def test_types_it_does_not_have_are_left_to_torch():
    assert not cpu.takes(make(8, 12, 2, torch.float16, "dense"), torch.float16)
    assert not cpu.takes(make(8, 12, 2, torch.float32, "dense"), torch.float32)
    assert not cpu.takes(make(8, 12, 2, torch.bfloat16, "dense"), torch.float64)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    adapted = make(64, 300, 4, torch.bfloat16, "2:4")
    with pytest.raises(
        ValueError, match=r"expected rows 0 to 64 of a weight \(64, 300\), got .* \(64, 296\)"
    ):
        cpu.tile(adapted, 0, 64, 1.0, torch.empty(64, 296, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="do not fit a weight"):
        replace(adapted, factors=adapted.factors | {"spp_beta": torch.ones(63, 1)})


def test_many_threads_are_left_to_torch(monkeypatch):
    adapted = make(8, 12, 2, torch.bfloat16, "dense")
    monkeypatch.setattr(torch, "get_num_threads", lambda: cpu.FEW_THREADS + 1)
    assert not cpu.takes(adapted, torch.bfloat16)


@covering(
    name=LOW_RANK,
    storage=["dense", "2:4", "bitmask"],
    types=[(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
    shape=SHAPES,
    rank=[1, 3, 16, 19],
)
def test_a_low_rank_tile_and_its_pullback_are_those_of_torch(name, storage, types, shape, rank, monkeypatch):
    compare_with_torch(make_low_rank(make(*shape, types[0], storage), name, rank), types[1], monkeypatch)


@pytest.mark.parametrize(
    "types", [nightly((torch.bfloat16, torch.float32)), nightly((torch.float32, torch.bfloat16))]
)
def test_w_and_what_is_built_of_it_may_have_two_types(types, monkeypatch):
    for name in LOW_RANK:
        adapted = make_low_rank(make(*SHAPES[1], types[0], "dense"), name, 3)
        compare_with_torch(adapted, types[1], monkeypatch)


def compare_with_torch(adapted, other, monkeypatch):
    assert low_rank_kernels.low_rank_takes(adapted, other)
    m, n = adapted.rows.shape
    monkeypatch.setattr(op, "TILE_ELEMENTS", 5 * n)
    for start, stop in [(0, m), (m - 3, m)]:
        for base in (0.0, 1.0):
            built, expected = (torch.full((stop - start + 1, n), 7.0, dtype=other) for _ in range(2))
            adapted.build(start, stop, base, built)
            with monkeypatch.context() as patch:
                patch.setattr(low_rank, "_compiled", lambda *_: None)
                adapted.build(start, stop, base, expected)
            # A product may be rounded once where torch rounds it twice; where terms cancel, that is seen.
            rtol = 8e-3 if other == torch.bfloat16 else 1e-5
            torch.testing.assert_close(built, expected, rtol=rtol, atol=1e-5)
        g = torch.randn(stop - start, n, generator=torch.Generator().manual_seed(3)).to(other)
        got, expected = ({k: torch.ones_like(v) for k, v in adapted.factors.items()} for _ in range(2))
        adapted.pull_back(g, start, stop, got)
        with monkeypatch.context() as patch:
            patch.setattr(low_rank, "_compiled", lambda *_: None)
            adapted.pull_back(g, start, stop, expected)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_threads_share_the_rows_and_change_no_sum(rows, monkeypatch):
    adapted = make_low_rank(make(40, 300, 4, torch.bfloat16, "2:4"), "sqft")
    g = torch.randn(rows, 300, generator=torch.Generator().manual_seed(3)).bfloat16()

    def both() -> list[torch.Tensor]:
        grads = {key: torch.zeros_like(value) for key, value in adapted.factors.items()}
        adapted.pull_back(g, 0, rows, grads)
        return [adapted.build(0, rows, 1.0, torch.empty_like(g)), *grads.values()]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = both()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, both(), strict=True))
    monkeypatch.setattr(parallel, "_openmp", lambda: None)  # threads of Python
    assert all(torch.equal(a, b) for a, b in zip(alone, both(), strict=True))


def test_what_fails_on_a_thread_is_raised(monkeypatch):
    adapted = make_low_rank(make(40, 300, 4, torch.bfloat16, "dense"), "sqft")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def fail(*_: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(low_rank_kernels, "tile", fail)
    with pytest.raises(MemoryError, match="none left"):
        adapted.build(0, 40, 1.0, torch.empty(40, 300, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", LOW_RANK)
def test_under_autocast_a_low_rank_tile_keeps_its_precision(name):
    adapted = make_low_rank(make(8, 12, 2, torch.float32, "dense"), name)
    expected, got = (torch.empty(8, 12) for _ in range(2))
    grads = [{k: torch.zeros_like(v) for k, v in adapted.factors.items()} for _ in range(2)]
    g = torch.randn(8, 12)
    adapted.build(0, 8, 1.0, expected)
    adapted.pull_back(g, 0, 8, grads[0])
    with torch.autocast("cpu", torch.bfloat16):
        adapted.build(0, 8, 1.0, got)
        adapted.pull_back(g, 0, 8, grads[1])
    assert torch.equal(got, expected)
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])
