"""Calibration text as windows of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spp_fx.errors import UsageError
from spp_fx.ir.program import Program
from spp_fx.training.data import check_vocabulary
from spp_fx.training.records import Skipped, read_samples
from spp_fx.training.samples import token_stream
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
        strict: rows with nothing in them are an error; else they are skipped.
    """

    data: str | Path
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"--samples must be at least 1, got {self.samples}")


@dataclass(frozen=True)
class Drawn:
    """Windows drawn from a text, (samples, length) int64, and the rows of the data that were skipped."""

    tokens: Tensor
    skipped: Skipped


def calibration_tokens(
    model: Path,
    program: Program,
    calibration: Calibration,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Tensor:
    """The windows of `draw_windows` alone."""
    return draw_windows(model, program, calibration, trust_remote_code=trust_remote_code, say=say).tokens


def draw_windows(
    model: Path,
    program: Program,
    calibration: Calibration,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Drawn:
    """Windows of a text drawn at random.

    No two overlap, unless the text is too short for that: then they begin at different tokens, and `say` is told,
    as it is of rows that are skipped.

    Raises:
        UsageError: the text has fewer windows than are asked for, or cannot be used.
    """
    data, samples = calibration.data, calibration.samples
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    length = window_length(program, calibration.seq_len, default=2048)
    tokens, skipped = token_stream(
        tokenizer, read_samples(data, strict=calibration.strict), strict=calibration.strict
    )
    if line := skipped.line(data):
        say(line)
    windows, starts = len(tokens) // length, len(tokens) - length + 1
    if starts < samples:
        raise UsageError(
            f"{data}: is too short: its {len(tokens)} tokens have no {samples} windows of {length}; use more text, "
            "fewer --samples or a smaller --seq-len"
        )
    check_vocabulary(tokens, program.vocabulary, data)
    generator = torch.Generator().manual_seed(calibration.seed)
    if windows >= samples:
        begins = torch.randperm(windows, generator=generator)[:samples] * length
    else:
        say(
            f"{data}: its {len(tokens)} tokens fill {windows} windows of {length}; {samples} are drawn that overlap"
        )
        begins = torch.randperm(starts, generator=generator)[:samples]
    return Drawn(torch.stack([tokens[begin : begin + length] for begin in begins.tolist()]), skipped)
