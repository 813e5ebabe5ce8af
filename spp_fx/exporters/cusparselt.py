"""cusparselt: 2:4 weights packed for NVIDIA's cuSPARSELt, beside a form that depends on nothing.

`model.safetensors` of the export holds, for each site NAME:

| tensor         | shape          | dtype        | what                                                   | layout     |
|----------------|----------------|--------------|--------------------------------------------------------|------------|
| NAME.packed    | [m, 9k/16]     | the weight's | `[values, meta]` as the library wants it on that SM    | cusparselt |
| NAME.values    | [m, k/2]       | the weight's | the two kept entries of each group of four             | both       |
| NAME.positions | [m, ceil(k/8)] | uint8        | two groups a byte, low nibble first, idx0, idx1 << 2   | both       |

and every other tensor of the model as it is. A pack is tied to the SM and the library; values and
positions are not, and give the weight back bit for bit. A dtype that has no public pack is stored as
values and positions alone (layout `neutral`); a shape that the library cannot take stays dense.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from spp_fx.checkpoint import Shard, torch_dtype
from spp_fx.errors import FormatError, PatternError
from spp_fx.exporters.cusparselt_layout import Sm, from_neutral, refusal, unpack
from spp_fx.exporters.manifest import Manifest, TensorRecord
from spp_fx.exporters.semi_structured import Packed24, clear_negative_zeros, pack_2_4, unpack_2_4
from spp_fx.sparsity import PackedMask, parse_pattern, scan_bits

PACKED = "cusparselt"
NEUTRAL = "neutral"
DENSE = "dense"
WEIGHTS = "model.safetensors"
PARTS = {PACKED: ("packed", "values", "positions"), NEUTRAL: ("values", "positions"), DENSE: ()}
LIBRARY = "cuSPARSELt 0.6 to 0.8, alg_id 0"


def choose_layout(mask: PackedMask, dtype: str, sm: Sm) -> tuple[str, str | None]:
    """How a weight is stored for this SM, and why not packed if it is not."""
    if len(mask.shape) != 2 or mask.columns % 4 or scan_bits(mask, parse_pattern("2:4")).count:
        return DENSE, "it is not 2:4"
    reason = refusal(mask.shape, torch_dtype(dtype), sm)
    if reason is None:
        return PACKED, None
    return (DENSE if dtype in ("F16", "BF16") else NEUTRAL), reason


def part_specs(
    name: str, shape: tuple[int, int], dtype: str, layout: str
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors that store a site."""
    m, k = shape
    forms = {
        "packed": (dtype, (m, 9 * k // 16)),
        "values": (dtype, (m, k // 2)),
        "positions": ("U8", (m, -(-k // 8))),
    }
    return [(f"{name}.{part}", *forms[part]) for part in PARTS[layout]]


def pack_parts(name: str, weight: Tensor, sm: Sm, layout: str) -> tuple[dict[str, Tensor], int]:
    """The stored tensors of a site, and how many zeros of negative sign had to be written as +0.

    Args:
        weight: (out, in), canonical, 2:4.
    """
    count = 0
    try:
        neutral = pack_2_4(weight)
    except PatternError:
        # The weight is 2:4, so what had no slot is a zero with a sign: the one thing the form cannot keep.
        weight, count = clear_negative_zeros(weight)
        neutral = pack_2_4(weight)
    parts = {"values": neutral.values, "positions": neutral.positions}
    if layout == PACKED:
        parts["packed"] = from_neutral(neutral, sm)
    return {f"{name}.{part}": value for part, value in parts.items()}, count


def read_weight(shard: Shard, record: TensorRecord, sm: Sm) -> Tensor:
    """A site's canonical weight, decoded from every form it is stored in; they must agree to the bit.

    Raises:
        FormatError: a part is missing or of a wrong shape, or the pack says another weight than the
            neutral form.
    """
    m, k = record.shape
    for part, dtype, shape in part_specs(record.name, (m, k), record.dtype, record.layout):
        info = shard.info(part)
        if info.dtype != dtype or info.shape != shape:
            raise FormatError(
                f"{shard.path}: {part} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
            )
    values, positions = (shard.read(f"{record.name}.{part}") for part in ("values", "positions"))
    neutral = unpack_2_4(Packed24(values, positions), k)
    if record.layout == NEUTRAL:
        return neutral
    packed = unpack(shard.read(f"{record.name}.packed"), (m, k), sm)
    if not torch.equal(_bits(neutral), _bits(packed)):
        row, column = divmod(int((_bits(neutral) != _bits(packed)).flatten().to(torch.uint8).argmax()), k)
        raise FormatError(
            f"{shard.path}: {record.name}: row {row}, column {column}: the packed form says another value "
            "than the layout-neutral one"
        )
    return neutral


def read_sites(folder: Path, manifest: Manifest) -> Iterator[tuple[TensorRecord, Tensor]]:
    """Every site of an export with its canonical weight."""
    shard = Shard.open(folder / WEIGHTS)
    sm = sm_of(manifest)
    for record in manifest.tensors:
        if record.layout != DENSE:
            yield record, read_weight(shard, record, sm)
        else:
            stored = shard.read(record.name)
            yield record, stored.transpose(-1, -2) if record.transposed else stored


def sm_of(manifest: Manifest) -> Sm:
    """The SM a manifest's packs are made for."""
    sm = manifest.requirements.get("sm")
    if sm not in (80, 90):
        raise FormatError(f"export.json: requirements.sm is {sm!r}, expected 80 or 90")
    return sm  # type: ignore[return-value]


def same_weight(decoded: Tensor, stored: Tensor, negative_zeros: int) -> bool:
    """Whether a decoded weight is the stored one to the bit, but for that many zeros of negative sign."""
    differing = _bits(decoded) != _bits(stored)
    both_zero = (decoded == 0) & (stored == 0)
    return not bool((differing & ~both_zero).any()) and int(differing.sum()) <= negative_zeros


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])
