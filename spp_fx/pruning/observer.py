"""Collecting the inputs of a layer's sites while it runs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from spp_fx.errors import PatternError
from spp_fx.ir.program import SITE
from spp_fx.ir.site import Site
from spp_fx.pruning.inputs import Inputs

InputsBySite = dict[tuple[str, int], Inputs]
"""By the site's name and the expert, which is 0 where it is a plain matrix."""


class Observer:
    """`Inputs` of the sites of one layer; sites that read the same tensor share them."""

    def __init__(
        self, sites: Mapping[str, Site], *, hessian: bool, samples: int, device: torch.device
    ) -> None:
        self.inputs: InputsBySite = {}
        self._sites = sites
        self._options: dict[str, Any] = {"hessian": hessian, "samples": samples, "device": device}
        self._readers = WeakTensorKeyDictionary()
        self._followers: set[str] = set()

    def __call__(self, node: fx.Node, arguments: tuple[Any, ...]) -> None:
        name = node.meta[SITE]
        if name not in self._sites or name in self._followers:
            return
        site = self._sites[name]
        try:
            if site.kind == "experts":
                self._add_experts(site, node, arguments)
            else:
                self._add(site, arguments[0])
        except PatternError as error:
            raise PatternError(f"{name}: {error}") from error

    def _add(self, site: Site, x: Tensor) -> None:
        """Sites of the first sample that read the same tensor are found by its identity."""
        if (site.name, 0) not in self.inputs and site.uses == 1:
            leader: tuple[Inputs, int] | None = self._readers.get(x)
            if leader is not None and leader[1] == x._version:
                self.inputs[site.name, 0] = leader[0]
                self._followers.add(site.name)
                return
        inputs = self._of(site, 0)
        if site.uses == 1:
            self._readers[x] = (inputs, x._version)
        inputs.add(x.detach().reshape(-1, site.in_features))

    def _add_experts(self, site: Site, node: fx.Node, arguments: tuple[Any, ...]) -> None:
        experts = site.shape[0]
        if len(arguments) > 2 and isinstance(arguments[2], Tensor) and arguments[2].numel() == experts:
            x, ends = arguments[0], arguments[2].tolist()  # a grouped product: tokens sorted by expert
            parts = [x[start:stop] for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
        elif len(arguments) == 2 and _is_weight(node.args[1]):
            parts = list(arguments[0])  # a batched product: every expert sees rows of its own
        elif len(arguments) == 2 and _is_weight(node.args[0]):
            parts = list(arguments[1].transpose(-1, -2))
        else:
            raise PatternError(f"its experts are run by {node.target}, whose inputs cannot be told apart")
        for expert, part in enumerate(parts):
            self._of(site, expert).add(part.detach().reshape(-1, site.in_features))

    def _of(self, site: Site, expert: int) -> Inputs:
        if (site.name, expert) not in self.inputs:
            self.inputs[site.name, expert] = Inputs(site.in_features, **self._options)
        return self.inputs[site.name, expert]


def _is_weight(node: Any) -> bool:
    """Whether a node is a whole stack, possibly transposed: one that is gathered by token is none."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"
