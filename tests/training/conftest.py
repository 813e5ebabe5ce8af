import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Several test processes share the cores; threads that wait for one another cost more than they bring.
    torch.set_num_threads(1)
