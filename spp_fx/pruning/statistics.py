"""Statistics of the inputs of a weight, and collecting them while a layer runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from spp_fx.errors import PatternError
from spp_fx.graph.leaves import held, held_sites, run_leaf, site_inputs
from spp_fx.graph.program import SITE, Program, Site
from spp_fx.pruning.select import row_blocks

BLOCK_ELEMENTS = 1 << 22
KEPT_TOKENS = 512
"""Tokens whose inputs are kept, spread over the samples, to measure the output error of pruning."""


class Inputs:
    """Sums over the calibration tokens' inputs x (features,) of one matrix.

    Attributes:
        features: n.
        samples, tokens: how many were added.
        hessian: 2/samples times the sum of x x^T, (n, n) float32, where it was asked for.
    """

    def __init__(
        self, features: int, *, hessian: bool = False, samples: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.features = features
        self.samples = 0
        self.tokens = 0
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.hessian = torch.zeros(features, features, device=device) if hessian else None
        self._kept: list[Tensor] = []
        self._keep = max(1, KEPT_TOKENS // samples)

    def add(self, x: Tensor) -> None:
        """Add the tokens of one sample.

        Args:
            x: (tokens, features) of any floating dtype.

        Raises:
            PatternError: an input is NaN or infinite.
        """
        count = self.samples + 1
        past = self.samples / count
        for part in x.split(max(1, BLOCK_ELEMENTS // max(1, self.features))):
            part = part.float()
            self._sum += part.sum(0)
            self._squares += part.square().sum(0)
            if self.hessian is not None:
                self.hessian.addmm_(part.t(), part, beta=past, alpha=2 / count)
                past = 1.0
        places = torch.linspace(0, len(x) - 1, min(self._keep, len(x)), device=x.device).long()
        self._finish(len(x), x[places])

    def add_parts(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the tokens of one sample of which each part has some features alone; their others are 0.

        Args:
            parts: inputs (tokens, some features) of any floating dtype, and which features they are, integers.

        Raises:
            PatternError: an input is NaN or infinite.
        """
        in_order = torch.arange(self.features)
        if all(torch.equal(columns.cpu().long(), in_order) for _, columns in parts):
            none = torch.empty(0, self.features, device=self._sum.device)
            self.add(torch.cat([x for x, _ in parts]) if parts else none)
            return
        if self.hessian is not None:
            self.hessian *= self.samples / (self.samples + 1)
        keep = max(1, self._keep // len(parts))
        kept: list[Tensor] = []
        for x, columns in parts:
            own, at = x.float(), columns.long()
            self._sum[at] += own.sum(0)
            self._squares[at] += own.square().sum(0)
            if self.hessian is not None:
                self.hessian[at[:, None], at] += own.t() @ own * (2 / (self.samples + 1))
            kept.append(x.new_zeros(len(x[:keep]), self.features).index_copy_(1, at, x[:keep]))
        self._finish(sum(len(x) for x, _ in parts), torch.cat(kept))

    def _finish(self, tokens: int, kept: Tensor) -> None:
        if not bool(self._squares.isfinite().all()):
            raise PatternError(f"its inputs are NaN or infinite in calibration sample {self.samples + 1}")
        self.samples += 1
        self.tokens += tokens
        self._kept.append(kept)

    @property
    def norms(self) -> Tensor:
        """(n,) float32: the root of the mean over samples of the sum of squares."""
        return (self._squares / max(1, self.samples)).sqrt().float()

    @property
    def mean(self) -> Tensor:
        """(n,) float32: over tokens."""
        return (self._sum / max(1, self.tokens)).float()

    @property
    def variance(self) -> Tensor:
        """(n,) float32: over tokens, of the whole population."""
        count = max(1, self.tokens)
        return (self._squares / count - (self._sum / count).square()).clamp_min(0).float()

    @property
    def dead(self) -> int:
        """How many inputs were 0 in every token."""
        return int((self._squares == 0).sum())

    @property
    def kept(self) -> Tensor:
        """(tokens, n): some of the inputs themselves, spread over the samples."""
        if not self._kept:
            return torch.empty(0, self.features)
        self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    def reorder(self, order: Tensor) -> None:
        """Take the inputs in another order: the new i-th is the old order[i]-th."""
        self._sum, self._squares = self._sum[order], self._squares[order]
        self._kept = [self.kept[:, order]]
        if self.hessian is not None:
            self.hessian = self.hessian[order][:, order]


def output_energy(
    x: Tensor, weight: Tensor, *, minus: Tensor | None = None, without: Tensor | None = None
) -> float:
    """The squared norm of X D^T in blocks of rows of D.

    Args:
        x: (tokens, n).
        weight: D (m, n), unless one of the following is given.
        minus: another weight V: D = W - V.
        without: a mask: D is W outside of it.
    """
    total, x = 0.0, x.float()
    for part, other, mask in row_blocks(
        weight, weight if minus is None else minus, weight if without is None else without
    ):
        block = part.float() if minus is None else part.float() - other.float()
        if without is not None:
            block = block.masked_fill(mask, 0)
        total += float((x @ block.t()).double().square().sum())
    return total


InputsBySite = dict[tuple[str, int], Inputs]
"""By the site's name and the expert, which is 0 where it is a plain matrix."""


def observed(program: Program, sites: Iterable[str]) -> dict[str, Site]:
    """Sites by each name of their weights, which is several where layers share one: its inputs are those of all."""
    found: dict[str, Site] = {}
    for name in sites:
        names = [each for each in program.names_of(name) if each in program.sites]
        uses = sum(program.sites[each].uses for each in names)
        found |= dict.fromkeys(names, replace(program.sites[name], uses=uses))
    return found


class Observer:
    """`Inputs` of the sites of one layer; sites that read the same tensor share them.

    Args:
        sites: by the name that marks their nodes, see `observed`.
    """

    def __init__(
        self, sites: Mapping[str, Site], *, hessian: bool, samples: int, device: torch.device
    ) -> None:
        self.inputs: InputsBySite = {}
        self._sites = sites
        self._options: dict[str, Any] = {"hessian": hessian, "samples": samples, "device": device}
        self._readers = WeakTensorKeyDictionary()
        self._followers: set[str] = set()

    def __call__(self, node: fx.Node, arguments: tuple[Any, ...]) -> None:
        if node.target is run_leaf:
            self._add_leaf(node, arguments)
            return
        if node.target is held:
            return
        site = self._sites.get(node.meta[SITE])
        if site is None or site.name in self._followers:
            return
        name = site.name
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

    def _add_leaf(self, node: fx.Node, arguments: tuple[Any, ...]) -> None:
        marks = [name for name in held_sites(node).values() if name in self._sites]
        found = site_inputs(node, arguments) if marks else {}
        for mark, site in ((name, self._sites[name]) for name in marks):
            for expert in range(site.shape[0] if site.kind == "experts" else 1):
                try:
                    self._of(site, expert).add_parts(found.get((mark, expert), []))
                except PatternError as error:
                    raise PatternError(f"{site.name}: {error}") from error

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
            raise PatternError(
                f"its experts are run by {node.target}, whose inputs cannot be separated by expert"
            )
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
