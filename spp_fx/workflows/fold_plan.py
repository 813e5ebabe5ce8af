"""Which bytes of a model an adapter changes: the stored matrices of its sites, cut into spans that fold alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from spp_fx.adapters.fold_counts import FoldCounts, Vanish
from spp_fx.adapters.fold_stored import FLOATING, StoredFold
from spp_fx.checkpoint import ModelFolder, Shard, TensorInfo
from spp_fx.checkpoint.rewrite import SPAN, Bytes, Change
from spp_fx.errors import FormatError
from spp_fx.ir.piece import Piece
from spp_fx.workflows.adapter_folder import CONFIG, AdapterFolder


@dataclass(frozen=True)
class Folded:
    """A span that was folded: its tensor, how many bytes of it, and what that met."""

    tensor: str
    nbytes: int
    counts: FoldCounts


@dataclass(frozen=True)
class FoldPlan:
    """The sites' matrices by stored tensor.

    Attributes:
        adapter: the adapter folder.
        pieces: by tensor: site and piece of each of its matrices, in stored order.
        vanish: what to do with non-zeros that would become zero.
    """

    adapter: AdapterFolder
    pieces: Mapping[str, tuple[tuple[str, Piece], ...]]
    vanish: Vanish

    @classmethod
    def make(cls, adapter: AdapterFolder, base: ModelFolder, vanish: Vanish) -> "FoldPlan":
        """Hold the adapter's pieces to the base's tensors.

        Raises:
            UsageError: the base has no such tensor.
            FormatError: a piece that cannot be: another shape or type, rows or experts that are missing or twice.
        """
        pieces: dict[str, list[tuple[str, Piece]]] = {}
        for site, own in adapter.pieces.items():
            for piece in own:
                pieces.setdefault(piece.tensor, []).append((site, piece))
        plan = {
            name: tuple(sorted(owners, key=lambda owner: owner[1].expert or 0))
            for name, owners in pieces.items()
        }
        for name, owners in plan.items():
            fault = _fault(base.info(name)[1], owners, adapter.shape(owners[0][0]))
            if fault:
                raise FormatError(f"{adapter.path / CONFIG}: sites.{owners[0][0]}: {name}: {fault}")
        return cls(adapter, plan, vanish)

    def changes(self, shard: Shard) -> Iterator[Change[Folded]]:
        """Every span of a shard that folding changes, in the order of their places."""
        for info in shard.header.tensors.values():
            owners = self.pieces.get(info.name, ())
            size = info.nbytes // max(1, len(owners))
            for index, (site, piece) in enumerate(owners):
                yield from self._matrix(shard, info, site, piece, info.start + index * size)

    def _matrix(
        self, shard: Shard, info: TensorInfo, site: str, piece: Piece, offset: int
    ) -> Iterator[Change[Folded]]:
        rows, columns = info.shape[-2:]
        row_bytes = columns * FLOATING[info.dtype].itemsize
        fold = StoredFold(
            self.adapter.method,
            self.adapter.factors(site, piece.expert),
            info.dtype,
            self.vanish,
            f"{info.name} ({shard.name})",
            piece.start,
        )
        step = max(1, SPAN // max(1, row_bytes))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            make = partial(_fold, fold, info, columns, piece.transposed, start)
            yield Change(offset + start * row_bytes, offset + stop * row_bytes, make)


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
    return Folded(info.name, before.size, counts)


def _fault(info: TensorInfo, owners: tuple[tuple[str, Piece], ...], shape: tuple[int, ...]) -> str | None:
    """Why a stored tensor cannot be what an adapter says it is; `shape` is the first site's."""
    site, piece = owners[0]
    if info.dtype not in FLOATING:
        return f"is stored as {info.dtype}; folded are {', '.join(FLOATING)}"
    if len(info.shape) != (3 if piece.whole else 2):
        return f"has shape {list(info.shape)} in the base, which is no {'stack' if piece.whole else 'matrix'}"
    rows, columns = reversed(info.shape[-2:]) if piece.transposed else info.shape[-2:]
    if piece.whole:
        experts = [each.expert for _, each in owners]
        if experts != list(range(info.shape[0])) or any(other != site for other, _ in owners):
            return f"has {info.shape[0]} experts in the base, which are not the adapter's"
    elif len(owners) > 1:
        return f"is part of {owners[0][0]} and of {owners[1][0]}"
    for _, each in owners:
        if not 0 <= each.start <= each.stop <= shape[-2] or each.stop - each.start != rows:
            return f"has {rows} rows in the base, the adapter takes it for {each.start} to {each.stop}"
        if each.transposed != piece.transposed or each.whole != piece.whole:
            return "is stored in one way for one expert and in another for the next"
        if each.expert is not None and not (len(shape) == 3 and 0 <= each.expert < shape[0]):
            return f"is expert {each.expert} of a site of shape {list(shape)}"
    if columns != shape[-1]:
        return f"has {columns} inputs in the base, {shape[-1]} in the adapter's lock"
    return None
