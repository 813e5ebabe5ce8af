"""merge: fold an adapter into its base span by span, then prove every mask from disk.

The proof shares nothing with the writer: it opens the files anew, has the safetensors library read their headers too,
and scans the masks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_fx.adapters.adapter_folder import CONFIG, FACTORS, AdapterFolder, StoredMatrix
from spp_fx.adapters.fold import FLOATING, FoldCounts, StoredFold, Vanish, round_stored
from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.exporters.manifest import open_model, sha256
from spp_fx.parallel import Tick, in_order, no_tick, thread_count
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry, compare, compare_masks, lock_beside, make_entry
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import scan_bits
from spp_fx.sparsity.scan import scan_stored
from spp_fx.storage.folder import OWN_FILES, ModelFolder, within
from spp_fx.storage.links import links_option
from spp_fx.storage.safetensors import Shard, TensorInfo, as_float64
from spp_fx.storage.workspace import Say, Workspace, workspace
from spp_fx.storage.writer import SPAN, Bytes, Change, copy_others, rewrite
from spp_fx.verification import provenance

_BLOCK = 4 << 20  # bytes compared at a time
_RUN = 64 << 20  # bytes compared by one task


@dataclass(frozen=True)
class Merged:
    """The result of merge.

    Attributes:
        out, base: the merged model folder and that of the base model.
        counts: of each folded tensor.
        trained: of each tensor of norms and biases that were trained themselves, how many numbers changed.
        mask_equal: whether the mask of a folded tensor, read back from disk, is the lock's; None if not read.
        vanish: what was done with values that folded to zero.
        untouched: how many tensors were copied.
        nbytes: size of the weights written.
    """

    out: Path
    base: Path
    counts: dict[str, FoldCounts]
    trained: dict[str, int]
    mask_equal: dict[str, bool | None]
    vanish: Vanish
    untouched: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        files, total = sorted(p for p in self.out.rglob("*") if p.is_file()), FoldCounts()
        for counts in self.counts.values():
            total.add(counts)
        return {
            "ok": True,
            "out": str(self.out),
            "base": str(self.base),
            "sites": [
                {
                    "name": name,
                    "changed": counts.changed,
                    "vanished": counts.vanished,
                    "removed": counts.removed,
                    "removed_share": counts.removed_share,
                    "mask_equal": self.mask_equal[name],
                }
                for name, counts in self.counts.items()
            ],
            "trained": [{"name": name, "changed": changed} for name, changed in self.trained.items()],
            "files": [{"name": p.relative_to(self.out).as_posix(), "bytes": p.stat().st_size} for p in files],
            "summary": {
                "sites": len(self.counts),
                "trained": len(self.trained),
                "masks_equal": sum(equal is True for equal in self.mask_equal.values()),
                "vanished": total.vanished,
                "removed": total.removed,
                "removed_share": total.removed_share,
                "untouched": self.untouched,
                "bytes": self.nbytes,
            },
        }

    def lines(self) -> Iterator[str]:
        summary = self.to_json()["summary"]
        norms = f", {summary['trained']} norms and biases taken from the adapter" if self.trained else ""
        yield f"{self.out}: {summary['sites']} weights folded{norms}, {summary['untouched']} copied"
        if None in self.mask_equal.values():
            yield "  masks NOT verified"
        else:
            yield f"  {summary['masks_equal']} of {summary['sites']} masks equal to the lock, read back from disk"
        if summary["vanished"]:
            yield f"  {summary['vanished']} values folded to zero (--vanish {self.vanish})"
        if summary["removed"]:
            share = f"{summary['removed_share']:.1%}"
            yield f"  the mask removed {summary['removed']:,} entries of the update, {share} of its squared norm"


@links_option
def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    vanish: Vanish = "keep",
    verify_sparsity: bool = True,
    force: bool = False,
    fresh: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Say = lambda line: None,
) -> Merged:
    """Write base + adapter as a model folder with the base's names, shards, dtypes and metadata.

    With `verify_sparsity` the base's masks are checked against the lock before anything is folded. What was written is
    read back from disk by another reader: every folded tensor must have the lock's mask, every trained norm or bias
    the adapter's value, rounded once, every other tensor the base's bytes. When a run was stopped, the next one
    continues after its finished shards and writes the same bytes.

    Args:
        base: the base model, if it is not where the adapter says.
        vanish: what a non-zero that folds to zero becomes; see `Vanish`.
        force: replace `out` if it exists.
        fresh: start over even if a stopped run has finished some shards.
        allow_links: follow symbolic links that leave a folder; see `links.check_link`.
        tick: progress callback.
        say: called with what is odd about the base's files, and with what a stopped run has finished.

    Raises:
        UsageError: not an adapter folder, no base, an output that exists or that another process writes.
        FormatError: a file is damaged, the adapter's holds NaN or infinity, or the base is not the one that the adapter
            was made for.
        MaskError: a mask is not the lock's, or a value folds to NaN or infinity. Nothing is written.
    """
    adapter, out = Path(adapter), Path(out)
    source = AdapterFolder.open(adapter)
    source.check_finite()
    if line := source.unfinished():
        say(line)
    base = source.find_base(Path(base) if base else None)
    folder = open_model(base)
    source.check_base(folder)
    for note in folder.notes:
        say(note)
    fold = FoldPlan.make(source, folder, vanish)
    locked = _locked(source, folder)
    history = adapter if provenance.load(adapter) else base
    provenance.load(history)  # a damaged history is an error before the work
    adapter_files = [adapter / name for name in (CONFIG, FACTORS, LOCK_NAME)]
    plan: dict[str, Any] = {
        "verb": "merge",
        "base": folder.fingerprint(),
        "adapter": {path.name: provenance.file_blake2b(path) for path in adapter_files},
        "vanish": vanish,
    }
    with workspace(
        out,
        plan,
        force=force,
        fresh=fresh,
        sources=[base, adapter],
        inputs=[*(shard.path for shard in folder.shards), *adapter_files],
        need=folder.stored_bytes,
        say=say,
    ) as work:
        if verify_sparsity:
            for _ in in_order(partial(_check_base, folder), locked.values()):
                pass
        copy_others(folder, work.folder, skip=OWN_FILES)
        counts = fold.write(folder, work, tick)
        proof = Proof(source, fold.trained, locked, counts, vanish, tick if verify_sparsity else no_tick)
        (proof.read_back if verify_sparsity else proof.take_over)(folder, work.folder)
        (work.folder / LOCK_NAME).write_text(Lock.of(proof.entries.values()).dumps())
        provenance.record(
            history,
            work.folder,
            "merge",
            inputs={"model": plan["base"], "adapter": plan["adapter"][FACTORS]},
            settings={"vanish": vanish, "verify_sparsity": verify_sparsity},
            digests=proof.digests,
        )
    untouched = len(folder.names) - len(counts)
    trained = {name: counts.pop(name).changed for name in list(counts) if name in fold.trained}
    mask_equal = {name: proof.mask_equal.get(name) for name in counts}
    return Merged(out, base, counts, trained, mask_equal, vanish, untouched, folder.stored_bytes)


def _locked(adapter: AdapterFolder, base: ModelFolder) -> dict[str, LockEntry]:
    """The entries of the adapter's lock, and those that only the base's own lock has, sorted by name."""
    own = lock_beside(base.path)
    entries = (own.by_name() if own else {}) | adapter.lock.by_name()
    if missing := sorted(name for name in entries if name not in base):
        raise UsageError(
            f"{base.path} has no tensor {missing[0]}, which is locked: it is not the base of this adapter, "
            f"or its {LOCK_NAME} is that of another model"
        )
    return Lock.of(entries.values()).by_name()


def _check_base(folder: ModelFolder, entry: LockEntry) -> None:
    scan = scan_stored(folder.info(entry.name)[0], entry.name, transposed=entry.transposed)
    difference = compare(entry, scan.mask)
    if not difference.equal:
        raise MaskError(
            f"{folder.path}: {entry.name}: the base no longer has its locked mask "
            f"({difference.reason or 'zeros moved'})"
        )


Owners = tuple[tuple[str, StoredMatrix], ...]
"""The matrices that a stored tensor holds, each with its site, in stored order: one, or one per expert or site."""


@dataclass(frozen=True)
class FoldPlan:
    """The stored tensors that folding changes, each with the matrices in it.

    Attributes:
        trained: the tensors of norms and biases that the adapter's own values replace, with the parameter's name.
    """

    adapter: AdapterFolder
    owners: Mapping[str, Owners]
    trained: Mapping[str, str]
    vanish: Vanish

    @classmethod
    def make(cls, adapter: AdapterFolder, base: ModelFolder, vanish: Vanish) -> "FoldPlan":
        """Check the adapter's matrices against the base's tensors.

        Raises:
            UsageError: the base has no such tensor.
            FormatError: a matrix of another shape or type; rows or experts that are missing or doubled.
        """
        by_tensor: dict[str, list[tuple[str, StoredMatrix]]] = {}
        for site, matrices in adapter.matrices.items():
            for matrix in matrices:
                by_tensor.setdefault(matrix.tensor, []).append((site, matrix))
        owners = {
            name: tuple(sorted(group, key=lambda owner: owner[1].expert or owner[1].offset or 0))
            for name, group in by_tensor.items()
        }
        for name, group in owners.items():
            site = group[0][0]
            if fault := _fault(base.info(name)[1], group, [adapter.shape(each) for each, _ in group]):
                raise FormatError(f"{adapter.path / CONFIG}: sites.{site}: {name}: {fault}")
        trained: dict[str, str] = {}
        for parameter, tensors in adapter.trained.items():
            for name in tensors:
                where = f"{adapter.path / CONFIG}: trained_parameters.{parameter}: {name}"
                if name in owners or name in trained or name in adapter.lock.by_name():
                    raise FormatError(f"{where}: is another parameter's, too")
                info, shape = base.info(name)[1], adapter.shard.info(parameter).shape
                if info.dtype not in FLOATING or info.shape != shape:
                    raise FormatError(
                        f"{where}: has shape {list(info.shape)} and type {info.dtype} in the base, {list(shape)} in "
                        "the adapter"
                    )
                trained[name] = parameter
        return cls(adapter, owners, trained, vanish)

    def write(self, folder: ModelFolder, work: Workspace, tick: Tick) -> dict[str, FoldCounts]:
        """Write every shard that is not finished yet; returns the counts by tensor, in the order of the files.

        Shards are written side by side, each by its share of the threads, and fsynced on other threads, so that no
        core waits for the disk.
        """
        with ThreadPoolExecutor(2, thread_name_prefix="fsync") as syncing:

            def write(shard: Shard) -> tuple[dict[str, FoldCounts], Future[None] | None]:
                known = work.finished(shard.name)
                if known is not None:
                    return {name: FoldCounts(*each) for name, each in known["folded"].items()}, None
                target = within(work.folder, shard.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                counts: dict[str, FoldCounts] = {}
                for tensor, nbytes, met in rewrite(shard, target, self.changes(shard)):
                    counts.setdefault(tensor, FoldCounts()).add(met)
                    tick(tensor, nbytes)
                facts = {name: astuple(each) for name, each in counts.items()}
                return counts, syncing.submit(work.finish, shard.name, folded=facts)

            done = list(in_order(write, folder.shards, min(thread_count(), len(folder.shards))))
            for _, synced in done:
                if synced is not None:
                    synced.result()
        return {name: each for counts, _ in done for name, each in counts.items()}

    def changes(self, shard: Shard) -> "Iterator[Change[Folded]]":
        """The spans of a shard that folding changes, by offset."""
        for info in shard.header.tensors.values():
            if (parameter := self.trained.get(info.name)) is not None:
                value = partial(self.adapter.shard.read_float64, parameter)
                yield Change(info.start, info.end, partial(_take, value, info))
            owners = self.owners.get(info.name, ())
            size = info.nbytes // max(1, len(owners))
            for index, (site, matrix) in enumerate(owners):
                at = index * size
                if matrix.offset is not None:
                    at = matrix.offset * (info.nbytes // info.shape[0])
                yield from self._matrix(shard, info, site, matrix, info.start + at)

    def _matrix(
        self, shard: Shard, info: TensorInfo, site: str, matrix: StoredMatrix, offset: int
    ) -> "Iterator[Change[Folded]]":
        rows, columns = info.shape[-2:]
        if matrix.offset is not None:
            rows = matrix.stop - matrix.start
        row_bytes = columns * FLOATING[info.dtype].itemsize
        fold = StoredFold(
            self.adapter.methods[site],
            self.adapter.shape(site)[-2:],
            self.adapter.factors(site, matrix.expert),
            info.dtype,
            self.vanish,
            f"{info.name} ({shard.name})",
            matrix.start,
        )
        step = max(1, SPAN // max(1, row_bytes))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            make = partial(_fold, fold, info, columns, matrix.transposed, start)
            yield Change(offset + start * row_bytes, offset + stop * row_bytes, make)


Folded = tuple[str, int, FoldCounts]
"""A span that was folded: its tensor, its bytes and its counts."""


def _fold(
    fold: StoredFold,
    info: TensorInfo,
    columns: int,
    transposed: bool,
    start: int,
    before: Bytes,
    after: Bytes,
) -> Folded:
    stored, out = (data.view(FLOATING[info.dtype]).reshape(-1, columns) for data in (before, after))
    if transposed:  # stored rows are the site's columns
        counts = fold.columns(start, start + stored.shape[0]).rows(stored.T, out.T, 0)
    else:
        counts = fold.rows(stored, out, start)
    return info.name, before.size, counts


def _take(read: Callable[[], NDArray[np.float64]], info: TensorInfo, before: Bytes, after: Bytes) -> Folded:
    """Replace a stored vector by the adapter's."""
    stored, out = (data.view(FLOATING[info.dtype]) for data in (before, after))
    out[:] = round_stored(read(), info.dtype)
    value = as_float64(out, info.dtype)
    if not np.isfinite(value).all():
        entry = int(np.argmin(np.isfinite(value)))
        raise MaskError(
            f"{info.name}: entry {entry} becomes {value[entry]}; nothing is written. Train with a lower --lr"
        )
    return info.name, before.size, FoldCounts(0, int((stored != out).sum()))


def _fault(info: TensorInfo, owners: Owners, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Why a stored tensor does not fit what the adapter says about it; `shapes` are those of the owners' sites."""
    (site, matrix), shape, end = owners[0], shapes[0], 0
    if info.dtype not in FLOATING:
        return f"is stored as {info.dtype}; merge folds {', '.join(FLOATING)}"
    if len(info.shape) != (3 if matrix.whole else 2):
        what = "a stack of matrices" if matrix.whole else "a matrix"
        return f"has shape {list(info.shape)} in the base, which is not {what}"
    rows, columns = reversed(info.shape[-2:]) if matrix.transposed else info.shape[-2:]
    if matrix.whole:
        experts = [each.expert for _, each in owners]
        if experts != list(range(info.shape[0])) or any(other != site for other, _ in owners):
            return f"has {info.shape[0]} experts in the base, but the adapter has others"
    elif len(owners) > 1 and any(each.offset is None for _, each in owners):
        return f"is part of {owners[0][0]} and of {owners[1][0]}"
    for (_, each), shape in zip(owners, shapes, strict=True):
        if each.offset is not None:
            first, end = end, each.offset + each.stop - each.start
            if each.expert is not None or each.transposed or not first <= each.offset <= end <= rows:
                return f"has {rows} rows in the base, which rows {each.offset} to {end} in the adapter do not fit"
        elif each.stop - each.start != rows:
            return f"has {rows} rows in the base, but rows {each.start} to {each.stop} in the adapter"
        if not 0 <= each.start <= each.stop <= shape[-2]:
            return f"has {rows} rows in the base, but rows {each.start} to {each.stop} in the adapter"
        if each.transposed != matrix.transposed or each.whole != matrix.whole:
            return "is stored differently for two experts in the adapter"
        if each.expert is not None and not (len(shape) == 3 and 0 <= each.expert < shape[0]):
            return f"is expert {each.expert} of a site of shape {list(shape)}"
    if columns != shape[-1]:
        return f"has {columns} input features in the base, but {shape[-1]} in the adapter's lock"
    return None


@dataclass(frozen=True)
class Proof:
    """Compares every byte on disk with the lock or with the base.

    Attributes:
        adapter, trained: the adapter, and the tensors that its own values replaced, see `FoldPlan`.
        locked: the entries that masks are compared with, by tensor.
        counts: of each folded tensor; every other tensor must have the base's bytes.
        vanish: under `allow`, a mask may have lost the values that underflowed to zero, and no other.
        tick: called for each tensor that is proven.
        entries: the lock of what was written, by tensor.
        mask_equal: by tensor, whether its mask is the lock's.
        digests: SHA-256 by weight file.
    """

    adapter: AdapterFolder
    trained: Mapping[str, str]
    locked: Mapping[str, LockEntry]
    counts: Mapping[str, FoldCounts]
    vanish: Vanish
    tick: Tick
    entries: dict[str, LockEntry] = field(default_factory=dict[str, LockEntry])
    mask_equal: dict[str, bool] = field(default_factory=dict[str, bool])
    digests: dict[str, str] = field(default_factory=dict[str, str])

    def read_back(self, base: ModelFolder, written: Path) -> None:
        """Prove a written folder, on all cores.

        Raises:
            FormatError: a file or a tensor that was copied is not the base's.
            MaskError: a mask is not the lock's; names the tensor.
        """

        def tasks() -> Iterator[Callable[[], None]]:
            for shard in base.shards:
                copy = _reopen(shard, written / shard.name)
                yield partial(self._hash, copy)
                for start, stop in self._copied(shard):
                    yield partial(_compare, shard, copy, start, stop)
                for name in shard.header.tensors:
                    if name in self.locked:
                        yield partial(self._prove, shard, copy, self.locked[name])
                    elif name in self.trained:
                        yield partial(self._prove_trained, copy, name)

        # Hashing a file takes as long as scanning many masks, which need not wait for it.
        for _ in in_order(lambda task: task(), tasks(), ahead=1024):
            pass

    def take_over(self, base: ModelFolder, written: Path) -> None:
        """Take the lock's entries without reading back, except where `allow` let values underflow to zero.

        Raises:
            MaskError: a mask lost more than those values, or gained some.
        """
        for shard in base.shards:
            for name in shard.header.tensors.keys() & self.locked.keys():
                met = self.counts.get(name)
                if self.vanish == "allow" and met is not None and met.vanished:
                    self._prove(shard, Shard.open(written / shard.name, shard.name), self.locked[name])
                else:
                    self.entries[name] = self.locked[name]
        self.mask_equal.clear()

    def _hash(self, copy: Shard) -> None:
        self.digests[copy.name] = sha256(copy.path)

    def _copied(self, shard: Shard) -> Iterator[tuple[int, int]]:
        """Ranges of bytes outside of folded tensors."""
        start = shard.header.data_start
        gaps = [(info.start, info.end) for info in shard.header.tensors.values() if info.name in self.counts]
        for stop, after in [*gaps, (shard.header.data_end, 0)]:
            yield from ((at, min(at + _RUN, stop)) for at in range(start, stop, _RUN))
            start = after

    def _prove(self, shard: Shard, copy: Shard, entry: LockEntry) -> None:
        mask = _scanned_mask(copy, entry)
        equal = mask.digest == entry.mask and mask.shape == entry.shape
        if not equal:
            met = self.counts.get(entry.name) if self.vanish == "allow" else None
            if met is None or not _only_underflowed(_scanned_mask(shard, entry), mask, met):
                raise MaskError(f"{entry.name}: read back from disk, its mask is not that of the lock")
        pattern = entry.parsed_pattern()
        if pattern is not None and (broken := scan_bits(mask, pattern)).count:
            raise MaskError(f"{entry.name}: read back from disk: {broken.describe(pattern)}")
        self.mask_equal[entry.name] = equal
        self.entries[entry.name] = (
            entry if equal else make_entry(entry.name, entry.kind, mask, pattern, entry.transposed)
        )
        self.tick(entry.name, copy.info(entry.name).nbytes)

    def _prove_trained(self, copy: Shard, name: str) -> None:
        """A trained vector must hold the stored numbers nearest to the adapter's."""
        expected = self.adapter.shard.read_float64(self.trained[name])
        written, info = copy.read_float64(name), copy.info(name)
        bits = np.frombuffer(copy.read_bytes(name, 0, info.nbytes), f"<u{FLOATING[info.dtype].itemsize}")
        one = np.array(1, bits.dtype)
        nearest = np.isfinite(written)
        with np.errstate(invalid="ignore"):
            for neighbour in (bits + one, bits - one):  # of larger and of smaller magnitude
                nearest &= ~(
                    np.abs(as_float64(neighbour, info.dtype) - expected) < np.abs(written - expected)
                )
        if not nearest.all():
            raise FormatError(f"{copy.name}: read back, {name} is not the adapter's, rounded to {info.dtype}")
        self.tick(name, info.nbytes)


def _reopen(shard: Shard, path: Path) -> Shard:
    """Open a written file; its header must be the base's, for our reader and for the safetensors library."""
    from safetensors import SafetensorError, safe_open

    copy = Shard.open(path, shard.name)
    if copy.header.raw != shard.header.raw:
        raise FormatError(f"{shard.name}: read back, its header is not that of the base")
    try:
        with safe_open(str(path), framework="np") as file:
            if set(file.keys()) != set(shard.header.tensors):
                raise FormatError(f"{shard.name}: read back, its tensors are not those of the base")
    except SafetensorError as error:
        raise FormatError(f"{shard.name}: cannot be read back: {error}") from error
    return copy


def _compare(shard: Shard, copy: Shard, start: int, stop: int) -> None:
    ours, theirs = np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8)
    with open(shard.path, "rb", buffering=0) as base, open(copy.path, "rb", buffering=0) as file:
        base.seek(start)
        file.seek(start)
        while start < stop:
            count = min(_BLOCK, stop - start)
            if base.readinto(theirs[:count].data) != count or file.readinto(ours[:count].data) != count:
                raise FormatError(f"{shard.name}: ended while it was read back")
            different = ours[:count] != theirs[:count]
            if different.any():
                offset = start + int(different.argmax())
                tensors = shard.header.tensors.values()
                tensor = next(info.name for info in tensors if info.start <= offset < info.end)
                raise FormatError(f"{shard.name}: read back, {tensor} differs from the base")
            start += count


def _scanned_mask(shard: Shard, entry: LockEntry) -> PackedMask:
    scan = scan_stored(shard, entry.name, transposed=entry.transposed)
    if scan.first_non_finite is not None:
        raise MaskError(f"{entry.name}: read back from disk, it holds NaN or infinity")
    return scan.mask


def _only_underflowed(before: PackedMask, now: PackedMask, counts: FoldCounts) -> bool:
    """Whether a mask is the base's without exactly as many positions as values underflowed."""
    found = compare_masks(before, now, limit=1)
    return found.lost_zeros == 0 and found.new_zeros == counts.vanished
