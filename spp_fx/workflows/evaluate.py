"""eval: the perplexity of a text under a model or an adapter over its base."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from spp_fx.progress import Tick, no_tick
from spp_fx.training.data import all_windows, check_vocabulary
from spp_fx.training.perplexity import Perplexity, perplexity
from spp_fx.workflows.load import load_program, load_tokenizer, window_length


@dataclass(frozen=True)
class Evaluated:
    """Perplexity of a text, and how it was measured."""

    model: Path
    data: Path
    seq_len: int
    result: Perplexity
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "data": str(self.data),
            "perplexity": self.result.perplexity,
            "loss": self.result.loss,
            "tokens": self.result.tokens,
            "windows": self.result.windows,
            "seq_len": self.seq_len,
            "seconds": self.seconds,
        }


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    seq_len: int | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    tick: Tick = no_tick,
) -> Evaluated:
    """Perplexity of a text in consecutive windows, each predicting from its own start.

    Raises:
        UsageError: the text or the model cannot be used.
    """
    model, data = Path(model), Path(data)
    loaded = load_program(model, base=base, trust_remote_code=trust_remote_code)
    program = loaded.program.eval()
    tokenizer = load_tokenizer(loaded.model, trust_remote_code=trust_remote_code)
    length = window_length(program, seq_len)
    windows = all_windows(data, tokenizer, length)
    for window in windows:
        check_vocabulary(window, program.vocabulary, data)
    start = perf_counter()
    result = perplexity(lambda ids, mask: program(ids, mask).logits, windows, lambda n: tick("windows", n))
    return Evaluated(model, data, length, result, perf_counter() - start)
