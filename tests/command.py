"""Running the command line inside the test's own process, and looking at what it left on disk."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spp_fx.cli import run


@dataclass(frozen=True)
class Result:
    """What a command line said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(*words: object) -> Result:
    """Run `spp-fx WORDS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(word) for word in words])
    return Result(code, out.getvalue(), err.getvalue())


def must(*words: object) -> Result:
    """Run a command line that has to succeed."""
    result = command(*words)
    assert result.code == 0, f"{words}: exit {result.code}\n{result.err}"
    return result


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with the digest of its bytes; folders too, so that an empty one shows."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def header(path: Path) -> bytes:
    """The length and the JSON header of a safetensors file, as they are on disk."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def one_line(text: str) -> str:
    """The only line of a command's stderr."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, f"{len(lines)} lines: {text}"
    assert "Traceback" not in text
    assert "internal error" not in text
    return lines[0]


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a safetensors file in place."""
    values = load_file(path)
    change(values)
    path.unlink()
    save_file({name: value.contiguous() for name, value in values.items()}, path, {"format": "pt"})


def randomize(adapter: Path, seed: int = 0, spread: float = 0.2) -> None:
    """Give an adapter folder random factors, as training would."""
    generator = torch.Generator().manual_seed(seed)

    def fill(values: dict[str, Tensor]) -> None:
        for name in sorted(values):
            values[name] = spread * torch.randn(values[name].shape, generator=generator)

    rewrite(adapter / "adapter_model.safetensors", fill)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single letters."""
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel({**letters, "?": 26, "</s>": 27}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="</s>")
    fast.save_pretrained(folder)
