"""A pruned model folder before it is trained: the sites that hold a pattern, their lock, and vectors to train."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from spp_fx.adapters.adapter_folder import StoredMatrix
from spp_fx.adapters.fold import FLOATING
from spp_fx.errors import MaskError, SppFxError, UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.binding import NOT_STORED
from spp_fx.graph.names import without_skipped
from spp_fx.parallel import Tick, no_tick
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.train_norms import vectors
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry, compare, lock_beside, make_entry
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern
from spp_fx.verbs.load import is_as_sparse
from spp_fx.verification.model_sites import ModelSites, choose, scan_sites, tensors_of

Masks = dict[str, tuple[PackedMask, Pattern | None]]
"""The mask and the pattern of each stored tensor."""


def choose_pruned(
    found: ModelSites, targets: Sequence[str], skip: Sequence[str], tick: Tick = no_tick
) -> tuple[list[str], dict[str, str], Masks]:
    """The sites that hold a pattern, why the others are left alone, and masks; of a folder without weights all sites.

    Raises:
        UsageError: a target names nothing, or no site is left.
        PatternError: the model is dense.
    """
    chosen, refused = choose(found, Match(targets=tuple(targets), dense=True))
    chosen, skipped = without_skipped(chosen, skip, known=[*found.program.sites, *found.others])
    refused |= skipped
    masks = scan_sites(found, chosen, tick) if found.folder.shards else {}
    if masks:
        (report,) = run_pipeline(found.program, [Match(targets=tuple(chosen))])
        refused |= {name: reason for name, reason in report.skipped.items() if name in chosen}
        chosen = list(found.program.matched)
    return chosen, refused, masks


def refuse_sparse_teacher(found: ModelSites, sites: Iterable[str], teacher: Path, *, values: bool) -> None:
    """UsageError if a teacher is the pruned model itself; with `values` also if it is as sparse."""
    dense = open_model(teacher)
    tensors = [name for site in sites for name in tensors_of(found.matrices[site])]
    if dense.fingerprint() == found.folder.fingerprint() or (
        values and is_as_sparse(dense, found.folder, tensors)
    ):
        raise UsageError(
            f"--teacher {teacher}: is as sparse as {found.folder.path} itself; give the dense model that was pruned"
        )


def lock_of(
    found: ModelSites, sites: Iterable[str], masks: Mapping[str, tuple[PackedMask, Pattern | None]]
) -> Lock:
    """The lock of the tensors of sites; they must hold the model's own lock if there is one."""
    path = found.folder.path / LOCK_NAME
    own = lock_beside(found.folder.path)
    known = own.by_name() if own else {}
    entries: dict[str, LockEntry] = {}
    for site in sites:
        kind = found.program.sites[site].kind
        for matrix in found.matrices[site]:
            mask, pattern = masks[matrix.tensor]
            entries[matrix.tensor] = make_entry(matrix.tensor, kind, mask, pattern, matrix.transposed)
    if known and not any(name in found.folder for name in known):
        raise SppFxError(
            f"{path}: is the lock of another model, since {found.folder.path} has none of its {len(known)} sites "
            f"(first: {next(iter(known))}); remove it, or replace it by the right one"
        )
    for name, entry in entries.items():
        if name not in known:  # pruned by another tool since: locked from now on
            continue
        difference = compare(known[name], masks[name][0])
        if not difference.equal:
            raise MaskError(
                f"{name}: its mask is not that of {path} ({difference.reason or 'zeros moved'}); see 'spp-fx verify', "
                "or remove the lock if the model was changed on purpose"
            )
        entries[name] = entry.model_copy(update={"pattern": known[name].pattern})
    if not entries:
        raise SppFxError(f"{found.folder.path}: no site has a stored tensor")
    return Lock.of(entries.values())


def trained_vectors(found: ModelSites) -> tuple[dict[str, int], dict[str, str]]:
    """The norms and biases to train with their sizes, and the reasons why others are not."""
    program = found.program
    if program.untraced is not None:
        raise UsageError(f"{found.folder.path}: --train-norms needs the model's graph: {program.untraced}")
    names, refused = vectors(program)
    taken: dict[str, int] = {}
    for name in names:
        tensors = stored_tensors(found, name)
        kinds = {found.folder.info(tensor)[1].dtype for tensor in tensors}
        if found.folder.shards and not tensors:
            refused[name] = found.binding.refused.get(name, NOT_STORED)
        elif odd := sorted(kinds - FLOATING.keys()):
            refused[name] = f"is stored as {odd[0]}, which is not a plain floating type"
        elif _in_parts(found.matrices.get(name, ())):
            refused[name] = f"is stored with others, or in several parts, as {' and '.join(tensors)}"
        elif len(tensors) > 1 and any(_differs(found, tensors[0], other) for other in tensors[1:]):
            refused[name] = f"is stored twice with different values, as {' and '.join(tensors)}"
        else:
            taken[name] = program.get_parameter(name).numel()
    if not taken:
        raise UsageError(f"{found.folder.path}: has no norm or bias to train; leave --train-norms out")
    return taken, refused


def _in_parts(matrices: Sequence[StoredMatrix]) -> bool:
    return len(matrices) > 1 or any(matrix.offset is not None for matrix in matrices)


def stored_tensors(found: ModelSites, parameter: str) -> list[str]:
    """The stored tensors of a vector: one, or one for each name that the parameter has."""
    bound = (found.matrices.get(name, ()) for name in found.program.names_of(parameter))
    return [matrix.tensor for matrices in bound for matrix in matrices]


def _differs(found: ModelSites, one: str, other: str) -> bool:
    first, second = (found.folder.info(name)[0].read(name) for name in (one, other))
    return first.dtype != second.dtype or not torch.equal(first, second)
