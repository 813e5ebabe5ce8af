"""opt: run a pipeline of passes over a model and show what each did."""

from collections.abc import Callable
from pathlib import Path

from spp_fx.graph.model import load_model, meta_model
from spp_fx.graph.printer import print_program
from spp_fx.graph.program import Program
from spp_fx.graph.trace import trace
from spp_fx.passes.base import Pass, PassReport
from spp_fx.passes.pipeline import parse_pipeline, print_pass, run_pipeline
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.links import links_option
from spp_fx.verbs.load import Calibration, draw_windows

After = Callable[[str, PassReport, str], None]
"""Called with a pass's spelling, its report, and the program as text after it."""


@links_option
def optimize(
    model: Path,
    pipeline: str,
    *,
    after: After,
    calibration: Calibration | None = None,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Program:
    """Trace a model folder and run a pipeline over it; a folder without weights is traced on meta.

    Args:
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
        drawn = draw_windows(model, program, calibration, trust_remote_code=trust_remote_code, say=say)
        program.calibration = drawn.tokens

    def show(item: Pass, report: PassReport) -> None:
        after(print_pass(item), report, print_program(program))

    run_pipeline(program, passes, show)
    return program
