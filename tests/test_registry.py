"""Built-in classes are found by their decorators; a new file is enough to add one."""

import sys

import pytest

from spp_fx.adapters.method import METHODS
from spp_fx.errors import UsageError
from spp_fx.exporters.format import FORMATS
from spp_fx.passes.base import PASSES
from spp_fx.pruning.criterion import CRITERIA
from spp_fx.registry import Registry

BUILT_IN = {
    "methods": (METHODS, 2),
    "criteria": (CRITERIA, 4),
    "formats": (FORMATS, 7),
    "passes": (PASSES, 11),
}


@pytest.mark.parametrize(("registry", "count"), BUILT_IN.values(), ids=BUILT_IN)
def test_every_name_is_registered_by_its_module(registry, count):
    assert len(registry.built_in) >= count
    for name, module in registry.built_in.items():
        assert registry.find(name).__module__ == module
        assert registry.find(name).name == name
    assert set(registry.built_in) <= set(registry)


def test_a_new_file_is_found_and_no_other_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "broken.py").write_text("raise RuntimeError('imported for nothing')\n")
    (package / "new.py").write_text(
        "from dataclasses import dataclass\n"
        "from made_up.here import register\n\n\n"
        '@register("brand-new")\n@dataclass\nclass New:\n    pass\n'
    )
    (package / "here.py").write_text(
        "from spp_fx.registry import Registry, naming\n\n"
        'THINGS = Registry("thing", "made_up.things", "made_up")\nregister = naming(THINGS)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry = Registry("thing", "made_up.things", "made_up")
    assert registry.built_in == {"brand-new": "made_up.new"}
    from made_up.here import THINGS

    assert THINGS.find("brand-new").__name__ == "New"
    assert list(THINGS) == ["brand-new"]
    with pytest.raises(UsageError, match=r"unknown thing 'old'; known: brand-new\. If"):
        THINGS.find("old")
    with pytest.raises(UsageError, match=r"known: brand-new; did you mean brand-new\?"):
        THINGS.find("brandnew")
    assert "made_up.broken" not in sys.modules
