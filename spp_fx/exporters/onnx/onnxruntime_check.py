"""onnxruntime on the CPU: open a graph, run a file, compare its outputs; and what it needs where bfloat16 occurs.

onnxruntime has the type bfloat16 but, apart from Cast, no CPU operators for it. A model that computes in another
type may still round to bfloat16 somewhere, as Falcon does with its alibi biases: its operators on bfloat16 become
float32 operators between casts, which is what torch does on a CPU. A model that is bfloat16 as a whole keeps its
operators, for runtimes that have the type; its float32 twin is run instead.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)
from onnxruntime import (
    InferenceSession,
    SessionOptions,  # pyright: ignore[reportAttributeAccessIssue]
)
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx.onnx_file import Array, OnnxFile, graphs_in, load_model
from spp_fx.exporters.onnx.random_inputs import Tensors
from spp_fx.graph.task import LENGTH, TARGET, Task
from spp_fx.graph.trace import EXPORT_ERRORS, forward_of

Ids = npt.NDArray[np.int64]

# Largest allowed difference of a logit, as a share of the logits' spread. fp32 differs by the order of
# summation only (about 1e-6 a layer stack); fp16 and bf16 round every activation to 2^-11 and 2^-8.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}

BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
_ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


@dataclass(frozen=True)
class Comparison:
    """How far a file's outputs are from the reference's, over the positions that are not padding.

    Attributes:
        spread: the scale of the differences: the largest distance of a reference logit from the mean over the
            vocabulary at its position, since a shift of all logits changes no probability; of other outputs the
            largest magnitude.
        tolerance: allowed difference, as a share of the spread.
        argmax_agreement: share of positions, or of rows, where both prefer the same token or class; None where the
            outputs are not logits.
        computed_in: type of the outputs that onnxruntime computed.
    """

    max_abs_difference: float
    spread: float
    tolerance: float
    argmax_agreement: float | None
    positions: int
    computed_in: str


class OnnxModel:
    """A graph in onnxruntime, called like a model whatever its inputs are.

    Args:
        path: an .onnx file that spp-fx wrote, with or without a key/value cache.
        twin: run its float32 twin instead (see `float32_twin`): for a bfloat16 file, which onnxruntime has no
            CPU kernels for.

    Raises:
        FormatError: the file is not an ONNX model. SppFxError: onnxruntime cannot load it.
    """

    def __init__(self, path: Path, *, twin: bool = False) -> None:
        self.path = path
        load_model(path)  # its errors for a file that is not ONNX are better than onnxruntime's
        self._session = _session(path, twin)
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._outputs = [each.name for each in self._session.get_outputs()]

    @property
    def has_past(self) -> bool:
        return any(name.startswith("past_key_values.") for name in self._inputs)

    def empty_past(self, batch: int) -> dict[str, Array]:
        """A cache of length 0."""
        return {
            name: np.zeros((batch, each.shape[1], 0, each.shape[3]), dtype=_FLOATS[each.type])
            for name, each in self._inputs.items()
            if name.startswith("past_key_values.")
        }

    def step(
        self, input_ids: Ids, attention_mask: Ids, past: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Logits of new tokens, and the cache with them.

        Args:
            input_ids: (batch, new) int64.
            attention_mask: (batch, past + new) int64; positions are counted from it, padding left out.
            past: of the tokens before, see `empty_past`; {} for a graph without a cache.

        Raises:
            SppFxError: onnxruntime cannot run the graph.
        """
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, **past}
        if "position_ids" in self._inputs:
            feeds["position_ids"] = positions_of(attention_mask)[:, -input_ids.shape[1] :]
        made = self.run(feeds)
        logits = made.pop("logits")
        return logits, {name.replace("present.", "past_key_values.", 1): made[name] for name in made}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of the graph by name.

        Args:
            inputs: numbers of any floating type become those of the graph.

        Raises:
            SppFxError: onnxruntime cannot run the graph.
        """
        feeds = {
            name: value.astype(_FLOATS.get(self._inputs[name].type, value.dtype), copy=False)
            for name, value in inputs.items()
        }
        try:
            outputs = self._session.run(self._outputs, feeds)
        except (*_ORT_ERRORS, ValueError) as error:
            shape = next(iter(inputs.values())).shape
            raise SppFxError(
                f"{self.path}: onnxruntime cannot run the model on a batch of {shape}: {_reason(error)}"
            ) from error
        return dict(zip(self._outputs, map(np.asarray, outputs), strict=True))

    def logits(self, input_ids: Ids, attention_mask: Ids) -> Array:
        """Logits (batch, sequence, vocabulary) of whole sequences; with a cache, of a half, one token, the rest."""
        batch, length = input_ids.shape
        if not self.has_past:
            return self.step(input_ids, attention_mask, {})[0]
        past, parts, start = self.empty_past(batch), [], 0
        for stop in sorted({max(1, length // 2), min(length, length // 2 + 1), length}):
            new, past = self.step(input_ids[:, start:stop], attention_mask[:, :stop], past)
            parts.append(new)
            start = stop
        return np.concatenate(parts, axis=1)

    def outputs(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """`run` of whole inputs; of a graph with a cache, `logits`."""
        if self.has_past:
            return {"logits": self.logits(inputs["input_ids"], inputs["attention_mask"])}
        return self.run(inputs)


def positions_of(attention_mask: Ids) -> Ids:
    """The position of each token without padding, as transformers counts when it generates."""
    positions = np.cumsum(attention_mask, axis=1, dtype=np.int64) - 1
    return np.where(attention_mask == 0, 1, positions)


def reference_of(
    model: PreTrainedModel, task: Task, *, count_positions: bool = False
) -> Callable[[Tensors], Tensors]:
    """A model as a reference for `compare_outputs`.

    Args:
        model: in eval mode.
        count_positions: give it position ids that leave padding out, as a graph with a cache is given.
    """
    run = forward_of(model, task)

    def reference(inputs: Tensors) -> Tensors:
        if count_positions:
            positions = torch.from_numpy(positions_of(inputs["attention_mask"].numpy()))
            with _FirstOfEqual():
                return {"logits": model(**inputs, position_ids=positions, use_cache=False).logits}
        with _FirstOfEqual():
            made = run(*inputs.values())
        return dict(zip(task.outputs, made if isinstance(made, tuple) else (made,), strict=True))

    return reference


class _FirstOfEqual(TorchFunctionMode):
    """Lets a top-k take the first of equal values, as ONNX does; torch takes any of them.

    The scores by which a sparse attention chooses its keys are sums of ReLUs, many of them 0.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.topk, Tensor.topk):
            return _first_largest(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _first_largest(
    x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def compare_outputs(
    path: Path,
    reference: Callable[[Tensors], Tensors],
    batches: Iterable[Tensors],
    outputs: Mapping[str, Sequence[str]],
    *,
    vocabulary: int | None = None,
    tolerance: float | None = None,
    twin: bool = False,
) -> Comparison:
    """Run batches through the file and through `reference`, and compare every output. One session serves all.

    Args:
        reference: a batch to its outputs, of any floating type, on the CPU.
        batches: see `random_inputs.draw_batches`.
        outputs: by name, the axes that the first dimensions have; see `Task.outputs`.
        vocabulary: an output of this last dimension is compared up to a shift of its logits.
        tolerance: share of the spread; None takes TOLERANCE of the reference's type.
        twin: run the file's float32 twin, see `OnnxModel`.

    Raises:
        SppFxError: an output differs by more than the tolerance, shapes differ, either side is not finite, or
            onnxruntime cannot run the file.
    """
    model = OnnxModel(path, twin=twin)
    computed_in, limit = "", tolerance
    worst, spread, agreed, judged, positions = 0.0, 0.0, 0, 0, 0
    for inputs in batches:
        try:
            with torch.no_grad():
                answers = {name: answer.detach().cpu() for name, answer in reference(inputs).items()}
        except EXPORT_ERRORS as error:  # BART's classifier wants a token that ends the text
            raise SppFxError(
                f"{path}: the model does not run on a random batch of {_shape(inputs)}: {_reason(error)}; "
                "--no-compare-logits exports it without this check"
            ) from error
        arrays = {name: _array(value) for name, value in inputs.items()}
        found = model.outputs(arrays)
        for name, answer in answers.items():
            if limit is None:
                limit = TOLERANCE.get(str(answer.dtype).removeprefix("torch."), TOLERANCE["float32"])
            expected, got = answer.double().numpy(), found[name].astype(np.float64)
            computed_in = found[name].dtype.name
            if got.shape != expected.shape:
                raise SppFxError(f"{path}: {name} have shape {got.shape}, the reference's {expected.shape}")
            real = _real(expected, outputs[name], arrays.get("attention_mask"))
            for side, values in (("the reference's", expected), ("the file's", got)):
                if not np.isfinite(values[real]).all():
                    raise SppFxError(f"{path}: {side} {name} are not finite on a batch of {_shape(inputs)}")
            if "logits" in name and expected.shape[-1] > 1:
                same = _preferred(got, real) == _preferred(expected, real)
                agreed, judged = agreed + int(same.sum()), judged + same.size
            expected, got = expected[real], got[real]
            worst = max(worst, float(np.abs(got - expected).max()))
            if expected.shape[-1] == vocabulary:
                expected = expected - expected.mean(axis=-1, keepdims=True)
            spread = max(spread, float(np.abs(expected).max()))
            positions += int(real.sum())
    assert limit is not None
    agreement = agreed / judged if judged else None
    if worst > limit * spread:
        preferred = ""
        if agreement is not None:
            preferred = f"; both prefer the same at {100 * agreement:.1f}% of {judged} positions"
        raise SppFxError(
            f"{path}: {' and '.join(outputs)} differ from the reference by up to {worst:.3g}, allowed is "
            f"{limit * spread:.3g} ({limit:g} of their spread {spread:.3g}){preferred}"
        )
    return Comparison(worst, spread, limit, agreement, positions, computed_in)


def _shape(inputs: Tensors) -> tuple[int, ...]:
    return tuple(next(iter(inputs.values())).shape)


def _array(value: Tensor) -> Array:
    return (value.float() if value.is_floating_point() else value).numpy()


def _real(values: Array, axes: Sequence[str], mask: Array | None) -> npt.NDArray[np.bool_]:
    """Where an output is not that of padding: over the axes that the task names, or all dimensions but the last."""
    of_text = LENGTH in axes or (values.ndim == 3 and TARGET not in axes)  # hidden states name no length
    if mask is not None and of_text and values.shape[:2] == mask.shape:
        return mask == 1
    return np.ones(values.shape[: max(len(axes), values.ndim - 1)], dtype=bool)


def _preferred(values: Array, real: npt.NDArray[np.bool_]) -> Array:
    """The largest of the last dimension at each real position; of logits over positions, those of padding are none."""
    if values.ndim == real.ndim:
        return np.where(real, values, -np.inf).argmax(-1)
    return values[real].argmax(-1)


def check_standard(path: Path) -> None:
    """Check the file against the ONNX standard with onnx.checker, in memory bounded by the largest tensor.

    The checker cannot follow sparse indices into external data: each sparse tensor is checked by itself, and the
    graph with its sparse and external weights as inputs.

    Raises:
        FormatError: data that is missing, truncated or inconsistent. SppFxError: the checker's objection;
            the indices of sparse tensors have to be int64 to pass.
    """
    file = OnnxFile(path)
    graph = file.proto.graph
    try:
        for tensor in list(graph.initializer):
            if tensor.data_location == TensorProto.EXTERNAL:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
                graph.initializer.remove(tensor)
        for name, sparse in file.sparse.items():
            values, indices = (
                numpy_helper.from_array(file.read_stored(name, each), each.name)
                for each in (sparse.values, sparse.indices)
            )
            whole = onnx.SparseTensorProto(values=values, indices=indices, dims=sparse.dims)
            onnx.checker.check_sparse_tensor(whole)
            graph.input.append(helper.make_tensor_value_info(name, sparse.values.data_type, sparse.dims))
        del graph.sparse_initializer[:]
        onnx.checker.check_model(file.proto)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise SppFxError(f"{path}: not valid by the ONNX standard: {_reason(error)}") from error


def why_not_opened(model: ModelProto) -> str | None:
    """Why onnxruntime on the CPU cannot open a graph, naming the operator that it stops at; None if it can.

    Args:
        model: with its weights as inputs, so that none of their numbers is needed.
    """
    try:
        InferenceSession(model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        return _reason(error)
    return None


def float32_twin(path: Path) -> ModelProto:
    """The model with every bfloat16 tensor, constant and cast made float32, all initializers dense.

    Widening is exact for the weights, so the twin shows that graph and weights are right; only activations are
    rounded less than in the original.
    """
    file = OnnxFile(path)
    arrays = {name: file.read(name) for name in (*file.dense, *file.sparse)}
    del file.proto.graph.initializer[:]
    del file.proto.graph.sparse_initializer[:]
    for name, array in arrays.items():
        file.proto.graph.initializer.append(numpy_helper.from_array(array, name))
    widen(file.proto.graph)
    return file.proto


def _session(path: Path, twin: bool) -> InferenceSession:
    providers = ["CPUExecutionProvider"]
    try:
        if not twin:
            return InferenceSession(str(path), _options(), providers=providers)
        with tempfile.TemporaryDirectory(prefix="spp-fx-") as folder:
            wide = Path(folder) / "model.onnx"
            onnx.save(float32_twin(path), wide, save_as_external_data=True, location="model.data")
            return InferenceSession(str(wide), _options(), providers=providers)
    except _ORT_ERRORS as error:
        raise SppFxError(f"{path}: onnxruntime cannot load the model: {_reason(error)}") from error


def _options() -> Any:
    options = SessionOptions()
    options.log_severity_level = 4  # it warns about constants it could have folded, and its errors are raised
    return options


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


# bfloat16


def compute_in_float32(model: ModelProto, given: Iterable[ValueInfoProto]) -> None:
    """Let every operator on bfloat16 work in float32 between casts; the values between them stay bfloat16.

    Args:
        model: changed in place; inputs, outputs and constants keep their types.
        given: the values that the graph reads and does not hold yet, such as its parameters.
    """
    typed = ModelProto()
    typed.CopyFrom(model)
    typed.graph.input.extend(given)
    inferred = onnx.shape_inference.infer_shapes(typed)
    _between_casts(model.graph, inferred.graph, {})


def _between_casts(graph: GraphProto, inferred: GraphProto, outer: Mapping[str, int]) -> None:
    types = dict(outer) | _types(inferred)
    nodes: list[NodeProto] = []
    wide: dict[str, str] = {}  # a bfloat16 value -> the same in float32
    for node, twin in zip(list(graph.node), inferred.node, strict=True):
        bodies = list(zip(graphs_in(node), graphs_in(twin), strict=True))
        for body, inferred_body in bodies:
            _between_casts(body, inferred_body, types)
        narrow = {name for name in (*node.input, *node.output) if types.get(name) == BFLOAT16}
        if bodies or node.op_type in ("Cast", "Identity") or not narrow:
            nodes.append(node)
            continue
        for at, name in enumerate(node.input):
            if name in narrow:
                if name not in wide:
                    wide[name] = f"{name}.float32"
                    nodes.append(_cast(name, wide[name], FLOAT))
                node.input[at] = wide[name]
        _widen_attributes(node)
        rounded = {at: name for at, name in enumerate(node.output) if name in narrow}
        for at, name in rounded.items():
            node.output[at] = f"{name}.unrounded"
        nodes.append(node)
        nodes += [_cast(f"{name}.unrounded", name, BFLOAT16) for name in rounded.values()]
    changed = GraphProto(node=nodes)
    del graph.node[:]
    graph.node.extend(changed.node)


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.Cast", to=to)


def _types(graph: GraphProto) -> dict[str, int]:
    """The known element types of the values of a graph."""
    values = {
        value.name: value.type.tensor_type.elem_type
        for value in [*graph.input, *graph.value_info, *graph.output]
        if value.type.HasField("tensor_type")
    }
    return values | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _widen_attributes(node: NodeProto) -> None:
    """Let a node make float32 where its attributes say bfloat16."""
    for attribute in node.attribute:
        says_type = attribute.name == "dtype" or (node.op_type == "Cast" and attribute.name == "to")
        if says_type and attribute.i == BFLOAT16:
            attribute.i = FLOAT
        elif attribute.type == AttributeProto.TENSOR:
            _widen_tensor(attribute.t)


def _widen_tensor(tensor: TensorProto) -> None:
    """The same numbers in float32. The tensor's data must be in the graph."""
    if tensor.data_type == BFLOAT16:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def widen(graph: GraphProto) -> None:
    """Make every bfloat16 tensor, constant and cast of a graph float32, in place, which is exact."""
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        _widen_attributes(node)
        for body in graphs_in(node):
            widen(body)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
