"""The table of what is built in names every registered class, and the module that registers it."""

import re
from pathlib import Path

import pytest

import spp_fx
from spp_fx.adapters.method import METHODS
from spp_fx.exporters.format import FORMATS
from spp_fx.passes.base import PASSES
from spp_fx.pruning.criterion import CRITERIA
from spp_fx.registry import BUILT_IN

REGISTRIES = {
    "spp_fx.methods": METHODS,
    "spp_fx.criteria": CRITERIA,
    "spp_fx.formats": FORMATS,
    "spp_fx.passes": PASSES,
}


@pytest.mark.parametrize("group", BUILT_IN)
def test_every_name_is_registered_by_its_module(group):
    for name, module in BUILT_IN[group].items():
        assert REGISTRIES[group].find(name).__module__ == module
        assert REGISTRIES[group].find(name).name == name
    assert set(BUILT_IN[group]) <= set(REGISTRIES[group])


def test_no_registered_class_is_missing():
    root = Path(spp_fx.__file__).parent
    registering = {
        ".".join(("spp_fx", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for path in root.rglob("*.py")
        if re.search(r"^@register\(", path.read_text(), re.MULTILINE)
    }
    assert registering == {module for names in BUILT_IN.values() for module in names.values()}
