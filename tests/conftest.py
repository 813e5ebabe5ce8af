"""Settings that must stand before anything is imported, and what every test shares."""

import logging
import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import effort, traces

if not torch.cuda.is_available():
    # Triton reads it while it is imported: its kernels then run in an interpreter on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nothing that is measured in seconds: the first example may compile a kernel, and other processes share the cores.
TIMELESS = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("push", **TIMELESS)
settings.register_profile("nightly", **TIMELESS)
settings.load_profile("nightly" if effort.NIGHTLY else "push")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"samples were drawn with SPP_FX_SEED={effort.SEED}")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Several test processes share the cores; threads that wait for one another cost more than they bring.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_trace_log():
    """torch.export writes a structured log of every step; captured, it hides what failed."""
    logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(autouse=True, scope="session")
def _export_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", traces.export)
        yield


@pytest.fixture(autouse=True)
def _build_graphs_once(_export_once, tmp_path_factory, monkeypatch):
    """ONNX graphs too, in the verbs; imported by the test itself, the module is patched for the next one."""
    writer = sys.modules.get("spp_fx.exporters.onnx.writer")
    if writer is not None:
        monkeypatch.setattr(writer, "build_graph", traces.graph_builder(writer.build_graph, tmp_path_factory))


@pytest.fixture
def real_exports(monkeypatch):
    """For tests of tracing: torch.export is called each time."""
    monkeypatch.setattr(traces, "enabled", False)
