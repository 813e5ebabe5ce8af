"""Running exported models with Hugging Face: `load`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spp_fx.runtime.loader import load
    from spp_fx.runtime.trust import PackWarning, SiteForm

# Imported on first use: transformers takes seconds to import, and the checks of packs need torch alone.
_HOMES = {
    "PackWarning": "spp_fx.runtime.trust",
    "SiteForm": "spp_fx.runtime.trust",
    "load": "spp_fx.runtime.loader",
}

__all__ = ["PackWarning", "SiteForm", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spp_fx.runtime' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
