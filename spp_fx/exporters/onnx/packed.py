"""onnx-packed: N:M weights as values and codes, unpacked by standard operators that runtimes fold away.

A weight NAME of pattern N:M becomes the constants NAME.values (runs, kept), NAME.codes (runs,), and a table
of positions for each pattern, `spp_fx.positions.*`; `nm_codes` says what they hold. The graph computes

    NAME = Reshape(ScatterElements(zeros, Gather(table, Cast(codes)), values, axis=1), shape)

with a Transpose behind it where the model stores the weight (in, out). onnxruntime computes that once when
it loads, from its basic optimisations on. Every operator is one that onnxruntime, OpenVINO and the
ReferenceEvaluator of the onnx package execute alike (OpenVINO has wrong bit operations, and NonZero is
never folded, so neither is here).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from spp_fx.exporters.onnx.data import TYPES, DataFile, bytes_of, tensor_bytes
from spp_fx.exporters.onnx.encoding import Encoded
from spp_fx.exporters.onnx.graph import GraphParameter
from spp_fx.exporters.onnx.nm_codes import MAX_GROUP, NMCode, code_for, encode
from spp_fx.exporters.onnx.parameters import SparseParameter, dtype_of
from spp_fx.sparsity.pattern import NM, parse_pattern

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_CODE_TYPES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.uint16): TensorProto.UINT16}


@dataclass(frozen=True)
class Packing:
    """Each N:M weight as values and codes."""

    layout: str = "nm_codes"
    shared: dict[str, TensorProto] = field(default_factory=dict)

    def refusal(self, parameter: GraphParameter, sites: SparseParameter) -> str | None:
        """No N:M pattern that codes reach, or codes that would take more room than the zeros."""
        if sites.pattern is None:
            return "its rows do not have one pattern"
        pattern = parse_pattern(sites.pattern)
        if not isinstance(pattern, NM) or pattern.group > MAX_GROUP:
            return f"{pattern} is not packed, only N:M with M up to {MAX_GROUP}"
        dense = math.prod(parameter.shape) * dtype_of(parameter).itemsize
        if self.size(parameter, sites) >= dense:
            return f"{pattern} in {dense} bytes would grow"
        return None

    def size(self, parameter: GraphParameter, sites: SparseParameter) -> int:
        numel = math.prod(parameter.shape)
        code = _code(sites, numel)
        return numel // code.entries * (code.kept * dtype_of(parameter).itemsize + code.dtype.itemsize)

    def outline(
        self, parameter: GraphParameter, sites: SparseParameter
    ) -> tuple[list[ValueInfoProto], list[NodeProto]]:
        name, code = parameter.name, _code(sites, math.prod(parameter.shape))
        types = {
            "values": parameter.dtype,
            "codes": _CODE_TYPES[code.dtype],
            "runs": TensorProto.INT64,
            "shape": TensorProto.INT64,
        }
        inputs = [helper.make_tensor_value_info(f"{name}.{part}", type, None) for part, type in types.items()]
        nodes = self._unpack(name, code, parameter.dtype, sites.transposed, len(parameter.shape))
        return inputs, list(nodes)

    def encode(
        self, parameter: GraphParameter, sites: SparseParameter, weight: Tensor, data: DataFile
    ) -> Encoded:
        name, numel = parameter.name, weight.numel()
        code = _code(sites, numel)
        canonical = weight.transpose(-1, -2) if sites.transposed else weight
        bits: npt.NDArray[Any] = bytes_of(canonical).view(_UNSIGNED[weight.itemsize])
        sign = 1 << (8 * weight.itemsize - 1) if weight.is_floating_point() else 0
        values, codes, cleared = encode(code, bits, sign)
        runs = numel // code.entries
        tensors = (
            data.add(f"{name}.values", TYPES[weight.dtype], [runs, code.kept], [values]),
            data.add(f"{name}.codes", _CODE_TYPES[code.dtype], [runs], [codes]),
            numpy_helper.from_array(np.array([runs, code.entries]), f"{name}.runs"),
            numpy_helper.from_array(np.array(canonical.shape), f"{name}.shape"),
        )
        nodes = self._unpack(name, code, TYPES[weight.dtype], sites.transposed, weight.ndim)
        return Encoded(
            self.layout,
            sum(tensor_bytes(tensor) for tensor in tensors),
            tensors=tensors,
            nodes=nodes,
            negative_zeros=cleared,
            details={"pattern": str(code.pattern), "groups_per_code": code.groups},
        )

    def constants(self) -> tuple[TensorProto, ...]:
        return tuple(self.shared.values())

    def _unpack(
        self, name: str, code: NMCode, dtype: int, transposed: bool, rank: int
    ) -> tuple[NodeProto, ...]:
        table = f"spp_fx.positions.{code.pattern.kept}_{code.pattern.group}x{code.groups}"
        if table not in self.shared:
            self.shared[table] = numpy_helper.from_array(code.table, table)
        chain = [
            helper.make_node("Cast", [f"{name}.codes"], [f"{name}.numbers"], to=TensorProto.INT32),
            helper.make_node("Gather", [table, f"{name}.numbers"], [f"{name}.positions"], axis=0),
            *_zeros(name, dtype),
            helper.make_node(
                "ScatterElements",
                [f"{name}.zeros", f"{name}.positions", f"{name}.values"],
                [f"{name}.grouped"],
                axis=1,
            ),
        ]
        last = f"{name}.canonical" if transposed else name
        chain.append(helper.make_node("Reshape", [f"{name}.grouped", f"{name}.shape"], [last]))
        if transposed:
            axes = [*range(rank - 2), rank - 1, rank - 2]
            chain.append(helper.make_node("Transpose", [last], [name], perm=axes))
        for node in chain:
            node.name = f"{node.output[0]}.{node.op_type}"
        return tuple(chain)


def _zeros(name: str, dtype: int) -> Iterator[NodeProto]:
    """The background; bfloat16 by way of float32, since ConstantOfShape has it only from opset 20 on."""
    wide = TensorProto.FLOAT if dtype == TensorProto.BFLOAT16 else dtype
    first = f"{name}.zeros" if wide == dtype else f"{name}.zeros32"
    zero = helper.make_tensor("zero", wide, [1], [0.0])
    yield helper.make_node("ConstantOfShape", [f"{name}.runs"], [first], value=zero)
    if wide != dtype:
        yield helper.make_node("Cast", [first], [f"{name}.zeros"], to=dtype)


def _code(sites: SparseParameter, numel: int) -> NMCode:
    pattern = parse_pattern(str(sites.pattern))
    assert isinstance(pattern, NM)
    return code_for(pattern, numel)
