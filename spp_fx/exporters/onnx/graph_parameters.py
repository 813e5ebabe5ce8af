"""The numbers of a graph's parameters, read from the model folder one by one, and the sites in them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp_fx.errors import FormatError, MaskError
from spp_fx.exporters.format import Source, rounded
from spp_fx.exporters.manifest import Part
from spp_fx.graph.binding import Parameter, StoredMatrix, assemble, bind, find_targets
from spp_fx.graph.model import load_model
from spp_fx.graph.sizes import ANY_SIZES, Sizes
from spp_fx.sparsity.lock import LockEntry


@dataclass(frozen=True)
class GraphParameter:
    """A parameter or persistent buffer that the graph reads, and the sites in it: one, or those that it stacks.

    Attributes:
        name: its first name in the model, and its name in the graph.
        shape: as the model has it.
        dtype: ONNX data type.
        entries: the lock's entries, each with its part of the parameter.
        whole: every row of the parameter belongs to one of the entries.
        transposed: the parameter is stored (in, out).
    """

    name: str
    shape: tuple[int, ...]
    dtype: int
    entries: tuple[tuple[LockEntry, Part], ...] = ()
    whole: bool = False
    transposed: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return to_torch_dtype(ir.DataType(self.dtype))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize

    @property
    def value_info(self) -> onnx.ValueInfoProto:
        """The parameter as an input of a graph."""
        return onnx.helper.make_tensor_value_info(self.name, self.dtype, self.shape)

    @property
    def nnz(self) -> int:
        """Non-zero elements of the sites."""
        return sum(entry.nnz for entry, _ in self.entries)

    @property
    def pattern(self) -> str | None:
        """The pattern of all sites, None if they differ or rows belong to none."""
        patterns = {entry.pattern for entry, _ in self.entries}
        return patterns.pop() if len(patterns) == 1 and self.whole else None


@dataclass(frozen=True)
class Graph:
    """An ONNX graph, and the parameters that are still to be put into it.

    Attributes:
        proto: the model with the exporter's small constants (shapes, axes, computed buffers) and none of its
            parameters. It contains no stack traces or file names of the exporting machine.
        parameters: what is missing, in the graph's order.
        reached: names of the parameters and persistent buffers that the outputs depend on according to
            torch.export: those of `parameters`, unless torch.onnx lost one.
        bfloat16: whether most of the model's weights are bfloat16.
        sizes: what the graph computes the model's outputs for; with a cache, all that torch.export can name.
        rows: the batch size, where the model's code fixes it; else None.
    """

    proto: onnx.ModelProto
    parameters: tuple[GraphParameter, ...]
    reached: frozenset[str]
    bfloat16: bool
    sizes: Sizes = ANY_SIZES
    rows: int | None = None


@dataclass(frozen=True)
class GraphParameters:
    """Where the numbers of a graph are.

    Attributes:
        all: the graph's parameters in its order, with the lock's entries in them.
        left_out: a line for each reason why stored tensors are not in the graph.
    """

    source: Source
    all: tuple[GraphParameter, ...]
    left_out: tuple[str, ...]
    _matrices: Mapping[str, tuple[StoredMatrix, ...]]
    _loaded: Mapping[str, Tensor]

    @property
    def sparse(self) -> list[GraphParameter]:
        return [parameter for parameter in self.all if parameter.entries]

    def read(self, parameter: GraphParameter) -> Tensor:
        """A parameter's numbers, in the shape and dtype of the graph.

        Raises:
            FormatError: they are of a quantized type that has no meaning without its scales.
            MaskError: a value is too large for the dtype.
        """
        name, dtype, folder = parameter.name, parameter.torch_dtype, self.source.folder
        if name in self._matrices:
            value = assemble(self._matrices[name], parameter.shape, folder.read)
        else:
            value = self._loaded[name]
        if value.dtype == dtype:
            return value
        if not dtype.is_floating_point:
            return value.to(dtype)
        if not value.is_floating_point() or value.itemsize < 2:
            raise FormatError(
                f"{folder.path.name}: {name} is stored as {value.dtype}, which means nothing without its scales; "
                "decompress the model first"
            )
        return rounded(name, value, dtype, keep=bool(parameter.entries))


def find_parameters(source: Source, model: PreTrainedModel, graph: Graph) -> GraphParameters:
    """Find the stored tensors of every parameter that a graph reads.

    Args:
        model: the folder's model that `graph` was exported from; a stored tensor is rounded to its parameter's
            dtype, as transformers does when it loads.

    Raises:
        FormatError: the folder holds nothing for a parameter, or a floating tensor that neither transformers
            nor the graph reads.
        MaskError: a site of the lock is in no parameter of the graph.
    """
    folder = source.folder
    left_out = _left_out(source, model, graph)
    state = model.state_dict(keep_vars=True)
    slots = {name: Parameter(name, tuple(tensor.shape)) for name, tensor in state.items()}
    binding = bind(model, slots, {name: folder.info(name)[1].shape for name in folder.names})
    aliases: dict[int, list[str]] = {}
    for name, tensor in state.items():
        aliases.setdefault(id(tensor), []).append(name)
    matrices: dict[str, tuple[StoredMatrix, ...]] = {}
    loaded: dict[str, Tensor] = {}
    for parameter in graph.parameters:
        names = aliases[id(state[parameter.name])]
        found = next((binding.matrices[name] for name in names if name in binding.matrices), None)
        if found is not None:
            matrices[parameter.name] = found
        elif not loaded:
            # Only transformers can convert how it is stored, for the whole model at once. It also reports
            # what is missing.
            loaded = load_model(folder.path, trust_remote_code=source.trust_remote_code).state_dict()
    entries = source.lock.by_name()
    parameters = tuple(_with_sites(each, matrices.get(each.name, ()), entries) for each in graph.parameters)
    found = {entry.name for parameter in parameters for entry, _ in parameter.entries}
    missing = [name for name in entries if name not in found]
    together = {each.tensor for stored in matrices.values() for each in stored if each.offset is not None}
    if shared := together.intersection(missing):
        raise MaskError(
            f"{min(shared)} and {len(shared) - 1} more of the lock's {len(entries)} sites cannot be exported to onnx: "
            "the graph has their rows as several weights, and a lock is of one"
        )
    if missing:
        raise MaskError(
            f"{missing[0]} and {len(missing) - 1} more of the lock's {len(entries)} sites cannot be exported to "
            "onnx: the graph reads no parameter that is stored under that name"
        )
    return GraphParameters(source, parameters, left_out, matrices, loaded)


def _with_sites(
    parameter: GraphParameter, stored: Sequence[StoredMatrix], entries: Mapping[str, LockEntry]
) -> GraphParameter:
    """A parameter that is made of stored matrices, with the lock's entries of these."""
    parts: dict[str, tuple[LockEntry, Part]] = {}
    locked = [matrix for matrix in stored if matrix.tensor in entries and matrix.offset is None]
    for matrix in locked:
        part = Part(initializer=parameter.name)
        if not matrix.whole and (matrix.expert is not None or len(stored) > 1):
            part = Part(
                initializer=parameter.name, expert=matrix.expert, start=matrix.start, stop=matrix.stop
            )
        parts[matrix.tensor] = entries[matrix.tensor], part
    return replace(
        parameter,
        entries=tuple(parts.values()),
        whole=len(locked) == len(stored),
        transposed=bool(locked) and entries[locked[0].tensor].transposed,
    )


def _left_out(source: Source, model: PreTrainedModel, graph: Graph) -> tuple[str, ...]:
    """Account for every stored floating tensor: the graph reads it, or there is a reason why not.

    The graph computes what transformers computes from the folder. It may lack what transformers does not load
    and what the outputs do not depend on. A tensor that neither reads shows that the weights belong to another
    config.json.
    """
    folder, state = source.folder, model.state_dict(keep_vars=True)
    held = {id(state[parameter.name]) for parameter in graph.parameters}
    reached = {id(state[name]) for name in graph.reached}
    lost: list[str] = []
    idle: list[str] = []
    unloaded: dict[str, list[str]] = {}  # a name that the model does not have -> the stored tensors
    for name, (target, _) in find_targets(model, folder.names).items():
        if not folder.info(name)[1].dtype.startswith(("F", "BF")):
            continue
        if target not in state:
            unloaded.setdefault(target, []).append(name)
        elif id(state[target]) not in held:
            (lost if id(state[target]) in reached else idle).append(name)
    if lost:
        raise FormatError(
            f"{folder.path}: the ONNX exporter lost {_named(lost)}, which transformers loads and the outputs depend "
            "on; please report it"
        )
    unexpected = _unexpected(model, unloaded.keys())
    beyond = {target for target in unexpected if _beyond_layers(model, target)}
    unread = [name for target in sorted(unexpected - beyond) for name in unloaded[target]]
    quantized = "quantization_config" in folder.config
    if unread and not quantized:
        raise FormatError(
            f"{folder.path}: neither transformers nor the graph reads {_named(unread)}; config.json is not that "
            "of these weights, or the tensors are left over: correct it, or remove them"
        )
    ignored = [name for target in sorted(unloaded.keys() - unexpected) for name in unloaded[target]]
    extra = [name for target in sorted(beyond) for name in unloaded[target]]
    reasons = {
        "transformers reads them as its quantization_config says": unread,
        "transformers computes or ignores them": ignored,
        "they belong to layers beyond those of config.json, which transformers does not load": extra,
        "the outputs do not depend on them": idle,
    }
    return tuple(f"not in the graph: {_named(names)}: {why}" for why, names in reasons.items() if names)


def _unexpected(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Of names that a model does not have, those that transformers reports and does not ignore on purpose."""
    computed = {name for name, _ in model.named_buffers()}
    found = SimpleNamespace(missing_keys=set[str](), unexpected_keys=set(names) - computed)
    model._adjust_missing_and_unexpected_keys(found)  # type: ignore[arg-type]
    return found.unexpected_keys


def _beyond_layers(model: PreTrainedModel, name: str) -> bool:
    """Whether a name has an index past the end of one of the model's lists of layers."""
    modules = dict(model.named_modules())
    parts = name.split(".")
    for at in (at for at, part in enumerate(parts) if part.isdecimal()):
        path = ".".join(parts[:at])
        layers = modules.get(path, modules.get(f"{model.base_model_prefix}.{path}"))
        if isinstance(layers, nn.ModuleList) and int(parts[at]) >= len(layers):
            return True
    return False


def _named(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
