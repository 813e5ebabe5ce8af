"""A model that the tests of the documents export."""

import shutil
from pathlib import Path

import pytest
import torch

import spp_fx


@pytest.fixture(scope="session")
def locked_model(tmp_path_factory) -> Path:
    """A model with its lock, in bfloat16; read only."""
    from tests.exporters.test_cusparselt import model_folder

    root = tmp_path_factory.mktemp("locked")
    folder = model_folder(root / "m", dtype=torch.bfloat16)
    lock = spp_fx.export(folder, root / "plain", "safetensors").out / "sparsity.lock.json"
    shutil.copy(lock, folder)
    return folder
