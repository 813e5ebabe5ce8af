"""The numbers of a graph's parameters, read from the model folder one by one, and the sites among them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp_fx.errors import FormatError, MaskError
from spp_fx.exporters.manifest import Part
from spp_fx.exporters.onnx.data import TORCH_TYPES
from spp_fx.exporters.onnx.graph import Graph, GraphParameter
from spp_fx.exporters.source import Source, rounded
from spp_fx.ir.binding import Parameter, Piece, assemble, bind
from spp_fx.ir.model import load_model
from spp_fx.sparsity import LockEntry


@dataclass(frozen=True)
class SparseParameter:
    """A parameter that holds sites: one, or those that it stacks.

    Attributes:
        entries: the lock's entries, each with its place in the parameter.
        whole: every row of the parameter belongs to one of them.
        transposed: the parameter is stored (in, out).
    """

    entries: tuple[tuple[LockEntry, Part], ...]
    whole: bool
    transposed: bool

    @property
    def nnz(self) -> int:
        """Non-zero elements of the sites."""
        return sum(entry.nnz for entry, _ in self.entries)

    @property
    def pattern(self) -> str | None:
        """The pattern of all sites, None where they differ or rows belong to none."""
        patterns = {entry.pattern for entry, _ in self.entries}
        return patterns.pop() if len(patterns) == 1 and self.whole else None


@dataclass(frozen=True)
class GraphParameters:
    """Where the numbers of a graph come from.

    Attributes:
        read: a parameter's numbers, in the shape and dtype of the graph.
        sparse: the parameters that hold sites, by name.
    """

    read: Callable[[GraphParameter], Tensor]
    sparse: dict[str, SparseParameter]


def find_parameters(source: Source, model: PreTrainedModel, graph: Graph) -> GraphParameters:
    """Find the stored tensors of every parameter that a graph reads.

    Args:
        source: the folder, its lock, and the dtype to round to.
        model: the folder's model, as `graph` was made of; a stored tensor is rounded to its parameter's dtype,
            as transformers does when it loads.

    Raises:
        FormatError: the folder holds nothing for a parameter, or numbers that need scales.
        MaskError: a site of the lock is in no parameter of the graph.
    """
    folder = source.folder
    state = model.state_dict(keep_vars=True)
    slots = {name: Parameter(name, tuple(tensor.shape)) for name, tensor in state.items()}
    binding = bind(model, slots, {name: folder.info(name)[1].shape for name in folder.names})
    aliases: dict[int, list[str]] = {}
    for name, tensor in state.items():
        aliases.setdefault(id(tensor), []).append(name)
    pieces: dict[str, tuple[Piece, ...]] = {}
    loaded: dict[str, Tensor] = {}
    for parameter in graph.parameters:
        names = aliases[id(state[parameter.name])]
        found = next((binding.pieces[name] for name in names if name in binding.pieces), None)
        if found is not None:
            pieces[parameter.name] = found
        elif not loaded:
            # Stored in a way that only transformers can undo: it has to, for the whole model at once. It says
            # itself what is missing.
            loaded = load_model(folder.path, trust_remote_code=source.trust_remote_code).state_dict()

    sparse = _sites(source, pieces)

    def read(parameter: GraphParameter) -> Tensor:
        if parameter.name in pieces:
            value = assemble(pieces[parameter.name], parameter.shape, folder.read)
        else:
            value = loaded[parameter.name]
        return _converted(parameter, value, folder.path.name, keep=parameter.name in sparse)

    return GraphParameters(read, sparse)


def _converted(parameter: GraphParameter, value: Tensor, where: str, *, keep: bool) -> Tensor:
    dtype = TORCH_TYPES[parameter.dtype]
    if value.dtype == dtype:
        return value
    if not dtype.is_floating_point:
        return value.to(dtype)
    if not value.is_floating_point() or value.itemsize < 2:
        raise FormatError(
            f"{where}: {parameter.name} is stored as {value.dtype}, which means nothing without its scales; "
            "decompress the model first"
        )
    return rounded(parameter.name, value, dtype, keep=keep)


def _sites(source: Source, pieces: dict[str, tuple[Piece, ...]]) -> dict[str, SparseParameter]:
    entries = source.lock.by_name()
    placed: set[str] = set()
    sparse: dict[str, SparseParameter] = {}
    for name, parts in pieces.items():
        found: dict[str, tuple[LockEntry, Part]] = {}
        locked = 0
        for piece in parts:
            entry = entries.get(piece.tensor)
            if entry is None:
                continue
            locked += 1
            stacked = piece.expert is not None and not piece.whole
            part = Part(initializer=name)
            if stacked:
                part = Part(initializer=name, expert=piece.expert, start=piece.start, stop=piece.stop)
            found[entry.name] = (entry, part)
        if found:
            placed.update(found)
            transposed = next(iter(found.values()))[0].transposed
            sparse[name] = SparseParameter(tuple(found.values()), locked == len(parts), transposed)
    missing = [name for name in entries if name not in placed]
    if missing:
        raise MaskError(
            f"{missing[0]} and {len(missing) - 1} more of the lock's {len(entries)} sites cannot be exported to "
            "onnx: the graph reads no parameter that is stored under that name"
        )
    return sparse


def dtype_of(parameter: GraphParameter) -> torch.dtype:
    """The torch dtype of a parameter in the graph."""
    return TORCH_TYPES[parameter.dtype]
