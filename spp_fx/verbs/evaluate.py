"""eval: the perplexity of a text, or of instructions and chats, under a model or an adapter over its base."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from spp_fx.parallel import Tick, no_tick
from spp_fx.storage.links import links_option
from spp_fx.training.perplexity import Perplexity, perplexity
from spp_fx.training.records import Skipped
from spp_fx.training.samples import check_vocabulary, held_out
from spp_fx.verbs.load import load_program, load_tokenizer, window_length


@dataclass(frozen=True)
class Evaluated:
    """Perplexity of a text, and how it was measured.

    Attributes:
        data: the file or dataset.
        skipped: its rows that hold nothing to measure.
    """

    model: Path
    data: str
    seq_len: int
    result: Perplexity
    skipped: Skipped
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "data": self.data,
            "perplexity": self.result.perplexity,
            "loss": self.result.loss,
            "tokens": self.result.tokens,
            "windows": self.result.windows,
            "skipped_rows": self.skipped.count,
            "seq_len": self.seq_len,
            "seconds": self.seconds,
        }

    def lines(self) -> Iterator[str]:
        yield (
            f"perplexity {self.result.perplexity:.2f} over {self.result.tokens:,} tokens "
            f"({self.result.windows} windows of {self.seq_len})"
        )


@links_option
def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    seq_len: int | None = None,
    base: str | Path | None = None,
    strict: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluated:
    """Perplexity of a text in consecutive windows, each predicting from its own start.

    An adapter is folded into its base in memory: the perplexity is that of the model that merge would write.

    Instructions and chats are measured as the whole text that the model would see, the prompt like the answer.

    Args:
        data: a text file, .json or .jsonl records, or the name of a dataset of the hub, as for `train`.
        strict: rows with nothing in them are an error; else they are skipped, counted, and reported by `say`.

    Raises:
        UsageError: the text or the model cannot be used.
    """
    model = Path(model)
    loaded = load_program(model, base=base, trust_remote_code=trust_remote_code, folded=True)
    program = loaded.program.eval()
    tokenizer = load_tokenizer(loaded.model, trust_remote_code=trust_remote_code)
    length = window_length(program, seq_len)
    text = held_out(data, tokenizer, length, strict=strict)
    if line := text.skipped.line(data):
        say(line)
    for window in text.windows:
        check_vocabulary(window, program.vocabulary, data)
    start = perf_counter()
    result = perplexity(
        lambda ids, mask: program(ids, mask).logits, text.windows, lambda n: tick("windows", n)
    )
    return Evaluated(model, str(data), length, result, text.skipped, perf_counter() - start)
