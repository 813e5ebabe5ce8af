import pytest


@pytest.fixture(autouse=True)
def _always_export(real_exports):
    """What is tested here is what torch.export is given and gives."""
