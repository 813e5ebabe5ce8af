"""The rivals that benchmarks time compute what their papers say."""

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCALE = 1.5


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    from common import rivals

    yield rivals
    for name in [name for name in sys.modules if name.partition(".")[0] == "common"]:
        del sys.modules[name]


@pytest.fixture
def numbers():
    torch.manual_seed(0)
    m, n, r, b = 12, 8, 4, 5
    weight = torch.randn(m, n, dtype=torch.float64) * (torch.rand(m, n) < 0.5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return draw(b, n), weight, draw(m, r), draw(r, n), draw(b, m)


def gradients(way, x, weight, first, second, dy):
    leaves = [each.clone().requires_grad_() for each in (x, first, second)]
    y = way(leaves[0], weight, *leaves[1:], SCALE)
    y.backward(dy)
    return y.detach(), *(leaf.grad for leaf in leaves)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_lors_drops_the_mask_from_its_factors_gradients_only(rivals, numbers):
    x, weight, a, b, dy = numbers
    y, dx, da, db = gradients(rivals.lors, *numbers)
    effective = weight + SCALE * (a @ b) * (weight != 0)
    close(y, x @ effective.t())
    close(dx, dy @ effective)
    close(da, SCALE * dy.t() @ (x @ b.t()))
    close(db, SCALE * (dy @ a).t() @ x)


@pytest.mark.parametrize("way", ["sqft", "sqft_checkpoint"])
def test_sqft_has_the_true_gradients(rivals, numbers, way):
    x, weight, a, b, dy = numbers
    y, dx, da, db = gradients(getattr(rivals, way), *numbers)
    mask = (weight != 0).double()
    effective = weight + SCALE * (a @ b) * mask
    masked = SCALE * (dy.t() @ x) * mask
    close(y, x @ effective.t())
    close(dx, dy @ effective)
    close(da, masked @ b.t())
    close(db, a.t() @ masked)


def test_hira_has_the_true_gradients(rivals, numbers):
    x, weight, a, b, dy = numbers
    y, dx, da, db = gradients(rivals.hira, *numbers)
    effective = weight * (1 + SCALE * (a @ b))
    weighted = SCALE * (dy.t() @ x) * weight
    close(y, x @ effective.t())
    close(dx, dy @ effective)
    close(da, weighted @ b.t())
    close(db, a.t() @ weighted)


@pytest.mark.parametrize("way", ["spp_literal", "spp_literal_checkpoint"])
def test_literal_spp_is_the_definition(rivals, numbers, way):
    x, weight, _, alpha, dy = numbers
    beta = torch.randn(weight.shape[0], 1, dtype=torch.float64)
    repeated = alpha.repeat_interleave(weight.shape[0] // alpha.shape[0], 0)
    y, dx, dalpha, dbeta = gradients(getattr(rivals, way), x, weight, alpha, beta, dy)
    g = dy.t() @ x
    effective = weight * (1 + SCALE * beta * repeated)
    close(y, x @ effective.t())
    close(dx, dy @ effective)
    close(dbeta, SCALE * (g * weight * repeated).sum(1, keepdim=True))
    close(dalpha, SCALE * (beta * g * weight).view(alpha.shape[0], -1, weight.shape[1]).sum(1))
