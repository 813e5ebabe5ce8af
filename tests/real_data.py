"""Where a real model and real text lie, if they are there."""

import os
from pathlib import Path

import pytest


def data_folder() -> Path:
    """The folder that SPP_FX_DATA names, else ../shared/data beside the checkout; skips where neither is."""
    named = os.environ.get("SPP_FX_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "story-656k").is_dir():
        pytest.skip("needs real data: set SPP_FX_DATA to a folder with story-656k and tinystories")
    return folder
