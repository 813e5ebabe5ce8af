"""verify: masks are equal to those before injection, and patterns hold."""

from dataclasses import dataclass
from typing import ClassVar

from spp_fx.errors import MaskError, PreconditionError
from spp_fx.graph.program import Program
from spp_fx.passes.base import Pass, PassReport, register
from spp_fx.passes.frozen_weights import weight_of
from spp_fx.sparsity.lock import compare_masks
from spp_fx.sparsity.pattern import parse_pattern, scan_bits
from spp_fx.sparsity.scan import pack_mask


@register("verify")
@dataclass(frozen=True)
class Verify(Pass):
    """Check the weights of a program against the masks taken at injection, and against a pattern.

    Args:
        pattern: that every matched site must hold, such as `2:4`; empty for each site's own.
    """

    name: ClassVar[str]
    pattern: str = ""

    def requires(self, program: Program) -> None:
        if not program.matched and not program.masks:
            raise PreconditionError("verify: nothing to check against; run match or inject first")
        if program.device.type == "meta":
            raise PreconditionError("verify: the program is on the meta device and has no weights")

    def apply(self, program: Program) -> PassReport:
        report = PassReport()
        asked = parse_pattern(self.pattern) if self.pattern else None
        for name in dict.fromkeys((*program.matched, *program.masks)):
            mask = pack_mask(weight_of(program, name).cpu().contiguous())
            if name in program.masks and mask.digest != program.masks[name].digest:
                difference = compare_masks(program.masks[name], mask, limit=1)
                raise MaskError(f"verify: {name}: the mask changed: {difference}")
            pattern = asked or program.matched.get(name)
            if pattern is not None:
                found = scan_bits(mask, pattern)
                if found.count:
                    raise MaskError(f"verify: {name}: {found.describe(pattern)}")
            report.changed[name] = f"{pattern or 'mask'} holds" + (
                ", mask equal" if name in program.masks else ""
            )
            if name in program.adapters and not program.adapters[name].masked:
                report.changed[name] += "; the update is dense until fold"
        return report

    def again(self, program: Program, first: Program) -> None:
        """Nothing: it rewrites no graph."""
