import logging

import pytest
import torch
from hypothesis import settings

settings.register_profile("torch", deadline=None)
settings.load_profile("torch")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_trace_log():
    """torch.export writes a structured log of every step; captured, it hides what failed."""
    logging.getLogger("torch.__trace").propagate = False
