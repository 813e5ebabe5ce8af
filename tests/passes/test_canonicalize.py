"""canonicalize: every spelling of a linear becomes a site, orientation known."""

from pathlib import Path

import pytest

import spp_fx.passes
from spp_fx.errors import PreconditionError
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from tests.effort import nightly
from tests.passes.programs import canonical

SITES = [
    ("llama", "model.layers.0.mlp.up_proj.weight", "linear", (64, 32), False),
    ("llama", "model.layers.1.self_attn.k_proj.weight", "linear", (16, 32), False),
    ("gpt2", "transformer.h.1.mlp.c_fc.weight", "conv1d", (128, 32), True),
    ("gpt2", "transformer.h.0.attn.c_attn.weight", "conv1d", (96, 32), True),
    ("falcon", "transformer.h.0.mlp.dense_h_to_4h.weight", "matmul", (128, 32), False),
    ("falcon", "transformer.h.1.mlp.dense_4h_to_h.weight", "matmul", (32, 128), False),
]


@pytest.mark.parametrize(("family", "name", "kind", "shape", "transposed"), SITES)
def test_a_linear_is_a_site_in_its_canonical_orientation(family, name, kind, shape, transposed):
    program = canonical(family)
    site = program.sites[name]
    assert (site.kind, site.shape, site.transposed, site.uses) == (kind, shape, transposed, 1)
    assert tuple(program.canonical_weight(name).shape) == shape


@pytest.mark.parametrize(
    ("family", "transposed", "experts"),
    [
        ("mixtral", False, "grouped_mm"),
        ("mixtral", False, "batched_mm"),
        ("gpt-oss", True, "grouped_mm"),
        nightly("gpt-oss", True, "batched_mm"),
    ],
)
def test_experts_are_a_stack_under_both_implementations(family, transposed, experts):
    program = canonical(family, experts=experts)
    stacks = {
        name.rpartition(".")[2]: (site.shape, site.transposed, site.layer)
        for name, site in program.sites.items()
        if site.kind == "experts" and site.layer == "model.layers.1"
    }
    assert stacks == {
        "gate_up_proj": ((4, 128, 32), transposed, "model.layers.1"),
        "down_proj": ((4, 32, 64), transposed, "model.layers.1"),
    }


def test_a_tied_head_is_marked():
    site = canonical("llama-tied").sites
    heads = [s for s in site.values() if s.is_head]
    assert [(s.tied_to is not None, s.layer) for s in heads] == [(True, None)]


def test_an_untied_head_is_no_embedding():
    site = canonical("llama").sites["lm_head.weight"]
    assert (site.is_head, site.tied_to, site.layer) == (True, None, None)


def test_canonicalize_is_idempotent():
    program = canonical("gpt2")
    sites = dict(program.sites)
    (report,) = run_pipeline(program, [Canonicalize()])
    assert (program.sites, report.changed) == (sites, {})


def test_no_pass_knows_a_model_family():
    text = "".join(f.read_text().lower() for f in Path(spp_fx.passes.__path__[0]).glob("*.py"))
    families = (
        "llama",
        "gpt2",
        "gpt_oss",
        "gpt-oss",
        "falcon",
        "mixtral",
        "qwen",
        "mistral",
        "gemma",
        "opt_",
    )
    assert [name for name in families if name in text] == []


def test_match_needs_sites():
    program = canonical("llama")
    program.sites.clear()
    with pytest.raises(PreconditionError, match="run canonicalize first"):
        run_pipeline(program, [Match()])
