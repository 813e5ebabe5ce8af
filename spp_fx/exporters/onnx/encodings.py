"""How an ONNX graph stores a weight: as a sparse initializer, as values and codes, or as a dense constant.

`docs/formats.md` describes the three.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from spp_fx.errors import PatternError
from spp_fx.exporters.onnx.graph_parameters import GraphParameter
from spp_fx.exporters.onnx.graph_writer import GraphWriter, bits_of, tensor_bytes
from spp_fx.exporters.onnx.onnx_file import TENSOR_LIMIT, all_graphs, all_nodes
from spp_fx.sparsity.pattern import NM, implies, parse_pattern

IndexType = Literal["int8", "int16", "int32", "int64"]
Indices = Literal["smallest", "int64"]
Bits = npt.NDArray[np.unsignedinteger]

ALIGNMENT = {4: 8, 2: 16, 1: 32}
"""Bytes of an element -> what rows and columns must be multiples of for sparse tensor cores, by NVIDIA's documentation
of structured matrices in cuSPARSELt."""
MAX_GROUP = 16
_CHUNK = 1 << 20  # elements processed at a time


@dataclass(frozen=True)
class Encoded:
    """The encoding of a parameter, for the manifest's records of its sites.

    Attributes:
        layout: `dense` where the format does not encode it.
        nbytes: of its data.
        reason: why it is dense, or another remark.
        swapped: the initializer holds the weight with its last two dimensions swapped.
        negative_zeros: zeros of negative sign that were written as +0.
        details: of each site, in the manifest.
    """

    layout: str
    nbytes: int
    reason: str | None = None
    swapped: bool = False
    negative_zeros: int = 0
    details: dict[str, int | str] = field(default_factory=dict)


class Encoding(ABC):
    """One format's way to put weights into a graph, for one export."""

    layout: str

    def why_dense(self, parameter: GraphParameter) -> str | None:
        """Why a weight stays a plain dense constant; None if it is encoded."""
        return None

    def size(self, parameter: GraphParameter) -> int:
        """Bytes that `encode` will write, known before anything is read."""
        return parameter.nbytes

    def outline(self, parameter: GraphParameter) -> tuple[list[ValueInfoProto], list[NodeProto]]:
        """What `encode` will put into the graph, with its numbers as inputs."""
        return [parameter.value_info], []

    @abstractmethod
    def encode(self, parameter: GraphParameter, weight: Tensor, writer: GraphWriter) -> Encoded:
        """Write a weight, which is in the graph's shape and dtype."""

    def constants(self) -> list[TensorProto]:
        """Initializers that the encoded weights share."""
        return []


@dataclass(frozen=True)
class SparseInitializers(Encoding):
    """Each weight as a sparse initializer; zeros of negative sign are kept as values.

    Attributes:
        indices: type of the positions. 'int64' is what the ONNX standard and its checker require; 'smallest' is
            the smallest signed type that holds the last position, which onnxruntime also loads.
    """

    indices: Indices
    layout: str = "sparse_initializer"

    def why_dense(self, parameter: GraphParameter) -> str | None:
        if parameter.whole and parameter.nnz == parameter.numel:
            return "it holds no zero"
        largest = max(parameter.nbytes, self._count(parameter) * self._index_bytes(parameter))
        if largest >= TENSOR_LIMIT:
            return f"it takes {largest} bytes, onnxruntime and protobuf stop at {TENSOR_LIMIT} for one tensor"
        return None

    def size(self, parameter: GraphParameter) -> int:
        return self._count(parameter) * (parameter.torch_dtype.itemsize + self._index_bytes(parameter))

    def encode(self, parameter: GraphParameter, weight: Tensor, writer: GraphWriter) -> Encoded:
        index_type = index_type_for(weight.numel(), self.indices)
        values, positions = nonzeros(weight, index_type)
        nbytes = writer.add_sparse(parameter.name, parameter.dtype, weight.shape, values, positions)
        return Encoded(self.layout, nbytes, details={"index_type": index_type})

    def _count(self, parameter: GraphParameter) -> int:
        """Stored values, at most: non-zeros of rows that belong to no site were never counted."""
        return parameter.nnz if parameter.whole else parameter.numel

    def _index_bytes(self, parameter: GraphParameter) -> int:
        return np.dtype(index_type_for(parameter.numel, self.indices)).itemsize


def index_type_for(numel: int, indices: Indices = "smallest") -> IndexType:
    """The type of the positions of a tensor of `numel` elements."""
    if indices == "smallest":
        for index_type in ("int8", "int16", "int32"):
            if numel - 1 <= np.iinfo(index_type).max:
                return index_type
    return "int64"


def nonzeros(weight: Tensor, index_type: IndexType) -> tuple[Bits, npt.NDArray[Any]]:
    """The entries of a weight whose bits are not all zero, and their linear positions.

    Returns:
        Values (nnz,) as unsigned integers of the element's width and positions (nnz,), ascending.
    """
    flat = bits_of(weight)
    starts = range(0, flat.size, _CHUNK)
    counts = [int(np.count_nonzero(flat[start : start + _CHUNK])) for start in starts]
    values = np.empty(sum(counts), dtype=flat.dtype)
    positions = np.empty(sum(counts), dtype=index_type)
    at = 0
    for start, count in zip(starts, counts, strict=True):
        found = np.flatnonzero(flat[start : start + _CHUNK])
        values[at : at + count] = flat[start : start + _CHUNK][found]
        positions[at : at + count] = found + start
        at += count
    return values, positions


@dataclass(frozen=True)
class PackedCodes(Encoding):
    """Each N:M weight as values and codes.

    The graph unpacks it with operators that onnxruntime folds at load, from its basic optimisations on, and on
    which onnxruntime, OpenVINO and onnx's ReferenceEvaluator agree. OpenVINO has wrong bit operations, and NonZero
    is never folded.
    """

    layout: str = "nm_codes"
    tables: dict[str, TensorProto] = field(default_factory=dict)

    def why_dense(self, parameter: GraphParameter) -> str | None:
        if parameter.pattern is None:
            return "its rows do not have one pattern"
        pattern = parse_pattern(parameter.pattern)
        if not isinstance(pattern, NM) or pattern.group > MAX_GROUP:
            return f"{pattern} is not packed, only N:M with M up to {MAX_GROUP}"
        if self.size(parameter) >= parameter.nbytes:
            return f"{pattern} in {parameter.nbytes} bytes would grow"
        return None

    def size(self, parameter: GraphParameter) -> int:
        code = _code_of(parameter)
        run_bytes = code.kept * parameter.torch_dtype.itemsize + code.dtype.itemsize
        return parameter.numel // code.entries * run_bytes

    def outline(self, parameter: GraphParameter) -> tuple[list[ValueInfoProto], list[NodeProto]]:
        types = {
            "values": parameter.dtype,
            "codes": _code_of(parameter).onnx_type,
            "runs": TensorProto.INT64,
            "shape": TensorProto.INT64,
        }
        name = parameter.name
        inputs = [helper.make_tensor_value_info(f"{name}.{part}", type, None) for part, type in types.items()]
        return inputs, self._unpack(parameter)

    def encode(self, parameter: GraphParameter, weight: Tensor, writer: GraphWriter) -> Encoded:
        name, code = parameter.name, _code_of(parameter)
        canonical = weight.transpose(-1, -2) if parameter.transposed else weight
        sign = 1 << (8 * weight.itemsize - 1) if weight.is_floating_point() else 0
        values, codes, cleared = encode_groups(code, bits_of(canonical), sign)
        nbytes = writer.add_bits(f"{name}.values", parameter.dtype, values.shape, values)
        nbytes += writer.add_bits(f"{name}.codes", code.onnx_type, codes.shape, codes)
        sizes = [
            numpy_helper.from_array(np.array([len(codes), code.entries]), f"{name}.runs"),
            numpy_helper.from_array(np.array(canonical.shape), f"{name}.shape"),
        ]
        writer.graph.initializer.extend(sizes)
        writer.unpacking.extend(self._unpack(parameter))
        return Encoded(
            self.layout,
            nbytes + sum(map(tensor_bytes, sizes)),
            negative_zeros=cleared,
            details={"pattern": str(code.pattern), "groups_per_code": code.groups},
        )

    def constants(self) -> list[TensorProto]:
        return [*self.tables.values()]

    def _unpack(self, parameter: GraphParameter) -> list[NodeProto]:
        """The nodes that compute a weight from its constants; their table becomes one of `tables`."""
        name, dtype, rank = parameter.name, parameter.dtype, len(parameter.shape)
        code = _code_of(parameter)
        table = f"spp_fx.positions.{code.pattern.kept}_{code.pattern.group}x{code.groups}"
        if table not in self.tables:
            self.tables[table] = numpy_helper.from_array(code.table, table)
        # ConstantOfShape takes bfloat16 only from opset 20 on.
        wide = TensorProto.FLOAT if dtype == TensorProto.BFLOAT16 else dtype
        background = f"{name}.zeros" if wide == dtype else f"{name}.zeros32"
        zero = helper.make_tensor("zero", wide, [1], [0.0])
        chain = [
            helper.make_node("Cast", [f"{name}.codes"], [f"{name}.numbers"], to=TensorProto.INT32),
            helper.make_node("Gather", [table, f"{name}.numbers"], [f"{name}.positions"], axis=0),
            helper.make_node("ConstantOfShape", [f"{name}.runs"], [background], value=zero),
        ]
        if wide != dtype:
            chain.append(helper.make_node("Cast", [background], [f"{name}.zeros"], to=dtype))
        scattered = [f"{name}.zeros", f"{name}.positions", f"{name}.values"]
        chain.append(helper.make_node("ScatterElements", scattered, [f"{name}.grouped"], axis=1))
        last = f"{name}.canonical" if parameter.transposed else name
        chain.append(helper.make_node("Reshape", [f"{name}.grouped", f"{name}.shape"], [last]))
        if parameter.transposed:
            axes = [*range(rank - 2), rank - 1, rank - 2]
            chain.append(helper.make_node("Transpose", [last], [name], perm=axes))
        for node in chain:
            node.name = f"{node.output[0]}.{node.op_type}"
        return chain


@dataclass(frozen=True)
class NMCode:
    """How the kept positions of N:M groups are numbered.

    Attributes:
        pattern: N:M with M <= 16.
        groups: groups that one code stands for.
    """

    pattern: NM
    groups: int

    @property
    def entries(self) -> int:
        """Entries of the dense weight that one code stands for."""
        return self.groups * self.pattern.group

    @property
    def kept(self) -> int:
        """Values that belong to one code."""
        return self.groups * self.pattern.kept

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        choices = math.comb(self.pattern.group, self.pattern.kept) ** self.groups
        return np.dtype(np.uint8 if choices <= 256 else np.uint16)

    @property
    def onnx_type(self) -> int:
        return helper.np_dtype_to_tensor_dtype(self.dtype)

    @cached_property
    def table(self) -> npt.NDArray[np.int32]:
        """(codes, kept) int32: the kept positions in a run, ascending."""
        choices = np.array(list(combinations(range(self.pattern.group), self.pattern.kept)), dtype=np.int32)
        table = choices
        for group in range(1, self.groups):
            # The first group's choice is the lowest digit of the code.
            low = np.tile(table, (len(choices), 1))
            high = np.repeat(choices + group * self.pattern.group, len(table), axis=0)
            table = np.concatenate([low, high], axis=1)
        return table


def code_for(pattern: NM, entries: int) -> NMCode:
    """The shortest code for a weight of `entries` elements in whole groups; M must be at most 16."""
    choices = math.comb(pattern.group, pattern.kept)
    groups = 1
    while choices ** (2 * groups) <= 256 and entries % (2 * groups * pattern.group) == 0:
        groups *= 2
    return NMCode(pattern, groups)


def _code_of(parameter: GraphParameter) -> NMCode:
    pattern = parse_pattern(str(parameter.pattern))
    assert isinstance(pattern, NM)
    return code_for(pattern, parameter.numel)


def encode_groups(code: NMCode, weight: Bits, sign: int) -> tuple[Bits, Bits, int]:
    """Values and codes of an N:M weight.

    Args:
        weight: the elements as unsigned integers of their width, flat, whole groups.
        sign: the bit of the sign, 0 for integers: a zero of negative sign is kept if a position is free.

    Returns:
        Values (runs, kept) of weight's dtype, codes (runs,), and how many negative zeros became +0.

    Raises:
        PatternError: a group keeps more than N; names its first element's index.
    """
    group, kept = code.pattern.group, code.pattern.kept
    runs = weight.size // code.entries
    values = np.empty((runs, code.groups, kept), dtype=weight.dtype)
    codes = np.empty(runs, dtype=code.dtype)
    choices, ranks = _choice_tables(group, kept)
    cleared = 0
    step = max(1, _CHUNK // code.entries)
    for start in range(0, runs, step):
        stop = min(runs, start + step)
        part = weight[start * code.entries : stop * code.entries].reshape(-1, group)
        masks = _masks(part != 0)
        over = np.flatnonzero(np.bitwise_count(masks) > kept)
        if over.size:
            part = part.copy()
            negative = (part[over] == sign) & (sign != 0)
            cleared += int(negative.sum())
            part[over] = np.where(negative, 0, part[over])
            masks[over] = _masks(part[over] != 0)
            worst = over[np.bitwise_count(masks[over]) > kept]
            if worst.size:
                first = start * code.entries + int(worst[0]) * group
                raise PatternError(
                    f"the {group} elements from {first} on keep {int(np.bitwise_count(masks[worst[0]]))}, "
                    f"{code.pattern} allows {kept}"
                )
        rank = ranks[masks]
        values[start:stop] = np.take_along_axis(part, choices[rank], axis=1).reshape(-1, code.groups, kept)
        digits = rank.reshape(-1, code.groups).astype(np.int64)
        codes[start:stop] = (digits * len(choices) ** np.arange(code.groups)).sum(axis=1)
    return values.reshape(runs, code.kept), codes, cleared


def _masks(kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint16]:
    """Kept positions (groups, M) as one integer per group, the first position in the lowest bit."""
    masks = np.zeros(len(kept), dtype=np.uint16)
    for position in range(kept.shape[1]):
        masks |= kept[:, position].astype(np.uint16) << np.uint16(position)
    return masks


@lru_cache(maxsize=8)
def _choice_tables(group: int, kept: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """Choices (C(M, N), N), and the number of the choice that contains each mask (2^M,)."""
    choices = np.array(list(combinations(range(group), kept)), dtype=np.int64)
    number = np.zeros(1 << group, dtype=np.uint16)
    number[(1 << choices).sum(axis=1)] = np.arange(len(choices))
    masks = np.arange(1 << group, dtype=np.uint32)
    for _ in range(kept):  # each mask with fewer positions gets one more: the lowest free one
        short = np.bitwise_count(masks) < kept
        masks = np.where(short, masks | (masks + 1), masks)
    masks = np.where(np.bitwise_count(masks) == kept, masks, 0)
    return choices, number[masks & ((1 << group) - 1)]


@dataclass(frozen=True)
class DenseConstants(Encoding):
    """Each weight as a dense constant, transposed so that its groups run along the product's inner dimension.

    TensorRT looks for the pattern in constants that a MatMul or Gemm reads. Exported graphs transpose a weight
    before its product; those nodes are removed here, before any optimiser changes the graph.
    """

    layout: str = "dense_constant"

    def encode(self, parameter: GraphParameter, weight: Tensor, writer: GraphWriter) -> Encoded:
        name, graph = parameter.name, writer.graph
        readers = _readers(graph, name)
        swapped = weight.ndim == 2 and bool(readers) and all(map(_is_transpose, readers))
        if swapped:
            weight = weight.transpose(0, 1)
            _bypass(graph, readers, name)
            readers = _readers(graph, name)
        nbytes = writer.add(name, weight)
        reason = why_not_sparse(parameter, readers)
        return Encoded(
            self.layout,
            nbytes,
            reason and f"TensorRT runs it dense: {reason}",
            swapped,
            details={"tensorrt": "dense" if reason else "sparse"},
        )


def why_not_sparse(parameter: GraphParameter, readers: list[NodeProto]) -> str | None:
    """Why TensorRT's sparse kernels cannot take a weight; None if they can."""
    if parameter.pattern is None:
        return "its rows do not have one pattern"
    if not implies(parse_pattern(parameter.pattern), NM(2, 4)):
        return f"the pattern is {parameter.pattern}, sparse tensor cores take 2:4"
    others = sorted({node.op_type for node in readers if node.op_type not in ("MatMul", "Gemm")})
    if others or not readers:
        return f"read by {', '.join(others) or 'nothing'}, not by a MatMul or Gemm"
    step = ALIGNMENT.get(parameter.torch_dtype.itemsize)
    if step is None:
        return f"sparse tensor cores do not take {str(parameter.torch_dtype).removeprefix('torch.')}"
    if any(size % step for size in parameter.shape):
        return f"{' x '.join(map(str, parameter.shape))} is not in multiples of {step}"
    return None


def _readers(graph: GraphProto, name: str) -> list[NodeProto]:
    """The nodes that read a value."""
    return [node for node in all_nodes(graph) if name in node.input]


def _is_transpose(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]


def _bypass(graph: GraphProto, transposes: list[NodeProto], name: str) -> None:
    """Let the readers of some transpositions read `name` instead, and remove those."""
    results = {node.output[0] for node in transposes}
    for each in all_graphs(graph):
        for node in [*each.node]:
            for at, value in enumerate(node.input):
                if value in results:
                    node.input[at] = name
            if node.output and node.output[0] in results:
                each.node.remove(node)
