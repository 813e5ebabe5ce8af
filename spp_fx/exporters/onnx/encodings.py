"""What one weight becomes in an ONNX graph: a dense constant, a sparse initializer, or values and codes.

onnx: a SparseTensorProto holds the non-zero values and their linear (row-major) positions. onnxruntime makes it
dense when it loads the model, so it saves space on disk only, and only where enough is zero: a 16-bit model at
2:4 grows. Zeros of negative sign are kept as values.

onnx-packed: a weight NAME of pattern N:M becomes the constants NAME.values (runs, kept), NAME.codes (runs,) and
a table of positions for each pattern, `spp_fx.positions.*`. A group of M entries that keeps N has C(M, N)
choices (6 for 2:4, 70 for 4:8, 12,870 for 8:16); a code is the number of the choice. Where the choices of several
groups fit one byte they share it: a code stands for a run of groups, and its table row lists the kept positions
of the run, ascending. Groups with fewer entries keep zeros in the first free positions. The graph computes

    NAME = Reshape(ScatterElements(zeros, Gather(table, Cast(codes)), values, axis=1), shape)

with a Transpose behind it where the model stores the weight (in, out). onnxruntime computes that once when
it loads, from its basic optimisations on. onnxruntime, OpenVINO and the ReferenceEvaluator of the onnx package
all execute these operators alike (OpenVINO has wrong bit operations, and NonZero is never folded).

onnx-dense: TensorRT (--sparsity=enable) finds the pattern itself, in constants that a MatMul or Gemm reads.
Exported graphs have a Transpose between weight and product; here the constant is written transposed instead, so
that groups run along the product's inner dimension before any optimiser has changed the graph.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, SparseTensorProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from spp_fx.errors import PatternError
from spp_fx.exporters.onnx.graph_parameters import SparseParameter
from spp_fx.exporters.onnx.onnx_file import TENSOR_LIMIT
from spp_fx.exporters.onnx.tensor_data import TYPES, append, append_tensor, bits_of, tensor_bytes
from spp_fx.sparsity.pattern import NM, implies, parse_pattern

IndexType = Literal["int8", "int16", "int32", "int64"]
Indices = Literal["smallest", "int64"]
Bits = npt.NDArray[np.unsignedinteger]

ALIGNMENT = {4: 8, 2: 16, 1: 32}
"""Bytes of an element -> what rows and columns must be multiples of for sparse tensor cores: what NVIDIA's
documentation of cuSPARSELt asks of a structured matrix."""
MAX_GROUP = 16
_CHUNK = 1 << 20  # elements processed at a time


@dataclass(frozen=True)
class Encoded:
    """A weight as a graph holds it.

    Attributes:
        layout: of its sites, for the manifest; `dense` where the format does not encode it.
        nbytes: of its data.
        reason: why it is dense, or another remark for the manifest.
        tensors: its dense initializers.
        sparse: its sparse initializer.
        nodes: what computes it from the initializers; the last output has the weight's name.
        swapped: the initializer holds the weight with its last two dimensions swapped.
        negative_zeros: zeros of negative sign that were written as +0.
        details: what else the manifest says of each of its sites.
    """

    layout: str
    nbytes: int
    reason: str | None = None
    tensors: tuple[TensorProto, ...] = ()
    sparse: SparseTensorProto | None = None
    nodes: tuple[NodeProto, ...] = ()
    swapped: bool = False
    negative_zeros: int = 0
    details: dict[str, int | str] = field(default_factory=dict)


class Encoding(ABC):
    """One format's way to put weights into a graph, for one export."""

    layout: str

    def why_dense(self, sites: SparseParameter) -> str | None:
        """Why a weight stays a plain dense constant; None if it is encoded."""
        return None

    def size(self, sites: SparseParameter) -> int:
        """Bytes that `encode` will write, known before anything is read."""
        return sites.parameter.nbytes

    def outline(self, sites: SparseParameter) -> tuple[list[ValueInfoProto], list[NodeProto]]:
        """What `encode` will put into the graph, with its numbers as inputs."""
        return [sites.parameter.value_info], []

    @abstractmethod
    def encode(self, sites: SparseParameter, weight: Tensor, file: BinaryIO) -> Encoded:
        """Append a weight (in the graph's shape and dtype) to the data file."""

    def constants(self) -> tuple[TensorProto, ...]:
        """Initializers that the encoded weights share."""
        return ()


def dense(name: str, weight: Tensor, file: BinaryIO, reason: str | None) -> Encoded:
    """A weight as a plain dense constant."""
    return Encoded("dense", weight.nbytes, reason, (append_tensor(file, name, weight),))


@dataclass(frozen=True)
class SparseInitializers(Encoding):
    """Each weight as a sparse initializer.

    Attributes:
        indices: type of the positions. 'int64' is what the ONNX standard and its checker require; 'smallest' is
            the smallest signed type that holds the last position, which onnxruntime also loads.
    """

    indices: Indices
    layout: str = "sparse_initializer"

    def why_dense(self, sites: SparseParameter) -> str | None:
        if sites.whole and sites.nnz == sites.parameter.numel:
            return "it holds no zero"
        largest = max(sites.parameter.nbytes, self._count(sites) * self._index_bytes(sites))
        if largest >= TENSOR_LIMIT:
            return f"it takes {largest} bytes, onnxruntime and protobuf stop at {TENSOR_LIMIT} for one tensor"
        return None

    def size(self, sites: SparseParameter) -> int:
        return self._count(sites) * (sites.parameter.torch_dtype.itemsize + self._index_bytes(sites))

    def encode(self, sites: SparseParameter, weight: Tensor, file: BinaryIO) -> Encoded:
        index_type = index_type_for(weight.numel(), self.indices)
        values, positions = nonzeros(weight, index_type)
        sparse = SparseTensorProto(
            dims=weight.shape,
            values=append(file, sites.parameter.name, TYPES[weight.dtype], [len(values)], values),
            indices=append(
                file, "", helper.np_dtype_to_tensor_dtype(positions.dtype), [len(positions)], positions
            ),
        )
        details: dict[str, int | str] = {"index_type": index_type}
        return Encoded(self.layout, values.nbytes + positions.nbytes, sparse=sparse, details=details)

    def _count(self, sites: SparseParameter) -> int:
        """Stored values, at most: non-zeros of rows that belong to no site were never counted."""
        return sites.nnz if sites.whole else sites.parameter.numel

    def _index_bytes(self, sites: SparseParameter) -> int:
        return np.dtype(index_type_for(sites.parameter.numel, self.indices)).itemsize


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
    """Each N:M weight as values and codes."""

    layout: str = "nm_codes"
    tables: dict[str, TensorProto] = field(default_factory=dict)

    def why_dense(self, sites: SparseParameter) -> str | None:
        if sites.pattern is None:
            return "its rows do not have one pattern"
        pattern = parse_pattern(sites.pattern)
        if not isinstance(pattern, NM) or pattern.group > MAX_GROUP:
            return f"{pattern} is not packed, only N:M with M up to {MAX_GROUP}"
        if self.size(sites) >= sites.parameter.nbytes:
            return f"{pattern} in {sites.parameter.nbytes} bytes would grow"
        return None

    def size(self, sites: SparseParameter) -> int:
        code = _code_of(sites)
        run_bytes = code.kept * sites.parameter.torch_dtype.itemsize + code.dtype.itemsize
        return sites.parameter.numel // code.entries * run_bytes

    def outline(self, sites: SparseParameter) -> tuple[list[ValueInfoProto], list[NodeProto]]:
        types = {
            "values": sites.parameter.dtype,
            "codes": helper.np_dtype_to_tensor_dtype(_code_of(sites).dtype),
            "runs": TensorProto.INT64,
            "shape": TensorProto.INT64,
        }
        name = sites.parameter.name
        inputs = [helper.make_tensor_value_info(f"{name}.{part}", type, None) for part, type in types.items()]
        return inputs, self._unpack(sites)

    def encode(self, sites: SparseParameter, weight: Tensor, file: BinaryIO) -> Encoded:
        name, code = sites.parameter.name, _code_of(sites)
        canonical = weight.transpose(-1, -2) if sites.transposed else weight
        sign = 1 << (8 * weight.itemsize - 1) if weight.is_floating_point() else 0
        values, codes, cleared = encode_groups(code, bits_of(canonical), sign)
        code_type = helper.np_dtype_to_tensor_dtype(codes.dtype)
        tensors = (
            append(file, f"{name}.values", TYPES[weight.dtype], values.shape, values),
            append(file, f"{name}.codes", code_type, codes.shape, codes),
            numpy_helper.from_array(np.array([len(codes), code.entries]), f"{name}.runs"),
            numpy_helper.from_array(np.array(canonical.shape), f"{name}.shape"),
        )
        return Encoded(
            self.layout,
            sum(tensor_bytes(tensor) for tensor in tensors),
            tensors=tensors,
            nodes=tuple(self._unpack(sites)),
            negative_zeros=cleared,
            details={"pattern": str(code.pattern), "groups_per_code": code.groups},
        )

    def constants(self) -> tuple[TensorProto, ...]:
        return tuple(self.tables.values())

    def _unpack(self, sites: SparseParameter) -> list[NodeProto]:
        """The nodes that compute a weight from its constants; their table becomes one of `tables`."""
        name, dtype, rank = sites.parameter.name, sites.parameter.dtype, len(sites.parameter.shape)
        code = _code_of(sites)
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
        last = f"{name}.canonical" if sites.transposed else name
        chain.append(helper.make_node("Reshape", [f"{name}.grouped", f"{name}.shape"], [last]))
        if sites.transposed:
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
        """Of a code: uint8 or uint16."""
        choices = math.comb(self.pattern.group, self.pattern.kept) ** self.groups
        return np.dtype(np.uint8 if choices <= 256 else np.uint16)

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


def _code_of(sites: SparseParameter) -> NMCode:
    pattern = parse_pattern(str(sites.pattern))
    assert isinstance(pattern, NM)
    return code_for(pattern, sites.parameter.numel)


def encode_groups(code: NMCode, weight: Bits, sign: int) -> tuple[Bits, Bits, int]:
    """Values and codes of an N:M weight.

    Args:
        code: its numbering.
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
    """Each weight as a dense constant. `proto` is changed: transpositions of weights are removed from it."""

    proto: onnx.ModelProto
    layout: str = "dense_constant"

    def encode(self, sites: SparseParameter, weight: Tensor, file: BinaryIO) -> Encoded:
        name = sites.parameter.name
        readers = list(_readers(self.proto, name))
        swapped = weight.ndim == 2 and bool(readers) and all(map(_is_transpose, readers))
        if swapped:
            weight = weight.transpose(0, 1)
            _bypass(self.proto, readers, name)
            readers = list(_readers(self.proto, name))
        tensor = append_tensor(file, name, weight)
        reason = why_not_sparse(sites, readers)
        return Encoded(
            self.layout,
            weight.nbytes,
            reason and f"TensorRT runs it dense: {reason}",
            tensors=(tensor,),
            swapped=swapped,
            details={"tensorrt": "dense" if reason else "sparse"},
        )


def why_not_sparse(sites: SparseParameter, readers: list[NodeProto]) -> str | None:
    """Why TensorRT's sparse kernels cannot take a weight; None if they can."""
    parameter = sites.parameter
    if sites.pattern is None:
        return "its rows do not have one pattern"
    if not implies(parse_pattern(sites.pattern), NM(2, 4)):
        return f"the pattern is {sites.pattern}, sparse tensor cores take 2:4"
    others = sorted({node.op_type for node in readers if node.op_type not in ("MatMul", "Gemm")})
    if others or not readers:
        return f"read by {', '.join(others) or 'nothing'}, not by a MatMul or Gemm"
    step = ALIGNMENT.get(parameter.torch_dtype.itemsize)
    if step is None:
        return f"sparse tensor cores do not take {str(parameter.torch_dtype).removeprefix('torch.')}"
    if any(size % step for size in parameter.shape):
        return f"{' x '.join(map(str, parameter.shape))} is not in multiples of {step}"
    return None


def _graphs(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    """The graph and those nested in its nodes."""
    graphs = [proto.graph]
    for graph in graphs:
        for node in graph.node:
            graphs.extend(attribute.g for attribute in node.attribute if attribute.HasField("g"))
    return graphs


def _readers(proto: onnx.ModelProto, name: str) -> Iterator[NodeProto]:
    """The nodes that read a value."""
    return (node for graph in _graphs(proto) for node in graph.node if name in node.input)


def _is_transpose(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]


def _bypass(proto: onnx.ModelProto, transposes: list[NodeProto], name: str) -> None:
    """Let the readers of some transpositions read `name` instead, and remove those."""
    results = {node.output[0] for node in transposes}
    for graph in _graphs(proto):
        for node in list(graph.node):
            for at, value in enumerate(node.input):
                if value in results:
                    node.input[at] = name
            if node.output and node.output[0] in results:
                graph.node.remove(node)
