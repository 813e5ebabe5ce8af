"""What the operators of ONNX do with the numbers of a weight, as tables of their names."""

from onnx import TensorProto

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
QUANTIZE = ("DequantizeLinear", "QuantizeLinear")
"""Operators that onnxruntime also has in its own domain, for types that ONNX took later."""
BROADCAST = frozenset({
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where",
    "Xor",
})  # fmt: skip
_MATH = frozenset({
    "Abs", "BitwiseNot", "Ceil", "Exp", "Floor", "Log", "Neg", "Not", "Reciprocal", "Relu", "Round", "Sigmoid",
    "Sign", "Sqrt", "Tanh",
})  # fmt: skip
_MOVES = frozenset({
    "Cast", "CastLike", "Clip", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "ReduceL1",
    "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Reshape",
    "ScatterElements", "Slice", "Split", "Squeeze", "Transpose", "Trilu", "Unsqueeze",
})  # fmt: skip
FOLDED = BROADCAST | _MATH | _MOVES | frozenset({
    "Concat", "ConstantOfShape", "Expand", "Gather", "GatherElements", "MatMul", "Range", "Shape", "Size", "Tile",
})  # fmt: skip
"""Operators that are computed if their inputs are constants."""
ELEMENTWISE = BROADCAST | _MATH | frozenset({
    "BatchNormalization", "Concat", "Cos", "Cosh", "CumSum", "Dropout", "Elu", "Erf", "Gelu",
    "GroupNormalization", "HardSigmoid", "HardSwish", "InstanceNormalization", "IsInf", "IsNaN",
    "LayerNormalization", "LeakyRelu", "LogSoftmax", "LpNormalization", "Mean", "MeanVarianceNormalization",
    "Mish", "PRelu", "RMSNormalization", "RotaryEmbedding", "Selu", "Shrink", "Sin", "Sinh", "Softmax",
    "Softplus", "Swish", "Tan", "ThresholdedRelu",
})  # fmt: skip
MOVED = _MOVES | frozenset({
    "Compress", "CumSum", "Expand", "Pad", "ReduceLogSumExp", "Resize", "Reverse", "ReverseSequence",
    "ScatterND", "Tile", "TopK",
})  # fmt: skip
"""Operators that move, convert or reduce the numbers of their first input."""
LOOKUPS = frozenset({"Gather", "GatherND", "GatherElements"})
FOLLOWED = ELEMENTWISE | MOVED | LOOKUPS
"""Operators whose results contain the numbers of their data inputs."""
RANDOM = frozenset({
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
})  # fmt: skip
SUMS = frozenset({
    "AveragePool", "CumSum", "GlobalAveragePool", "GlobalLpPool", "LpPool", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceSum", "ReduceSumSquare",
})  # fmt: skip
