"""A config.json that claims millions of layers is refused before a model is made of it."""

import json

import pytest

from spp_fx.errors import FormatError
from spp_fx.storage.folder import ModelFolder
from spp_fx.verification import model_sites
from spp_fx.verification.model_sites import check_layer_count
from tests.command import command, one_line

MANY = 10_000_000


def claim(folder, **layers) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | layers))


@pytest.mark.parametrize(
    "line",
    [
        "verify sparse --pattern 2:4",
        "verify sparse/model.safetensors --coverage all",
        "verify packed --coverage all",
        "inspect sparse",
        "lock sparse -o new.json",
    ],
)
def test_layers_without_tensors_are_damage(world, monkeypatch, line):
    for name in ("sparse", "packed"):
        claim(world / name, num_hidden_layers=MANY)
    manifest = world / "packed" / "export.json"
    content = json.loads(manifest.read_text())
    content.get("files", {}).pop("config.json", None)
    manifest.write_text(json.dumps(content))
    monkeypatch.chdir(world)
    result = command(*line.split(), "-q")
    assert result.code == 1
    assert f"num_hidden_layers is {MANY}" in one_line(result.err)


@pytest.mark.parametrize(
    ("claimed", "refused"),
    [
        ({"n_layer": 7}, True),
        ({"text_config": {"num_layers": 7}}, True),
        ({"num_hidden_layers": 1e300}, True),
        ({"num_hidden_layers": 6}, False),
        ({"max_window_layers": 70, "num_layers": None, "layer_norm_eps": 8.0}, False),
    ],
)
def test_only_counts_of_layers_are_held_to_the_tensors(tmp_path, claimed, refused):
    (tmp_path / "config.json").write_text(json.dumps(claimed))
    folder = ModelFolder.open(tmp_path, weights=False)
    if refused:
        with pytest.raises(FormatError, match="only 6 tensors are stored"):
            check_layer_count(folder, 6)
    else:
        check_layer_count(folder, 6)


def test_a_configuration_alone_may_have_any_size(world, monkeypatch):
    class Reached(Exception):
        pass

    def model(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(model_sites, "meta_model", model)
    (world / "dense" / "model.safetensors").unlink()
    claim(world / "dense", num_hidden_layers=MANY)
    with pytest.raises(Reached):
        model_sites.find_sites(ModelFolder.open(world / "dense", weights=False))
