"""Set up a process for probes, before anything takes `trace` from its module: one thread, no bars, shared traces."""

from importlib import import_module

import torch
import transformers

from tests import traces

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
traces.across_devices = False  # both the trace without weights and that with them are tried
tracing = import_module("spp_fx.graph.trace")
tracing.trace = traces.once(tracing.trace)
