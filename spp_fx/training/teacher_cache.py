"""A teacher's predictions on disk, as tokens drawn from them: written by `teach`, trained on by `train --teacher`.

A cache is a folder with a manifest, teacher.json, and tokens-NNNNN.safetensors, each for some consecutive rows of the
training data:

    rows      (rows, 2)      I32         predicted positions of each row, and its pairs of a token and a count
    distinct  (positions,)   U8 or U16   pairs of each position
    entropy   (positions,)   F32         of the teacher's distribution at its temperature, in nats
    tokens    (pairs,)       U16 or U32  ascending within a position
    counts    (pairs,)       U8 or U16   how often it was drawn; those of a position add up to `samples`

Integers have the narrower type where `samples` or the vocabulary fit it. Positions are those whose next token is
learned, in the order of the rows.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage.folder import within
from spp_fx.storage.safetensors import Shard
from spp_fx.storage.strict_json import StrictModel, parse_model, read_bytes
from spp_fx.storage.writer import write_safetensors
from spp_fx.training.samples import IGNORED, Rows

MANIFEST = "teacher.json"
_CHUNK = 2**24
"""Probabilities, in float64, that are held at once."""


class CacheText(StrictModel):
    """What a cache was made of, which must be what is trained on.

    Attributes:
        data: name of the file or dataset.
        digest: of the ids of all rows, and which of them are learned.
        rows, positions: of the data; a position predicts a token that is learned.
        tokenizer: digest of its vocabulary.
        vocabulary: size of the model's.
    """

    data: str
    digest: str
    rows: int
    positions: int
    seq_len: int
    loss_on: Literal["all", "answer"]
    packing: bool
    tokenizer: str
    vocabulary: int

    @classmethod
    def of(
        cls, rows: Rows, data: str | Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int, *,
        seq_len: int, loss_on: Literal["all", "answer"], packing: bool,
    ) -> "CacheText":  # fmt: skip
        digest, positions = blake2b(digest_size=16), 0
        for index in range(len(rows)):
            row = rows[index]
            ids, learned = row["input_ids"].numpy(), (row["labels"] != IGNORED).numpy()
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<u4").tobytes())
            digest.update(np.packbits(learned).tobytes())
            positions += int(learned[1:].sum())
        words = blake2b(digest_size=16)
        for word, number in sorted(tokenizer.get_vocab().items()):
            words.update(f"{number}\0{word}\n".encode("utf-8", "surrogatepass"))
        return cls(
            data=str(data), digest=digest.hexdigest(), rows=len(rows), positions=positions, seq_len=seq_len,
            loss_on=loss_on, packing=packing, tokenizer=words.hexdigest(), vocabulary=vocabulary,
        )  # fmt: skip


class CacheFile(StrictModel):
    """A file of a cache and what it holds."""

    name: str
    rows: int
    positions: int
    pairs: int


class Manifest(StrictModel):
    """The content of teacher.json.

    Attributes:
        teacher: the folder of the teacher; `fingerprint` is that of its weights, see `ModelFolder.fingerprint`.
        samples: tokens drawn at each position.
        entropy: mean over all positions of that of the teacher's distribution, in nats.
    """

    format_version: Literal[1]
    teacher: str
    fingerprint: str
    text: CacheText
    samples: PositiveInt
    temperature: PositiveFloat
    seed: int
    entropy: float
    files: list[CacheFile]


class Drawn(NamedTuple):
    """Tokens drawn at n positions.

    Attributes:
        distinct: (n,) how many different tokens; entropy: (n,) float64, in nats.
        tokens, counts: int64, one for each different token of each position.
    """

    distinct: Tensor
    entropy: Tensor
    tokens: Tensor
    counts: Tensor


def draw(logits: Tensor, uniform: Tensor, samples: int, temperature: float = 1.0) -> Drawn:
    """Draw tokens from softmax(logits / temperature) at each position.

    This is systematic sampling: the distribution function is inverted at (u + k) / samples, k = 0 to samples - 1. The
    expected count of a token is samples times its probability, exactly as with independent draws, and its variance is
    smaller: a count differs by less than one from samples times the probability. Rare tokens stay in, unlike in a
    list of the most probable ones, so gradients are unbiased (Anshumann et al., 2025).

    Args:
        logits: (n, vocabulary), floating.
        uniform: (n,) float64, u of each position, at least 0 and below 1.

    Raises:
        SppFxError: a logit is NaN or infinite; -inf is a probability of zero.
    """
    steps = torch.arange(samples, dtype=torch.float64, device=logits.device) / samples
    found: list[Drawn] = []
    for begin in range(0, len(logits), size := max(1, _CHUNK // logits.shape[-1])):
        logs = (logits[begin : begin + size].double() / temperature).log_softmax(-1)
        if bool(logs.isnan().any()):
            raise SppFxError("the teacher's logits are not finite; check its weights, or load it in bfloat16")
        probabilities = logs.exp()
        reached = probabilities.cumsum(-1)
        # Sums of rounded numbers end near 1. Below their last one, no token of probability 0 can be drawn.
        last = reached[:, -1:]
        points = uniform[begin : begin + size, None].to(logits.device) / samples + steps
        points = torch.minimum(points * last, last.nextafter(torch.zeros_like(last)))
        tokens = torch.searchsorted(reached, points, right=True)
        first = torch.ones_like(tokens, dtype=torch.bool)
        first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
        starts = first.flatten().nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([first.numel()])])
        entropy = torch.special.entr(probabilities).sum(-1)
        found.append(Drawn(first.sum(-1), entropy, tokens.flatten()[starts], ends - starts))
    return Drawn(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def uniforms(seed: int, row: int, count: int) -> Tensor:
    """The random numbers of a row's positions, whatever device and batch it is in: (count,) float64."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64([seed, row])).random(count))


def _dtypes(samples: int, vocabulary: int) -> tuple[str, str]:
    return "U8" if samples < 2**8 else "U16", "U16" if vocabulary <= 2**16 else "U32"


_NUMPY = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}


def write_drawn(path: Path, rows: Sequence[Drawn], samples: int, vocabulary: int) -> CacheFile:
    """Write a file of a cache; raises what `write_safetensors` raises."""
    count, token = _dtypes(samples, vocabulary)

    def narrow(values: Iterator[Tensor], dtype: str) -> Tensor:
        return torch.from_numpy(torch.cat(list(values)).cpu().numpy().astype(_NUMPY[dtype]))

    sizes = [[row.distinct.numel(), row.tokens.numel()] for row in rows]
    tensors = {
        "rows": ("I32", torch.tensor(sizes, dtype=torch.int32)),
        "distinct": (count, narrow((row.distinct for row in rows), count)),
        "entropy": ("F32", torch.cat([row.entropy for row in rows]).float().cpu()),
        "tokens": (token, narrow((row.tokens for row in rows), token)),
        "counts": (count, narrow((row.counts for row in rows), count)),
    }
    specs = [(name, dtype, tuple(value.shape)) for name, (dtype, value) in tensors.items()]
    write_safetensors(path, specs, lambda name: tensors[name][1])
    positions, pairs = (sum(column) for column in zip(*sizes, strict=True))
    return CacheFile(name=path.name, rows=len(rows), positions=positions, pairs=pairs)


def is_cache(folder: str | Path) -> bool:
    """Whether a folder is a cache and not a model."""
    return (Path(folder) / MANIFEST).is_file() and not (Path(folder) / "config.json").exists()


@dataclass(frozen=True)
class TeacherCache:
    """A cache that is open.

    Attributes:
        shards: its files, of which row `first[i]` is the first one of file i.
        starts: for each file (rows + 1, 2) int64, where the positions and pairs of each of its rows begin.
    """

    folder: Path
    manifest: Manifest
    shards: tuple[Shard, ...]
    first: tuple[int, ...]
    starts: tuple[NDArray[np.int64], ...]

    @classmethod
    def open(cls, folder: Path) -> "TeacherCache":
        """Open a cache and check that its files are whole and belong together.

        Raises:
            UsageError: a file is missing.
            FormatError: a file is damaged, or not what the manifest says.
        """
        manifest = parse_model(Manifest, read_bytes(folder / MANIFEST), str(folder / MANIFEST))
        shards: list[Shard] = []
        first: list[int] = [0]
        starts: list[NDArray[np.int64]] = []
        for file in manifest.files:
            shard = Shard.open(within(folder, file.name))
            _check_file(shard, file, manifest)
            sizes = shard.read("rows").numpy().astype(np.int64)
            sums = np.concatenate([np.zeros((1, 2), np.int64), sizes.cumsum(0)])
            if (sizes < 0).any() or sums[-1].tolist() != [file.positions, file.pairs]:
                raise FormatError(f"{shard.path}: its rows do not add up to {file.positions} positions and "
                                  f"{file.pairs} pairs; run 'spp-fx teach' again")  # fmt: skip
            shards.append(shard)
            starts.append(sums)
            first.append(first[-1] + file.rows)
        text = manifest.text
        if (first[-1], sum(file.positions for file in manifest.files)) != (text.rows, text.positions):
            raise FormatError(
                f"{folder / MANIFEST}: its files do not hold {text.rows} rows of {text.positions} tokens in all; run "
                "'spp-fx teach' again"
            )
        return cls(folder, manifest, tuple(shards), tuple(first[:-1]), tuple(starts))

    def check_text(self, given: CacheText) -> None:
        """UsageError unless the training data is what the cache was made of; names both."""
        own = self.manifest.text
        for key, what in {
            "vocabulary": "a vocabulary of",
            "tokenizer": "a tokenizer whose vocabulary has the digest",
            "seq_len": "--seq-len",
            "loss_on": "--loss-on",
            "packing": "--packing",
        }.items():
            if (theirs := getattr(own, key)) != (ours := getattr(given, key)):
                raise UsageError(
                    f"{self.folder}: was made with {what} {theirs}, training has {ours}; train with the same, or run "
                    "'spp-fx teach' again"
                )
        if own.digest != given.digest:
            theirs, ours = (
                f"{text.data} ({text.rows} rows, {text.positions:,} tokens, digest {text.digest})"
                for text in (own, given)
            )
            raise UsageError(
                f"{self.folder}: was made of {theirs}, training has {ours}; train on the same text, or run "
                "'spp-fx teach' again"
            )

    def row(self, index: int) -> Drawn:
        """What was drawn at the positions of a row.

        Raises:
            FormatError: the file is damaged.
        """
        number = bisect_right(self.first, index) - 1
        shard, starts, at = self.shards[number], self.starts[number], index - self.first[number]
        (position, pair), (last, end) = starts[at].tolist(), starts[at + 1].tolist()
        # torch has no arithmetic for unsigned integers of more than a byte.
        distinct, tokens, counts = (
            torch.from_numpy(shard.read_rows(name, begin, stop).numpy().astype(np.int64))
            for name, begin, stop in (
                ("distinct", position, last),
                ("tokens", pair, end),
                ("counts", pair, end),
            )
        )
        owner = torch.arange(last - position).repeat_interleave(distinct)
        sums = torch.zeros(last - position, dtype=torch.int64)
        if len(owner) == len(counts):
            sums.index_add_(0, owner, counts)
        if not bool((sums == self.manifest.samples).all()):
            raise FormatError(
                f"{shard.path}: row {at} does not have {self.manifest.samples} samples at each position; run "
                "'spp-fx teach' again"
            )
        if len(tokens) and int(tokens.max()) >= self.manifest.text.vocabulary:
            raise FormatError(
                f"{shard.path}: row {at} has token {int(tokens.max())}, the vocabulary has "
                f"{self.manifest.text.vocabulary}; run 'spp-fx teach' again"
            )
        return Drawn(distinct, shard.read_rows("entropy", position, last), tokens, counts)


def _check_file(shard: Shard, file: CacheFile, manifest: Manifest) -> None:
    count, token = _dtypes(manifest.samples, manifest.text.vocabulary)
    expected = {
        "rows": ("I32", (file.rows, 2)),
        "distinct": (count, (file.positions,)),
        "entropy": ("F32", (file.positions,)),
        "tokens": (token, (file.pairs,)),
        "counts": (count, (file.pairs,)),
    }
    found = {name: (info.dtype, info.shape) for name, info in shard.header.tensors.items()}
    if found != expected:
        raise FormatError(
            f"{shard.path}: its tensors are not those that {MANIFEST} lists; run 'spp-fx teach' again"
        )


class TaughtRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Training rows with what was drawn from the teacher: `draws` and `counts` (length, most), `entropy` (length,).

    Positions that predict nothing, and places after the last token of one, have counts of 0.
    """

    def __init__(self, rows: Rows, cache: TeacherCache) -> None:
        self.rows = rows
        self.cache = cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, drawn = self.rows[index], self.cache.row(index)
        places = (row["labels"][1:] != IGNORED).nonzero().flatten()
        length, most = len(row["labels"]), int(drawn.distinct.max()) if len(drawn.distinct) else 1
        filled = torch.arange(most) < drawn.distinct[:, None]
        draws, counts = torch.zeros(2, len(places), most, dtype=torch.int64)
        draws[filled], counts[filled] = drawn.tokens, drawn.counts
        taught = {
            "draws": torch.zeros(length, most, dtype=torch.int64),
            "counts": torch.zeros(length, most, dtype=torch.int32),
            "entropy": torch.zeros(length),
        }
        for name, values in (("draws", draws), ("counts", counts), ("entropy", drawn.entropy)):
            taught[name][places] = values.to(taught[name].dtype)
        return row | taught
