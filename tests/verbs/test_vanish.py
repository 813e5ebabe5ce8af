"""merge where a fold meets the edge of a type: exact cancellation, underflow, overflow, in every dtype.

Everything is compared with the formula in float64 and one rounding, written out in numpy here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spp_fx.adapters.adapter_folder import StoredMatrix, write_adapter
from spp_fx.adapters.method import make_method
from spp_fx.sparsity.lock import Lock, make_entry
from spp_fx.sparsity.pattern import NM
from spp_fx.sparsity.scan import pack_mask
from spp_fx.storage.folder import ModelFolder
from tests.command import command, must, one_line

SITE = "model.layers.0.mlp.up_proj.weight"
ROWS, COLUMNS, RANK, SCALE = 8, 16, 4, 2.0


@dataclass(frozen=True)
class Type:
    """A binary floating type: bits of its fraction, exponent of its smallest normal number."""

    torch: torch.dtype
    fraction: int
    least: int

    @property
    def tiny(self) -> float:
        return 2.0**self.least

    def rounded(self, value: np.ndarray) -> np.ndarray:
        """To nearest, ties to even, subnormals included; exact in float64, for finite results."""
        exponent = np.floor(np.log2(np.abs(value), where=value != 0, out=np.full_like(value, self.least)))
        quantum = 2.0 ** (np.maximum(exponent, self.least) - self.fraction)
        return np.round(value / quantum) * quantum


TYPES = {
    "F16": Type(torch.float16, 10, -14),
    "BF16": Type(torch.bfloat16, 7, -126),
    "F32": Type(torch.float32, 23, -126),
}


@dataclass(frozen=True)
class Case:
    """An adapter folder, and what the formula makes of its base."""

    adapter: Path
    type: Type
    weight: np.ndarray
    exact: np.ndarray

    @property
    def vanished(self) -> np.ndarray:
        return (self.weight != 0) & (self.type.rounded(self.exact) == 0)

    def kept(self) -> np.ndarray:
        """The folded weight with the smallest normal number in place of what vanished."""
        sign = np.where(self.exact == 0, self.weight, self.exact)
        return np.where(self.vanished, np.copysign(self.type.tiny, sign), self.type.rounded(self.exact))


def make_case(root: Path, kind: Type, weight: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> Case:
    """A base of one site (and one tensor that is none), and factors for it."""
    stored = torch.from_numpy(weight).to(kind.torch)
    base = root / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"model_type": "llama"}')
    save_file(
        {SITE: stored, "model.norm.weight": torch.ones(4)}, base / "model.safetensors", {"format": "pt"}
    )
    adapter = root / "adapter"
    adapter.mkdir()
    write_adapter(
        adapter,
        target=adapter,
        base=base,
        fingerprint=ModelFolder.open(base).fingerprint(),
        methods={},
        method=make_method("spp", rank=RANK, scale=SCALE, dropout=0.0),
        seed=0,
        matrices={
            SITE: [StoredMatrix(tensor=SITE, transposed=False, expert=None, start=0, stop=ROWS, whole=False)]
        },
        factors={
            f"{SITE}.spp_alpha": torch.from_numpy(alpha.astype(np.float32)),
            f"{SITE}.spp_beta": torch.from_numpy(beta.astype(np.float32)),
        },
        lock=Lock.of([make_entry(SITE, "linear", pack_mask(stored), NM(2, 4))]),
    )
    exact64 = stored.double().numpy()
    grown = np.repeat(alpha.astype(np.float32).astype(np.float64), ROWS // RANK, axis=0)
    return Case(
        adapter, kind, exact64, exact64 * (1 + SCALE * beta.astype(np.float32).astype(np.float64) * grown)
    )


def edge_case(root: Path, name: str) -> Case:
    """Weights of every size down to subnormal numbers; factors that cancel, nearly cancel, and do not."""
    kind, random = TYPES[name], np.random.default_rng(7)
    shape = (ROWS, COLUMNS)
    size = 2.0 ** random.integers(kind.least - kind.fraction, 0, shape)
    weight = np.copysign(size * random.choice([1.0, 1.5], shape), random.normal(size=shape))
    weight = kind.rounded(weight) * np.tile([1, 0, 0, 1], COLUMNS // 4)
    # 1 + 2 * alpha * -1 is 0 for 0.5, and a power of two for the next ones; all exact in float32.
    near = [0.5, *((1 - 2.0**-k) / 2 for k in (1, 7, 8, 9, 11, 23, 24))]
    alpha = random.choice([*near, 0.125, -0.3, 0.7], (RANK, COLUMNS))
    beta = np.where(np.arange(ROWS)[:, None] % 3 == 2, 0.25, -1.0)
    return make_case(root, kind, weight, alpha, beta)


def merged(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[SITE]


@pytest.fixture(params=TYPES)
def case(request, tmp_path):
    found = edge_case(tmp_path, request.param)
    gone = found.vanished
    assert (gone & (found.exact == 0)).any(), "nothing cancels"
    assert (gone & (found.exact != 0)).any(), "nothing underflows"
    assert ((found.weight != 0) & ~gone).any(), "nothing is left"
    return found


def test_keep_writes_the_smallest_normal_number_of_the_sign_and_counts_exactly(case, tmp_path):
    done = must("merge", case.adapter, "-o", tmp_path / "out", "--vanish", "keep", "--json", "-q").json
    written = merged(tmp_path / "out").double().numpy()
    np.testing.assert_array_equal(written, case.kept())
    np.testing.assert_array_equal(np.signbit(written)[case.vanished], np.signbit(case.kept())[case.vanished])
    (site,) = done["sites"]
    assert site["vanished"] == done["summary"]["vanished"] == int(case.vanished.sum())
    assert site["changed"] == int((case.kept() != case.weight).sum())
    assert site["mask_equal"] is True
    must("verify", tmp_path / "out", "--lock", case.adapter / "sparsity.lock.json", "-q")


def test_error_names_the_first_row_and_column_and_writes_nothing(case, tmp_path):
    ran = command("merge", case.adapter, "-o", tmp_path / "out", "--vanish", "error", "-q")
    assert ran.code == 1
    row, column = np.argwhere(case.vanished)[0]
    assert f"{SITE} (model.safetensors): row {row}, column {column} " in one_line(ran.err)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_allow_writes_the_zeros_counts_them_and_says_that_the_mask_is_another(case, tmp_path):
    done = must("merge", case.adapter, "-o", tmp_path / "out", "--vanish", "allow", "--json", "-q").json
    written = merged(tmp_path / "out").double().numpy()
    np.testing.assert_array_equal(written, case.type.rounded(case.exact))
    (site,) = done["sites"]
    assert site["vanished"] == int(case.vanished.sum())
    assert site["changed"] == int((written != case.weight).sum())
    assert site["mask_equal"] is False
    assert done["summary"]["masks_equal"] == 0
    # Its own lock is that of what was written; it does not hold the adapter's.
    must("verify", tmp_path / "out", "-q")
    assert command("verify", tmp_path / "out", "--lock", case.adapter / "sparsity.lock.json", "-q").code == 1


@pytest.mark.parametrize("policy", ["keep", "allow"])
def test_zeros_keep_their_bits(tmp_path, policy):
    found = edge_case(tmp_path, "F16")
    before = merged(found.adapter.parent / "base")
    must("merge", found.adapter, "-o", tmp_path / "out", "--vanish", policy, "-q")
    after = merged(tmp_path / "out")
    zeros = torch.from_numpy(found.weight == 0)
    assert torch.equal(before.view(torch.int16)[zeros], after.view(torch.int16)[zeros])


def column_of(alpha: float) -> np.ndarray:
    return np.full((RANK, COLUMNS), alpha)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("above", "count"), [(False, 1), (True, 0)])
def test_half_the_smallest_subnormal_is_where_a_value_begins_to_vanish(tmp_path, name, above, count):
    """2**-k of a normal number is half the smallest subnormal, a tie that goes to zero; one bit more stays."""
    kind = TYPES[name]
    weight = np.zeros((ROWS, COLUMNS))
    weight[3, 5] = kind.tiny * (1 + 2.0**-kind.fraction if above else 1)
    found = make_case(
        tmp_path, kind, weight, column_of((1 - 2.0 ** -(kind.fraction + 1)) / 2), np.full((ROWS, 1), -1.0)
    )
    assert int(found.vanished.sum()) == count
    done = must("merge", found.adapter, "-o", tmp_path / "out", "--json", "-q").json
    assert done["summary"]["vanished"] == count
    smallest = kind.tiny * 2.0**-kind.fraction
    assert merged(tmp_path / "out").double()[3, 5].item() == (smallest if above else kind.tiny)


@pytest.mark.parametrize("policy", ["keep", "error", "allow"])
@pytest.mark.parametrize("name", TYPES)
def test_overflow_is_an_error_that_names_the_site_under_every_policy(tmp_path, name, policy):
    kind = TYPES[name]
    weight = np.zeros((ROWS, COLUMNS))
    weight[2, 7] = weight[2, 9] = -torch.finfo(kind.torch).max
    weight[1, 0] = 1.0
    found = make_case(tmp_path, kind, weight, column_of(0.5), np.ones((ROWS, 1)))
    ran = command("merge", found.adapter, "-o", tmp_path / "out", "--vanish", policy, "-q")
    assert ran.code == 1
    assert f"{SITE} (model.safetensors): row 2, column 7 folds to -inf" in one_line(ran.err)
    assert not (tmp_path / "out").exists()


def test_the_largest_finite_value_is_none(tmp_path):
    kind = TYPES["F16"]
    weight = np.zeros((ROWS, COLUMNS))
    weight[2, 7] = torch.finfo(kind.torch).max / 2
    found = make_case(tmp_path, kind, weight, column_of(0.5), np.ones((ROWS, 1)))
    must("merge", found.adapter, "-o", tmp_path / "out", "-q")
    assert merged(tmp_path / "out")[2, 7].item() == torch.finfo(kind.torch).max
