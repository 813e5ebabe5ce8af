"""What a model folder says of compressed weights: in config.json, and by the names of its tensors."""

from collections.abc import Mapping
from typing import Any

from spp_fx.checkpoint import ModelFolder

PLACES = ("quantization_config", "compression_config")
"""Objects of config.json that may hold a sparsity_config; config.json itself may, too."""


def sparsity_configs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every sparsity_config of a config.json, by where it stands."""
    found = {"sparsity_config": config["sparsity_config"]} if config.get("sparsity_config") else {}
    for place in PLACES:
        nested = config.get(place)
        if isinstance(nested, dict) and nested.get("sparsity_config"):
            found[f"{place}.sparsity_config"] = nested["sparsity_config"]
    return found


def without_sparsity(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.json without any sparsity_config, and what was taken out.

    What is left of a quantization_config goes too where it is compressed-tensors' and quantizes nothing: a
    reader would look for what it announces.
    """
    plain, removed = dict(config), list(sparsity_configs(config))
    plain.pop("sparsity_config", None)
    for place in PLACES:
        nested = config.get(place)
        if not isinstance(nested, dict) or "sparsity_config" not in nested:
            continue
        rest = {key: value for key, value in nested.items() if key != "sparsity_config"}
        quantizes = rest.get("config_groups") or rest.get("kv_cache_scheme")
        if quantizes or rest.get("quant_method", "compressed-tensors") != "compressed-tensors":
            plain[place] = rest
        else:
            del plain[place]
            removed.append(f"{place}, which says nothing else")
    return plain, removed


def is_legacy(folder: ModelFolder) -> bool:
    """Whether a folder holds compressed weights, or its config.json says so."""
    return bool(layers(folder)) or bool(sparsity_configs(folder.config))


def layers(folder: ModelFolder) -> list[str]:
    """The names L of compressed weights in a folder, sorted."""
    suffixes = (".compressed", ".bitmask")
    return sorted({name.rpartition(".")[0] for name in folder.names if name.endswith(suffixes)})
