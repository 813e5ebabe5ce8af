"""verify never alarms where no mask moved, and finds and names one weight that did, in every dtype and form."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spp_fx.verbs.verify import verify
from tests.effort import examples
from tests.handmade import LARGEST, WIDTHS, Raw, lock_of, save, save_model

NAMES = ("model.layers.0.mlp.up_proj.weight", "a b.weight", "w", "schicht.é.weight", "x" * 200)


@dataclass(frozen=True)
class Artifact:
    """Matrices and how they are stored: a lone file, or a model folder of so many shards."""

    tensors: dict[str, Raw]
    shards: int

    @contextmanager
    def on_disk(self, changed: dict[str, Raw]) -> Iterator[Path]:
        """The artifact with some matrices changed, beside the lock of the ones it was made with."""
        tensors = self.tensors | changed
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "sparsity.lock.json").write_text(lock_of(self.tensors).dumps())
            if self.shards == 0:
                save(folder / "w.safetensors", tensors)
                yield folder / "w.safetensors"
                return
            names = list(tensors)
            parts = [{name: tensors[name] for name in names[at :: self.shards]} for at in range(self.shards)]
            save_model(folder, [part for part in parts if part])
            yield folder


@st.composite
def matrices(draw: st.DrawFn) -> Raw:
    """Zeros of both signs, the smallest and largest numbers, anything between; often whole rows of zeros."""
    dtype = draw(st.sampled_from(sorted(WIDTHS)))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    sign = 1 << (8 * WIDTHS[dtype] - 1)
    magnitude = st.sampled_from([0, 0, 0, 1, 2, LARGEST[dtype]]) | st.integers(0, LARGEST[dtype])
    element = st.builds(lambda value, negative: value | sign * negative, magnitude, st.booleans())
    row = st.lists(element, min_size=columns, max_size=columns) | st.just([0] * columns)
    bits = draw(st.lists(row, min_size=rows, max_size=rows))
    return Raw(dtype, np.array(bits, dtype=f"<u{WIDTHS[dtype]}"))


@st.composite
def artifacts(draw: st.DrawFn) -> Artifact:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    return Artifact({name: draw(matrices()) for name in names}, draw(st.integers(0, 3)))


def put(raw: Raw, row: int, column: int, bits: int) -> Raw:
    changed: NDArray[np.unsignedinteger] = raw.bits.copy()
    changed[row, column] = bits
    return Raw(raw.dtype, changed)


@examples(15)
@given(artifacts(), st.data())
def test_no_alarm_where_no_mask_moved(artifact, data):
    """As it was made, and with every value replaced by another that is zero or not as it was."""
    others = {
        name: Raw(
            raw.dtype, raw.bits ^ np.where(raw.mask, 0, raw.bits.dtype.type(1 << (8 * raw.bits.itemsize - 1)))
        )
        for name, raw in artifact.tensors.items()
    }  # the signs of all zeros
    for name, raw in others.items():
        if raw.mask.any():
            row, column = data.draw(st.sampled_from(np.argwhere(raw.mask).tolist()))
            value = data.draw(st.integers(1, LARGEST[raw.dtype]))
            others[name] = put(raw, row, column, value)
    for changed in ({}, others):
        with artifact.on_disk(changed) as path:
            verdict = verify(path)
        assert verdict.ok, [site.reason for site in verdict.failed]
        assert [site.name for site in verdict.sites] == sorted(artifact.tensors)
        assert all(site.mask_equal and site.lost_zeros == site.new_zeros == 0 for site in verdict.sites)


@examples(15)
@given(artifacts(), st.data())
def test_one_weight_that_moved_is_named(artifact, data):
    name = data.draw(st.sampled_from(sorted(artifact.tensors)))
    raw = artifact.tensors[name]
    row = data.draw(st.integers(0, raw.bits.shape[0] - 1))
    column = data.draw(st.integers(0, raw.bits.shape[1] - 1))
    sign = 1 << (8 * raw.bits.itemsize - 1)
    was_zero = not raw.mask[row, column]
    now = data.draw(st.integers(1, LARGEST[raw.dtype]) | st.just(1)) if was_zero else 0
    now |= sign * data.draw(st.booleans())
    with artifact.on_disk({name: put(raw, row, column, now)}) as path:
        verdict = verify(path)
    (site,) = verdict.failed
    assert site.name == name
    assert (site.lost_zeros, site.new_zeros) == ((1, 0) if was_zero else (0, 1))
    assert site.reason is not None
    assert f"row {row}, column {column}: {'zero' if was_zero else 'non-zero'} in the lock" in site.reason
    assert site.reason.startswith(site.file + ": ")
    assert site.file.endswith(".safetensors")


@examples(10)
@given(artifacts(), st.data())
def test_one_number_that_is_not_finite_is_named(artifact, data):
    """Where a value was, so that the mask is as before."""
    places = [
        (name, row, column)
        for name, raw in artifact.tensors.items()
        for row, column in np.argwhere(raw.mask).tolist()
    ]
    if not places:
        return
    name, row, column = data.draw(st.sampled_from(places))
    raw = artifact.tensors[name]
    # The largest finite number and one more: infinity; NaN in F8_E4M3, which has no infinity.
    with artifact.on_disk({name: put(raw, row, column, LARGEST[raw.dtype] + 1)}) as path:
        verdict = verify(path)
    (site,) = verdict.failed
    assert site.name == name
    assert site.mask_equal
    assert f"first at row {row}, column {column}" in (site.reason or "")
