"""Names of parameters and sites: in the tree of graphs, the layer that owns them, and the sites that users skip."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from spp_fx.errors import UsageError
from spp_fx.sparsity.weights import is_target


def in_model(path: str) -> str:
    """The model's path of one in the tree of graphs, where a module called n times is name, name@1, ..."""
    return re.sub(r"@\d+", "", path)


def layer_of(name: str) -> str | None:
    """The path of the layer that owns a parameter: its name up to the first number, which counts the layers of a stack.

    Layers are identified by paths, not numbers: `model.encoder.layers.3` is not `model.decoder.layers.3`.
    """
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found[0] if found else None


def names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The names of each parameter, in the order of the model; a tied one has several."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found


def without_skipped(
    sites: Iterable[str], skip: Sequence[str], known: Iterable[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The sites that no target of `skip` names, and those that one does, with that reason.

    Args:
        known: other weights that a target may name, which are left alone anyway.

    Raises:
        UsageError: a target names nothing, or all sites are skipped.
    """
    names = list(sites)
    nameable = [*names, *known]
    for target in skip:
        if not any(is_target(name, target) for name in nameable):
            raise UsageError(f"--skip: '{target}' names no site")
    skipped = {
        name: "is excluded by --skip" for name in names if any(is_target(name, target) for target in skip)
    }
    if len(skipped) == len(names):
        raise UsageError("--skip excludes every site, so there is nothing to do")
    return [name for name in names if name not in skipped], skipped
