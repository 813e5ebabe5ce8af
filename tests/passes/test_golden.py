"""Golden prints of the graphs that hold sites; SPP_FX_UPDATE_GOLDEN=1 writes them anew."""

import os
import re
from pathlib import Path

import pytest

from spp_fx.graph.printer import print_program
from spp_fx.passes.pipeline import parse_pipeline, run_pipeline
from tests.passes.programs import canonical

GOLDEN = Path(__file__).parent / "golden"
PIPELINES = {
    "canonicalize": "",
    "inject": "match,inject{rank=4}",
    "lower_fused": "match,inject{rank=4},lower",
    "lower_reference": "match,inject{rank=4},lower{kernel=reference}",
}


def site_graphs(text: str) -> str:
    """Only the graphs that hold a site of layer 0: the rest is the exporter's, and changes with it."""
    graphs = re.split(r"\n(?=graph )", text.rstrip("\n"))[1:]
    sites = (g for g in graphs if g.startswith("graph model.layers.0.") and "  # " in g)
    return "\n".join(map(_with_own_input, sites)) + "\n"


def _with_own_input(graph: str) -> str:
    """The name of the input is that of a value elsewhere in the model, numbered by the exporter."""
    name = re.match(r"graph \S+\(%(\w+)\)", graph)
    return graph if name is None else re.sub(rf"%{name[1]}\b", "%x", graph)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_program_after_a_pipeline_prints_as_it_did(name):
    program = canonical("llama")
    if PIPELINES[name]:
        run_pipeline(program, parse_pipeline(PIPELINES[name]))
    got = site_graphs(print_program(program))
    path = GOLDEN / f"llama_{name}.txt"
    if os.environ.get("SPP_FX_UPDATE_GOLDEN") == "1":
        path.write_text(got)
    assert got.count("graph ") == 7
    assert got == path.read_text()
