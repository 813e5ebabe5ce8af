"""Settings that must stand before anything is imported, and what every test shares."""

import gc
import logging
import os
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import effort
from tests.worlds import session_folder

if not torch.cuda.is_available():
    # Triton reads it while it is imported: its kernels then run in an interpreter on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if not effort.NIGHTLY:
    # torch reads it while it is imported. A trace of a small model meets few operators twice, and keeping what each
    # gave takes a third of its time.
    os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

# See tests.traces; before any module takes the function from there.
traces = import_module("tests.traces")
tracing = import_module("spp_fx.graph.trace")
tracing.trace = traces.once(tracing.trace)

EXPORTING = {"exporters", "verbs", "runtime", "e2e"}
"""Folders of tests that write ONNX files; others do not import the exporter."""

# Nothing that is measured in seconds: the first example may compile a kernel, and other processes share the cores.
TIMELESS = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("push", **TIMELESS, derandomize=True)
settings.register_profile("nightly", **TIMELESS)
settings.load_profile("nightly" if effort.NIGHTLY else "push")


def pytest_collection_finish():
    # What is imported by now stays: the collector need not look through it a hundred times.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"samples were drawn with SPP_FX_SEED={effort.SEED}")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Several test processes share the cores; threads that wait for one another cost more than they bring.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """What is alive between modules, such as imports and kept traces, is not searched for garbage again.

    Each trainer and each `eval` collects garbage, which takes half a second among all that torch loads.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_trace_log():
    """torch.export writes a structured log of every step; captured, it hides what failed."""
    logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(autouse=True, scope="session")
def _graphs_once(request, tmp_path_factory):
    """See tests.traces."""
    if not any(EXPORTING & set(item.path.parts) for item in request.session.items):
        yield
        return
    writer = import_module("spp_fx.exporters.onnx.model_writer")
    builder = traces.graph_builder(writer.build_graph, session_folder(tmp_path_factory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "build_graph", builder)
        yield


@pytest.fixture
def real_exports(monkeypatch):
    """For tests of tracing: a model is traced each time."""
    monkeypatch.setattr(traces, "enabled", False)
