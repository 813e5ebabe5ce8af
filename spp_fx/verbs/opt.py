"""opt: run a pipeline of passes over a model and show what each did."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_fx.graph.model import load_model, meta_model
from spp_fx.graph.printer import print_program
from spp_fx.graph.program import Program
from spp_fx.graph.trace import trace
from spp_fx.passes.base import Pass, PassReport
from spp_fx.passes.pipeline import parse_pipeline, print_pass, run_pipeline
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.links import links_option
from spp_fx.verbs.load import draw_samples
from spp_fx.verbs.settings import Calibration


@dataclass(frozen=True)
class PassRun:
    """One pass of a pipeline: its spelling, what it did, and the program after it as text, where that is shown."""

    spelling: str
    report: PassReport
    program: str | None

    def to_json(self) -> dict[str, Any]:
        content = {"pass": self.spelling, "changed": self.report.changed, "refused": self.report.skipped}
        return content | ({} if self.program is None else {"program": self.program})

    def lines(self) -> Iterator[str]:
        changed, skipped = self.report.changed, self.report.skipped
        yield f"// {self.spelling}: {len(changed)} sites changed, {len(skipped)} skipped"
        yield from (f"//   {name}: {reason}" for name, reason in skipped.items())
        if self.program is not None:
            yield self.program


@dataclass(frozen=True)
class Optimized:
    """The program after a pipeline, and what each pass did."""

    program: Program
    passes: list[PassRun]

    def to_json(self) -> dict[str, Any]:
        return {"passes": [run.to_json() for run in self.passes]}

    def lines(self) -> Iterator[str]:
        for run in self.passes:
            yield from run.lines()


@links_option
def optimize(
    model: Path,
    pipeline: str,
    *,
    print_after_all: bool = False,
    after: Callable[[PassRun], None] = lambda run: None,
    calibration: Calibration | None = None,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Optimized:
    """Trace a model folder and run a pipeline over it; a folder without weights is traced on meta.

    Args:
        print_after_all: keep the program as text after every pass.
        after: called when a pass is done.
        calibration: text for passes that look at inputs.

    Raises:
        UsageError: the pipeline cannot be read; nothing is loaded then.
    """
    passes = parse_pipeline(pipeline)
    weights = any(model.glob("*.safetensors"))
    ModelFolder.open(model, weights=weights)
    source = load_model if weights else meta_model
    program = trace(source(model, trust_remote_code=trust_remote_code))
    if calibration is not None:
        program.calibration, _ = draw_samples(
            model, program, calibration, trust_remote_code=trust_remote_code, say=say
        )

    runs: list[PassRun] = []

    def done(item: Pass, report: PassReport) -> None:
        text = print_program(program) if print_after_all else None
        runs.append(PassRun(print_pass(item), report, text))
        after(runs[-1])

    run_pipeline(program, passes, done)
    return Optimized(program, runs)
