"""prune: a dense model folder into a sparse one, tensor by tensor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp_fx.checkpoint import OWN_FILES, ModelFolder, Shard, TensorInfo, atomic_folder, rewrite_model
from spp_fx.errors import MaskError, PatternError, UsageError
from spp_fx.ir.binding import Piece
from spp_fx.passes import Match
from spp_fx.pruning import WEIGHT_CRITERIA
from spp_fx.sparsity import LOCK_NAME, NM, Lock, Pattern, make_entry, parse_pattern, scan_bits
from spp_fx.workflows.survey import Survey, Tick, choose, no_tick, scan_tensor, survey, tensors_of


@dataclass(frozen=True)
class Pruned:
    """What prune did.

    Attributes:
        out: the folder written.
        pattern: the pattern that every pruned weight holds now.
        lock: the masks, as written to `sparsity.lock.json`.
        refused: sites left dense, each with its reason.
    """

    out: Path
    pattern: Pattern
    lock: Lock
    refused: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "pattern": str(self.pattern),
            "sites": [
                {"name": e.name, "shape": list(e.shape), "nnz": e.nnz, "sparsity": 1 - e.nnz / numel(e.shape)}
                for e in self.lock.sites
            ],
            "refused": self.refused,
        }


def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: str,
    pattern: str,
    targets: Sequence[str] = (),
    force: bool = False,
    trust_remote_code: bool = False,
    tick: Tick = no_tick,
) -> Pruned:
    """Prune every matched site of a model folder and write the lock beside the weights.

    Raises:
        UsageError: unknown method, bad pattern, no match, or an output that exists.
        PatternError: the pattern does not divide a site's inputs.
        MaskError: what was read back is not what was meant to be written.
    """
    if method not in WEIGHT_CRITERIA:
        raise UsageError(f"unknown pruning method '{method}'; known: {', '.join(WEIGHT_CRITERIA)}")
    model, out, wanted = Path(model), Path(out), parse_pattern(pattern)
    if wanted.sparsity == 1:
        raise UsageError(f"--pattern {pattern} would leave no weight at all; choose less than 100%")
    with atomic_folder(out, force, sources=[model]) as temporary:
        found = survey(model, trust_remote_code=trust_remote_code)
        matched, refused = choose(found, Match(targets=tuple(targets), dense=True))
        _check_divisible(found, matched, wanted)
        pieces = tensors_of(piece for site in matched for piece in found.pieces[site])
        kinds = {
            piece.tensor: found.program.sites[site].kind for site in matched for piece in found.pieces[site]
        }
        criterion = WEIGHT_CRITERIA[method]

        def replace(shard: Shard, info: TensorInfo) -> Tensor | None:
            if info.name not in pieces:
                return None
            weight = shard.read(info.name)
            canonical = weight.transpose(-1, -2) if pieces[info.name].transposed else weight
            for matrix in canonical if canonical.ndim == 3 else [canonical]:
                if not matrix.isfinite().all():
                    raise PatternError(
                        f"{info.name} ({shard.name}) holds NaN or infinity; it cannot be pruned"
                    )
                matrix.masked_fill_(~criterion(matrix, wanted), 0)
            tick(info.name, info.nbytes)
            return weight

        rewrite_model(found.folder, temporary, replace, skip=OWN_FILES)
        lock = lock_folder(ModelFolder.open(temporary), pieces.values(), kinds, wanted)
        (temporary / LOCK_NAME).write_text(lock.dumps())
    return Pruned(out, wanted, lock, refused)


def lock_folder(
    folder: ModelFolder, pieces: Iterable[Piece], kinds: dict[str, str], pattern: Pattern
) -> Lock:
    """The lock of a folder just written, from its own bytes; every mask must hold the pattern."""
    entries: list[Any] = []
    for piece in pieces:
        mask = scan_tensor(folder, piece.tensor, transposed=piece.transposed).mask
        violations = scan_bits(mask, pattern)
        if violations.count:
            raise MaskError(f"{piece.tensor}: read back, it does not hold: {violations.describe(pattern)}")
        entries.append(make_entry(piece.tensor, kinds[piece.tensor], mask, pattern, piece.transposed))
    return Lock.of(entries)


def numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _check_divisible(found: Survey, matched: Sequence[str], pattern: Pattern) -> None:
    if not isinstance(pattern, NM):
        return
    wrong = [n for n in matched if found.program.sites[n].in_features % pattern.group]
    if wrong:
        columns = found.program.sites[wrong[0]].in_features
        raise PatternError(
            f"{wrong[0]}: its {columns} inputs are no multiple of {pattern.group}, so {pattern} cannot hold "
            f"({len(wrong)} of {len(matched)} sites); choose another pattern or leave it out with --targets"
        )
