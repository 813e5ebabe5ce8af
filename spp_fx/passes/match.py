"""match: choose the sites that later passes treat, with the reason for every other one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from spp_fx.errors import PatternError, PreconditionError, UsageError
from spp_fx.graph.program import Program, Site
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.sparsity.pattern import Pattern, detect_pattern
from spp_fx.sparsity.scan import pack_mask
from spp_fx.sparsity.weights import is_target, module_name


@register("match")
@dataclass(frozen=True)
class Match(Pass):
    """Choose sites by name, and by what their weights look like.

    Args:
        targets: the last words of module names (`q_proj`, `mlp.up_proj`) or globs over whole names
            (`model.layers.0.*`); none means every linear of the decoder layers.
        dense: take dense sites as well (for pruning, or before weights are known).
    """

    name: ClassVar[str]
    targets: tuple[str, ...] = ()
    dense: bool = False

    def requires(self, program: Program) -> None:
        if not program.sites:
            raise PreconditionError("match: the program has no sites; run canonicalize first")
        if program.adapters:
            raise PreconditionError(
                "match: the program has adapters; fold them before other sites are chosen"
            )

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        program.matched.clear()
        unknown = [t for t in self.targets if not any(is_target(name, t) for name in program.sites)]
        if unknown:
            words = sorted({module_name(name).rpartition(".")[2] for name in program.sites})
            raise UsageError(f"no site is named {', '.join(unknown)}; the model has: {', '.join(words)}")
        dense: list[str] = []
        for name, site in program.sites.items():
            reason = _reason(program, site, self.targets)
            if reason is None:
                pattern, known = _pattern(program, site)
                if pattern is not None or self.dense or not known:
                    program.matched[name] = pattern
                    report.changed[name] = (
                        str(pattern) if pattern else "dense" if known else "pattern not read"
                    )
                    continue
                dense.append(name)
                reason = "dense: it has no zeros to keep"
            report.skipped[name] = reason
        if not program.matched:
            raise _nothing(report, dense, bool(self.targets))
        return report

    def again(self, program: Program, first: Program) -> None:
        """Match what was matched: another trace has no weights to look at."""
        program.patterns, program.matched = dict(first.patterns), dict(first.matched)


def _reason(program: Program, site: Site, targets: Sequence[str]) -> str | None:
    if targets and not any(is_target(site.name, target) for target in targets):
        return "not among the targets"
    if site.tied_to is not None:
        return f"tied to the embedding {site.tied_to}"
    if targets:
        return None
    if site.is_head:
        return "makes the logits; name it in the targets to take it"
    if site.layer is None:
        return "outside the layers; name it in the targets to take it"
    if program.language and not site.name.startswith(f"{program.language}."):
        return f"outside the language model {program.language}; name it in the targets to take it"
    if site.role is not None:
        return f"{site.role}; name it in the targets to take it"
    return None


def _pattern(program: Program, site: Site) -> tuple[Pattern | None, bool]:
    """A site's pattern, and whether its weight could be looked at."""
    if site.name not in program.patterns:
        weight = program.weight(site.name)
        if weight.device.type == "meta":
            return None, False
        mask = pack_mask(weight.detach().cpu(), transposed=site.transposed)
        program.patterns[site.name] = detect_pattern(mask)
    return program.patterns[site.name], True


def _nothing(report: PassReport, dense: list[str], named: bool) -> Exception:
    if dense:
        return PatternError(
            f"the model is dense: none of {len(dense)} candidate sites holds a pattern (first: {dense[0]}). "
            "Prune it first: spp-fx prune MODEL -o OUT --method magnitude --pattern 2:4"
        )
    reasons = sorted(set(report.skipped.values()))
    hint = "" if named else "; name sites with --targets (spp-fx inspect lists them)"
    return UsageError(f"no site matches: {'; '.join(reasons) or 'the program has no sites'}{hint}")
