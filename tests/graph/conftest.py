import pytest
import torch
from hypothesis import settings

settings.register_profile("torch", deadline=None)
settings.load_profile("torch")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
