"""spp-fx: train pruned language models without moving a zero, fold, prove and export them.

    import spp_fx

    program = spp_fx.trace("my-sparse-model")
    spp_fx.run_pipeline(program, spp_fx.parse_pipeline("canonicalize,match,inject{rank=16},lower{kernel=fused}"))
    loss = program(input_ids, labels=input_ids).loss

The functions behind the command line's verbs are here under the same names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spp_fx.version import VERSION

if TYPE_CHECKING:
    from spp_fx import runtime
    from spp_fx.errors import SppFxError
    from spp_fx.graph.printer import print_program
    from spp_fx.graph.program import Program
    from spp_fx.graph.trace import trace
    from spp_fx.passes.pipeline import parse_pipeline, print_pipeline, run_pipeline
    from spp_fx.verbs.evaluate import evaluate
    from spp_fx.verbs.export import export
    from spp_fx.verbs.inject import inject
    from spp_fx.verbs.inspect import inspect
    from spp_fx.verbs.load import load_program
    from spp_fx.verbs.merge import merge
    from spp_fx.verbs.prune import prune
    from spp_fx.verbs.reconstruct import reconstruct
    from spp_fx.verbs.settings import Calibration, TrainSettings
    from spp_fx.verbs.teach import teach
    from spp_fx.verbs.train import train
    from spp_fx.verbs.unpack import unpack
    from spp_fx.verbs.verify import verify
    from spp_fx.verbs.write_lock import lock

__version__ = VERSION

# Imported on first use: torch and transformers take seconds that `spp-fx --help` need not wait for.
_HOMES = {
    "Calibration": "spp_fx.verbs.settings",
    "Program": "spp_fx.graph.program",
    "SppFxError": "spp_fx.errors",
    "TrainSettings": "spp_fx.verbs.settings",
    "evaluate": "spp_fx.verbs.evaluate",
    "export": "spp_fx.verbs.export",
    "inject": "spp_fx.verbs.inject",
    "inspect": "spp_fx.verbs.inspect",
    "load_program": "spp_fx.verbs.load",
    "lock": "spp_fx.verbs.write_lock",
    "merge": "spp_fx.verbs.merge",
    "parse_pipeline": "spp_fx.passes.pipeline",
    "print_pipeline": "spp_fx.passes.pipeline",
    "print_program": "spp_fx.graph.printer",
    "prune": "spp_fx.verbs.prune",
    "reconstruct": "spp_fx.verbs.reconstruct",
    "run_pipeline": "spp_fx.passes.pipeline",
    "teach": "spp_fx.verbs.teach",
    "trace": "spp_fx.graph.trace",
    "train": "spp_fx.verbs.train",
    "unpack": "spp_fx.verbs.unpack",
    "verify": "spp_fx.verbs.verify",
}

__all__ = [
    "Calibration",
    "Program",
    "SppFxError",
    "TrainSettings",
    "__version__",
    "evaluate",
    "export",
    "inject",
    "inspect",
    "load_program",
    "lock",
    "merge",
    "parse_pipeline",
    "print_pipeline",
    "print_program",
    "prune",
    "reconstruct",
    "run_pipeline",
    "runtime",
    "teach",
    "trace",
    "train",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "runtime":
        return import_module("spp_fx.runtime")
    if name not in _HOMES:
        raise AttributeError(f"module 'spp_fx' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
