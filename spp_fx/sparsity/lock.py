"""`sparsity.lock.json`: the mask of every site, which each later step is checked against; the comparison of masks.

One object a site: name, kind, canonical shape, pattern, non-zero count, mask digest and locator. The
file is sorted and holds one site a line, so that a change of one mask is a change of one line.
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.sparsity.kernels import popcount
from spp_fx.sparsity.mask import LOCATOR_DIGITS, PackedMask, flip, locator, propose_flips
from spp_fx.sparsity.pattern import Pattern, parse_pattern

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


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class LockEntry(_Strict):
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
        """The pattern as an object."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    def line(self) -> str:
        """The entry as one line of JSON; `transposed` only where it is true."""
        fields = self.model_dump(mode="json")
        if not self.transposed:
            del fields["transposed"]
        return json.dumps(fields)


class Lock(_Strict):
    """A whole lock file. `pattern` is that of every site, or None where they differ or there are none."""

    format_version: int
    pattern: str | None
    sites: tuple[LockEntry, ...]

    @field_validator("format_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version == 1:
            raise ValueError("version 1 is no longer read; make a new lock with 'spp-fx lock MODEL --force'")
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
        """A lock of these entries, sorted by name.

        Raises:
            FormatError: a name appears twice.
        """
        sites = tuple(sorted(entries, key=lambda entry: entry.name))
        try:
            return cls(format_version=FORMAT_VERSION, pattern=_common_pattern(sites), sites=sites)
        except ValidationError as error:
            raise FormatError(f"{LOCK_NAME}: {_first_fault(error)}") from error

    def entry(self, name: str) -> LockEntry | None:
        """The entry of a site, or None."""
        return self.by_name().get(name)

    def by_name(self) -> dict[str, LockEntry]:
        """Every entry under its name."""
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
            FormatError: not JSON, a key given twice, another version, or a field that cannot be.
        """
        if len(text) > _MAX_BYTES:
            raise FormatError(f"{source}: {len(text)} bytes is too large for a lock file")
        try:
            content = json.loads(text, object_pairs_hook=_no_duplicates)
            if not isinstance(content, dict) or not {"format_version", "sites"} <= content.keys():
                raise FormatError(
                    f"{source}: is JSON, but no sparsity lock: it has no format_version and sites. Give a "
                    f"{LOCK_NAME} as spp-fx writes it, or make one with 'spp-fx lock MODEL'"
                )
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise FormatError(f"{source}: {_first_fault(error)}") from error
        except RecursionError:
            raise FormatError(f"{source}: nested too deep to be a lock; get the file again") from None
        except ValueError as error:
            raise FormatError(
                f"{source}: is no sparsity lock, for it is not JSON ({error}). Give a {LOCK_NAME} as spp-fx "
                "writes it, or make one with 'spp-fx lock MODEL'"
            ) from error


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
        raise FormatError(f"{name}: {_first_fault(error)}") from error


def load_lock(path: str | os.PathLike[str]) -> Lock:
    """Read a lock file.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        FormatError: the file is not a lock; names the file and the fault.
    """
    file = Path(path)
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{file}: the lock is a folder, pipe or device; give a {LOCK_NAME}")
        if status.st_size > _MAX_BYTES:
            raise FormatError(f"{file}: {status.st_size} bytes is too large for a lock file")
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{file}: the lock cannot be read: {error.strerror}") from error
    return Lock.loads(data, str(file))


def lock_beside(folder: Path) -> Lock | None:
    """The lock in a folder, or None; one that cannot be read is an error.

    Raises:
        what `load_lock` raises.
    """
    path = folder / LOCK_NAME
    return load_lock(path) if os.path.lexists(path) else None


def _common_pattern(sites: tuple[LockEntry, ...]) -> str | None:
    patterns = {site.pattern for site in sites}
    return patterns.pop() if len(patterns) == 1 else None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"the keys {[key for key, _ in pairs]} hold one twice")
    return result


def _first_fault(error: ValidationError) -> str:
    """Where and what, in one line, with hostile values cut short."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    text = fault["msg"].removeprefix("Value error, ")
    return f"{where.lstrip('.')}: {text}"[:400] if where else text[:400]


@dataclass(frozen=True)
class Comparison:
    """A mask compared with its lock entry.

    Attributes:
        equal: the digests are equal.
        lost_zeros: (row, column) that were zero when the lock was made and are not now; row is
            expert * out + row for a stack. Complete where `located`, empty where not.
        new_zeros: the reverse.
        located: the two lists are proven: with exactly these flips undone the digest is the lock's.
            True, with empty lists, for equal masks.
        reason: why the positions could not be named; empty where they are.
    """

    equal: bool
    lost_zeros: list[Position] = field(default_factory=list[Position])
    new_zeros: list[Position] = field(default_factory=list[Position])
    located: bool = True
    reason: str = ""


def compare(entry: LockEntry, mask: PackedMask) -> Comparison:
    """Compare a mask with its lock entry; on a mismatch, name the flipped positions if that can be proven."""
    if entry.shape != mask.shape:
        return Comparison(
            False, located=False, reason=f"shape {mask.shape}, the lock has shape {entry.shape}"
        )
    if entry.mask == mask.digest:
        return Comparison(True)
    flips = propose_flips(entry.locator, locator(mask), mask)
    if flips is None or flip(mask, flips).digest != entry.mask:
        change = mask.nnz - entry.nnz
        return Comparison(
            False,
            located=False,
            reason=f"too many positions changed to name them from the lock ({change:+d} non-zeros)",
        )
    indices = np.asarray(flips)
    is_one = mask.bits[indices // 8] >> (indices % 8).astype(np.uint8) & 1
    lost_zeros, new_zeros = (
        [divmod(index, mask.columns) for index in indices[is_one == bit].tolist()] for bit in (1, 0)
    )
    return Comparison(False, lost_zeros, new_zeros)


@dataclass(frozen=True)
class MaskDifference:
    """The exact difference of two masks.

    Attributes:
        lost_zeros: how many positions are zero in the first and non-zero in the second.
        new_zeros: how many the other way round.
        first_lost: the first of them as (row, column), in row-major order, at most `limit`.
        first_new: likewise.
    """

    lost_zeros: int
    new_zeros: int
    first_lost: list[Position]
    first_new: list[Position]

    @property
    def equal(self) -> bool:
        return self.lost_zeros == 0 and self.new_zeros == 0


def compare_masks(then: PackedMask, now: PackedMask, limit: int = 10) -> MaskDifference:
    """Count every difference of two masks and name the first `limit` of each direction.

    Raises:
        MaskError: the shapes differ.
    """
    if then.shape != now.shape:
        raise MaskError(f"masks of shapes {then.shape} and {now.shape} cannot be compared")
    lost, new = 0, 0
    first_lost: list[int] = []
    first_new: list[int] = []
    for start in range(0, then.bits.size, _BLOCK):
        before, after = then.bits[start : start + _BLOCK], now.bits[start : start + _BLOCK]
        changed = before ^ after
        if changed.any():
            lost += _note(changed & after, 8 * start, first_lost, limit)
            new += _note(changed & before, 8 * start, first_new, limit)
    return MaskDifference(
        lost, new, [divmod(i, then.columns) for i in first_lost], [divmod(i, then.columns) for i in first_new]
    )


def _note(ones: NDArray[np.uint8], base: int, found: list[int], limit: int) -> int:
    """Count the ones and append their linear indices to `found` until it holds `limit`."""
    room = limit - len(found)
    if room > 0:
        for index in np.flatnonzero(ones)[:room].tolist():  # every such byte holds at least one
            byte = int(ones[index])
            found.extend(base + 8 * index + bit for bit in range(8) if byte >> bit & 1)
        del found[limit:]
    return popcount(ones)
