import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import seeds
from tests.worlds import assert_untouched, made_once


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> Iterator[dict[str, seeds.Seed]]:
    """An artifact of every kind but a model's own ONNX graph; only to be read."""

    def make(folder: Path) -> None:
        made = seeds.build(folder / "seeds", graphs=False)
        (folder / "seeds.pickle").write_bytes(pickle.dumps(made))

    folder = made_once(tmp_path_factory, "fuzz", make)
    yield pickle.loads((folder / "seeds.pickle").read_bytes())
    assert_untouched(folder)
