"""How each site is pruned: its pattern, the criterion, the repair of the mask, and the update of what it keeps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spp_fx.errors import PatternError, UsageError
from spp_fx.graph.names import without_skipped
from spp_fx.graph.program import Site
from spp_fx.pruning.criteria.magnitude import Magnitude
from spp_fx.pruning.criteria.wanda import Wanda
from spp_fx.pruning.criterion import Criterion
from spp_fx.pruning.select import row_blocks
from spp_fx.pruning.statistics import Inputs, output_energy
from spp_fx.pruning.update import UPDATES
from spp_fx.registry import did_you_mean
from spp_fx.sparsity.pattern import NM, Pattern, parse_pattern
from spp_fx.sparsity.weights import is_target

THRESHOLD = 0.1
CYCLES = 50


def dsnot(weight: Tensor, mask: Tensor, inputs: Inputs, pattern: Pattern) -> Tensor:
    """The mask after at most 50 swaps in each row; every row, and every group of N:M, keeps as many as before.

    D_ij = W_ij mean_j(x) is what a weight contributes to the mean of its output, E_i = the sum of D over
    the pruned weights of row i what pruning took from it. A swap grows the pruned weight of E's sign with the
    largest |D_ij| / var_j(x), and prunes the kept weight of the other sign with the smallest Wanda score;
    for N:M in the same group, of those that have both. A row ends when |E| <= 0.1, when there is nothing to
    swap, or, for N:M, when a swap would turn the sign of E. No weight moves twice.

    Args:
        weight: (out, in), as it was before pruning.
        mask: (out, in) bool, true where it is kept.
        inputs: what calibration saw.
        pattern: that the mask holds.
    """
    group = pattern.group if isinstance(pattern, NM) else None
    repaired = mask.clone()
    for part, kept in row_blocks(weight, repaired):
        _repair(part, kept, inputs, group)
    return repaired


def _repair(weight: Tensor, mask: Tensor, inputs: Inputs, group: int | None) -> None:
    """Swap in the rows of a mask."""
    share = weight.float() * inputs.mean
    gain = share / inputs.variance.clamp_min(torch.finfo(torch.float32).tiny)
    gain[mask] = 0  # nothing to grow
    cost = Wanda().score(weight, inputs).masked_fill_(~mask, torch.inf)  # nothing to prune
    error = torch.where(mask, 0, share).sum(1, dtype=torch.float64)
    active = (error.abs() > THRESHOLD).nonzero().flatten()
    for _ in range(CYCLES):
        if not len(active):
            break
        sign = error[active].sign().float().unsqueeze(1)
        own = share[active]
        grows = (gain[active] * sign).clamp_min_(0)
        prunes = cost[active].masked_fill_(own * sign >= 0, torch.inf)
        grown, pruned, found = _swap(grows, prunes, group)
        change = own.gather(1, pruned) - own.gather(1, grown)
        after = error[active] + change.squeeze(1)
        if group is not None:
            found &= after.sign() == sign.squeeze(1)
        moved, grown, pruned = active[found], grown[found, 0], pruned[found, 0]
        mask[moved, grown], mask[moved, pruned] = True, False
        gain[moved, grown], cost[moved, pruned] = 0, torch.inf
        error[moved] = after[found]
        active = moved[error[moved].abs() > THRESHOLD]


def _swap(grows: Tensor, prunes: Tensor, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What each row grows and prunes, (rows, 1) each, and (rows,) whether there is such a pair."""
    if group is None:
        gain, grown = grows.max(1, keepdim=True)
        cost, pruned = prunes.min(1, keepdim=True)
        return grown, pruned, ((gain > 0) & (cost < torch.inf)).squeeze(1)
    rows = len(grows)
    costs, lanes = prunes.view(rows, -1, group).min(2)
    possible = (costs < torch.inf).repeat_interleave(group, 1)
    gain, grown = grows.masked_fill_(~possible, 0).max(1, keepdim=True)
    where = grown // group
    return grown, where * group + lanes.gather(1, where), (gain > 0).squeeze(1)


REPAIRS = {"dsnot": dsnot}


@dataclass(frozen=True)
class Recipe:
    """How a matrix is pruned.

    Attributes:
        criterion: chooses the mask, and may change values.
        repair: name of a repair of the mask, or none.
        update: name of an update of the kept weights, in place of the criterion's own; or none.
    """

    criterion: Criterion
    repair: str | None = None
    update: str | None = None

    def __post_init__(self) -> None:
        for what, name, known in (("repair", self.repair, REPAIRS), ("update", self.update, UPDATES)):
            if name is not None and name not in known:
                raise UsageError(
                    f"unknown {what} '{name}'; known: {', '.join(known)}{did_you_mean(name, known)}"
                )

    @property
    def calibrated(self) -> bool:
        """Whether inputs are looked at."""
        return self.criterion.calibrated or self.repair is not None or self.update is not None

    @property
    def hessian(self) -> bool:
        """Whether X^T X of the inputs is needed."""
        return self.criterion.hessian or self.update is not None


@dataclass(frozen=True)
class MatrixReport:
    """What pruning did to one matrix.

    Attributes:
        site: its name.
        expert: its index in a stack, or None.
        pattern: what it holds.
        zeros, size: entries.
        energy: squared norm of its outputs for some calibration inputs, None without calibration.
        lost_before: the same of what the mask alone takes from them, before update and repair.
        lost_after: of what is missing in the end.
        notes: what the reader should know.
        start: its first row in the site, where that is stored as several matrices.
    """

    site: str
    expert: int | None
    pattern: str
    zeros: int
    size: int
    energy: float | None
    lost_before: float | None
    lost_after: float | None
    notes: tuple[str, ...] = ()
    start: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "MatrixReport":
        values: dict[str, Any] = dict(content)
        values["notes"] = tuple(content["notes"])
        return cls(**values)


def prune_matrix(
    weight: Tensor,
    inputs: Inputs | None,
    pattern: Pattern,
    recipe: Recipe,
    site: str,
    expert: int | None = None,
) -> MatrixReport:
    """Prune a matrix (out, in) in place.

    Raises:
        PatternError: the weight is not finite, the pattern cannot hold, or the inputs cannot be used; names
            the site.
    """
    where = site if expert is None else f"{site}, expert {expert}"
    if not all(bool(part.isfinite().all()) for (part,) in row_blocks(weight)):
        raise PatternError(f"{where}: holds NaN or infinity and cannot be pruned")
    seen = inputs or Inputs(weight.shape[1])
    notes: list[str] = []
    if inputs is not None and inputs.dead:
        notes.append(f"{inputs.dead} of its {inputs.features} inputs were always 0")
    if recipe.calibrated and not seen.tokens:
        notes = ["received no token: pruned by magnitude"]
        recipe = Recipe(Magnitude())
    try:
        first, values = recipe.criterion.prune(weight, seen, pattern)
        mask = first
        if recipe.repair is not None:
            mask = REPAIRS[recipe.repair](weight, first, seen, pattern)
            values = recipe.criterion.update(weight, seen, mask)
        if recipe.update is not None:
            values = UPDATES[recipe.update](weight, seen, mask)
    except PatternError as error:
        raise PatternError(f"{where}: {error}") from error
    energy = before = after = None
    if inputs is not None:
        energy = output_energy(inputs.kept, weight)
        before = after = output_energy(inputs.kept, weight, without=first)
        if values is not None:
            after = output_energy(inputs.kept, weight, minus=values)
        elif mask is not first:
            after = output_energy(inputs.kept, weight, without=mask)
    if values is not None:
        weight.copy_(values)
    remedy = "; raise --damp" if hasattr(recipe.criterion, "damp") and recipe.update is None else ""
    zeros = 0
    for part, kept in row_blocks(weight, mask):
        part.masked_fill_(~kept, 0)
        if values is not None and not bool(part.isfinite().all()):
            raise PatternError(f"{where}: its new values do not fit {weight.dtype}{remedy}")
        zeros += int((part == 0).sum())
    return MatrixReport(
        site, expert, str(pattern), zeros, weight.numel(), energy, before, after, tuple(notes)
    )


def patterns_of(
    sites: Iterable[str], default: Pattern, ratios: Sequence[str], skip: Sequence[str]
) -> tuple[dict[str, Pattern], dict[str, str]]:
    """The pattern of each site, and the sites that are skipped with the reason.

    Args:
        sites: names.
        default: of sites that no ratio names.
        ratios: `NAME@PATTERN`, such as `down_proj@4:8` or `model.layers.0.*@30%`; the last that fits counts.
        skip: names of sites that stay dense.

    Raises:
        UsageError: a ratio cannot be read, or a name fits no site.
    """
    names, skipped = without_skipped(sites, skip)
    rules: list[tuple[str, Pattern]] = []
    for ratio in ratios:
        target, at, text = ratio.rpartition("@")
        if not at or not target:
            raise UsageError(f"'{ratio}' is not a ratio; write NAME@PATTERN, such as down_proj@4:8")
        rules.append((target, parse_pattern(text)))
    for target, _ in rules:
        if not any(is_target(name, target) for name in (*names, *skipped)):
            raise UsageError(f"'{target}' names no site to prune")
    patterns = {
        name: next((p for target, p in reversed(rules) if is_target(name, target)), default) for name in names
    }
    for name, pattern in patterns.items():
        if pattern.sparsity == 1:
            raise UsageError(f"{name}: {pattern} would leave no weight at all; choose less than 100%")
    return patterns, skipped


def check_patterns(sites: Mapping[str, Site], patterns: Mapping[str, Pattern], criterion: Criterion) -> None:
    """Check, before anything is run, that sites can hold their patterns and the criterion can make them.

    Raises:
        PatternError: a group does not divide a site's inputs.
        UsageError: a block of columns would end within a group.
    """
    wrong = [
        name
        for name, pattern in patterns.items()
        if isinstance(pattern, NM) and sites[name].in_features % pattern.group
    ]
    if wrong:
        raise PatternError(
            f"{wrong[0]}: its {sites[wrong[0]].in_features} inputs are not a multiple of the group of "
            f"{patterns[wrong[0]]}, which cannot hold ({len(wrong)} of {len(patterns)} sites); choose another "
            "pattern, or leave it out with --skip"
        )
    for name, pattern in patterns.items():
        criterion.check(sites[name].in_features, pattern)
