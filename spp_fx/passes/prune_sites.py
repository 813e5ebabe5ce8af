"""prune: zeros by a criterion, decoder layer by decoder layer where it looks at inputs."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from spp_fx.errors import PostconditionError, PreconditionError
from spp_fx.graph.program import Program, matrices
from spp_fx.options import choice
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.pruning.criterion import CRITERIA, Criterion
from spp_fx.pruning.layerwise import InPlace, LayerResult, outside_of_layers, prune_layers
from spp_fx.pruning.recipe import MatrixReport, Recipe, check_patterns, patterns_of, prune_matrix
from spp_fx.pruning.walk import MemoryStates
from spp_fx.sparsity.pattern import Pattern, parse_pattern, scan_bits
from spp_fx.sparsity.scan import pack_mask


@register("prune")
@dataclass(frozen=True)
class Prune(Pass):
    """Prune the matched sites of a program in place.

    Criteria that look at inputs, repairs and updates need `program.calibration` and units.

    Args:
        method: the criterion.
        pattern: N:M or a share of zeros.
        repair: of the mask: dsnot, or none.
        update: of what is kept: admm, or none.
        ratios: `NAME@PATTERN`, other patterns for the sites of that name.
        skip: names of sites that stay dense.
    """

    name: ClassVar[str]
    method: Criterion = choice(CRITERIA, "magnitude")
    pattern: str = "2:4"
    repair: str = ""
    update: str = ""
    ratios: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def requires(self, program: Program) -> None:
        parse_pattern(self.pattern)
        calibrated = self._recipe().calibrated
        if not program.matched:
            raise PreconditionError("prune: no site is matched; run match{dense=true} first")
        if program.adapters or program.packings:
            raise PreconditionError("prune: the program has adapters or packed weights; prune before inject")
        if any(program.weight(site).device.type == "meta" for site in program.matched):
            raise PreconditionError("prune: the program has no weights")
        if calibrated and program.calibration is None:
            raise PreconditionError(
                f"prune: {self.update or self.repair or self.method.name} looks at inputs: give the text to calibrate "
                "on (--calib)"
            )
        if calibrated and not program.units:
            raise PreconditionError("prune: calibration walks layer by layer; run partition first")

    def apply(self, program: Program) -> PassReport:
        report, recipe = PassReport(), self._recipe()
        walks = program.calibration is not None and bool(program.units)
        report.skipped.update(outside_of_layers(program, program.matched) if walks else {})
        report.skipped.update(
            (name, f"shares its weight with {first}, and is pruned with it")
            for name, first in program.tied.items()
            if name in program.matched and first in program.matched
        )
        sites = [name for name in program.matched if name not in report.skipped]
        if not sites:
            raise PreconditionError(f"prune: {'; '.join(sorted(set(report.skipped.values())))}")
        patterns, skipped = patterns_of(sites, parse_pattern(self.pattern), self.ratios, self.skip)
        report.skipped.update(skipped)
        check_patterns(program.sites, patterns, recipe.criterion)
        done = _walk(program, patterns, recipe) if walks else _each(program, patterns, recipe)
        for name, pattern in patterns.items():
            report.changed[name] = _describe([each for each in done if each.site == name])
            program.patterns[name] = program.matched[name] = pattern
        for name in report.skipped:
            del program.matched[name]
        return report

    def again(self, program: Program, first: Program) -> None:
        """Nothing: it rewrites no graph."""

    def ensures(self, program: Program) -> None:
        for name, pattern in program.matched.items():
            weight, site = program.weight(name).detach().cpu(), program.sites[name]
            found = scan_bits(pack_mask(weight, transposed=site.transposed), pattern) if pattern else None
            if found is not None and found.count:
                assert pattern is not None
                raise PostconditionError(f"prune: {name} does not hold: {found.describe(pattern)}")

    def _recipe(self) -> Recipe:
        return Recipe(self.method, self.repair or None, self.update or None)


def _walk(program: Program, patterns: dict[str, Pattern], recipe: Recipe) -> list[MatrixReport]:
    reports: list[MatrixReport] = []

    def finish(index: int, result: LayerResult) -> None:
        reports.extend(result.reports)

    assert program.calibration is not None
    training = program.training
    try:
        prune_layers(
            program.eval(), program.calibration, patterns, recipe,
            weights=InPlace(), states=MemoryStates(), device=program.device, finish=finish,
        )  # fmt: skip
    finally:
        program.train(training)
    return reports


def _each(program: Program, patterns: dict[str, Pattern], recipe: Recipe) -> list[MatrixReport]:
    reports: list[MatrixReport] = []
    for name, pattern in patterns.items():
        with torch.no_grad():
            weight = program.canonical_weight(name)
            for index, matrix in enumerate(matrices(weight)):
                expert = index if weight.ndim == 3 else None
                reports.append(prune_matrix(matrix, None, pattern, recipe, name, expert))
    return reports


def _describe(reports: list[MatrixReport]) -> str:
    zeros = sum(each.zeros for each in reports) / sum(each.size for each in reports)
    text = f"{reports[0].pattern}, {zeros:.2%} zeros"
    energy = sum(each.energy or 0 for each in reports)
    if energy:
        before, after = (
            sum(getattr(each, key) for each in reports) / energy for key in ("lost_before", "lost_after")
        )
        text += f", output error {before:.4%}" + (f" -> {after:.4%}" if after != before else "")
    notes = dict.fromkeys(note for each in reports for note in each.notes)
    return "; ".join([text, *notes])
