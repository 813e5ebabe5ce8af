"""merge: fold an adapter into its base, tensor by tensor from disk to disk, and prove the masks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spp_fx.adapters.fold import FoldCounts, Vanish, fold_matrix
from spp_fx.checkpoint import OWN_FILES, ModelFolder, Shard, TensorInfo, atomic_folder, rewrite_model
from spp_fx.errors import FormatError, MaskError, UsageError
from spp_fx.ir.binding import Piece
from spp_fx.sparsity import (
    LOCK_NAME,
    Lock,
    LockEntry,
    PackedMask,
    compare,
    compare_masks,
    load_lock,
    make_entry,
    pack_mask,
    scan_bits,
)
from spp_fx.workflows.adapter_folder import AdapterFolder
from spp_fx.workflows.survey import Tick, no_tick, open_model, scan_tensor


@dataclass(frozen=True)
class Merged:
    """What merge wrote, and what was proven of it.

    Attributes:
        out: the merged model folder.
        base: the base model folder.
        counts: by stored tensor, what folding met.
        mask_equal: by stored tensor, whether its mask read back from disk is the lock's; None if not read.
        untouched: stored tensors that were copied.
        nbytes: size of the weights written.
    """

    out: Path
    base: Path
    counts: dict[str, FoldCounts]
    mask_equal: dict[str, bool | None]
    untouched: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        files = sorted(p for p in self.out.rglob("*") if p.is_file())
        return {
            "ok": True,
            "out": str(self.out),
            "base": str(self.base),
            "sites": [
                {
                    "name": name,
                    "changed": counts.changed,
                    "vanished": counts.vanished,
                    "mask_equal": self.mask_equal[name],
                }
                for name, counts in self.counts.items()
            ],
            "files": [{"name": p.relative_to(self.out).as_posix(), "bytes": p.stat().st_size} for p in files],
            "summary": {
                "sites": len(self.counts),
                "masks_equal": sum(equal is True for equal in self.mask_equal.values()),
                "vanished": sum(counts.vanished for counts in self.counts.values()),
                "untouched": self.untouched,
                "bytes": self.nbytes,
            },
        }


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    vanish: Vanish = "keep",
    verify_sparsity: bool = True,
    force: bool = False,
    tick: Tick = no_tick,
) -> Merged:
    """Write base + adapter as a model folder with the base's names, shards, dtypes and metadata.

    With `verify_sparsity` the base's masks are held to the lock before anything is folded, and what was
    written is read back from disk by another reader: every folded tensor's mask must be the lock's,
    every other tensor must have the base's bytes.

    Raises:
        UsageError: no adapter folder, no base, or an output that exists.
        FormatError: a file is damaged, or the base is not the one the adapter was made for.
        MaskError: a mask is not the lock's, or a value folds to NaN or infinity. Nothing is written.
    """
    adapter, out = Path(adapter), Path(out)
    source = AdapterFolder.open(adapter)
    base = source.find_base(Path(base) if base else None)
    with atomic_folder(out, force, sources=[base, adapter]) as temporary:
        folder = open_model(base)
        source.check_base(folder)
        # What the base's own lock holds beyond the adapter's sites stays locked: it is copied, and proven.
        held = Lock.of((base_lock(base) | source.lock.by_name()).values())
        locked = held.by_name()
        if verify_sparsity:
            _check_base(folder, locked)
        fold = _Fold(source, vanish, tick)
        rewritten = rewrite_model(folder, temporary, fold.replace, skip=OWN_FILES)
        lock = held
        mask_equal: dict[str, bool | None] = dict.fromkeys(fold.counts)
        if verify_sparsity:
            entries, equal = _read_back(folder, temporary, locked, fold.counts, vanish, tick)
            mask_equal = {name: equal[name] for name in fold.counts}
            lock = Lock.of(entries)
        (temporary / LOCK_NAME).write_text(lock.dumps())
    untouched = len(folder.names) - len(fold.counts)
    nbytes = sum(file.replaced_bytes + file.copied_bytes for file in rewritten)
    return Merged(out, base, fold.counts, mask_equal, untouched, nbytes)


class _Fold:
    """Replacement of stored tensors by their folded values, and the count of what that met."""

    def __init__(self, source: AdapterFolder, vanish: Vanish, tick: Tick) -> None:
        self.source = source
        self.vanish: Vanish = vanish
        self.tick = tick
        self.by_tensor: dict[str, list[tuple[str, Piece]]] = {}
        for site, pieces in source.pieces.items():
            for piece in pieces:
                self.by_tensor.setdefault(piece.tensor, []).append((site, piece))
        self.counts: dict[str, FoldCounts] = {}

    def replace(self, shard: Shard, info: TensorInfo) -> Iterator[Tensor] | Tensor | None:
        if info.name not in self.by_tensor:
            return None
        self.counts[info.name] = FoldCounts()
        (site, piece), *others = self.by_tensor[info.name]
        self.tick(info.name, info.nbytes)
        if piece.whole:
            return self._stack(shard, info, [(site, piece), *others])
        if piece.transposed:
            stored = shard.read(info.name)
            return torch.cat(list(self._matrix(site, piece, iter([stored.t()]), shard))).t().contiguous()
        return self._matrix(site, piece, shard.row_blocks(info.name), shard)

    def _matrix(self, site: str, piece: Piece, blocks: Iterator[Tensor], shard: Shard) -> Iterator[Tensor]:
        """Folded row blocks of a matrix that is given in row blocks."""
        factors = self.source.factors(site)
        if piece.expert is not None:
            factors = {key: value[piece.expert] for key, value in factors.items()}
        start = piece.start
        for block in blocks:
            yield from fold_matrix(
                self.source.method,
                block,
                factors,
                self.vanish,
                self.counts[piece.tensor],
                f"{piece.tensor} ({shard.name})",
                first_row=start,
                row_offset=-piece.start,
            )
            start += block.shape[0]

    def _stack(self, shard: Shard, info: TensorInfo, pieces: list[tuple[str, Piece]]) -> Iterator[Tensor]:
        """A stack that is stored whole, expert by expert."""
        for site, piece in sorted(pieces, key=lambda item: item[1].expert or 0):
            expert = piece.expert or 0
            stored = shard.read_rows(info.name, expert, expert + 1)[0]
            canonical = stored.t() if piece.transposed else stored
            folded = torch.cat(list(self._matrix(site, piece, iter([canonical]), shard)))
            yield (folded.t() if piece.transposed else folded).contiguous().unsqueeze(0)


def base_lock(base: Path) -> dict[str, LockEntry]:
    """The entries of the lock beside a model's weights, by tensor; none if it has no lock."""
    path = base / LOCK_NAME
    return load_lock(path).by_name() if path.is_file() else {}


def _check_base(folder: ModelFolder, locked: dict[str, LockEntry]) -> None:
    for name, entry in locked.items():
        if name not in folder:
            raise UsageError(
                f"{folder.path} has no tensor {name}, which is locked: it is not the base of this adapter, "
                f"or its {LOCK_NAME} is that of another model"
            )
        difference = compare(entry, scan_tensor(folder, name, transposed=entry.transposed).mask)
        if not difference.equal:
            raise MaskError(
                f"{folder.path}: {name}: the base no longer has its locked mask {difference.reason}"
            )


def _read_back(
    base: ModelFolder,
    written: Path,
    locked: dict[str, LockEntry],
    counts: dict[str, FoldCounts],
    vanish: Vanish,
    tick: Tick,
) -> tuple[list[LockEntry], dict[str, bool | None]]:
    """Hold every tensor on disk to the lock or to the base; the lock of what was written."""
    entries: list[LockEntry] = []
    equal: dict[str, bool | None] = {}
    for shard in base.shards:
        try:
            with safe_open(str(written / shard.name), framework="pt") as file:
                if set(file.keys()) != set(shard.header.tensors):
                    raise FormatError(f"{shard.name}: read back, its tensors are not those of the base")
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    value = file.get_tensor(name)
                    if name not in counts:
                        if not _same_bytes(value, shard.read(name)):
                            raise FormatError(f"{shard.name}: read back, {name} differs from the base")
                        if name not in locked:
                            continue
                    entry = locked[name]
                    mask = pack_mask(value, transposed=entry.transposed)
                    pattern = entry.parsed_pattern()
                    equal[name] = mask.digest == entry.mask
                    if not equal[name] and not (
                        vanish == "allow" and _only_vanished(shard, entry, mask, counts[name])
                    ):
                        raise MaskError(f"{name}: read back from disk, its mask is not the lock's")
                    if pattern is not None and scan_bits(mask, pattern).count:
                        raise MaskError(f"{name}: read back from disk, it does not hold {pattern}")
                    entries.append(make_entry(name, entry.kind, mask, pattern, entry.transposed))
                    tick(name, value.nbytes)
        except SafetensorError as error:
            raise FormatError(f"{shard.name}: cannot be read back: {error}") from error
    return entries, equal


def _only_vanished(shard: Shard, entry: LockEntry, mask: PackedMask, counts: FoldCounts) -> bool:
    """Whether a mask is the base's less the values that folded to zero: no position gained, so many lost."""
    before = pack_mask(shard.read(entry.name), transposed=entry.transposed)
    found = compare_masks(before, mask, limit=1)
    return found.lost_zeros == 0 and found.new_zeros == counts.vanished


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (a.contiguous().view(-1), b.contiguous().view(-1))
    return torch.equal(*(t.view(torch.uint8) for t in flat)) if a.numel() else True
