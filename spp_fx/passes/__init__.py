"""Passes: named, typed rewrites and checks of programs, and pipelines of them."""

from spp_fx.passes.base import PASSES, Pass, PassReport, find_pass, register
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.causal import Causal
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.lower import Lower
from spp_fx.passes.match import Match
from spp_fx.passes.partition import Checkpoint, Partition
from spp_fx.passes.pipeline import parse_pipeline, print_pass, print_pipeline, run_pipeline
from spp_fx.passes.prune_sites import Prune
from spp_fx.passes.shard import Shard
from spp_fx.passes.verify_masks import Verify

__all__ = [
    "PASSES",
    "Canonicalize",
    "Causal",
    "Checkpoint",
    "Fold",
    "Inject",
    "Lower",
    "Match",
    "Partition",
    "Pass",
    "PassReport",
    "Prune",
    "Shard",
    "Verify",
    "find_pass",
    "parse_pipeline",
    "print_pass",
    "print_pipeline",
    "register",
    "run_pipeline",
]
