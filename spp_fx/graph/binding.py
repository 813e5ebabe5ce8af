"""Which stored tensors make up a parameter, by the conversions that transformers applies when it loads a model.

A checkpoint may name a tensor differently from the model (a prefix, the other name of a tied weight), and store a
stack of experts as one matrix for each, or the weights of several linears as one matrix.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from spp_fx.adapters.adapter_folder import StoredMatrix
from spp_fx.graph.names import names_of
from spp_fx.graph.program import Site

NOT_STORED = "the checkpoint holds no tensor for it"


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer in the orientation it is stored in."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


Slot = Site | Parameter
"""What stored tensors fill."""


@dataclass(frozen=True)
class Binding:
    """Where slots are stored.

    Attributes:
        matrices: the stored matrices of each slot.
        refused: why the other slots have none.
        targets: the name in the model of each stored tensor.
    """

    matrices: dict[str, tuple[StoredMatrix, ...]]
    refused: dict[str, str]
    targets: dict[str, str]


def bind(model: PreTrainedModel, slots: Mapping[str, Slot], stored: Mapping[str, tuple[int, ...]]) -> Binding:
    """Find the stored tensors of every site or parameter.

    Args:
        model: as built from the configuration; the meta device suffices.
        slots: sites or parameters, by name.
        stored: shape of every tensor of the checkpoint, by name.
    """
    converters = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
    plain: dict[str, str] = {}
    converted: dict[str, dict[str, list[str]]] = {}
    chunks: dict[str, tuple[StoredMatrix, ...]] = {}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    targets: dict[str, str] = {}
    for name, (target, pattern) in find_targets(model, stored).items():
        targets[name] = target
        if pattern is None:
            plain[target] = name
        else:
            converted.setdefault(target, {}).setdefault(pattern, []).append(name)
            chunks |= _chunks(name, target, pattern, converters, shapes, stored[name])
    matrices: dict[str, tuple[StoredMatrix, ...]] = {}
    refused: dict[str, str] = {}
    tied = {name: names for names in names_of(model).values() for name in names}
    for slot in slots.values():
        names = [slot.name]
        if isinstance(slot, Site) and slot.tied_to is None:  # it may be stored under a name that no site has
            names += [n for n in tied.get(slot.name, ()) if not isinstance(slots.get(n), Site)]
        name = next((n for n in names if n in plain or n in chunks or n in converted), slot.name)
        if name in plain:
            found = _plain(slot, plain[name], stored)
        elif name in chunks and not slot.transposed:
            found = chunks[name]
        elif name in converted:
            found = _converted(slot, converted[name], converters, stored)
        else:
            found = NOT_STORED
        if isinstance(found, str):
            refused[slot.name] = _in_parts(slot.name, (*plain, *converted)) or found
        else:
            matrices[slot.name] = found
    return Binding(matrices, refused, targets)


def _chunks(
    tensor: str,
    target: str,
    pattern: str,
    converters: list[WeightConverter],
    shapes: Mapping[str, tuple[int, ...]],
    stored: tuple[int, ...],
) -> dict[str, tuple[StoredMatrix, ...]]:
    """The parameters that have consecutive rows of one stored tensor; none if it is stored in another way.

    Args:
        target: the first of them.
        shapes: of the model's parameters, by name.
        stored: the shape of the tensor.
    """
    converter = next(c for c in converters if pattern in c.source_patterns)
    first, *others = converter.target_patterns
    (operation, *more), (prefix, known, suffix) = converter.operations, target.partition(first)
    if more or not isinstance(operation, Chunk | Split) or operation.dim != 0 or not known or not others:
        return {}
    names = [target, *(f"{prefix}{other}{suffix}" for other in others)]
    if any(name not in shapes or shapes[name][1:] != stored[1:] for name in names):
        return {}
    rows = [shapes[name][0] for name in names]
    if sum(rows) != stored[0] or (isinstance(operation, Chunk) and len(set(rows)) > 1):
        return {}
    starts = accumulate(rows, initial=0)
    return {
        name: (_piece(tensor, 0, count, offset=start),)
        for name, count, start in zip(names, rows, starts, strict=False)
    }


def _piece(tensor: str, start: int, stop: int, offset: int | None = None) -> StoredMatrix:
    return StoredMatrix(
        tensor=tensor, transposed=False, expert=None, start=start, stop=stop, whole=False, offset=offset
    )


def _in_parts(name: str, known: Iterable[str]) -> str | None:
    """That a weight is stored as several tensors, quantised or factored, as far as their names tell."""
    module = name.removesuffix(".weight")
    whole = {name, f"{module}.weight", f"{module}.bias", f"{name}_bias"}
    parts = sorted(
        other
        for other in known
        if other.startswith((f"{name}.", f"{name}_"))
        or (other.startswith(f"{module}.") and "." not in other.removeprefix(f"{module}."))
        if other not in whole
    )
    if not parts:
        return None
    words = ", ".join(part.removeprefix(module).lstrip("._") for part in parts[:3])
    return (
        f"is stored in parts ({words}), a quantised or factored form whose zeros are not known; use the original "
        "model"
    )


def find_targets(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """What each stored tensor is called in the model, as transformers renames it when it loads.

    Args:
        model: as built from the configuration; the meta device suffices.
        stored: names of the checkpoint's tensors.

    Returns:
        stored name -> the name in the model (one that the model has not, if transformers would not load the
        tensor), and the pattern of the conversion that makes a parameter of it, None where it is one as it is.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    found: dict[str, tuple[str, str | None]] = {}
    for name in stored:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            # A rule for other checkpoints; this one has the model's names.
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        found[name] = target, pattern
    return found


def _plain(slot: Slot, tensor: str, stored: Mapping[str, tuple[int, ...]]) -> tuple[StoredMatrix, ...] | str:
    shape = stored[tensor]
    expected = (*slot.shape[:-2], slot.shape[-1], slot.shape[-2]) if slot.transposed else slot.shape
    if 0 in shape and 0 not in expected:
        return (
            f"is stored as {tensor} of shape {list(shape)}, the placeholder that a ZeRO-3 run leaves; save the model "
            "again with its weights gathered (stage3_gather_16bit_weights_on_model_save)"
        )
    if shape != expected:
        return f"is stored as {tensor} of shape {list(shape)}, the model expects {list(expected)}"
    if len(slot.shape) != 3:
        return (_whole_matrix(slot, tensor, None),)
    return tuple(_whole_matrix(slot, tensor, expert) for expert in range(slot.shape[0]))


def _whole_matrix(slot: Slot, tensor: str, expert: int | None) -> StoredMatrix:
    return StoredMatrix(
        tensor=tensor,
        transposed=slot.transposed,
        expert=expert,
        start=0,
        stop=_rows(slot),
        whole=expert is not None,
    )


def _converted(
    slot: Slot,
    by_pattern: Mapping[str, list[str]],
    converters: list[WeightConverter],
    stored: Mapping[str, tuple[int, ...]],
) -> tuple[StoredMatrix, ...] | str:
    """Experts merged into a stack (dim 0), their projections side by side along the rows (dim 1)."""
    converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
    operations = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    if operations == [(Concatenate, 0)] and not slot.transposed:
        tensors = [tensor for pattern in converter.source_patterns for tensor in by_pattern.get(pattern, ())]
        stops = list(accumulate(stored[tensor][0] for tensor in tensors))
        if stops[-1] != slot.shape[0] or any(stored[tensor][1:] != slot.shape[1:] for tensor in tensors):
            return "its stored tensors do not fill it"
        return tuple(
            _piece(tensor, start, stop)
            for tensor, start, stop in zip(tensors, [0, *stops], stops, strict=False)
        )
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        names = ", ".join(op.__name__ for op, _ in operations)
        return f"is made of stored tensors by {names}, which cannot be undone matrix by matrix"
    if slot.transposed or len(slot.shape) != 3:
        return "is made of several stored tensors in a way that cannot be undone"
    matrices: list[StoredMatrix] = []
    start = [0] * slot.shape[0]
    for pattern in (p for p in converter.source_patterns if p in by_pattern):
        number = re.compile(re.escape(pattern.rstrip("$")).replace(r"\*", r"(\d+)"))
        for tensor in by_pattern[pattern]:
            match = number.search(tensor) or re.search(r"\.experts\.(\d+)\.", tensor)
            rows, columns = stored[tensor] if len(stored[tensor]) == 2 else (0, 0)
            if match is None or int(match[1]) >= slot.shape[0] or columns != slot.shape[-1]:
                return f"its stored tensor {tensor} of shape {list(stored[tensor])} does not fit"
            expert = int(match[1])
            first = start[expert]
            start[expert] += rows
            matrices.append(
                StoredMatrix(
                    tensor=tensor,
                    transposed=False,
                    expert=expert,
                    start=first,
                    stop=start[expert],
                    whole=False,
                )
            )
    if start != [_rows(slot)] * slot.shape[0]:
        return "its stored tensors do not fill it"
    return tuple(matrices)


def _rows(slot: Slot) -> int:
    """Rows of a matrix; a vector is a column."""
    return slot.shape[-2] if len(slot.shape) > 1 else torch.Size(slot.shape).numel()


def assemble(
    matrices: tuple[StoredMatrix, ...], shape: tuple[int, ...], read: Callable[[str], Tensor]
) -> Tensor:
    """A parameter as the model has it, made of its stored tensors.

    Args:
        matrices: all of the parameter's.
        shape: the parameter's, in the model.
        read: gives a stored tensor by name.
    """
    if matrices[0].expert is None:
        tensors = [(read(matrix.tensor), matrix) for matrix in matrices]
        parts = [tensor[matrix.held] if tensor.ndim else tensor for tensor, matrix in tensors]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)
    if matrices[0].whole:
        return read(matrices[0].tensor).view(shape)
    result: Tensor | None = None
    for matrix in matrices:
        part = read(matrix.tensor)
        if result is None:
            result = torch.empty(shape, dtype=part.dtype)
        result[matrix.expert, matrix.start : matrix.stop] = part
    assert result is not None
    return result


def take_apart(
    matrices: tuple[StoredMatrix, ...], parameter: Tensor
) -> Iterator[tuple[StoredMatrix, Tensor]]:
    """What each stored tensor holds of a parameter as the model has it: the inverse of `assemble`."""
    if matrices[0].whole or (len(matrices) == 1 and matrices[0].expert is None):
        yield matrices[0], parameter
        return
    for matrix in matrices:
        whole = parameter if matrix.expert is None else parameter[matrix.expert]
        yield matrix, whole[matrix.start : matrix.stop]
