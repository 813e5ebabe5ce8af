"""Calibration text as windows of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp_fx.errors import UsageError
from spp_fx.ir.program import Program
from spp_fx.training.data import check_vocabulary, encode
from spp_fx.training.records import Text, read_samples
from spp_fx.training.samples import tokenize
from spp_fx.workflows.load import load_tokenizer, window_length


@dataclass(frozen=True)
class Calibration:
    """Text that shows what the weights multiply.

    Attributes:
        data: a text file, .json or .jsonl records, or the name of a dataset; instructions and chats are taken
            as the text that the model would see.
        samples: windows drawn from it.
        seq_len: tokens of each; None is 2048, or what the model has.
        seed: of the draw.
    """

    data: str | Path
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"--samples must be at least 1, got {self.samples}")


def calibration_tokens(
    model: Path,
    program: Program,
    calibration: Calibration,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """Windows of a text drawn at random: (samples, length) int64.

    No two overlap, unless the text is too short for that: then they begin at different tokens, and `say` is told.

    Raises:
        UsageError: the text has fewer windows than are asked for, or cannot be used.
    """
    data, samples = calibration.data, calibration.samples
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    length = window_length(program, calibration.seq_len, default=2048)
    tokens = _tokens(data, tokenizer)
    windows, starts = len(tokens) // length, len(tokens) - length + 1
    if starts < samples:
        raise UsageError(
            f"{data}: is too short: its {len(tokens)} tokens have no {samples} windows of {length}; use more text, "
            "fewer --samples or a smaller --seq-len"
        )
    check_vocabulary(tokens, program.vocabulary, Path(data))
    generator = torch.Generator().manual_seed(calibration.seed)
    if windows >= samples:
        begins = torch.randperm(windows, generator=generator)[:samples] * length
    else:
        say(
            f"{data}: its {len(tokens)} tokens fill {windows} windows of {length}; {samples} are drawn that overlap"
        )
        begins = torch.randperm(starts, generator=generator)[:samples]
    return torch.stack([tokens[begin : begin + length] for begin in begins.tolist()])


def _tokens(data: str | Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    records = read_samples(data)
    texts = [record.text for record in records if isinstance(record, Text)]
    if len(texts) == len(records):
        return encode(tokenizer, texts)
    whole = int(1e9)
    ids = [
        token
        for number, record in enumerate(records, start=1)
        for token in tokenize(
            tokenizer, record, answer_only=False, length=whole, where=f"{data}, sample {number}"
        ).ids
    ]
    return torch.tensor(ids, dtype=torch.int64)
