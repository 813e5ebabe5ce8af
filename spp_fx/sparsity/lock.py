"""`sparsity.lock.json`: the mask of every site, against which each later step is checked; comparison of masks.

Each site has a name, kind, canonical shape, pattern, non-zero count, mask digest and locator. The file is sorted
and holds one site a line, so that a changed mask is one changed line.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.sparsity.kernels import popcount
from spp_fx.sparsity.mask import LOCATOR_DIGITS, PackedMask, flip, locator, propose_flips
from spp_fx.sparsity.pattern import Pattern, parse_pattern
from spp_fx.storage.strict_json import StrictModel, first_fault, parse_model, read_bytes

LOCK_NAME = "sparsity.lock.json"
FORMAT_VERSION = 2  # 1 had another digest

Position = tuple[int, int]

_MAX_BYTES = 64 << 20
_MAX_NUMEL = 1 << 60
_BLOCK = 1 << 20

_Name = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Kind = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Locator = Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{LOCATOR_DIGITS}}}$")]
_Dimension = Annotated[int, Field(ge=0, le=_MAX_NUMEL)]


class LockEntry(StrictModel):
    """The mask of one site.

    Attributes:
        name: the checkpoint's name of the weight.
        kind: what the site is: linear, conv1d, matmul, experts, ...
        shape: (out, in) or (experts, out, in), whatever the storage order.
        pattern: the pattern the site must hold; None for a dense site.
        nnz: non-zero elements.
        mask: `PackedMask.digest`.
        locator: `mask.locator` of the mask.
        transposed: the tensor is stored (in, out).
    """

    name: _Name
    kind: _Kind
    shape: Annotated[tuple[_Dimension, ...], Field(min_length=2, max_length=3)]
    pattern: str | None
    nnz: Annotated[int, Field(ge=0)]
    mask: _Digest
    locator: _Locator
    transposed: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "LockEntry":
        try:
            canonical = str(self.parsed_pattern()) if self.pattern is not None else None
        except UsageError as error:
            raise ValueError(str(error)) from error
        if canonical != self.pattern:
            raise ValueError(f"pattern {self.pattern!r} is written {canonical!r}")
        numel = math.prod(self.shape)
        if numel > _MAX_NUMEL:
            raise ValueError(f"shape {self.shape} has more than 2**60 elements")
        if self.nnz > numel:
            raise ValueError(f"{self.nnz} non-zeros in a weight of {numel} elements")
        return self

    def parsed_pattern(self) -> Pattern | None:
        return None if self.pattern is None else parse_pattern(self.pattern)

    def line(self) -> str:
        """The entry as one line of JSON."""
        fields = self.model_dump(mode="json")
        if not self.transposed:
            del fields["transposed"]
        return json.dumps(fields)


class Lock(StrictModel):
    """A lock file. `pattern` is that of every site; None where they differ or there are none."""

    format_version: int
    pattern: str | None
    sites: tuple[LockEntry, ...]

    @field_validator("format_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version == 1:
            raise ValueError("version 1 is no longer read")
        if version != FORMAT_VERSION:
            raise ValueError(f"version {version} is unknown, this release reads {FORMAT_VERSION}")
        return version

    @model_validator(mode="after")
    def _consistent(self) -> "Lock":
        seen: set[str] = set()
        for site in self.sites:
            if site.name in seen:
                raise ValueError(f"site {site.name!r} appears twice")
            seen.add(site.name)
        if self.pattern != _common_pattern(self.sites):
            raise ValueError(f"pattern is {self.pattern!r}, its sites say {_common_pattern(self.sites)!r}")
        return self

    @classmethod
    def of(cls, entries: Iterable[LockEntry]) -> "Lock":
        """A lock of these entries, sorted by name; FormatError if a name appears twice."""
        sites = tuple(sorted(entries, key=lambda entry: entry.name))
        try:
            return cls(format_version=FORMAT_VERSION, pattern=_common_pattern(sites), sites=sites)
        except ValidationError as error:
            raise FormatError(f"{LOCK_NAME}: {first_fault(error)}") from error

    def by_name(self) -> dict[str, LockEntry]:
        return {site.name: site for site in self.sites}

    def dumps(self) -> str:
        """The file's text: ASCII JSON, sorted by name, one site a line, the same bytes for the same masks."""
        lines = [f"    {site.line()}" for site in sorted(self.sites, key=lambda site: site.name)]
        sites = "[\n" + ",\n".join(lines) + "\n  ]" if lines else "[]"
        pattern = json.dumps(self.pattern)
        return f'{{\n  "format_version": {FORMAT_VERSION},\n  "pattern": {pattern},\n  "sites": {sites}\n}}\n'

    @classmethod
    def loads(cls, text: str | bytes, source: str = LOCK_NAME) -> "Lock":
        """Read a lock's text; `source` names it in errors.

        Raises:
            FormatError: not JSON, a key given twice, another version, or a field that is wrong.
        """
        data = text.encode() if isinstance(text, str) else text
        try:
            return parse_model(cls, data, f"{source}: not a valid lock")
        except FormatError as error:
            raise FormatError(f"{error}; make one with 'spp-fx lock MODEL --force'") from error


def make_entry(
    name: str, kind: str, mask: PackedMask, pattern: Pattern | None, transposed: bool = False
) -> LockEntry:
    """The lock entry of a mask; does not check that the mask holds the pattern.

    Raises:
        FormatError: a name or kind that a lock cannot hold.
    """
    try:
        return LockEntry(
            name=name,
            kind=kind,
            shape=mask.shape,
            pattern=None if pattern is None else str(pattern),
            nnz=mask.nnz,
            mask=mask.digest,
            locator=locator(mask),
            transposed=transposed,
        )
    except ValidationError as error:
        raise FormatError(f"{name}: {first_fault(error)}") from error


def load_lock(path: str | os.PathLike[str]) -> Lock:
    """Read a lock file.

    Raises:
        UsageError: there is no such file, or it is not a regular file.
        FormatError: it is not a lock; names the file and the fault.
    """
    return Lock.loads(read_bytes(Path(path), _MAX_BYTES), str(path))


def lock_beside(folder: Path) -> Lock | None:
    """The lock in a folder, or None; raises as `load_lock` for one that cannot be read."""
    path = folder / LOCK_NAME
    return load_lock(path) if os.path.lexists(path) else None


def _common_pattern(sites: tuple[LockEntry, ...]) -> str | None:
    patterns = {site.pattern for site in sites}
    return patterns.pop() if len(patterns) == 1 else None


@dataclass(frozen=True)
class MaskDifference:
    """How a mask differs from what it was: another mask, or the one that a lock entry describes.

    Attributes:
        lost_zeros: positions that were zero and are not now; None where the lock cannot locate them.
        new_zeros: the reverse.
        first_lost: the first of them as (row, column), in row-major order; row is expert * out + row for a stack.
        first_new: likewise.
        reason: why the positions are not known; empty where they are.
    """

    lost_zeros: int | None = 0
    new_zeros: int | None = 0
    first_lost: list[Position] = field(default_factory=list[Position])
    first_new: list[Position] = field(default_factory=list[Position])
    reason: str = ""

    @property
    def equal(self) -> bool:
        return self.lost_zeros == 0 and self.new_zeros == 0


def compare(entry: LockEntry, mask: PackedMask) -> MaskDifference:
    """Compare a mask with its lock entry.

    Flipped positions are named where that can be proven: with exactly these flips undone the digest is the lock's.
    """
    if entry.shape != mask.shape:
        return MaskDifference(None, None, reason=f"shape {mask.shape}, the lock has shape {entry.shape}")
    if entry.mask == mask.digest:
        return MaskDifference()
    flips = propose_flips(entry.locator, locator(mask), mask)
    if flips is None or (then := flip(mask, flips)).digest != entry.mask:
        change = mask.nnz - entry.nnz
        reason = f"too many positions changed to name them from the lock ({change:+d} non-zeros)"
        return MaskDifference(None, None, reason=reason)
    return compare_masks(then, mask)


def compare_masks(then: PackedMask, now: PackedMask, limit: int = 10) -> MaskDifference:
    """Count every difference of two masks and name the first `limit` of each direction.

    Raises:
        MaskError: the shapes differ.
    """
    if then.shape != now.shape:
        raise MaskError(f"masks of shapes {then.shape} and {now.shape} cannot be compared")
    lost, new = 0, 0
    first_lost: list[Position] = []
    first_new: list[Position] = []
    for start in range(0, then.bits.size, _BLOCK):
        before, after = then.bits[start : start + _BLOCK], now.bits[start : start + _BLOCK]
        changed = before ^ after
        if changed.any():
            for ones, found in ((changed & after, first_lost), (changed & before, first_new)):
                first = _first_ones(ones, limit - len(found))
                found += [divmod(8 * start + index, then.columns) for index in first]
            lost += popcount(changed & after)
            new += popcount(changed & before)
    return MaskDifference(lost, new, first_lost, first_new)


def _first_ones(bits: NDArray[np.uint8], count: int) -> list[int]:
    """Indices of the first `count` set bits."""
    nonzero = np.flatnonzero(bits)[:count]  # every such byte holds at least one
    spread = np.unpackbits(bits[nonzero], bitorder="little").reshape(-1, 8)
    return [8 * int(nonzero[byte]) + int(bit) for byte, bit in np.argwhere(spread)[:count].tolist()]
