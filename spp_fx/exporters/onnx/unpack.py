"""Weights that an ONNX graph computes of packed constants, decoded by hand from what the graph says.

Nothing of `packed` or `nm_codes` is used: the chain of operators is followed, every operator must be just
what is understood here, its constants are read and checked, and numpy does what the operators would do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

from spp_fx.errors import FormatError
from spp_fx.exporters.onnx.reader import OnnxFile

_MAX_GROWTH = 64
"""Elements of a dense weight for each value, at most: no file makes us take more memory than that."""
_CHUNK = 1 << 20
_WHOLE = (TensorProto.INT32, TensorProto.INT64)
_FLOATING = (TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Unpacked:
    """The chain of operators behind a weight, each of which is checked.

    Attributes:
        name: the value that the weight is.
        values, codes, table, runs, shape: names of the constants that it is computed of.
        perm: what the last operator transposes, None where there is none.
    """

    name: str
    values: str
    codes: str
    table: str
    runs: str
    shape: str
    perm: tuple[int, ...] | None


def find_unpacked(file: OnnxFile) -> dict[str, Unpacked]:
    """Every weight that is scattered from constants, by the name of the value that it becomes.

    Raises:
        FormatError: a scattered constant is computed in another way than the one known, or is of no use.
    """
    nodes = file.proto.graph.node
    made = {output: node for node in nodes for output in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    found: dict[str, Unpacked] = {}
    for node in nodes:
        if node.op_type == "ScatterElements" and len(node.input) == 3 and node.input[2] in file.dense:
            chain = _Follower(file, node, made, readers).chain()
            found[chain.name] = chain
    return found


@dataclass(frozen=True)
class _Follower:
    """One chain, followed from its ScatterElements in both directions."""

    file: OnnxFile
    scatter: NodeProto
    made: Mapping[str, NodeProto]
    readers: Mapping[str, list[NodeProto]]

    def chain(self) -> Unpacked:
        zeros, positions, values = self._inputs(self.scatter, 3, {"axis": (1,), "reduction": (b"none", None)})
        background, cast = self._producer(zeros, "Cast", "ConstantOfShape"), None
        if background.op_type == "Cast":
            (zeros,) = self._inputs(background, 1, {"to": _FLOATING, "saturate": (1, None)})
            cast = self._attributes(background)["to"]
            background = self._producer(zeros, "ConstantOfShape")
        (runs,) = self._inputs(background, 1, {"value": None})
        made = self._check_zero(background)
        if self.file.dense[values].data_type != (cast or made):
            self._refuse("its values are not of the type of the zeros that they are scattered into")
        table, numbers = self._inputs(self._producer(positions, "Gather"), 2, {"axis": (0, None)})
        (codes,) = self._inputs(self._producer(numbers, "Cast"), 1, {"to": _WHOLE, "saturate": (1, None)})
        reshape = self._reader(self.scatter, "Reshape")
        _, shape = self._inputs(reshape, 2, {"allowzero": (0, None)})
        last, perm = reshape, None
        if self._output(reshape).endswith(".canonical"):
            last = self._reader(reshape, "Transpose")
            self._inputs(last, 1, {"perm": None})
            perm = tuple(int(axis) for axis in self._attributes(last).get("perm", ()))
        name = self._output(last)
        if not self.readers.get(name):
            self._refuse("nothing reads the weight that is unpacked")
        return Unpacked(name, values, codes, table, runs, shape, perm)

    def _inputs(self, node: NodeProto, count: int, known: dict[str, tuple[Any, ...] | None]) -> list[str]:
        """The inputs of an operator that has so many, and no attribute but those known with such a value."""
        attributes = self._attributes(node)
        if len(node.input) != count or len(node.output) != 1 or node.domain not in ("", "ai.onnx"):
            self._refuse(f"{node.op_type} has {len(node.input)} inputs, expected {count}")
        if stray := attributes.keys() - known.keys():
            self._refuse(f"{node.op_type} has an attribute {min(stray)}")
        for name, allowed in known.items():
            if allowed is not None and attributes.get(name) not in allowed:
                self._refuse(f"{node.op_type} has {name} {attributes.get(name)}")
        return list(node.input)

    def _attributes(self, node: NodeProto) -> dict[str, Any]:
        try:
            return {each.name: helper.get_attribute_value(each) for each in node.attribute}
        except ValueError:
            self._refuse(f"{node.op_type} has an attribute without a value")

    def _check_zero(self, node: NodeProto) -> int:
        """The type of a background that is zero."""
        value = self._attributes(node).get("value")
        if value is None:
            return TensorProto.FLOAT
        if isinstance(value, TensorProto) and value.data_location == TensorProto.EXTERNAL:
            self._refuse("its background lies in another file")
        try:
            zero = isinstance(value, TensorProto) and not numpy_helper.to_array(value).tobytes().strip(b"\0")
        except (ValueError, TypeError, KeyError):
            zero = False
        if not zero:
            self._refuse("its background is not zero")
        return value.data_type

    def _producer(self, value: str, *op_types: str) -> NodeProto:
        node = self.made.get(value)
        if node is None or node.op_type not in op_types:
            self._refuse(f"{value} is not made by {' or '.join(op_types)}")
        return node

    def _reader(self, of: NodeProto, op_type: str) -> NodeProto:
        value = self._output(of)
        nodes = self.readers.get(value, [])
        if len(nodes) != 1 or nodes[0].op_type != op_type or nodes[0].input[0] != value:
            self._refuse(f"{value} is not read by one {op_type}")
        return nodes[0]

    def _output(self, node: NodeProto) -> str:
        if len(node.output) != 1:
            self._refuse(f"{node.op_type} has {len(node.output)} outputs")
        return node.output[0]

    def _refuse(self, reason: str) -> NoReturn:
        where = self.scatter.output[0] if self.scatter.output else self.scatter.name
        raise FormatError(f"{where} ({self.file.path}): {reason}; the packing is not a known one")


def unpack(file: OnnxFile, chain: Unpacked) -> npt.NDArray[Any]:
    """The weight that a chain computes, in the shape of its value.

    Raises:
        FormatError: a constant is missing, of a wrong shape, out of range, or not what unpacking needs.
    """

    def refuse(reason: str) -> NoReturn:
        raise FormatError(f"{chain.name} ({file.path}): {reason}")

    def constant(value: str, kinds: str, rank: int) -> npt.NDArray[Any]:
        if value not in file.dense:
            refuse(f"{value} is no constant")
        array = file.read(value)
        if array.ndim != rank or (kinds and array.dtype.kind not in kinds):
            refuse(f"{value} is {array.dtype} of {array.ndim} dimensions, which unpacking does not expect")
        return array

    values = constant(chain.values, "", 2)
    codes = constant(chain.codes, "u", 1)
    table = constant(chain.table, "i", 2)
    runs = constant(chain.runs, "i", 1).tolist()
    shape = constant(chain.shape, "i", 1).tolist()
    if values.shape != (codes.size, table.shape[1]) or len(runs) != 2 or runs[0] != codes.size:
        refuse(f"{list(values.shape)} values, {codes.size} codes and runs of {runs} do not belong together")
    width = int(runs[1])
    if not 0 < width <= _MAX_GROWTH * max(1, table.shape[1]):
        refuse(f"a run of {width} elements for {table.shape[1]} values")
    if min(shape, default=0) <= 0 or int(np.prod(shape, dtype=object)) != codes.size * width:
        refuse(f"its shape {shape} is not that of {codes.size} runs of {width}")
    if codes.size and int(codes.max()) >= len(table):
        refuse(f"code {int(codes.max())} is past the table's {len(table)} rows")
    if table.size and (table.min() < 0 or table.max() >= width or (np.diff(table, axis=1) <= 0).any()):
        refuse(f"its table does not list ascending positions below {width}")
    if chain.perm is not None and sorted(chain.perm) != list(range(len(shape))):
        refuse(f"its dimensions {shape} cannot be put in the order {list(chain.perm)}")
    dense = np.zeros((codes.size, width), dtype=values.dtype)
    for start, stop in _chunks(codes.size, width):
        np.put_along_axis(
            dense[start:stop], table[codes[start:stop]].astype(np.int64), values[start:stop], axis=1
        )
    result = dense.reshape(shape)
    return result if chain.perm is None else result.transpose(chain.perm)


def _chunks(runs: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // width)
    for start in range(0, runs, step):
        yield start, min(runs, start + step)
