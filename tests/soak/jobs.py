"""The commands that are killed, and the models that they work on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.command import must, randomize, save_tokenizer

FORMATS = ("cutlass", "sparse-bitmask", "safetensors")
VERBS = ("merge", "prune", "prune-layers", "export", "export-onnx")


@dataclass(frozen=True)
class Job:
    """A command line without its output.

    Attributes:
        name: of what it is, for reports.
        words: what follows `spp-fx`.
        replaces: the output is there before, as a copy of this folder, and `--force` is given.
    """

    name: str
    words: tuple[str, ...]
    replaces: Path | None = None

    def to(self, out: Path) -> list[str]:
        return [*self.words, "-o", str(out), "-q", *(["--force"] if self.replaces else [])]


def make_models(root: Path, *, width: int = 256, layers: int = 4) -> None:
    """A random bfloat16 Llama in several weight files, dense and 2:4, and an adapter with random factors."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    share = sum(parameter.nbytes for parameter in model.parameters()) // 5
    model.save_pretrained(root / "dense", max_shard_size=f"{share // 1000}KB")
    save_tokenizer(root / "dense")
    (root / "text.txt").write_text("\n".join("a b c d e f g h i j" for _ in range(60)))
    must("prune", root / "dense", "-o", root / "sparse", "-q")
    must("inject", root / "sparse", "-o", root / "adapter", "--rank", 16, "-q")
    randomize(root / "adapter")


def jobs_of(verb: str, root: Path) -> list[Job]:
    """The commands of a verb, over the models in `root`."""
    dense, sparse = str(root / "dense"), str(root / "sparse")
    calibrated = ("--method", "wanda", "--calib", str(root / "text.txt"), "--samples", "4", "--seq-len", "16")
    if verb == "export":
        return [Job(f"export {each}", ("export", sparse, "--format", each)) for each in FORMATS]
    return {
        "merge": [
            Job("merge", ("merge", str(root / "adapter"))),
            Job("merge --force", ("merge", str(root / "adapter")), replaces=root / "dense"),
        ],
        "export-onnx": [
            Job("export onnx", ("export", sparse, "--format", "onnx-packed", "--no-compare-logits"))
        ],
        "prune": [Job("prune", ("prune", dense))],
        "prune-layers": [Job("prune wanda", ("prune", dense, *calibrated))],
    }[verb]
